"""Told to stop, a run saves and leaves with 75, whatever it is at and whoever is told; its processes do not outlive the launcher."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import ROOT, ragged_rows, write_rows
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_resume import FULL, LONG, result, steps_done
from test_watchdog import command, kill_self, on_call, stop_self

from engine import checkpoint, evaluate, metrics, optim
from engine.errors import PREEMPTED
from engine.models import weights
from engine.signals import SAME_S

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def until(true: Callable[[], bool], what: str, timeout_s: float = 60) -> None:
    end = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < end, what
        time.sleep(0.005)


def saved(run: Path) -> int:
    """The newest checkpoint's step; asserts that every one there is whole and none half written under its name."""
    whole = [path for path in (run / "checkpoints").glob("step-*")]
    assert not [damage for path in whole if (damage := checkpoint.damage(path))]
    return checkpoint.newest_whole(run / "checkpoints") or 0


def last_step(run: Path) -> int:
    """The last in the record."""
    return json.loads((run / "metrics.jsonl").read_text().rpartition("}")[0].rpartition("\n")[2] + "}")["step"] if steps_done(run) else 0


def nothing_lost(run: Path) -> int:
    """The steps done, all of which are in the newest checkpoint."""
    assert saved(run) == last_step(run)
    return saved(run)


# --- ranks that are told ---------------------------------------------------------------------------------------------

# before which call of what, and how many steps are then done more; that of a save is in the background, and the loop may be a step further
CHAIN = [(signal.SIGTERM, 1, weights, "build", 1, {1}), (signal.SIGUSR1, 0, optim, "learning_rate", 1, {1}),
         (signal.SIGINT, 1, evaluate.Evaluation, "run", 1, {2}), (signal.SIGTERM, 0, checkpoint, "save", 1, {3, 4}),
         (signal.SIGUSR1, 1, optim, "unscale_and_clip", 1, {2})]


def test_one_rank_is_told_and_all_save_the_same_step(recipe, ranks, trained, tmp_path):
    options = (*FULL, *LONG, f"data.validation={tmp_path}/rows.jsonl", "evaluate.every_steps=3", "evaluate.at_start=false")
    trained(2, recipe(*options, name="whole"))
    run, done = tmp_path / "runs/cut", 0
    for number, rank, of, name, call, more in CHAIN:
        started = ranks(2, lambda number=number, rank=rank, of=of, name=name, call=call: (
            on_call(rank, of, name, call, lambda: kill_self(number)), command(recipe(*options, name="cut"))))
        assert started.wait() == [PREEMPTED, PREEMPTED], started.log.read_text()
        assert "ERROR" not in started.log.read_text() and not (run / "last_error.json").exists()
        assert nothing_lost(run) - done in more, (name, started.log.read_text())
        done = nothing_lost(run)
    trained(2, recipe(*options, name="cut"))
    assert result(run) == result(tmp_path / "runs/whole")


@pytest.mark.parametrize("last", [pytest.param(False, marks=pytest.mark.faults), True], ids=["on the way", "last step"])
def test_a_stop_saves_before_an_evaluation_that_is_due_and_the_next_launch_makes_up_for_it(recipe, ranks, trained, tmp_path, last):
    """Told in a step after which an evaluation of an hour is due: what can be lost is saved at once. The launch after it is killed as well,
    once it has evaluated. In the end each evaluation is there once, in the record and in TensorBoard, as if nothing had happened."""
    options = (*FULL, *LONG, f"data.validation={tmp_path}/rows.jsonl", "evaluate.every_steps=3", "train.max_steps=6", "checkpoint.every_steps=0",
               "checkpoint.each_epoch=false", "checkpoint.every_s=0")
    trained(2, recipe(*options, name="whole"))
    run, at = tmp_path / "runs/cut", 6 if last else 3

    def told() -> None:
        on_call(1, optim, "unscale_and_clip", at - 1, lambda: kill_self(signal.SIGUSR1))
        for rank in (0, 1):
            on_call(rank, optim, "unscale_and_clip", at, lambda rank=rank: on_call(rank, evaluate.Evaluation, "run", 1, lambda: os._exit(9)))
        command(recipe(*options, name="cut"))

    started = ranks(2, told)
    assert started.wait() == [PREEMPTED, PREEMPTED], started.log.read_text()
    assert nothing_lost(run) == at
    started = ranks(2, lambda: (on_call(0, metrics, "Stopwatch", 1, kill_self), command(recipe(*options, name="cut"))))
    assert -signal.SIGKILL in started.wait() and last_step(run) == at and "validation/loss" in (run / "metrics.jsonl").read_text().splitlines()[-1]
    trained(2, recipe(*options, name="cut"))
    assert result(run) == result(tmp_path / "runs/whole")
    points = []
    for name in ("cut", "whole"):
        (events := EventAccumulator(str(tmp_path / "runs" / name / "tensorboard"))).Reload()
        points.append({tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]
                       if not tag.startswith((*metrics.MEASURED, "final/"))})
    assert points[0] == points[1] and [step for step, _ in points[0]["validation/loss"]] == [0, 3, 6]


