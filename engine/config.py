"""Every option there is, as dataclasses; `load` turns a recipe and `key=value` arguments into one `Recipe`.

Nothing here imports torch: a mistake in a recipe is reported within a second, and all mistakes at once.
"""

import difflib
import glob
import json
import math
import os
import re
import sys
from collections.abc import Iterator
from copy import copy
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from engine import hub
from engine.errors import EngineError

DEFAULT_RECIPE = "recipes/quickstart.yaml"
LARGEST = 64 << 10  # bytes of a recipe; one with every option has 4,000


def option(default: Any, text: str, choices: tuple = (), low: float | None = None, high: float | None = None) -> Any:
    """A dataclass field with its one line of documentation and the values it may take (`low`, `high` inclusive)."""
    metadata = {"text": text, "choices": choices, "low": low, "high": high}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: copy(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class Run:
    folder: str = option("runs", "folder that holds run directories")
    name: str | None = option(None, "name of the run directory; the recipe's file name if not given")


@dataclass
class Model:
    path: str = option("", "folder in Hugging Face layout: config.json, *.safetensors, tokenizer.model or .json; or org/name[@revision] on the hub")
    init: str = option("pretrained", "where weights come from: the folder, or random by its config.json", ("pretrained", "random"))
    dtype: str = option("fp32", "type of frozen weights; trained ones are fp32, and bf16 with optim.name=adamw_bf16", ("fp32", "bf16", "fp16"))
    dropout: float = option(0.0, "share of each block's two outputs zeroed in training", low=0, high=0.9)
    add_tokens: list[str] = option([], "control tokens added to the tokenizer; their embeddings start as the mean of the others")


FORMATS = ("alpaca", "completion", "sharegpt", "messages", "text")


@dataclass
class Source:
    """One entry of data.train or data.validation, where it is a list."""

    path: str = ""  # a file, a directory of *.jsonl, *.json and *.parquet, or a glob
    format: str = ""  # data.format if not given
    name: str = ""  # in logs; the path's last part without its ending if not given
    repeat: int = 1  # times each row is trained in an epoch
    weight: float | None = None  # share of the epoch's rows, relative to the other sources; every row still occurs


@dataclass
class Data:
    train: Any = option("", "training rows: a file, directory or glob, or a list of {path, format, name, repeat | weight}")
    validation: Any = option(None, "held-out rows, likewise; none: no evaluation")
    format: str = option("alpaca", "what a record of a source is, unless the source says otherwise", FORMATS)
    supervise: str = option("answers", "what is learnt: every answer, the last of a conversation, or all text, prompts included", ("answers", "last", "all"))
    on_bad_row: str = option("error", "a row that cannot be read", ("error", "skip"))
    template: str = option("alpaca", "how a row becomes a prompt",
                           ("alpaca", "chatml", "gemma", "llama2", "llama3", "llama3.1", "mistral", "plain", "qwen", "qwen3"))
    system: str | None = option(None, "system prompt of every row, for chat templates: all but alpaca and plain")
    max_length: int = option(2048, "tokens in a sequence, template and end-of-sequence included", low=2)
    too_long: str = option("error", "a row over max_length: truncate cuts its end, split makes rows of its pieces", ("error", "truncate", "drop", "split"))
    packing: bool = option(True, "fill sequences with several rows; attention never crosses rows")
    skip: list[str] = option([], "rows to train without, as path:line, the way black boxes and errors name them; all others keep their places")
    shuffle: bool = option(True, "new order each epoch; false keeps the file's order, but for packed rows that fill a sequence begun before")
    cache: str = option("runs/.cache", "folder for tokenised rows, keyed by content")
    workers: int | None = option(None, "processes that tokenise, at most; one for each core if not given, and never more than one for each MiB of text", low=1)

    def sources(self, of: str) -> list[Source]:
        """Those of "train" or "validation", with all that they leave out."""
        value = getattr(self, of) or []
        found = [Source(**entry) for entry in value] if isinstance(value, list) else [Source(path=value)]
        for source in found:
            source.format = source.format or self.format
            fixed = [part for part in Path(source.path).parts if not glob.has_magic(part)]
            source.name = source.name or (Path(fixed[-1]).stem if fixed else of)
        return found


@dataclass
class Lora:
    rank: int = option(0, "rank of the adapters; 0 trains all weights instead", low=0)
    alpha: float = option(16.0, "adapters are scaled by alpha / rank", low=0)
    dropout: float = option(0.0, "share of an adapter's input zeroed in training", low=0, high=0.9)
    targets: list[str] = option(["q_proj", "v_proj"], "names of the linear layers that get adapters; all-linear: all but the head")
    rank_pattern: dict[str, int] = option({}, "other ranks, by layer name: {down_proj: 16}")
    alpha_pattern: dict[str, float] = option({}, "other alphas, by layer name")
    rslora: bool = option(False, "rsLoRA: scale by alpha / sqrt(rank)")
    dora: bool = option(False, "DoRA: also train the length of each row of the adapted weights")
    init: str = option("random", "A and B at the start; pissa: the largest singular parts of the weight, seconds a layer to find", ("random", "pissa"))
    modules_to_save: list[str] = option([], "trained whole, in fp32, beside the adapters", ("embed_tokens", "lm_head"))
    start: str | None = option(None, "adapter folder in PEFT layout to start from; it decides all of the above but dropout")

    @property
    def used(self) -> bool:
        return bool(self.rank or self.start)


@dataclass
class Optim:
    name: str = option("adamw", "adamw: weights, gradients and both moments in fp32, 16 bytes a parameter; adamw_bf16, for full fine-tuning: all four "
                       "in bf16 with stochastic rounding, 8 bytes", ("adamw", "adamw_bf16"))
    shard: bool = option(False, "each rank keeps the moments of its share of the parameters only (ZeRO); the result is the same")
    lr: float = option(2e-5, "peak learning rate", low=0)
    betas: list[float] = option([0.9, 0.999], "AdamW: decay of the first and second moment per step")
    eps: float = option(1e-8, "AdamW: added to the root of the second moment", low=0)
    weight_decay: float = option(0.0, "AdamW: decay of matrices; vectors are never decayed", low=0)
    lora_plus: float = option(1.0, "LoRA+: learning rate of LoRA's B matrices as a multiple of lr; its paper takes 16", low=0)
    clip_norm: float = option(1.0, "largest gradient norm, longer ones are scaled down; 0 never clips", low=0)
    schedule: str = option("cosine", "learning rate after warm-up", ("constant", "linear", "cosine", "wsd"))
    warmup_ratio: float = option(0.0, "share of all steps spent warming up", low=0, high=1)
    warmup_steps: int | None = option(None, "steps spent warming up, in place of warmup_ratio", low=0)
    decay_ratio: float = option(0.2, "wsd: share of all steps in the final decay", low=0, high=1)
    min_lr_ratio: float = option(0.0, "learning rate at the end, as a share of lr", low=0, high=1)


@dataclass
class Train:
    seed: int = option(0, "decides order, initial weights and dropout", low=0)
    device: str = option("auto", "auto takes CUDA where it is", ("auto", "cpu", "cuda"))
    epochs: int = option(1, "passes over the training rows", low=1)
    max_steps: int | None = option(None, "stop after this many optimizer steps", low=1)
    global_batch: int = option(32, "sequences in an optimizer step, over all ranks", low=1)
    micro_batch: int = option(4, "sequences in one forward on one rank, at most; ranks share a step by its cost and accumulate what they take", low=1)
    precision: str = option("fp32", "type of the arithmetic; bf16 and fp16 by autocast", ("fp32", "bf16", "fp16"))
    loss_scale: float = option(65536.0, "fp16: first loss scale; it halves on overflow", low=1)
    loss_scale_growth: int = option(2000, "fp16: steps without overflow after which the scale doubles", low=1)
    activation_checkpointing: int = option(0, "recompute activations: 0 never, 1 in every block, n in every n-th block", low=0)
    attention: str = option("auto", "attention over packed rows; auto names its choice: on GPUs varlen, torch's FlashAttention for packed documents, where it "
                            "can, and fused, our kernels, where those were found faster", ("auto", "varlen", "fused", "sdpa", "cpu", "reference"))
    deterministic: bool = option(True, "on CUDA: kernels that give the same bits each time, which resume and replay are held to; they may be slower")
    timeout_s: float = option(120.0, "seconds that ranks wait for one that makes no progress; then the run ends with exit code 5", low=1)


@dataclass
class Evaluate:
    every_steps: int = option(0, "steps between evaluations; 0: only at ends of epochs", low=0)
    each_epoch: bool = option(True, "evaluate at the end of each epoch")
    at_start: bool = option(True, "evaluate before the first step")
    rows: int = option(0, "validation rows that the loss is taken over, the first of each source; 0 takes all", low=0)
    exact_match_rows: int = option(0, "rows answered greedily and compared with their output; -1 all, 0 none", low=-1)
    exact_match_during: bool = option(False, "count exact matches at every evaluation, not only the last")
    max_new_tokens: int = option(128, "tokens generated at most for a row", low=1)
    samples: int = option(3, "rows whose answers are shown and sent to TensorBoard", low=0)


@dataclass
class Checkpoint:
    every_s: float = option(60.0, "seconds between checkpoints, more where they would hold training up for over 1 % of them; 0: none by the clock", low=0)
    every_steps: int = option(0, "steps between checkpoints, whatever they cost; 0: none by steps", low=0)
    each_epoch: bool = option(True, "save at the end of each epoch")
    keep: int = option(2, "newest checkpoints kept, beside the best", low=1)


@dataclass
class Resume:
    allow: list[str] = option([], "differences from the checkpoint's run that are meant, by the names in the refusal: optim.lr, data, weights, …")


@dataclass
class Export:
    kinds: list[str] = option(["auto"], "written at the end: adapter, model (adapters merged), gguf; auto: adapter with LoRA, else model; [] nothing",
                              ("auto", "adapter", "model", "gguf"))
    dtype: str = option("fp32", "type of a model's written weights", ("fp32", "bf16", "fp16"))
    gguf_type: str = option("bf16", "type of matrices in model.gguf", ("fp32", "bf16", "fp16", "q8_0"))
    verify_rows: int = option(8, "held-out rows, else training rows, on which what was written is compared with what was trained", low=1)
    max_kl: float = option(0.01, "mean KL divergence, nats a token, beyond which an export fails", low=0)


@dataclass
class Log:
    every_steps: int = option(1, "steps between lines on the console; metrics.jsonl has every step", low=1)
    tensorboard: bool = option(True, "write TensorBoard events")
    spike_z: float = option(8.0, "deviations above the median of the last losses from which on a loss is a spike: warned of, and a black box; 0 never", low=0)
    spike_window: int = option(64, "losses that median and deviation are taken of; none is judged before there are 20", low=20)


@dataclass
class Recipe:
    run: Run = field(default_factory=Run)
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    lora: Lora = field(default_factory=Lora)
    optim: Optim = field(default_factory=Optim)
    train: Train = field(default_factory=Train)
    evaluate: Evaluate = field(default_factory=Evaluate)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    resume: Resume = field(default_factory=Resume)
    export: Export = field(default_factory=Export)
    log: Log = field(default_factory=Log)


def options() -> dict[str, Any]:
    """`section.key` -> dataclass field, for every option."""
    return {f"{section.name}.{key.name}": key for section in fields(Recipe) for key in fields(section.default_factory)}


# Options that may differ between the launches of one run: they place, pace or show the work and leave its result alone.
# What data and model paths hold is compared by content instead.
HARDWARE = ("run.", "log.", "evaluate.", "checkpoint.", "resume.", "export.", "data.cache", "data.workers", "data.train", "data.validation", "model.path",
            "lora.start", "optim.shard", "train.device", "train.micro_batch", "train.activation_checkpointing", "train.attention", "train.timeout_s")
# Options in which the ranks of one launch may differ, too, as the disks of their nodes do.
PLACES = ("run.", "data.cache", "data.workers", "data.train", "data.validation", "model.path", "lora.start", "train.device")
CONTENT = ("data", "tokenizer", "weights", "adapter")  # by their digests: what the paths hold
# For commands that train a few steps again: what takes time and does not touch the weights is left out.
WITHOUT_EXTRAS = ("data.validation=null", "evaluate.exact_match_rows=0", "export.kinds=[]", "log.tensorboard=false")
# Options that decide which tensors a checkpoint holds, of what shape, type or meaning: made with another value none fits.
FIXED = ("model.add_tokens", "lora.rank", "lora.targets", "lora.rank_pattern", "lora.dora", "lora.init", "lora.modules_to_save", "optim.name")


def flat(recipe: Recipe) -> dict[str, Any]:
    """`section.key` -> value."""
    return {key: getattr(getattr(recipe, key.split(".")[0]), key.split(".")[1]) for key in options()}


def semantic(recipe: Recipe) -> dict[str, Any]:
    """The options that decide the result of a run."""
    return {key: value for key, value in flat(recipe).items() if not key.startswith(HARDWARE)}


def shared(recipe: Recipe) -> dict[str, Any]:
    """The options that are one value on all ranks: by many of them ranks decide what they exchange, and when."""
    return {key: value for key, value in flat(recipe).items() if not key.startswith(PLACES)}


def _wrong_allowances(names: list[str]) -> Iterator[tuple[str, str]]:
    allowable = [*(key for key in options() if not key.startswith(HARDWARE)), *CONTENT]
    for name in names:
        if name in FIXED:
            yield "resume.allow", f"got {name}, by which a checkpoint's tensors fit or do not: it cannot be allowed, choose another run.name"
        elif name not in allowable:
            free = name in options()
            yield "resume.allow", f"got {name}, which " + ("may differ anyway; take it out" if free else f"is no part of a run{_nearest(name, allowable)}")


def load(argv: list[str]) -> Recipe:
    """Defaults, then the recipe's YAML (first argument that is no `key=value`), then `key=value` arguments.

    Raises:
        EngineError: every mistake found, a line each, with file and line and the nearest valid key.
    """
    if "-h" in argv or "--help" in argv:
        print(help_text())
        sys.exit(0)
    overrides = [argument for argument in argv if "=" in argument]
    paths = [argument for argument in argv if "=" not in argument] or [DEFAULT_RECIPE]
    if len(paths) > 1:
        raise EngineError("CONFIG-ARGUMENTS", f"got recipes {', '.join(paths)}, expected one; options are written key=value")
    merged = OmegaConf.structured(Recipe)
    problems: list[str] = []
    where: dict[str, str] = {}
    for key, value, place in [*_leaves_of_file(Path(paths[0]), problems), *_leaves_of_arguments(overrides, problems)]:
        where[key] = place
        problem = _assign(merged, key, value)
        if problem:
            problems.append(f"{place}: {problem}")
    if not problems:
        recipe = OmegaConf.to_object(merged)
        recipe.run.name = recipe.run.name or Path(paths[0]).stem
        _expand(recipe)
        problems = [f"{where.get(key, paths[0])}: {key} {text}" for key, text in _contradictions(recipe)]
    if problems:
        raise EngineError("CONFIG-RECIPE", ("\n" + "ERROR E-CONFIG-RECIPE ").join(problems))
    return recipe


def _expand(recipe: Recipe) -> None:
    """~ at the start of every path, once: whoever takes one from here takes the same."""
    for section, key in ((recipe.run, "folder"), (recipe.model, "path"), (recipe.lora, "start"), (recipe.data, "cache")):
        setattr(section, key, (path := getattr(section, key)) and os.path.expanduser(path))
    for of in ("train", "validation"):
        value = getattr(recipe.data, of)
        if isinstance(value, list):
            setattr(recipe.data, of, [{**entry, "path": os.path.expanduser(entry["path"])} for entry in value])
        elif value:
            setattr(recipe.data, of, os.path.expanduser(value))


def dump(recipe: Recipe) -> str:
    """The resolved recipe as YAML; `load` gives the same recipe back."""
    return OmegaConf.to_yaml(OmegaConf.structured(recipe))


def help_text() -> str:
    lines = ["usage: python -m engine.train [RECIPE.yaml] [section.key=value ...]",
             "example: torchrun --nproc_per_node=8 -m engine.train recipes/llama2_7b_lora.yaml optim.lr=1e-4", ""]
    for key, spec in options().items():
        default = spec.default if spec.default is not MISSING else spec.default_factory()
        allowed = f" ({' | '.join(spec.metadata['choices'])})" if spec.metadata["choices"] else ""
        lines.append(f"  {key:<32} {spec.metadata['text']}{allowed} [{default}]")
    return "\n".join(lines)


def _leaves_of_file(path: Path, problems: list[str]) -> Iterator[tuple[str, Any, str]]:
    """(dotted key, value, path:line) for every leaf of a YAML recipe. Plain YAML: no tags, so nothing is executed."""
    try:
        with path.open("rb") as file:
            text = file.read(LARGEST + 1)
        if len(text) > LARGEST:
            problems.append(f"{path}: has more than {LARGEST:,} bytes; expected a recipe such as {DEFAULT_RECIPE}")
            return
        root = yaml.compose(text.decode("utf-8"), Loader=_Loader)
    except OSError as error:
        problems.append(f"{path}: cannot be read ({error.strerror}); expected a recipe such as {DEFAULT_RECIPE}")
        return
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        problems.append(f"{path}:{mark.line + 1 if mark else 1}: not YAML: {getattr(error, 'problem', error)}")
        return
    if root is not None:
        yield from _leaves_of_node(root, "", path, problems, set())


def _leaves_of_node(node: yaml.Node, prefix: str, path: Path, problems: list[str], seen: set) -> Iterator[tuple[str, Any, str]]:
    if not isinstance(node, yaml.MappingNode):
        problems.append(f"{path}:{node.start_mark.line + 1}: got a {node.id}, expected sections of options")
        return
    for key_node, value_node in node.value:
        if not isinstance(key_node, yaml.ScalarNode):
            problems.append(f"{path}:{key_node.start_mark.line + 1}: got a {key_node.id} as a name, expected an option's")
            continue
        key, place = prefix + str(key_node.value), f"{path}:{key_node.start_mark.line + 1}"
        if key in seen:
            problems.append(f"{place}: {key} is given twice; keep one")
            continue
        seen.add(key)
        if isinstance(value_node, yaml.MappingNode) and not prefix and key in {section.name for section in fields(Recipe)}:
            yield from _leaves_of_node(value_node, key + ".", path, problems, seen)
            continue
        try:
            yield key, _Loader("").construct_object(value_node, deep=True), place
        except (yaml.YAMLError, ValueError) as error:
            problems.append(f"{place}: {key}: {getattr(error, 'problem', error)}")


def _leaves_of_arguments(arguments: list[str], problems: list[str]) -> Iterator[tuple[str, Any, str]]:
    for argument in arguments:
        key, text = argument.split("=", 1)
        try:
            yield key, yaml.load(text, _Loader), "command line"
        except (yaml.YAMLError, ValueError, RecursionError):
            problems.append(f"command line: {argument if len(argument) < 200 else key}: the value is not YAML; quote it")


class _Loader(yaml.SafeLoader):
    """YAML as it looks: numbers are decimal (no octal 010, no 1:30 for 90; 1e-4 is one), dates are text, and no alias stands for
    what is elsewhere, as nine lines of aliases to aliases can stand for a billion values."""

    yaml_implicit_resolvers = {first: [(tag, form) for tag, form in found if tag.rpartition(":")[2] not in ("int", "float", "timestamp")]
                               for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()}

    def compose_node(self, parent: Any, index: Any) -> yaml.Node:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.composer.ComposerError(None, None, f"got the alias *{event.anchor}, expected what it stands for", event.start_mark)
        return super().compose_node(parent, index)


_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?(0|[1-9][0-9_]*)$"), list("-+0123456789"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(
    r"([-+]?([0-9][0-9_]*(\.[0-9_]*([eE][-+]?[0-9]+)?|[eE][-+]?[0-9]+)|\.[0-9][0-9_]*([eE][-+]?[0-9]+)?|\.(inf|Inf|INF))|\.(nan|NaN|NAN))$"),
    list("-+.0123456789"))


