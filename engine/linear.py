"""Linear and embedding layers whose weight may be stored in another type than the arithmetic's.

Frozen weights are often bf16 or fp16, and trained ones bf16 with optim.name=adamw_bf16, on hardware that multiplies fp32 much
faster; others are fp32 under autocast. Such a weight is cast for the product and forgotten again: what is stored is all that stays
in memory, also for the backward, which casts once more. Its gradient is computed in the arithmetic's type and cast once.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def arithmetic_dtype(x: Tensor) -> torch.dtype:
    """The type in which x is multiplied here: autocast's where autocast is on, its own elsewhere."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def widened(x: Tensor) -> Tensor:
    """x in a type in which sums over many elements are safe: at least fp32."""
    return x.float() if x.dtype.itemsize < 4 else x


class Linear(nn.Linear):
    """`nn.Linear`; a weight of another type than the arithmetic's is brought to that for each product and forgotten again."""

    def forward(self, x: Tensor) -> Tensor:
        """x (T, in) -> (T, out)."""
        dtype = arithmetic_dtype(x)
        # Where nothing is kept for a backward autocast's copies are welcome: one serves all tokens of a generation.
        if self.weight.dtype == dtype or (torch.is_autocast_enabled(x.device.type) and not torch.is_grad_enabled()):
            return F.linear(x, self.weight, self.bias)
        out = _Product.apply(x.to(dtype), self.weight)
        return out if self.bias is None else out + self.bias.to(dtype)


class _Product(torch.autograd.Function):
    """Keeps the weight as it is stored for the backward, where autocast would keep a copy in the arithmetic's type."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight, x if ctx.needs_input_grad[1] else None)
        return F.linear(x, weight.to(x.dtype))

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        weight, x = ctx.saved_tensors
        return (grad @ weight.to(grad.dtype) if ctx.needs_input_grad[0] else None), None if x is None else (grad.T @ x).to(weight.dtype)


class Embedding(nn.Embedding):
    """`nn.Embedding`; on CPUs the gradient of a bf16 weight is summed in fp32: torch's there rounds after every token."""

    def forward(self, ids: Tensor) -> Tensor:
        """ids (T,) -> (T, D)."""
        if self.weight.device.type == "cpu" and self.weight.dtype.itemsize < 4 and self.weight.requires_grad:
            return _NarrowEmbedding.apply(ids, self.weight)
        return super().forward(ids)


class _NarrowEmbedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ids: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.shape, ctx.dtype = weight.shape, weight.dtype
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[None, Tensor]:
        (ids,) = ctx.saved_tensors
        return None, torch.zeros(ctx.shape, device=grad.device).index_add_(0, ids, grad.float()).to(ctx.dtype)
