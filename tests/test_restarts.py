"""Under torchrun --max-restarts a group that lost a rank starts again and goes on by itself; not where that cannot help, and not for ever."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT, free_port
from test_preemption import last_step, until
from test_resume import FULL, result, steps_done
from test_watchdog import command

from engine import checkpoint, metrics, train
from engine.errors import BUG, CHECKPOINT, DONE, ENVIRONMENT, PEER, PREEMPTED, EngineError

OPTIONS = (*FULL, "train.epochs=12", "train.global_batch=4", "data.packing=true", "checkpoint.every_steps=4", "checkpoint.each_epoch=false", "export.kinds=[]")


def rank_under(launcher: int, rank: int) -> int:
    """The process of a rank, by what its launcher put into its environment."""
    for pid in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        if f"\0RANK={rank}\0" in Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace"):
            return int(pid)
    raise AssertionError("the rank is not there")


def only_child(launcher: int) -> int | None:
    return next(map(int, Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()), None)


def test_torchrun_starts_a_group_again_that_goes_on(recipe, trained, tmp_path):
    trained(2, recipe(*OPTIONS, name="whole"))
    run, torchrun = tmp_path / "runs/cut", [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts=2"]
    with (tmp_path / "log").open("w") as log:
        launched = subprocess.Popen([*torchrun, "-m", "engine.train", *recipe(*OPTIONS, name="cut")], cwd=ROOT, stdout=log, stderr=log)
        while launched.poll() is None and steps_done(run) < 9:
            time.sleep(0.005)
        os.kill(rank_under(launched.pid, 1), signal.SIGKILL)
        try:
            assert launched.wait(100) == DONE, (tmp_path / "log").read_text()
        finally:
            launched.kill()
    assert result(run) == result(tmp_path / "runs/whole")
    restart = json.loads((run / "restarts.json").read_text())
    assert restart["restarts"] == 1 and 4 <= restart["from_step"] < steps_done(run), restart


def launches(monkeypatch, ranks, main: Callable[[], int]) -> list[tuple[int, str]]:
    """Exit code and last words of a rank that a launcher starts again five times, its environment set as torchrun sets it."""
    seen = []
    for count in range(6):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(count))
        started = ranks(1, main)
        seen.append((*started.wait(), (started.log.read_text().splitlines() or [""])[-1]))
        if seen[-1][0] == DONE:
            break
    return seen


def crashing(arguments: list[str], at: Callable[[], int]) -> Callable[[], int]:
    """Training that ends without a word once step `at()` is logged, with every checkpoint before it on the disk."""

    def run() -> int:
        log_step, last = metrics.Log.step, at()

        def step(self, number, scalars):
            log_step(self, number, scalars)
            if number == last:
                for writer in [thread for thread in threading.enumerate() if thread.name == "checkpoint"]:
                    writer.join()
                os._exit(1)

        metrics.Log.step = step
        return train.main([*arguments, "checkpoint.every_s=0"])

    return run


def test_a_crash_loop_ends_after_three_restarts_from_one_checkpoint(recipe, ranks, tmp_path, monkeypatch):
    seen = launches(monkeypatch, ranks, crashing(recipe(*OPTIONS), lambda: 6))
    assert [code for code, _ in seen] == [1, 1, 1, 1, PEER, PEER]
    assert all("ERROR E-RESTART-LOOP" in said and "3 restarts from step 4 brought no newer checkpoint" in said for _, said in seen[4:])
    assert steps_done(tmp_path / "runs/run") == 6, "the fifth launch trained"
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT")
    assert ranks(1, recipe(*OPTIONS)).wait() == [DONE], "whoever starts it by hand may go on"


def test_restarts_that_bring_a_newer_checkpoint_are_not_counted(recipe, ranks, tmp_path, monkeypatch):
    folder = tmp_path / "runs/run/checkpoints"
    seen = launches(monkeypatch, ranks, crashing(recipe(*OPTIONS), lambda: max(checkpoint.steps_in(folder), default=0) + 6))
    assert [code for code, _ in seen] == [1] * 6 and json.loads((tmp_path / "runs/run/restarts.json").read_text()) == {"from_step": 20, "restarts": 1}


def test_of_an_error_that_is_a_page_its_first_line_is_told(recipe, ranks, tmp_path, monkeypatch):
    """As torch's are, with frames of C++ below."""
    def failing() -> int:
        def find() -> None:
            raise RuntimeError("no kernel for this device\n\nException raised from f at g.cpp:1\nframe #0: h + 0x1")

        monkeypatch.setattr(train.config, "semantic", lambda cfg: find())
        return train.main(recipe(*OPTIONS))

    seen = launches(monkeypatch, ranks, failing)
    assert [code for code, _ in seen] == [BUG] * 6
    assert all(said == "ERROR E-BUG RuntimeError: no kernel for this device; the traceback above belongs in a report" for _, said in seen[:4])
    assert all(said.endswith("the last ended with: RuntimeError: no kernel for this device") for _, said in seen[4:]), seen[4:]


