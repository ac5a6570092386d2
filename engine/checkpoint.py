"""Checkpoints that are whole or not there: safetensors and JSON under a manifest of sizes and SHA-256, published by rename.

    checkpoints/step-000000100/   manifest.json  model.safetensors  optimizer.safetensors  state.json

Written to a temporary folder, fsynced, renamed, the parent fsynced, read again and compared; only then are older ones
removed. Only a checkpoint whose every byte agrees with its manifest is loaded. There is no pickle in it.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import stat
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from engine import config, space, tensorfile
from engine.config import Recipe
from engine.data import changes, ledger
from engine.data.dataset import Dataset
from engine.errors import CHECKPOINT, ENVIRONMENT, SECURITY, EngineError
from engine.publish import fsync, remove
from engine.record import plain

NAME = re.compile(r"step-([0-9]{9})")
MANIFEST = "manifest.json"
FILES = ("model.safetensors", "optimizer.safetensors", "state.json")
FORMAT = 1
OF_THE_MACHINE = {errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM,  # why a whole file may not be read,
                  errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EHOSTDOWN, errno.EHOSTUNREACH}  # of a mount whose server is away
BOXES = "blackbox"  # the folder beside that of checkpoints where one more may be held


@dataclass(frozen=True)
class Snapshot:
    """`model`: the trained weights by name, with what adapters started from. `optimizer`: its moments. `state`: step, scale, identity, as JSON."""

    model: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    state: dict[str, Any]


def prepare(folder: Path, start: int, model: nn.Module, kept: dict[str, Tensor], cfg: Recipe, num_steps: int, steps_per_epoch: int) -> None:
    """Before the first step, by the run that holds the lock: removes what a writer that was killed left, sets aside what `newest_whole`
    passed over for damage, so that it neither counts as a checkpoint nor is lost, and sees that the disk has room.

    Raises:
        EngineError: it has not.
    """
    for left in folder.glob(".tmp-*"):
        remove(left)
    for damaged in (folder / f"step-{step:09d}" for step in steps_in(folder) if step > start):
        aside = damaged.with_name(f"{damaged.name}.corrupt")
        remove(aside)
        os.rename(damaged, aside)
    there = {*steps_in(folder), *(step for held in folder.parent.glob(f"{BOXES}/*/checkpoint") for step in steps_in(held))}
    beside = bool(cfg.data.validation) + (cfg.log.spike_z > 0)  # the best, and that of a black box
    count = space.copies(cfg.checkpoint, beside, len(there), start, num_steps, steps_per_epoch)
    space.check(folder, count, space.of_checkpoint(kept.values()), space.of_export(model, cfg.export))


def save(folder: Path, step: int, snapshot: Snapshot, keep: int, best: int | None) -> Path:
    """Publishes a checkpoint of `step` finished steps under `folder`, then removes all but the `keep` newest and `best`."""
    target = folder / f"step-{step:09d}"
    building = folder / f".tmp-{target.name}"
    try:
        remove(building)
        building.mkdir()  # but not its parents: a run directory that was moved away is not made anew
        tensorfile.save(snapshot.model, building / FILES[0])
        tensorfile.save(snapshot.optimizer, building / FILES[1])
        (building / FILES[2]).write_text(json.dumps(plain({**snapshot.state, "step": step}), indent=2, allow_nan=False) + "\n", encoding="utf-8")
        files = {name: {"bytes": (building / name).stat().st_size, "sha256": _sha256(building / name)} for name in FILES}
        (building / MANIFEST).write_text(_sealed({"format": FORMAT, "step": step, "files": files}), encoding="utf-8")
        for path in building.iterdir():
            fsync(path)
        fsync(building)
        remove(target)  # one of the same step was not loaded, so it was damaged
        os.rename(building, target)
        fsync(folder)
    except OSError as error:
        with suppress(OSError):
            remove(building)
        needed = sum(tensor.nbytes for tensor in (*snapshot.model.values(), *snapshot.optimizer.values())) + space.BESIDE_TENSORS
        raise EngineError("ENVIRONMENT-CHECKPOINT", f"{target}: cannot be written: {error}; it takes about {needed:,} bytes, {space.told(folder)}; "
                          "older checkpoints are untouched", ENVIRONMENT) from error
    if problem := damage(target):
        raise EngineError("CHECKPOINT-WRITTEN", f"{target}: reads back differently from what was written: {problem}; is the disk sound?", CHECKPOINT)
    older = [number for number in steps_in(folder) if number < step]
    for number in older[: max(0, len(older) - (keep - 1))]:
        if number != best:
            shutil.rmtree(folder / f"step-{number:09d}", ignore_errors=True)
    return target


def best_of(best: dict[str, Any], loss: float | None, step: int) -> dict[str, Any]:
    """Step and loss of the checkpoint that did best on held-out rows: the one until now, or that of `step`, whose `loss` is None if unknown."""
    return {"step": step, "loss": loss} if step and loss is not None and loss < float(best["loss"]) else best


def steps_in(folder: Path) -> list[int]:
    """Of all that have a checkpoint's name, whole or not."""
    if not folder.is_dir():
        return []
    return sorted(int(match[1]) for entry in folder.iterdir()
                  if (match := NAME.fullmatch(entry.name)) and (entry.is_dir() or entry.is_symlink()))


