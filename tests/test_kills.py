"""Live kills: ranks get SIGKILL in every phase of a step, again and again in one run, which ends as if nothing had happened."""

import os
import random
import select
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import Ranks, ragged_rows, write_rows
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_resume import FULL, LORA, result, steps_done

from engine import checkpoint, distributed, errors, optim, saver, tensorfile, train
from engine.data import ledger
from engine.dropout import DropoutKeys
from engine.evaluate import Evaluation
from engine.models import weights

RANKS = 4
PEERS_S = 5.0  # that ranks live on at most once another is dead
LAUNCHER_S = 2.0  # after which they are told to leave, as torchrun tells them at once: before ranks have met, none can notice that one is gone
OPTIONS = ("train.epochs=3", "train.global_batch=4", "data.packing=true", "checkpoint.keep=2", "evaluate.every_steps=2", "checkpoint.every_s=0.02")
KINDS = {"full": FULL, "lora": LORA}


@dataclass(frozen=True)
class Kill:
    """SIGKILL to `rank`, or to all at once, where `rank` passes a point of `phase` for the `nth` time from `step` (0, 1 …) on."""

    step: int
    phase: str
    rank: int
    everyone: bool = False
    nth: int = 0


# Phases, and how many points a step has in each at least. Rank 0 alone copies and writes.
POINTS = {"resume": 4, "forward": 1, "backward": 1, "exchange": 1, "agreement": 1, "optimizer": 2, "evaluation": 2, "copy": 2, "write": 12, "any": 1}


class Trap:
    """In the rank that a kill waits for: it says so at the point and stands still there. The other threads of the rank go on."""

    def __init__(self, kill: Kill, tell: int) -> None:
        self.kill, self.tell, self.step, self.left = kill, tell, 0, kill.nth

    def point(self, phase: str, on_the_way: Callable[[], object] = lambda: None) -> None:
        if phase == self.kill.phase and (self.step >= self.kill.step or phase == "resume"):
            self.left -= 1
            if self.left == -1:
                on_the_way()
                os.write(self.tell, b"x")
                time.sleep(60)

    def around(self, owner: object, name: str, phase: str, thread: str | None = None) -> None:
        """A point before and after every call of `owner.name`."""
        plain = getattr(owner, name)

        def watched(*arguments, **options):
            counts = thread is None or threading.current_thread().name == thread
            if counts:
                self.point(phase)
            found = plain(*arguments, **options)
            if counts:
                self.point(phase)
            return found

        setattr(owner, name, watched)

    def set(self) -> None:
        from torch.nn.parallel import DistributedDataParallel

        from engine import loss

        for owner, name in ((weights, "build"), (optim, "build"), (checkpoint, "opened"), (optim, "load_state"), (distributed, "settle")):
            self.around(owner, name, "resume")
        for owner, name in ((ledger, "write"), (tensorfile, "save"), (checkpoint, "fsync"), (checkpoint, "_sha256"), (os, "rename"), (shutil, "rmtree")):
            self.around(owner, name, "write", thread="checkpoint")
        self.around(Evaluation, "_losses", "evaluation")
        self.around(saver.Saver, "_copied", "copy")
        self.around(torch.optim.AdamW, "step", "optimizer")
        set_keys, entropy, ddp, all_reduce = DropoutKeys.set, loss.summed_cross_entropy, DistributedDataParallel.__init__, distributed.dist.all_reduce

        def noted(keys, step, *arguments):
            self.step = step
            set_keys(keys, step, *arguments)

        def forward(hidden, *arguments, **options):
            self.point("forward")
            if hidden.requires_grad:
                hidden.register_hook(lambda _: self.point("backward"))
            return entropy(hidden, *arguments, **options)

        def wrapped(model, module, *arguments, **options):
            """The gradient of the first parameter is the last to come: by then the other buckets are on their way between ranks."""
            ddp(model, module, *arguments, **options)
            next(one for one in module.parameters() if one.requires_grad).register_hook(lambda _: self.point("exchange"))

        def agreement(tensor):
            self.point("agreement", lambda: all_reduce(tensor, async_op=True))
            all_reduce(tensor)

        DropoutKeys.set, loss.summed_cross_entropy, DistributedDataParallel.__init__, distributed.dist.all_reduce = noted, forward, wrapped, agreement