@pytest.mark.parametrize("code, again", [(CHECKPOINT, False), (ENVIRONMENT, True), (PEER, True)])
def test_what_a_restart_cannot_mend_ends_it_at_once_with_the_same_code(recipe, ranks, tmp_path, monkeypatch, code, again):
    def failing() -> int:
        if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            monkeypatch.setattr(train.config, "semantic", lambda cfg: (_ for _ in ()).throw(EngineError("TEST", "the cause", code)))
        return train.main(recipe(*OPTIONS, "train.max_steps=2"))

    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert ranks(1, failing).wait() == [code]
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    started = ranks(1, failing)
    assert started.wait() == [DONE if again else code], started.log.read_text()
    if not again:
        other = ranks(1, lambda: (os.environ.update(RANK="1", WORLD_SIZE="2"), command(recipe(*OPTIONS))))
        assert other.wait(10) == [code], "it waits for rank 0"
        assert "started again, which cannot help: ERROR E-TEST the cause" in started.log.read_text()
        assert steps_done(tmp_path / "runs/run") == 0 and json.loads((tmp_path / "runs/run/last_error.json").read_text())["exit_code"] == code


def test_a_stop_is_not_undone_by_a_restart_but_by_the_next_launch(recipe, ranks, tmp_path, monkeypatch):
    run, endless = tmp_path / "runs/run", recipe(*OPTIONS, "train.epochs=100000")
    for _ in range(2):  # the second launch goes on from the first, and can be stopped as well
        begun = last_step(run)
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
        started = ranks(2, lambda: command(endless))
        until(lambda begun=begun: last_step(run) > begun, "steps")
        os.kill(started.pids[1], signal.SIGUSR1)
        assert started.wait() == [PREEMPTED] * 2, started.log.read_text()
        stopped_at = last_step(run)
        for count in (1, 2):
            monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(count))
            for rank in (1, 0):  # each by itself: it waits for nobody
                again = ranks(1, lambda rank=rank: (os.environ.update(RANK=str(rank), WORLD_SIZE="2"), command(endless)))
                assert again.wait(10) == [PREEMPTED], again.log.read_text()
        assert last_step(run) == stopped_at
    for count in (0, 1):  # and if it is lost instead, it starts again
        begun = last_step(run)
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(count))
        started = ranks(2, lambda: command(endless))
        until(lambda begun=begun: last_step(run) > begun, "steps")
        os.kill(started.pids[0], signal.SIGKILL)
        assert started.wait() == [-signal.SIGKILL, PEER], started.log.read_text()


CRASH = """
import os
from engine import errors, metrics, train
log_step = metrics.Log.step
def step(self, number, scalars):
    log_step(self, number, scalars)
    if number == 6:
        os._exit(1)
metrics.Log.step = step
errors.run(train.main)
"""


