"""Proves on your own model, rows and machine what the engine promises, in a minute or two, and prints what it measured.

    python -m engine.verify recipes/quickstart.yaml
    python -m engine.verify recipes/smollm2_135m_lora.yaml train.device=cpu

It runs engine.train itself, a few steps of a slice of the global batch, split over ranks and micro-batches in several
ways, and compares with a plain sum over the sequences. That sum is written down here, and shares with the loop the model,
the order of the rows and the optimizer, but no loader, loss, attention kernel, process group or line of train.py.
"""

import json
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from engine import config
from engine.arguments import Parser
from engine.errors import BUG, DONE, ENVIRONMENT, EngineError, last, recorded, run

EXAMPLE = "python -m engine.verify recipes/quickstart.yaml train.device=cpu"
SEQUENCES, STEPS = 8, 2  # of a step; of a split
SPLITS = ((1, 1), (1, 3), (2, 1), (2, 3), (4, 1))  # ranks × micro-batch; three of eight: the last micro-batch is a smaller one
# What fp32 cannot tell differs from model to model: a unit in the last place of every layer's output changes 4e-7 of the quickstart's
# gradient and 3e-6 of SmolLM2-135M's. So it is measured, and a difference may be some times that. It may always be the least below: on
# CPUs a product with fewer than four rows sums a vocabulary ten times less exactly, which made 8e-5 where rows had two targets. A mean
# of means makes 1e-1, one target too many among N makes 1/N. bf16 weights, where fp32 ones do not fit, round gradients at 4e-3.
ROUNDINGS, LEAST_LOSS, LEAST, LEAST_BF16 = 10, 1e-5, 2e-4, 3e-2
ATTENTION = 2.0  # times the reference's own error in the same type

SLICE = (*config.WITHOUT_EXTRAS, "checkpoint.every_steps=1", "checkpoint.keep=3", "train.epochs=3")
# A checkpoint holds AdamW's first moment, with a beta of 0 the gradient itself. An eps of 1 makes the update about lr × gradient: it moves
# LoRA's B, without which A has no gradient in the second step, and does not blow up what rounding left of gradients that are zero.
SPLIT = ("train.precision=fp32", f"train.max_steps={STEPS}", "optim.betas=[0,0.999]", "optim.eps=1", "optim.lr=0.01", "optim.clip_norm=0",
         "optim.schedule=constant", "optim.warmup_ratio=0", "optim.warmup_steps=0")
IN_FP32 = ("optim.name=adamw", "model.dtype=fp32")  # where weights are trained in bf16


def main(argv: list[str]) -> int:
    parser = Parser("verify", EXAMPLE, "Proves on a recipe's own model and rows and on this machine: the same loss and gradient for every split "
                    "over ranks, micro-batches and accumulation; equal replicas; bit-exact resume; packed rows as if each were alone; the "
                    "attention in use as its reference. Leaves nothing behind. Exit code 0, or 70 with what failed.")
    parser.add_argument("recipe", nargs="*", metavar="RECIPE.yaml | section.key=value", help="as engine.train takes them")
    argv = parser.parse_args(argv).recipe
    cfg = config.load(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the folder is removed then, too
    Path(cfg.run.folder).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".verify-", dir=cfg.run.folder) as folder:
        table = Table()
        prove(Runs(argv, cfg, Path(folder).resolve()), cfg, table)
    if table.failed:
        raise EngineError(*table.failed[0], BUG)
    print(f"All {table.held} checks hold" + f"; {table.skipped} not possible on this machine" * bool(table.skipped))
    return DONE


@dataclass(frozen=True)
class Result:
    """`holds`: None where nothing could be measured."""

    measured: str
    limit: str = ""
    holds: bool | None = False


@dataclass
class Table:
    """Checks as lines, each printed when it is done. `failed`: name and text of the error of each that does not hold."""

    failed: list[tuple[str, str]] = field(default_factory=list)
    held: int = 0
    skipped: int = 0

    def check(self, kind: str, name: str, measure: Callable[[], Result]) -> None:
        self.begin(name)
        began = time.perf_counter()
        self.row(kind, name, measure(), time.perf_counter() - began)

    def begin(self, name: str) -> None:
        if sys.stderr.isatty():
            print(f"\033[K[{'#' * (self.held + self.skipped + len(self.failed)):<9}] {name}", end="\r", file=sys.stderr, flush=True)

    def row(self, kind: str, name: str, result: Result, seconds: float) -> None:
        verdict = {True: "ok", False: "FAIL", None: "-"}[result.holds]
        print(f"{name:<53}{result.measured:<42}{result.limit:<18}{verdict:<4}{seconds:6.1f} s", flush=True)
        self.held, self.skipped = self.held + (result.holds is True), self.skipped + (result.holds is None)
        if result.holds is False:
            self.failed.append((f"VERIFY-{kind}", f"{name}: {result.measured}" + f", expected at most {result.limit}" * bool(result.limit)))


