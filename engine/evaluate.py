"""How good the model is on held-out rows: loss over their supervised tokens, and answers compared with what they should be.

Questions and answers are read off the tokenised rows, so a model is asked exactly what it was trained to answer. Ranks share
the rows; every figure is a sum and a count until all ranks' are added.
"""

import json
import math
import sys
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from engine import distributed, watchdog
from engine.attention import PackedAttention
from engine.config import Data, Evaluate
from engine.data.dataset import Dataset
from engine.data.loader import collate
from engine.data.plan import pack
from engine.data.tokenizer import Tokenizer, stops
from engine.distributed import World
from engine.loss import summed_cross_entropy
from engine.precision import Precision
from engine.sampling import generate, rows_at_once

ROWS_AT_ONCE = 64  # answered side by side at most


@dataclass(frozen=True)
class Sample:
    """A question as the model reads it, the answer it gave, and the row's own."""

    question: str
    answer: str
    expected: str


@dataclass
class Report:
    """`sources` maps a source to (summed loss, supervised tokens), `tasks` a task to (exact matches, rows)."""

    sources: dict[str, tuple[float, int]]
    tasks: dict[str, tuple[int, int]] = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)

    @property
    def loss(self) -> float:
        """Mean over supervised tokens, not over rows or batches."""
        total, count = map(sum, zip(*self.sources.values(), strict=True))
        return total / count

    @property
    def scalars(self) -> dict[str, float]:
        found = {"validation/loss": self.loss, "validation/perplexity": math.exp(min(self.loss, 700.0))}
        if len(self.sources) > 1:
            found |= {f"validation/loss/{name}": total / count for name, (total, count) in self.sources.items() if count}
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
        self.asked = dataset.questions()
        self.judged = np.concatenate([np.flatnonzero(dataset.source == number)[: cfg.rows or None] for number in range(len(dataset.sources))])

    @watchdog.phase("evaluation")
    def run(self, model: nn.Module, whole: bool = False) -> Report:
        """Judges `model`; all ranks take part. The `whole` evaluation answers too, others only where the recipe asks for it."""
        cfg, every = self.cfg, len(self.asked)
        wanted = (every if cfg.exact_match_rows < 0 else min(cfg.exact_match_rows, every)) if whole or cfg.exact_match_during else 0
        samples = min(cfg.samples, every) if whole else 0
        was_training = model.training
        model.eval()
        report = Report(self._losses(model))
        answered = self._answers(model, max(wanted, samples))
        for row, sample in zip(self.asked[:wanted], answered, strict=False):
            task = self.dataset.tasks[self.dataset.rows["task"][row]]
            right, total = report.tasks.get(task, (0, 0))
            report.tasks[task] = (right + (sample.answer.strip() == sample.expected.strip()), total + 1)
        report.samples = answered[:: max(1, len(answered) // max(1, samples))][:samples]
        model.train(was_training)
        return report

    @torch.no_grad()
    def _losses(self, model: nn.Module) -> dict[str, tuple[float, int]]:
        device, names = self.world.device, [source.name for source in self.dataset.sources]
        packs = pack(self.dataset.lengths, self.judged, self.data.max_length, longest_first=True)
        losses, counts = (torch.zeros(len(names), dtype=torch.float64, device=device) for _ in range(2))
        for number in self._progress(range(self.world.rank, len(packs), self.world.size), "validation loss"):
            batch = collate(self.dataset, [packs[number]], [number], device)
            with self.precision.context():
                hidden = model(batch.ids, batch.positions, PackedAttention(batch.documents, device, self.attention))
                summed_cross_entropy(hidden[batch.at], model.lm_head.weight, batch.targets, batch.sources, losses)
            counts.index_add_(0, batch.sources, torch.ones_like(batch.sources, dtype=counts.dtype))
        summed = distributed.sum_over_ranks([*losses.tolist(), *counts.tolist()], self.world)
        return {name: (summed[i], int(summed[len(names) + i])) for i, name in enumerate(names)}

    def _answers(self, model: nn.Module, rows: int) -> list[Sample]:
        """The greedy answers to the first `rows` questions, in their order, on every rank."""
        mine = {number: self.dataset.prompt_and_answer(self.asked[number])[0] for number in range(self.world.rank, rows, self.world.size)}
        prompts, most_new = list(mine.values()), self.cfg.max_new_tokens
        at_once = rows_at_once(model, prompts, most_new, ROWS_AT_ONCE)
        generated: list[list[int]] = []
        for start in self._progress(range(0, len(mine), at_once), "answering"):
            with self.precision.context():
                generated += generate(model, prompts[start : start + at_once], stops(self.data.template, self.tokenizer), most_new)
        answers = dict(zip(mine, generated, strict=True))
        for part in distributed.gather_text(json.dumps(answers), self.world):
            answers.update({int(number): answer for number, answer in json.loads(part).items()})
        return [self._sample(number, answers[number]) for number in range(rows)]

    def _sample(self, number: int, answer: list[int]) -> Sample:
        prompt, expected = self.dataset.prompt_and_answer(self.asked[number])
        return Sample(self.tokenizer.show(prompt), self.tokenizer.decode(answer), self.tokenizer.decode(expected))

    def _progress(self, numbers: range, what: str) -> tqdm:
        return tqdm(numbers, desc=what, leave=False, disable=not (self.world.is_first and sys.stderr.isatty()))
