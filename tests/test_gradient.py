"""Invariant 1: the gradient is that of the mean over the global batch's targets, however the batch is split."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import Rows, load_dataset, ragged_rows, write_rows
from safetensors.torch import load_file

from engine.attention import PackedAttention
from engine.data import dataset
from engine.data.tokenizer import load_tokenizer
from engine.models import weights

MUTE = 2  # the row without a supervised token: with micro-batches of one, a micro-batch without a target


class Muted(Rows):
    """As if nothing of one row were learnt."""

    def read(self, document: int) -> tuple[np.ndarray, np.ndarray]:
        ids, supervised = super().read(document)
        return ids, supervised & (document != MUTE)


def muted(rows: dataset.Dataset) -> Muted:
    return Muted(**{**vars(rows), "targets": np.where(np.arange(len(rows)) == MUTE, 0, rows.targets)})


@pytest.fixture
def with_mute_row(monkeypatch):
    load = dataset.load
    monkeypatch.setattr(dataset, "load", lambda *arguments: (rows := load(*arguments)) and muted(rows))


def reference_gradients(rows: dataset.Dataset, folder: Path) -> dict[str, torch.Tensor]:
    """One float64 autograd of the mean over all targets, each row by itself, with torch's own cross-entropy."""
    model = weights.build(folder, "pretrained", 0, torch.float64, torch.float64, torch.device("cpu"))
    total = 0.0
    for start, end in zip(rows.offsets[:-1], rows.offsets[1:], strict=True):
        ids = torch.from_numpy(rows.tokens[start:end].astype(np.int64))
        mask = torch.from_numpy(np.array(rows.supervised[start + 1 : end]))
        logits = model.lm_head(model(ids, torch.arange(len(ids)), PackedAttention([len(ids)], ids.device)))[:-1]
        total = total + F.cross_entropy(logits[mask], ids[1:][mask], reduction="sum")
    (total / int(rows.supervised.sum())).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(("size", "micro_batch", "count", "packing"), [
    (1, 1, 7, False), (1, 2, 7, False), (1, 4, 7, True), (2, 1, 7, False), (2, 2, 7, False), (2, 4, 7, False), (4, 1, 7, False), (4, 2, 7, True),
    (4, 4, 7, False), (4, 1, 3, False),  # three rows on four ranks: one rank has none
])
def test_every_split_gives_the_gradient_of_the_whole_batch(tiny, recipe, trained, with_mute_row, tmp_path, size, micro_batch, count, packing):
    write_rows(tmp_path / "rows.jsonl", ragged_rows(count, seed=5))
    trained(size, recipe(f"train.micro_batch={micro_batch}", "train.max_steps=1", "optim.betas=[0, 0.999]", "optim.clip_norm=0", f"data.packing={packing}"))
    rows = muted(load_dataset(tmp_path / "rows.jsonl", load_tokenizer(tiny), "alpaca", 64, "error", tmp_path / "cache"))
    assert len(rows) == count and (rows.targets == 0).sum() == 1
    # with a first beta of 0 AdamW's first moment is the gradient itself
    moments = load_file(tmp_path / "runs/run/checkpoints/step-000000001/optimizer.safetensors")
    expected = reference_gradients(rows, tiny)
    off = {name: moments[f"{name}.exp_avg"].double() - gradient for name, gradient in expected.items()}

    def length(tensors) -> float:
        return float(torch.stack([tensor.norm() for tensor in tensors]).norm())

    assert length(off.values()) <= 1e-6 * length(expected.values())
    for name, gradient in expected.items():  # a small gradient is not to hide behind a large one
        assert off[name].norm() <= 3e-6 * gradient.norm(), name
