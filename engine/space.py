"""Room on the disk: asked for before the first step, reported when it has run out."""

import os
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from engine.config import Checkpoint
from engine.errors import ENVIRONMENT, EngineError

BESIDE_TENSORS = 64 * 1024  # bytes: headers, state.json, manifest.json


def of_checkpoint(trained: Iterable[Tensor]) -> int:
    """Bytes that a checkpoint will take: the trained weights and two moments of their type."""
    return 3 * sum(tensor.nbytes for tensor in trained) + BESIDE_TENSORS


def copies(cfg: Checkpoint, judges: bool, existing: int, start: int, num_steps: int, steps_per_epoch: int) -> int:
    """How many checkpoints more than now will lie on the disk at once: those kept, the best if there is one (`judges`), one being written.
    By the clock any step may be saved."""
    at = {num_steps}
    for period in (1 if cfg.every_s else cfg.every_steps, steps_per_epoch * cfg.each_epoch):
        at |= set(range(period, num_steps + 1, period)) if period else set()
    saves = sum(step > start for step in at)
    return min(saves, max(1, cfg.keep + judges + 1 - existing))


def check(folder: Path, count: int, each: int) -> None:
    """Raises EngineError if the disk under `folder` cannot take `count` checkpoints of `each` bytes."""
    if count and (free := _free(folder)) is not None and free < count * each:
        raise EngineError("ENVIRONMENT-SPACE", f"{folder}: {free:,} bytes are free, expected {count * each:,} for {count} checkpoints of about {each:,} "
                          "bytes each; free some space, lower checkpoint.keep, or set run.folder", ENVIRONMENT)


def told(folder: Path) -> str:
    """What is free under `folder`, in words."""
    free = _free(folder)
    return "its disk cannot be asked for room" if free is None else f"{free:,} bytes are free"


def _free(folder: Path) -> int | None:
    try:
        disk = os.statvfs(folder)
    except OSError:
        return None
    return disk.f_bavail * disk.f_frsize if disk.f_blocks else None  # some storage on a network does not say
