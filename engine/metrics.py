"""What a step measured: to the console, to metrics.jsonl, to TensorBoard, with one set of names.

metrics.jsonl is the record, one line a step; TensorBoard shows the same numbers. Names that begin with a word of
MEASURED depend on the clock and the machine, all others on recipe and data alone and repeat bit for bit.
"""

import re
import resource
import sys
import time
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from engine import watchdog
from engine.config import Recipe, flat
from engine.data.dataset import Dataset
from engine.data.plan import Step
from engine.errors import warn
from engine.events import Events
from engine.record import Record

MEASURED = ("time/", "memory/", "train/tokens_per_s", "train/target_tokens_per_s", "train/mfu")

# Dense bf16/fp16 FLOP/s of a device as its maker states them, by words of its name.
PEAK_FLOPS = {"H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "B200": 2250e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12,
              "A10G": 125e12, "RTX 4090": 165e12, "RTX 3090": 71e12, "V100": 125e12, "T4": 65e12}


class Stopwatch:
    """Seconds spent in the named parts of a step. On a GPU by events in its stream, read once the step is over; its peak memory counts from here."""

    def __init__(self, device: torch.device) -> None:
        self.on_cuda = device.type == "cuda"
        if self.on_cuda:  # what loading, trials and probes took is none of a step's
            torch.cuda.reset_peak_memory_stats(device)
        self.start()

    def start(self) -> None:
        self.marks: list[tuple[str, Any]] = [("", self._now())]

    def waiting(self, part: str, items: Iterable[tuple[Step, Any]]) -> Iterator[tuple[Step, Any]]:
        """Goes over `items`. Waiting for one begins a step, and is spent in `part`."""
        iterator = iter(items)
        while True:
            self.start()
            try:
                item = next(iterator)
            except StopIteration:
                watchdog.mark("after the last step", own=True)
                return
            self.lap(part)
            watchdog.now.step = item[0].number + 1
            yield item

    def lap(self, part: str) -> None:
        """All since the last mark was spent in `part`."""
        self.marks.append((part, self._now()))
        watchdog.mark(f"after {part}")

    def read(self) -> dict[str, float]:
        """`time/<part>` for each part, and `time/step` for the whole."""
        seconds: dict[str, float] = {}
        for part, spent in self._laps():
            seconds[f"time/{part}"] = seconds.get(f"time/{part}", 0.0) + spent
        return {**seconds, "time/step": sum(seconds.values())}

    def spent(self, parts: Collection[str]) -> float:
        """Seconds in these parts so far."""
        return sum(spent for part, spent in self._laps() if part in parts)

    def _laps(self) -> list[tuple[str, float]]:
        return [(part, self._between(before, after)) for (_, before), (part, after) in zip(self.marks, self.marks[1:], strict=False)]

    def _now(self) -> Any:
        if not self.on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, before: Any, after: Any) -> float:
        if not self.on_cuda:
            return after - before
        after.synchronize()
        return before.elapsed_time(after) / 1000


class Flops:
    """Floating-point operations that training on given documents needs, recomputation not counted.

    A weight costs 2 a token forward, 2 for its input's gradient and 2 for its own where it is trained. The head counts
    at supervised tokens only, where it is applied; attention by the pairs of tokens of which one sees the other.
    """

    def __init__(self, model: nn.Module) -> None:
        frozen = trained = 0
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and name != "lm_head":  # an adapter's matrices are parameters of its layer
                for matrix in (parameter for parameter in module.parameters(recurse=False) if parameter.dim() == 2):
                    frozen, trained = frozen + matrix.numel() * (not matrix.requires_grad), trained + matrix.numel() * matrix.requires_grad
        config, head = model.config, model.lm_head.weight
        self.per_token = 4 * frozen + 6 * trained
        self.per_target = (6 if head.requires_grad else 4) * head.numel()
        # q·k and p·v forward, and five such products in the backward, which forms q·k again
        self.per_pair, self.windows = 3.5 * 4 * config.num_attention_heads * config.head_dim, config.windows

    def of(self, num_tokens: int, num_targets: int, lengths: np.ndarray) -> float:
        """Of documents of `lengths` tokens."""
        pairs = 0.0
        for window, layers in Counter(self.windows).items():
            seen = lengths if window is None else np.minimum(lengths, window)
            pairs += layers * float((seen * lengths - seen**2 / 2).sum())
        return self.per_token * num_tokens + self.per_target * num_targets + self.per_pair * pairs


