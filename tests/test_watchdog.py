"""A rank that is gone, stands still or is slow is named by the others, and never waited for in vain."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch.distributed
from conftest import Ranks, ragged_rows, write_rows
from test_resume import FULL, LONG, result, steps_done

from engine import checkpoint, distributed, errors, evaluate, export, loss, optim, publish, stragglers, train, watchdog
from engine.errors import BUG, ENVIRONMENT, PEER
from engine.models import weights

ENDLESS = ("train.epochs=100000", "evaluate.at_start=false", "log.tensorboard=false", "checkpoint.each_epoch=false", "evaluate.each_epoch=false")


def command(arguments: list[str]) -> None:
    """`python -m engine.train` in a forked rank."""
    sys.argv = ["engine.train", *arguments]
    errors.run(train.main)


def on_call(rank: int, of: Any, name: str, number: int, action: Callable[[], None]) -> None:
    """In `rank`, `action` comes before the `number`-th call of a function."""
    plain, calls = getattr(of, name), [0]

    def hooked(*arguments, **options):
        calls[0] += 1
        if calls[0] == number and int(os.environ["RANK"]) == rank:
            action()
        return plain(*arguments, **options)

    setattr(of, name, hooked)


def here(action: Callable[[], None], started: Path) -> Callable[[], None]:
    """`action`, and when it came."""
    return lambda: (started.write_text(str(time.monotonic())), action())


def kill_self(number: int = signal.SIGKILL) -> None:
    os.kill(os.getpid(), number)


def ends(started: Ranks, since: Path, timeout_s: float = 60) -> tuple[list[int], dict[int, float]]:
    """Exit codes, and seconds from the fault to each rank's end. A stopped rank is left out: it is killed once the others are gone."""
    end, codes, seconds = time.monotonic() + timeout_s, {}, {}
    while len(codes) < len(started.pids):
        assert time.monotonic() < end, started.log.read_text()
        for rank, pid in enumerate(started.pids):
            if rank not in codes and (found := os.waitpid(pid, os.WNOHANG))[0]:
                codes[rank], seconds[rank] = os.waitstatus_to_exitcode(found[1]), time.monotonic() - float(since.read_text())
        if len(codes) == len(started.pids) - 1:  # is the last one stopped?
            rank, = set(range(len(started.pids))) - codes.keys()
            if Path(f"/proc/{started.pids[rank]}/stat").read_text().rpartition(")")[2].split()[0] == "T":
                os.kill(started.pids[rank], signal.SIGKILL)
        time.sleep(0.01)
    return [codes[rank] for rank in range(len(started.pids))], seconds


def lines(started: Ranks, name: str) -> list[str]:
    return [line for line in started.log.read_text().splitlines() if f"ERROR E-{name} " in line]


@pytest.fixture
def faulted(recipe, ranks, tmp_path):
    """Trains on ranks, one of which meets with `action` before a call; returns them, exit codes, seconds from the fault to each end."""

    def run(size: int, rank: int, of: Any, name: str, number: int, action: Callable[[], None], *options: str) -> tuple[Ranks, list[int], dict[int, float]]:
        since = tmp_path / "since"
        arguments = recipe(*ENDLESS, *options)
        started = ranks(size, lambda: (on_call(rank, of, name, number, here(action, since)), command(arguments)))
        return started, *ends(started, since)

    return run


# --- a peer is gone --------------------------------------------------------------------------------------------------

WHERE = {"model": (weights, "build", 1, "step 0, starting"), "wrap": (distributed, "wrap", 1, "step 0, starting"),
         "forward": (loss, "summed_cross_entropy", 6, r"step \d, after"), "exchange": (distributed, "sum_over_ranks", 4, "step 4, after backward"),
         "inside": (torch.distributed, "all_reduce", 4, "step 4, after backward"),
         "optimizer": (optim, "unscale_and_clip", 3, "step [34], after"), "evaluation": (evaluate.Evaluation, "run", 1, "evaluation"),
         "replicas": (distributed, "check_replicas", 2, "step 2, after optimizer"), "export": (export.Exporter, "run", 1, "step 3, after the last step")}


@pytest.mark.parametrize("size, rank, where", [
    (6, 2, "forward"), (2, 0, "model"),  # of a ring of six some hear of it from others alone
    *(pytest.param(size, rank, where, marks=pytest.mark.faults) for size, rank in ((2, 0), (4, 0), (4, 2)) for where in WHERE
      if (where, rank) != ("export", 2))])
