"""Models for others: folders and files that transformers, peft, vLLM and llama.cpp load. A run's, each proven before it counts:

    export/adapter/   PEFT layout          export/model/   Hugging Face layout, adapters merged          export/model.gguf

Every one is written under a temporary name, read back from disk, and compared with the model in memory: logits on rows,
token by token. Only then does it get its name. Folders hold the tokenizer and engine.json, which names template and system
prompt, so that engine.generate asks as training did, and which reports the comparison. engine.convert writes by the same functions.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine import adapter, gguf_in, gguf_out, lora, watchdog
from engine.attention import PackedAttention
from engine.config import Recipe
from engine.data.dataset import Dataset
from engine.data.template import TEMPLATES
from engine.data.tokenizer import VOCABULARIES, copy_tokenizer, end_of, load_tokenizer, read_json, stops
from engine.errors import CHECKPOINT, ENVIRONMENT, EngineError
from engine.hub import Base
from engine.models import weights
from engine.precision import DTYPES, Precision
from engine.publish import published, remove

NOTE, GENERATION = "engine.json", "generation_config.json"
NOTED = {"template": str, "system": str | None, "max_length": int}
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


def check(cfg: Recipe, base: Path, words: Path) -> None:
    """Raises EngineError for a file that the recipe asks for and that such a model cannot be written as: before training, not after."""
    if "gguf" in cfg.export.kinds:
        gguf_out.check(Path("export.kinds=[gguf]"), weights.read_config(base), words, cfg.export.gguf_type)


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
        self.note = {"template": cfg.data.template, "system": cfg.data.system, "max_length": cfg.data.max_length}
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
            with read_back(target):
                other = load(self, building)
            found = self.compare(other)
            if not found.kl <= self.cfg.export.max_kl:
                raise EngineError("EXPORT-DIFFERS", f"{target}: read back, it is not the model that was trained: mean KL divergence {found.kl:.2e} nats a "
                                  f"token, expected at most export.max_kl = {self.cfg.export.max_kl}, largest logit difference {found.max_abs_logit:.2e}; "
                                  "nothing of it was kept. Is the disk sound?", CHECKPOINT)
            if building.is_dir():
                _write_json(building / NOTE, {**self.note, "agreement_with_training": asdict(found)})
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
        model = read_model(self.base.folder, self.cfg.model.dtype, self.precision.residual, self._device(self.cfg.model.dtype))
        adapter.load(model, folder)
        return model

    def _write_model(self, path: Path) -> None:
        write_model(path, self.model, self.base.folder, self.words, self.note, getattr(self.cfg.export, "gguf_type" if path.suffix == ".gguf" else "dtype"))

    def _read_model(self, path: Path) -> nn.Module:
        dtype = self.cfg.export.dtype
        return read_model(path, dtype, self.precision.residual, self._device(dtype))

    def _device(self, dtype: str) -> torch.device:
        """Where a second model, in `dtype`, fits: beside the first, or on the CPU where the GPU is too full for it."""
        device = self.model.lm_head.weight.device
        if device.type == "cuda":
            torch.cuda.empty_cache()  # what training has let go of
            free, _ = torch.cuda.mem_get_info(device)
            if free < 1.2 * DTYPES[dtype].itemsize * sum(parameter.numel() for parameter in self.model.parameters()):
                return torch.device("cpu")
        return device


KINDS = {"adapter": (Exporter._write_adapter, Exporter._read_adapter), **dict.fromkeys(("model", "gguf"), (Exporter._write_model, Exporter._read_model))}


# ---- A whole model, of a run or of engine.convert --------------------------------------------------------------------


def merged(model: nn.Module, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) in `dtype` on the host, adapters merged in fp32. One matrix at a time lies beside the model, merged or widened."""
    adapted = {f"{name}.weight": module for name, module in lora.adapters(model).items()}
    for name, tensor in weights.untied(model).items():
        if ".lora_" not in name:
            yield name, (adapted[name].merged_weight() if name in adapted else tensor).cpu().to(dtype)


