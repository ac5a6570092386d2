"""What a step looked like that went wrong, written before its gradient touches a weight: rows, tokens, losses, gradients.

    runs/NAME/blackbox/step-000000010/   blackbox.json  recipe.yaml  run.json  checkpoint/step-000000008/

A loss or gradient that is not finite, where no lower loss scale can help, leaves one and ends the run. A loss far above the
last ones leaves one and the run continues. `python -m engine.replay` reproduces it, to the bit, from the checkpoint in it, which the
newest black box alone holds: each would keep the room of a checkpoint for good.
"""

import dataclasses
import json
import math
import os
import shutil
import statistics
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from engine import checkpoint, distributed, watchdog
from engine.config import Recipe
from engine.data.dataset import Dataset
from engine.data.loader import MicroBatch
from engine.data.plan import Step
from engine.data.tokenizer import Tokenizer
from engine.data.view import View, as_text, spans
from engine.distributed import World
from engine.errors import NUMERIC, EngineError, warn
from engine.precision import LossScale
from engine.publish import published
from engine.record import plain
from engine.saver import Saver

LEAST = 20  # losses before one is judged
MOST = 3  # black boxes of spikes in a run; later spikes are a warning each
NAMED = 5  # rows that a message names
FLAT = 0.01  # of the median: losses that differ by less are alike, however alike the others are


