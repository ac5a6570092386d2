"""Attention for CPUs: as exact as torch's own in the same type, in values and gradients, whatever the blocks."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from engine import attention, cpu_attention
from engine.attention import PackedAttention

CPU = torch.device("cpu")
HEADS = SimpleNamespace(num_attention_heads=4, num_key_value_heads=2, head_dim=64, windows=(None,))


def inputs(documents: int, tokens: int, heads: int, kv_heads: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """q, k, v and a gradient; transposed views, as the model hands them over."""
    generator = torch.Generator().manual_seed(tokens)
    q, k, v, grad = (torch.randn(documents, tokens, count, 16, generator=generator).to(dtype).transpose(1, 2)
                     for count in (heads, kv_heads, kv_heads, heads))
    return [2 * q, 2 * k, v, grad]


def run(kernel, q, k, v, grad) -> list[torch.Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    out = kernel(*leaves)
    out.backward(grad)
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def torch_attention(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def errors(found: list[torch.Tensor], exact: list[torch.Tensor]) -> list[float]:
    return [float((a.double() - b).norm() / b.norm().clamp(min=1e-3)) for a, b in zip(found, exact, strict=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("documents", "tokens", "heads", "kv_heads"), [(1, 1, 2, 2), (5, 13, 4, 1), (3, 40, 6, 2), (2, 61, 3, 3)])
@pytest.mark.parametrize(("block", "scores"), [(256, 2**19), (16, 2**19), (16, 300)])
def test_errors_are_at_most_one_and_a_half_times_torchs_own(monkeypatch, dtype, documents, tokens, heads, kv_heads, block, scores):
    monkeypatch.setattr(cpu_attention, "BLOCK", block)
    monkeypatch.setattr(cpu_attention, "SCORES", scores)
    given = inputs(documents, tokens, heads, kv_heads, dtype)
    exact = run(torch_attention, *(x.double() for x in given))
    ours, theirs = errors(run(cpu_attention.cpu_attention, *given), exact), errors(run(torch_attention, *given), exact)
    rounding = torch.finfo(dtype).eps
    for name, mine, reference in zip(("out", "q", "k", "v"), ours, theirs, strict=True):
        assert mine <= 1.5 * reference + 0.1 * rounding, f"{name}: {mine:.1e}, torch has {reference:.1e}"


def test_the_gradient_is_that_of_the_values(monkeypatch):
    monkeypatch.setattr(cpu_attention, "BLOCK", 3)
    q, k, v, _ = (x.double().requires_grad_() for x in inputs(2, 7, 4, 2, torch.float64))
    assert torch.autograd.gradcheck(cpu_attention.cpu_attention, (q, k, v))


def test_autocast_does_not_narrow_the_scores():
    given = inputs(2, 24, 4, 2, torch.bfloat16)
    plain = run(cpu_attention.cpu_attention, *given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(run(cpu_attention.cpu_attention, *given), plain, strict=True))


def test_nothing_of_the_size_of_the_scores_is_kept():
    kept = []
    q, k, v, _ = (x.requires_grad_() for x in inputs(1, 64, 4, 2, torch.bfloat16))
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        cpu_attention.cpu_attention(q, k, v)
    assert kept == [q.numel(), k.numel(), v.numel()]


def test_the_choice_is_by_device_and_type_and_says_why():
    assert attention.choose("auto", CPU, torch.float32, HEADS)[0] == "sdpa"
    assert attention.choose("auto", CPU, torch.bfloat16, HEADS)[0] == "cpu"
    assert attention.choose("auto", torch.device("cuda"), torch.float32, HEADS)[0] == "sdpa"
    assert attention.choose("reference", CPU, torch.bfloat16, HEADS) == ("reference", "asked for; a dense mask, costs the square of the pack")
    with pytest.raises(Exception, match="expected cpu; set train.attention=auto"):
        attention.choose("cpu", torch.device("cuda"), torch.bfloat16, HEADS)


def test_a_pack_never_attends_across_its_documents():
    lengths = [9, 8, 10, 30, 9]
    q, k, v, _ = (x[0].transpose(0, 1) for x in inputs(1, sum(lengths), 4, 2, torch.bfloat16))
    packed = PackedAttention(lengths, CPU, "cpu")(0, q, k, v).split(lengths)
    for number, (one_q, one_k, one_v) in enumerate(zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)):
        alone = PackedAttention([lengths[number]], CPU, "cpu")(0, one_q, one_k, one_v)
        assert (packed[number] - alone).abs().max() <= 0.02 * alone.abs().max()
