"""What a run leaves for others: a model folder in Hugging Face layout, or an adapter folder in PEFT layout.

Either holds the tokenizer and engine.json, which names the template, so that engine.generate asks as training did.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from engine import lora
from engine.config import Recipe
from engine.data.tokenizer import copy_tokenizer
from engine.models import weights

NOTE = "engine.json"


def export(model: nn.Module, cfg: Recipe, folder: Path) -> Path:
    """Writes `folder`/adapter where the model has adapters, else `folder`/model; whole or not at all."""
    is_adapter = bool(lora.adapters(model))
    target = folder / ("adapter" if is_adapter else "model")
    building = folder / f".tmp-{target.name}"
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    source = Path(cfg.model.path)
    if is_adapter:
        lora.save(model, building, str(source), cfg.lora.rank, cfg.lora.alpha, cfg.lora.dropout, cfg.lora.targets)
    else:
        weights.write_folder(building, weights.read_config(source), weights.untied(model))
    copy_tokenizer(source, building)
    (building / NOTE).write_text(json.dumps({"template": cfg.data.template, "max_length": cfg.data.max_length}) + "\n", encoding="utf-8")
    shutil.rmtree(target, ignore_errors=True)
    os.rename(building, target)
    return target


def template_of(folder: Path) -> str | None:
    """The template that a model or adapter was trained with, if the folder says."""
    try:
        note: dict[str, Any] = json.loads((folder / NOTE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return note.get("template")


def load_for_inference(model: Path, adapter: Path | None, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A model ready to generate, its adapter merged where one is given."""
    loaded = weights.build(model, "pretrained", 0, dtype, dtype, device)
    if adapter is not None:
        lora.load(loaded, adapter)
        lora.fold(loaded)
    return loaded.eval().requires_grad_(False)