@pytest.mark.faults
def test_a_crash_loop_under_the_launcher(recipe, tmp_path):
    (tmp_path / "crash.py").write_text(CRASH)
    launch = [sys.executable, "-m", "engine.launch", "--standalone", "--nproc-per-node", "2", "--max-restarts", "5", "-m", "crash"]
    ended = subprocess.run([*launch, *recipe(*OPTIONS, "checkpoint.every_s=0")], cwd=tmp_path, capture_output=True, text=True, timeout=300,
                           env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"})
    assert ended.returncode == PEER and ended.stderr.count("ERROR E-RESTART-LOOP") == 2, ended.stderr
    assert ended.stdout.count("resumed after step") == 3


@pytest.fixture
def nodes(tmp_path):
    """`nodes(launcher, options, arguments)` starts a launcher of one rank for each of two nodes, both on this machine."""
    started: list[subprocess.Popen] = []

    def start(launcher: str, options: Callable[[int], list[str]], arguments: list[str]) -> list[subprocess.Popen]:
        for node in range(2):
            with (tmp_path / f"node-{node}.log").open("w") as log:
                started.append(subprocess.Popen([sys.executable, "-m", launcher, "--nnodes", "2", "--nproc-per-node", "1", "--max-restarts", "2",
                                                 *options(node), "-m", "engine.train", *arguments], cwd=ROOT, stdout=log, stderr=log))
        return started

    yield start
    for one in started:
        one.kill()


def static(port: int) -> Callable[[int], list[str]]:
    return lambda node: ["--node-rank", str(node), "--master-addr", "127.0.0.1", "--master-port", str(port)]


def dynamic(port: int) -> Callable[[int], list[str]]:
    return lambda node: ["--rdzv-backend", "c10d", "--rdzv-id", "one", "--rdzv-endpoint", f"127.0.0.1:{port}", "--local-addr", "127.0.0.1"]


def told(tmp_path: Path) -> str:
    return "".join((tmp_path / f"node-{node}.log").read_text() for node in range(2))


@pytest.mark.faults
@pytest.mark.parametrize("who", ["rank 1", "launcher 0", "launcher 1"])
@pytest.mark.parametrize("launcher", ["engine.launch", "torch.distributed.run"])
def test_a_stop_of_one_node_of_two_is_not_undone(recipe, nodes, tmp_path, launcher, who):
    run = tmp_path / "runs/run"
    started = nodes(launcher, static(free_port()), recipe(*OPTIONS, "train.epochs=100000"))
    until(lambda: steps_done(run) > 3, "steps", 120)
    kind, number = who.split()
    pid = started[int(number)].pid
    os.kill(rank_under(pid, 1) if kind == "rank" else pid, signal.SIGTERM)
    codes = [one.wait(90) for one in started]
    assert launcher != "engine.launch" or codes == [PREEMPTED] * 2, told(tmp_path)
    assert told(tmp_path).count("stopped as asked after step") == 1 and (run / "stopped").exists()


@pytest.mark.faults
@pytest.mark.parametrize("meeting", [static, dynamic])
@pytest.mark.parametrize("launcher", ["engine.launch", "torch.distributed.run"])
def test_two_nodes_start_again_and_go_on(recipe, nodes, trained, tmp_path, launcher, meeting):
    """A rank is killed once they train, and another one before it has met the others: then one node alone starts again."""
    trained(2, recipe(*OPTIONS, name="whole"))
    run = tmp_path / "runs/cut"
    started = nodes(launcher, meeting(free_port()), recipe(*OPTIONS, name="cut"))
    until(lambda: steps_done(run) > 9, "steps", 120)
    victim = next(one for one in started if b"\0RANK=1\0" in Path(f"/proc/{only_child(one.pid)}/environ").read_bytes())
    first = only_child(victim.pid)
    os.kill(first, signal.SIGKILL)
    until(lambda: only_child(victim.pid) not in (None, first), "it starts again", 60)
    time.sleep(1)  # within its imports
    os.kill(only_child(victim.pid), signal.SIGKILL)
    assert [one.wait(120) for one in started] == [DONE, DONE], told(tmp_path)
    assert result(run) == result(tmp_path / "runs/whole")
