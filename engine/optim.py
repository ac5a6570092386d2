"""AdamW with decay for matrices alone, the learning rate as a function of the step, and clipping."""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from engine.config import Optim


def build(trained: list[nn.Parameter], cfg: Optim) -> torch.optim.AdamW:
    """AdamW over the trained parameters (Loshchilov and Hutter 2019), fused where torch has it for their device.

    Decay applies by rank of the tensor, not by name: matrices and embeddings decay, norms and biases do not.
    """
    groups = [{"params": [p for p in trained if p.dim() >= 2], "weight_decay": cfg.weight_decay},
              {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0}]
    fused = all(parameter.device.type in ("cpu", "cuda") for parameter in trained)
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=cfg.lr, betas=tuple(cfg.betas), eps=cfg.eps, fused=fused)


def warmup_steps(cfg: Optim, num_steps: int) -> int:
    return cfg.warmup_steps if cfg.warmup_steps is not None else round(cfg.warmup_ratio * num_steps)


def learning_rate(step: int, num_steps: int, cfg: Optim) -> float:
    """The learning rate of step 0 … num_steps - 1: a ramp up to `lr`, then the schedule down to `min_lr_ratio` of it."""
    warmup = warmup_steps(cfg, num_steps)
    if step < warmup:
        return cfg.lr * (step + 1) / warmup
    share = SCHEDULES[cfg.schedule]((step - warmup) / max(1, num_steps - warmup), cfg.decay_ratio * num_steps / max(1, num_steps - warmup))
    return cfg.lr * (cfg.min_lr_ratio + (1 - cfg.min_lr_ratio) * share)


# (share of the steps after warm-up that are done, share of them in wsd's decay) -> share of the way between end and peak
SCHEDULES: dict[str, Callable[[float, float], float]] = {
    "constant": lambda done, decay: 1.0,
    "linear": lambda done, decay: 1.0 - done,
    "cosine": lambda done, decay: 0.5 * (1 + math.cos(math.pi * done)),
    "wsd": lambda done, decay: min(1.0, (1.0 - done) / decay) if decay > 0 else 1.0,
}


@torch.no_grad()
def unscale_and_clip(parameters: Iterable[nn.Parameter], scale: float, clip_norm: float) -> float:
    """Divides the gradients by the loss scale, shortens them to `clip_norm` if longer, and returns their norm before that.

    The norm is the same on all ranks, bit for bit, because the gradients are; it is not finite where any rank overflowed.
    """
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = float(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))) / scale
    factor = 1 / scale * (min(1.0, clip_norm / (norm + 1e-6)) if clip_norm else 1.0)
    if math.isfinite(norm) and factor != 1.0:
        torch._foreach_mul_(grads, factor)
    return norm


def state(optimizer: torch.optim.Optimizer, trained: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """The optimizer's tensors as `name.exp_avg`, `name.exp_avg_sq`, `name.step`."""
    return {f"{name}.{slot}": value for name, parameter in trained.items() for slot, value in optimizer.state.get(parameter, {}).items()}


def load_state(optimizer: torch.optim.Optimizer, trained: dict[str, nn.Parameter], tensors: dict[str, Tensor]) -> None:
    """Gives back what `state` took; a parameter without an entry had not been updated yet."""
    for key, value in tensors.items():
        name, _, slot = key.rpartition(".")
        optimizer.state[trained[name]][slot] = value.to(trained[name].device)
