"""Packed attention by the kernels of kernels/: their operators for torch, and whether they can be used.

`torch.ops.engine.attention` and `attention_backward` are declared here with their shapes and gradients. Importing engine._C,
the extension that setup.py builds where it can, gives them their code on CUDA devices; a test gives them the emulator's on CPUs.

Shapes: T tokens of all documents, H query heads, K key/value heads, C head width.
"""

from collections.abc import Sequence
from importlib import import_module
from math import sqrt

import numpy as np
import torch
from torch import Tensor

from engine.varlen_attention import too_old, too_wide

BLOCK = 64  # tokens of a block, as in kernels/attention.h
WIDTHS = (64, 128)

torch.library.define("engine::attention", "(Tensor q, Tensor k, Tensor v, Tensor tiles, float scale, Tensor? cosine=None, Tensor? sine=None)"
                     " -> (Tensor, Tensor)", tags=torch.Tag.pt2_compliant_tag)
torch.library.define("engine::attention_backward", "(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor tiles, float scale,"
                     " Tensor? cosine=None, Tensor? sine=None) -> (Tensor, Tensor, Tensor)", tags=torch.Tag.pt2_compliant_tag)


def fused_attention(q: Tensor, k: Tensor, v: Tensor, tiles: Tensor, scale: float | None = None, cosine: Tensor | None = None,
                    sine: Tensor | None = None) -> Tensor:
    """Causal attention within each document.

    Args:
        q: (T, H, C), bf16 or fp16, C 64 or 128. k, v: (T, K, C), K a divisor of H. A token's heads lie end to end; from token to
            token there may be a gap, so parts of one projection need no copies.
        tiles: of `tile_list` for the documents' lengths, on q's device.
        scale: of the scores; 1 / √C if not given.
        cosine, sine: (T, C / 2) in q's type: q and k are turned by these angles on their way in, and their gradients back.

    Returns: (T, H, C). The same input gives the same bits, forward and backward. Rows of tokens that are in no tile are not written,
    there and in gradients.
    """
    return torch.ops.engine.attention(q, k, v, tiles, 1 / sqrt(q.shape[-1]) if scale is None else scale, cosine, sine)[0]


def tile_list(lengths: Sequence[int]) -> Tensor:
    """The blocks of documents as int32 (tiles, 4): start, length, block, slot, as kernels/attention.h has them, longest work first."""
    sizes = np.asarray(lengths, np.int64)
    starts, blocks = np.cumsum(sizes) - sizes, -(-sizes // BLOCK)
    slots = np.cumsum(blocks) - blocks
    document = np.repeat(np.arange(len(sizes)), blocks)
    block = np.arange(len(document)) - slots[document]
    tiles = np.stack([starts[document], sizes[document], block, slots[document]], 1)[np.argsort(-block, kind="stable")]
    return torch.from_numpy(tiles.astype(np.int32))


def unfit(dtype: torch.dtype, head_dim: int, windows: Sequence[int | None]) -> str | None:
    """Why the kernels do not do this on any GPU; None if they do."""
    if reason := too_wide(dtype):
        return reason
    if head_dim not in WIDTHS:
        return f"made for heads of {' or '.join(map(str, WIDTHS))}, not {head_dim}"
    return "not made for sliding windows" if any(window is not None for window in windows) else None


def refusal(device: torch.device, dtype: torch.dtype, head_dim: int, windows: Sequence[int | None]) -> str | None:
    """Why they do not do this there; None if they do."""
    return unfit(dtype, head_dim, windows) or _missing(device.type) or (too_old(device) if device.type == "cuda" else None)


def _missing(kind: str) -> str | None:
    if torch._C._dispatch_has_kernel_for_dispatch_key("engine::attention", kind.upper()):
        return None
    if kind != "cuda":
        return f"made for CUDA devices, not {kind}"
    try:
        import_module("engine._C")
    except ImportError as error:
        return f"the extension is not there ({error}); kernels/README.md tells how it is built"
    return None


@torch.library.register_fake("engine::attention")
def _(q: Tensor, k: Tensor, v: Tensor, tiles: Tensor, scale: float, cosine: Tensor | None = None, sine: Tensor | None = None) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty((q.shape[1], tiles.shape[0], BLOCK), dtype=torch.float32)


@torch.library.register_fake("engine::attention_backward")
def _(grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, tiles: Tensor, scale: float, cosine: Tensor | None = None,
      sine: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _keep(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    q, k, v, tiles, ctx.scale, cosine, sine = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # no zeros for a gradient of lse that nobody reads
    ctx.save_for_backward(q, k, v, *output, tiles, cosine, sine)


def _gradients(ctx, grad_out: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad_out is None:
        return (None,) * 7
    q, k, v, out, lse, tiles, cosine, sine = ctx.saved_tensors
    return *torch.ops.engine.attention_backward(grad_out.contiguous(), q, k, v, out, lse, tiles, ctx.scale, cosine, sine), None, None, None, None


torch.library.register_autograd("engine::attention", _gradients, setup_context=_keep)
