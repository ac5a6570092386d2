"""What a step will hold in memory, found by taking it with tensors that have shapes and no content.

torch's fake tensors go the way of real ones through layers, recomputation, gradients and optimizer, at the speed of Python, and hold
nothing; a meter sees each storage come and go. A CPU's fakes stand for a GPU's too, for torch makes none where there is no GPU: sizes of
chunks are then the GPU's, and attention takes the path that it takes there. Not in it is what no tensor shows: CUDA's context and libraries, NCCL's
buffers, what a kernel needs for itself, and fragmentation.
"""

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from engine import adamw_bf16, adapter, attention, cpu_attention, loss, optim, precision
from engine.attention import PackedAttention
from engine.config import Recipe
from engine.distributed import World
from engine.dropout import DropoutKeys
from engine.models import weights

CPU, META = torch.device("cpu"), torch.device("meta")


@dataclass(frozen=True)
class Shape:
    """Of a micro-batch: tokens of each document and of each sequence, padding included, and supervised tokens."""

    documents: Sequence[int]
    sequences: Sequence[int]
    targets: int


@dataclass(frozen=True)
class Held:
    """Bytes that one rank holds: through a whole step, and at the most in each of its parts."""

    frozen: int
    trained: int
    gradients: int
    moments: int
    peaks: dict[str, int]

    @property
    def peak(self) -> int:
        return max(self.peaks.values())

    @property
    def part(self) -> str:
        """In which the peak is."""
        return max(self.peaks, key=self.peaks.__getitem__)

    @property
    def passing(self) -> int:
        """What comes and goes, at the peak: activations, logits, copies."""
        return self.peak - self.frozen - self.trained - self.gradients - self.moments


