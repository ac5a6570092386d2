"""Dropout whose masks are a pure function of (seed, step, place in the global batch, layer).

No stream of random numbers has to be saved or kept in step between ranks: a sequence meets the same masks whichever
rank holds it, whichever micro-batch it shares, and when activation checkpointing computes the forward a second time.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_MASK = (1 << 64) - 1


def mix(*numbers: int) -> int:
    """64 well-stirred bits from whole numbers, by the finaliser of SplitMix64 (Steele, Lea, Flood 2014)."""
    state = 0
    for number in numbers:
        state = (state + (number & _MASK) + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state


class DropoutKeys:
    """What the masks of the current micro-batch depend on; the loop sets it before each forward.

    `places` are the sequences' places in the global batch and `lengths` their tokens, in the micro-batch's order.
    """

    def __init__(self, seed: int) -> None:
        self.seed, self.step, self.places, self.lengths = seed, 0, [0], [0]
        self.modules = 0

    def set(self, step: int, places: Sequence[int], lengths: Sequence[int]) -> None:
        self.step, self.places, self.lengths = step, list(places), list(lengths)


class KeyedDropout(nn.Module):
    """Zeroes a share `p` of x (T, D) in training and scales the rest by 1 / (1 - p); gives x back in evaluation."""

    def __init__(self, p: float, keys: DropoutKeys) -> None:
        super().__init__()
        self.p, self.keys, self.number = p, keys, keys.modules
        self.dropped = round(p * 65536)
        keys.modules += 1  # modules are made in the same order on every rank and in every launch

    def forward(self, x: Tensor) -> Tensor:
        return x if self._is_off else self._thinned(x, self._mask(x))

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        """x (T, D) and weight (n, D), of one type -> dropout(x) · weightᵀ (T, n). Of both it keeps x, which others may share, and the mask."""
        return F.linear(x, weight) if self._is_off else _Product.apply(x, weight, self._mask(x), self._thinned)

    @property
    def _is_off(self) -> bool:
        return not self.training or self.p == 0

    def _mask(self, x: Tensor) -> Tensor:
        """Which elements stay, of x's shape."""
        keys = self.keys
        if sum(keys.lengths) != len(x):
            raise RuntimeError(f"dropout keys are set for {sum(keys.lengths)} tokens, the micro-batch has {len(x)}")
        width, bits, generator = x[0].numel(), [], torch.Generator(x.device)
        for place, length in zip(keys.places, keys.lengths, strict=True):
            generator.manual_seed(mix(keys.seed, keys.step, place, self.number) >> 1)
            # 16 random bits an element, four elements to a draw: several times cheaper than a Bernoulli draw each
            draws = torch.empty(-(-length * width // 4), dtype=torch.int64, device=x.device).random_(-(2**63), None, generator=generator)
            bits.append(draws.view(torch.int16)[: length * width])
        return (bits[0] if len(bits) == 1 else torch.cat(bits)).view(x.shape) >= self.dropped - 32768

    def _thinned(self, x: Tensor, mask: Tensor) -> Tensor:
        return torch.where(mask, x, 0).mul_(65536 / (65536 - self.dropped))  # on a CPU a product would first copy the mask as numbers


class _Product(torch.autograd.Function):
    """Composed of dropout and a product it would keep x thinned as well, a copy for each adapter."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, mask: Tensor, thinned: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(x, weight, mask)
        ctx.thinned = thinned
        return F.linear(thinned(x, mask), weight)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, weight, mask = ctx.saved_tensors
        grad_weight = grad.T @ ctx.thinned(x, mask) if ctx.needs_input_grad[1] else None
        return ctx.thinned(grad @ weight, mask) if ctx.needs_input_grad[0] else None, grad_weight, None, None