def write_model(path: Path, model: nn.Module, base: Path, words: Path, note: dict[str, Any], dtype: str) -> None:
    """Writes `model`, adapters merged in fp32 and rounded once to `dtype`: a GGUF file where the name ends so, else a folder.

    Args:
        base: the folder whose config.json it is, but for the size of the vocabulary.
        words: the tokenizer's.
        note: what engine.json is to say; nothing, and there is none.

    Raises:
        EngineError: the tokenizer has ids that the model has no embedding for, or lacks the end of the note's template.
    """
    config, tokenizer = {**weights.read_config(base), "vocab_size": model.config.vocab_size}, load_tokenizer(words, base)
    known = config["vocab_size"]
    if tokenizer.size > known and tokenizer.size > load_tokenizer(base).size:  # a model's own may have ids that nothing writes
        raise EngineError("EXPORT-VOCABULARY", f"{words}: the tokenizer has {tokenizer.size} ids, the model {known}; name the model's own")
    if path.suffix == ".gguf":
        return gguf_out.write(path, config, merged(model, torch.float32), words, dtype, base)
    path.mkdir()
    weights.write_folder(path, config, merged(model, DTYPES[dtype]))
    copy_tokenizer(words, path)
    settings = read_json(words / GENERATION) or read_json(base / GENERATION)
    if (template := note.get("template")) in TEMPLATES:
        settings = settings or {key: config[key] for key in ("bos_token_id", "pad_token_id") if key in config}
        end = end_of(template, tokenizer)  # others look here for what ends an answer
        settings["eos_token_id"] = [end, *sorted(more)] if (more := stops(template, tokenizer) - {end}) else end
    for name, content in ((GENERATION, settings), (NOTE, note)):
        if content:
            _write_json(path / name, content)


def read_model(path: Path, dtype: str, arithmetic: torch.dtype, device: torch.device) -> nn.Module:
    """What `write_model` wrote, with its weights in `dtype`; a GGUF file by way of a folder, as a user would who converts it back."""
    if path.is_dir():
        return weights.build(path, "pretrained", 0, DTYPES[dtype], arithmetic, device).requires_grad_(False)
    back = path.with_name(f"{path.name}-back")  # a name that the next one to come here finds, where this one is killed
    remove(back)
    try:
        gguf_in.to_folder(path, back, dtype)
        return read_model(back, dtype, arithmetic, device)
    finally:
        remove(back)


@contextmanager
def read_back(target: Path) -> Iterator[None]:
    """Errors of the block are those of a `target` that was written and cannot be read."""
    try:
        yield
    except EngineError as error:
        if error.exit_code == ENVIRONMENT:  # no room for a GGUF file's folder
            raise
        raise EngineError("EXPORT-DIFFERS", f"{target}: cannot be read back: {error.text}; nothing of it was kept", CHECKPOINT) from error


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def note_of(folder: Path) -> dict[str, Any]:
    """How a model or an adapter was trained: what its folder says of `NOTED`, nothing where it does not say."""
    try:
        note = json.loads((folder / NOTE).read_text(encoding="utf-8"))
        return {key: value for key, value in note.items() if isinstance(value, NOTED.get(key, ()))}
    except (OSError, ValueError, AttributeError, RecursionError):
        return {}


def words_of(base: Path, adapter_folder: Path | None) -> Path:
    """The folder of the tokenizer: the adapter's where it has one, which may have tokens that the base lacks."""
    own = adapter_folder and any((adapter_folder / name).is_file() for name in VOCABULARIES)
    return adapter_folder if own else base


def load_for_inference(model: Path, adapter_folder: Path | None, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A model ready to generate, its adapter merged where one is given."""
    loaded = weights.build(model, "pretrained", 0, dtype, dtype, device)
    if adapter_folder is not None:
        adapter.load(loaded, adapter_folder)
        lora.fold(loaded)
        for parameter in loaded.parameters():  # embedding and head that were trained whole came in fp32
            parameter.data = parameter.data.to(dtype)
    return loaded.eval().requires_grad_(False)