def many_buckets() -> None:
    """With more than two ranks a sum's order depends on DDP's buckets; a tiny model has one unless they are tiny, too."""
    from torch.nn.parallel import DistributedDataParallel

    plain = DistributedDataParallel.__init__
    DistributedDataParallel.__init__ = lambda self, *a, **k: plain(self, *a, **{**k, "bucket_cap_mb": 0.005})


def rank_of(arguments: list[str], kill: Kill | None = None, tell: int = -1) -> Callable[[], None]:
    """A rank as a launcher starts it, way of leaving included."""

    def run() -> None:
        saver.SHARE = 1.0  # these saves are to be many
        many_buckets()
        if kill and int(os.environ["RANK"]) == kill.rank:
            Trap(kill, tell).set()
        sys.argv = ["train", *arguments]
        errors.run(train.main)

    return run


def strike(arguments: list[str], kill: Kill, log: Path, draw: random.Random) -> float | None:
    """Trains and kills; seconds until the last rank was gone. None if training ended before."""
    run = Path(next(one for one in arguments if one.startswith("run.folder=")).partition("=")[2]) / "cut"
    ours, theirs = os.pipe()
    started = Ranks(RANKS, rank_of(arguments, kill, theirs), log)
    os.close(theirs)
    if kill.phase == "any":
        while steps_done(run) < kill.step and not select.select([ours], [], [], 0.002)[0]:
            pass
        time.sleep(draw.random() * 0.3)
        told = not select.select([ours], [], [], 0)[0]  # nobody writes: the end of the pipe is the end of all ranks
    else:
        assert select.select([ours], [], [], 60)[0], f"{kill}\n{log.read_text()}"
        told = os.read(ours, 1) == b"x"
    os.close(ours)
    for pid in (started.pids if kill.everyone else [started.pids[kill.rank]]) if told else []:
        os.kill(pid, signal.SIGKILL)
    began, codes = time.monotonic(), {}
    while len(codes) < RANKS:
        for rank, pid in enumerate(started.pids):
            if rank not in codes and (found := os.waitpid(pid, os.WNOHANG))[0]:
                codes[rank] = os.waitstatus_to_exitcode(found[1])
            elif rank not in codes and told and time.monotonic() > began + LAUNCHER_S:
                os.kill(pid, signal.SIGTERM)  # ends one that waits for ranks to meet; in training it is only noted
        assert time.monotonic() < began + 60, f"{kill}: ranks hang\n{log.read_text()}"
        time.sleep(0.01)
    took = time.monotonic() - began
    if not told:
        assert set(codes.values()) == {0}, f"{kill}: {codes}\n{log.read_text()}"
        return None
    assert codes[kill.rank] == -signal.SIGKILL and 0 not in codes.values(), f"{kill}: {codes}"
    return took


def undisturbed(recipe, kind: str, tmp_path: Path) -> tuple[list[str], dict[str, str], int]:
    """Arguments of the run to be cut, what it must end as, and its number of steps. Nothing was saved by the clock in the one that was let alone."""
    rows = write_rows(tmp_path / "held_out.jsonl", ragged_rows(5, seed=9))
    options = (*KINDS[kind], *OPTIONS, f"data.validation={rows}")
    log = tmp_path / "whole.log"
    assert Ranks(RANKS, rank_of(recipe(*options, "checkpoint.every_s=0", name="whole")), log).wait() == [0] * RANKS, log.read_text()
    return recipe(*options, name="cut"), result(tmp_path / "runs/whole"), steps_done(tmp_path / "runs/whole") - 1  # one line is of step 0