def prove(runs: "Runs", cfg: config.Recipe, table: Table) -> None:
    table.begin("model, and plain sums")
    facts = runs.plain()
    in_fp32 = IN_FP32 * facts["wide"] if cfg.optim.name == "adamw_bf16" else ()
    in_fp32 += ("train.attention=auto",) * (cfg.train.attention in ("fused", "varlen"))  # which are made for 16 bits
    print(f"{facts['parameters']:,} parameters, {facts['trained']:,} trained; {runs.sequences} sequences a step (the recipe: {cfg.train.global_batch}); "
          f"{facts['machine']}\n\n{'check':<53}{'measured':<42}limit")
    least = LEAST if facts["wide"] or cfg.optim.name == "adamw" else LEAST_BF16

    def compared(found: list[tuple[Path, str, str]], loss: float, rounded_loss: float) -> Result:
        """A loss, and gradients as (file, what names in it end in, the file of what they should be), within their limits or not."""
        gradient = max(apart(path, suffix, runs.folder / f"{expected}.safetensors") for path, suffix, expected in found)
        rounded = max(apart(runs.folder / f"{expected}-rounded.safetensors", "", runs.folder / f"{expected}.safetensors") for _, _, expected in found)
        most_loss, most = max(LEAST_LOSS, ROUNDINGS * rounded_loss), max(least, ROUNDINGS * rounded)
        return Result(f"loss {loss:.1e}, gradient {gradient:.1e}", f"{most_loss:.1e}, {most:.1e}", loss <= most_loss and gradient <= most)

    table.row("ATTENTION", f"attention {facts['path']} = reference, {facts['type']}", Result(
        f"{facts['attention']:.2f} × the reference's own error", f"{ATTENTION:g} ×", facts["attention"] <= ATTENTION), facts["attention_s"])
    packed = compared([(runs.folder / "packed.safetensors", "", "alone")], *facts["packed"])
    table.row("PACKED", f"packed = alone, {facts['documents']} rows, fp32", packed, facts["packed_s"])

    apart_on: dict[int, str | None] = {}  # by number of ranks: what engine.train said of replicas

    def split(size: int, micro_batch: int) -> Result:
        if size > facts["ranks"]:
            return Result(f"not possible: {facts['room']}", holds=None)
        run = runs.folder / "split"
        shutil.rmtree(run, ignore_errors=True)  # one that failed would be resumed
        problem = runs.train(size, "split", *SPLIT, *in_fp32, f"train.micro_batch={micro_batch}")
        apart_on[size] = apart_on.get(size) or (problem if problem and "E-PEER-REPLICA" in problem else None)
        if problem:
            return Result("not reached: replicas differ, see below" if apart_on[size] else problem, holds=None if apart_on[size] else False)
        losses = [json.loads(line)["train/loss"] for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        loss = max(abs(one - other) for one, other in zip(losses, facts["losses"], strict=True))
        checkpoints = {step: run / f"checkpoints/step-{step:09d}/optimizer.safetensors" for step in range(1, STEPS + 1)}
        return compared([(path, ".exp_avg", f"plain-{step}") for step, path in checkpoints.items()], loss, facts["rounded"])

    def replicas() -> Result:
        """engine.train looks at them before each checkpoint."""
        sizes = [size for size in apart_on if size > 1]
        if not sizes:
            return Result(f"not possible: {facts['room']}", holds=None)
        problem = next((apart_on[size] for size in sizes if apart_on[size]), None)
        return Result(problem) if problem else Result(f"{len(facts['names'])} tensors alike on {' and '.join(map(str, sizes))} ranks", "every bit", True)

    def resume(size: int) -> Result:
        """Three steps at once; then all that came after the first is taken away, as if a kill had come there, and the run is resumed."""
        run, checkpoints = runs.folder / "resume", runs.folder / "resume/checkpoints"
        if problem := runs.train(size, "resume", "train.max_steps=3"):
            return Result(problem)
        (checkpoints / "step-000000003").rename(runs.folder / "whole")
        shutil.rmtree(checkpoints / "step-000000002")
        (run / "finished.json").unlink()
        first = (checkpoints / "step-000000001").stat().st_ino
        if problem := runs.train(size, "resume", "train.max_steps=3"):
            return Result(problem)
        if (checkpoints / "step-000000001").stat().st_ino != first:
            return Result("started from scratch in place of resuming from the checkpoint")
        differ, total = 0, 0
        for name in ("model.safetensors", "optimizer.safetensors"):
            one, other = (np.fromfile(folder / name, np.uint8) for folder in (runs.folder / "whole", checkpoints / "step-000000003"))
            total += len(one)
            differ += int((one != other).sum()) if len(one) == len(other) else abs(len(one) - len(other))
        return Result(f"{differ:,} of {total:,} bytes differ", "0", differ == 0)

    for size, micro_batch in dict.fromkeys((size, min(largest, cfg.train.micro_batch, runs.sequences)) for size, largest in SPLITS):
        accumulation = -(-runs.sequences // (size * micro_batch))
        table.check("SPLIT", f"{ranks(size)} × micro-batch {micro_batch} × accumulation {accumulation}, fp32", partial(split, size, micro_batch))
    table.check("REPLICAS", "replicas alike after each step", replicas)
    size = max(size for size, _ in SPLITS if size <= facts["ranks"])
    table.check("RESUME", f"resumed = undisturbed, {ranks(size)}, {cfg.train.precision}", partial(resume, size))


class Runs:
    """Processes that work on a slice of a recipe, in `folder`."""

    def __init__(self, argv: list[str], cfg: config.Recipe, folder: Path) -> None:
        self.argv, self.folder, self.sequences = argv, folder, min(SEQUENCES, cfg.train.global_batch)
        self.slice = [*argv, *SLICE, f"train.global_batch={self.sequences}", f"train.micro_batch={min(cfg.train.micro_batch, self.sequences)}",
                      f"run.folder={json.dumps(str(folder))}"]
        import torch

        from engine import plain, train  # all that ranks need, before they are forked

        self.main, self.measure, self.threads = train.main, plain.measure, torch.get_num_threads()
        torch.set_num_threads(1)  # here, where a pool of threads would not outlive a fork

    def train(self, size: int, name: str, *options: str) -> str | None:
        """Runs engine.train to its end on `size` ranks; says what is wrong with the engine where it does not get there."""
        return self._run(size, lambda _: self.main([*self.slice, *options, f"run.name={name}"]), self.folder / name)

    def plain(self) -> dict[str, Any]:
        """facts.json of `plain.measure`."""
        own, narrow = config.load(self.slice), config.load([*self.slice, *SPLIT])
        wide = config.load([*self.slice, *SPLIT, *IN_FP32]) if own.optim.name == "adamw_bf16" else narrow

        def measure(_: list[str]) -> None:
            with recorded(self.folder / "last_error.json", 0):
                self.measure(own, narrow, wide, STEPS, self.folder)

        if problem := self._run(1, measure, self.folder):
            raise EngineError("VERIFY-PLAIN", problem, BUG)
        return json.loads((self.folder / "facts.json").read_text(encoding="utf-8"))

    def _run(self, size: int, what: Callable[[list[str]], int | None], folder: Path) -> str | None:
        """Runs `what`, which leaves last_error.json in `folder`. What is not the engine's own fault is raised."""
        from engine.distributed import fork_ranks

        log = self.folder / "log"
        log.unlink(missing_ok=True)
        codes = fork_ranks(size, what, log, max(1, self.threads // size))
        if not any(codes):
            return None
        error = last(folder)
        if error is None:
            print(log.read_text(encoding="utf-8", errors="replace"), file=sys.stderr)
            raise EngineError("VERIFY-RANKS", f"ranks left with exit codes {codes} and without a word; if nobody ended them, memory ran out: "
                              "lower train.micro_batch or data.max_length", ENVIRONMENT)
        if error.exit_code == BUG or error.name == "PEER-REPLICA":
            print(error, file=sys.stderr)
            return error.line
        raise error


def ranks(size: int) -> str:
    return f"{size} rank" + "s" * (size > 1)


def apart(found: Path, suffix: str, expected: Path) -> float:
    """‖found − expected‖ ÷ ‖expected‖ over all tensors of two files, named in the first with a suffix."""
    from engine import tensorfile

    off = total = 0.0
    with tensorfile.Reader(found) as one, tensorfile.Reader(expected) as other:
        for name in other.entries:
            truth = other.tensor(name).double()
            off += float((one.tensor(name + suffix).double() - truth).square().sum())
            total += float(truth.square().sum())
    return (off / total) ** 0.5


if __name__ == "__main__":
    run(main)
