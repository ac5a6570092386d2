"""fp16 on the CPU: loss scale, overflow on one rank, and what a skipped step must not move."""

import json
import math
import os

import pytest
import torch
from conftest import steps
from forks import forked
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from engine import distributed, loss, precision, train
from engine.errors import NUMERIC, USER, EngineError
from engine.linear import Embedding, Linear
from engine.precision import LossScale

FP16 = ("train.precision=fp16", "train.loss_scale=1024", "optim.schedule=linear", "train.epochs=2", "train.max_steps=5", "checkpoint.every_steps=1",
        "checkpoint.keep=9")


def overflow_at(step: int, rank: int, arguments: list[str]) -> int:
    """Trains, with the loss of `rank` infinite in the first micro-batch of `step`."""
    from engine import dropout, errors

    set_keys, plain, now = dropout.DropoutKeys.set, loss.summed_cross_entropy, {"step": None, "done": False}

    def note(self, number, *rest):
        now["step"] = number
        set_keys(self, number, *rest)

    def poisoned(hidden, weight, targets, *rest):
        value = plain(hidden, weight, targets, *rest)
        if now["step"] == step and len(targets) and not now["done"] and errors.rank_in_launch() == rank:
            now["done"] = True
            return value * math.inf
        return value

    dropout.DropoutKeys.set, loss.summed_cross_entropy = note, poisoned
    return train.main(arguments)


def test_an_infinity_on_one_rank_skips_the_step_on_all_and_halves_the_scale(recipe, ranks, trained, tmp_path):
    trained(2, recipe(*FP16, name="clean"))
    poisoned = ranks(2, lambda: overflow_at(2, 1, recipe(*FP16, name="poisoned")))
    assert poisoned.wait() == [0, 0], poisoned.log.read_text()
    clean, found = steps(tmp_path / "runs/clean"), steps(tmp_path / "runs/poisoned")
    assert [line["train/skipped"] for line in found] == [0, 0, 1, 0, 0] and not any(line["train/skipped"] for line in clean)
    assert [line["train/loss_scale"] for line in found] == [1024, 1024, 1024, 512, 512]
    for key in ("step", "train/lr", "train/tokens", "train/targets", "train/epoch"):  # schedule and rows go on in step
        assert [line[key] for line in found] == [line[key] for line in clean]
    assert [line["train/loss"] for line in found[:2]] == [line["train/loss"] for line in clean[:2]]

    def state(name: str, step: int, file: str) -> dict[str, torch.Tensor]:
        return load_file(tmp_path / f"runs/{name}/checkpoints/step-{step:09d}/{file}.safetensors")

    for file in ("model", "optimizer"):  # nothing was touched by the skipped step, on the saving rank
        before, after = state("poisoned", 2, file), state("poisoned", 3, file)
        assert all(torch.equal(before[name], after[name]) for name in before)
    assert json.loads((tmp_path / "runs/poisoned/checkpoints/step-000000003/state.json").read_text())["scale"] == {"value": 512.0, "good_steps": 0}


def test_replicas_stay_equal_through_a_skipped_step(recipe, ranks, tmp_path):
    """Rank 0 saves; were rank 1 to skip alone, the next loss would differ from a run on one rank with the same skip."""
    for size, rank in ((1, 0), (2, 1)):
        assert set(ranks(size, lambda size=size, rank=rank: overflow_at(2, rank, recipe(*FP16, name=f"w{size}"))).wait()) == {0}
    one, two = steps(tmp_path / "runs/w1"), steps(tmp_path / "runs/w2")
    assert [line["train/skipped"] for line in one] == [line["train/skipped"] for line in two] == [0, 0, 1, 0, 0]
    for step in (3, 4):
        assert one[step]["train/loss"] == pytest.approx(two[step]["train/loss"], rel=2e-3)


def test_without_a_scale_to_lower_the_run_stops_before_the_update(recipe, ranks, tmp_path):
    stopped = ranks(2, lambda: overflow_at(2, 1, recipe("train.epochs=2", "checkpoint.every_steps=1")))
    assert stopped.wait() == [NUMERIC, NUMERIC]
    assert "not finite at step 3" in stopped.log.read_text() and "what it was has passed" in stopped.log.read_text()
    assert json.loads((tmp_path / "runs/run/last_error.json").read_text())["exit_code"] == NUMERIC
    assert max(path.name for path in (tmp_path / "runs/run/checkpoints").iterdir()) == "step-000000002"


def test_fp16_follows_fp32(recipe, trained, tmp_path):
    for kind in ("fp32", "fp16"):
        trained(1, recipe(f"train.precision={kind}", "train.loss_scale=1024", "train.epochs=2", name=kind))
    for exact, low in zip(steps(tmp_path / "runs/fp32"), steps(tmp_path / "runs/fp16"), strict=True):
        assert low["train/loss"] == pytest.approx(exact["train/loss"], rel=5e-3)
    moments = load_file(tmp_path / "runs/fp16/checkpoints/step-000000006/optimizer.safetensors")
    weights = load_file(tmp_path / "runs/fp16/checkpoints/step-000000006/model.safetensors")
    assert {tensor.dtype for tensor in (*moments.values(), *weights.values())} == {torch.float32}


