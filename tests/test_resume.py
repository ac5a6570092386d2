"""Invariant 6: a run killed at any moment and started again ends bit-identical to one that was left alone."""

import ctypes
import hashlib
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Ranks, new_peak, repeatable, steps
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from engine import distributed, metrics, optim, train
from engine.data import ledger
from engine.errors import CHECKPOINT, PREEMPTED, EngineError

FULL = ("model.dropout=0.2",)
LORA = ("lora.rank=4", "lora.dropout=0.3", "lora.targets=[q_proj,down_proj]", "model.dropout=0.1")
LONG = ("train.epochs=4", "checkpoint.every_steps=2", "checkpoint.keep=3", "data.packing=true", "train.global_batch=4")


def result(run: Path) -> dict[str, str]:
    """A digest of all that must repeat bit for bit: parameters, both moments, the record of steps, the export."""
    last = sorted((run / "checkpoints").iterdir())[-1]
    found = {f"{last.name}/{name}": hashlib.sha256((last / name).read_bytes()).hexdigest() for name in ("model.safetensors", "optimizer.safetensors")}
    for path in (run / "export").glob("*/*.safetensors"):
        found[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return {**found, "metrics": json.dumps(repeatable(run))}


def steps_done(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def kill_after(started: Ranks, run: Path, step: int, delay_s: float) -> None:
    """SIGKILL to all ranks a moment after `step` lines are in the record."""
    end = time.monotonic() + 60
    while steps_done(run) < step:
        assert time.monotonic() < end, started.log.read_text()
        time.sleep(0.001)
    time.sleep(delay_s)
    started.kill()
    assert any(code == -9 for code in started.wait()), "the run was over before it could be killed"


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("kind", [FULL, LORA], ids=["full", "lora"])
def test_killed_and_resumed_equals_undisturbed(recipe, ranks, trained, tmp_path, size, kind):
    trained(size, recipe(*kind, *LONG, name="whole"))
    draw = random.Random(size * 10 + len(kind))
    run = tmp_path / "runs" / "cut"
    epoch = steps(tmp_path / "runs/whole")[0]["train/epoch"]
    at = sorted({draw.randrange(1, 5), round(1 / epoch) + 1, draw.randrange(6, 10)})  # one of them just past an epoch's end
    for step in at:
        kill_after(ranks(size, recipe(*kind, *LONG, name="cut")), run, step, draw.random() * 0.03)
    trained(size, recipe(*kind, *LONG, name="cut"))
    assert result(run) == result(tmp_path / "runs" / "whole")
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    seen = [event.step for event in events.Scalars("train/loss")]
    assert seen == list(range(1, len(seen) + 1)), "a step appears twice or not at all in TensorBoard"


def test_first_step_after_a_resume_has_the_bucket_layout_of_later_steps(recipe, ranks, trained, tmp_path, monkeypatch):
    """With four ranks the ring's order of addition depends on DDP's buckets, which change after a process's first
    backward. Small buckets make many of them; without `distributed.settle` this test fails."""
    from torch.nn.parallel import DistributedDataParallel

    plain = DistributedDataParallel.__init__
    monkeypatch.setattr(DistributedDataParallel, "__init__", lambda self, *a, **k: plain(self, *a, **{**k, "bucket_cap_mb": 0.005}))
    trained(4, recipe(*FULL, *LONG, name="whole"))
    for last in (2, 4, 7):
        stopped = ranks(4, lambda last=last: stop_after(last, recipe(*FULL, *LONG, name="cut")))
        assert set(stopped.wait()) == {PREEMPTED}
    trained(4, recipe(*FULL, *LONG, name="cut"))
    assert result(tmp_path / "runs/cut") == result(tmp_path / "runs/whole")


def stop_after(step: int, arguments: list[str]) -> int:
    """Trains and sends itself SIGTERM once `step` is done."""
    log_step = metrics.Log.step

    def step_and_ask(self, number, scalars):
        log_step(self, number, scalars)
        if number == step - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    metrics.Log.step = step_and_ask
    return train.main(arguments)


@pytest.mark.parametrize("variant", [("lora.dora=true", "lora.targets=[all-linear]"), ("lora.init=pissa", "lora.rslora=true", "lora.rank_pattern={v_proj: 2}"),
                                     ("lora.modules_to_save=[embed_tokens,lm_head]", "lora.alpha_pattern={q_proj: 3}")], ids=["dora", "pissa", "whole"])
def test_every_variant_of_lora_resumes_to_the_bit(recipe, ranks, trained, tmp_path, variant):
    options = ["lora.rank=4", "lora.dropout=0.2", "model.dtype=bf16", "export.kinds=[adapter,model]", *LONG, *variant]
    trained(2, recipe(*options, name="whole"))
    assert set(ranks(2, lambda: stop_after(4, recipe(*options, name="cut"))).wait()) == {PREEMPTED}
    trained(2, recipe(*options, name="cut"))
    assert result(tmp_path / "runs/cut") == result(tmp_path / "runs/whole")
    for name in ("adapter/adapter_model.safetensors", "adapter/adapter_config.json", "model/model.safetensors"):
        assert (tmp_path / "runs/whole/export" / name).read_bytes() == (tmp_path / "runs/cut/export" / name).read_bytes(), name
        agreement = json.loads((tmp_path / "runs/cut/export" / name.split("/")[0] / "engine.json").read_text())["agreement_with_training"]
        assert agreement["kl"] < 1e-5


def turned(svd):
    """Another library's singular vectors: as good as the first's, and of the other sign."""
    def other(*arguments, **options):
        left, values, right = svd(*arguments, **options)
        return -left, values, -right

    return other


def test_pissas_start_is_state_and_is_found_once(recipe, ranks, trained, tmp_path):
    """Bits and signs of singular vectors depend on threads and libraries: rank 0's of the first launch are everybody's, whatever others find later."""
    options = ("lora.rank=4", "lora.dropout=0.2", "lora.init=pissa", "lora.dora=true", *LONG)

    def other(on: tuple[int, ...], what: Callable[[], int]) -> Callable[[], int]:
        def run() -> int:
            if int(os.environ["RANK"]) in on:
                torch.linalg.svd = turned(torch.linalg.svd)
            return what()

        return run

    trained(2, recipe(*options, name="whole"))
    started = ranks(2, other((1,), lambda: stop_after(4, recipe(*options, name="cut"))))
    assert set(started.wait()) == {PREEMPTED}, started.log.read_text()
    started = ranks(2, other((0, 1), lambda: train.main(recipe(*options, name="cut"))))
    assert started.wait() == [0, 0], started.log.read_text()
    assert result(tmp_path / "runs/cut") == result(tmp_path / "runs/whole")


def test_asked_to_stop_saves_and_goes_on(recipe, ranks, trained, tmp_path):
    trained(2, recipe(*FULL, *LONG, name="whole"))
    stopped = ranks(2, lambda: stop_after(5, recipe(*FULL, *LONG, "checkpoint.every_steps=0", "checkpoint.each_epoch=false", name="cut")))
    assert stopped.wait() == [PREEMPTED, PREEMPTED]
    assert sorted(path.name for path in (tmp_path / "runs/cut/checkpoints").iterdir()) == ["step-000000005"]
    state = json.loads((tmp_path / "runs/cut/checkpoints/step-000000005/state.json").read_text())
    accounts = json.loads((tmp_path / "runs/cut/ledger.json").read_text())["train"]
    assert accounts["documents_trained"] == state["trained"][0] > 0, "the ledger is that of the checkpoint"
    trained(2, recipe(*FULL, *LONG, name="cut"))
    assert result(tmp_path / "runs/cut") == result(tmp_path / "runs/whole")


@pytest.mark.parametrize("packing", ["true", "false"])
def test_resume_at_another_world_size_goes_on_with_the_same_rows(recipe, ranks, trained, tmp_path, monkeypatch, packing):
    """Stopped at two ranks, gone on with at 4, 3 (which divides nothing) and 1, again and again: every step trains the documents
    that the uninterrupted run trained, in its order, to the same loss."""
    planned = tmp_path / "order.jsonl"
    as_planned = ledger.as_planned

    def noted(step, counts):  # as ranks trained it: numbers and tokens are summed over them
        with planned.open("a") as file:
            file.write(json.dumps([step.number, *(int(count) for count in counts)]) + "\n")
        return as_planned(step, counts)

    monkeypatch.setattr(ledger, "as_planned", noted)
    options = (*FULL, *LONG, "optim.lr=1e-3", f"data.packing={packing}")
    trained(2, recipe(*options, name="whole"))
    for size, stop in ((2, 2), (4, 4), (1, 6), (3, 8)):
        assert set(ranks(size, lambda stop=stop: stop_after(stop, recipe(*options, name="cut"))).wait()) == {PREEMPTED}
    trained(4, recipe(*options, name="cut"))
    whole, cut = (steps(tmp_path / f"runs/{name}") for name in ("whole", "cut"))
    assert [line["step"] for line in whole] == [line["step"] for line in cut] and len(whole) > 8
    for one, other in zip(whole, cut, strict=True):
        assert one["train/tokens"] == other["train/tokens"] and one["train/targets"] == other["train/targets"]
        assert one["train/loss"] == pytest.approx(other["train/loss"], rel=1e-6)
    documents = {tuple(json.loads(line)) for line in planned.read_text().splitlines()}
    assert len(documents) == len(whole), "two runs trained different documents in a step"
    ledgers = [json.loads((tmp_path / f"runs/{name}/ledger.json").read_text()) for name in ("whole", "cut")]
    assert ledgers[0] == ledgers[1] and ledgers[0]["train"]["files"][0]["trained"] == {"4": 23}


def test_dropout_does_not_depend_on_the_split(recipe, trained, tmp_path):
    """Masks belong to a sequence's place in the global batch, so even with dropout on the split changes nothing but rounding."""
    losses = []
    for size, micro_batch in ((1, 4), (2, 1), (4, 2)):
        trained(size, recipe(*LORA, "train.max_steps=3", f"train.micro_batch={micro_batch}", name=f"w{size}"))
        losses.append([step["train/loss"] for step in steps(tmp_path / f"runs/w{size}")])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and losses[0] == pytest.approx(losses[2], rel=1e-5)


def test_a_changed_recipe_is_refused_by_name(recipe, ranks, tmp_path):
    assert set(ranks(1, lambda: stop_after(3, recipe(*LONG))).wait()) == {PREEMPTED}
    with pytest.raises(EngineError, match="optim.lr: 0.01 → 0.02") as caught:
        train.main(recipe(*LONG, "optim.lr=2e-2"))
    assert caught.value.exit_code == CHECKPOINT
    assert json.loads((tmp_path / "runs/run/last_error.json").read_text())["exit_code"] == CHECKPOINT


def test_finished_run_is_kept_and_the_next_gets_its_own_folder(recipe, trained, tmp_path):
    trained(1, recipe("train.max_steps=1"))
    before = (tmp_path / "runs/run/metrics.jsonl").read_bytes()
    trained(1, recipe("train.max_steps=2"))
    assert (tmp_path / "runs/run/metrics.jsonl").read_bytes() == before and steps_done(tmp_path / "runs/run-2") == 2
    assert load_file(tmp_path / "runs/run-2/export/model/model.safetensors")


@pytest.mark.parametrize(("size", "shard"), [(1, "false"), pytest.param(2, "true", marks=pytest.mark.faults)])
def test_a_resumed_run_holds_no_more_than_one_that_was_not_stopped(recipe, ranks, tiny, tmp_path, size, shard):
    """80 MB of weights and 160 of moments: they are read to where they belong and lie nowhere else."""
    model = tmp_path / "model"
    shutil.copytree(tiny, model)
    (model / "model.safetensors").unlink()
    wide = {**json.loads((model / "config.json").read_text()), "hidden_size": 512, "intermediate_size": 3600}
    (model / "config.json").write_text(json.dumps(wide))
    arguments = recipe(f"model.path={model}", "model.init=random", f"optim.shard={shard}", "train.max_steps=4", "train.epochs=2", "checkpoint.each_epoch=false",
                       "checkpoint.every_s=0", "export.kinds=[]", "log.tensorboard=false", "optim.lr=1e-4", "train.global_batch=2")
    measured = tmp_path / "measured"

    def watched(stop: bool) -> int:
        """Notes resident MB, and their peak since the model was built, once all is read and after each step."""
        log_step, build, wrap = metrics.Log.step, optim.build, distributed.wrap

        def note(when) -> None:
            ctypes.CDLL(None).malloc_trim(0)  # what is resident is then what is held
            with measured.open("a") as file:
                file.write(f"{stop} {when} {os.environ['RANK']} {status('VmRSS')} {status('VmHWM')}\n")

        def step(self, number, scalars):
            log_step(self, number, scalars)
            note(number)
            if stop and number == 1:
                os.kill(os.getpid(), signal.SIGTERM)

        def built(*arguments):
            new_peak()
            return build(*arguments)

        metrics.Log.step, optim.build, distributed.wrap = step, built, lambda *rest: (note(0), wrap(*rest))[1]
        return train.main(arguments)

    for stop in (True, False):
        assert ranks(size, lambda stop=stop: watched(stop)).wait() == [PREEMPTED if stop else 0] * size
    assert len(list((tmp_path / "runs/run/checkpoints").iterdir())) == 2
    lines = map(str.split, measured.read_text().splitlines())
    found = {(stop == "True", int(step), int(rank)): (float(rss), float(peak)) for stop, step, rank, rss, peak in lines}
    for rank in range(size):
        (read, peak), (fresh, _), (resumed, _) = found[False, 0, rank], found[True, 1, rank], found[False, 3, rank]
        print(f"rank {rank}: {read:.0f} MB once all is read, {peak:.0f} at most until then; {resumed:.0f} after a step, {fresh:.0f} in a run that begins")
        assert peak < read + 40 and resumed < fresh + 40, "half of the weights, or of a rank's moments"


def status(name: str) -> float:
    """MB of a line of this process's status."""
    return int(next(line for line in open("/proc/self/status") if line.startswith(name)).split()[1]) / 1024
