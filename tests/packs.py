"""Packs of random documents for the attention kernels, and what they are held against."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.fused_attention import tile_list

BF16, FP16 = torch.bfloat16, torch.float16
LIMIT = {BF16: 4e-3, FP16: 5e-4}  # relative L2


@dataclass
class Case:
    """Tensors of a launch, and what it reported. `cosine`, `sine`: (T, C / 2) in q's type, or None."""

    q: Tensor
    k: Tensor
    v: Tensor
    tiles: Tensor
    scale: float
    cosine: Tensor | None = None
    sine: Tensor | None = None


def make(lengths: list[int], heads: int, kv_heads: int, width: int, dtype: torch.dtype, rotary: bool, capacity: int | None = None,
         gap: int = 0) -> tuple[Case, Tensor]:
    """A case and a gradient of its output; q, k, v lie in rows that are `gap` elements longer than need be. `capacity`: tiles, filled up with empty ones."""
    draw, tokens = torch.Generator().manual_seed(sum(lengths) + width), sum(lengths)
    q, k, v, grad = (torch.randn(tokens, count * width + gap, generator=draw).to(dtype)[:, : count * width].unflatten(1, (count, width))
                     for count in (heads, kv_heads, kv_heads, heads))
    angles = torch.rand(tokens, width // 2, generator=draw) * 2 * math.pi
    turned = (angles.cos().to(dtype), angles.sin().to(dtype)) if rotary else ()
    tiles = tile_list(lengths)
    tiles = F.pad(tiles, (0, 0, 0, capacity - len(tiles) if capacity else 0))
    return Case(q, k, v, tiles, 1 / math.sqrt(width), *turned), grad


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), -1)


def by_torch(case: Case, lengths: list[int], grad: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """out and the gradients of q, k, v, by torch's attention for each document."""
    leaves = [x.to(dtype).detach().requires_grad_() for x in (case.q, case.k, case.v)]
    q, k, v = leaves
    if case.cosine is not None:
        q, k = (rotate(x, case.cosine.to(dtype)[:, None], case.sine.to(dtype)[:, None]) for x in (q, k))
    documents = (zip(*(x.transpose(0, 1).split(lengths, 1) for x in (q, k, v)), strict=True))
    out = torch.cat([F.scaled_dot_product_attention(*(x[None] for x in document), is_causal=True, enable_gqa=True, scale=case.scale)[0]
                     for document in documents], 1).transpose(0, 1)
    out.backward(grad.to(dtype))
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def judge(found: list[Tensor], case: Case, lengths: list[int], grad: Tensor) -> None:
    """Holds out and gradients against float64, and against what torch's attention makes of the same inputs in the same type."""
    dtype = case.q.dtype
    exact, theirs = by_torch(case, lengths, grad, torch.float64), by_torch(case, lengths, grad, dtype)
    for name, ours, their, truth in zip(("out", "grad_q", "grad_k", "grad_v"), found, theirs, exact, strict=True):
        least = torch.finfo(dtype).eps / 4  # where a document has one token, torch has no error
        assert off(ours, truth) <= min(LIMIT[dtype], max(least, 1.5 * off(their, truth))), f"{name}: {off(ours, truth):.1e}, torch {off(their, truth):.1e}"
        # Of one document much more: where it has two tokens, what is off in q's gradient is a single number, as chance has it.
        worst, torchs = off_in_worst(ours, truth, lengths), off_in_worst(their, truth, lengths)
        assert worst <= max(3 * LIMIT[dtype], 1.5 * torchs), f"{name}: {worst:.1e} in a document, torch {torchs:.1e}"


def off(found: Tensor, exact: Tensor) -> float:
    """Relative L2; of what should be zero, as a token's gradient of q where it sees itself alone, absolute."""
    return float((found.double() - exact).norm() / exact.norm().clamp(min=1e-3 * math.sqrt(exact.numel())))


def off_in_worst(found: Tensor, exact: Tensor, lengths: list[int]) -> float:
    """Of all documents and heads the one that is off most, relative to a document's share of the whole where that is more than its own."""
    share = exact.square().mean().clamp(min=1e-6)
    wrong, right = ((x.double().square().sum((0, 2)) for x in tensor.split(lengths)) for tensor in (found.double() - exact, exact))
    return max(float((one / other.clamp(min=share * exact.shape[2] * length)).max().sqrt()) for one, other, length in zip(wrong, right, lengths, strict=True))