def test_a_second_signal_leaves_at_once_though_torch_is_waiting(recipe, ranks, tmp_path):
    """Rank 1 is stopped, so rank 0 is inside an exchange, where Python runs no handlers."""
    run = tmp_path / "runs/run"
    arguments = recipe("train.epochs=9", "checkpoint.every_steps=2", "checkpoint.each_epoch=false")
    started = ranks(2, lambda: (on_call(1, optim, "learning_rate", 4, stop_self), command(arguments)))
    until(lambda: steps_done(run) == 3, "three steps")
    time.sleep(0.3)
    began = time.monotonic()
    for _ in range(2):
        os.kill(started.pids[0], signal.SIGTERM)
        time.sleep(SAME_S + 0.1)
    assert os.waitpid(started.pids[0], 0)[1] == 143 << 8 and time.monotonic() - began < 2 * SAME_S + 1
    started.kill()
    assert saved(run) == 2


def test_one_request_that_comes_twice_is_one(recipe, ranks, tmp_path):
    """As from a scheduler that signals all processes of a job, of which the launcher sends it on to the ranks again."""
    arguments = recipe("train.epochs=100000", "checkpoint.every_steps=0", "checkpoint.each_epoch=false", "log.tensorboard=false")
    started = ranks(2, lambda: (on_call(0, checkpoint, "save", 1, lambda: time.sleep(0.6)), command(arguments)))
    until(lambda: steps_done(tmp_path / "runs/run") > 3, "three steps")
    for _ in range(2):
        for pid in started.pids:
            os.kill(pid, signal.SIGTERM)
        time.sleep(0.2)
    assert started.wait() == [PREEMPTED, PREEMPTED], started.log.read_text()
    assert nothing_lost(tmp_path / "runs/run") > 3


# --- through the launcher --------------------------------------------------------------------------------------------