class Recorder:
    """Looks at every step between its gradient and its update. All ranks hold the same numbers, so they decide alike.

    Args:
        forward: (micro-batch, step, tally) -> summed loss, as the loop has it.
        seen: what `state` gave to a checkpoint.
    """

    wanted: int | None = None  # the step of which engine.replay wants a black box; the run ends there

    def __init__(self, run: Path, cfg: Recipe, saver: Saver, world: World, rows: Dataset, tokenizer: Tokenizer, trained: dict[str, nn.Parameter],
                 scale: LossScale, ddp_model: nn.Module, forward: Callable[..., Tensor], seen: dict[str, Any]) -> None:
        self.run, self.saver, self.world, self.rows, self.tokenizer, self.trained, self.scale = run, saver, world, rows, tokenizer, trained, scale
        self.ddp_model, self.forward, self.spike_z = ddp_model, forward, cfg.log.spike_z
        self.began = None if seen else self._weights()
        self.losses, self.spikes = deque(seen.get("losses", ()), cfg.log.spike_window), seen.get("spikes", 0)

    def _weights(self) -> dict[str, int]:
        return dict(zip(self.trained, distributed.bit_sums(self.trained).tolist(), strict=True))

    def state(self) -> dict[str, Any]:
        """The losses that the next is judged by, and the spikes until now."""
        return {"losses": list(self.losses), "spikes": self.spikes}

    def look(self, step: Step, batches: list[MicroBatch], losses: list[float], norm: float, finite: bool) -> tuple[dict[str, int], str]:
        """What there is to log of a step, and what to say if it is the run's last.

        Args:
            losses: summed over all ranks, by source. norm: of the gradient, before it is clipped.

        Raises:
            EngineError: this is the step that engine.replay wants.
        """
        loss = sum(losses) / (step.num_targets or 1)
        judged = finite and step.num_targets > 0
        deviations = deviation(loss, self.losses) if judged else 0.0
        spike, lost = 0 < self.spike_z < deviations, not finite and self.scale.is_least
        self.spikes += spike
        before = f"{deviations:.1f} deviations above the median {statistics.median(self.losses):.4f} of the last {len(self.losses)}" if spike else ""
        if judged:
            self.losses.append(loss)
        told, replayed = "", self.wanted == step.number + 1
        if lost or replayed or (spike and self.spikes <= MOST):
            found = self._found(step, batches, losses, norm, "not finite" if lost else "spike" if spike else "asked for")
            told = f"{blame(found)}. {self._write(found)}"
        if spike and self.world.is_first:
            rows = told or f"rows {_some([self.rows.where(int(self.rows.row[document])) for document in step.trained])}"
            warn(f"step {step.number + 1}: loss {loss:.4f} is {before}; training continues. {rows}")
        if replayed:
            raise EngineError("NUMERIC-REPLAYED", told, NUMERIC)
        return {"train/skipped": int(not judged), "train/spike": int(spike)}, told

    # ---- What a black box holds -------------------------------------------------------------------------------------

    def _found(self, step: Step, batches: list[MicroBatch], losses: list[float], norm: float, kind: str) -> dict[str, Any]:
        """blackbox.json, on every rank; all take part. Losses of tokens are computed once more, with the same dropout."""
        own = [{"documents": self._documents(step, batch)} for batch in batches]
        found = {"format": 1, "step": step.number + 1, "kind": kind, "world_size": self.world.size, "threads": torch.get_num_threads(),
                 "loss": sum(losses) / (step.num_targets or 1), "losses": dict(zip((source.name for source in self.rows.sources), losses, strict=True)),
                 "num_targets": step.num_targets, "gradient_norm": norm, "loss_scale": self.scale.value, "weights": self._weights(),
                 **self._gradient()}
        if kind == "not finite":  # the run ends here, so its gradient is no longer needed
            for part, batch in zip(own, batches, strict=True):
                part["not_finite"] = self._gradient_of(step, batch)
        return {**found, "ranks": [json.loads(text) for text in distributed.gather_text(json.dumps(own), self.world)]}

    def _documents(self, step: Step, batch: MicroBatch) -> list[dict[str, Any]]:
        """Each document of a micro-batch: its row, its text, and (position, id, token, loss) of each supervised token."""
        each = torch.zeros(len(batch.at), dtype=torch.float64, device=batch.at.device)
        with torch.no_grad(), distributed.sync_if(self.ddp_model, False):  # a tally by token in place of source
            self.forward(dataclasses.replace(batch, sources=torch.arange(len(batch.at), device=batch.at.device)), step.number, each)
        at, each, trained = batch.at.cpu().numpy(), each.tolist(), set(batch.trained.tolist())
        found, start, end = [], 0, 0
        for place, length in zip(batch.places, batch.lengths, strict=True) if trained else ():
            end += length
            for document in step.sequences[place].tolist():
                row, size = int(self.rows.row[document]), int(self.rows.lengths[document])
                first, last = np.searchsorted(at, (start, start + size)).tolist()
                if document in trained:
                    ids, mask = self.rows.read(document)
                    learnt = [[int(at[i]) - start + 1, int(ids[at[i] - start + 1]), self.tokenizer.name(int(ids[at[i] - start + 1])), each[i]]
                              for i in range(first, last)]
                    where = self.rows.where(row)
                    found.append({"row": where, "document": document, "from": int(self.rows.start[document]), "place": place, "loss": sum(each[first:last]),
                                  "learnt": learnt, "text": as_text(View(where, spans(ids, mask, self.tokenizer)), colour=False)})
                start += size
            start = end
        return found

    def _gradient(self) -> dict[str, Any]:
        """Norms of the accumulated gradient by module, in float64, the loss scale taken out; and which are not finite."""
        grads = {name: parameter.grad for name, parameter in self.trained.items() if parameter.grad is not None}
        squares: dict[str, float] = {}
        for name, norm in zip(grads, torch._foreach_norm(list(grads.values()), dtype=torch.float64), strict=True):
            module = name.rpartition(".")[0]
            squares[module] = squares.get(module, 0.0) + (float(norm) / self.scale.value) ** 2
        norms = {module: math.sqrt(square) for module, square in squares.items()}
        return {"modules": norms, "not_finite": [module for module, norm in norms.items() if not math.isfinite(norm)]}

    def _gradient_of(self, step: Step, batch: MicroBatch) -> list[str]:
        """The parameters whose gradient from this rank's micro-batch alone is not finite."""
        for parameter in self.trained.values():
            parameter.grad = None
        with distributed.sync_if(self.ddp_model, False):
            (self.forward(batch, step.number) * (self.scale.value * self.world.size / (step.num_targets or 1))).backward()
        return [name for name, parameter in self.trained.items() if parameter.grad is not None and not parameter.grad.isfinite().all()]

    # ---- On disk ----------------------------------------------------------------------------------------------------

    def _write(self, found: dict[str, Any]) -> str:
        """Publishes the black box, on rank 0, while the others wait; says where it is. A disk that refuses it costs a sentence, and no more."""
        target, problem = self.run / checkpoint.BOXES / f"step-{found['step']:09d}", ""
        if self.world.is_first:
            try:
                self.saver.wait()  # the last one taken is the nearest to go from, and none is removed while it is linked
                watchdog.aside(partial(self._publish, target, found))  # where no file can have two names the checkpoint is copied
            except (EngineError, OSError) as error:
                problem = f"There is no black box: {error}"
        if distributed.from_first(bool(problem), self.world):
            return problem or "There is no black box"
        return f"Black box: {target}; python -m engine.replay reproduces it, data.skip=[path:line, …] trains without rows"

    def _publish(self, target: Path, found: dict[str, Any]) -> None:
        newest = checkpoint.newest(self.run / "checkpoints")
        text = json.dumps(plain({**found, "checkpoint": newest, "began": self.began}), indent=1, ensure_ascii=False, allow_nan=False)
        with published(target) as building:
            building.mkdir()
            (building / "blackbox.json").write_text(text + "\n", encoding="utf-8")
            for name in ("recipe.yaml", "run.json"):
                shutil.copy2(self.run / name, building)
            if newest is not None:
                name = f"step-{newest:09d}"
                shutil.copytree(self.run / "checkpoints" / name, building / "checkpoint" / name, copy_function=link)
        for older in {*target.parent.glob("*/checkpoint")} - {target / "checkpoint"}:
            shutil.rmtree(older)


