"""Odd surroundings change nothing: no HOME, no room, closed output, readers that leave, clocks that jump, another umask."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import disks
import pytest
import torch
from conftest import PINNED, ROOT
from test_resume import result

from engine import attention, errors, rundir, train
from engine.errors import DONE, PEER

STREAMS = [sys.stdout, sys.stderr]  # held: a stream that nobody holds closes its number, also for the one that took its place
SHORT = ("train.epochs=2", "model.dropout=0.2")


def leave_as_command(argv: list[str]) -> int:
    """What `python -m engine.train` does, in a process that has torch already. For a fork."""
    sys.argv = ["train", *argv]
    errors.run(train.main, needs_reader=False)
    return errors.BUG


def test_a_rank_whose_launcher_is_gone_before_it_has_begun_goes_too():
    (gone := subprocess.Popen(["true"])).wait()
    for launcher, code in ((os.getpid(), DONE), (os.getppid(), DONE), (gone.pid, PEER)):  # the second as where a wrapper starts ranks
        rank = subprocess.run([sys.executable, "-m", "engine.train", "--help"], cwd=ROOT, capture_output=True,
                              env={**os.environ, errors.LAUNCHER: str(launcher), "TORCHELASTIC_RUN_ID": "none"})
        assert rank.returncode == code and (b"is gone" in rank.stderr) == (code == PEER)


def test_a_process_that_ended_is_gone_though_its_parent_has_not_looked():
    with subprocess.Popen(["true"]) as ended:
        os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)
        os.kill(ended.pid, 0)
        assert errors.is_gone(ended.pid) == Path("/proc/self/stat").exists()
    assert not errors.is_gone(os.getpid())


def test_last_words_from_beside_a_thread_that_its_output_hangs_are_no_reason_to_stay():
    program = """
import sys, threading, time
from engine import errors
errors.WORDS_S = 0.5
threading.Timer(0.5, errors.end, [errors.EngineError("PEER-HUNG", "this rank hangs", errors.PEER), True]).start()
while True:
    print("x" * 10000)
