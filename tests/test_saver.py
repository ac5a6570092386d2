"""Saving while training goes on: what is written is one step's whatever the loop does meanwhile, one save at a time, and no error is lost."""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from conftest import NO_GPU, Ranks, loaded, steps
from test_resume import FULL, LORA, result, steps_done
from test_watchdog import command, ends, fail, here, on_call, stop_self
from torch import nn

from engine import checkpoint, metrics, optim, saver, train
from engine.config import Checkpoint
from engine.distributed import World
from engine.errors import BUG, DONE, ENVIRONMENT, NUMERIC, PEER, EngineError
from engine.saver import Saver
from engine.signals import SAME_S

ALONE = World(0, 1, 0, torch.device("cpu"))
STEPS = ("train.epochs=2", "export.kinds=[]", "train.global_batch=4", "data.packing=true", "checkpoint.each_epoch=false", "checkpoint.keep=99")


def in_background(save):
    """Saves that begin when the loop is three steps further, or waits for them."""
    log_step, done = metrics.Log.step, [0]

    def step(self, number, scalars):
        log_step(self, number, scalars)
        done[0] = number

    def late(folder, number, *arguments):
        end = time.monotonic() + 0.5
        while done[0] < number + 3 and time.monotonic() < end:
            time.sleep(0.001)
        save(folder, number, *arguments)

    metrics.Log.step = step
    return late


@pytest.mark.parametrize("size, options", [(1, FULL), (2, (*LORA, "optim.shard=true"))], ids=["full", "lora, sharded"])
def test_what_is_written_is_the_state_of_one_step_although_the_loop_went_on(recipe, ranks, tmp_path, size, options):
    """Compared with a run that waited for each save before it went on: weights, both moments and their counters, and the run's own counters."""

    def waiting() -> int:
        write = Saver.write
        Saver.write = lambda self, leaving, *first: write(self, True, *first)
        return train.main(recipe(*options, *STEPS, "checkpoint.every_steps=1", "checkpoint.every_s=0", name="waiting"))

    def going_on() -> int:
        saver.SHARE = 1e9
        checkpoint.save = in_background(checkpoint.save)
        return train.main(recipe(*options, *STEPS, "checkpoint.every_s=1e-9", name="going_on"))

    for what in (waiting, going_on):
        started = ranks(size, what)
        assert started.wait() == [DONE] * size, started.log.read_text()
    found, expected = (tmp_path / f"runs/{name}/checkpoints" for name in ("going_on", "waiting"))
    saved = sorted(path.name for path in found.iterdir())
    done = [int(name[5:]) for name in saved]
    assert len(done) >= 3 and all(after - before >= 3 for before, after in zip(done[:-1], done[1:-1], strict=False)), f"saved at {done}"
    for name in saved:
        for file in checkpoint.FILES[:2]:
            assert (found / name / file).read_bytes() == (expected / name / file).read_bytes(), f"{name}/{file} is not of one step"
        states = [json.loads((folder / name / "state.json").read_text()) for folder in (found, expected)]
        lines = steps(tmp_path / "runs/going_on")[: states[0]["step"]]
        assert states[0] == states[1] and states[0]["trained"][2:] == [sum(line[f"train/{what}"] for line in lines) for what in ("tokens", "targets")]
    assert result(tmp_path / "runs/going_on") == result(tmp_path / "runs/waiting")


