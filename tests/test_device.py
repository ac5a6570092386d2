"""What a run promises, on a GPU; and on the one that tests/simulated has, whose memory and arithmetic are this machine's. Each run is a
process of its own.

The simulated one finds what is on the wrong device, what has no deterministic way on CUDA, what holds more memory than it should, and where
a thread would wait for the GPU; nothing of CUDA's own kernels and streams, and of NCCL.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from conftest import NO_GPU, ROOT, like, loaded, ragged_rows, repeatable, steps, write_rows
from emulation import bindings, compile_with_torch
from families import CASES
from test_memory import planned

LORA = ("lora.rank=4", "lora.dropout=0.1", "lora.targets=[all-linear]")
KINDS = {"full": (), "full fp16": ("train.precision=fp16",), "bf16 weights": ("train.precision=bf16", "model.dtype=bf16", "optim.name=adamw_bf16"),
         "lora bf16": (*LORA, "train.precision=bf16", "model.dtype=bf16", "train.activation_checkpointing=1"),
         "lora fp16": (*LORA, "train.precision=fp16", "model.dtype=fp16", "train.attention=sdpa"),
         "fused": (*LORA, "train.precision=bf16", "model.dtype=bf16", "train.attention=fused")}
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason=NO_GPU)


def on(device: str, *values, faults: bool = False):
    return pytest.param(device, *values, marks=[pytest.mark.cuda, GPU] if device == "cuda" else [pytest.mark.faults] * faults)


def everywhere(*cases, often: tuple = ()) -> list:
    """Each case on both GPUs; on the simulated one with the long halves of the tests, but those that are `often`."""
    return [on(device, *case, faults=case not in often) for device in ("simulated", "cuda") for case in cases]


@lru_cache(maxsize=1)
def simulated() -> dict[str, str]:
    """The environment in which `torch.cuda` has the simulated GPU."""
    if torch.version.cuda:
        pytest.skip("needs a torch built for CPUs, where nobody else is CUDA")
    libraries = compile_with_torch(ROOT / "tests/simulated", "gpu.cpp"), bindings("CUDA")
    paths = os.pathsep.join([str(ROOT / "tests/simulated"), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "SIMULATED_GPU": os.pathsep.join(map(str, libraries)), "PYTHONPATH": paths}


@pytest.fixture
def run(recipe, wide, tmp_path):
    """`run(device, *options, name=…, ranks=…)` trains four steps of packed rows and gives the run's folder; `module` does something else."""
    write_rows(tmp_path / "many.jsonl", ragged_rows(200))

    def started(device: str, *options: str, name: str = "run", module: str = "train", ranks: int = 1) -> Path:
        where = "cuda" if device == "simulated" else device
        arguments = recipe(f"model.path={wide}", f"data.train={tmp_path / 'many.jsonl'}", f"train.device={where}", "data.packing=true", "data.max_length=128",
                           "train.max_steps=4", "checkpoint.every_steps=2", "checkpoint.keep=3", "optim.lr=1e-3", *options, name=name)
        launch = ["-m", "engine.launch", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
        environment = simulated() if device == "simulated" else None
        done = subprocess.run([sys.executable, *launch, "-m", f"engine.{module}", *arguments], cwd=ROOT, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        (tmp_path / f"{name}.log").write_text(done.stdout + done.stderr)
        return tmp_path / "runs" / name

    return started


@pytest.mark.parametrize(("device", "kind"), everywhere(*((kind,) for kind in KINDS), often=(("lora bf16",),)))
def test_a_resume_and_a_repetition_end_at_the_same_bits(run, tmp_path, device, kind):
    first = run(device, *KINDS[kind], name="first")
    shutil.copytree(first, half := tmp_path / "runs/half")
    shutil.rmtree(half / "checkpoints/step-000000004")
    shutil.rmtree(half / "export")
    (half / "finished.json").unlink()
    for other in (run(device, *KINDS[kind], name="half"), run(device, *KINDS[kind], name="again")):
        assert repeatable(other) == repeatable(first)
        expected, found = (loaded(one / "checkpoints", 4) for one in (first, other))
        for one, two in ((expected.model, found.model), (expected.optimizer, found.optimizer)):
            assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert "resumed after step 2" in (tmp_path / "half.log").read_text()


@pytest.mark.parametrize(("device", "kind", "off"), everywhere(("full", 1e-4), ("full fp16", 1e-2), ("lora bf16", 1e-2), ("lora fp16", 1e-2),
                                                                ("bf16 weights", 1e-2), ("fused", 1e-2), often=(("full", 1e-4),)))
def test_losses_are_those_of_the_cpu_in_fp32(run, device, kind, off):
    options = [option for option in KINDS[kind] if not option.startswith(("train.precision", "train.attention", "model.dtype", "optim.name"))]
    expected, found = (steps(folder) for folder in (run("cpu", *options, name="cpu"), run(device, *KINDS[kind], name=device)))
    assert [one["train/loss"] for one in found] == pytest.approx([one["train/loss"] for one in expected], rel=off)


@pytest.mark.parametrize(("device", "name"), everywhere(*((name,) for name in CASES)))
def test_every_family_trains_and_answers(run, tiny, tmp_path, device, name):
    """With all that a layer can have: adapters by DoRA with dropout, on weights of 16 bits, computed a second time in the backward."""
    kind, changes = CASES[name]
    other = {"rope_theta": None} if "rope_parameters" in changes else {}
    other |= {"hidden_act": None, "hidden_activation": "gelu_pytorch_tanh"} if kind == "gemma3_text" else {}
    folder = like(tiny, tmp_path / "family", model_type=kind, architectures=None, **changes, **other)
    options = (f"model.path={folder}", f"data.validation={tmp_path / 'rows.jsonl'}", "evaluate.at_start=false", "evaluate.samples=2",
               "evaluate.max_new_tokens=20")
    found = [steps(run(device, *options, *more, name=kind)) for kind, more in (("full", ()), ("lora", ("lora.dora=true", *KINDS["lora bf16"])))]
    expected = steps(run("cpu", *options, name="cpu"))
    assert [one["train/loss"] for one in found[0]] == pytest.approx([one["train/loss"] for one in expected], rel=1e-4)
    assert found[1][-1]["train/loss"] < found[1][0]["train/loss"] and found[1][-1]["validation/loss"] > 0


OTHERS = {"pissa": ("lora.rank=4", "lora.init=pissa", "lora.rslora=true", "optim.lora_plus=4", "export.kinds=[adapter,model]"),
          "embeddings": ("lora.rank=4", "lora.modules_to_save=[embed_tokens,lm_head]", "model.add_tokens=['<a>','<b>']"),
          "gguf": ("export.kinds=[model,gguf]", "model.dropout=0.1", "train.activation_checkpointing=2"), "mask": ("train.attention=reference",)}


@pytest.mark.parametrize(("device", "name"), everywhere(*((name,) for name in OTHERS)))
def test_other_ways_to_train(run, device, name):
    losses = [one["train/loss"] for one in steps(run(device, *OTHERS[name]))]
    assert losses == pytest.approx([one["train/loss"] for one in steps(run("cpu", *OTHERS[name], name="cpu"))], rel=1e-4 if name != "gguf" else 1)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(("device", "kind", "off"), everywhere(("full", 1e-6), ("full fp16", 1e-3), ("lora bf16", 1e-3), ("bf16 weights", 1e-3),
                                                                ("fused", 1e-3), often=(("full", 1e-6),)))
def test_two_ranks_take_the_steps_of_one(run, tmp_path, device, kind, off):
    if device == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    one, two, sharded = (run(device, *KINDS[kind], *options, name=name, ranks=ranks)
                         for name, ranks, options in (("one", 1, ()), ("two", 2, ()), ("sharded", 2, ("optim.shard=true",))))
    assert [step["train/loss"] for step in steps(two)] == pytest.approx([step["train/loss"] for step in steps(one)], rel=off)
    assert repeatable(sharded) == repeatable(two) and "sharded over 2 ranks" in (tmp_path / "sharded.log").read_text()


@pytest.mark.parametrize("device", everywhere((), often=((),)))
def test_recomputation_takes_less_memory_and_changes_no_bit(run, device):
    whole, lean = (run(device, "train.micro_batch=8", f"train.activation_checkpointing={every}", name=f"every-{every}") for every in (0, 1))
    peaks = [steps(folder)[-1]["memory/peak_gpu_mb"] for folder in (whole, lean)]
    assert [one["train/loss"] for one in steps(whole)] == [one["train/loss"] for one in steps(lean)] and peaks[1] < peaks[0] - 1, peaks


@pytest.mark.parametrize(("device", "kind"), everywhere(("full",), ("lora bf16",), ("bf16 weights",)))
def test_a_plan_is_what_the_gpu_holds(run, recipe, tiny, tmp_path, device, kind):
    """Beside, on a true one, 32 MiB for cuBLAS, that are torch's to give out as well."""
    folder = like(tiny, tmp_path / "larger", hidden_size=256, intermediate_size=704, num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=4)
    options = (f"model.path={folder}", "export.kinds=[]", *KINDS[kind])
    held = steps(run(device, *options))[-1]["memory/peak_gpu_mb"]
    _, peak = planned(recipe(f"data.train={tmp_path / 'many.jsonl'}", "data.packing=true", "data.max_length=128", *options), "cuda")
    assert 0.95 < (peak / 2**20 + 32 * (device == "cuda")) / held < 1.05, (peak / 2**20, held)


@pytest.mark.parametrize(("device", "kind"), everywhere(("full",), ("lora bf16",), ("fused",)))
def test_verify_holds(run, tmp_path, device, kind):
    run(device, *KINDS[kind], module="verify")
    assert "checks hold" in (tmp_path / "run.log").read_text()


@pytest.mark.parametrize("device", everywhere((), often=((),)))
def test_answers_are_those_of_the_cpu(run, device):
    export = run("cpu") / "export/model"
    command = [sys.executable, "-m", "engine.generate", "--model", export, "--prompt", "red blue", "--dtype", "fp32", "--max-new-tokens", "20"]
    one, other = (subprocess.run([*command, "--device", "cpu" if where == "cpu" else "cuda"], cwd=ROOT, capture_output=True, text=True, check=True,
                                 env=simulated() if where == "simulated" else None).stdout for where in ("cpu", device))
    assert one == other and one.strip()


@pytest.mark.parametrize("device", [on("cpu"), *everywhere((), often=((),))])
def test_what_a_run_measures(run, device):
    folder = run(device)
    last, machine = steps(folder)[-1], json.loads((folder / "run.json").read_text())["machine"]
    assert (last.get("memory/peak_gpu_mb", 0) > 0) == (device != "cpu") == bool(machine["gpus"])
    assert last["time/forward"] > 0 and last["time/backward"] > 0 and 0 < last["train/mfu"] < 1


WAITS = """
import sys, torch
from engine import metrics, train
waits, known = [], metrics.Log.step
metrics.Log.step = lambda *arguments: (waits.append(torch.ops.simulated.waits()), known(*arguments))[1]
train.main(sys.argv[1:])
print("waits:", *(later - before for before, later in zip(waits, waits[1:])))
"""


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=[pytest.mark.faults] * (kind != "full")) for kind in KINDS])
def test_a_step_waits_for_the_gpu_twice(recipe, wide, tmp_path, kind):
    """For its losses and the norm of its gradients, whatever micro-batches it has and whether it saves: the GPU would run out of work."""
    write_rows(tmp_path / "many.jsonl", ragged_rows(200))
    arguments = recipe(f"model.path={wide}", f"data.train={tmp_path / 'many.jsonl'}", "train.device=cuda", "data.packing=true", "data.max_length=128",
                       "train.max_steps=5", "train.micro_batch=2", "checkpoint.every_steps=2", *KINDS[kind])
    done = subprocess.run([sys.executable, "-c", WAITS, *arguments], cwd=ROOT, capture_output=True, text=True, env=simulated())
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search("waits: (.*)", done.stdout)[1] == "2 2 2 2"