def test_the_scale_grows_halves_and_comes_back_from_a_checkpoint():
    scale = LossScale(True, 8.0, growth_interval=3)
    for step in range(3):
        scale.update(True, step)
    assert scale.state() == {"value": 16.0, "good_steps": 0}
    scale.update(True, 3)
    scale.update(False, 4)
    assert scale.state() == {"value": 8.0, "good_steps": 0}
    other = LossScale(True, 1.0, 3)
    other.load(scale.state())
    assert other.state() == scale.state()
    for _ in range(3):
        other.update(False, 5)
    with pytest.raises(EngineError, match="at loss scale 1"):
        other.update(False, 6)


def test_bf16_without_instructions_for_it_is_computed_in_fp32_and_says_so(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(precision, "cpu_multiplies_bf16", lambda: False)
    chosen = precision.choose("bf16", torch.bfloat16, cpu)
    assert chosen.autocast is None and chosen.residual == torch.float32 and "no bf16 instructions" in chosen.reason
    monkeypatch.setattr(precision, "cpu_multiplies_bf16", lambda: True)
    chosen = precision.choose("bf16", torch.bfloat16, cpu)
    assert chosen.autocast == torch.bfloat16 and chosen.residual == torch.bfloat16


@pytest.mark.parametrize("lora", [(), ("lora.rank=4", "model.dtype=bf16")])
def test_bf16_autocast_follows_fp32(recipe, ranks, trained, tmp_path, monkeypatch, lora):
    trained(1, recipe("train.epochs=2", "train.max_steps=4", *lora[:1], name="fp32"))
    monkeypatch.setattr(precision, "cpu_multiplies_bf16", lambda: True)
    trained(2, recipe("train.epochs=2", "train.max_steps=4", "train.precision=bf16", *lora, name="bf16"))
    for exact, low in zip(steps(tmp_path / "runs/fp32"), steps(tmp_path / "runs/bf16"), strict=True):
        assert low["train/loss"] == pytest.approx(exact["train/loss"], rel=2e-2)
    saved = load_file(tmp_path / "runs/bf16/checkpoints/step-000000004/model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
def test_a_product_in_a_narrow_type_is_autocasts(dtype, bias):
    torch.manual_seed(0)
    plain, own = torch.nn.Linear(48, 40, bias), Linear(48, 40, bias)
    own.load_state_dict(plain.state_dict())
    x, grad, found = torch.randn(30, 48), torch.randn(30, 40).to(dtype), []
    for layer in (plain, own):
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", dtype):
            out = layer(leaf)
        out.backward(grad)
        found.append([out.detach(), leaf.grad, layer.weight.grad])
    (out, *gradients), (ours, *our_gradients) = found
    assert ours.dtype == dtype and torch.allclose(out, ours, rtol=2 * torch.finfo(dtype).eps, atol=1e-3)
    for one, other in zip(gradients, our_gradients, strict=True):
        assert other.dtype == torch.float32 and (one - other).norm() <= torch.finfo(dtype).eps / 4 * one.norm()


def test_a_generation_casts_a_trained_weight_once():
    class Casts(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.count += function is torch.ops.aten._to_copy.default and args[0].shape == (40, 48)
            return function(*args, **(kwargs or {}))

    layer = Linear(48, 40, bias=False)
    for grad, expected in ((False, 1), (True, 3)):
        with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16), Casts() as casts:
            for _ in range(3):
                layer(torch.randn(2, 48))
        assert casts.count == expected


@pytest.mark.parametrize("make", [lambda: Linear(16, 24, bias=False), lambda: Embedding(7, 16)], ids=["linear", "embedding"])
def test_the_gradient_of_a_narrow_trained_weight_is_that_of_its_wide_copy_rounded_once(make):
    draw = torch.Generator().manual_seed(0)
    wide = make()
    narrow = make().bfloat16()
    with torch.no_grad():
        wide.weight.copy_(narrow.weight)
    x = torch.randint(7, (3000,), generator=draw) if isinstance(wide, Embedding) else torch.randn(3000, 16, generator=draw)
    grad = (torch.randn(3000, wide(x).shape[-1], generator=draw) + 0.3).bfloat16().float()  # sums kept in bf16 would stop growing
    outs = []
    for layer in (wide, narrow):
        out = layer(x)
        out.backward(grad.to(out.dtype))
        outs.append(out.detach().float())
    torch.testing.assert_close(*outs, rtol=1e-6, atol=1e-6)
    assert narrow.weight.grad.dtype == torch.bfloat16
    torch.testing.assert_close(narrow.weight.grad.float(), wide.weight.grad, rtol=2**-8, atol=0)


@pytest.mark.parametrize("deterministic", [True, False])
def test_cuda_gives_the_same_bits_each_time_where_the_recipe_says_so(monkeypatch, deterministic):
    def look() -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
        assert distributed.init("auto", 60, deterministic).device.type == "cuda"
        assert torch.are_deterministic_algorithms_enabled() == deterministic == (os.environ.get("CUBLAS_WORKSPACE_CONFIG") == ":4096:8")
        assert not torch.is_deterministic_algorithms_warn_only_enabled(), "attention's backward would stay as it is"
        if deterministic:
            with pytest.raises(EngineError, match="put_ .*set train.deterministic=false") as caught, distributed.losses_told():
                torch.zeros(3).put_(torch.tensor([0]), torch.ones(1))
            assert caught.value.exit_code == USER

    forked(look)
