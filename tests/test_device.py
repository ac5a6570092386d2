"""What a run promises, on a GPU; on the CPU as well, where it shows that these tests work. Each run is a process of its own."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import NO_GPU, ROOT, TINY, loaded, ragged_rows, repeatable, steps, write_rows
from test_memory import planned

from engine.models import weights

LORA = ("lora.rank=4", "lora.dropout=0.1", "lora.targets=[all-linear]")
KINDS = {"full": (), "full fp16": ("train.precision=fp16",), "bf16 weights": ("train.precision=bf16", "model.dtype=bf16", "optim.name=adamw_bf16"),
         "lora bf16": (*LORA, "train.precision=bf16", "model.dtype=bf16", "train.activation_checkpointing=1"),
         "lora fp16": (*LORA, "train.precision=fp16", "model.dtype=fp16"),
         "fused": (*LORA, "train.precision=bf16", "model.dtype=bf16", "train.attention=fused")}
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason=NO_GPU)


def on(device: str, *values, faults: bool = False):
    return pytest.param(device, *values, marks=[pytest.mark.cuda, GPU] if device == "cuda" else [pytest.mark.faults] * faults)


@pytest.fixture
def run(recipe, wide, tmp_path):
    """`run(device, *options, name=…)` trains four steps of packed rows and gives the run's folder; `module` does something else."""
    write_rows(tmp_path / "many.jsonl", ragged_rows(200))

    def started(device: str, *options: str, name: str = "run", module: str = "train", code: int = 0) -> Path:
        arguments = recipe(f"model.path={wide}", f"data.train={tmp_path / 'many.jsonl'}", f"train.device={device}", "data.packing=true", "data.max_length=128",
                           "train.max_steps=4", "checkpoint.every_steps=2", "checkpoint.keep=3", "optim.lr=1e-3", *options, name=name)
        done = subprocess.run([sys.executable, "-m", f"engine.{module}", *arguments], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == code, done.stdout[-3000:] + done.stderr[-3000:]
        (tmp_path / f"{name}.log").write_text(done.stdout + done.stderr)
        return tmp_path / "runs" / name

    return started


@pytest.mark.parametrize(("device", "kind"), [on("cpu", "lora bf16"), *(on("cpu", kind, faults=True) for kind in KINDS if kind not in ("lora bf16", "fused")),
                                              *(on("cuda", kind) for kind in KINDS)])
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


@pytest.mark.parametrize(("device", "kind", "off"), [on("cuda", kind, off) for kind, off in (("full", 1e-4), ("full fp16", 1e-2), ("lora bf16", 1e-2),
                                                                                          ("lora fp16", 1e-2), ("bf16 weights", 1e-2), ("fused", 1e-2))])
def test_losses_are_those_of_the_cpu_in_fp32(run, device, kind, off):
    options = [option for option in KINDS[kind] if not option.startswith(("train.precision", "train.attention", "model.dtype", "optim.name"))]
    expected, found = (steps(folder) for folder in (run("cpu", *options, name="cpu"), run(device, *KINDS[kind], name=device)))
    assert [one["train/loss"] for one in found] == pytest.approx([one["train/loss"] for one in expected], rel=off)


@pytest.mark.parametrize("device", [on("cuda")])
def test_recomputation_takes_less_memory_and_changes_no_bit(run, device):
    whole, lean = (run(device, "train.micro_batch=8", f"train.activation_checkpointing={every}", name=f"every-{every}") for every in (0, 1))
    peaks = [steps(folder)[-1]["memory/peak_gpu_mb"] for folder in (whole, lean)]
    assert [one["train/loss"] for one in steps(whole)] == [one["train/loss"] for one in steps(lean)] and peaks[1] < peaks[0] - 1, peaks


@pytest.mark.parametrize(("device", "kind"), [on("cuda", "full"), on("cuda", "lora bf16"), on("cuda", "bf16 weights")])
def test_a_plan_is_what_the_gpu_holds(run, recipe, tiny, tmp_path, device, kind):
    """Beside 32 MiB for cuBLAS, that are torch's to give out as well."""
    folder = tmp_path / "larger"
    folder.mkdir()
    shape = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8, "num_attention_heads": 16, "num_key_value_heads": 8, "vocab_size": 340}
    (folder / "config.json").write_text(json.dumps(config := {**TINY, **shape}))
    (folder / "tokenizer.model").write_bytes((tiny / "tokenizer.model").read_bytes())
    built = weights.build(folder, "random", 3, torch.float32, torch.float32, torch.device("cpu"))
    weights.write_folder(folder, config, weights.untied(built).items())
    options = (f"model.path={folder}", "export.kinds=[]", *KINDS[kind])
    held = steps(run(device, *options))[-1]["memory/peak_gpu_mb"]
    _, peak = planned(recipe(f"data.train={tmp_path / 'many.jsonl'}", "data.packing=true", "data.max_length=128", *options), device)
    assert 0.95 < (peak / 2**20 + 32) / held < 1.05, (peak / 2**20, held)


@pytest.mark.parametrize(("device", "kind"), [on("cuda", "full"), on("cuda", "lora bf16"), on("cuda", "fused")])
def test_verify_holds(run, tmp_path, device, kind):
    run(device, *KINDS[kind], module="verify")
    assert "checks hold" in (tmp_path / "run.log").read_text()


@pytest.mark.parametrize("device", [on("cuda")])
def test_answers_are_those_of_the_cpu(run, device):
    export = run("cpu") / "export/model"
    command = [sys.executable, "-m", "engine.generate", "--model", export, "--prompt", "red blue", "--dtype", "fp32", "--max-new-tokens", "20"]
    one, other = (subprocess.run([*command, "--device", where], cwd=ROOT, capture_output=True, text=True, check=True).stdout for where in ("cpu", device))
    assert one == other and one.strip()


@pytest.mark.parametrize("device", [on("cpu"), on("cuda")])
def test_what_a_run_measures(run, device):
    folder = run(device)
    last, machine = steps(folder)[-1], json.loads((folder / "run.json").read_text())["machine"]
    assert (last.get("memory/peak_gpu_mb", 0) > 0) == (device == "cuda") == bool(machine["gpus"])
    assert last["time/forward"] > 0 and last["time/backward"] > 0 and 0 < last["train/mfu"] < 1
