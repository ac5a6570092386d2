"""Attention over rows laid end to end: causal inside each document, blind across documents.

A model calls `attend(layer, q, k, v, window)` and knows no more. With a window a token sees the last `window` tokens,
itself included; None sees all. In training `attend` is a `PackedAttention`, in generation a
`KVCache`; both take and return tokens in one flat dimension, without padding.

Shapes, here and in models/: T tokens of all documents, H query heads, K key/value heads, C head width.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.cpu_attention import cpu_attention
from engine.errors import EngineError

# Documents share one call as long as the shortest is at least this share of the longest, or so few tokens shorter that
# a call of its own would cost more: little filling, few calls. What fills up a packed sequence is such a short document.
SHORTEST_IN_CALL, FEW_TOKENS = 0.7, 16


def choose(requested: str, device: torch.device, arithmetic: torch.dtype) -> tuple[str, str]:
    """The path in use and why.

    `sdpa`: torch's kernel, documents of like length side by side; `cpu`: ours, likewise; `reference`: a dense mask.
    """
    if requested == "cpu" and device.type != "cpu":
        raise EngineError("CONFIG-ATTENTION", f"train.attention=cpu: got device {device.type}, expected cpu; set train.attention=auto")
    if requested == "auto" and device.type == "cpu" and arithmetic.itemsize < 4:
        return "cpu", "blocks of documents: torch's kernel for CPUs is slow and less exact in 16 bits"
    if requested == "auto":
        return "sdpa", "torch's kernel per document, nothing is spent across documents"
    return requested, "asked for; a dense mask, costs the square of the pack" if requested == "reference" else "asked for"


class PackedAttention:
    """Attention for one batch of documents with the given lengths; built once, shared by all layers.

    Args:
        lengths: tokens of each document, in the order in which they lie in the flat dimension.
        path: "sdpa", "cpu" or "reference", as `choose` returned it.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device, path: str = "sdpa") -> None:
        self.attend = self._reference if path == "reference" else self._documents
        self.kernel = cpu_attention if path == "cpu" else _sdpa
        self.lengths = list(lengths)
        starts = [0]
        for length in self.lengths:
            starts.append(starts[-1] + length)
        if path == "reference":
            self.document = torch.repeat_interleave(torch.arange(len(self.lengths)), torch.tensor(self.lengths)).to(device)
        else:
            self.gathers, self.restore = self._side_by_side(starts, device)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None = None) -> Tensor:
        """q (T, H, C), k and v (T, K, C), K a divisor of H -> (T, H, C)."""
        return self.attend(q, k, v, window)

    def _side_by_side(self, starts: list[int], device: torch.device) -> tuple[list[Tensor], Tensor | None]:
        """For each call the tokens (documents, longest) it reads, and where in the calls' outputs each token ended up.

        A shorter document is filled up with its own last token. Filling lies behind every real token, so causal
        attention never looks at it, its outputs are not restored, and the gradient that reaches it is zero.
        """
        groups: list[list[int]] = []
        for document in sorted(range(len(self.lengths)), key=lambda i: -self.lengths[i]):
            longest = self.lengths[groups[-1][0]] if groups else 0
            if groups and self.lengths[document] >= min(SHORTEST_IN_CALL * longest, longest - FEW_TOKENS):
                groups[-1].append(document)
            else:
                groups.append([document])
        if len(self.lengths) == 1:
            return [torch.arange(self.lengths[0], device=device)[None]], None
        gathers, restore, offset = [], torch.empty(starts[-1], dtype=torch.int64), 0
        for group in groups:
            longest = self.lengths[group[0]]
            place = torch.arange(longest)
            rows = torch.stack([starts[i] + place.clamp(max=self.lengths[i] - 1) for i in group])
            for row, i in enumerate(group):
                restore[starts[i] : starts[i + 1]] = offset + row * longest + place[: self.lengths[i]]
            gathers.append(rows.to(device))
            offset += rows.numel()
        return gathers, restore.to(device)

    def _documents(self, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        outputs = []
        for tokens in self.gathers:
            q_BHTC, k_BKTC, v_BKTC = (x[tokens].transpose(1, 2) if self.restore is not None else x[None].transpose(1, 2) for x in (q, k, v))
            outputs.append(self.kernel(q_BHTC, k_BKTC, v_BKTC, window).transpose(1, 2).flatten(0, 1))
        return outputs[0] if self.restore is None else torch.cat(outputs)[self.restore]

    def _reference(self, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        q_HTC, k_KTC, v_KTC = (x.transpose(0, 1) for x in (q, k, v))
        mask = (self.document[:, None] == self.document) & _visible(len(q), 0, window, q.device)
        out = F.scaled_dot_product_attention(q_HTC[None], k_KTC[None], v_KTC[None], attn_mask=mask, enable_gqa=k.shape[1] != q.shape[1])
        return out[0].transpose(0, 1)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    gqa, tokens = k.shape[1] != q.shape[1], q.shape[2]
    if window is None or tokens <= window:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)
    # Blocks of queries and the keys that any of them sees: the work grows with the window, not with the document.
    outputs, size = [], max(window, 128)
    for start in range(0, tokens, size):
        end, first = min(start + size, tokens), max(0, start - window + 1)
        mask = _visible(end - start, start - first, window, q.device)
        outputs.append(F.scaled_dot_product_attention(q[:, :, start:end], k[:, :, first:end], v[:, :, first:end], attn_mask=mask, enable_gqa=gqa))
    return torch.cat(outputs, dim=2)


@lru_cache(maxsize=8)
def _visible(queries: int, before: int, window: int | None, device: torch.device) -> Tensor:
    """(queries, before + queries): which keys the last `queries` tokens of a stretch see."""
    back = torch.arange(before, before + queries, device=device)[:, None] - torch.arange(before + queries, device=device)
    return (back >= 0) if window is None else (back >= 0) & (back < window)


class KVCache:
    """Keys and values of `rows` sequences that grow as they are generated.

    Each call writes the new tokens of every sequence and attends over all that a sequence has so far. A call brings
    either whole prompts (`prompts`: their lengths, laid end to end) or one token for each row.

    Args:
        capacity: tokens a sequence can reach, prompt included.
    """

    def __init__(self, rows: int, capacity: int, layers: int, heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
        shape = (layers, rows, heads, capacity, head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=device)
        self.prompts: PackedAttention | None = None

    def begin(self, prompt_lengths: Sequence[int]) -> Tensor:
        """Announces prompts laid end to end; returns their positions (T,)."""
        device = self.lengths.device
        self.prompts = PackedAttention(prompt_lengths, device)
        self.row = torch.repeat_interleave(torch.arange(len(prompt_lengths)), torch.tensor(prompt_lengths)).to(device)
        self.place = torch.cat([torch.arange(length) for length in prompt_lengths]).to(device)
        self.lengths = torch.tensor(prompt_lengths, device=device)
        return self.place

    def advance(self) -> Tensor:
        """Announces one more token for each row; returns their positions (rows,)."""
        self.prompts = None
        self.row, self.place = torch.arange(len(self.lengths), device=self.lengths.device), self.lengths
        self.lengths = self.lengths + 1
        self.back = (self.place[:, None] - torch.arange(int(self.lengths.max()), device=self.place.device))[:, None, None]
        return self.place

    def keep(self, rows: Tensor) -> None:
        """Drops all rows but these, so that finished sequences cost nothing."""
        self.keys, self.values, self.lengths = self.keys[:, rows], self.values[:, rows], self.lengths[rows]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None = None) -> Tensor:
        self.keys[layer][self.row, :, self.place] = k.to(self.keys.dtype)
        self.values[layer][self.row, :, self.place] = v.to(self.values.dtype)
        if self.prompts is not None:
            return self.prompts(layer, q, k, v, window)
        reach = self.back.shape[-1]
        visible = self.back >= 0 if window is None else (self.back >= 0) & (self.back < window)
        keys, values = self.keys[layer][:, :, :reach].to(q.dtype), self.values[layer][:, :, :reach].to(q.dtype)
        out = F.scaled_dot_product_attention(q[:, :, None], keys, values, attn_mask=visible, enable_gqa=keys.shape[1] != q.shape[1])
        return out[:, :, 0]