def _assign(merged: Any, key: str, value: Any) -> str | None:
    """Sets one option; returns what is wrong with it, if anything."""
    known = options()
    if key not in known:
        return f"unknown option {key}{_nearest(key, list(known))}"
    metadata = known[key].metadata
    kind = known[key].type
    if interpolated := _interpolation(value):
        return f"{key}: got {interpolated!r}, expected the value itself: a recipe is not filled in from elsewhere"
    if kind is Any and (problem := _wrong_sources(value)):
        return f"{key}{problem}"
    truth = isinstance(value, bool)
    if truth and kind is not bool or kind is bool and not truth and isinstance(value, int) or isinstance(value, (set, bytes)) or value == "???":
        return f"{key}: got {value!r}, expected {_kind(kind)}"  # OmegaConf would make something of it
    try:
        OmegaConf.update(merged, key, value, merge=False)
        value = OmegaConf.select(merged, key)
    except OmegaConfBaseException:
        return f"{key}: got {value!r}, expected {_kind(kind)}"
    wrong = [each for each in (value if kind == list[str] else [value]) if metadata["choices"] and each not in metadata["choices"]]
    if wrong:
        return f"{key}: got {wrong[0]!r}, expected one of {', '.join(metadata['choices'])}{_nearest(str(wrong[0]), metadata['choices'])}"
    low, high = metadata["low"], metadata["high"]
    if isinstance(value, float) and not math.isfinite(value):
        return f"{key}: got {value}, expected a finite number"
    if isinstance(value, (int, float)) and ((low is not None and not value >= low) or (high is not None and not value <= high)):
        return f"{key}: got {value}, expected {f'at least {low}' if high is None else f'{low} to {high}'}"
    return None