def test_a_killed_rank_is_named_by_each_of_the_others_within_five_seconds(faulted, tmp_path, size, rank, where):
    of, name, number, place = WHERE[where]
    options = [f"data.validation={tmp_path}/rows.jsonl", "checkpoint.every_steps=2", *(["evaluate.every_steps=2"] if where == "evaluation" else []),
               *(["train.max_steps=3"] if where == "export" else [])]
    started, codes, seconds = faulted(size, rank, of, name, number, kill_self, *options)
    assert codes == [-9 if one == rank else PEER for one in range(size)], started.log.read_text()
    assert max(seconds.values()) < 5, seconds
    said = lines(started, "PEER-LOST")
    assert len(said) == size - 1 == started.log.read_text().count("ERROR")
    for one in set(range(size)) - {rank}:
        assert sum(f"rank {one} lost the others in " in line for line in said) == 1
    assert all(f"rank {rank} is gone" in line and re.search(place, line) for line in said), said
    assert all("without a word" in line for line in said)
    note = json.loads((tmp_path / "runs/run/last_error.json").read_text())
    assert note["exit_code"] == PEER and f"rank {rank} is gone" in note["message"]


def test_a_killed_rank_is_named_though_no_connection_tells(ranks, recipe, tmp_path):
    """As with NCCL: an exchange with a dead rank neither ends nor fails."""
    since = tmp_path / "since"

    def main() -> None:
        on_call(0, torch.distributed, "all_reduce", 4, stuck)
        on_call(1, torch.distributed, "all_reduce", 4, here(kill_self, since))
        command(recipe(*ENDLESS))

    codes, seconds = ends(started := ranks(2, main), since)
    assert codes == [PEER, -9] and seconds[0] < 5, (seconds, started.log.read_text())
    assert "rank 0 lost the others in step 4, after backward: rank 1 is gone without a word" in started.log.read_text()


def test_a_beat_that_no_rank_wrote_is_no_beat():
    """Whoever reaches the port can write one."""
    told = watchdog.Watchdog(torch.distributed.HashStore(), 0, 2, None, 10.0)
    plain = {"number": 1, "step": 0, "phase": "", "exchanges": 0, "marks": 0, "age": 0.0}
    for wrong in ({"number": "one"}, {"late": 1}, {"late": [1e400]}, {"process": []}, {"process": {}}, {"process": ["", "x"]}, {"stack": 1}):
        with pytest.raises(watchdog.NO_BEAT):
            watchdog.Beat(**{**plain, **wrong})
    for late, process in (([99, 0, -1], ("", 0)), ([1], (told.process[0], 10**30)), ([1], (told.process[0], -1))):
        told.beats[1] = watchdog.Beat(**plain, left=watchdog.IN_VAIN, late=late, process=process)
        assert told._late() == ([1] if 1 in late else []) and not told._is_here(told.beats[1])
    with subprocess.Popen(["sleep", "60"]) as process:
        for machine in ("another machine", told.process[0]):
            beat = watchdog.Beat(**plain, process=(machine, process.pid))
            assert told._is_here(beat) == (machine == told.process[0])
        process.kill()
    assert not told._is_here(beat)


def fail() -> None:
    raise ValueError("planted")


def test_an_exception_on_one_rank_is_told_there_and_ends_the_others(faulted, tmp_path):
    started, codes, seconds = faulted(4, 3, loss, "summed_cross_entropy", 6, fail)
    assert codes == [PEER, PEER, PEER, BUG], started.log.read_text()
    assert max(seconds.values()) < 5, seconds
    text = started.log.read_text()
    assert len(lines(started, "BUG")) == 1 and "[rank 3] ERROR E-BUG ValueError: planted" in text and text.count("Traceback") == 1
    assert len(lines(started, "PEER-LOST")) == 3 and all("rank 3 left: ValueError: planted" in line for line in lines(started, "PEER-LOST"))
    assert json.loads((tmp_path / "runs/run/last_error.json").read_text())["exit_code"] == BUG


eaten: list[bytearray] = []