def named_peak(name: str) -> float | None:
    """FLOP/s of a GPU of that name, as its maker states them."""
    return next((peak for words, peak in PEAK_FLOPS.items() if re.search(rf"\bG?{words}\b", name)), None)  # an L4 is no L40, but a GH200 has an H200


def peak_flops(device: torch.device) -> tuple[float, str]:
    """FLOP/s that a device could do, and where the number is from."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "this CPU"
    if (peak := named_peak(name)) is not None:
        return peak, f"{name}, by its maker"
    size, dtype, told = (4096, torch.bfloat16, "bf16") if device.type == "cuda" else (512, torch.float32, "fp32")  # a GPU's takes longer than its launch
    a = torch.ones(size, size, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(20):  # of which the fastest had the machine for itself
        began = time.perf_counter()
        (a @ a)[0, 0].item()
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best, f"{name}, measured on a product of {size} × {size} in {told}"


def zeros(count: int, device: torch.device) -> torch.Tensor:
    """Sums that begin, in float64."""
    return torch.zeros(count, dtype=torch.float64, device=device)


def of_step(rows: Dataset, step: Step, summed: list[float], times: dict[str, float], flops: Flops, peak: float, device: torch.device) -> dict[str, float]:
    """Losses, tokens, speed, seconds and memory of a step; arguments as below, `times` as a stopwatch reads them."""
    return {**losses(rows, step, summed), "train/tokens": step.num_tokens, "train/targets": step.num_targets,
            **speed(step, times["time/step"], flops, peak), **times, **memory(device)}


def losses(rows: Dataset, step: Step, summed: list[float]) -> dict[str, float]:
    """The step's loss, the mean over its targets. Of several sources also each one's, and its share of the targets: the mean of
    their losses weighed by these shares is the loss.

    Args:
        summed: negative log-likelihoods by source.
    """
    if not step.num_targets:  # no loss, and least of all 0
        return {}
    found = {"train/loss": sum(summed) / step.num_targets}
    if len(summed) > 1:
        targets = np.bincount(rows.source[step.documents], weights=step.targets, minlength=len(summed))
        for source, loss, count in zip(rows.sources, summed, targets.tolist(), strict=True):
            found |= {f"train/share/{source.name}": count / step.num_targets} | ({f"train/loss/{source.name}": loss / count} if count else {})
    return found


def speed(step: Any, seconds: float, flops: Flops, peak: float) -> dict[str, float]:
    """Real tokens a second, never padding; supervised tokens a second; the share of `peak` FLOP/s put to use."""
    return {"train/tokens_per_s": step.num_tokens / seconds, "train/target_tokens_per_s": step.num_targets / seconds,
            "train/mfu": flops.of(step.num_tokens, step.num_targets, step.lengths) / seconds / peak}


def memory(device: torch.device) -> dict[str, float]:
    """MB: the process's peak, and the GPU's where there is one."""
    unit = 2**20 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux kB
    found = {"memory/peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit}
    if device.type == "cuda":
        found["memory/peak_gpu_mb"] = torch.cuda.max_memory_allocated(device) / 2**20
        found["memory/gpu_mb"] = torch.cuda.memory_allocated(device) / 2**20
        if (share := utilisation(device)[0]) is not None:
            found["memory/gpu_utilisation_percent"] = share
    return found


def utilisation(device: torch.device) -> tuple[float | None, str]:
    """Percent of the last second or less in which the device had work, as NVML has it, and where the number is from; None, and why, where
    there is none: no nvidia-ml-py, no permission, a part of a GPU (MIG)."""
    if device.type != "cuda":
        return None, "not measured on a CPU"
    try:
        return float(torch.cuda.utilization(device)), "by NVML"
    except ModuleNotFoundError:
        return None, "not measured: nvidia-ml-py is not installed; pip install -c constraints.txt -e '.[gpu]'"
    except Exception as error:  # NVML's own classes of error cannot be named without its package, and a figure is no reason to stop
        return None, f"not measured: NVML says {str(error) or type(error).__name__}"


class Log:
    """Rank 0's record of a run; on other ranks every call does nothing.

    Args:
        done: steps already done; lines and events of later ones, from a launch that was cut off, go.
        again: the last one's go too, as it is told of once more.
    """

    def __init__(self, folder: Path, done: int, num_steps: int, every_steps: int, tensorboard: bool, speaks: bool, again: bool = False) -> None:
        self.speaks, self.every_steps, self.num_steps = speaks, every_steps, num_steps
        self.began, self.done = time.perf_counter(), done - again
        if not speaks:
            return
        last = self.done if done else -1
        self.record = Record(folder / "metrics.jsonl", last)
        self.events = Events(folder / "tensorboard", last) if tensorboard else None
        self.bar = tqdm(total=num_steps, initial=self.done, unit="step", disable=not sys.stderr.isatty(), dynamic_ncols=True)

    def say(self, text: str) -> None:
        if self.speaks:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def step(self, step: int, scalars: dict[str, float]) -> None:
        """One step's line. Of a checkpoint some numbers come as text, see `record.plain`."""
        if not self.speaks:
            return
        scalars = {name: float(value) if isinstance(value, str) else value for name, value in scalars.items()}
        self.record.add({"step": step, **scalars})
        if self.events:
            self.events.scalars(step, scalars)
        if step == 0:
            self.say(f"before training: {_judgement(scalars)}")
            return
        self.bar.update(1)
        if not scalars["train/targets"]:
            warn(f"step {step} has no target left, as data.skip names all its rows; nothing was updated")
        if step % self.every_steps == 0 or step == self.num_steps or "validation/loss" in scalars:
            self.say(self._line(step, scalars))

    def _line(self, step: int, scalars: dict[str, float]) -> str:
        left = (time.perf_counter() - self.began) / (step - self.done) * (self.num_steps - step)
        memory_mb = scalars.get("memory/peak_gpu_mb", scalars["memory/peak_rss_mb"])
        skipped = "  skipped: overflow" if scalars.get("train/skipped") and scalars["train/targets"] else ""
        loss = f"loss {scalars['train/loss']:.4f}" if "train/loss" in scalars else "no loss"
        checked = f"  {_judgement(scalars)}" if "validation/loss" in scalars else ""
        return (f"step {step:>{len(str(self.num_steps))}}/{self.num_steps}  {loss}  lr {scalars['train/lr']:.2e}  "
                f"norm {scalars['train/grad_norm']:.3f}  {scalars['train/tokens_per_s']:,.0f} tok/s  {memory_mb:,.0f} MB  eta {_clock(left)}{checked}{skipped}")

    def settle(self) -> None:
        """Brings what is logged so far onto the disk."""
        if self.speaks:
            self.record.settle()
            if self.events:
                self.events.settle()

    def text(self, name: str, text: str, step: int) -> None:
        if self.speaks and self.events:
            self.events.text(name, text, step)

    def hparams(self, recipe: Recipe, results: dict[str, float]) -> None:
        """The recipe's options beside the final figures, for TensorBoard's table of runs."""
        if self.speaks and self.events:
            plain = {key: value if isinstance(value, (int, float, str, bool)) else str(value) for key, value in flat(recipe).items()}
            self.events.hparams(plain, {f"final/{name}": value for name, value in results.items()})

    def close(self) -> None:
        if self.speaks:
            self.bar.close()
            self.record.close()
            if self.events:
                self.events.close()


def _judgement(scalars: dict[str, float]) -> str:
    exact = f", exact match {100 * scalars['validation/exact_match']:.1f} %" if "validation/exact_match" in scalars else ""
    return f"validation loss {scalars['validation/loss']:.4f}{exact}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
