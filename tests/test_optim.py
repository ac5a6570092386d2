"""Schedules at named points, decay by rank of the tensor, clipping, and the optimizer against torch's reference."""

import math

import pytest
import torch
from torch import nn

from engine import optim
from engine.config import Optim
from engine.distributed import World

ONE = World(0, 1, 0, torch.device("cpu"))


def curve(num_steps: int = 100, **options) -> list[float]:
    return [optim.learning_rate(step, num_steps, Optim(lr=1.0, **options)) for step in range(num_steps)]


@pytest.mark.parametrize(("options", "points"), [
    ({"schedule": "constant"}, {0: 1.0, 50: 1.0, 99: 1.0}),
    ({"schedule": "linear"}, {0: 1.0, 50: 0.5, 99: 0.01}),
    ({"schedule": "cosine"}, {0: 1.0, 50: 0.5, 99: 0.5 * (1 + math.cos(math.pi * 0.99))}),
    ({"schedule": "cosine", "min_lr_ratio": 0.1}, {0: 1.0, 50: 0.55}),
    ({"schedule": "wsd"}, {0: 1.0, 80: 1.0, 90: 0.5, 99: 0.05}),
    ({"schedule": "wsd", "warmup_steps": 20, "decay_ratio": 0.5}, {0: 0.05, 19: 1.0, 50: 1.0, 75: 0.5}),
    ({"schedule": "linear", "warmup_ratio": 0.1}, {0: 0.1, 9: 1.0, 10: 1.0, 55: 0.5}),
    ({"schedule": "constant", "warmup_steps": 4}, {0: 0.25, 3: 1.0}),
])
def test_schedules_at_named_points(options, points):
    found = curve(**options)
    for step, expected in points.items():
        assert found[step] == pytest.approx(expected), f"step {step}"
    assert all(0 < lr <= 1 for lr in found)


@pytest.mark.parametrize("schedule", optim.SCHEDULES)
@pytest.mark.parametrize("num_steps", [1, 2, 3])
def test_short_runs_with_warmup_divide_by_nothing(schedule, num_steps):
    for warmup in (0, 1, num_steps, num_steps + 5):
        assert all(0 <= lr <= 1 for lr in curve(num_steps, schedule=schedule, warmup_steps=warmup))


def test_matrices_decay_and_vectors_do_not():
    model = nn.ModuleDict({"embedding": nn.Embedding(4, 3), "linear": nn.Linear(3, 2), "norm": nn.LayerNorm(2)})
    built, reason = optim.build(list(model.parameters()), Optim(lr=0.1, weight_decay=0.5), 0, ONE)
    decayed = {id(parameter) for group in built.param_groups if group["weight_decay"] for parameter in group["params"]}
    assert decayed == {id(model["embedding"].weight), id(model["linear"].weight)}
    assert sum(len(group["params"]) for group in built.param_groups) == 5 and built.param_groups[0]["fused"] and "fused" in reason


@pytest.mark.parametrize(("clip", "scale"), [(0.5, 1.0), (0.5, 1024.0), (0.0, 8.0), (1e9, 1.0)])
def test_gradients_are_unscaled_and_shortened_as_torch_does(clip, scale):
    torch.manual_seed(0)
    ours, theirs = ([nn.Parameter(torch.zeros(size)) for size in (3, 50)] for _ in range(2))
    for one, other in zip(ours, theirs, strict=True):
        other.grad = torch.randn(other.shape)
        one.grad = other.grad * scale
    norm = optim.unscale_and_clip(ours, scale, clip)
    expected = nn.utils.clip_grad_norm_(theirs, clip or math.inf)
    assert norm == pytest.approx(expected.item(), rel=1e-6)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.grad, other.grad)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_the_norm_tells_of_a_gradient_that_is_not_finite(bad):
    parameter = nn.Parameter(torch.zeros(3))
    parameter.grad = torch.tensor([1.0, bad, 2.0])
    assert not math.isfinite(optim.unscale_and_clip([parameter], 2.0, 1.0))
