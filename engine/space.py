"""Room on the disk: asked for before the first step, reported when it has run out."""

import os
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor, nn

from engine.config import Checkpoint, Export
from engine.errors import ENVIRONMENT, EngineError

BESIDE_TENSORS = 64 * 1024  # bytes: headers, state.json, manifest.json
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "q8_0": 34 / 32}  # a weight


def of_checkpoint(kept: Iterable[Tensor]) -> int:
    """Bytes that a checkpoint will take: the weights it keeps, and of those that are trained two moments of their type."""
    return sum(tensor.nbytes * (3 if tensor.requires_grad else 1) for tensor in kept) + BESIDE_TENSORS


def of_export(model: nn.Module, cfg: Export) -> int:
    """Bytes that the exports will take, with the folder by way of which a GGUF file is read back. Tokenizers are not in it."""
    of_adapters = [parameter.nbytes for name, parameter in model.named_parameters() if ".lora_" in name]
    whole = [parameter for name, parameter in model.named_parameters() if ".lora_" not in name]
    beside = sum(parameter.nbytes for parameter in whole if parameter.requires_grad) * (2 if model.config.tie_word_embeddings else 1)
    weights = sum(parameter.numel() for parameter in whole)
    sizes = {"adapter": sum(of_adapters) + beside, "model": weights * BYTES[cfg.dtype], "gguf": weights * (BYTES[cfg.gguf_type] + BYTES[cfg.dtype])}
    return int(sum(sizes[kind] for kind in {("adapter" if of_adapters else "model") if kind == "auto" else kind for kind in cfg.kinds}))


def copies(cfg: Checkpoint, beside: int, existing: int, start: int, num_steps: int, steps_per_epoch: int) -> int:
    """How many checkpoints more than now will lie on the disk at once: those kept, those `beside` them (the best, a black box's), one being
    written. By the clock any step may be saved."""
    most = max(1, cfg.keep + beside + 1 - existing)
    saves = {num_steps} if start < num_steps else set()
    for period in (1 if cfg.every_s else cfg.every_steps, steps_per_epoch * cfg.each_epoch):
        saves |= set(range(start // period * period + period, num_steps + 1, period)[:most]) if period else set()
    return min(len(saves), most)


def check(folder: Path, count: int, each: int, exports: int) -> None:
    """Raises EngineError if the disk under `folder` cannot take `count` checkpoints of `each` bytes, and `exports` bytes of exports."""
    needed = count * each + exports
    if needed and (free := _free(folder)) is not None and free < needed:
        raise EngineError("ENVIRONMENT-SPACE", f"{folder}: {free:,} bytes are free, expected {needed:,} for {count} checkpoints of about {each:,} bytes "
                          f"each and {exports:,} bytes of exports; free some space, lower checkpoint.keep, or set run.folder", ENVIRONMENT)


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
