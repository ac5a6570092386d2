"""FlashAttention's operator on the simulated GPU, document by document: what torch's CUDA code takes and refuses, rounded where that rounds."""

from itertools import pairwise

import torch
from torch import Tensor

LIBRARY = torch.library.Library("aten", "IMPL")
NARROW = (torch.bfloat16, torch.float16)


def install() -> None:
    LIBRARY.impl("_flash_attention_forward", forward, "CUDA")
    LIBRARY.impl("_flash_attention_backward", backward, "CUDA")


def forward(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, key_ends: Tensor, longest: int, longest_keys: int, dropout: float, causal: bool, debug: bool, *,
            scale: float | None = None, window_size_left: int | None = None, window_size_right: int | None = None) -> tuple[Tensor, ...]:
    documents = Documents(q, k, v, ends, key_ends, longest, longest_keys, dropout, causal, scale, window_size_left, window_size_right)
    need(not debug, "no debug mask without dropout")
    out, lse = torch.empty_like(q), q.new_empty(q.shape[1], len(q), dtype=torch.float32)
    for rows, (one_q, one_k, one_v), hidden in documents:
        scores = (one_q @ one_k.mT * documents.scale).masked_fill(hidden, -torch.inf)
        beneath(lse)[:, rows] = scores.logsumexp(-1)
        shares = (scores - scores.amax(-1, keepdim=True)).exp()
        beneath(out)[rows] = (shares.to(q.dtype).float() @ one_v / shares.sum(-1, keepdim=True)).transpose(0, 1).to(q.dtype)
    return out, lse, q.new_empty(2, dtype=torch.uint64), q.new_empty((), dtype=torch.uint64), q.new_empty(0)


def backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, ends: Tensor, key_ends: Tensor, longest: int, longest_keys: int,
             dropout: float, causal: bool, seed: Tensor, unused: Tensor, *, scale: float | None = None, window_size_left: int | None = None,
             window_size_right: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    documents = Documents(q, k, v, ends, key_ends, longest, longest_keys, dropout, causal, scale, window_size_left, window_size_right)
    need(grad.dtype == out.dtype == q.dtype and lse.dtype == torch.float32, "a gradient of the output's type")
    grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    for rows, (one_q, one_k, one_v), hidden in documents:
        one_grad, one_out = (beneath(x)[rows].float().transpose(0, 1) for x in (grad, out))
        shares = (one_q @ one_k.mT * documents.scale).masked_fill(hidden, -torch.inf).sub(beneath(lse)[:, rows, None]).exp()
        inner = shares * (one_grad @ one_v.mT - (one_grad * one_out).sum(-1, keepdim=True))
        inner, shares = (x.to(q.dtype).float() for x in (inner, shares))
        found = inner @ one_k * documents.scale, inner.mT @ one_q * documents.scale, shares.mT @ one_grad
        for target, each in zip(grads, found, strict=True):
            summed = each.to(q.dtype).unflatten(0, (target.shape[1], -1)).sum(1)  # over the query heads that share keys
            beneath(target)[rows] = summed.transpose(0, 1)
    return grads


class Documents:
    """Each document's rows, its q, k and v (heads, tokens, width) in fp32, and the keys that its queries do not see."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, ends: Tensor, key_ends: Tensor, longest: int, longest_keys: int, dropout: float, causal: bool,
                 scale: float | None, left: int | None, right: int | None) -> None:
        borders = beneath(ends).tolist()
        need(all(x.dtype in NARROW and x.dtype == q.dtype for x in (q, k, v)), "bf16 or fp16, all alike")
        need(all(x.stride(-1) == 1 and x.shape[-1] == q.shape[-1] and x.shape[-1] % 8 == 0 and x.shape[-1] <= 256 for x in (q, k, v)), "heads end to end")
        need(q.shape[1] % k.shape[1] == 0 and k.shape == v.shape and len(k) == len(q), "keys that heads can share")
        need(ends.dtype == torch.int32 and ends.device == q.device and ends.is_contiguous(), "int32 ends on the same GPU, end to end")
        need(torch.equal(beneath(ends), beneath(key_ends)), "keys of the same documents")
        # a kernel does as many blocks as the longest document is said to have, and what it leaves out stays as memory held it
        need(longest == longest_keys == max(b - a for a, b in pairwise(borders)) and borders[0] == 0 and borders[-1] == len(q), "ends of these tokens")
        need(dropout == 0, "no dropout")
        self.q, self.k, self.v, self.borders = *map(beneath, (q, k, v)), borders
        self.scale = q.shape[-1] ** -0.5 if scale is None else scale
        left, right = (-1 if bound is None or bound >= longest else bound for bound in (left, 0 if causal else right))
        self.before, self.after = (longest if bound < 0 else bound for bound in (left, right))

    def __iter__(self):
        group = self.q.shape[1] // self.k.shape[1]
        for start, end in pairwise(self.borders):
            rows, place = slice(start, end), torch.arange(end - start)
            back = place[:, None] - place
            q, k, v = (x[rows].float().transpose(0, 1) for x in (self.q, self.k, self.v))
            yield rows, (q, k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)), (back > self.before) | (-back > self.after)


def beneath(x: Tensor) -> Tensor:
    """The same memory as a tensor of the CPU, for which nobody waits."""
    return torch.ops.simulated.beneath(x)


def need(given: bool, what: str) -> None:
    if not given:
        raise RuntimeError(f"FlashAttention: expected {what}")
