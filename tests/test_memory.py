"""What engine.plan says a run will hold is what torch's allocator gives out in that run; and what it says beside."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, ragged_rows, with_weights, write_rows
from forks import forked

from engine import adapter, config, plan
from engine.data import dataset
from engine.data.plan import Plan
from engine.data.tokenizer import load_tokenizer
from engine.dropout import DropoutKeys
from engine.errors import DONE, ENVIRONMENT, EngineError
from engine.memory import Meter, Rehearsal, Shape
from engine.models import weights

MIB = 2**20
CPU = torch.device("cpu")

# Runs training under torch's profiler, which notes each allocation of its own accord, and prints the most that was out between the first
# step's beginning and the last one's, which also copies a checkpoint.
RUN = """
import sys, time
from torch.profiler import ProfilerActivity, profile
from engine import train
from engine.data import loader

marks, through = [], loader.Loader.__iter__

def marked(self):
    for item in through(self):
        marks.append(time.time_ns())
        yield item

loader.Loader.__iter__ = marked
with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
    train.main(sys.argv[1:])
events = sorted((event.start_ns(), event.nbytes()) for event in seen.profiler.kineto_results.events() if event.name() == "[memory]")
out, most = 0, 0
for at, size in events:
    out += size
    most = max(most, out if marks[0] <= at < marks[-1] else 0)
