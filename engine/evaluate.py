"""How good the model is on held-out rows: loss over their supervised tokens, and answers compared with what they should be.

Ranks share the rows; every figure is a sum and a count until all ranks' are added.
"""

import json
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from engine import distributed
from engine.attention import PackedAttention
from engine.config import Data, Evaluate
from engine.data.dataset import Dataset
from engine.data.formats import Row
from engine.data.loader import collate
from engine.data.plan import pack
from engine.data.reading import read_rows
from engine.data.tokenizer import Tokenizer, prompt_ids, stops
from engine.distributed import World
from engine.loss import summed_cross_entropy
from engine.precision import Precision
from engine.sampling import generate

ROWS_AT_ONCE = 64  # generated side by side


@dataclass
class Report:
    """`tasks` maps a task to (exact matches, rows); `samples` are (row, answer)."""

    loss: float
    tasks: dict[str, tuple[int, int]] = field(default_factory=dict)
    samples: list[tuple[Row, str]] = field(default_factory=list)

    @property
    def scalars(self) -> dict[str, float]:
        found = {"validation/loss": self.loss, "validation/perplexity": math.exp(min(self.loss, 700.0))}
        if self.tasks:
            found["validation/exact_match"] = sum(right for right, _ in self.tasks.values()) / sum(rows for _, rows in self.tasks.values())
        return found

    def table(self) -> str:
        """Exact matches per task, as aligned text."""
        width = max(len(task) for task in [*self.tasks, "all"])
        rows = [*self.tasks.items(), ("all", tuple(map(sum, zip(*self.tasks.values(), strict=True))))]
        return "\n".join(f"  {task or '(no task)':<{width}}  {right:>4} / {rows:<4}  {100 * right / rows:5.1f} %" for task, (right, rows) in rows)


class Evaluation:
    """Held-out rows, and how to judge a model on them.

    Args:
        dataset: tokenised rows; sequences of `data.max_length` tokens are computed at once.
        attention: the path, as `attention.choose` returned it.
    """

    def __init__(self, dataset: Dataset, tokenizer: Tokenizer, data: Data, cfg: Evaluate, attention: str, precision: Precision, world: World) -> None:
        self.dataset, self.tokenizer, self.data, self.cfg = dataset, tokenizer, data, cfg
        self.attention, self.precision, self.world = attention, precision, world
        kept = set(dataset.lines.tolist())
        self.rows = [row for row in read_rows(Path(dataset.path)) if row.line in kept]

    def run(self, model: nn.Module, whole: bool = False) -> Report:
        """Judges `model`; all ranks take part. The `whole` evaluation answers too, others only where the recipe asks for it."""
        every, cfg = len(self.rows), self.cfg
        rows = min(cfg.rows, every) or every
        wanted = (every if cfg.exact_match_rows < 0 else min(cfg.exact_match_rows, every)) if whole or cfg.exact_match_during else 0
        samples = min(cfg.samples, every) if whole else 0
        was_training = model.training
        model.eval()
        report = Report(self._loss(model, rows))
        answered = self._answers(model, max(wanted, samples))
        for number, (row, answer) in enumerate(answered):
            if number < wanted:
                right, total = report.tasks.get(row.task, (0, 0))
                report.tasks[row.task] = (right + (answer.strip() == row.messages[-1].content.strip()), total + 1)
        report.samples = answered[:: max(1, len(answered) // max(1, samples))][:samples]
        model.train(was_training)
        return report

    @torch.no_grad()
    def _loss(self, model: nn.Module, rows: int) -> float:
        """Mean over supervised tokens, not over rows or batches."""
        packs = pack(self.dataset.lengths, torch.arange(rows).numpy(), self.data.max_length, longest_first=True)
        total = count = 0.0
        for number in self._progress(range(self.world.rank, len(packs), self.world.size), "validation loss"):
            batch = collate(self.dataset, [packs[number]], [number], self.world.device)
            with self.precision.context():
                hidden = model(batch.ids, batch.positions, PackedAttention(batch.documents, self.world.device, self.attention))
                total += float(summed_cross_entropy(hidden[batch.at], model.lm_head.weight, batch.targets))
            count += len(batch.targets)
        total, count = distributed.sum_over_ranks([total, count], self.world)
        return total / count

    def _answers(self, model: nn.Module, rows: int) -> list[tuple[Row, str]]:
        """The greedy answers to the first `rows` rows, in the rows' order, on every rank."""
        mine = list(range(self.world.rank, rows, self.world.size))
        answers: dict[int, str] = {}
        for start in self._progress(range(0, len(mine), ROWS_AT_ONCE), "answering"):
            numbers = mine[start : start + ROWS_AT_ONCE]
            prompts = [prompt_ids(self.rows[number], self.data.template, self.tokenizer, self.data.system) for number in numbers]
            with self.precision.context():
                generated = generate(model, prompts, stops(self.data.template, self.tokenizer), self.cfg.max_new_tokens)
            answers.update({number: self.tokenizer.decode(ids) for number, ids in zip(numbers, generated, strict=True)})
        for part in distributed.gather_text(json.dumps(answers), self.world):
            answers.update({int(number): answer for number, answer in json.loads(part).items()})
        return [(self.rows[number], answers[number]) for number in range(rows)]

    def _progress(self, numbers: range, what: str) -> tqdm:
        return tqdm(numbers, desc=what, leave=False, disable=not (self.world.is_first and sys.stderr.isatty()))
