"""LoRA (Hu et al. 2021) by module swap: named linear layers get a low-rank pair beside their frozen weight.

y = W x + scale · B A dropout(x). A starts random and B at zero, so training starts from the base exactly.
Adapters are fp32; the base keeps its stored type. Files are in adapter.py. Variants, alone or together:

rsLoRA  scale = alpha / √rank in place of alpha / rank (Kalajdzievski 2023)
DoRA    each row of W + scale · B A is brought to a trained length (Liu et al. 2024)
PiSSA   A and B start as the largest singular parts of W, whose product is taken off again (Meng et al. 2024)
"""

import math
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from engine.dropout import DropoutKeys, KeyedDropout, mix
from engine.errors import EngineError
from engine.linear import Linear, arithmetic_dtype

ALL_LINEAR = "all-linear"  # as a target: every linear layer but the head
WHOLE = {"embed_tokens": "model.embed_tokens", "lm_head": "lm_head"}  # what can be trained whole beside adapters


@dataclass(frozen=True)
class Settings:
    """How adapters are made.

    Attributes:
        targets: names of linear layers, whole or their ends, or ALL_LINEAR.
        rank_pattern, alpha_pattern: other values for layers whose name is, or ends in, the key.
        init: "random", or "pissa".
        modules_to_save: keys of WHOLE, trained in fp32 as they are.
    """

    rank: int
    alpha: float
    targets: list[str]
    dropout: float = 0.0
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    rslora: bool = False
    dora: bool = False
    init: str = "random"
    modules_to_save: list[str] = field(default_factory=list)


class LoRALinear(Linear):
    """Takes over a linear layer's weight, frozen, and adds lora_A (rank, in) and lora_B (out, rank)."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float, dropout: float, keys: DropoutKeys, seed: int,
                 rslora: bool = False, dora: bool = False, pissa: bool = False) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.alpha, self.rslora, self.scale = alpha, rslora, alpha / (math.sqrt(rank) if rslora else rank)
        self.weight, self.bias = base.weight, base.bias
        device = base.weight.device
        bound = 1 / math.sqrt(base.in_features)  # Kaiming's uniform with a = √5, as in the paper's code
        values = torch.empty(rank, base.in_features).uniform_(-bound, bound, generator=torch.Generator().manual_seed(seed >> 1))
        self.lora_A = nn.Parameter(values.to(device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, device=device))
        self.lora_A0 = self.lora_B0 = None
        if pissa:
            # The weight itself stays: the first product is subtracted where the paper subtracts it from the weight.
            left, values, right = torch.linalg.svd(base.weight.detach().float(), full_matrices=False)
            root = (values[:rank] / self.scale).sqrt()
            # contiguous: fused AdamW takes a weight and its moments, which a checkpoint brings back, as they lie in memory
            self.lora_A, self.lora_B = (nn.Parameter(part.contiguous()) for part in (root[:, None] * right[:rank], left[:, :rank] * root))
            self.lora_A0, self.lora_B0 = (nn.Parameter(part.detach().clone(), requires_grad=False) for part in (self.lora_A, self.lora_B))
        self.lora_magnitude_vector = None
        if dora:
            self.squares = base.weight.detach().float().square().sum(1)
            self.lora_magnitude_vector = nn.Parameter(self.lengths())
        self.dropout = KeyedDropout(dropout, keys)

    def pair(self) -> tuple[Tensor, Tensor]:
        """A and B whose product, scaled, is what is added to the weight. PiSSA's are twice as wide: the start is taken off."""
        if self.lora_A0 is None:
            return self.lora_A, self.lora_B
        return torch.cat((self.lora_A, self.lora_A0)), torch.cat((self.lora_B, -self.lora_B0), dim=1)

    @torch.no_grad()
    def lengths(self) -> Tensor:
        """The length of each row of weight + scale · B A (out,), fp32, without that matrix being formed."""
        a, b = (part.float() for part in self.pair())
        cross = (b * F.linear(self.weight.float(), a)).sum(1)
        own = ((b @ (a @ a.T)) * b).sum(1)
        return (self.squares + 2 * self.scale * cross + self.scale**2 * own).sqrt()

    def forward(self, x: Tensor) -> Tensor:
        """x (T, in) -> (T, out)."""
        out, dtype = super().forward(x), arithmetic_dtype(x)
        a, b = self.pair()
        low = self.dropout.product(x.to(dtype), a.to(dtype))
        # the scale goes onto B and the sum into the product: no pass over `out` of its own
        out = torch.addmm(out, low.to(out.dtype), (b * self.scale).to(out.dtype).T)
        if self.lora_magnitude_vector is None:
            return out
        # g · y = y + (g - 1) · y, where rounding g - 1 to a narrow type costs little. The length is a constant to the gradient.
        with torch.autocast(x.device.type, enabled=False):
            gain = (self.lora_magnitude_vector / self.lengths() - 1).to(out.dtype)
        return torch.addcmul(out, out if self.bias is None else out - self.bias.to(out.dtype), gain)

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """The weight with the adapter added, fp32."""
        a, b = (part.float() for part in self.pair())
        merged = self.weight.float() + self.scale * (b @ a)
        return merged if self.lora_magnitude_vector is None else merged * (self.lora_magnitude_vector / self.lengths())[:, None]