print("most", most)
"""
LORA = ("lora.rank=4", "lora.targets=[all-linear]", "lora.dropout=0.1", "model.dtype=bf16", "train.precision=bf16")
RECIPES = {
    "full": ("train.micro_batch=4",),
    "lora, recomputed": (*LORA, "train.activation_checkpointing=1", "train.micro_batch=4"),
    "fp16, one micro-batch": (*LORA[:3], "model.dtype=fp16", "train.precision=fp16", "train.micro_batch=8"),
    "bf16 weights": ("optim.name=adamw_bf16", "model.dtype=bf16", "train.precision=bf16"),
    "dora, pissa, head": (*LORA, "lora.dora=true", "lora.init=pissa", "lora.modules_to_save=[lm_head]", "train.attention=reference"),
}


@pytest.fixture
def model(tiny, tmp_path):
    """Large enough for weights and activations to count, with a head of its own."""
    folder = tmp_path / "larger"
    folder.mkdir()
    shape = {"hidden_size": 256, "intermediate_size": 640, "num_hidden_layers": 4, "tie_word_embeddings": False, "vocab_size": 340}
    (folder / "config.json").write_text(json.dumps({**TINY, **shape}))
    (folder / "tokenizer.model").write_bytes((tiny / "tokenizer.model").read_bytes())
    return folder


def planned(arguments: list[str], device: str = "cpu", ranks: int = 1) -> tuple[Rehearsal, int]:
    """What is rehearsed for a recipe, and the peak of its own step."""
    cfg = config.load(arguments)
    tokenizer = load_tokenizer(Path(cfg.model.path))
    rows = dataset.load(cfg.data, "train", tokenizer, cfg.train.seed)
    steps = Plan(rows.lengths, rows.targets, cfg.data.max_length, cfg.train.global_batch, cfg.data.packing, True, cfg.train.seed, 1)
    rehearsal = Rehearsal(cfg, Path(cfg.model.path), (tokenizer.size, tokenizer.size), torch.device(device), ranks)
    shape = plan.shape_of(plan.largest_first(steps)[: cfg.train.micro_batch])
    return rehearsal, rehearsal.step(shape, cfg.train.activation_checkpointing, cfg.train.micro_batch * ranks < cfg.train.global_batch).peak


@pytest.mark.parametrize("name", [name if name.startswith("lora,") else pytest.param(name, marks=pytest.mark.faults) for name in RECIPES])
def test_the_peak_is_what_the_allocator_gives_out_in_training(recipe, model, tmp_path, name):
    write_rows(tmp_path / "many.jsonl", ragged_rows(120))
    lora = "lora.rank=4" in RECIPES[name]
    if lora:  # which needs weights
        with_weights(model, json.loads((model / "config.json").read_text()))
    arguments = recipe(f"model.path={model}", f"model.init={'pretrained' if lora else 'random'}", f"data.train={tmp_path / 'many.jsonl'}",
                       "data.max_length=128", "data.packing=true", "train.global_batch=8", "checkpoint.every_s=0", "checkpoint.each_epoch=false",
                       "export.kinds=[]", "optim.lr=1e-4", *RECIPES[name])
    done = subprocess.run([sys.executable, "-c", RUN, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    most = int(done.stdout.split()[-1])


    def held() -> None:
        found = planned(arguments)[1]
        assert 0.97 < found / most < 1.01, (found / MIB, most / MIB)  # kernels take some for themselves

    forked(held)


def test_the_meter_counts_storages_once_and_until_they_are_gone():
    with Meter() as meter:
        one = torch.zeros(MIB)
        assert meter.alive == 4 * MIB
        views = [one[1:], one.view(2, -1), one.detach(), one.add_(1)]
        assert meter.alive == 4 * MIB
        other = one + 1
        assert meter.alive == 8 * MIB
        del one, other
        assert meter.alive == 4 * MIB
        del views
    assert (meter.alive, meter.most) == (0, 8 * MIB)


def rehearsed(recipe, model, *options: str, device: str = "cuda", ranks: int = 1) -> Rehearsal:
    """On a device that is not there."""
    cfg = config.load(recipe(f"model.path={model}", "train.precision=bf16", *options))
    return Rehearsal(cfg, model, (340, 340), torch.device(device), ranks)


SHAPE = Shape([50, 14] * 4, [64] * 4, 100)


def test_what_stays_is_what_the_types_and_the_optimizer_say(recipe, model):
    def held() -> None:
        for options, ranks, (trained, moments) in ((("model.init=random",), 1, (4, 8)), (("model.init=random", "optim.shard=true"), 4, (4, 2)),
                                                   (("model.init=random", "model.dtype=bf16", "optim.name=adamw_bf16"), 2, (2, 4))):
            rehearsal = rehearsed(recipe, model, *options, ranks=ranks)
            count, found = sum(one.numel() for one in rehearsal.model.parameters()), rehearsal.step(SHAPE, 0, True)
            assert (found.frozen, found.trained, found.gradients) == (0, trained * count, trained * count)
            assert found.moments == pytest.approx(moments * count, rel=1e-6)
            assert found.peak == max(found.peaks.values()) > found.trained + found.gradients + found.moments and found.passing > 0
        lora = rehearsed(recipe, model, *LORA)
        count, adapters = sum(one.numel() for one in lora.model.parameters()), sum(one.numel() for one in lora.trained.values())
        found = lora.step(SHAPE, 0, False)
        assert (found.frozen, found.trained, found.moments) == (2 * (count - adapters), 4 * adapters, 8 * adapters)

    forked(held)


def test_a_step_leaves_nothing_and_rehearses_the_same_again(recipe, model):
    def held() -> None:
        rehearsal = rehearsed(recipe, model, "model.init=random")
        before, first = rehearsal.meter.alive, rehearsal.step(SHAPE, 0, True)
        assert rehearsal.meter.alive == before and rehearsal.step(SHAPE, 0, True) == first
        assert first.peak > rehearsal.step(SHAPE, 1, True).peak
        assert first.peaks["forward"] - rehearsal.step(SHAPE, 0, False).peaks["forward"] == first.gradients, "those of micro-batches before"
        assert rehearsal.step(Shape(SHAPE.documents * 2, SHAPE.sequences * 2, 200), 0, True).passing > 1.5 * first.passing

    forked(held)


@pytest.mark.parametrize(("options", "recompute"), [(("model.init=random",), 0), (("model.init=random",), 1), (("lora.rank=2",), 0)])
def test_no_narrow_copies_of_all_weights_are_kept(recipe, model, options, recompute):
    """Autocast would keep them by itself: to the forward's end, and without recomputation to the backward's."""
    def held() -> None:
        written = json.loads((model / "config.json").read_text())
        passing = []
        for layers in (4, 8):
            (model / "config.json").write_text(json.dumps({**written, "num_hidden_layers": layers}))
            rehearsal = rehearsed(recipe, model, *options, ranks=2)
            passing.append(rehearsal.step(Shape([8], [8], 4), recompute, True).passing)
        narrow = 2 * sum(one.numel() for one in rehearsal.model.model.layers[:4].parameters())
        assert passing[1] - passing[0] < 0.1 * narrow

    forked(held)


def test_every_family_can_be_rehearsed(recipe, tmp_path):
    from test_families import CASES, SMALL

    def held() -> None:
        for number, (name, (kind, changes)) in enumerate(CASES.items()):
            (folder := tmp_path / str(number)).mkdir()
            (folder / "config.json").write_text(json.dumps({"model_type": kind, **SMALL, **changes}))
            options = (("model.init=random",), (*LORA, "lora.dora=true", "train.attention=reference"))[number % 2]
            rehearsal = Rehearsal(config.load(recipe(f"model.path={folder}", *options)), folder, (97, 99), torch.device("cuda"), 2)
            found = rehearsal.step(Shape([40, 24], [64], 20), 1, True)
            assert len(rehearsal.model.model.embed_tokens.weight) == 99, name
            assert found.passing > 0 and all(peak > found.frozen + found.trained for peak in found.peaks.values()), name

    forked(held)


def test_a_start_from_an_adapter_is_rehearsed_as_what_it_holds(recipe, tiny, tmp_path):
    keys, start = DropoutKeys(0), tmp_path / "start"
    start.mkdir()
    built = weights.build(tiny, "pretrained", 0, torch.float32, torch.float32, CPU)
    adapter.attach(built, config.Lora(rank=3, targets=["q_proj", "down_proj"], dora=True, modules_to_save=["lm_head"]), keys, 0)
    adapter.save(built, start, str(tiny), 0.0)

    def held() -> None:
        cfg = config.load(recipe(f"lora.start={start}", "model.dtype=bf16", "train.precision=bf16"))
        rehearsal = Rehearsal(cfg, tiny, (340, 340), torch.device("cuda"), 1)
        trained = [one for one in built.parameters() if one.requires_grad]
        assert sorted(rehearsal.trained) == sorted(name for name, one in built.named_parameters() if one.requires_grad)
        assert rehearsal.step(SHAPE, 0, False).trained == sum(one.nbytes for one in trained)

    forked(held)


# ---- The command -----------------------------------------------------------------------------------------------------


def said(recipe, capsys, model, *arguments: str) -> str:
    assert plan.main([*recipe(f"model.path={model}", "model.init=random", "data.packing=true"), *arguments]) == DONE
    return capsys.readouterr().out


def test_the_command_says_what_a_run_will_take(recipe, capsys, model, tmp_path):
    def check() -> None:
        text = said(recipe, capsys, model, "--ranks", "2", "--gpu", "H100", "--memory", "80", "train.device=auto")
        assert "2 ranks, each on one H100 with 80.0 GiB" in text and "of 1,978 TFLOP/s" in text
        assert "global batch 8 sequences = ranks 2 × 4 on average" in text and "79.9 GiB left for what no tensor shows" in text
        assert [line.split()[0] for line in text.splitlines() if "train.activation" in line] == ["train.activation_checkpointing=0",
                                                                                                "train.activation_checkpointing=1"]
        header = next(line for line in text.splitlines() if "train.micro_batch" in line)
        assert header.split()[-3:] == ["1", "2", "4"]
        assert not (tmp_path / "runs").exists(), "planning begins no run"
        text = said(recipe, capsys, model, "train.micro_batch=3")
        assert "2 ranks on one CPU with" in text and "measured on a product" in text and " of code and libraries, and the host's copy, 2 ranks " in text
        assert "of memory" not in said(recipe, capsys, model, "train.device=cuda") and not (tmp_path / "runs").exists()

    forked(check)


def test_what_does_not_fit_is_refused_with_what_does(recipe, capsys, model):
    small = ("--ranks", "1", "--gpu", "A100", "train.micro_batch=4", "train.global_batch=16")

    def check() -> None:
        with pytest.raises(EngineError, match="a step takes .* MiB, expected at most 20.0 MiB; no micro-batch fits: lower") as refused:
            said(recipe, capsys, model, "--memory", str(20 / 1024), *small)
        assert refused.value.exit_code == ENVIRONMENT and refused.value.name == "PLAN-MEMORY" and "too little" in capsys.readouterr().out
        peaks = [float(cell) for line in said(recipe, capsys, model, *small).splitlines() if "checkpointing=0" in line for cell in line.split()[1::2]]
        assert len(peaks) == 5 and peaks[:4] == sorted(peaks[:4])
        with pytest.raises(EngineError, match="; train.micro_batch=2 train.activation_checkpointing=0 fits"):
            said(recipe, capsys, model, "--memory", str((peaks[1] + peaks[2]) / 2 / 1024), *small)
        table = [line.split() for line in capsys.readouterr().out.splitlines() if "checkpointing=0" in line]
        assert table[0][-5:-1] == [f"({peaks[2]}", "MiB)", "–", f"({peaks[4]:g}"], "beyond what does not fit the whole step alone, without gradients before it"

    forked(check)


def test_a_gpu_without_a_figure_is_refused(recipe, capsys, model):
    with pytest.raises(EngineError, match="--gpu: got Voodoo, expected a name that has one of"):
        said(recipe, capsys, model, "--gpu", "Voodoo")


def test_where_ranks_are_on_a_cpu_they_share_its_memory_and_the_copy_of_a_checkpoint_counts():
    cpu, gpu = plan.Place(CPU, 2, 2, 50, 800, None, ""), plan.Place(torch.device("cuda"), 2, 1, 0, 800, None, "")
    assert (cpu.taken(300, 100), gpu.taken(300, 100)) == (800, 300)
    assert cpu.fits(300, 100) and not cpu.fits(301, 100) and gpu.fits(800, 100) and not gpu.fits(801, 0)
    assert plan.Place(CPU, 2, 2, 50, None, None, "").fits(10**18, 0)


@pytest.mark.parametrize(("seconds", "told"), [(1.26, "1.26 s"), (119, "119 s"), (121, "2.02 min"), (7199, "120 min"), (9000, "2.5 h"), (200_000, "2.31 days")])
def test_times_in_words(seconds, told):
    assert plan.clock(seconds) == told
