"""What a run leaves for others: folders and files that transformers, peft, vLLM and llama.cpp load, each proven before it counts.

    export/adapter/   PEFT layout          export/model/   Hugging Face layout, adapters merged          export/model.gguf

Every one is written under a temporary name, read back from disk, and compared with the model in memory: logits on rows,
token by token. Only then does it get its name. Folders hold the tokenizer and engine.json, which names template and system
prompt, so that engine.generate asks as training did, and which reports the comparison.
"""

import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine import adapter, gguf_in, gguf_out, lora, watchdog
from engine.attention import PackedAttention
from engine.config import Recipe
from engine.data.dataset import Dataset
from engine.data.tokenizer import copy_tokenizer, end_of, load_tokenizer, read_json, stops
from engine.errors import CHECKPOINT, EngineError
from engine.hub import Base
from engine.models import weights
from engine.precision import DTYPES, Precision
from engine.publish import published

NOTE = "engine.json"
TOKENS_OF_A_ROW = 256  # compared at most: logits of long rows would take gigabytes


@dataclass(frozen=True)
class Agreement:
    """How near two models' next-token distributions are, over `tokens` tokens of `rows` rows.

    `kl`: mean Kullback-Leibler divergence from the model in memory to the one on disk, nats a token. `max_abs_logit`: the
    largest difference of two logits. `top1`: share of tokens after which both find the same token likeliest.
    """

    rows: int
    tokens: int
    kl: float
    max_abs_logit: float
    top1: float


