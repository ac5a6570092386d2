"""Adapters on disk, in PEFT's layout: adapter_model.safetensors and adapter_config.json.

Which layers have an adapter and of which rank is read from the tensors, so every way PEFT has of naming targets is
understood. A kind of adapter that this engine does not compute is refused by name.
"""

import dataclasses
import hashlib
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine import lora, tensorfile
from engine.config import Lora
from engine.dropout import DropoutKeys
from engine.errors import SECURITY, EngineError
from engine.lora import WHOLE, LoRALinear

WEIGHTS, CONFIG, PREFIX = "adapter_model.safetensors", "adapter_config.json", "base_model.model."
# Fields that say nothing, or nothing that the tensors do not say.
KNOWN = set("""alpha_pattern auto_mapping base_model_name_or_path exclude_modules fan_in_fan_out inference_mode init_lora_weights layers_pattern
    layers_to_transform lora_alpha lora_dropout megatron_core modules_to_save peft_type peft_version qalora_group_size r rank_pattern revision
    runtime_config target_modules task_type use_dora use_rslora bias ensure_weight_tying eva_config stable_gamma""".split())
# Ways of starting that change the base's weights: such an adapter belongs to a base that is nowhere on disk.
PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")


def attach(model: nn.Module, options: Lora, keys: DropoutKeys, seed: int) -> None:
    """Gives `model` the adapters that a recipe asks for: those of a folder, new ones, or none."""
    if options.start:
        load(model, Path(options.start), options.dropout, keys)
    elif options.rank:
        lora.apply(model, lora.Settings(**{name: value for name, value in vars(options).items() if name != "start"}), keys, seed)


