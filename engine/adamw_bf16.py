"""AdamW for weights, gradients and moments that are all bf16, by stochastic rounding: 8 bytes a parameter instead of 16.

A bf16 number has 8 significant bits, so near 1 an update smaller than 2⁻⁹ is lost when rounded to the nearest, in every
step anew. Here a result goes up or down at random, each with a probability by its nearness, and so is right in the mean:
weights that should move by a thousandth of their spacing take one step of it in a thousand. The second moment needs it
for the same reason, since it changes by a share of 1 - β₂ a step. Method: Gupta et al. 2015; for bf16, Zamirai et al. 2020.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from engine.dropout import mix

# Numbers updated at once, in fp32: what a CPU's cache holds, and on a GPU what keeps it busy in half a gigabyte. A power of
# two: together with the seed it decides which random bits a number meets.
CHUNK = {"cpu": 2**18, "cuda": 2**24}


class AdamWBF16(torch.optim.Optimizer):
    """The update of torch's AdamW (Loshchilov and Hutter 2019), its arithmetic in fp32 over one chunk of a parameter at a time.

    Args:
        keys: a whole number for every parameter. With the parameter's count of steps it decides all rounding, so a resumed
            run repeats it, and ranks agree, whichever of them holds a parameter.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], keys: dict[nn.Parameter, int], lr: float, betas: tuple[float, float], eps: float) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self.keys = keys

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self.state[parameter]
                    if not state:
                        state |= {"step": torch.zeros(()), "exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
                    state["step"] += 1
                    self._update(parameter, state, group)

    def _update(self, parameter: nn.Parameter, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        count, lr, (beta1, beta2) = int(state["step"]), group["lr"], group["betas"]
        step_size, widening = lr / (1 - beta1**count), 1 / math.sqrt(1 - beta2**count)
        generator = torch.Generator(parameter.device).manual_seed(mix(self.keys[parameter], count) >> 1)
        size = CHUNK[parameter.device.type]
        flat = (tensor.view(-1).split(size) for tensor in (parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"]))
        for stored in zip(*flat, strict=True):
            weight, grad, mean, square = (tensor.float() for tensor in stored)
            mean.lerp_(grad, 1 - beta1)
            square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
            spread = square.sqrt().mul_(widening).add_(group["eps"])
            weight.mul_(1 - lr * group["weight_decay"]).addcdiv_(mean, spread, value=-step_size)
            bits = _random_bits(3 * len(weight), generator).view(3, -1)
            for target, exact, drawn in zip((stored[0], *stored[2:]), (weight, mean, square), bits, strict=True):
                target.copy_(rounded(exact, drawn))


def rounded(x: Tensor, bits: Tensor) -> Tensor:
    """x (n,), fp32, as numbers that bf16 has: of the two neighbours of each one by chance, in the mean x. Uses x up.

    The low 16 of a float's 32 bits are what bf16 leaves off. Random bits are added to them, and the carry decides. What is
    not finite stays as it is; beyond the largest bf16 lies infinity.

    Args:
        bits: (n,), int16, uniform.
    """
    nan = x.clamp(max=-math.inf)  # NaN where x is, -inf elsewhere: cheaper than a mask
    x.view(torch.int32).add_(bits).add_(32768).bitwise_and_(-65536)
    return torch.maximum(x, nan)


def _random_bits(count: int, generator: torch.Generator) -> Tensor:
    """(count,) int16, drawn four to an int64."""
    draws = torch.empty(-(-count // 4), dtype=torch.int64, device=generator.device)
    return draws.random_(-(2**63), None, generator=generator).view(torch.int16)[:count]