def without_memory() -> None:
    """No more from the system, and of what this process has free, as one that is forked has, nothing in pieces of 64 KiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (1 << 18), resource.RLIM_INFINITY))
    with suppress(MemoryError):
        while True:
            eaten.append(bytearray(1 << 16))


def test_a_rank_without_memory_says_so_and_ends_the_others(faulted, tmp_path):
    rows = write_rows(tmp_path / "many.jsonl", ragged_rows(400))
    started, codes, seconds = faulted(2, 1, loss, "summed_cross_entropy", 6, without_memory, "train.micro_batch=8", "train.global_batch=16",
                                      "data.packing=true", "data.max_length=128", f"data.train={rows}")
    assert codes == [PEER, ENVIRONMENT], started.log.read_text()
    assert max(seconds.values()) < 10, seconds
    told, said = sorted(lines(started, "ENVIRONMENT-MEMORY"))
    assert told.startswith("ERROR E-PEER-LOST rank 0 lost the others in step") and "rank 1 left: ERROR E-ENVIRONMENT-MEMORY rank 1 has" in told
    assert "[rank 1] ERROR E-ENVIRONMENT-MEMORY rank 1 has no memory left in step" in said


# --- a peer stands still ---------------------------------------------------------------------------------------------


def stop_self() -> None:
    kill_self(signal.SIGSTOP)


def told_and_stop_self() -> None:
    """Stopped once the others know that it is where they are."""
    time.sleep(1.5)
    stop_self()


def stuck() -> None:
    reads, _ = os.pipe()
    os.read(reads, 1)  # nobody writes


@pytest.mark.parametrize("how, timeout_s, size, rank, where", [
    ("stuck", 3, 2, 1, "forward"), ("stopped", 3, 2, 1, "inside"), pytest.param("stopped", 3, 2, 0, "replicas", marks=pytest.mark.faults),
    *(pytest.param(how, 10, 4, rank, where, marks=pytest.mark.faults) for how in ("stuck", "stopped") for rank in (0, 2) for where in WHERE
      if (where, rank) != ("export", 2) and (how, where) != ("stuck", "inside"))])  # an exchange that all have begun is the network's affair
def test_a_rank_that_stands_still_is_named(faulted, tmp_path, how, timeout_s, size, rank, where):
    of, name, number, place = WHERE[where]
    options = [f"data.validation={tmp_path}/rows.jsonl", "checkpoint.every_steps=2", *(["evaluate.every_steps=2"] if where == "evaluation" else []),
               *(["train.max_steps=3"] if where == "export" else []), f"train.timeout_s={timeout_s}"]
    action = stuck if how == "stuck" else told_and_stop_self if where == "inside" else stop_self
    started, codes, seconds = faulted(size, rank, of, name, number, action, *options)
    assert codes == [-9 if how == "stopped" and one == rank else PEER for one in range(size)], started.log.read_text()
    assert timeout_s - 1 < min(seconds.values()) and max(seconds[one] for one in range(size) if one != rank) < timeout_s + 5, seconds
    said, *more = lines(started, "PEER-HUNG")
    assert f"rank {rank} has " in said and started.log.read_text().count("ERROR") == 1 + len(more)
    assert not more or how == "stopped" and rank == 0, "more than one rank tells, though they hear each other"
    if how == "stuck":
        assert "test_watchdog.py" in said and " stuck < " in said and re.search(r"has not moved for \d+ s: step", said)
    else:
        assert re.search(r"has been silent for \d+ s .*, last heard of in step \d", said), said
    note = json.loads((tmp_path / "runs/run/last_error.json").read_text())
    assert note["exit_code"] == PEER and "E-PEER-HUNG" in note["message"] and f"rank {rank} has " in note["message"]


@pytest.mark.faults
def test_an_exchange_that_all_are_in_and_none_leaves_ends(recipe, ranks):
    def main() -> None:
        for rank in range(2):
            on_call(rank, torch.distributed, "all_reduce", 4, stuck)
        command(recipe(*ENDLESS, "train.timeout_s=2"))

    started, began = ranks(2, main), time.monotonic()
    assert started.wait() == [PEER, PEER] and time.monotonic() - began < 30
    assert re.search(r"E-PEER-HUNG all ranks have waited for \d+ s in one exchange \(step 4, after backward\)", started.log.read_text())


@pytest.mark.parametrize("rank, timeout_s", [(1, 3), *(pytest.param(rank, 10, marks=pytest.mark.faults) for rank in (0, 1, 3))])
def test_a_short_stall_is_survived_to_the_bit(recipe, ranks, trained, tmp_path, rank, timeout_s):
    size = 2 if timeout_s < 10 else 4
    trained(size, recipe(*FULL, *LONG, name="whole"))
    started = ranks(size, recipe(*FULL, *LONG, f"train.timeout_s={timeout_s}", name="stalled"))
    while steps_done(tmp_path / "runs/stalled") < 4:
        time.sleep(0.002)
    os.kill(started.pids[rank], signal.SIGSTOP)
    time.sleep(timeout_s / 2)
    assert steps_done(tmp_path / "runs/stalled") < 10, "it did not wait"
    os.kill(started.pids[rank], signal.SIGCONT)
    assert started.wait() == [0] * size, started.log.read_text()
    assert result(tmp_path / "runs/stalled") == result(tmp_path / "runs/whole")


# --- what is no hang -------------------------------------------------------------------------------------------------


@pytest.mark.faults
def test_others_wait_for_one_that_works_alone_as_long_as_it_works(recipe, ranks, tmp_path):
    """More than the timeout in a save, and in the export while the others wait to leave."""

    def work() -> None:
        end = time.monotonic() + 4.5
        while time.monotonic() < end:
            pass

    def main() -> None:
        on_call(0, checkpoint, "_sha256", 1, work)
        slow_disk = lambda: on_call(0, publish, "fsync", 1, lambda: time.sleep(4.5))  # noqa: E731  which takes no time of a processor
        on_call(0, export.Exporter, "compare", 1, lambda: (work(), slow_disk()))
        command(recipe("train.timeout_s=3", "train.max_steps=3", "checkpoint.every_steps=2"))

    assert ranks(2, main).wait() == [0, 0]


# --- a peer is slow --------------------------------------------------------------------------------------------------


def test_a_rank_is_slow_that_takes_twice_the_others_time_over_many_steps(capsys):
    def told(*each: float, steps: int = 60, tokens: tuple[int, ...] = ()) -> str:
        own = stragglers.Stragglers(distributed.World(0, len(each), 0, torch.device("cpu")))
        assert all(own.noted([1.5, 2.0, *each, *(tokens or [512] * len(each))]) == [1.5, 2.0] for _ in range(steps))
        return capsys.readouterr().err

    assert told(0.1, 0.3, 0.1, 0.12).count("WARNING rank 1 is slow") == 1
    assert "rank 0: 100, rank 1: 300, rank 2: 100, rank 3: 120" in told(0.1, 0.3, 0.1, 0.12)
    assert not told(0.1, 0.3, steps=19) and not told(0.1, 0.15, 0.1) and not told(0.001, 0.01) and not told(9.0)
    # what it has to do is no fault of its machine's: twice the tokens of others, or all of them
    assert not told(0.3, 0.12, 0.1, tokens=(1024, 512, 512)) and "rank 0 is slow" in told(0.5, 0.12, 0.1, tokens=(1024, 512, 512))
    assert not told(1.01, 1.0, tokens=(8192, 30000)) and not told(1.0, 1.01, 1.0, tokens=(30000, 8192, 30000))
    assert not told(0.3, 0.001, 0.001, tokens=(512, 1, 1)) and "rank 2 is slow" in told(0.1, 0.001, 0.3, tokens=(512, 1, 512))


@pytest.mark.faults
def test_a_slow_rank_is_named_once_and_changes_nothing(recipe, ranks, tmp_path):
    """Rank 1 is stopped for three quarters of the time, as by a machine that has too much to do."""
    options = (*FULL, "train.epochs=45", "train.global_batch=23", "checkpoint.each_epoch=false", "log.tensorboard=false")
    even = ranks(2, recipe(*options, name="whole"))
    assert even.wait() == [0, 0] and "is slow" not in even.log.read_text()
    slow = ranks(2, recipe(*options, name="slow"))
    pid = slow.pids[1]
    while not os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        if steps_done(tmp_path / "runs/slow"):
            os.kill(pid, signal.SIGSTOP)
            time.sleep(0.15)
            os.kill(pid, signal.SIGCONT)
        time.sleep(0.05)
    assert slow.wait() == [0, 0], slow.log.read_text()
    said, = (line for line in slow.log.read_text().splitlines() if "WARNING" in line and "slow" in line)
    each = [float(found) for found in re.findall(r"rank \d: (\d+)", said)]
    assert "WARNING rank 1 is slow" in said and len(each) == 2 and each[1] > 2 * each[0], said
    assert result(tmp_path / "runs/slow") == result(tmp_path / "runs/whole")