def apply(model: nn.Module, settings: Settings, keys: DropoutKeys, seed: int) -> None:
    """Freezes the model and swaps every linear layer that `settings` target.

    Raises:
        EngineError: a target or a pattern that matches no layer, even one of several.
    """
    layers = linear_layers(model)
    matched = {target: [name for name in layers if target == ALL_LINEAR or fits(target, name)] for target in settings.targets}
    chosen = [name for name in layers if any(name in names for names in matched.values())]
    idle = [f"lora.targets: {target}" for target, names in matched.items() if not names]
    idle += [f"lora.{option}: {key}" for option in ("rank_pattern", "alpha_pattern") for key in getattr(settings, option)
             if not any(fits(key, name) for name in chosen)]
    if idle:
        there = sorted({name.rpartition(".")[2] for name in layers})
        which = "no linear layer with an adapter" if all(matched.values()) else "no linear layer"
        raise EngineError("LORA-TARGET", f"{', '.join(idle)} matches {which}; there are: {', '.join(there)}")
    pissa = settings.init == "pissa"
    for name in chosen if pissa else []:
        if (rank := of(settings.rank_pattern, name, settings.rank)) > (most := min(layers[name].weight.shape)):
            raise EngineError("LORA-RANK", f"lora.init=pissa: {name} has {most} singular values, got rank {rank}; lower lora.rank or lora.rank_pattern")
    shown = tqdm(chosen, desc="singular values", unit=" layers", leave=False, disable=not (pissa and sys.stderr.isatty()))
    swap(model, {name: LoRALinear(layers[name], of(settings.rank_pattern, name, settings.rank), of(settings.alpha_pattern, name, settings.alpha),
                                  settings.dropout, keys, mix(seed, number), settings.rslora, settings.dora, pissa)
                 for number, name in enumerate(shown)})
    for name in settings.modules_to_save:
        train_whole(model, name)


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Those that can have an adapter: all but the head."""
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"}


def fits(key: str, name: str) -> bool:
    """Whether a layer's name is, or ends in, `key`. PEFT's keys may also be regular expressions for such an end."""
    try:
        return name == key or name.endswith(f".{key}") or re.fullmatch(rf"(.*\.)?({key})", name) is not None
    except re.error:
        return False


def of(pattern: Mapping[str, float], name: str, default: float) -> float:
    return next((value for key, value in pattern.items() if fits(key, name)), default)


def swap(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """Freezes the model and puts `layers` in place of those of the same names."""
    model.requires_grad_(False)
    for name, layer in layers.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)


def train_whole(model: nn.Module, name: str, values: Tensor | None = None) -> None:
    """Trains the embedding or the head whole, in fp32, from `values` or from what it is; both where they are one matrix."""
    weight = model.get_submodule(WHOLE[name]).weight
    trained = nn.Parameter((weight.detach() if values is None else values.to(weight.device)).float())
    for place in WHOLE.values():
        if model.get_submodule(place).weight is weight:
            model.get_submodule(place).weight = trained


def adapters(model: nn.Module) -> dict[str, LoRALinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def fold(model: nn.Module) -> None:
    """Swaps the adapted layers for plain ones that hold the merged weight, rounded once: nothing of the adapters stays in memory."""
    for name, module in adapters(model).items():
        plain = Linear(module.in_features, module.out_features, bias=module.bias is not None, device="meta")
        plain.weight, plain.bias = nn.Parameter(module.merged_weight().to(module.weight.dtype), requires_grad=False), module.bias
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, plain)