"""
    with subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as rank:
        try:
            assert rank.wait(20) == PEER
            assert b"this rank hangs" in rank.stderr.read()
        finally:
            rank.kill()


@pytest.fixture
def reference(recipe, trained, tmp_path) -> dict[str, str]:
    trained(1, recipe(*SHORT, name="reference"))
    return result(tmp_path / "runs/reference")


# --- G12: nobody reads -------------------------------------------------------------------------------------------------


def without_reader() -> None:
    """Standard output is a pipe from here on, of which nobody reads."""
    ours, theirs = os.pipe()
    os.dup2(theirs, 1)
    os.close(ours)
    os.close(theirs)
    STREAMS.append(sys.stdout)
    sys.stdout = os.fdopen(1, "w")


def test_a_reader_that_leaves_and_closed_output_change_nothing(recipe, ranks, reference, tmp_path):
    def into_a_pipe_without_reader() -> int:
        without_reader()
        return leave_as_command(recipe(*SHORT, "log.every_steps=1", name="pipe"))

    def with_streams_closed() -> int:
        STREAMS.extend((sys.stdin, sys.stdout))
        sys.stdin = sys.stdout = None  # as Python finds them
        os.close(0)
        os.close(1)
        return leave_as_command(recipe(*SHORT, "log.every_steps=1", name="closed"))

    for name, what in (("pipe", into_a_pipe_without_reader), ("closed", with_streams_closed)):
        started = ranks(1, what)
        assert started.wait() == [DONE], started.log.read_text()
        assert result(tmp_path / f"runs/{name}") == reference
    for path in (tmp_path / "runs/closed").rglob("*"):
        assert path.is_dir() or b" tok/s " not in path.read_bytes(), f"{path} has what was printed"


def test_other_commands_end_with_their_reader(ranks):
    def listing() -> int:
        without_reader()
        errors.run(lambda argv: print("a line", flush=True))
        return errors.BUG

    assert ranks(1, listing).wait() == [141]


# --- G11: what is not there --------------------------------------------------------------------------------------------


def surroundings(name: str, tmp_path: Path) -> None:
    """Takes away what a name says, for this process alone."""
    if name in ("full TMPDIR", "everything"):
        disks.fill(disks.memory_disk(tmp_path / "full", 64 << 10), 0)
        os.environ["TMPDIR"] = str(tmp_path / "full")
    if name in ("no /dev/shm", "everything"):
        disks.read_only(disks.memory_disk(Path("/dev/shm"), 4096))
    if name in ("read-only HOME", "everything"):
        (tmp_path / "home").mkdir()
        disks.read_only(tmp_path / "home")
        os.environ["HOME"] = str(tmp_path / "home")
    os.umask(0o777 if name in ("umask 777", "everything") else 0)


@pytest.mark.parametrize("name", ["everything", *(pytest.param(name, marks=pytest.mark.faults) for name in
                                                 ("full TMPDIR", "no /dev/shm", "read-only HOME", "umask 777", "umask 0"))])
def test_a_run_needs_little_of_its_surroundings(recipe, ranks, reference, tmp_path, name):
    def run() -> None:
        surroundings(name, tmp_path)
        assert ranks(1, lambda: leave_as_command(recipe(*SHORT, name="odd"))).wait() == [DONE], (tmp_path / "ranks-1.log").read_text()

    disks.child(run)
    assert result(tmp_path / "runs/odd") == reference


def test_an_empty_environment_and_a_plain_locale(recipe, reference, tmp_path):
    """env -i: no HOME, no PATH, no locale; the package is found from the folder alone."""
    rows = tmp_path / "rows.jsonl"
    done = subprocess.run([sys.executable, "-m", "engine.train", *recipe(*SHORT, name="bare"), "log.every_steps=1"], cwd=ROOT, capture_output=True,
                          env={"OMP_NUM_THREADS": "1", "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"})
    assert done.returncode == DONE, done.stderr.decode()
    assert b"\\xd7" in done.stdout and done.stdout.isascii() and rows.exists()  # of ranks × sequences
    assert result(tmp_path / "runs/bare") == reference


# --- F4: clocks; F2, F5, F6: ranks that are not alike ------------------------------------------------------------------


def test_clocks_that_differ_and_jump_change_nothing(recipe, ranks, trained, tmp_path):
    trained(2, recipe(*SHORT, name="reference"))
    real = time.time

    def skewed() -> int:
        side, calls = (-1, 1)[int(os.environ["RANK"])], iter(range(10**9))
        time.time = lambda: real() + side * 86_400 * (1 if next(calls) % 3 else -1)
        time.time_ns = lambda: int(time.time() * 1e9)
        return train.main(recipe(*SHORT, name="skewed"))

    started = ranks(2, skewed)
    assert started.wait() == [DONE] * 2, started.log.read_text()
    assert result(tmp_path / "runs/skewed") == result(tmp_path / "runs/reference")
    for line in (tmp_path / "runs/skewed/metrics.jsonl").read_text().splitlines():
        assert all(value >= 0 for key, value in json.loads(line).items() if key.startswith("time/") or "per_s" in key), line


def other_code(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "engine", tmp_path / "engine", ignore=shutil.ignore_patterns("__pycache__"))
    with (tmp_path / "engine/loss.py").open("a") as file:
        file.write("# changed\n")
    rundir.__file__ = str(tmp_path / "engine/rundir.py")


def other_torch(tmp_path: Path) -> None:
    real = rundir.installed
    rundir.installed = lambda name: "2.12.1" if name == "torch" else real(name)


def other_cpu(tmp_path: Path) -> None:
    torch.backends.cpu.get_cpu_capability = lambda: "DEFAULT"


def other_attention(tmp_path: Path) -> None:
    attention.choose = lambda *_: ("reference", "what it would have taken failed here")


@pytest.mark.parametrize("change, name", [(other_code, "engine"), (other_torch, "torch"), (other_cpu, "instruction set of the CPU"),
                                          (other_attention, "attention in use")])
def test_ranks_of_another_program_do_not_train_together(recipe, ranks, tmp_path, change, name):
    def run() -> int:
        if os.environ["RANK"] == "1":
            change(tmp_path)
        return train.main(recipe())

    started = ranks(2, run)
    assert started.wait() == [PEER] * 2 and re.search(f"{name}.*: rank 1 has ", started.log.read_text())
    assert not (tmp_path / "runs/run/metrics.jsonl").exists()


def test_ranks_with_another_tokenizer_do_not_train_together(recipe, ranks, tiny, tmp_path):
    """As large as ours, but that it puts no space in front: four bytes more."""
    shutil.copytree(tiny, tmp_path / "other")
    (tmp_path / "other/tokenizer.model").write_bytes((tiny / "tokenizer.model").read_bytes() + b"\x1a\x02\x18\x00")
    started = ranks(2, lambda: train.main(recipe(f"model.path={tmp_path / 'other'}" if os.environ["RANK"] == "1" else "log.every_steps=1000")))
    assert started.wait() == [PEER] * 2 and "data: rank 1 has " in started.log.read_text()


def test_ranks_of_other_thread_counts_are_told_and_train(recipe, ranks, tmp_path):
    def run() -> int:
        torch.set_num_threads(1 + int(os.environ["RANK"]))
        return train.main(recipe("train.max_steps=1"))

    started = ranks(2, run)
    assert started.wait() == [DONE] * 2 and started.log.read_text().count("WARNING ranks compute with 1, 2 threads") == 1


# --- G7, G13 -----------------------------------------------------------------------------------------------------------


def test_a_recipe_edited_meanwhile_changes_nothing_in_the_run(recipe, ranks, reference, tmp_path, monkeypatch):
    from engine import config

    load = config.load

    def loaded(argv):
        found = load(argv)
        (tmp_path / "recipe.yaml").write_text("optim: {eps: 0.5}\nnonsense\n")
        return found

    monkeypatch.setattr(config, "load", loaded)
    assert ranks(1, recipe(*SHORT, name="edited")).wait() == [DONE]
    assert result(tmp_path / "runs/edited") == reference and "eps: 1.0e-08" in (tmp_path / "runs/edited/recipe.yaml").read_text()


def test_versions_that_no_test_ran_with_are_told(tmp_path, monkeypatch, capsys):
    from engine.config import Recipe

    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines() if re.fullmatch(r"[\w-]+==\S+", line))
    assert len(PINNED) == 3
    monkeypatch.setattr(rundir, "TESTED", PINNED)
    monkeypatch.setattr(rundir, "installed", pins.get)
    rundir.describe(tmp_path, Recipe(), {})
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(rundir, "installed", lambda name: "9.1.0" if name == "torch" else "2.4.0" if name == "omegaconf" else None)
    rundir.describe(tmp_path, Recipe(), {})
    assert capsys.readouterr().err == "WARNING torch 9.1.0 is not what the tests run with, 2.13; constraints.txt has the versions\n"
