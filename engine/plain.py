"""What engine.verify holds the loop against: losses and gradients as plain sums, rows one at a time, attention with a dense mask.

Written to be seen to be right, not to be fast. It shares with the loop the model, the order of the rows and the optimizer, and
no loader, loss, attention kernel, process group or line of train.py. Everything is fp32, the loss float64.
"""

import json
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine import adapter, distributed, hub, optim, precision, rundir, tensorfile
from engine.attention import Angles, PackedAttention, relative_error
from engine.attention import choose as choose_attention
from engine.config import Recipe
from engine.data import added_tokens, dataset, loader
from engine.data.dataset import Dataset
from engine.data.plan import Plan
from engine.data.tokenizer import load_tokenizer
from engine.distributed import World
from engine.dropout import DropoutKeys
from engine.loss import summed_cross_entropy
from engine.models import FAMILIES, weights

TOKENS, ROWS = 1024, 24  # looked at beside the steps: a dense mask has the square of the tokens
PER_RANK = 1 << 30  # bytes of a process beside weights, gradients and moments


@dataclass(frozen=True)
class Subject:
    """A recipe's model at its start, and its rows in the order of its steps."""

    cfg: Recipe
    rows: Dataset
    plan: Plan
    world: World
    model: nn.Module
    keys: DropoutKeys

    @property
    def device(self) -> torch.device:
        return self.world.device

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}

    def loss(self, documents: Iterable[int], fill_to: int = 0) -> Tensor:
        """Sum of the negative log-likelihoods of some documents' supervised tokens, float64."""
        skipped = self.rows.skipped
        read = [tuple(part * (document not in skipped) for part in self.rows.read(document)) for document in documents]
        lengths = [len(ids) for ids, _ in read]
        if padding := max(fill_to - sum(lengths), 0):  # dropout draws its masks for a whole sequence
            read.append((np.zeros(padding, np.int64), np.zeros(padding, bool)))
            lengths.append(padding)
        ids = torch.from_numpy(np.concatenate([ids for ids, _ in read]).astype(np.int64)).to(self.device)
        positions = torch.cat([torch.arange(length) for length in lengths]).to(self.device)
        at, start = [], 0
        for length, (_, supervised) in zip(lengths, read, strict=True):
            at += [start + place - 1 for place in range(1, length) if supervised[place]]
            start += length
        hidden = self.model(ids, positions, PackedAttention(lengths, self.device, "reference"))
        logits = self.model.lm_head(hidden[at])
        return F.cross_entropy(logits.double(), ids[torch.tensor(at, dtype=torch.int64) + 1], reduction="sum")