def newest_whole(folder: Path) -> int | None:
    """The step of the newest checkpoint that is whole; None where there never was one. One warning names those passed over.

    Raises:
        EngineError: there are checkpoints and none is whole. A run with a history never silently starts from scratch.
    """
    damaged = []
    for step in reversed(steps_in(folder)):
        problem = damage(folder / f"step-{step:09d}")
        if problem is None:
            if unknown := sorted(set(os.listdir(folder / f"step-{step:09d}")) - {*FILES, MANIFEST}):
                print(f"WARNING {folder}/step-{step:09d}: ignoring what is none of a checkpoint's files: {', '.join(unknown)}", file=sys.stderr, flush=True)
            if strange := _others_may_write(folder / f"step-{step:09d}"):
                print(f"WARNING {strange}: another user may write there. A checkpoint's sums show damage, not forgery: where you do not trust them all, "
                      "start from scratch, else chown and chmod go-w it", file=sys.stderr, flush=True)
            if damaged:
                print(f"WARNING passing over damaged checkpoints: {'; '.join(damaged)}. Resuming from step {step}", file=sys.stderr, flush=True)
            return step
        damaged.append(f"step-{step:09d}: {problem}")
    if damaged:
        raise EngineError("CHECKPOINT-NONE", f"{folder}: no checkpoint is whole ({'; '.join(damaged)}); expected at least one. "
                          "Restore one, or choose another run.name to start from scratch", CHECKPOINT)
    return None


def newest(folder: Path) -> int | None:
    """The step of the newest checkpoint, whole or not."""
    return max(steps_in(folder), default=None)


def _others_may_write(path: Path) -> str | None:
    """The first of a checkpoint's folders and files that belongs to a user who is neither this one nor root, or that all users may write."""
    for place in (path.parent, path, *sorted(path.iterdir())):
        status = place.lstat()
        if status.st_uid not in (0, os.geteuid()) or status.st_mode & stat.S_IWOTH:
            return f"{place} (owner {status.st_uid}, mode {stat.S_IMODE(status.st_mode):04o})"
    return None


