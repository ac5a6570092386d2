"""AdamW with decay for matrices alone, whole or sharded, the learning rate as a function of the step, and clipping."""

import functools
import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from engine import distributed
from engine.adamw_bf16 import AdamWBF16
from engine.config import Optim
from engine.distributed import World
from engine.dropout import mix
from engine.errors import CHECKPOINT, EngineError

SLOTS = ("step", "exp_avg", "exp_avg_sq")


def build(trained: dict[str, nn.Parameter], cfg: Optim, seed: int, world: World) -> tuple[torch.optim.Optimizer, str]:
    """AdamW over the trained parameters (Loshchilov and Hutter 2019), and which one it is and why.

    Decay applies by rank of the tensor, not by name: matrices and embeddings decay, norms and biases do not. LoRA+ (Hayou et
    al. 2024) gives LoRA's B matrices a learning rate of their own, `lora_plus` times that of the rest.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in trained.items():
        decay, factor = cfg.weight_decay if parameter.dim() >= 2 else 0.0, cfg.lora_plus if name.endswith(".lora_B") else 1.0
        groups.setdefault((decay, factor), []).append(parameter)
    groups = [{"params": parameters, "weight_decay": decay, "factor": factor} for (decay, factor), parameters in groups.items()]
    settings = {"lr": cfg.lr, "betas": tuple(cfg.betas), "eps": cfg.eps}
    if cfg.name == "adamw_bf16":
        make = functools.partial(AdamWBF16, keys={parameter: mix(seed, number) for number, parameter in enumerate(trained.values())}, **settings)
        reason = "AdamW in bf16 with stochastic rounding, asked for, 8 bytes a parameter"
    else:
        fused = all(parameter.device.type in ("cpu", "cuda") for parameter in trained.values())
        make = functools.partial(torch.optim.AdamW, fused=fused, foreach=not fused, **settings)
        reason = f"AdamW, torch's {'fused kernel' if fused else 'foreach loop: it has no fused kernel'} for this device, fp32"
    if not cfg.shard:
        return make(groups), f"{reason}; every rank holds all moments"
    if world.size == 1:
        return make(groups), f"{reason}; not sharded, although asked for: there is one rank"
    return distributed.shard(groups, make), f"{reason}; moments sharded over {world.size} ranks, asked for"


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * group["factor"]


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
def gradient_norm(parameters: Iterable[nn.Parameter], scale: float) -> float:
    """The norm of the gradients divided by the loss scale.

    It is the same on all ranks, bit for bit, because the gradients are; it is not finite where any rank overflowed.
    """
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return float(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads, dtype=torch.float32)))) / scale


@torch.no_grad()
def unscale_and_clip(parameters: Iterable[nn.Parameter], norm: float, scale: float, clip_norm: float) -> None:
    """Divides the gradients, of that `norm`, by the loss scale, and shortens them to `clip_norm` if they are longer."""
    factor = 1 / scale * (min(1.0, clip_norm / (norm + 1e-6)) if clip_norm else 1.0)
    if factor != 1.0:
        torch._foreach_mul_([parameter.grad for parameter in parameters if parameter.grad is not None], factor)


def state(optimizer: torch.optim.Optimizer, trained: dict[str, nn.Parameter], world: World) -> dict[str, Tensor]:
    """The optimizer's tensors as `name.exp_avg`, `name.exp_avg_sq`, `name.step`: the same names sharded or not.

    Of a sharded optimizer they are brought to rank 0, by all ranks together; the other ranks get none.
    """
    own = _own(optimizer)
    tensors = {f"{name}.{slot}": value for name, parameter in trained.items() for slot, value in own.state.get(parameter, {}).items()}
    return tensors if own is optimizer else distributed.gather_tensors(tensors, world)


def load_state(optimizer: torch.optim.Optimizer, trained: dict[str, nn.Parameter], tensors: Mapping[str, Tensor]) -> None:
    """Gives back what `state` took, to each rank what it holds: of an open file no more than that is read, one tensor at a time.

    A parameter without an entry had not been updated yet.

    Raises:
        EngineError: names, shapes or types are not those of the parameters' moments.
    """
    names = {key.rpartition(".")[0] for key in tensors} & trained.keys()
    if wrong := sorted(set(tensors) ^ {f"{name}.{slot}" for name in names for slot in SLOTS}):
        raise _foreign(wrong[0], "nothing" if wrong[0] in tensors else "one", "one" if wrong[0] in tensors else "nothing")
    own = _own(optimizer)
    held = {parameter for group in own.param_groups for parameter in group["params"]}
    for key in tensors:
        name, _, slot = key.rpartition(".")
        parameter = trained[name]
        if parameter in held:  # steps are counted on the CPU, but where the kernel is fused
            value, like = tensors[key], parameter if slot != "step" else torch.zeros(())
            if (value.shape, value.dtype) != (like.shape, like.dtype):  # kernels would read and write beyond it
                raise _foreign(key, *(f"{list(one.shape)} {str(one.dtype).removeprefix('torch.')}" for one in (like, value)))
            own.state[parameter][slot] = value if slot == "step" and not own.defaults.get("fused") else value.to(parameter.device)


def _foreign(key: str, expected: str, found: str) -> EngineError:
    return EngineError("CHECKPOINT-WEIGHTS", f"the checkpoint's moments are not the model's: {key}: expected {expected}, found {found}", CHECKPOINT)


def _own(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """This rank's part of a sharded optimizer; an optimizer that is not sharded as it is."""
    return getattr(optimizer, "optim", optimizer)
