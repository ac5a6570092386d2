"""LoRA (Hu et al. 2021) by module swap: named linear layers get a low-rank pair beside their frozen weight.

y = W x + (alpha / rank) · B A dropout(x). A starts random and B at zero, so training starts from the base exactly.
Adapters are fp32; the base keeps its stored type. Files are in PEFT's layout.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine import tensorfile
from engine.dropout import DropoutKeys, KeyedDropout, mix
from engine.errors import EngineError
from engine.linear import Linear

PEFT_PREFIX = "base_model.model."


class LoRALinear(Linear):
    """Takes over a linear layer's weight, frozen, and adds lora_A (rank, in) and lora_B (out, rank)."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float, dropout: float, keys: DropoutKeys, seed: int) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.scale = base.in_features, base.out_features, alpha / rank
        self.weight, self.bias = base.weight, base.bias
        device = base.weight.device
        bound = 1 / math.sqrt(base.in_features)  # Kaiming's uniform with a = √5, as in the paper's code
        values = torch.empty(rank, base.in_features).uniform_(-bound, bound, generator=torch.Generator().manual_seed(seed >> 1))
        self.lora_A = nn.Parameter(values.to(device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, device=device))
        self.dropout = KeyedDropout(dropout, keys)
        self.unmerged: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x (T, in) -> (T, out)."""
        out = super().forward(x)
        if self.unmerged is not None:
            return out
        low = F.linear(self.dropout(x), self.lora_A.to(x.dtype))
        # the scale goes onto B and the sum into the product: no pass over `out` of its own
        return torch.addmm(out, low.to(out.dtype), (self.lora_B * self.scale).to(out.dtype).T)

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """The weight with the adapter added, fp32."""
        return self.weight.float() + self.scale * (self.lora_B.float() @ self.lora_A.float())

    @torch.no_grad()
    def merge(self) -> None:
        """Adds the adapter to the weight: computed in fp32, rounded once. `unmerge` restores the weight bit for bit."""
        assert self.unmerged is None, "merged already"
        self.unmerged = self.weight.clone()
        self.weight.copy_(self.merged_weight())

    @torch.no_grad()
    def unmerge(self) -> None:
        assert self.unmerged is not None, "not merged"
        self.weight.copy_(self.unmerged)
        self.unmerged = None


def apply(model: nn.Module, rank: int, alpha: float, dropout: float, targets: list[str], keys: DropoutKeys, seed: int) -> None:
    """Freezes the model and swaps every linear layer whose name is, or ends in, one of `targets`.

    Raises:
        EngineError: a target that matches no layer, even one of several.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"}
    matched = {target: [name for name in layers if name == target or name.endswith("." + target)] for target in targets}
    if idle := [target for target, names in matched.items() if not names]:
        there = sorted({name.rpartition(".")[2] for name in layers})
        raise EngineError("LORA-TARGET", f"lora.targets: {', '.join(idle)} match no linear layer of the model; there are: {', '.join(there)}")
    model.requires_grad_(False)
    for number, name in enumerate(name for name in layers if any(name in names for names in matched.values())):
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, LoRALinear(layers[name], rank, alpha, dropout, keys, mix(seed, number)))


def adapters(model: nn.Module) -> dict[str, LoRALinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def merge(model: nn.Module) -> None:
    for module in adapters(model).values():
        module.merge()


def unmerge(model: nn.Module) -> None:
    for module in adapters(model).values():
        module.unmerge()


def merged_weights(model: nn.Module) -> dict[str, Tensor]:
    """The merged weight of every adapted layer by its name, fp32; the model stays as it is."""
    return {f"{name}.weight": module.merged_weight() for name, module in adapters(model).items()}


def fold(model: nn.Module) -> None:
    """Swaps the adapted layers for plain ones that hold the merged weight: nothing of the adapters stays in memory."""
    for name, module in adapters(model).items():
        module.merge()
        parent, _, child = name.rpartition(".")
        plain = Linear(module.in_features, module.out_features, bias=module.bias is not None, device="meta")
        plain.weight, plain.bias = module.weight, module.bias
        setattr(model.get_submodule(parent), child, plain)


def save(model: nn.Module, folder: Path, base: str, rank: int, alpha: float, dropout: float, targets: list[str], revision: str | None = None) -> None:
    """adapter_model.safetensors and adapter_config.json, as PEFT reads them, into a folder that exists."""
    tensors = {f"{PEFT_PREFIX}{name}.lora_{part}.weight": getattr(module, f"lora_{part}")
               for name, module in adapters(model).items() for part in "AB"}
    tensorfile.save(tensors, folder / "adapter_model.safetensors")
    config: dict[str, Any] = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "revision": revision, "inference_mode": True,
        "r": rank, "lora_alpha": int(alpha) if alpha == int(alpha) else alpha, "lora_dropout": dropout, "target_modules": sorted(targets), "bias": "none",
        "fan_in_fan_out": False, "init_lora_weights": True, "modules_to_save": None, "use_rslora": False, "use_dora": False,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


@torch.no_grad()
def load(model: nn.Module, folder: Path) -> None:
    """Applies the adapter of a PEFT folder to a base model.

    Raises:
        EngineError: an adapter of a kind this engine does not compute, or whose tensors do not fit.
    """
    from safetensors.torch import load_file

    path = folder / "adapter_config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        tensors = load_file(folder / "adapter_model.safetensors")
    except (OSError, ValueError) as error:
        raise EngineError("LORA-FOLDER", f"{folder}: cannot be read as an adapter: {error}; expected PEFT's layout") from error
    plain = {"peft_type": "LORA", "bias": "none", "use_dora": False, "use_rslora": False, "modules_to_save": None, "rank_pattern": {},
             "alpha_pattern": {}, "fan_in_fan_out": False, "layers_to_transform": None, "lora_bias": False}
    odd = [f"{key}={config[key]!r}" for key, value in plain.items() if config.get(key, value) not in (value, None)]
    if odd or not isinstance(config["target_modules"], list):
        raise EngineError("LORA-KIND", f"{path}: has {', '.join(odd) or 'target_modules that are no list'}; only plain LoRA is read")
    apply(model, config["r"], config["lora_alpha"], 0.0, config["target_modules"], DropoutKeys(0), 0)
    wanted = {f"{PEFT_PREFIX}{name}.lora_{part}.weight": getattr(module, f"lora_{part}")
              for name, module in adapters(model).items() for part in "AB"}
    wrong = [f"  {name}: file has {list(tensors[name].shape) if name in tensors else 'nothing'}, the base wants "
             f"{list(wanted[name].shape) if name in wanted else 'nothing'}"
             for name in sorted(wanted.keys() | tensors.keys())
             if name not in wanted or name not in tensors or wanted[name].shape != tensors[name].shape]
    if wrong:
        raise EngineError("LORA-WEIGHTS", f"{folder}: the adapter does not fit the base model:\n" + "\n".join(wrong[:10]))
    for name, parameter in wanted.items():
        parameter.copy_(tensors[name])
