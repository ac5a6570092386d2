"""The chunked loss is torch's cross-entropy, in value and gradient, and never holds all logits."""

import pytest
import torch
import torch.nn.functional as F

from engine import loss


@pytest.mark.parametrize("count", [0, 1, 7, 64])
@pytest.mark.parametrize("train_head", [True, False])
def test_equals_cross_entropy(monkeypatch, count, train_head):
    monkeypatch.setattr(loss, "CHUNK_BYTES", {"cpu": 4 * 50 * 5})  # five rows at a time
    draw = torch.Generator().manual_seed(count)
    hidden, weight = torch.randn(count, 16, generator=draw, dtype=torch.float64), torch.randn(50, 16, generator=draw, dtype=torch.float64)
    targets = torch.randint(50, (count,), generator=draw)
    grads = []
    for compute in (lambda h, w: loss.summed_cross_entropy(h, w, targets), lambda h, w: F.cross_entropy(h @ w.T, targets, reduction="sum")):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_(train_head)
        value = compute(h, w)
        (value * 3.5).backward()
        grads.append((value.detach(), h.grad, w.grad))
    for ours, theirs in zip(*grads, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_no_gradient_is_formed_where_none_is_wanted():
    value = loss.summed_cross_entropy(torch.randn(3, 4), torch.randn(9, 4), torch.tensor([1, 2, 3]))
    assert not value.requires_grad and value.dtype == torch.float32


def test_logits_exist_for_one_chunk_at_a_time(monkeypatch):
    largest = 0
    plain = F.linear

    def watched(*arguments):
        nonlocal largest
        out = plain(*arguments)
        largest = max(largest, out.numel())
        return out

    monkeypatch.setattr(loss.F, "linear", watched)
    monkeypatch.setattr(loss, "CHUNK_BYTES", {"cpu": 4 * 100 * 8})
    loss.summed_cross_entropy(torch.randn(64, 4, requires_grad=True), torch.randn(100, 4), torch.zeros(64, dtype=torch.int64)).backward()
    assert largest == 8 * 100


def test_bf16_error_is_at_most_that_of_torch_in_bf16():
    draw = torch.Generator().manual_seed(0)
    hidden, weight, targets = torch.randn(64, 32, generator=draw), torch.randn(200, 32, generator=draw) * 0.3, torch.randint(200, (64,), generator=draw)
    exact = F.cross_entropy(hidden @ weight.T, targets, reduction="sum")
    low = F.cross_entropy((hidden.bfloat16() @ weight.bfloat16().T).float(), targets, reduction="sum")
    with torch.autocast("cpu", torch.bfloat16):
        ours = loss.summed_cross_entropy(hidden, weight, targets)
    assert ours.dtype == torch.float32 and (ours - exact).abs() <= 1.5 * (low - exact).abs() + 1e-4
