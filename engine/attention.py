"""Attention over rows laid end to end: causal inside each document, blind across documents.

A model calls `attend(layer, q, k, v, window, angles)` and knows no more. With a window a token sees the last `window` tokens,
itself included; None sees all. q and k are turned by `angles` first, cosines and sines (T, C / 2) of each position, as the
fused kernels do while they load them. In training `attend` is a `PackedAttention`, in generation a `KVCache`; both take and
return tokens in one flat dimension, without padding.

Shapes, here and in models/: T tokens of all documents, H query heads, K key/value heads, C head width.
"""

import math
from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from engine import fused_attention, varlen_attention
from engine.cpu_attention import cpu_attention, visible
from engine.errors import BUG, EngineError, first_line
from engine.transfer import to_device

# Documents share one call as long as the shortest is at least this share of the longest, or so few tokens shorter that
# a call of its own would cost more: little filling, few calls. What fills up a packed sequence is such a short document.
SHORTEST_IN_CALL, FEW_TOKENS = 0.7, 16

# Bytes of the widest numbers of which torch's kernels let query heads share keys, and whether with a mask: on GPUs FlashAttention alone does,
# and where keys are shared without it torch writes down all scores.
GROUPED = {"cpu": (8, True), "cuda": (2, False)}

# GPUs' capabilities, as (9, 0), on which `engine.bench attention` found the fused kernels faster than torch's: those on which auto takes
# them. A choice timed at a run's start could fall otherwise when the run goes on, and its bits with it. Nothing is timed yet.
FASTER: frozenset[tuple[int, int]] = frozenset()

# The lengths on which kernels for packed documents are tried, around their blocks' borders and many short ones; the widest window, which
# documents must be longer than to feel it; and how far off they may be: times what torch's kernel for single documents is off in the same type.
TRIED, TRIED_WINDOW, TRIED_LIMIT = (1, 100, 65, 200, 64, 700, *(1 + number % 5 for number in range(40))), 90, 2.0
PACKED = {"fused": "our kernels", "varlen": "torch's FlashAttention"}  # which take all documents of a batch in one launch


Angles = tuple[Tensor, Tensor]


class Heads(Protocol):
    """What of a model's config attention has to do with."""

    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    windows: tuple[int | None, ...]


def choose(requested: str, device: torch.device, arithmetic: torch.dtype, heads: Heads) -> tuple[str, str]:
    """The path in use and why.

    `fused`: our kernels for CUDA, and `varlen`: torch's, for all documents in one launch; both are tried here on heads like the model's.
    `sdpa`: torch's kernel, documents of like length side by side; `cpu`: ours, likewise; `reference`: a dense mask.
    """
    if requested == "cpu" and device.type != "cpu":
        raise _refused("cpu", f"got device {device.type}, expected cpu")
    against = []
    for path in PACKED if requested == "auto" and device.type == "cuda" else PACKED.keys() & {requested}:
        good, why = _try(path, device, arithmetic, heads, requested == path)
        if good:
            return path, "; ".join([why, "asked for" if requested == path else "one launch for all documents", *against])
        if requested == path:
            raise _refused(path, why)
        against.append(f"not {path}: {why}")
    if requested == "auto" and device.type == "cpu" and arithmetic.itemsize < 4:
        return "cpu", "blocks of documents: torch's kernel for CPUs is slow and less exact in 16 bits"
    if requested == "auto":
        return "sdpa", "; ".join(["torch's kernel per document, nothing is spent across documents", *against])
    return requested, "asked for; a dense mask, costs the square of the pack" if requested == "reference" else "asked for"


def expected(requested: str, arithmetic: torch.dtype, heads: Heads) -> str:
    """The path that `choose` will take on a GPU of today that is not here, where nothing speaks against the kernels."""
    if requested == "auto":
        return "varlen" if varlen_attention.unfit(arithmetic, heads.head_dim) is None else "sdpa"
    why = {"varlen": varlen_attention.unfit(arithmetic, heads.head_dim), "fused": fused_attention.unfit(arithmetic, heads.head_dim, heads.windows),
           "cpu": "got device cuda, expected cpu"}.get(requested)
    if why:
        raise _refused(requested, why)
    return requested


