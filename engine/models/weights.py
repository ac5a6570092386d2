"""Weights between a Hugging Face folder and a model: safetensors only, every name and shape accounted for.

A folder is `config.json` with `model.safetensors`, or with shards and their `model.safetensors.index.json`.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine import tensorfile
from engine.dropout import DropoutKeys, mix
from engine.errors import CHECKPOINT, SECURITY, EngineError
from engine.linear import widened
from engine.models import FAMILIES

INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9


def read_config(folder: Path) -> dict[str, Any]:
    """The content of config.json, of a family that exists here."""
    try:
        raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise EngineError("MODEL-CONFIG", f"{folder / 'config.json'}: cannot be read: {error}; expected a model folder in Hugging Face layout") from error
    kind = raw.get("model_type") if isinstance(raw, dict) else None
    if not (isinstance(kind, str) and kind in FAMILIES):
        raise EngineError("MODEL-FAMILY", f"{folder / 'config.json'}: model_type is {kind!r}, expected one of {', '.join(FAMILIES)}")
    return raw


def build(folder: Path, init: str, seed: int, dtype: torch.dtype, arithmetic: torch.dtype, device: torch.device,
          checkpoint_every: int = 0, dropout: float = 0.0, keys: DropoutKeys | None = None) -> nn.Module:
    """The model of a folder, with its weights in `dtype` on `device`.

    Args:
        init: "pretrained" reads the folder's safetensors; "random" draws weights from `seed`, the same on every rank; "none" leaves them
            without content, for what looks at shapes alone.
    """
    raw = read_config(folder)
    family = FAMILIES[raw["model_type"]]
    config = family.config(raw, str(folder / "config.json"))
    with torch.device("meta"):
        model = family.model(config, arithmetic, checkpoint_every, dropout, keys)
    if init == "none":
        tensors = ((name, torch.empty(tensor.shape, dtype=dtype, device="meta")) for name, tensor in model.named_parameters())
    elif init == "random":
        tensors = ((name, tensor.to(device).to(dtype)) for name, tensor in _random_tensors(model, config.initializer_range, seed))
    else:
        tensors = read_folder(folder, {name: tensor.shape for name, tensor in model.state_dict().items()},
                              {"lm_head.weight"} if config.tie_word_embeddings else set(), dtype, device)
    for name, tensor in tensors:
        if not tensor.is_meta and not all(map(math.isfinite, torch.aminmax(tensor))):
            raise EngineError("MODEL-NOT-FINITE", f"{folder}: {name} holds NaN or an infinity, expected numbers; fetch or convert the weights again")
        owner = model.get_submodule(name.rpartition(".")[0])
        owner._parameters[name.rpartition(".")[2]] = nn.Parameter(tensor)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model


def _random_tensors(model: nn.Module, std: float, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Normal matrices with the config's deviation, norms that change nothing, no bias, as Hugging Face initialises Llama."""
    for number, (name, tensor) in enumerate(model.named_parameters()):
        if tensor.dim() == 1:
            yield name, torch.full(tensor.shape, getattr(model.get_submodule(name.rpartition(".")[0]), "neutral", 0.0))
        else:
            yield name, torch.empty(tensor.shape).normal_(0, std, generator=torch.Generator().manual_seed(mix(seed, number) >> 1))


@torch.no_grad()
def add_rows(model: nn.Module, first: int, last: int) -> None:
    """Makes room for the ids first … last - 1 of tokens that were added: their rows of embedding and head are the mean of the
    rows before them, so that a new token starts as likely, and as near to others, as tokens are on average.

    Rows that a model has beyond its tokenizer's ids are used before new ones are made.
    """
    if first == last:
        return
    embedding, head = model.model.embed_tokens, model.lm_head
    tied = head.weight is embedding.weight
    for layer in (embedding,) if tied else (embedding, head):
        old = layer.weight
        new = torch.cat((old, old.new_empty(max(0, last - len(old)), old.shape[1])))
        new[min(first, len(old)) : last] = widened(old[:first]).mean(0).to(old.dtype)  # a tokenizer may have ids beyond the rows that nothing used
        layer.weight = nn.Parameter(new, requires_grad=old.requires_grad)
    if tied:
        head.weight = embedding.weight
    embedding.num_embeddings = head.out_features = len(embedding.weight)
    model.config = dataclasses.replace(model.config, vocab_size=len(embedding.weight))