@contextmanager
def opened(folder: Path, step: int, verify: bool = True) -> Iterator[Snapshot]:
    """The checkpoint of `step`, its files open: tensors are read one at a time, as they are asked for in the block.

    Args:
        verify: its sums once more. Not needed where `newest_whole` has just found it, or for the second rank of a node.

    Raises:
        EngineError: it is damaged, or is found to be while it is read.
    """
    path = folder / f"step-{step:09d}"
    if verify and (problem := damage(path)):
        raise EngineError("CHECKPOINT-DAMAGED", f"{path}: {problem}; start again to resume from the newest whole one", CHECKPOINT)
    try:
        with tensorfile.Reader(path / FILES[0]) as model, tensorfile.Reader(path / FILES[1]) as optimizer:
            yield Snapshot(model, optimizer, json.loads((path / FILES[2]).read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError) as error:  # its sums are right, so whoever wrote it wrote it so, or it is being changed
        if isinstance(error, OSError) and error.filename and not str(error.filename).startswith(str(path)):
            raise  # of another file that the block reads
        raise EngineError("CHECKPOINT-DAMAGED", f"{path}: cannot be read: {error}; restore it, or choose another run.name", CHECKPOINT) from error


def damage(path: Path) -> str | None:
    """What keeps a checkpoint from being whole, or None.

    Raises:
        EngineError: a link stands where a file of its own is expected, or a newer engine wrote it: passing over it would throw its steps away; or this
            machine cannot read it now.
    """
    try:
        for name in ("", MANIFEST, *FILES):
            mode = (path / name).lstat().st_mode
            if stat.S_ISLNK(mode):
                raise EngineError("SECURITY-LINK", f"{path / name}: got a symbolic link, expected a checkpoint's own "
                                  f"{'file' if name else 'folder'}; put a copy in its place, or remove it", SECURITY)
            if name and not stat.S_ISREG(mode):
                return f"{name} is no file"
        text = (path / MANIFEST).read_text(encoding="utf-8")
        manifest = json.loads(text)
        files = manifest["files"]
        if text != _sealed({key: value for key, value in manifest.items() if key != "seal"}):
            return "manifest.json is not as it was written"
        if manifest["format"] > FORMAT:
            raise EngineError("CHECKPOINT-NEWER", f"{path}: was written by a newer engine, in format {manifest['format']}, expected at most {FORMAT}; "
                              "resume with that engine, or choose another run.name", CHECKPOINT)
        if manifest["format"] != FORMAT or sorted(files) != sorted(FILES) or path.name != f"step-{manifest['step']:09d}":
            return "manifest.json belongs to something else"
        for name in FILES:
            size = (path / name).stat().st_size
            if size != files[name]["bytes"]:
                return f"{name} has {size} bytes, expected {files[name]['bytes']}"
            if (found := _sha256(path / name)) != files[name]["sha256"]:
                return f"{name} has SHA-256 {found[:12]}…, the manifest says {files[name]['sha256'][:12]}…"
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        if isinstance(error, OSError) and error.errno in OF_THE_MACHINE:
            raise EngineError("ENVIRONMENT-CHECKPOINT", f"{path}: cannot be read now ({error}), which says nothing of what it holds; nothing was set aside: "
                              "look at its owner, the file system and the machine's limits, and start again", ENVIRONMENT) from error
        return f"cannot be read: {error}"
    return None


def compare_identity(path: Path, state: dict[str, Any], current: dict[str, Any], allow: Collection[str], rows: Dataset, speaks: bool) -> set[str]:
    """The parts in which a checkpoint's run differs from the one that resumes, if `allow` names them all.

    One warning names them, and `current` keeps them as "allowed", with those before. An option that the checkpoint's engine
    did not have yet had the value that is now its default.

    Args:
        state: the checkpoint's. Its "identity" has a value for each part; of "data" its "files" tell more.

    Raises:
        EngineError: it names every part that is not allowed.
    """
    saved = {**config.semantic(Recipe()), **state["identity"]}
    current["allowed"] = saved.pop("allowed", [])
    different = {key: f"{key}: {saved.get(key)} → {current.get(key)}" for key in sorted(saved.keys() | current.keys() - {"allowed"})
                 if saved.get(key) != current.get(key)}
    if "data" in different:
        different["data"] = f"data: {changes.told(state['files'], rows, alike=set(different) == {'data'})}"
    if refused := [text for key, text in different.items() if key not in allow]:
        never = [key for key in different if key in config.FIXED]
        way = f"no checkpoint fits with another {', '.join(never)}" if never else f"or set resume.allow=[{', '.join(different)}] if it is meant"
        raise EngineError("CHECKPOINT-IDENTITY", f"{path}: belongs to a run that differs (checkpoint → now): {'; '.join(refused)}; "
                          f"undo the change, or choose another run.name; {way}", CHECKPOINT)
    if different:
        anew = f"; rows come in another order, and are counted, from step {state['step'] + 1} on" if ledger.PLANNED & set(different) else ""
        current["allowed"] = [*current["allowed"], *(f"after step {state['step']}: {text}" for text in different.values())]
        if speaks:
            print(f"WARNING {path}: resumed with what differs, as resume.allow says: {'; '.join(different.values())}{anew}", file=sys.stderr, flush=True)
    return set(different)


def _sealed(manifest: dict[str, Any]) -> str:
    """The manifest's text, with its own SHA-256 in it."""
    seal = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    return json.dumps({**manifest, "seal": seal}, indent=2) + "\n"


def _sha256(path: Path) -> str:
    digest, block = hashlib.sha256(), memoryview(bytearray(1 << 22))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(block):
            digest.update(block[:count])
    return digest.hexdigest()
