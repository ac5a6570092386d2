"""Torn checkpoints: every state that can be thought of is refused, writers that are killed leave none, the order of writing is durable."""

import contextlib
import io
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch
from test_resume import LONG, LORA, result

from engine import checkpoint, publish, rundir, tensorfile, train
from engine.checkpoint import FILES, MANIFEST, Snapshot

NAMES = (*FILES, MANIFEST)
STRACE = shutil.which("strace")
needs_strace = pytest.mark.skipif(STRACE is None, reason="strace is not installed")


def snapshot(value: float) -> Snapshot:
    return Snapshot({"w": torch.full((5, 3), value)}, {"w.exp_avg": torch.full((7, 3), value + 0.5), "w.step": torch.tensor(value)}, {"note": value})


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def folder(tmp_path) -> Path:
    """Whole checkpoints of steps 10, 20 and 30, where syncing costs nothing if that can be had."""
    memory = Path("/dev/shm")
    place = memory / f"torn-{os.getpid()}-{time.monotonic_ns()}" if memory.is_dir() and os.access(memory, os.W_OK) else tmp_path / "checkpoints"
    place.mkdir()
    for step in (10, 20, 30):
        checkpoint.save(place, step, snapshot(float(step)), keep=5, best=None)
    yield place
    shutil.rmtree(place)


# --- every torn state ------------------------------------------------------------------------------------------------

