"""Which rows form which step: a pure function of the rows' lengths, the sequence length, packing, seed and epoch.

A sequence is one row, or with packing several rows of together at most `max_length` tokens. An epoch is every sequence
once; a step is the next `global_batch` of them, the last of an epoch perhaps fewer. Neither ranks nor micro-batches
occur here, so they cannot change what a step trains on, and a position in training is a step number and nothing else.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from engine.dropout import mix


@dataclass(frozen=True)
class Step:
    """`sequences[i]` holds the row numbers of the i-th sequence; `num_targets` the supervised tokens of them all."""

    number: int
    epoch: int
    is_last_of_epoch: bool
    sequences: list[np.ndarray]
    num_tokens: int
    num_targets: int
    lengths: np.ndarray  # tokens of each row, which attention costs by


class Plan:
    """The steps of all epochs.

    Args:
        lengths: tokens of each row.
        targets: supervised tokens of each row.
        max_length: tokens a sequence may hold; no row is longer.
        shuffle: new order each epoch; else the file's order, where packing fills sequences in passing.
    """

    def __init__(self, lengths: np.ndarray, targets: np.ndarray, max_length: int, global_batch: int, packing: bool, shuffle: bool,
                 seed: int, epochs: int) -> None:
        self.lengths, self.targets, self.max_length = lengths, targets, max_length
        self.global_batch, self.packing, self.shuffle, self.seed, self.epochs = global_batch, packing, shuffle, seed, epochs
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)
        self.sequences_per_epoch = len(self._epoch(0))
        self.steps_per_epoch = -(-self.sequences_per_epoch // global_batch)
        self.num_steps = self.steps_per_epoch * epochs
        self.fill = float(lengths.sum()) / (self.sequences_per_epoch * max_length)

    def step(self, number: int) -> Step:
        epoch, place = divmod(number, self.steps_per_epoch)
        sequences = self._epoch(epoch)[place * self.global_batch : (place + 1) * self.global_batch]
        rows = np.concatenate(sequences)
        lengths = self.lengths[rows]
        return Step(number, epoch, place == self.steps_per_epoch - 1, sequences, int(lengths.sum()), int(self.targets[rows].sum()), lengths)

    def _make_epoch(self, epoch: int) -> list[np.ndarray]:
        rows = permutation(len(self.lengths), self.seed, epoch) if self.shuffle else np.arange(len(self.lengths))
        if not self.packing:
            return list(rows[:, None])
        packs = pack(self.lengths, rows, self.max_length, longest_first=self.shuffle)
        if not self.shuffle:
            return packs
        return [packs[i] for i in permutation(len(packs), self.seed, epoch, 1)]


def permutation(count: int, *key: int) -> np.ndarray:
    """0 … count-1 in an order that depends on `key` alone: sorted by SplitMix64 of (key, index).

    Our own integer arithmetic, because NumPy does not promise that its random streams stay the same between versions.
    """
    with np.errstate(over="ignore"):
        state = np.uint64(mix(*key)) + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.argsort(state ^ (state >> np.uint64(31)), kind="stable")


def pack(lengths: np.ndarray, rows: np.ndarray, max_length: int, longest_first: bool) -> list[np.ndarray]:
    """Best fit: each row goes into the fullest sequence that still has room for it, else into a new one.

    `rows` gives the order; with `longest_first` longer rows come first and `rows` breaks ties, which fills sequences
    almost wholly. Without it a row meets only the sequences begun before it, so the order of the file is roughly kept.
    """
    order = rows[np.argsort(-lengths[rows], kind="stable")] if longest_first else rows
    packs: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(max_length + 1)]  # packs with exactly that many tokens of room
    rooms = 0  # bit r is set where by_room[r] is not empty
    for row in order:
        length = int(lengths[row])
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            number = by_room[room].pop()
            if not by_room[room]:
                rooms &= ~(1 << room)
            packs[number].append(int(row))
        else:
            room, number = max_length, len(packs)
            packs.append([int(row)])
        left = room - length
        if left:
            by_room[left].append(number)
            rooms |= 1 << left
    return [np.asarray(rows, dtype=np.int64) for rows in packs]
