"""Which type each number has, and the loss scale that keeps fp16 gradients from vanishing.

Weights in training are fp32 whatever the arithmetic, or bf16 with optim.name=adamw_bf16; frozen weights may be stored in bf16
or fp16. The arithmetic of matrix products is the recipe's `train.precision`, by autocast.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from engine.errors import NUMERIC, EngineError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Precision:
    """`autocast`: type of products, None without autocast. `residual`: type of the activations between them."""

    device: torch.device
    autocast: torch.dtype | None
    residual: torch.dtype
    reason: str

    @property
    def arithmetic(self) -> torch.dtype:
        """The type of matrix products."""
        return self.autocast or self.residual

    def context(self) -> AbstractContextManager:
        return nullcontext() if self.autocast is None else torch.autocast(self.device.type, dtype=self.autocast)


def choose(precision: str, frozen: torch.dtype | None, device: torch.device) -> Precision:
    """The types for a run. `frozen` is the stored type of a frozen base, None where all weights are trained.

    Where all are trained the residual is fp32, whatever they are stored in: stochastic rounding keeps small updates of bf16
    weights right in the mean, but a residual rounded to the nearest at every block, forward and backward, would lose them
    before they reach a weight.
    """
    if precision == "fp32":
        return Precision(device, None, torch.float32, "fp32 arithmetic, asked for")
    if precision == "bf16" and device.type == "cpu" and not cpu_multiplies_bf16():
        return Precision(device, None, torch.float32, "fp32 arithmetic for bf16: this CPU has no bf16 instructions and would "
                         "emulate them several times slower; frozen weights stay as stored")
    residual = frozen if frozen is not None else torch.float32
    return Precision(device, DTYPES[precision], residual, f"{precision} autocast, asked for")


def cpu_multiplies_bf16() -> bool:
    """Whether torch's matrix library has bf16 kernels for this CPU (AVX-512 BF16, AMX, or Arm's BF16)."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


class LossScale:
    """The factor on an fp16 loss: halved when a gradient overflows, down to 1, doubled after `growth_interval` good steps.

    A storm of overflows ends once it is 1, after as many steps that change nothing as it could be halved. Every rank sees the
    same summed gradients and so moves its own copy alike. With bf16 and fp32 the factor is 1 for ever and an overflow is an
    error. Method: Micikevicius et al. 2018, section 3.2.
    """

    def __init__(self, enabled: bool, first: float, growth_interval: int) -> None:
        self.enabled, self.growth_interval = enabled, growth_interval
        self.value, self.good_steps = (first if enabled else 1.0), 0

    @property
    def is_least(self) -> bool:
        """Whether there is no scale left to lower."""
        return not self.enabled or self.value <= 1.0

    def update(self, finite: bool, step: int, advice: str = "Lower optim.lr, or look at the rows of this step") -> None:
        """After a step whose gradients were finite on all ranks, or not.

        Raises:
            EngineError: not finite and no scale left to lower.
        """
        if not finite and self.is_least:
            raise EngineError("NUMERIC-NOT-FINITE", f"loss or gradient is not finite at step {step}"
                              f"{' at loss scale 1' if self.enabled else ''}; nothing was updated. {advice}", NUMERIC)
        self.good_steps = self.good_steps + 1 if finite else 0
        if not finite:
            self.value = max(1.0, self.value / 2)
        elif self.enabled and self.good_steps >= self.growth_interval:
            self.value, self.good_steps = self.value * 2, 0

    def state(self) -> dict[str, float]:
        return {"value": self.value, "good_steps": self.good_steps}

    def load(self, state: dict[str, float]) -> None:
        self.value, self.good_steps = float(state["value"]), int(state["good_steps"])