class Meter(TorchDispatchMode):
    """Counts the bytes of storages that are alive and were made, or seen, while it was on."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.most = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        found = function(*args, **(kwargs or {}))
        if isinstance(found, (Tensor, tuple, list)):  # of most calls that a fake makes about itself it is none
            tree_map_only(Tensor, self._see, found)
        return found

    def _see(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.known:
            self.known.add(storage._cdata)
            self.alive += storage.nbytes()
            self.most = max(self.most, self.alive)
            weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        return tensor

    def _gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.alive -= size


class Rehearsal:
    """A recipe's model and optimizer as one of `ranks` ranks holds them, without content.

    Args:
        base: the folder of model.path; its weights are not needed.
        ids: of the tokenizer before and after model.add_tokens.
        device: "cpu" or "cuda", which need not be there.
    """

    def __init__(self, cfg: Recipe, base: Path, ids: tuple[int, int], device: torch.device, ranks: int) -> None:
        self.cfg, self.device, self.keys = cfg, device, DropoutKeys(cfg.train.seed)
        dtype = precision.DTYPES[cfg.model.dtype]
        self.types = precision.choose(cfg.train.precision, dtype if cfg.lora.used else None, device)
        self.model = weights.build(base, "none", 0, dtype, self.types.residual, META, 0, cfg.model.dropout, self.keys)
        weights.add_rows(self.model, *ids)
        adapter.attach(self.model, cfg.lora, self.keys, cfg.train.seed)
        if device.type == "cpu":
            self.path, _ = attention.choose(cfg.train.attention, device, self.types.arithmetic, self.model.config)
        else:
            self.path = attention.expected(cfg.train.attention, self.types.arithmetic, self.model.config)
        self.fake, self.meter = FakeTensorMode(), Meter()
        with self._on():
            _without_content(self.model.train())
            self.kept = {name: one for name, one in self.model.named_parameters() if one.requires_grad or ".lora_" in name}
            self.trained = {name: one for name, one in self.kept.items() if one.requires_grad}
            self.buckets = self._gradients() if ranks > 1 else []  # DDP's, which stay
            self.optimizer = self._with_moments(ranks if cfg.optim.shard else 1)

    def step(self, shape: Shape, recompute: int, accumulate: bool) -> Held:
        """A step of one micro-batch of that shape, or of more than one.

        Args:
            recompute: as train.activation_checkpointing.
        """
        self.model.checkpoint_every = recompute
        tokens, peaks = sum(shape.documents), {}
        frozen, trained = ([one for one in self.model.parameters() if one.requires_grad == wanted] for wanted in (False, True))
        sizes = [sum(one.nbytes for one in some) for some in (frozen, trained, trained, self.moments)]
        with self._on():
            # All micro-batches but the first find gradients there, and so does the first where they lie in buckets.
            there = self.buckets or (self._gradients() if accumulate else [None] * len(self.trained))
            for parameter, gradient in zip(self.trained.values(), there, strict=True):
                parameter.grad = gradient
            del there, gradient
            first, *others = shape.sequences
            halves = [first, sum(others)] if others else [first]  # dropout draws for each by itself and lays them together: two take what many take
            self.keys.set(0, range(len(halves)), halves)
            ids, at, targets = (torch.zeros(count, dtype=torch.int64) for count in (tokens, shape.targets, shape.targets))
            with self._part("forward", peaks), replace(self.types, device=CPU).context():
                hidden = self.model(ids, ids, PackedAttention(shape.documents, CPU, self.path))
                summed = loss.summed_cross_entropy(hidden[at], self.model.lm_head.weight, targets)
                del hidden
            with self._part("backward", peaks):
                summed.backward()
                del summed
            with self._part("update", peaks):
                self._update()
            self.optimizer.zero_grad(set_to_none=True)
        return Held(*sizes, peaks)

    def _gradients(self) -> list[Tensor]:
        return [torch.zeros_like(one) for one in self.trained.values()]

    def _with_moments(self, shares: int) -> torch.optim.Optimizer:
        """The optimizer with its state, of which this rank has one of `shares`."""
        optimizer, _ = optim.build(self.trained, self.cfg.optim, 0, World(0, 1, 0, CPU))
        self.shares, self.moments = shares, []
        if shares > 1:  # whole parameters go to ranks, about equal in size
            self.moments = [torch.empty(-(-2 * sum(one.nbytes for one in self.trained.values()) // shares), dtype=torch.uint8)]
            return optimizer
        for parameter in self.trained.values():
            moments = {slot: torch.zeros_like(parameter) for slot in optim.SLOTS[1:]}
            self.moments += moments.values()
            # a fake has no number to read, which adamw_bf16 wants of its count
            optimizer.state[parameter] = {"step": 0 if self.cfg.optim.name == "adamw_bf16" else torch.zeros(()), **moments}
        return optimizer

    def _update(self) -> None:
        optim.unscale_and_clip(self.trained.values(), 2.0, 1.0, 1.0)
        if self.shares == 1:
            self.optimizer.step()

    @contextmanager
    def _on(self) -> Iterator[None]:
        """Fakes and meter, and what goes by the kind of device."""
        tables, masks = (loss.CHUNK_BYTES, adamw_bf16.CHUNK, attention.GROUPED), (attention._visible, cpu_attention._hidden)
        own = [table["cpu"] for table in tables]
        try:
            for table in tables:
                table["cpu"] = table[self.device.type]
            for mask in masks:  # which are kept from batch to batch: real ones would meet fakes, and fakes real ones
                mask.cache_clear()
            with self.fake, self.meter:
                yield
        finally:
            for table, size in zip(tables, own, strict=True):
                table["cpu"] = size
            for mask in masks:
                mask.cache_clear()

    @contextmanager
    def _part(self, name: str, peaks: dict[str, int]) -> Iterator[None]:
        self.meter.most = self.meter.alive
        yield
        peaks[name] = self.meter.most


def _without_content(model: nn.Module) -> None:
    """Puts fakes of the CPU in place of all tensors; where two modules share one they still do."""
    fakes: dict[int, Tensor] = {}
    for module in model.modules():
        for held in (module._parameters, module._buffers, vars(module)):
            for name, value in held.items():
                if isinstance(value, Tensor):
                    if id(value) not in fakes:
                        fake = torch.empty(value.shape, dtype=value.dtype)
                        fakes[id(value)] = nn.Parameter(fake, value.requires_grad) if isinstance(value, nn.Parameter) else fake
                    held[name] = fakes[id(value)]