def _interpolation(value: Any) -> str | None:
    """A text with ${…}, at any depth. OmegaConf would read the environment for ${oc.env:NAME}, and the recipe's copy would show it."""
    if isinstance(value, (list, tuple, set)):
        return next(filter(None, map(_interpolation, value)), None)
    if isinstance(value, dict):
        return _interpolation([*value.keys(), *value.values()])
    return value if isinstance(value, str) and "${" in value else None


def _wrong_sources(value: Any) -> str | None:
    """What is wrong with a list of sources, if anything; a path is looked for later."""
    kinds = {"path": str, "format": str, "name": str, "repeat": int, "weight": (int, float)}
    if value is None or isinstance(value, str):
        return None
    if not isinstance(value, list) or not value:
        return f": got {value!r}, expected a path or a list of {{{', '.join(kinds)}}}"
    for number, entry in enumerate(value):
        if not isinstance(entry, dict):
            return f"[{number}]: got {entry!r}, expected {{path: …}}"
        for key, found in entry.items():
            if key not in kinds:
                return f"[{number}]: unknown key {key}{_nearest(str(key), list(kinds))}"
            if not isinstance(found, kinds[key]) or isinstance(found, bool):
                return f"[{number}].{key}: got {found!r}, expected {'text' if kinds[key] is str else 'a number'}"
        if not entry.get("path"):
            return f"[{number}]: got {entry!r}, expected a path as well"
        if entry.get("format", FORMATS[0]) not in FORMATS:
            return f"[{number}].format: got {entry['format']!r}, expected one of {', '.join(FORMATS)}{_nearest(entry['format'], FORMATS)}"
        if entry.get("repeat", 1) < 1 or not 0 < entry.get("weight", 1) < float("inf"):
            return f"[{number}]: got {entry}, expected repeat from 1 and a finite weight above 0"
    weighted = sum("weight" in entry for entry in value)
    if weighted and (weighted < len(value) or any("repeat" in entry for entry in value)):
        return ": weights are shares of each other: give every source one and none a repeat, or none a weight"
    return None


