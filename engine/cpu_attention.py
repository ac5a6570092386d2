"""Causal attention for CPUs in narrow types, as matrix products over blocks that stay in the cache.

torch's own kernel for CPUs is written for fp32 and is slow and less exact in the backward with bf16. Here scores and
softmax are fp32, products with them are in the type of the inputs, and the backward computes the probabilities again
from q and k (Dao et al. 2022), so nothing of the size of T × T is kept. Query heads that share keys are one product.

Shapes: B documents side by side, T tokens each, H query heads, K key/value heads, G = H / K, C head width; N = B · K.
"""

import math
from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

from engine.linear import widened

BLOCK = 256  # queries in a block: keys beyond its end are not looked at
SCORES = 2**19  # numbers in a block's scores, 2 MB: larger ones leave the cache


def cpu_attention(q: Tensor, k: Tensor, v: Tensor, window: int | None = None) -> Tensor:
    """q (B, H, T, C), k and v (B, K, T, C), H a multiple of K -> (B, H, T, C): causal, scaled by 1 / √C.

    `window`: a query sees that many keys, up to its own.
    """
    return _Attention.apply(q, k, v, window)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        ctx.shape, ctx.kv_shape, ctx.window = q.shape, k.shape, window
        q, k, v = _by_key_head(q, k, v)
        ctx.save_for_backward(q, k, v)
        out = torch.empty_like(q)
        with torch.autocast(q.device.type, enabled=False):
            for part, rows, keys in _blocks(q.shape, window):
                p = _probabilities(_flat(q[part, :, rows]), k[part, keys], rows, keys, window)
                out[part, :, rows] = torch.bmm(p.to(v.dtype), v[part, keys]).view_as(out[part, :, rows])
        return out.view(ctx.shape)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v = ctx.saved_tensors
        dtype, scale = q.dtype, 1 / math.sqrt(q.shape[-1])
        grad = grad.reshape(q.shape)
        grad_q, grad_k, grad_v = torch.empty_like(q), widened(torch.zeros_like(k)), widened(torch.zeros_like(v))
        with torch.autocast(q.device.type, enabled=False):
            for part, rows, keys in _blocks(q.shape, ctx.window):
                q_block, grad_block = _flat(q[part, :, rows]), _flat(grad[part, :, rows])
                p = _probabilities(q_block, k[part, keys], rows, keys, ctx.window)
                grad_v[part, keys] += torch.bmm(p.to(dtype).transpose(1, 2), grad_block)
                grad_p = widened(torch.bmm(grad_block, v[part, keys].transpose(1, 2)))
                grad_scores = torch._softmax_backward_data(grad_p, p, -1, p.dtype).to(dtype)
                grad_q[part, :, rows] = torch.bmm(grad_scores, k[part, keys]).mul_(scale).view_as(grad_q[part, :, rows])
                grad_k[part, keys] += torch.bmm(grad_scores.transpose(1, 2), q_block)
        return grad_q.view(ctx.shape), grad_k.mul_(scale).to(dtype).view(ctx.kv_shape), grad_v.to(dtype).view(ctx.kv_shape), None


def _by_key_head(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q (N, G, T, C) and k, v (N, T, C)."""
    (batch, heads, tokens, width), kv_heads = q.shape, k.shape[1]
    return (q.reshape(batch * kv_heads, heads // kv_heads, tokens, width), k.reshape(batch * kv_heads, tokens, width),
            v.reshape(batch * kv_heads, tokens, width))


def _flat(x: Tensor) -> Tensor:
    """(n, G, t, C) -> (n, G · t, C)."""
    return x.flatten(1, 2)


def _blocks(shape: torch.Size, window: int | None) -> Iterator[tuple[slice, slice, slice]]:
    """(which of the N, which queries, which keys) of each block, for q of `shape` (N, G, T, C)."""
    count, group, tokens, _ = shape
    size = -(-tokens // -(-tokens // BLOCK))
    for start in range(0, tokens, size):
        end, first = min(start + size, tokens), 0 if window is None else max(0, start - window + 1)
        at_once = max(1, SCORES // (group * (end - start) * (end - first)))
        for one in range(0, count, at_once):
            yield slice(one, one + at_once), slice(start, end), slice(first, end)


def _probabilities(q: Tensor, k: Tensor, rows: slice, keys: slice, window: int | None) -> Tensor:
    """q (n, G · t, C) of the queries `rows`, k (n, keys, C) -> softmax of the causal scores (n, G · t, keys), at least fp32."""
    q, k = widened(q), widened(k)
    size, before = rows.stop - rows.start, rows.start - keys.start
    scores = torch.bmm(q * (1 / math.sqrt(q.shape[-1])), k.transpose(1, 2)).unflatten(1, (-1, size))
    if window is None:
        scores[..., before:] += _hidden(size, 0, None, q.dtype)  # nothing before the block is hidden
    else:
        scores += _hidden(size, before, window, q.dtype)
    return torch.softmax(scores, -1).flatten(1, 2)


@lru_cache(maxsize=32)
def _hidden(size: int, before: int, window: int | None, dtype: torch.dtype) -> Tensor:
    """(size, before + size): -inf where a key lies behind its query or out of its window, 0 elsewhere."""
    back = torch.arange(before, before + size)[:, None] - torch.arange(before + size)
    return torch.zeros(back.shape, dtype=dtype).masked_fill_(~visible(back, window), -math.inf)


def visible(back: Tensor, window: int | None) -> Tensor:
    """Which keys a query sees that are so many tokens `back` from it: those of the last `window` tokens, itself included; None: of all."""
    return (back >= 0) if window is None else (back >= 0) & (back < window)