def read_folder(folder: Path, expected: dict[str, torch.Size], tied: set[str], dtype: torch.dtype, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) for every expected name, in `dtype` on `device`, one at a time, after all names and shapes were compared.

    Args:
        tied: names that may be absent, because the model shares them with another.

    Raises:
        EngineError: a list of what is missing, unexpected or misshapen; a file that is no safetensors.
    """
    files = _files(folder)
    shapes: dict[str, list[int]] = {}
    for path in files:
        with _opened(path) as file:
            if twice := sorted(shapes.keys() & file.entries.keys()):
                raise EngineError("MODEL-WEIGHTS", f"{path}: has {twice[0]}, which another file of the folder has too; fetch or convert them again")
            shapes.update({name: entry.shape for name, entry in file.entries.items()})
    ignored = {name for name in shapes if name.endswith("rotary_emb.inv_freq")}  # older exports stored this constant
    problems = [f"  missing    {name} {list(shape)}" for name, shape in expected.items() if name not in shapes and name not in tied]
    problems += [f"  unexpected {name} {shape}" for name, shape in shapes.items() if name not in expected and name not in ignored]
    problems += [f"  misshapen  {name}: file has {shapes[name]}, config.json means {list(shape)}"
                 for name, shape in expected.items() if name in shapes and list(shape) != shapes[name]]
    if problems:
        shown = problems[:20] + ([f"  … and {len(problems) - 20} more"] if len(problems) > 20 else [])
        raise EngineError("MODEL-WEIGHTS", f"{folder}: weights do not fit config.json:\n" + "\n".join(shown))
    for path in files:
        with _opened(path) as file:
            for name in file.entries:
                if name in expected and name not in tied:
                    yield name, file.tensor(name, dtype, device)


def _files(folder: Path) -> list[Path]:
    """Those that hold a folder's weights. One may be a link, as all are in the hub's cache; what it leads to is read as weights or not at all."""
    index, single = folder / INDEX, folder / "model.safetensors"
    if index.is_file():
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise EngineError("MODEL-WEIGHTS", f"{index}: cannot be read: {error!r}; expected weight_map, the file of each tensor") from error
        for name in names:
            if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
                raise EngineError("MODEL-PATH", f"{index}: names {name!r}, expected the plain name of a .safetensors file beside it", SECURITY)
        return [folder / name for name in sorted(names)]
    if single.is_file():
        return [single]
    if pickled := [*folder.glob("*.bin"), *folder.glob("*.pth"), *folder.glob("*.pt")]:
        raise EngineError("MODEL-PICKLE", f"{pickled[0]}: is a pickle, which can run code when read, and is never loaded; "
                          f"where you trust it, convert it: transformers.AutoModelForCausalLM.from_pretrained('{folder}').save_pretrained('NEW')", SECURITY)
    raise EngineError("MODEL-WEIGHTS", f"{folder}: has neither model.safetensors nor {INDEX}; set model.init=random to start without weights")


@contextmanager
def _opened(path: Path) -> Iterator[tensorfile.Reader]:
    try:
        with tensorfile.Reader(path) as file:
            yield file
    except (OSError, ValueError) as error:
        raise EngineError("MODEL-WEIGHTS", f"{path}: cannot be read as safetensors: {error}; fetch or convert it again") from error


def write_folder(folder: Path, raw_config: dict[str, Any], tensors: Iterable[tuple[str, Tensor]]) -> None:
    """config.json and safetensors, in shards of at most SHARD_BYTES, into a folder that exists. No tensor is held longer than its shard."""
    shard: dict[str, Tensor] = {}
    names: list[list[str]] = []  # of each shard that is written
    dtypes, size, total = set(), 0, 0

    def write() -> None:
        tensorfile.save(shard, folder / f"{len(names)}.safetensors")
        names.append(list(shard))
        shard.clear()

    for name, tensor in tensors:
        if shard and size + tensor.nbytes > SHARD_BYTES:
            write()
            size = 0
        shard[name] = tensor
        dtypes.add(str(tensor.dtype).removeprefix("torch."))
        size, total = size + tensor.nbytes, total + tensor.nbytes
    write()
    files = ["model.safetensors"] if len(names) == 1 else [f"model-{number + 1:05d}-of-{len(names):05d}.safetensors" for number in range(len(names))]
    for number, file in enumerate(files):
        (folder / f"{number}.safetensors").rename(folder / file)
    config = {**raw_config, "torch_dtype": dtypes.pop() if len(dtypes) == 1 else "float32"}
    config.pop("dtype", None)
    texts = {"config.json": config}
    if len(files) > 1:
        texts[INDEX] = {"metadata": {"total_size": total}, "weight_map": {name: file for file, own in zip(files, names, strict=True) for name in own}}
    for name, content in texts.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def untied(model: nn.Module) -> dict[str, Tensor]:
    """The model's tensors by name, without the head where it is the embedding."""
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    return {name: tensor for name, tensor in model.state_dict().items() if name not in tied}


def load_kept(kept: dict[str, nn.Parameter], saved: tensorfile.Reader) -> None:
    """Reads a checkpoint's weights into the parameters of the same names.

    Raises:
        EngineError: names or shapes differ; nothing was copied.
    """
    own, theirs = ({name: f"{list(one.shape)} {str(one.dtype).removeprefix('torch.')}" for name, one in some.items()} for some in (kept, saved.entries))
    if wrong := [name for name in sorted(own.keys() | theirs.keys()) if own.get(name) != theirs.get(name)]:
        told = "; ".join(f"{name}: expected {own.get(name, 'nothing')}, found {theirs.get(name, 'nothing')}" for name in wrong[:5])
        raise EngineError("CHECKPOINT-WEIGHTS", f"the checkpoint's weights are not the model's: {told}", CHECKPOINT)
    for name, parameter in kept.items():
        saved.fill(name, parameter.detach())


def identity(model: nn.Module, folder: Path, init: str) -> str:
    """What a run started from, and what its frozen weights are: the folder's config, and SHA-256 over the frozen weights' bytes.

    Trained weights and all of adapters are not in it: a checkpoint holds them. Of a start by PiSSA the bits depend on threads and libraries.
    """
    total = hashlib.sha256(json.dumps([init, read_config(folder)], sort_keys=True).encode())
    for name, parameter in sorted(model.named_parameters()):
        if not parameter.requires_grad and ".lora_" not in name:
            total.update(f"{name} {parameter.dtype} {list(parameter.shape)}".encode())
            total.update(parameter.detach().contiguous().cpu().flatten().view(torch.uint8).numpy())
    return total.hexdigest()
