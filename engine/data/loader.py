"""A rank's share of each step, as micro-batches of tensors laid end to end, prepared while the steps before are computed.

With packing every sequence is filled up to the plan's length by one more document, of padding: shapes repeat from step to
step, so memory does not fragment and kernels chosen for a shape are chosen once. Padding carries no target, attention
never crosses into it, and nothing counts it as tokens. A micro-batch with fewer sequences than others stays smaller: a
sequence of mere padding would cost as much time as a real one, and sizes below `micro_batch` are few.
"""

import dataclasses
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from engine.data.dataset import Dataset
from engine.data.plan import Plan, Step, share
from engine.transfer import to_device

CPU = torch.device("cpu")
AHEAD = 2  # steps that are prepared before they are asked for


@dataclass(frozen=True)
class MicroBatch:
    """T tokens of several sequences; each sequence holds one or more documents, of which padding may be the last.

    ids, positions  (T,)  positions start at 0 in every document
    at, targets     (n,)  where a supervised token comes next, and which
    sources         (n,)  which source each target's document is from
    documents             tokens of each document, in order
    places, lengths       each sequence's place in the global batch and its tokens, padding included
    trained, num_tokens   which documents of the dataset these are, and their tokens, both without padding and what is skipped
    """

    ids: Tensor
    positions: Tensor
    at: Tensor
    targets: Tensor
    sources: Tensor
    documents: list[int]
    places: list[int]
    lengths: list[int]
    trained: np.ndarray
    num_tokens: int

    def each(self, function: Callable[[Tensor], Tensor]) -> "MicroBatch":
        """The same with `function` of every tensor."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return dataclasses.replace(self, **{name: function(value) for name, value in fields.items() if isinstance(value, Tensor)})


class Loader:
    """Iterates over (step, this rank's micro-batches of it) for the steps from `first_step` to before `last_step`.

    A thread prepares the next steps in NumPy alone, which wants no share of torch's threads. It begins when the loop lets go of
    the interpreter, in a kernel of torch's, so the loop does not wait for it. It ends with the loop, also with one that is left
    early; an error in it is raised where its step is due.

    Args:
        cost: as in `plan.share`.
    """

    def __init__(self, dataset: Dataset, plan: Plan, rank: int, size: int, micro_batch: int, cost: Callable[[int, int, np.ndarray], float],
                 device: torch.device, first_step: int, last_step: int) -> None:
        self.dataset, self.plan, self.rank, self.size, self.micro_batch, self.cost = dataset, plan, rank, size, micro_batch, cost
        self.device, self.first_step, self.last_step = device, first_step, last_step

    def __iter__(self) -> Iterator[tuple[Step, list[MicroBatch]]]:
        steps = iter(range(self.first_step, self.last_step))
        thread = ThreadPoolExecutor(1, thread_name_prefix="loader")
        try:
            ahead = deque(thread.submit(self._prepare, number) for number in islice(steps, AHEAD))
            while ahead:
                step, batches = ahead.popleft().result()
                ahead.extend(thread.submit(self._prepare, number) for number in islice(steps, 1))
                if self.device.type != "cpu":  # pinned memory is copied while the GPU computes; the stream keeps copies before what uses them
                    batches = [batch.each(lambda tensor: tensor.to(self.device, non_blocking=True)) for batch in batches]
                yield step, batches
        finally:
            thread.shutdown(wait=False, cancel_futures=True)

    def _prepare(self, number: int) -> tuple[Step, list[MicroBatch]]:
        step = self.plan.step(number)
        batches = micro_batches(step, self.dataset, share(step, self.size, self.cost, self.micro_batch)[self.rank], self.micro_batch)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # a thread begins on device 0, and pinning would take memory there
            batches = [batch.each(Tensor.pin_memory) for batch in batches]
        return step, batches


def micro_batches(step: Step, dataset: Dataset, places: Sequence[int], micro_batch: int) -> list[MicroBatch]:
    """The sequences at `places` of a step, `micro_batch` at a time, on the CPU.

    A rank that has none (the last step of an epoch can be short) still gets a micro-batch of one token without a
    target, so that it takes part in the exchange of gradients and adds zero.
    """
    groups = [places[start : start + micro_batch] for start in range(0, len(places), micro_batch)]
    skipped = frozenset(step.documents[step.lengths == 0].tolist())
    return [collate(dataset, [step.sequences[place] for place in group], group, CPU, step.fill_to, skipped) for group in groups] or [empty(CPU)]


def collate(dataset: Dataset, sequences: Sequence[np.ndarray], places: Sequence[int], device: torch.device, fill_to: int = 0,
            skipped: Collection[int] = ()) -> MicroBatch:
    """`sequences` of documents as one micro-batch, each filled up to `fill_to` tokens with padding where it is shorter.

    Of `skipped` documents nothing is left but padding of their length, so that dropout meets all others as it did before.
    """
    ids, supervised, sources, lengths, num_tokens = [], [], [], [], 0
    for sequence in sequences:
        first = len(ids)
        for document in sequence:
            row, mask = dataset.read(document)
            there = int(document) not in skipped
            ids.append(row * there)
            supervised.append(mask & there)
            sources.append(dataset.source[document])
            num_tokens += len(row) * there
        lengths.append(sum(map(len, ids[first:])))
        if padding := max(fill_to - lengths[-1], 0):
            ids.append(np.zeros(padding, dtype=np.int64))
            supervised.append(np.zeros(padding, dtype=bool))
            sources.append(0)
            lengths[-1] = fill_to
    documents, tokens, whole = np.asarray([len(document) for document in ids]), np.concatenate(ids), np.concatenate(sequences)
    positions = np.arange(len(tokens)) - np.repeat(np.cumsum(documents) - documents, documents)
    at = np.flatnonzero(np.concatenate(supervised)[1:] & (positions[1:] > 0))  # token i + 1 is predicted at i, never across documents

    def tensor(array: np.ndarray) -> Tensor:
        return to_device(torch.from_numpy(array.astype(np.int64)), device)

    return MicroBatch(tensor(tokens), tensor(positions), tensor(at), tensor(tokens[at + 1]), tensor(np.repeat(sources, documents)[at + 1]),
                      documents.tolist(), list(places), lengths, whole[~np.isin(whole, list(skipped))], num_tokens)


def empty(device: torch.device) -> MicroBatch:
    zero, none = torch.zeros(1, dtype=torch.int64, device=device), torch.zeros(0, dtype=torch.int64, device=device)
    return MicroBatch(zero, zero, none, none, none, [1], [0], [1], np.zeros(0, dtype=np.int64), 0)