def _kind(kind: Any) -> str:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", dict[str, int]: "names with whole numbers",
             dict[str, float]: "names with numbers"}
    return names.get(kind, str(kind).replace("int | None", "a whole number or null").replace("str | None", "text or null"))


def _nearest(word: str, words: Any) -> str:
    """A suggestion, by the whole key first and then by its last part alone (`lr` for `optim.lr`)."""
    near = difflib.get_close_matches(word, words, n=1, cutoff=0.6)
    if not near:
        last = {full.rsplit(".", 1)[-1]: full for full in words}
        near = [last[name] for name in difflib.get_close_matches(word.rsplit(".", 1)[-1], last, n=1, cutoff=0.5)]
    return f"; did you mean {near[0]}?" if near else "; --help lists every option"


def _trained_whole(lora: Lora) -> list[str]:
    if not lora.start:
        return lora.modules_to_save
    try:
        return json.loads((Path(lora.start) / "adapter_config.json").read_text(encoding="utf-8")).get("modules_to_save") or []
    except (OSError, ValueError, AttributeError):
        return []  # reported where the adapter is read


def _contradictions(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """(key, what is wrong) for options that are each fine but not together, or that name what is not there."""
    if not recipe.model.path:
        yield "model.path", "is not given; expected a folder with config.json, or org/name[@revision] on the hub"
    elif not (Path(recipe.model.path) / "config.json").is_file() and not hub.is_name(recipe.model.path):
        yield "model.path", (f"got {recipe.model.path}, expected a folder with config.json, or org/name[@revision] on the hub; "
                             "other weights come in through engine.convert")
    if not recipe.data.train:
        yield "data.train", "is not given; expected a file, a directory or a glob of rows"
    for of in ("train", "validation"):
        sources = recipe.data.sources(of)
        for source in sources:
            if not (Path(source.path).exists() or glob.glob(source.path, recursive=True)):
                yield f"data.{of}", f"got {source.path}, expected a file that exists, a directory, or a glob that matches"
        if len({source.name for source in sources}) < len(sources):
            yield f"data.{of}", f"has sources of one name, {', '.join(source.name for source in sources)}; give each a name of its own"
    if recipe.data.system is not None and recipe.data.template in ("alpaca", "plain"):
        yield "data.system", f"is given, but data.template={recipe.data.template} has no place for a system prompt; remove it or take a chat template"
    yield from _wrong_allowances(recipe.resume.allow)
    if recipe.train.micro_batch > recipe.train.global_batch:
        yield "train.micro_batch", f"got {recipe.train.micro_batch}, expected at most train.global_batch = {recipe.train.global_batch}"
    if recipe.lora.rank and not recipe.lora.targets:
        yield "lora.targets", "is empty; name at least one linear layer, or set lora.rank=0 to train all weights"
    if recipe.lora.used and recipe.model.init == "random":
        yield "lora.rank", "needs a pretrained base, got model.init=random; set lora.rank=0"
    for key, least in (("rank_pattern", 1), ("alpha_pattern", 0)):
        if small := {name: value for name, value in getattr(recipe.lora, key).items() if value < least}:
            yield f"lora.{key}", f"got {small}, expected at least {least}"
    if recipe.model.add_tokens and recipe.lora.used and len(_trained_whole(recipe.lora)) < 2:
        yield "model.add_tokens", "with LoRA needs embedding and head in lora.modules_to_save, or in that of lora.start, for the new rows to be trained"
    if len(set(recipe.model.add_tokens)) < len(recipe.model.add_tokens) or "" in recipe.model.add_tokens:
        yield "model.add_tokens", f"got {recipe.model.add_tokens}, expected names that differ"
    if recipe.lora.start:
        if not (Path(recipe.lora.start) / "adapter_config.json").is_file():
            yield "lora.start", f"got {recipe.lora.start}, expected a folder with adapter_config.json"
        yield from ((f"lora.{key}", "is decided by lora.start; leave it out") for key, value in vars(Lora()).items()
                    if key not in ("start", "dropout") and getattr(recipe.lora, key) != value)
    in_bf16 = recipe.optim.name == "adamw_bf16"
    held = "bf16" if in_bf16 else "fp32"
    if in_bf16 and recipe.lora.used:
        yield "optim.name", "got adamw_bf16 with LoRA, expected adamw: adapters are small and held in fp32 (model.dtype=bf16 stores the base)"
    elif not recipe.lora.used and recipe.model.dtype != held:
        yield "model.dtype", (f"got {recipe.model.dtype} without LoRA, expected {held}: optim.name={recipe.optim.name} holds trained weights in {held} "
                              "(train.precision sets the arithmetic)")
    if in_bf16 and recipe.train.precision == "fp16":
        yield "train.precision", "got fp16 with optim.name=adamw_bf16, expected bf16 or fp32: fp16 does not reach as far as bf16 weights and gradients"
    if recipe.optim.lora_plus != 1 and not recipe.lora.used:
        yield "optim.lora_plus", f"got {recipe.optim.lora_plus} without LoRA, expected 1"
    if len(recipe.optim.betas) != 2 or not all(0 <= beta < 1 for beta in recipe.optim.betas):
        yield "optim.betas", f"got {recipe.optim.betas}, expected two numbers from 0 up to 1"
    if recipe.optim.warmup_ratio and recipe.optim.warmup_steps is not None:
        yield "optim.warmup_steps", "and optim.warmup_ratio are both given; keep one"
    if recipe.evaluate.exact_match_rows and not recipe.data.validation:
        yield "evaluate.exact_match_rows", "needs data.validation"
    if recipe.run.name and ("/" in recipe.run.name or recipe.run.name.startswith(".") or not recipe.run.name.isprintable()):
        yield "run.name", f"got {recipe.run.name!r}, expected a plain folder name; run.folder sets where it lies"