def chain(arguments: list[str], kills: Iterator[Kill], tmp_path: Path, draw: random.Random) -> dict[Kill, float]:
    """Strikes the run again and again, then lets it end; the kills and how long the last rank lived."""
    struck: dict[Kill, float] = {}
    for kill in kills:
        log = tmp_path / "cut.log"
        log.unlink(missing_ok=True)
        if (took := strike(arguments, kill, log, draw)) is None:
            return struck
        assert took <= PEERS_S, f"{kill}: a rank lived {took:.1f} s longer\n{log.read_text()}"
        struck[kill] = took
    log = tmp_path / "end.log"
    assert Ranks(RANKS, rank_of(arguments), log).wait() == [0] * RANKS, log.read_text()
    return struck


def compare(run: Path, expected: dict[str, str], num_steps: int) -> None:
    assert result(run) == expected
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, num_steps + 1)), "a step appears twice or not at all in TensorBoard"
    judged = [event.step for event in events.Scalars("validation/loss")]
    assert judged == sorted(set(judged)) and judged[0] == 0 and judged[-1] == num_steps


@pytest.mark.parametrize("kind", [pytest.param("full", marks=pytest.mark.faults), "lora"])
def test_killed_in_the_phases_of_first_last_and_epochs_last_steps(recipe, tmp_path, kind):
    arguments, expected, num_steps = undisturbed(recipe, kind, tmp_path)
    epoch = num_steps // 3
    kills = {"full": [Kill(0, "exchange", 2), Kill(epoch - 1, "write", 0, nth=5), Kill(epoch, "resume", 1, nth=3), Kill(num_steps - 1, "evaluation", 3)],
             "lora": [Kill(0, "forward", 0, everyone=True), Kill(epoch - 1, "copy", 0, nth=1), Kill(epoch, "backward", 3),
                      Kill(num_steps - 1, "write", 0, nth=9)]}
    struck = chain(arguments, iter(kills[kind]), tmp_path, random.Random(0))
    assert list(struck) == kills[kind]
    compare(tmp_path / "runs/cut", expected, num_steps)


def at_random(draw: random.Random, count: int, num_steps: int) -> Iterator[Kill]:
    """Kills at steps that do not fall, at most four apart, so that many come in a resume or in the first step after one."""
    step = 0
    for _ in range(count):
        step = min(num_steps - 1, step + draw.randrange(5))
        phase = draw.choice(list(POINTS))
        rank = 0 if phase in ("copy", "write") else draw.randrange(RANKS)
        yield Kill(step, phase, rank, draw.random() < 0.3, draw.randrange(POINTS[phase]))


@pytest.mark.faults
def test_two_hundred_live_kills(recipe, tmp_path, capsys):
    seed, struck, longest, tally = int(os.environ.get("KILLS_SEED", time.time())), 0, 0.0, {}
    draw, began = random.Random(seed), time.monotonic()
    with capsys.disabled():
        print(f"\nKILLS_SEED={seed}", flush=True)
    for kind in KINDS:
        arguments, expected, num_steps = undisturbed(recipe, kind, tmp_path)
        of_kind = 0
        while of_kind < 100:
            done = chain(arguments, at_random(draw, min(10, 100 - of_kind), num_steps), tmp_path, draw)
            compare(tmp_path / "runs/cut", expected, num_steps)
            shutil.rmtree(tmp_path / "runs/cut")
            of_kind += len(done)
            longest = max([longest, *done.values()])
            for kill in done:
                tally[kill.phase] = tally.get(kill.phase, 0) + 1
            with capsys.disabled():
                print(f"{kind}: {of_kind} kills, the last rank gone after {longest:.2f} s at most; {time.monotonic() - began:.0f} s", flush=True)
        shutil.rmtree(tmp_path / "runs/whole")
        struck += of_kind
    with capsys.disabled():
        print(f"{struck} live kills of {RANKS} ranks, by phase {tally}: every run ended bit-identical; the last rank gone after {longest:.2f} s at most")
    assert struck == 200