class Exporter:
    """Writes and proves one run's exports.

    Args:
        rows: the first export.verify_rows of them are what models are compared on.
        precision: the arithmetic of both sides of a comparison.
        base: what cfg.model.path means.
        words: the tokenizer's folder.
    """

    def __init__(self, model: nn.Module, cfg: Recipe, rows: Dataset, precision: Precision, base: Base, words: Path) -> None:
        self.model, self.cfg, self.precision, self.base, self.words = model, cfg, precision, base, words
        self.config = {**weights.read_config(base.folder), "vocab_size": model.config.vocab_size}
        self.rows = [torch.from_numpy(rows.read(document)[0][:TOKENS_OF_A_ROW].astype("int64")) for document in range(min(cfg.export.verify_rows, len(rows)))]

    @watchdog.phase("export")
    def run(self, folder: Path) -> dict[Path, Agreement]:
        """Writes every export that the recipe asks for under `folder`; gives back where, and how near each is.

        Raises:
            EngineError: one cannot be written, or is not what is in memory; nothing of it stays.
        """
        kinds = self.cfg.export.kinds
        if "auto" in kinds:
            kinds = ["adapter" if lora.adapters(self.model) else "model"]
        targets = {kind: folder / ("model.gguf" if kind == "gguf" else kind) for kind in kinds}
        return {target: self._publish(target, *KINDS[kind]) for kind, target in targets.items()}

    def _publish(self, target: Path, write: Callable, load: Callable) -> Agreement:
        with published(target) as building:
            write(self, building)
            try:
                other = load(self, building)
            except EngineError as error:
                raise EngineError("EXPORT-DIFFERS", f"{target}: cannot be read back: {error.text}; nothing of it was kept", CHECKPOINT) from error
            found = self.compare(other)
            if not found.kl <= self.cfg.export.max_kl:
                raise EngineError("EXPORT-DIFFERS", f"{target}: read back, it is not the model that was trained: mean KL divergence {found.kl:.2e} nats a "
                                  f"token, expected at most export.max_kl = {self.cfg.export.max_kl}, largest logit difference {found.max_abs_logit:.2e}; "
                                  "nothing of it was kept. Is the disk sound?", CHECKPOINT)
            if building.is_dir():
                data = self.cfg.data
                note = {"template": data.template, "system": data.system, "max_length": data.max_length, "agreement_with_training": asdict(found)}
                (building / NOTE).write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")
        return found

    @torch.no_grad()
    def compare(self, other: nn.Module) -> Agreement:
        """The model in memory against `other`, on the rows."""
        was_training = self.model.training
        tokens, kl, largest, same = 0, 0.0, 0.0, 0
        for row in self.rows:
            ours, theirs = (self._logits(model.eval(), row) for model in (self.model, other))
            ours_log, theirs_log = ours.log_softmax(-1), theirs.log_softmax(-1)
            kl += float((ours_log.exp() * (ours_log - theirs_log)).sum())
            largest = max(largest, float((ours - theirs).abs().max()))
            same += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
            tokens += len(row)
        self.model.train(was_training)
        return Agreement(len(self.rows), tokens, max(kl / tokens, 0.0) if kl == kl else kl, largest, same / tokens)

    def _logits(self, model: nn.Module, row: Tensor) -> Tensor:
        """row (T,) -> (T, V), float64 on the CPU."""
        device = model.lm_head.weight.device
        with torch.autocast(device.type, self.precision.autocast or torch.bfloat16, enabled=self.precision.autocast is not None):
            hidden = model(row.to(device), torch.arange(len(row), device=device), PackedAttention([len(row)], device))
            return model.lm_head(hidden).double().cpu()

    # ---- The kinds: how each is written to a temporary place, and how it is read back --------------------------------

    def _write_adapter(self, folder: Path) -> None:
        folder.mkdir()
        adapter.save(self.model, folder, self.base.name, self.cfg.lora.dropout, self.base.commit)
        copy_tokenizer(self.words, folder)

    def _read_adapter(self, folder: Path) -> nn.Module:
        """On the base as its folder has it, in the recipe's types."""
        model = self._build(self.base.folder, DTYPES[self.cfg.model.dtype])
        adapter.load(model, folder)
        return model

    def _write_model(self, folder: Path) -> None:
        folder.mkdir()
        weights.write_folder(folder, self.config, self._tensors())
        copy_tokenizer(self.words, folder)
        path, tokenizer, template = folder / "generation_config.json", load_tokenizer(self.words), self.cfg.data.template
        settings = read_json(path) or {key: self.config[key] for key in ("bos_token_id", "pad_token_id") if key in self.config}
        end = end_of(template, tokenizer)  # others look here for what ends an answer
        settings["eos_token_id"] = [end, *sorted(more)] if (more := stops(template, tokenizer) - {end}) else end
        path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")

    def _read_model(self, folder: Path) -> nn.Module:
        return self._build(folder, DTYPES[self.cfg.export.dtype])

    def _write_gguf(self, path: Path) -> None:
        gguf_out.write(path, self.config, self._tensors(), self.words, self.cfg.export.gguf_type)

    def _read_gguf(self, path: Path) -> nn.Module:
        """By way of a folder, as a user would who converts it back."""
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            gguf_in.to_folder(path, Path(folder) / "model", self.cfg.export.dtype)
            return self._read_model(Path(folder) / "model")

    def _tensors(self) -> dict[str, Tensor]:
        """The whole model's tensors in export.dtype, adapters merged."""
        merged = lora.merged_weights(self.model)
        return {name: (merged[name]() if name in merged else tensor).to(DTYPES[self.cfg.export.dtype])
                for name, tensor in weights.untied(self.model).items() if ".lora_" not in name}

    def _build(self, folder: Path, dtype: torch.dtype) -> nn.Module:
        return weights.build(folder, "pretrained", 0, dtype, self.precision.residual, self._device(self.model)).requires_grad_(False)

    def _device(self, model: nn.Module) -> torch.device:
        """Where a second model fits: beside the first, or on the CPU where the GPU is too full for it."""
        device = model.lm_head.weight.device
        if device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(device)
            if free < 1.2 * sum(parameter.nbytes for parameter in model.parameters()):
                return torch.device("cpu")
        return device


KINDS = {"adapter": (Exporter._write_adapter, Exporter._read_adapter), "model": (Exporter._write_model, Exporter._read_model),
         "gguf": (Exporter._write_gguf, Exporter._read_gguf)}


def template_of(folder: Path) -> tuple[str | None, str | None]:
    """The template and the system prompt that a model or adapter was trained with, if the folder says."""
    try:
        note: dict[str, Any] = json.loads((folder / NOTE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None, None
    return note.get("template"), note.get("system")


def load_for_inference(model: Path, adapter_folder: Path | None, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A model ready to generate, its adapter merged where one is given."""
    loaded = weights.build(model, "pretrained", 0, dtype, dtype, device)
    if adapter_folder is not None:
        adapter.load(loaded, adapter_folder)
        lora.fold(loaded)
    return loaded.eval().requires_grad_(False)
