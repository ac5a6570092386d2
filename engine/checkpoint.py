"""Checkpoints that are whole or not there: safetensors and JSON under a manifest of sizes and SHA-256, published by rename.

    checkpoints/step-000000100/   manifest.json  model.safetensors  optimizer.safetensors  state.json

Written to a temporary folder, fsynced, renamed, the parent fsynced, read again and compared; only then are older ones
removed. Only a checkpoint whose every byte agrees with its manifest is loaded. There is no pickle in it.
"""

import hashlib
import json
import os
import re
import shutil
import stat
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from engine import space, tensorfile, watchdog
from engine.config import Recipe
from engine.errors import CHECKPOINT, ENVIRONMENT, SECURITY, EngineError
from engine.publish import fsync, remove

NAME = re.compile(r"step-([0-9]{9})")
MANIFEST = "manifest.json"
FILES = ("model.safetensors", "optimizer.safetensors", "state.json")


@dataclass(frozen=True)
class Snapshot:
    """`model`: the trained weights by name. `optimizer`: its moments. `state`: step, scale, identity and the like, as JSON."""

    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]


def prepare(folder: Path, start: int, trained: dict[str, Tensor], cfg: Recipe, num_steps: int, steps_per_epoch: int) -> None:
    """Before the first step, by the run that holds the lock: removes what a writer that was killed left, sets aside what `newest_whole`
    passed over for damage, so that it neither counts as a checkpoint nor is lost, and sees that the disk has room.

    Raises:
        EngineError: it has not.
    """
    for left in folder.glob(".tmp-*"):
        remove(left)
    for damaged in (folder / f"step-{step:09d}" for step in _steps(folder) if step > start):
        aside = damaged.with_name(f"{damaged.name}.corrupt")
        remove(aside)
        os.rename(damaged, aside)
    count = space.copies(cfg.checkpoint, bool(cfg.data.validation), len(_steps(folder)), start, num_steps, steps_per_epoch)
    space.check(folder, count, space.of_checkpoint(trained.values()))


@watchdog.phase("saving a checkpoint")
def save(folder: Path, step: int, snapshot: Snapshot, keep: int, best: int | None) -> Path:
    """Publishes a checkpoint of `step` finished steps under `folder`, then removes all but the `keep` newest and `best`."""
    target = folder / f"step-{step:09d}"
    building = folder / f".tmp-{target.name}"
    try:
        remove(building)
        building.mkdir()  # but not its parents: a run directory that was moved away is not made anew
        tensorfile.save(snapshot.model, building / FILES[0])
        tensorfile.save(snapshot.optimizer, building / FILES[1])
        (building / FILES[2]).write_text(json.dumps({**snapshot.state, "step": step}, indent=2) + "\n", encoding="utf-8")
        files = {name: {"bytes": (building / name).stat().st_size, "sha256": _sha256(building / name)} for name in FILES}
        (building / MANIFEST).write_text(_sealed({"format": 1, "step": step, "files": files}), encoding="utf-8")
        for path in building.iterdir():
            fsync(path)
        fsync(building)
        remove(target)  # one of the same step was not loaded, so it was damaged
        os.rename(building, target)
        fsync(folder)
    except OSError as error:
        with suppress(OSError):
            remove(building)
        needed = space.of_checkpoint(snapshot.model.values())
        raise EngineError("ENVIRONMENT-CHECKPOINT", f"{target}: cannot be written: {error}; it takes about {needed:,} bytes, {space.told(folder)}; "
                          "older checkpoints are untouched", ENVIRONMENT) from error
    if problem := damage(target):
        raise EngineError("CHECKPOINT-WRITTEN", f"{target}: reads back differently from what was written: {problem}; is the disk sound?", CHECKPOINT)
    older = [number for number in _steps(folder) if number < step]
    for number in older[: max(0, len(older) - (keep - 1))]:
        if number != best:
            shutil.rmtree(folder / f"step-{number:09d}", ignore_errors=True)
    return target


def newest_whole(folder: Path) -> int | None:
    """The step of the newest checkpoint that is whole; None where there never was one. One warning names those passed over.

    Raises:
        EngineError: there are checkpoints and none is whole. A run with a history is never silently begun anew.
    """
    damaged = []
    for step in reversed(_steps(folder)):
        problem = damage(folder / f"step-{step:09d}")
        if problem is None:
            if unknown := sorted(set(os.listdir(folder / f"step-{step:09d}")) - {*FILES, MANIFEST}):
                print(f"WARNING: {folder}/step-{step:09d}: ignoring what is none of a checkpoint's files: {', '.join(unknown)}", file=sys.stderr, flush=True)
            if damaged:
                print(f"WARNING: passing over damaged checkpoints: {'; '.join(damaged)}. Going on from step {step}", file=sys.stderr, flush=True)
            return step
        damaged.append(f"step-{step:09d}: {problem}")
    if damaged:
        raise EngineError("CHECKPOINT-NONE", f"{folder}: no checkpoint is whole ({'; '.join(damaged)}); expected at least one. "
                          "Restore one, or choose another run.name to begin anew", CHECKPOINT)
    return None


def load(folder: Path, step: int) -> Snapshot:
    """The checkpoint of `step`, verified once more as it is read."""
    path = folder / f"step-{step:09d}"
    if problem := damage(path):
        raise EngineError("CHECKPOINT-DAMAGED", f"{path}: {problem}", CHECKPOINT)
    return Snapshot(load_file(path / FILES[0]), load_file(path / FILES[1]), json.loads((path / FILES[2]).read_text(encoding="utf-8")))


def damage(path: Path) -> str | None:
    """What keeps a checkpoint from being whole, or None.

    Raises:
        EngineError: a link stands where a file of its own is expected.
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
        if manifest["format"] != 1 or sorted(files) != sorted(FILES) or path.name != f"step-{manifest['step']:09d}":
            return "manifest.json belongs to something else"
        for name in FILES:
            size = (path / name).stat().st_size
            if size != files[name]["bytes"]:
                return f"{name} has {size} bytes, expected {files[name]['bytes']}"
            if (found := _sha256(path / name)) != files[name]["sha256"]:
                return f"{name} has SHA-256 {found[:12]}…, the manifest says {files[name]['sha256'][:12]}…"
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        return f"cannot be read: {error}"
    return None


def compare_identity(path: Path, saved: dict[str, Any], current: dict[str, Any]) -> None:
    """Raises EngineError that names every part in which a checkpoint's run differs from the one that would go on."""
    if different := [f"{key}: {saved.get(key)} → {current.get(key)}" for key in sorted(saved.keys() | current.keys()) if saved.get(key) != current.get(key)]:
        raise EngineError("CHECKPOINT-IDENTITY", f"{path}: belongs to a run that differs (checkpoint → now): {'; '.join(different)}; "
                          "undo the change, or choose another run.name", CHECKPOINT)


def _sealed(manifest: dict[str, Any]) -> str:
    """The manifest's text, with its own SHA-256 in it."""
    seal = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    return json.dumps({**manifest, "seal": seal}, indent=2) + "\n"


def _steps(folder: Path) -> list[int]:
    if not folder.is_dir():
        return []
    return sorted(int(match[1]) for entry in folder.iterdir()
                  if (match := NAME.fullmatch(entry.name)) and (entry.is_dir() or entry.is_symlink()))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else hashlib.sha256(file.read()).hexdigest()