def measure(own: Recipe, narrow: Recipe, wide: Recipe, steps: int, folder: Path) -> None:
    """Writes facts.json into `folder`, and gradients: those of the steps, plain-1.safetensors …, of packed.safetensors rows and of
    those rows alone.safetensors. Beside plain and alone ones lies what rounding makes of them, …-rounded.safetensors.

    Args:
        own: the user's recipe. narrow, wide: as engine.train is run for its gradients, with weights as stored and in fp32.
    """
    world = distributed.init(own.train.device, own.train.timeout_s, own.train.deterministic)
    base = hub.resolve(own.model.path, own.model.init == "pretrained")
    raw = weights.read_config(base.folder)
    with torch.device("meta"):
        family = FAMILIES[raw["model_type"]]
        count = sum(parameter.numel() for parameter in family.model(family.config(raw, str(base.folder))).parameters())
    bytes_wide, bytes_narrow = (count * _bytes_per_parameter(cfg) + PER_RANK for cfg in (wide, narrow))
    memory, gpus = _memory(world.device), torch.cuda.device_count() if world.device.type == "cuda" else 0
    cfg, need = (wide, bytes_wide) if bytes_wide <= memory else (narrow, bytes_narrow)
    subject = build(cfg, base, world)
    losses, rounded = plain_steps(subject, steps, folder)

    documents, began = some(subject.rows, subject.plan.step(0).trained), time.perf_counter()
    types = precision.choose(own.train.precision, precision.DTYPES[own.model.dtype] if own.lora.used else None, world.device)
    path, _ = choose_attention(own.train.attention, world.device, types.arithmetic, subject.model.config)
    off = packed_and_alone(subject, documents, path, folder)
    between = time.perf_counter()
    ratio = attention(subject, documents, path, types)
    machine = rundir.hardware()
    facts = {"parameters": count, "trained": sum(parameter.numel() for parameter in subject.trained.values()), "names": list(subject.trained),
             "losses": losses, "rounded": rounded, "packed": off, "packed_s": between - began, "documents": len(documents), "path": path,
             "type": str(types.arithmetic).removeprefix("torch."), "attention": ratio, "attention_s": time.perf_counter() - between,
             "wide": cfg is wide, "ranks": gpus or max(1, int(memory // need)),
             "room": f"{gpus} GPU here; train.device=cpu tries more" if gpus else f"memory for {int(memory // need)} processes here",
             "machine": ", ".join(machine["gpus"]) or f"{machine['cpu']}, {machine['cores']} cores"}
    (folder / "facts.json").write_text(json.dumps(facts), encoding="utf-8")


def build(cfg: Recipe, base: hub.Base, world: World) -> Subject:
    """As engine.train does; were it to differ, gradients would."""
    words = added_tokens.extend(base.folder, cfg.model.add_tokens, Path(cfg.data.cache))
    tokenizer, keys = load_tokenizer(words), DropoutKeys(cfg.train.seed)
    rows = dataset.load(cfg.data, "train", tokenizer, cfg.train.seed)
    dataset.check_fit(rows, None, tokenizer, weights.read_config(base.folder), len(cfg.model.add_tokens))
    plan = Plan(rows.lengths, rows.targets, cfg.data.max_length, cfg.train.global_batch, cfg.data.packing, cfg.data.shuffle, cfg.train.seed, cfg.train.epochs,
                rows.skipped)
    model = weights.build(base.folder, cfg.model.init, cfg.train.seed, precision.DTYPES[cfg.model.dtype], torch.float32, world.device,
                          cfg.train.activation_checkpointing, cfg.model.dropout, keys)
    weights.add_rows(model, tokenizer.size - len(cfg.model.add_tokens), tokenizer.size)
    adapter.attach(model, cfg.lora, keys, cfg.train.seed)
    return Subject(cfg, rows, plan, world, model.train(), keys)


def plain_steps(subject: Subject, steps: int, folder: Path) -> tuple[list[float], float]:
    """The mean loss of each step, and the largest change that rounding makes of one. Gradients go into files, with rounding's too."""
    losses, change = [], 0.0
    optimizer, _ = optim.build(subject.trained, subject.cfg.optim, subject.cfg.train.seed, subject.world)
    for number in range(steps):
        with rounding(subject.model):
            rounded = plain_step(subject, number, folder / f"plain-{number + 1}-rounded.safetensors")
        losses.append(plain_step(subject, number, folder / f"plain-{number + 1}.safetensors"))
        change = max(change, abs(losses[-1] - rounded))
        optimizer.step()
    optimizer.zero_grad()
    return losses, change


def plain_step(subject: Subject, number: int, path: Path) -> float:
    """A step's mean loss and, in a file, its gradient: one sequence after the other."""
    step, total = subject.plan.step(number), 0.0
    subject.model.zero_grad()
    for place, sequence in enumerate(step.sequences):
        subject.keys.set(number, [place], [max(int(subject.rows.lengths[sequence].sum()), step.fill_to)])
        loss = subject.loss(sequence, step.fill_to)
        (loss / step.num_targets).backward()
        total += loss.item() / step.num_targets
    tensorfile.save(gradients(subject), path)
    return total


@contextmanager
def rounding(model: nn.Module) -> Iterator[None]:
    """Every layer's output is off by one unit in its last place, up or down at random: what this changes is what fp32 cannot tell."""
    draw = torch.Generator(next(model.parameters()).device).manual_seed(0)

    def hook(module: nn.Module, inputs: tuple, out: Tensor) -> Tensor:
        return out * (1 + torch.finfo(torch.float32).eps * torch.empty_like(out).uniform_(-1, 1, generator=draw).sign())

    hooks = [module.register_forward_hook(hook) for module in model.modules() if not list(module.children())]
    yield
    for handle in hooks:
        handle.remove()


def gradients(subject: Subject) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in subject.trained.items() if parameter.grad is not None}


def some(rows: Dataset, documents: np.ndarray) -> list[int]:
    """The first of `documents`: ROWS, or as many as have TOKENS together, but one at least."""
    return documents[: min(ROWS, max(1, int((np.cumsum(rows.lengths[documents]) <= TOKENS).sum())))].tolist()


def packed_and_alone(subject: Subject, documents: list[int], path: str, folder: Path) -> tuple[float, float]:
    """Rows in one forward, with the loop's loader, loss and attention, against each by itself. Gradients go into files.

    Returns:
        the largest difference of a row's loss a token, and the largest that rounding makes of one.
    """
    model, device = subject.model.eval(), subject.device  # without dropout, whose masks go by the place in a sequence
    batch = loader.collate(subject.rows, [np.asarray(documents)], [0], device)
    row = torch.repeat_interleave(torch.arange(len(documents)), torch.tensor(batch.documents)).to(device)
    packed = torch.zeros(len(documents), dtype=torch.float64, device=device)
    hidden = model(batch.ids, batch.positions, PackedAttention(batch.documents, device, path))
    summed_cross_entropy(hidden[batch.at], model.lm_head.weight, batch.targets, row[batch.at], packed).backward()
    tensorfile.save(gradients(subject), folder / "packed.safetensors")
    model.zero_grad()

    def alone(name: str) -> Tensor:
        model.zero_grad()
        losses = [subject.loss([document]) for document in documents]
        torch.stack(losses).sum().backward()
        tensorfile.save(gradients(subject), folder / name)
        return torch.stack(losses).detach()

    with rounding(model):
        rounded = alone("alone-rounded.safetensors")
    each, targets = alone("alone.safetensors"), torch.from_numpy(subject.rows.targets[documents]).to(device).clamp(min=1)
    model.zero_grad()
    return float(((packed - each) / targets).abs().max()), float(((rounded - each) / targets).abs().max())


def attention(subject: Subject, documents: list[int], path: str, types: precision.Precision) -> float:
    """The error of a path, relative to what the reference has in the same type: the largest ratio of all layers, forward and backward."""
    model = subject.model.eval()
    batch = loader.collate(subject.rows, [np.asarray(documents)], [0], subject.device)
    compared = Compared(batch.documents, subject.device, path)
    model.arithmetic = types.residual
    with torch.no_grad(), types.context():
        model(batch.ids, batch.positions, compared)
    model.arithmetic = torch.float32
    return float(torch.tensor(compared.ratios).max())


class Compared:
    """Attention on the queries, keys and values that a model makes: by a path, and by the reference."""

    def __init__(self, lengths: list[int], device: torch.device, path: str) -> None:
        self.path, self.reference = PackedAttention(lengths, device, path), PackedAttention(lengths, device, "reference")
        self.ratios, self.draw = [], torch.Generator(device).manual_seed(0)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None, angles: Angles) -> Tensor:
        out = self.path(layer, q, k, v, window, angles)
        grad = torch.randn(out.shape, generator=self.draw, device=out.device).to(out.dtype)
        self.ratios.append(relative_error(self.path, self.reference, q, k, v, grad, window, angles))
        return out


def _bytes_per_parameter(cfg: Recipe) -> int:
    size = precision.DTYPES[cfg.model.dtype].itemsize
    return size if cfg.lora.used else 4 * size


def _memory(device: torch.device) -> float:
    """Bytes that may be used: what is free, and a margin off."""
    if device.type == "cuda":
        return 0.9 * torch.cuda.mem_get_info(device)[0]
    if not (meminfo := Path("/proc/meminfo")).exists():
        return 0.4 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    lines = meminfo.read_text(encoding="utf-8").splitlines()
    return 0.8 * 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
