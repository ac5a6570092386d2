"""Cross-entropy summed over supervised tokens, with the head applied there alone and in chunks.

Logits are the largest tensor of a small model: 49,152 numbers a token for SmolLM2. Here they exist for one chunk at a
time, and only for tokens that carry a target. The gradient of a chunk is formed while its logits are at hand, so the
backward multiplies two stored tensors by a number and recomputes nothing.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.linear import arithmetic_dtype, widened

CHUNK_BYTES = {"cpu": 24 * 2**20, "cuda": 256 * 2**20}  # of fp32 logits: enough to keep a matrix product busy


def summed_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, sources: Tensor | None = None, tally: Tensor | None = None) -> Tensor:
    """Sum of the negative log-likelihoods of `targets`, fp32, a scalar; 0 with a zero gradient where there are none.

    Args:
        hidden: (n, D), the model's output at the n positions whose next token is supervised.
        weight: (V, D), the head; gets a gradient if it wants one.
        targets: (n,), the ids to predict.
        sources: (n,), the number of each target's source.
        tally: (S,) in float64; each source's part of the sum is added to it, without a gradient.
    """
    return _SummedCrossEntropy.apply(hidden, weight, targets, sources, tally, arithmetic_dtype(hidden))


class _SummedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, sources: Tensor | None, tally: Tensor | None, dtype: torch.dtype) -> Tensor:
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        size = max(1, CHUNK_BYTES[hidden.device.type] // (4 * len(weight)))
        loss = widened(hidden.new_zeros(()))
        grad_hidden = torch.zeros_like(hidden) if wants_hidden else None
        grad_weight = widened(torch.zeros_like(weight)) if wants_weight else None
        with torch.autocast(hidden.device.type, enabled=False):
            head = weight.detach().to(dtype)
            for start in range(0, len(targets), size):
                rows = slice(start, start + size)
                x = hidden[rows].detach().to(dtype)
                logits = widened(F.linear(x, head))
                # log-sum-exp by hand, in place: torch's log_softmax takes a second tensor of logits and ten times as long
                logits -= logits.amax(-1, keepdim=True)
                chosen = logits.gather(1, targets[rows, None])
                total = logits.exp_().sum(-1, keepdim=True)
                each = total.log() - chosen
                loss += each.sum()
                if tally is not None:
                    tally.index_add_(0, sources[rows], each[:, 0].double())
                if not (wants_hidden or wants_weight):
                    continue
                # d loss / d logits = softmax - one-hot, in place of the logits
                grad = logits.div_(total)
                grad[torch.arange(len(x), device=x.device), targets[rows]] -= 1
                grad = grad.to(dtype)
                if wants_hidden:
                    grad_hidden[rows] = (grad @ head).to(hidden.dtype)
                if wants_weight:
                    grad_weight += grad.T @ x
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return loss

    @staticmethod
    def backward(ctx, scale: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return (None if grad_hidden is None else grad_hidden * scale,
                None if grad_weight is None else grad_weight.mul_(scale).to(ctx.weight_dtype), None, None, None, None)