# What becomes of one file: its bytes, or None where it is absent. `self` is the file, `older` the same of the step before.
Change = tuple[str, Callable[[bytes, bytes], bytes | None]]
COARSE: list[Change] = [
    ("absent", lambda self, older: None), ("empty", lambda self, older: b""), ("older", lambda self, older: older),
    ("half", lambda self, older: self[: len(self) // 2]), ("zeros", lambda self, older: bytes(len(self))),
    ("zero tail", lambda self, older: self[: len(self) // 3] + bytes(len(self) - len(self) // 3)),
    ("first bit", lambda self, older: bytes([self[0] ^ 1]) + self[1:]), ("one byte more", lambda self, older: self + b"\n")]
MIDDLE: list[Change] = [*COARSE, ("twice", lambda self, older: self + self),
                        ("older's end", lambda self, older: self[: len(self) // 2] + older[len(self) // 2 :]),
                        ("last bit", lambda self, older: self[:-1] + bytes([self[-1] ^ 1])), ("without the last byte", lambda self, older: self[:-1]),
                        *((f"{k}/8", lambda self, older, k=k: self[: len(self) * k // 8]) for k in (1, 3, 5, 7))]
FINE: list[Change] = [*MIDDLE, *((f"{k}/64", lambda self, older, k=k: self[: len(self) * k // 64]) for k in range(1, 64)),
                      *((f"last {2**k} zero", lambda self, older, k=k: (self[: -(2**k)] + bytes(2**k))[-len(self) :]) for k in range(13))]


def _states(self: dict[str, bytes], older: dict[str, bytes]) -> Iterator[dict[str, bytes | None]]:
    """Contents of a checkpoint's files as a checkpoint may be left: any bit flipped, any byte the last, then several files changed at once."""
    for name in NAMES:
        for at in range(len(self[name])):
            yield {name: self[name][:at]}
            yield {name: self[name][:at] + bytes(len(self[name]) - at)}
            for bit in range(8):
                yield {name: self[name][:at] + bytes([self[name][at] ^ 1 << bit]) + self[name][at + 1 :]}
    for name, other in itertools.permutations(NAMES, 2):  # another file of the same checkpoint
        yield {name: self[other]}
        yield {name: self[other], other: self[name]}
    for count, changes in ((2, FINE), (3, MIDDLE), (4, MIDDLE)):
        for names in itertools.combinations(NAMES, count):
            for chosen in itertools.product(changes, repeat=count):
                yield {name: change(self[name], older[name]) for name, (_, change) in zip(names, chosen, strict=True)}


def states(self: dict[str, bytes], older: dict[str, bytes]) -> Iterator[dict[str, bytes | None]]:
    """Those of them that differ from the whole checkpoint, and each but once."""
    seen = set()
    for changed in _states(self, older):
        changed = {name: data for name, data in changed.items() if data != self[name]}
        if changed and (key := hash(tuple(sorted(changed.items(), key=lambda one: one[0])))) not in seen:
            seen.add(key)
            yield changed


def put(path: Path, data: bytes | None) -> None:
    if data is None:
        path.unlink(missing_ok=True)
    else:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.write(descriptor, data)
        os.close(descriptor)


def enumerate_states(folder: Path, every: int, draw: random.Random) -> int:
    """Puts the newest of three checkpoints into one state in `every`; the number of states seen.

    Now and then the second is torn as well, or what is torn lies under a temporary name: the oldest, the second are to be found.
    """
    newest, second = folder / "step-000000030", folder / "step-000000020"
    whole, older = contents(newest), contents(second)
    seen = 0
    for number, changed in enumerate(states(whole, older)):
        if (number + every // 2) % every:
            continue
        for name, data in changed.items():
            put(newest / name, data)
        expected = 20
        if number // every % 16 == 1:
            temporary = folder / ".tmp-step-000000040"
            os.rename(newest, temporary)
        if number // every % 16 == 2:  # the second with it, by another change
            spoilt, (_, change) = draw.choice(NAMES), draw.choice(COARSE)
            put(second / spoilt, change(older[spoilt], whole[spoilt]))
            expected = 10
        with contextlib.redirect_stderr(io.StringIO()) as said:
            found = checkpoint.newest_whole(folder)
        assert found == expected, f"state {number}: step {found} was taken, expected {expected}; changed: {changed}"
        assert said.getvalue().count("WARNING") == newest.exists(), said.getvalue()
        seen += 1
        if not newest.exists():
            os.rename(temporary, newest)
        for name in changed:
            put(newest / name, whole[name])
        if expected == 10:
            put(second / spoilt, older[spoilt])
    assert checkpoint.newest_whole(folder) == 30
    return seen


def test_a_sample_of_torn_states_is_refused(folder):
    assert enumerate_states(folder, 37, random.Random(1)) > 2000


@pytest.mark.faults
def test_every_torn_state_is_refused(folder, capsys):
    began = time.monotonic()
    torn = enumerate_states(folder, 1, random.Random(1))
    with capsys.disabled():
        print(f"\n{torn:,} torn states, all different, none accepted, in {time.monotonic() - began:.0f} s")
    assert torn >= 100_000


# --- writers killed --------------------------------------------------------------------------------------------------


class Killer:
    """Counts bytes written and calls that change names; at the `at`-th of them all the process gets SIGKILL."""

    def __init__(self, at: int | None) -> None:
        self.at, self.done, self.events = at, 0, []

    def event(self, name: str) -> None:
        self.events.append(self.done)
        if self.done == self.at:
            os.kill(os.getpid(), signal.SIGKILL)
        self.done += 1

    def write(self, path: Path, data: bytes) -> None:
        self.event(f"open {path.name}")
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        part = len(data) if self.at is None else min(len(data), self.at - self.done)
        os.write(descriptor, data[:part])
        self.done += part
        if self.done == self.at:
            os.kill(os.getpid(), signal.SIGKILL)
        os.close(descriptor)

    def watch(self, patch: pytest.MonkeyPatch) -> "Killer":
        """Every write of a checkpoint and every change of a name in it counts from now on."""
        patch.setattr(tensorfile, "save", lambda tensors, path: self.write(path, safetensors.torch.save(tensors, metadata={"format": "pt"})))
        patch.setattr(Path, "write_text", lambda path, text, **_: self.write(path, text.encode()))
        for module in (checkpoint, publish):
            patch.setattr(module, "fsync", lambda path: self.event("fsync"))
        for name in ("rename", "unlink", "rmdir", "mkdir"):
            plain = getattr(os, name)
            patch.setattr(os, name, lambda *a, plain=plain, name=name, **k: (self.event(name), plain(*a, **k))[1])
        return self


def before(folder: Path, kind: str) -> None:
    """What the writer finds beside whole checkpoints of steps 10 and 20."""
    shutil.rmtree(folder / "step-000000030")
    shutil.rmtree(folder / ".tmp-step-000000030", ignore_errors=True)
    if kind == "leftover":
        shutil.copytree(folder / "step-000000010", folder / ".tmp-step-000000030")
    if kind == "damaged":
        shutil.copytree(folder / "step-000000020", folder / "step-000000030")


def writers_killed(folder: Path, count: int, seed: int) -> dict[str, int]:
    """Kills writers of step 30 at every event and at random bytes; after each the newest whole checkpoint must be found, by an oracle that
    compares bytes and knows nothing of manifests. Returns how many of them found step 30, 20, and how many were killed."""
    expected = {step: contents(folder / f"step-{step:09d}") for step in (10, 20, 30)}
    draw, tally = random.Random(seed), {"killed": 0, "found 20": 0, "found 30": 0, "went on": 0}
    for kind in ("fresh", "leftover", "damaged"):
        before(folder, kind)
        with pytest.MonkeyPatch.context() as patch:
            counted = Killer(None).watch(patch)
            checkpoint.save(folder, 30, snapshot(30.0), keep=2, best=None)
        assert contents(folder / "step-000000030") == expected[30] and sorted(os.listdir(folder)) == ["step-000000020", "step-000000030"]
        share = count // 3
        at = [*counted.events, *(draw.randrange(counted.done) for _ in range(share))]
        for place in at[:share] if share < len(counted.events) else at:
            for path in list(folder.iterdir()):
                shutil.rmtree(path)
            for step, files in expected.items():
                (folder / f"step-{step:09d}").mkdir()
                for name, data in files.items():
                    put(folder / f"step-{step:09d}" / name, data)
            before(folder, kind)
            pid = os.fork()
            if not pid:
                try:
                    Killer(place).watch(pytest.MonkeyPatch())
                    checkpoint.save(folder, 30, snapshot(30.0), keep=2, best=None)
                finally:
                    os._exit(1)
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL, f"the writer lived, killed at {place} of {counted.done}"
            newest = max(step for step in expected if (path := folder / f"step-{step:09d}").is_dir() and contents(path) == expected[step])
            with contextlib.redirect_stderr(io.StringIO()):
                assert checkpoint.newest_whole(folder) == newest >= 20, f"{kind}, killed at {place} of {counted.done}"
            tally["killed"] += 1
            tally[f"found {newest}"] += 1
            if draw.random() < 0.2:  # the next writer is not hindered by what was left
                with pytest.MonkeyPatch.context() as patch:
                    Killer(None).watch(patch)
                    checkpoint.save(folder, 30, snapshot(30.0), keep=2, best=None)
                assert sorted(os.listdir(folder)) == ["step-000000020", "step-000000030"] and checkpoint.newest_whole(folder) == 30
                tally["went on"] += 1
        for step, files in expected.items():
            (folder / f"step-{step:09d}").mkdir(exist_ok=True)
            for name, data in files.items():
                put(folder / f"step-{step:09d}" / name, data)
    return tally


def test_writers_killed_at_every_step_of_a_save(folder):
    tally = writers_killed(folder, 70, seed=0)
    assert tally["killed"] >= 50 and tally["found 20"] and tally["found 30"]


@pytest.mark.faults
def test_a_thousand_writers_killed_at_random_bytes(folder, capsys):
    began = time.monotonic()
    tally = writers_killed(folder, 1200, seed=1)
    with capsys.disabled():
        print(f"\nwriters killed at events and random bytes: {tally} in {time.monotonic() - began:.0f} s")
    assert tally["killed"] >= 1000


@pytest.mark.parametrize("trials", [1, pytest.param(50, marks=pytest.mark.faults)])
def test_training_killed_while_it_writes_ends_the_same(recipe, ranks, trained, tmp_path, trials):
    options = (*LORA, *LONG)
    trained(1, recipe(*options, name="whole"))
    last = sorted((tmp_path / "runs/whole/checkpoints").iterdir())[-1]
    total = sum(map(len, contents(last).values())) * (len((tmp_path / "runs/whole/metrics.jsonl").read_text().splitlines()) // 2)
    draw = random.Random(trials)
    for trial in range(trials):
        def killed(name: str = f"cut{trial}", at: int = draw.randrange(total)) -> int:
            killer = Killer(at)
            save = checkpoint.save

            def watched(*arguments):
                with pytest.MonkeyPatch.context() as patch:
                    killer.watch(patch)
                    return save(*arguments)

            checkpoint.save = watched
            return train.main(recipe(*options, name=name))

        assert ranks(1, killed).wait() == [-signal.SIGKILL]
        trained(1, recipe(*options, name=f"cut{trial}"))
        assert result(tmp_path / f"runs/cut{trial}") == result(tmp_path / "runs/whole")


# --- the order of system calls ---------------------------------------------------------------------------------------


def traced(folder: Path, *options: str, step: int = 40, keep: int = 2, what: Callable[[], object] | None = None) -> tuple[int, str]:
    """Saves a checkpoint, or does `what`, in a process that strace is attached to; its exit code (4 for an error that is ours) and the trace."""
    ours, theirs = os.pipe()
    pid = os.fork()
    if not pid:
        code = 70
        try:
            os.close(theirs)
            os.read(ours, 1)  # until strace is there
            what() if what else checkpoint.save(folder, step, snapshot(float(step)), keep=keep, best=None)
            code = 0
        except checkpoint.EngineError as error:
            code = error.exit_code
        finally:
            os._exit(code)
    os.close(ours)
    log = folder.parent / f"trace-{pid}"
    tracer = subprocess.Popen([STRACE, "-f", "-y", "-s", "0", "-o", str(log), *options, "-p", str(pid)], stderr=subprocess.PIPE, text=True)
    try:
        line = tracer.stderr.readline()
        if "attached" not in line:
            pytest.skip(f"strace may not attach here: {line.strip()}")
        os.write(theirs, b"x")
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    finally:
        os.close(theirs)
        tracer.wait(10)
    text = log.read_text()
    log.unlink()
    return code, text


CALLS = "trace=openat,write,fsync,rename,renameat,renameat2,unlink,unlinkat,rmdir,mkdir,chmod"


@needs_strace
def test_system_calls_are_in_a_durable_order(folder):
    """What each file says is on the disk before the name that vouches for it, and that before an older checkpoint goes."""
    code, text = traced(folder, "-e", CALLS)
    assert code == 0
    calls = [line.split(maxsplit=1)[1] for line in text.splitlines() if " = " in line and "= -1" not in line]
    building, target = f"{folder}/.tmp-step-000000040", f"{folder}/step-000000040"
    rename, = (i for i, call in enumerate(calls) if call.startswith("rename") and f'"{building}"' in call and f'"{target}"' in call)
    syncs = [(i, re.search(r"<(.*)>", call)[1]) for i, call in enumerate(calls) if call.startswith("fsync")]
    assert {path for i, path in syncs if i < rename} == {building, *(f"{building}/{name}" for name in NAMES)}
    assert max(i for i, path in syncs if i < rename) == next(i for i, path in syncs if path == building)
    for name in NAMES:
        opened, = {call.split('"')[1] for call in calls if call.startswith("rename") and f'{building}/{name}"' in call} or {f"{building}/{name}"}
        written = max(i for i, call in enumerate(calls) if call.startswith("write(") and f"<{opened}>" in call)
        assert written < next(i for i, path in syncs if path == f"{building}/{name}")
    parent = next(i for i, path in syncs if path == str(folder))
    reread = [i for i, call in enumerate(calls) if call.startswith("openat") and f"{target}/" in call and "O_RDONLY" in call]
    gone = [i for i, call in enumerate(calls) if call.startswith(("unlink", "rmdir"))]
    assert rename < parent < min(reread) and gone and max(reread) < min(gone)


@needs_strace
def test_killed_at_every_system_call(folder):
    """By strace, in the real writer: no stand-in for safetensors or for the system."""
    expected = {step: contents(folder / f"step-{step:09d}") for step in (20, 30)}
    _, text = traced(folder, "-e", CALLS, keep=5)
    expected[40] = contents(folder / "step-000000040")
    named = [match[1] for line in text.splitlines() if (match := re.match(r"\d+ +(\w+)\(", line))]
    found = []
    for number, name in enumerate(named):  # strace counts each kind of call by itself
        for name_left in ("step-000000040", ".tmp-step-000000040"):  # so that each process makes the same calls
            shutil.rmtree(folder / name_left, ignore_errors=True)
        code, _ = traced(folder, "-e", f"trace={name}", "-e", f"inject={name}:signal=KILL:when={named[: number + 1].count(name)}", keep=5)
        assert code == -signal.SIGKILL, f"call {number + 1} of {len(named)}, {name}, was not reached"
        found.append(checkpoint.newest_whole(folder))
        assert contents(folder / f"step-{found[-1]:09d}") == expected[found[-1]]
    assert set(found) == {30, 40} and found == sorted(found) and len(found) > 30


@needs_strace
@pytest.mark.parametrize("fault", [*(f"fsync:error=EIO:when={number}" for number in range(1, 7)), "rename,renameat,renameat2:error=EXDEV", "write:error=ENOSPC",
                                   "rename,renameat,renameat2:error=EACCES", "mkdir,mkdirat:error=EDQUOT", "chmod,fchmodat:error=EPERM"])
def test_a_system_call_that_fails_is_a_save_that_failed(folder, fault):
    older = {path.name: contents(path) for path in folder.iterdir()}
    code, text = traced(folder, "-e", CALLS, "-e", f"inject={fault}", keep=1)
    assert "INJECTED" in text and code == 4
    assert {path.name: contents(path) for path in folder.iterdir() if path.name in older} == older, "an older checkpoint was touched"
    left = sorted(set(os.listdir(folder)) - set(older))
    if fault.endswith("when=6"):  # the name is there and may not outlive a loss of power; nothing older has gone for it
        assert left == ["step-000000040"] and checkpoint.damage(folder / left[0]) is None
    else:
        assert left == []
        assert checkpoint.newest_whole(folder) == 30
    checkpoint.save(folder, 40, snapshot(40.0), keep=1, best=None)
    assert os.listdir(folder) == ["step-000000040"] and json.loads((folder / "step-000000040" / "state.json").read_text())["step"] == 40


def publishes(target: Path, text: str) -> None:
    with publish.published(target) as building:
        if target.suffix:
            building.write_text(text)
        else:
            (building / "part").mkdir(parents=True)
            for path in (building / "a", building / "part/b"):
                path.write_text(text)


def published_text(path: Path) -> str | None:
    """What is there, if it is whole."""
    found = {part.read_text() for part in (path / "a", path / "part/b", path) if part.is_file()}
    return found.pop() if len(found) == 1 else None


@needs_strace
@pytest.mark.parametrize("name", ["model", "model.gguf"])
def test_what_is_published_is_durable_before_what_was_there_goes(folder, name):
    """Killed at every system call: the old one or the new one has the name, but between two renames of folders, where the old one lies beside."""
    place = folder / "export"
    publishes(place / name, "old")
    code, text = traced(folder, "-e", CALLS, what=lambda: publishes(place / name, "new"))
    assert code == 0 and published_text(place / name) == "new" and os.listdir(place) == [name]
    calls = [line.split(maxsplit=1)[1] for line in text.splitlines() if " = " in line and "= -1" not in line]
    rename, = (i for i, call in enumerate(calls) if call.startswith("rename") and f'"{place}/.tmp-{name}"' in call)
    syncs = [(i, re.search(r"<(.*)>", call)[1]) for i, call in enumerate(calls) if call.startswith("fsync")]
    parts = ["", "/a", "/part", "/part/b"] if name == "model" else [""]
    assert {path for i, path in syncs if i < rename} == {f"{place}/.tmp-{name}{part}" for part in parts}
    parent, = (i for i, path in syncs if i > rename)
    assert syncs[-1][1] == str(place) and not [call for call in calls[:parent] if call.startswith(("unlink", "rmdir"))], "the old one went before"
    named = [match[1] for line in text.splitlines() if (match := re.match(r"\d+ +(\w+)\(", line))]
    gaps = 0
    for number, call in enumerate(named):
        shutil.rmtree(place)
        publishes(place / name, "old")
        killed = f"inject={call}:signal=KILL:when={named[: number + 1].count(call)}"
        assert traced(folder, "-e", f"trace={call}", "-e", killed, what=lambda: publishes(place / name, "new"))[0] == -signal.SIGKILL
        if not (place / name).exists():
            assert published_text(place / f".old-{name}") == "old"
            gaps += 1
        else:
            assert published_text(place / name) in ("old", "new")
        publishes(place / name, "newer")
        assert published_text(place / name) == "newer" and os.listdir(place) == [name]
    assert gaps == (name == "model") and len(named) > 5


@needs_strace
def test_what_was_there_comes_back_where_the_new_one_gets_no_name(folder):
    place = folder / "export"
    publishes(place / "model", "old")
    code, text = traced(folder, "-e", CALLS, "-e", "inject=rename,renameat,renameat2:error=EIO:when=2", what=lambda: publishes(place / "model", "new"))
    assert code == 4 and "INJECTED" in text and published_text(place / "model") == "old" and os.listdir(place) == ["model"]


@needs_strace
@pytest.mark.parametrize("what", ["run", "cache"])
@pytest.mark.parametrize("answer", ["ENOLCK", "EOPNOTSUPP", "ENOSYS"])
def test_a_file_system_without_locks_is_told_as_one(folder, what, answer):
    said, place = folder / "said", folder / "place"

    def locks() -> None:
        try:
            with rundir.locked(place, 0) if what == "run" else publish.locked(place):
                pass
        except checkpoint.EngineError as error:
            said.write_text(str(error))
            raise

    code, text = traced(folder, "-e", "trace=flock", "-e", f"inject=flock:error={answer}", what=locks)
    assert code == 4 and "INJECTED" in text and f"E-ENVIRONMENT-LOCKS {place}" in said.read_text() and "gives no locks" in said.read_text()
