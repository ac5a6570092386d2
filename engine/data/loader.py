"""A rank's share of a step, as micro-batches of tensors laid end to end. Nothing is padded."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.data.dataset import Dataset
from engine.data.plan import Step


@dataclass(frozen=True)
class MicroBatch:
    """T tokens of several sequences; each sequence holds one or more documents (rows).

    ids, positions  (T,)  positions start at 0 in every document
    at, targets     (n,)  where a supervised token comes next, and which
    documents             tokens of each document, in order
    places, lengths       each sequence's place in the global batch and its tokens
    """

    ids: Tensor
    positions: Tensor
    at: Tensor
    targets: Tensor
    documents: list[int]
    places: list[int]
    lengths: list[int]


def micro_batches(step: Step, dataset: Dataset, rank: int, size: int, micro_batch: int, device: torch.device) -> list[MicroBatch]:
    """What `rank` of `size` computes in this step: every size-th sequence, `micro_batch` of them at a time.

    A rank that has none (the last step of an epoch can be short) still gets a micro-batch of one token without a
    target, so that it takes part in the exchange of gradients and adds zero.
    """
    mine = list(range(rank, len(step.sequences), size))
    groups = [mine[start : start + micro_batch] for start in range(0, len(mine), micro_batch)]
    return [collate(dataset, [step.sequences[place] for place in group], group, device) for group in groups] or [empty(device)]


def collate(dataset: Dataset, sequences: Sequence[np.ndarray], places: Sequence[int], device: torch.device) -> MicroBatch:
    rows = np.concatenate(sequences)
    starts, ends = dataset.offsets[rows], dataset.offsets[rows + 1]
    documents = ends - starts
    # index of every token in the dataset: each row's start plus 0, 1, 2 …
    positions = np.arange(documents.sum()) - np.repeat(np.cumsum(documents) - documents, documents)
    index = np.repeat(starts, documents) + positions
    ids, supervised = dataset.tokens[index], dataset.supervised[index]
    at = np.flatnonzero(supervised[1:] & (positions[1:] > 0))  # token i + 1 is predicted at i, never across documents

    def tensor(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array.astype(np.int64)).to(device)

    return MicroBatch(tensor(ids), tensor(positions), tensor(at), tensor(ids[1:][at]), documents.tolist(), list(places),
                      [int((dataset.offsets[sequence + 1] - dataset.offsets[sequence]).sum()) for sequence in sequences])


def empty(device: torch.device) -> MicroBatch:
    zero, none = torch.zeros(1, dtype=torch.int64, device=device), torch.zeros(0, dtype=torch.int64, device=device)
    return MicroBatch(zero, zero, none, none, [1], [0], [1])