def deviation(loss: float, before: deque[float]) -> float:
    """How far `loss` is above the median of those before it, in robust standard deviations: 1.4826 times the median distance to it.

    0 where there are too few. (Iglewicz and Hoaglin, "How to Detect and Handle Outliers", 1993; the floor is ours.)
    """
    if len(before) < LEAST:
        return 0.0
    middle = statistics.median(before)
    spread = 1.4826 * statistics.median(abs(one - middle) for one in before)
    return (loss - middle) / max(spread, FLAT * abs(middle), 1e-12)


def blame(found: dict[str, Any]) -> str:
    """What a black box says of rows and ranks, in a sentence or two."""
    batches = [(rank, batch) for rank, of_rank in enumerate(found["ranks"]) for batch in of_rank]
    documents = [(rank, one) for rank, batch in batches for one in batch["documents"]]
    if found["kind"] != "not finite":
        worst = sorted((one for _, one in documents), key=lambda one: -one["loss"] / (len(one["learnt"]) or 1))
        return f"Rows by their loss a token: {_some([one['row'] for one in worst])}"
    lossy = [(rank, one["row"]) for rank, one in documents if not math.isfinite(one["loss"])]
    steep = [(rank, one["row"]) for rank, batch in batches if batch["not_finite"] for one in batch["documents"]]
    if rows := lossy or steep:
        names = next((batch["not_finite"] for _, batch in batches if batch["not_finite"]), [""])
        what = "have a loss that is not finite" if lossy else f"are the micro-batches whose gradient is not finite, that of {names[0]} first"
        return f"On rank {', '.join(map(str, sorted({rank for rank, _ in rows})))} these rows {what}: {_some([row for _, row in rows])}"
    total, largest = math.sqrt(sum(norm**2 for norm in found["modules"].values())), max(found["modules"], key=found["modules"].get)
    if math.isfinite(total):
        return f"Losses and gradients are finite, but not the gradient's norm in fp32: it is {total:.1e}, most of it in {largest}"
    return "Computed again, every row's loss and every rank's gradient is finite: what it was has passed, or came with the exchange"


def link(source: str, target: str) -> None:
    """A second name for a file, so that it outlives the first; a copy where the disk has none."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _some(names: list[str]) -> str:
    names = list(dict.fromkeys(names))
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED:,} more" if len(names) > NAMED else "")
