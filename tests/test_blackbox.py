"""Accidents with numbers: named before they reach a weight, written down, made again to the bit, and trained around."""

import hashlib
import json
import math
import shutil
from collections import deque
from pathlib import Path

import pytest
import torch
from conftest import ragged_rows, write_rows
from safetensors.torch import load_file, save_file
from test_resume import FULL, LONG, LORA, result, stop_after

from engine import blackbox, distributed, dropout, loss, optim, replay, train
from engine.errors import BUG, CHECKPOINT, NUMERIC, PREEMPTED, EngineError, rank_in_launch


def at_step(step: int, rank: int, arguments: list[str], what) -> int:
    """Trains; every gradient of the first trained parameter goes through `what` on `rank` in `step`, before ranks exchange it."""
    build, now = optim.build, {}
    note = dropout.DropoutKeys.set

    def keys_set(self, number, *rest):
        now["step"] = number + 1
        note(self, number, *rest)

    def hooked(trained, *rest):
        parameter = next(iter(trained.values()))
        parameter.register_hook(lambda gradient: what(gradient) if now.get("step") == step and rank_in_launch() == rank else gradient)
        return build(trained, *rest)

    optim.build, dropout.DropoutKeys.set = hooked, keys_set
    return train.main(arguments)


def nan_first(gradient: torch.Tensor) -> torch.Tensor:
    gradient = gradient.clone()
    gradient.view(-1)[0] = math.nan
    return gradient


def box_of(run: Path, step: int) -> dict:
    return json.loads((run / f"blackbox/step-{step:09d}/blackbox.json").read_text())


def rows_of(part: list[dict]) -> set[str]:
    return {one["row"] for batch in part for one in batch["documents"]}


@pytest.mark.parametrize("kind", [FULL, LORA], ids=["full", "lora"])
def test_a_nan_in_one_ranks_gradient_stops_all_before_the_update_and_names_rank_and_rows(recipe, ranks, tmp_path, kind):
    arguments = recipe(*kind, *LONG, "checkpoint.every_steps=1", "data.packing=false", "train.micro_batch=1")
    started = ranks(4, lambda: at_step(9, 2, arguments, nan_first))
    assert started.wait() == [NUMERIC] * 4, started.log.read_text()
    run = tmp_path / "runs/run"
    box = box_of(run, 9)
    [named] = rows_of(box["ranks"][2])
    message = json.loads((run / "last_error.json").read_text())["message"]
    assert "not finite at step 9; nothing was updated" in message and f"On rank 2 these rows" in message and str(run / "blackbox/step-000000009") in message
    assert named in message and named.startswith(f"{tmp_path}/rows.jsonl:")
    assert [bool(batch["not_finite"]) for of_rank in box["ranks"] for batch in of_rank] == [False, False, True, False]
    assert sorted(path.name for path in (run / "checkpoints").iterdir())[-1] == "step-000000008", "something was saved after it"
    for path in run.glob("checkpoints/*/*.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(path).values()), path
    held = run / "blackbox/step-000000009/checkpoint/step-000000008/model.safetensors"
    assert held.samefile(run / "checkpoints/step-000000008/model.safetensors")