REFUSED = """
import pytest, torch, torch.distributed as dist
gpu, other, cpu = torch.ones(3, device="cuda"), torch.ones(3, device="cuda:1"), torch.ones(3)
for one in (cpu, other):
    for operation in (torch.add, torch.mul, torch.dot, torch.maximum, lambda a, b: a.index_add_(0, torch.arange(3, device=a.device), b)):
        with pytest.raises(RuntimeError, match="same device|in one operation"):
            operation(gpu, one)
torch.use_deterministic_algorithms(True)
assert gpu.long().cumsum(0).tolist() == [1, 2, 3]
with pytest.raises(RuntimeError, match="does not have a deterministic implementation"):
    gpu.cumsum(0)
dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
dist.all_reduce(gpu)
with pytest.raises(ValueError, match="expected a contiguous tensor of a GPU"):
    dist.all_reduce(cpu)
before = torch.cuda.memory_allocated()
many = torch.empty(1000, device="cuda")
assert torch.cuda.memory_allocated() - before == 4096 and many.device == torch.device("cuda", 0)
torch.cuda.set_device(2)
assert torch.empty(1, device="cuda").device.index == 2 and gpu.sum().device.index == 0 and gpu.device.index == 0
"""


def test_the_simulated_gpu_refuses_what_a_true_one_does():
    done = subprocess.run([sys.executable, "-c", REFUSED], capture_output=True, text=True, env=simulated())
    assert done.returncode == 0, done.stderr[-3000:]