class Launch:
    """`./torchrun.sh` without its shell: the launcher, its ranks, and theirs."""

    def __init__(self, arguments: list[str], size: int, log: Path) -> None:
        self.log = log
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in a script's background job
        self.process = subprocess.Popen(
            [sys.executable, "-m", "engine.launch", "--standalone", "--nproc-per-node", str(size), "-m", "engine.train", *arguments], cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=log.open("w"), stderr=subprocess.STDOUT, text=True)
        signal.signal(signal.SIGINT, before)

    def processes(self) -> list[int]:
        """All that came from the launcher and live, found by what is only theirs: the run's log is their output."""
        found = []
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and os.path.samefile(entry / "fd/2", self.log):
                    found.append(int(entry.name))
            except OSError:
                pass
        return found

    def listens(self) -> bool:
        """Whether Python has begun, and the launcher with it."""
        caught = int(re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{self.process.pid}/status").read_text())[1], 16)
        return bool(caught >> (signal.SIGUSR1 - 1) & 1)

    def ranks(self) -> list[int]:
        return [pid for pid in self.processes() if pid != self.process.pid]

    def end(self, timeout_s: float = 60) -> int:
        code = self.process.wait(timeout_s)
        until(lambda: not self.processes(), "processes are left", 10)
        return code


@pytest.fixture
def launch(tmp_path) -> Iterator[Callable[..., Launch]]:
    started: list[Launch] = []

    def start(size: int, arguments: list[str]) -> Launch:
        started.append(Launch(arguments, size, tmp_path / f"launch-{len(started)}.log"))
        return started[-1]

    yield start
    for one in started:
        for pid in one.processes():
            os.kill(pid, signal.SIGKILL)


TOLD_IN_AN_IMPORT = """
import os, signal, sys

class Tell:
    def find_spec(self, name, *_):
        if name == "numpy.matrixlib":
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.SIGTERM)

sys.meta_path.insert(0, Tell())
from engine import errors, train

assert "torch" not in sys.modules
errors.run(train.main)
"""


def test_told_while_torch_imports_numpy(recipe, tmp_path):
    """Its C code imports it, and drops what is raised there: a run went on with half of numpy, and ended as a bug of ours."""
    done = subprocess.run([sys.executable, "-c", TOLD_IN_AN_IMPORT, *recipe()], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (PREEMPTED, "told to stop before the ranks had met: there is nothing to save\n"), done.stderr
    assert not (tmp_path / "runs/run/metrics.jsonl").exists()


@pytest.mark.parametrize("to_rank", [False, pytest.param(True, marks=pytest.mark.faults)], ids=["launcher", "rank"])
def test_told_while_tokenising_it_leaves_no_half_cache(recipe, launch, tmp_path, to_rank):
    write_rows(tmp_path / "rows.jsonl", ragged_rows(2000) * 40)  # two processes tokenise for seconds
    started = launch(2, recipe("data.workers=2"))
    until(lambda: any((tmp_path / "cache").rglob(".tmp-*")), "tokenising", 90)
    time.sleep(0.7)
    os.kill(started.ranks()[0] if to_rank else started.process.pid, signal.SIGINT)
    assert started.end(20) == PREEMPTED, started.log.read_text()
    assert "there is nothing to save" in started.log.read_text() and "ERROR" not in started.log.read_text()
    assert not [path for path in (tmp_path / "cache").rglob("*.npy")]


def test_ranks_do_not_outlive_a_launcher_that_is_killed(recipe, launch, tmp_path):
    run = tmp_path / "runs/run"
    started = launch(2, recipe("train.epochs=100000", "checkpoint.every_steps=5", "log.tensorboard=false", "checkpoint.each_epoch=false"))
    until(lambda: steps_done(run) > 10, "steps", 90)
    assert len(started.ranks()) == 2
    started.process.kill()
    started.process.wait()
    until(lambda: not started.processes(), "ranks live on", 10)
    assert saved(run) >= 5  # that of step 10 may have been on its way


@pytest.mark.faults
def test_twenty_launches_told_at_a_random_moment(recipe, launch, trained, tmp_path):
    """From the launcher's first lines to the last step: 75 each time, or 0 once the work is done; then bit for bit what an undisturbed run is."""
    draw = random.Random(7)
    options = (*FULL, *LONG, "train.epochs=40", "checkpoint.every_steps=0", "checkpoint.each_epoch=false", f"data.validation={tmp_path}/rows.jsonl",
               "log.tensorboard=false")
    trained(2, recipe(*options, name="whole"))
    run, stops, begun, start_s = tmp_path / "runs/cut", 0, 0, 2.0
    while stops < 20:
        started = launch(2, recipe(*options, name="cut"))
        until(started.listens, "the launcher")
        if stops % 2:
            since = time.monotonic()
            until(lambda begun=begun, started=started: last_step(run) > begun or started.process.poll() is not None, "a step", 90)
            start_s = time.monotonic() - since
            time.sleep(draw.random() * 0.1)
        else:  # before the first step, as long as this machine takes to it, or a little after
            time.sleep(draw.random() * 1.05 * start_s)
        if started.process.poll() is not None:
            break
        pid = draw.choice([started.process.pid, *(started.ranks() if stops % 2 else [])])
        os.kill(pid, draw.choice(SIGNALS))
        code = started.end()
        if code == 0:
            break
        assert code == PREEMPTED, started.log.read_text()
        if (run / "metrics.jsonl").exists():
            begun = nothing_lost(run)
        stops += 1
    print(f"{stops} stops through the launcher, {begun} steps")
    if not (run / "finished.json").exists():
        trained(2, recipe(*options, name="cut"))
    assert stops >= 15 and result(run) == result(tmp_path / "runs/whole")


@pytest.mark.faults
@pytest.mark.parametrize("size", [2, 4])
def test_a_hundred_stops_lose_no_step(recipe, ranks, trained, tmp_path, size):
    """At random moments from the first step on, to one rank or to all; then bit for bit what an undisturbed run is."""
    draw = random.Random(size)
    count = 100 if size == 4 else 40
    options = (*FULL, *LONG, f"train.max_steps={10 * count}", "train.epochs=1000", "checkpoint.every_steps=0", "checkpoint.each_epoch=false",
               "log.tensorboard=false", f"data.validation={tmp_path}/rows.jsonl", "evaluate.every_steps=5", "evaluate.each_epoch=false")
    trained(size, recipe(*options, name="whole"))
    run, begun = tmp_path / "runs/cut", 0
    for number in range(count):
        started = ranks(size, lambda: command(recipe(*options, name="cut")))
        until(lambda begun=begun: last_step(run) > begun, "a step")
        time.sleep(draw.random() * 0.03)
        for pid in draw.choice([started.pids, [draw.choice(started.pids)]]):
            os.kill(pid, draw.choice(SIGNALS))
        codes = started.wait()
        assert codes == [PREEMPTED] * size, (number, codes, started.log.read_text())
        assert nothing_lost(run) > begun
        begun = nothing_lost(run)
        started.log.unlink()
    trained(size, recipe(*options, name="cut"))
    assert result(run) == result(tmp_path / "runs/whole")
    print(f"{count} stops, {begun} steps")
