"""Packed attention by torch's FlashAttention: all documents of a batch in one launch, where they lie, on CUDA.

This is the operator beneath `torch.nn.attention.varlen`, which torch's versions have alike, where the function before it has learnt grouped
queries and windows one by one. Its backward is deterministic where `torch.use_deterministic_algorithms` asks for it.

Shapes: T tokens of all documents, H query heads, K key/value heads, C head width.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

WIDEST, WIDTH_STEP, TYPES, LEAST_CAPABILITY = 256, 8, (torch.bfloat16, torch.float16), (8, 0)


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, longest: int, window: int | None = None) -> Tensor:
    """Causal attention within each document; with a window over the last `window` tokens alone.

    Args:
        q: (T, H, C), bf16 or fp16, C a multiple of 8 up to 256. k, v: (T, K, C), K a divisor of H.
        ends: of `document_ends`, on q's device.
        longest: tokens of the longest document.

    Returns: (T, H, C).
    """
    reach, ahead = (-1, -1) if window is None else (window - 1, 0)
    return torch.ops.aten._flash_attention_forward(q, k, v, ends, ends, longest, longest, 0.0, window is None, False,
                                                   window_size_left=reach, window_size_right=ahead)[0]


def document_ends(lengths: Sequence[int]) -> Tensor:
    """Where each document ends, and 0 before the first: int32 (documents + 1)."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def unfit(dtype: torch.dtype, head_dim: int) -> str | None:
    """Why torch's kernel does not do this on any GPU; None if it does."""
    if head_dim > WIDEST or head_dim % WIDTH_STEP:
        return f"made for heads of multiples of {WIDTH_STEP} up to {WIDEST}, not {head_dim}"
    return too_wide(dtype)


def refusal(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why it does not do this there; None if it does."""
    if device.type != "cuda":
        return f"made for CUDA devices, not {device.type}"
    return unfit(dtype, head_dim) or too_old(device)


# ---- What tensor cores need, of the fused kernels as well --------------------------------------------------------------


def too_wide(dtype: torch.dtype) -> str | None:
    return None if dtype in TYPES else f"made for bf16 and fp16, not {str(dtype).removeprefix('torch.')}"


def too_old(device: torch.device) -> str | None:
    if (capability := torch.cuda.get_device_capability(device)) >= LEAST_CAPABILITY:
        return None
    return "made for GPUs of capability {}.{} and newer, not {}.{}".format(*LEAST_CAPABILITY, *capability)