def test_a_checkpoint_is_never_there_before_the_record_of_its_step(recipe, ranks, tmp_path):
    """Killed between the two, a run would go on after a step that no line tells of. The record is slow here, and the disk was waited for."""
    run, seen = tmp_path / "runs/run", tmp_path / "seen"

    def slow_record() -> int:
        add, settle, save = metrics.Record.add, metrics.Record.settle, checkpoint.save
        settled = [0]

        def slowly(record, line):
            time.sleep(0.05)
            add(record, line)

        def noted(record):
            settle(record)
            settled[0] = steps_done(run)

        def watched(folder, number, *arguments):
            with seen.open("a") as file:
                file.write(f"{number} {settled[0]}\n")
            save(folder, number, *arguments)

        metrics.Record.add, metrics.Record.settle, checkpoint.save = slowly, noted, watched
        return train.main(recipe(*STEPS, "train.max_steps=5", "checkpoint.every_steps=2"))

    started = ranks(1, slow_record)
    assert started.wait() == [DONE], started.log.read_text()
    pairs = [tuple(map(int, line.split())) for line in seen.read_text().splitlines()]
    assert [number for number, _ in pairs] == [2, 4, 5] and all(settled >= number for number, settled in pairs), pairs


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_a_slow_disk_holds_up_saves_and_not_the_loop(recipe, tmp_path):
    """Every fsync of the process takes a tenth of a second longer, by strace; a save makes seven."""
    arguments = recipe(*FULL, *STEPS, "checkpoint.every_s=1e-9", name="slow")
    ours, theirs = os.pipe()

    def slowed() -> int:
        saver.SHARE = 1e9
        os.read(ours, 1)
        return train.main(arguments)

    started = Ranks(1, slowed, tmp_path / "slow.log")
    run, trace = tmp_path / "runs/slow", tmp_path / "trace"
    tracer = subprocess.Popen(["strace", "-f", "-o", str(trace), "-e", "trace=fsync", "-e", "inject=fsync:delay_enter=100000", "-p", str(started.pids[0])],
                              stderr=subprocess.PIPE, text=True)
    if "attached" not in (line := tracer.stderr.readline()):
        started.kill()
        pytest.skip(f"strace may not attach here: {line.strip()}")
    os.write(theirs, b"x")
    meanwhile: dict[str, int] = {}  # steps done at the last sight of a save in flight
    while os.waitid(os.P_PID, started.pids[0], os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        building = [path.name for path in run.glob("checkpoints/.tmp-*")]
        assert len(building) <= 1, "two saves at once"
        for name in building:
            meanwhile[name] = steps_done(run)
        time.sleep(0.005)
    assert started.wait() == [DONE], started.log.read_text()
    tracer.wait(10)
    assert "DELAYED" in trace.read_text()
    name, last = min(meanwhile.items())
    assert last - int(name[-9:]) >= 5, f"the loop stood still: {meanwhile}"
    saved = checkpoint.steps_in(run / "checkpoints")
    assert saved[-1] == steps_done(run) > 2 * len(saved) and all(checkpoint.damage(path) is None for path in (run / "checkpoints").iterdir())
    stalls = [line["time/checkpoint"] for line in steps(run) if "time/checkpoint" in line]
    assert len(stalls) == len(saved) and max(stalls[:-1]) < 0.35, f"a save by the clock waited for the one before: {stalls}"
    assert Ranks(1, lambda: train.main(recipe(*FULL, *STEPS, "checkpoint.every_s=0", name="quick")), tmp_path / "quick.log").wait() == [DONE]
    assert result(run) == result(tmp_path / "runs/quick")


class Loop:
    """What a loop does with a saver, by hand."""

    def __init__(self, folder: Path, **options) -> None:
        self.weight = nn.Parameter(torch.zeros(64, 64))
        self.optimizer = torch.optim.AdamW([self.weight], fused=True)
        self.saver = Saver(folder, Checkpoint(**options), speaks=True)

    def save(self, step: int, leaving: bool = False) -> float:
        self.weight.grad = torch.full_like(self.weight, float(step))
        self.optimizer.step()
        stall = self.saver.take(step, {"w": self.weight}, self.optimizer, {"best": {"step": None}}, ALONE)
        self.saver.write(leaving)
        return stall


@pytest.fixture
def slow(monkeypatch) -> list[int]:
    """Saves take a fifth of a second more; how many were at it at once, at each beginning of one."""
    save, at_once, seen = checkpoint.save, [0], []

    def slowly(*arguments):
        at_once[0] += 1
        seen.append(at_once[0])
        time.sleep(0.2)
        save(*arguments)
        at_once[0] -= 1

    monkeypatch.setattr(checkpoint, "save", slowly)
    return seen


def test_a_save_by_step_waits_for_the_one_in_flight_and_one_by_the_clock_is_not_begun(tmp_path, slow):
    loop = Loop(tmp_path, every_s=1e-9, keep=9)
    assert loop.saver.is_due()
    assert loop.save(1) < 0.1 and not loop.saver.is_due(), "it was waited for, or a second one would be begun"
    assert loop.save(2) > 0.1, "two saves in flight"
    loop.saver.wait()
    assert slow == [1, 1] and checkpoint.steps_in(tmp_path) == [1, 2]
    assert loop.save(3, leaving=True) < 0.1 and checkpoint.newest_whole(tmp_path) == 3, "left before the save was there"


def test_saves_by_the_clock_cost_a_hundredth_of_the_time_at_most(tmp_path, monkeypatch):
    loop, clock = Loop(tmp_path, every_s=60.0), [1000.0]
    monkeypatch.setattr(saver.time, "monotonic", lambda: clock[0])
    loop.saver.began, loop.saver.held = clock[0], 0.1
    for seconds, due in ((59.9, False), (60.0, True)):
        clock[0] = 1000.0 + seconds
        assert loop.saver.is_due() == due
    loop.saver.held = 0.9  # for a state of many GB
    for seconds, due in ((60.0, False), (89.9, False), (90.1, True)):
        clock[0] = 1000.0 + seconds
        assert loop.saver.is_due() == due
    loop.saver.speaks = False
    assert not loop.saver.is_due(), "rank 0 alone decides"
    loop.saver.speaks, loop.saver.cfg = True, Checkpoint(every_s=0)
    assert not loop.saver.is_due()


def test_the_clock_waits_for_what_a_save_costs_and_not_for_the_save_before(tmp_path, slow):
    """A save by step that waits for one in flight holds the loop up once; saves by the clock never wait, so their period is not made longer by it."""
    loop = Loop(tmp_path, every_s=0.3, keep=9)
    assert loop.save(1) < 0.1 and loop.save(2) > 0.1, "it did not wait"
    assert loop.saver.held < 0.003, f"charged {loop.saver.held:.3f} s"
    loop.saver.wait()
    time.sleep(0.3)
    assert loop.saver.is_due()


def test_a_first_copy_asks_for_memory_and_is_no_measure_of_the_next(tmp_path):
    loop = Loop(tmp_path, every_s=60.0, keep=9)
    loop.save(1, leaving=True)
    assert loop.saver.held == 0
    loop.save(2, leaving=True)
    assert loop.saver.held > 0


def test_a_failed_save_that_a_black_box_has_waited_for_ends_the_run_in_the_next_step(tmp_path):
    loop = Loop(tmp_path / "gone" / "checkpoints", every_s=0.0)
    loop.save(1)
    with pytest.raises(EngineError):
        loop.saver.wait()  # as the black box does, which goes on
    with pytest.raises(EngineError, match="older checkpoints are untouched"):
        loop.saver.is_due()


def test_the_writers_error_is_raised_wherever_the_loop_comes_next(tmp_path):
    for where in ("is_due", "take", "leaving", "end"):
        loop = Loop(tmp_path / "gone" / "checkpoints", every_s=60.0)
        with pytest.raises(EngineError, match="older checkpoints are untouched") as caught, loop.saver:
            loop.save(1, leaving=where == "leaving")
            if where == "take":
                loop.save(2)
            if where == "is_due":
                loop.saver.thread.join()
                loop.saver.is_due()
            assert where == "end", f"{where} went on"
        assert caught.value.exit_code == ENVIRONMENT


@pytest.mark.parametrize(("error", "patience"), [(ValueError(), "PATIENCE_S"), (EngineError("NUMERIC-X", "", NUMERIC), "PATIENCE_S"),
                         (EngineError("ENVIRONMENT-MEMORY", "", ENVIRONMENT), "PATIENCE_S"), (EngineError("ENVIRONMENT-GPU", "", ENVIRONMENT), "PATIENCE_S"),
                         (EngineError("ENVIRONMENT-RECORD", "", ENVIRONMENT), "DISK_S")])
def test_a_run_that_fails_gives_the_save_in_flight_some_time_and_no_more(tmp_path, slow, monkeypatch, error, patience):
    """Little, where a disk is the cause."""
    monkeypatch.setattr(saver, "DISK_S", 0.02)
    for seconds in (9.0, 0.03):  # a save takes 0.2
        monkeypatch.setattr(saver, "PATIENCE_S", seconds)
        with pytest.raises(type(error)), (loop := Loop(tmp_path)).saver:
            loop.save(step := len(slow) + 1)
            raise error
        assert (checkpoint.newest(tmp_path) == step) == (seconds == 9.0 and patience == "PATIENCE_S")
        loop.saver.thread.join()


# the rank that meets with it, the code of rank 1, of rank 0
FAULTS = {"rank 0 fails": (0, PEER, BUG), "another rank stands still": (1, -signal.SIGKILL, PEER), "another rank fails": (1, BUG, PEER)}


@pytest.mark.parametrize("fault", [pytest.param(fault, marks=[pytest.mark.faults] * ("fails" in fault)) for fault in FAULTS])
def test_a_failure_costs_no_save_that_is_in_flight_and_peers_do_not_wait_for_it(recipe, ranks, tmp_path, fault):
    """The disk takes seven seconds for what was taken before the fault; by then the peers are long gone, and the cause is written down."""
    since, run = tmp_path / "since", tmp_path / "runs/run"
    rank, of_peer, of_first = FAULTS[fault]
    what = stop_self if "still" in fault else fail

    def slowly(*arguments):
        time.sleep(7)
        return save(*arguments)

    def main() -> None:
        checkpoint.save = slowly
        on_call(rank, optim, "learning_rate", 4, here(what, since))
        command(recipe(*STEPS, "checkpoint.every_steps=3", "checkpoint.every_s=0", "log.tensorboard=false", "train.timeout_s=2"))

    save = checkpoint.save
    started = ranks(2, main)
    codes, seconds = ends(started, since)
    assert codes == [of_first, of_peer] and seconds[0] > 6, started.log.read_text()
    assert checkpoint.newest_whole(run / "checkpoints") == 3, started.log.read_text()
    assert "still" in fault or seconds[1] < 5
    note = json.loads((run / "last_error.json").read_text())
    assert note["exit_code"] == (BUG if what is fail else PEER) and started.log.read_text().count("finishing the checkpoint") == 1


def test_a_second_signal_ends_the_wait_for_a_save_in_flight(recipe, ranks, tmp_path):
    def main() -> None:
        checkpoint.save = lambda *arguments: time.sleep(60)
        on_call(0, optim, "learning_rate", 4, fail)
        command(recipe(*STEPS, "checkpoint.every_steps=3", "checkpoint.every_s=0", "log.tensorboard=false"))

    started = ranks(1, main)
    while "finishing the checkpoint" not in (started.log.read_text() if started.log.exists() else ""):
        time.sleep(0.01)
    for _ in range(2):
        os.kill(started.pids[0], signal.SIGTERM)
        time.sleep(SAME_S + 0.1)
    began = time.monotonic()
    assert started.wait() == [128 + signal.SIGTERM] and time.monotonic() - began < 1


def test_copies_lie_in_the_same_memory_each_time(tmp_path):
    loop = Loop(tmp_path, keep=9)
    loop.save(1, leaving=True)
    places = {name: buffer.data_ptr() for name, buffer in loop.saver.buffers.items()}
    loop.save(2, leaving=True)
    assert sorted(places) == ["w", "w.exp_avg", "w.exp_avg_sq", "w.step"] and {n: b.data_ptr() for n, b in loop.saver.buffers.items()} == places
    found = loaded(tmp_path, 2)
    assert torch.equal(found.model["w"], loop.weight.detach()) and found.optimizer["w.step"] == 2


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason=NO_GPU)
def test_copies_from_a_gpu_lie_in_pinned_memory_and_are_there_when_the_loop_goes_on(tmp_path):
    loop, world = Loop(tmp_path), World(0, 1, 0, torch.device("cuda", 0))
    loop.weight = nn.Parameter(torch.ones(1 << 26, device=world.device))
    loop.optimizer = torch.optim.AdamW([loop.weight], fused=True)
    loop.weight.grad = torch.ones_like(loop.weight)
    loop.optimizer.step()
    expected = loop.weight.detach().clone()
    loop.saver.take(1, {"w": loop.weight}, loop.optimizer, {"best": {"step": None}}, world)
    assert all(buffer.is_pinned() for buffer in loop.saver.buffers.values())
    with torch.no_grad():
        loop.weight.zero_()
    loop.saver.write(True)
    assert torch.equal(loaded(tmp_path, 1).model["w"], expected.cpu())


def test_the_writer_has_no_pool_of_threads_beside_the_loops(ranks, tmp_path):
    def run() -> None:
        torch.set_num_threads(3)
        big = torch.ones(1 << 20).exp()  # the loop's pool
        threads, save = [len(os.listdir("/proc/self/task"))], checkpoint.save

        def counted(*arguments):
            save(*arguments)
            threads.append(len(os.listdir("/proc/self/task")))

        checkpoint.save = counted
        loop = Loop(tmp_path)
        loop.weight = nn.Parameter(big)
        loop.optimizer = torch.optim.AdamW([loop.weight], fused=True)
        loop.save(1, leaving=True)
        assert threads[0] >= 3 and threads[1] == threads[0] + 1 and torch.get_num_threads() == 3, threads

    started = ranks(1, run)
    assert started.wait() == [0], started.log.read_text()