def _refused(path: str, why: str) -> EngineError:
    return EngineError("CONFIG-ATTENTION", f"train.attention={path}: {why}; set train.attention=auto")


def refusal(path: str, device: torch.device, dtype: torch.dtype, head_dim: int, windows: Sequence[int | None] = ()) -> str | None:
    """Why one of PACKED does not do this; None if it does."""
    if path == "varlen":
        return varlen_attention.refusal(device, dtype, head_dim)
    return fused_attention.refusal(device, dtype, head_dim, windows)


def _try(path: str, device: torch.device, dtype: torch.dtype, heads: Heads, asked: bool) -> tuple[bool, str]:
    """Whether one of PACKED does what the model needs, is right at it and, of our kernels if not `asked` for, is known to be faster; and what was found."""
    if reason := refusal(path, device, dtype, heads.head_dim, heads.windows):
        return False, reason
    if path == "fused" and not asked and (capability := torch.cuda.get_device_capability(device)) not in FASTER:
        return False, "not timed on GPUs of capability {}.{} yet; train.attention=fused takes them".format(*capability)
    try:
        ratio, same = _trial(path, device, dtype, heads)
    except torch.OutOfMemoryError:  # which says nothing of the kernels, and a resume could find more
        raise
    except RuntimeError as error:  # a launch that failed, as with an extension made for another GPU
        _still_works(path, device, error)
        return False, first_line(error)
    found = f"{PACKED[path]}: {ratio:.2f} × the error of torch's sdpa on {heads.num_attention_heads}/{heads.num_key_value_heads} heads of {heads.head_dim}"
    if not ratio <= TRIED_LIMIT:
        return False, f"{found}, expected at most {TRIED_LIMIT:g} ×"
    # torch's adds in any order where nobody asks for equal bits
    same = same or (path == "varlen" and not torch.are_deterministic_algorithms_enabled())
    return same, found if same else f"{PACKED[path]}: other bits when run again, expected the same"


def _still_works(path: str, device: torch.device, error: RuntimeError) -> None:
    """Raises where the error has taken the device along: a kernel's fault stays, and whatever is computed next would fail with it."""
    if device.type != "cuda":
        return
    try:
        torch.cuda.synchronize(device)
    except RuntimeError as fault:
        text = f"{PACKED[path]} faulted on {device} ({first_line(fault)}), which is lost to this process; set train.attention=sdpa"
        raise EngineError("ATTENTION-FAULT", text, BUG) from error