def save(model: nn.Module, folder: Path, base: str, dropout: float, revision: str | None = None) -> None:
    """Writes the model's adapters into a folder that exists; `base` is where PEFT finds the base model, and in which revision.

    PiSSA's are written as plain LoRA of twice the rank on the base as it was, so any base on disk fits.
    """
    modules, tensors, ranks, alphas = lora.adapters(model), {}, {}, {}
    for name, module in modules.items():
        a, b = module.pair()
        tensors |= {f"{name}.lora_A.weight": a.detach(), f"{name}.lora_B.weight": b.detach()}
        wider = len(a) / len(module.lora_A)
        ranks[name], alphas[name] = len(a), module.alpha * (math.sqrt(wider) if module.rslora else wider)
        if module.lora_magnitude_vector is not None:
            tensors[f"{name}.lora_magnitude_vector"] = module.lora_magnitude_vector
    whole = [name for name, path in WHOLE.items() if model.get_submodule(path).weight.requires_grad]
    # of one matrix in both places each gets a copy: safetensors takes no tensor twice
    tensors |= {f"{WHOLE[name]}.weight": model.get_submodule(WHOLE[name]).weight.detach().clone() for name in whole}
    tensorfile.save({PREFIX + name: tensor for name, tensor in tensors.items()}, folder / WEIGHTS)
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    first = next(iter(modules.values()))
    config: dict[str, Any] = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "revision": revision, "inference_mode": True,
        "r": rank, "lora_alpha": _whole(alpha), "lora_dropout": dropout, "target_modules": _targets(model, list(modules)), "bias": "none",
        "rank_pattern": {name: value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {name: _whole(value) for name, value in alphas.items() if value != alpha},
        "fan_in_fan_out": False, "init_lora_weights": True, "modules_to_save": whole or None, "use_rslora": first.rslora,
        "use_dora": first.lora_magnitude_vector is not None,
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _whole(number: float) -> float:
    """8 for 8.0, as people write it."""
    return int(number) if number == int(number) else number


def _targets(model: nn.Module, names: list[str]) -> list[str]:
    """The ends of the names where they mean these layers and no others, else the whole names."""
    ends = {name.rpartition(".")[2] for name in names}
    meant = {name for name in lora.linear_layers(model) if name.rpartition(".")[2] in ends}
    return sorted(ends) if meant == set(names) else sorted(names)


@torch.no_grad()
def load(model: nn.Module, folder: Path, dropout: float = 0.0, keys: DropoutKeys | None = None) -> None:
    """Puts the adapters of a folder onto a base model, to be trained on or used.

    Raises:
        EngineError: an adapter of a kind this engine does not compute, or whose tensors do not fit.
    """
    config, tensors = _read(folder)
    whole = {name: tensors.pop(f"{path}.weight") for name, path in WHOLE.items() if f"{path}.weight" in tensors}
    linear, layers, wanted, problems = lora.linear_layers(model), {}, {}, _misfits(model, whole, bool(config.get("ensure_weight_tying")))
    for name in sorted(key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight")):
        if name not in linear:
            problems.append(f"{name}: the base has no such linear layer")
            continue
        rank, alpha = max(1, len(tensors[f"{name}.lora_A.weight"])), lora.of(config.get("alpha_pattern") or {}, name, config["lora_alpha"])
        layers[name] = module = LoRALinear(linear[name], rank, alpha, dropout, keys or DropoutKeys(0), 0,
                                           bool(config.get("use_rslora")), bool(config.get("use_dora")))
        wanted |= {f"{name}.lora_A.weight": module.lora_A, f"{name}.lora_B.weight": module.lora_B}
        if module.lora_magnitude_vector is not None:
            wanted[f"{name}.lora_magnitude_vector"] = module.lora_magnitude_vector
    problems += [f"{key}: holds NaN or an infinity" for key, tensor in [*tensors.items(), *whole.items()] if not tensor.isfinite().all()]
    sizes, found = ({key: list(tensor.shape) for key, tensor in some.items()} for some in (wanted, tensors))
    problems += [f"{key}: file has {found.get(key, 'nothing')}, the base wants {sizes.get(key, 'nothing')}"
                 for key in sorted(sizes.keys() | found.keys()) if sizes.get(key) != found.get(key)]
    if problems or not layers:
        raise EngineError("LORA-WEIGHTS", f"{folder}: the adapter does not fit the base model:\n" +
                          "\n".join(f"  {one}" for one in problems[:10] or ["it has no adapter on a linear layer"]))
    lora.swap(model, layers)
    for key, parameter in wanted.items():
        parameter.copy_(tensors[key])
    for name, matrix in whole.items():
        lora.train_whole(model, name, matrix)
        model.config = dataclasses.replace(model.config, vocab_size=len(matrix))  # more than the base's where tokens were added


def _misfits(model: nn.Module, whole: dict[str, Tensor], tied: bool) -> list[str]:
    """Why an adapter's embedding and head cannot take the place of the base's. `tied`: the adapter has one for both."""
    wanted = list(model.lm_head.weight.shape)
    problems = [f"{name}: file has {list(matrix.shape)}, the base wants {wanted}, or more rows for tokens that were added"
                for name, matrix in whole.items() if matrix.dim() != 2 or matrix.shape[1] != wanted[1] or len(matrix) < wanted[0]]
    if whole and model.config.tie_word_embeddings and not (tied or len(whole) == 2 and torch.equal(*whole.values())):
        problems.append("the base has one matrix as embedding and head, with the adapter they would differ")
    if len({len(matrix) for matrix in whole.values()}) > 1 or not tied and len(whole) == 1 and any(len(matrix) != wanted[0] for matrix in whole.values()):
        problems.append("embedding and head would differ in their number of rows")
    return problems


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    path = folder / CONFIG
    try:
        if not (folder / WEIGHTS).is_file() and (folder / "adapter_model.bin").is_file():
            raise EngineError("LORA-PICKLE", f"{folder / 'adapter_model.bin'}: is a pickle, which can run code when read, and is never loaded; load it "
                              "with PEFT where you trust it and save it again, which writes safetensors", SECURITY)
        config, tensors = json.loads(path.read_text(encoding="utf-8")), tensorfile.load(folder / WEIGHTS)
        alphas = [config["lora_alpha"], *(config.get("alpha_pattern") or {}).values()]
        if not all(type(alpha) in (int, float) for alpha in alphas):
            raise ValueError(f"lora_alpha and alpha_pattern: got {alphas}, expected numbers")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise EngineError("LORA-FOLDER", f"{folder}: cannot be read as an adapter: {error}; expected PEFT's layout") from error
    odd = [f"{key}={value!r}" for key, value in config.items() if key not in KNOWN and value not in (None, False, [], {})]
    odd += [f"{key}={config[key]!r}" for key, good in (("peft_type", ("LORA",)), ("bias", ("none",)), ("init_lora_weights", PLAIN_STARTS))
            if key in config and config[key] not in good]
    odd += [f"modules_to_save={name!r}" for name in config.get("modules_to_save") or [] if name not in WHOLE]
    if odd:
        raise EngineError("LORA-KIND", f"{path}: has {', '.join(odd)}, which is not computed here; "
                          "expected LoRA, rsLoRA or DoRA on linear layers of an unchanged base")
    return config, {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}


def digest(folder: Path) -> str:
    """SHA-256 of what an adapter holds."""
    _read(folder)
    total = hashlib.sha256()
    for name in (CONFIG, WEIGHTS):
        total.update((folder / name).read_bytes())
    return total.hexdigest()
