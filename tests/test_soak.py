"""Half an hour of a fault a minute: the run goes on each time, little of the time is lost, and it ends as one that was left alone.

    ./tests/run.sh --faults -k soak           SOAK_MINUTES=5 in front of it makes it shorter
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT, ragged_rows, write_rows
from test_resume import result, steps_done

from engine.errors import DONE, PEER, PREEMPTED

MINUTES = float(os.environ.get("SOAK_MINUTES", 30))
EVERY_S = 60
RANKS = 2
VALIDATION_ROWS = 300


class Run:
    """A launch of the same command, again and again, until it is done. The launcher starts ranks again by itself, for as long as it lives."""

    def __init__(self, arguments: list[str], folder: Path) -> None:
        self.folder, self.log = folder, folder.parents[1] / f"{folder.name}.log"
        self.command = [sys.executable, "-m", "engine.launch", "--standalone", "--max-restarts", "1000", "--nproc-per-node", str(RANKS), "-m",
                        "engine.train", *arguments]
        self.codes: list[int] = []
        self.start()

    def start(self) -> None:
        with self.log.open("a") as log:
            self.process = subprocess.Popen(self.command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)

    def ranks(self) -> list[int]:
        """Process numbers of the ranks, children of the launcher."""
        path = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(pid) for pid in path.read_text().split() if b"engine.train" in Path(f"/proc/{pid}/cmdline").read_bytes()] if path.exists() else []

    def ended(self) -> bool:
        """Whether the launch is over; if it is not the end of the run, the next one begins."""
        if self.process.poll() is None:
            return False
        self.codes.append(self.process.returncode)
        if self.process.returncode == DONE:
            return True
        assert self.codes[-1] in (PEER, PREEMPTED, -signal.SIGKILL), self.log.read_text()[-5000:]
        self.start()
        return False

    def kill_all(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def kill_a_rank(run: Run, draw: random.Random) -> None:
    os.kill(draw.choice(run.ranks()), signal.SIGKILL)


def kill_everything(run: Run, draw: random.Random) -> None:
    run.kill_all()


def preempt(run: Run, draw: random.Random) -> None:
    os.kill(draw.choice([run.process.pid, *run.ranks()]), draw.choice([signal.SIGTERM, signal.SIGUSR1]))
    run.process.wait(60)


def stall(run: Run, draw: random.Random) -> None:
    rank = draw.choice(run.ranks())
    os.kill(rank, signal.SIGSTOP)
    time.sleep(3)
    os.kill(rank, signal.SIGCONT)


def damage_the_newest_checkpoint(run: Run, draw: random.Random) -> None:
    run.kill_all()
    newest = sorted((run.folder / "checkpoints").glob("step-?????????"))[-1]
    path = newest / draw.choice(["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
    data = bytearray(path.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


def cut_the_record(run: Run, draw: random.Random) -> None:
    run.kill_all()
    path = run.folder / "metrics.jsonl"
    os.truncate(path, path.stat().st_size - draw.randrange(1, 200))


FAULTS: list[Callable[[Run, random.Random], None]] = [kill_a_rank, kill_everything, preempt, stall, damage_the_newest_checkpoint, cut_the_record]


@pytest.mark.faults
def test_soak(recipe, tmp_path, capsys):
    """Three quarters of the time go into evaluation. The undisturbed run does without, which changes nothing in what is trained, so it
    catches up in a quarter of the time."""
    seed = random.SystemRandom().randrange(1 << 30)
    draw = random.Random(seed)
    rows = write_rows(tmp_path / "validation.jsonl", ragged_rows(VALIDATION_ROWS))
    options = ["model.dropout=0.2", "data.packing=true", "train.epochs=1000000", "checkpoint.each_epoch=false", "checkpoint.every_s=1",
               "checkpoint.keep=3", "optim.lr=1e-3", "optim.schedule=constant", "export.kinds=[]", "data.too_long=truncate"]
    judging = [f"data.validation={rows}", "evaluate.every_steps=5", "evaluate.each_epoch=false", "evaluate.at_start=false"]
    run = Run(recipe(*options, *judging, "train.max_steps=1000000", name="soak"), tmp_path / "runs" / "soak")
    began, faults, lost = time.monotonic(), [], 0.0
    reached = happened = None  # the step that a fault struck, and when
    try:
        while (now := time.monotonic() - began) < 60 * MINUTES or reached is not None:
            time.sleep(0.02)
            assert not run.ended(), "a million steps are never done"
            if reached is not None:
                if steps_done(run.folder) > reached:
                    lost, reached = lost + now - happened, None
                assert reached is None or now - happened < EVERY_S, run.log.read_text()[-5000:]
            elif now > EVERY_S * (len(faults) + 1) and list((run.folder / "checkpoints").glob("step-?????????")):
                reached, happened = steps_done(run.folder), now
                fault = draw.choice(FAULTS)
                fault(run, draw)
                reached = max(reached, steps_done(run.folder))  # asked to stop, ranks finish a step before
                faults.append(fault.__name__)
                with capsys.disabled():
                    print(f"\n{now:6.0f} s  step {reached:6}  {fault.__name__:<30} {100 * (1 - lost / now):.1f} % so far", end="", flush=True)
        wall = time.monotonic() - began
        os.kill(run.process.pid, signal.SIGTERM)
        assert run.process.wait(60) == PREEMPTED
    finally:
        if run.process.poll() is None:
            run.kill_all()
    steps = steps_done(run.folder)
    with capsys.disabled():
        print(f"\nseed {seed}: {len(faults)} faults in {wall:.0f} s, {steps} steps, {100 * (1 - lost / wall):.1f} % of the time spent on them; "
              f"exit codes {run.codes}")
    whole = Run(recipe(*options, f"train.max_steps={steps}", name="whole"), tmp_path / "runs" / "whole")
    assert whole.process.wait(60 * MINUTES + 60) == DONE
    assert bits(run.folder) == bits(whole.folder)
    assert lost / wall <= 0.1


def bits(run: Path) -> dict[str, object]:
    """Weights, moments and every line of the record, without evaluations."""
    found: dict[str, object] = result(run)
    lines = [{key: value for key, value in line.items() if not key.startswith("validation/")} for line in json.loads(found["metrics"])]
    return {**found, "metrics": lines}