def _trial(path: str, device: torch.device, dtype: torch.dtype, heads: Heads) -> tuple[float, bool]:
    """A path's `relative_error` on random documents, the largest of those with windows as the model has them, turned by angles or not; and
    whether a second run gave the same bits. q, k and v are parts of one projection, as Phi-3's."""
    draw, sizes = torch.Generator().manual_seed(0), (heads.num_attention_heads, heads.num_key_value_heads, heads.num_key_value_heads)
    whole = torch.randn(sum(TRIED), sum(sizes) * heads.head_dim, generator=draw).to(device, dtype)
    q, k, v = whole.unflatten(1, (-1, heads.head_dim)).split(sizes, 1)
    grad = torch.randn(q.shape, generator=draw).to(device, dtype)
    turns = torch.rand(sum(TRIED), heads.head_dim // 2, generator=draw).to(device) * 2 * math.pi
    packed, alone = (PackedAttention(TRIED, device, one) for one in (path, "sdpa"))
    ratios, same = [], True
    for window in {window and min(window, TRIED_WINDOW) for window in heads.windows}:
        for angles in (None, (turns.cos(), turns.sin())):
            ratios.append(relative_error(packed, alone, q, k, v, grad, window, angles))
            once, again = (_both_ways(packed, dtype, q, k, v, grad, window, angles) for _ in range(2))
            same = same and all(map(torch.equal, once, again))
    # a lone token goes by code of its own in FlashAttention: what comes out is its value
    lone = _both_ways(PackedAttention([1], device, path), dtype, q[:1], k[:1], v[:1], grad[:1], None, None)
    value = v[:1].repeat_interleave(q.shape[1] // v.shape[1], 1)
    right = float((lone[0] - value).norm() / value.norm()) <= torch.finfo(dtype).eps and all(bool(x.isfinite().all()) for x in lone)
    return float(torch.tensor([*ratios, 0.0 if right else math.inf]).max()), same


def relative_error(path: "PackedAttention", reference: "PackedAttention", q: Tensor, k: Tensor, v: Tensor, grad: Tensor, window: int | None,
                   angles: Angles | None) -> float:
    """A path's error, relative to what the reference has in the same type: the largest ratio of output and gradients; NaN if any is.

    Args:
        grad: of the output. Others: as a model gives them to attention.
    """
    found = (_both_ways(attend, dtype, q, k, v, grad, window, angles)
             for attend, dtype in ((reference, torch.float64), (path, q.dtype), (reference, q.dtype)))
    # A kernel rounds probabilities, gradients of scores, and each head's share of those of keys too: that makes 0.3 to 0.6 of a unit in the
    # last place, where a reference that computes in fp32 and rounds its result makes 0.2; on rows of one token it may be exact.
    ratios, least = [], torch.finfo(q.dtype).eps * 3 / 8
    for truth, one, other in zip(*found, strict=True):
        own, references = (float((x.double() - truth).norm() / truth.norm().clamp(min=1e-30)) for x in (one, other))
        ratios.append(own / max(references, least))
    return float(torch.tensor(ratios).max())


def _both_ways(attend: "PackedAttention", dtype: torch.dtype, q: Tensor, k: Tensor, v: Tensor, grad: Tensor, window: int | None,
               angles: Angles | None) -> list[Tensor]:
    """Output and gradients of q, k, v, in a type."""
    inputs = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
    with torch.enable_grad(), torch.autocast(q.device.type, enabled=False):
        out = attend(0, *inputs, window, angles)
        return [out.detach(), *torch.autograd.grad(out, inputs, grad.to(dtype))]


class PackedAttention:
    """Attention for one batch of documents with the given lengths; built once, shared by all layers.

    Args:
        lengths: tokens of each document, in the order in which they lie in the flat dimension.
        path: "sdpa", "cpu", "fused", "varlen" or "reference", as `choose` returned it. Where it is one of PACKED, what is not in 16 bits goes by sdpa.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device, path: str = "sdpa") -> None:
        self.path, self.lengths = path, list(lengths)
        self.kernel = cpu_attention if path == "cpu" else _sdpa
        if path == "reference":
            self.document = to_device(torch.repeat_interleave(torch.tensor(self.lengths), output_size=sum(self.lengths)), device)
        elif path in PACKED:
            self.documents = to_device((fused_attention.tile_list if path == "fused" else varlen_attention.document_ends)(self.lengths), device)
            self.device = device
        else:
            starts = [0]
            for length in self.lengths:
                starts.append(starts[-1] + length)
            self.gathers, self.restore = self._side_by_side(starts, device)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None = None, angles: Angles | None = None) -> Tensor:
        """q (T, H, C), k and v (T, K, C), K a divisor of H -> (T, H, C)."""
        if self.path in PACKED:
            return self._packed(q, k, v, window, angles)
        q, k = rotate(q, angles), rotate(k, angles)
        return self._reference(q, k, v, window) if self.path == "reference" else self._documents(q, k, v, window)

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
            gathers.append(rows)
            offset += rows.numel()
        *gathers, restore = _together([*gathers, restore], device)
        return gathers, restore

    def _documents(self, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        outputs = []
        for tokens in self.gathers:
            q_BHTC, k_BKTC, v_BKTC = (x[tokens].transpose(1, 2) if self.restore is not None else x[None].transpose(1, 2) for x in (q, k, v))
            outputs.append(self.kernel(q_BHTC, k_BKTC, v_BKTC, window).transpose(1, 2).flatten(0, 1))
        return outputs[0] if self.restore is None else torch.cat(outputs)[self.restore]

    @cached_property
    def by_sdpa(self) -> "PackedAttention":
        return PackedAttention(self.lengths, self.device)

    def _packed(self, q: Tensor, k: Tensor, v: Tensor, window: int | None, angles: Angles | None) -> Tensor:
        if varlen_attention.too_wide(q.dtype):
            return self.by_sdpa(0, q, k, v, window, angles)
        if len(q) != sum(self.lengths) or (window is not None and self.path == "fused"):
            raise ValueError(f"{self.path} attention: {len(q)} tokens and window {window}, expected {sum(self.lengths)}{' and none' * (self.path == 'fused')}")
        if self.path == "fused":
            return fused_attention.fused_attention(q, k, v, self.documents, None, *(x.to(q.dtype) for x in angles or ()))
        return varlen_attention.varlen_attention(rotate(q, angles), rotate(k, angles), v, self.documents, max(self.lengths), window)

    def _reference(self, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        q_HTC, k_KTC, v_KTC = (x.transpose(0, 1) for x in (q, k, v))
        mask = (self.document[:, None] == self.document) & _visible(len(q), 0, window, q.device)
        out = F.scaled_dot_product_attention(q_HTC[None], k_KTC[None], v_KTC[None], attn_mask=mask, enable_gqa=k.shape[1] != q.shape[1])
        return out[0].transpose(0, 1)


def _together(tensors: list[Tensor], device: torch.device) -> list[Tensor]:
    """Tensors of one type on a device, by one copy."""
    whole = to_device(torch.cat([tensor.flatten() for tensor in tensors]), device)
    return [part.view(tensor.shape) for part, tensor in zip(whole.split([tensor.numel() for tensor in tensors]), tensors, strict=True)]


def rotate(x: Tensor, angles: Angles | None) -> Tensor:
    """Turns the pairs (x[..., i], x[..., i + C/2]) of x (T, heads, C) by angles whose cosines and sines are (T, C/2); None turns nothing."""
    return x if angles is None else _Rotation.apply(x, *(y[:, None].to(x.dtype) for y in angles))


class _Rotation(torch.autograd.Function):
    """Its backward turns the other way; composed from torch's operations it would pass over x twice as often."""

    @staticmethod
    def forward(ctx, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        ctx.save_for_backward(cosine, sine)
        return _turned(x, cosine, sine, 1)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        return _turned(grad, *ctx.saved_tensors, -1), None, None


def _turned(x: Tensor, cosine: Tensor, sine: Tensor, way: int) -> Tensor:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    (first, second), (new_first, new_second) = x.chunk(2, dim=-1), out.chunk(2, dim=-1)
    torch.mul(first, cosine, out=new_first).addcmul_(second, sine, value=-way)
    torch.mul(second, cosine, out=new_second).addcmul_(first, sine, value=way)
    return out


def _sdpa(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    gqa, tokens = k.shape[1] != q.shape[1], q.shape[2]
    masked, (widest, with_mask) = window is not None and tokens > window, GROUPED[q.device.type]
    if gqa and (q.dtype.itemsize > widest or (masked and not with_mask) or (q.is_cuda and varlen_attention.too_old(q.device))):
        k, v = (x[:, :, None].expand(-1, -1, q.shape[1] // k.shape[1], -1, -1).flatten(1, 2) for x in (k, v))
        gqa = False
    if not masked:
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
    return visible(torch.arange(before, before + queries, device=device)[:, None] - torch.arange(before + queries, device=device), window)


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
        lengths = torch.tensor(prompt_lengths)
        rows, places = torch.repeat_interleave(torch.arange(len(lengths)), lengths), torch.cat([torch.arange(length) for length in prompt_lengths])
        self.row, self.place, self.lengths = _together([rows, places, lengths], device)
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

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None = None, angles: Angles | None = None) -> Tensor:
        q, k = rotate(q, angles), rotate(k, angles)
        self.keys[layer][self.row, :, self.place] = k.to(self.keys.dtype)
        self.values[layer][self.row, :, self.place] = v.to(self.values.dtype)
        if self.prompts is not None:
            return self.prompts(layer, q, k, v, window)
        reach = self.back.shape[-1]
        keys, values = self.keys[layer][:, :, :reach].to(q.dtype), self.values[layer][:, :, :reach].to(q.dtype)
        out = F.scaled_dot_product_attention(q[:, :, None], keys, values, attn_mask=visible(self.back, window), enable_gqa=keys.shape[1] != q.shape[1])
        return out[:, :, 0]
