"""Which documents form which step: a pure function of their lengths, the sequence length, packing, seed and epoch.

A document is a row, a piece of one, or one of its repeats. A sequence is one document, or with packing several of
together at most `max_length` tokens. An epoch is every sequence once; a step is the next `global_batch` of them, the
last of an epoch perhaps fewer. Neither ranks nor micro-batches have a say in it, so they cannot change what a step
trains on, and a position in training is a step number and nothing else.

Packing happens once. It settles what lengths meet in a sequence, never which documents: those of one length are dealt
anew to its slots in every epoch. Both this and the order of the sequences are permutations computed index by index, so
any step of any epoch is found at once and no epoch is ever laid out in memory.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine.dropout import mix

MANY = 1 << 12  # sequences looked at together
ROUNDS = 8  # of the permutation below; fewer favour some orders of five or six documents measurably
# What a micro-batch costs beside its tokens, in tokens: it reads all weights once, and in the time that a GPU reads a
# 16-bit weight it could use it for about this many tokens.
TOKENS_TO_BEGIN = 256


@dataclass(frozen=True)
class Step:
    """`sequences[i]` holds the documents of the i-th sequence; lengths and targets are those of all of them, in order.

    num_tokens, num_targets   tokens of the step, and how many of them are supervised
    lengths, targets          tokens and supervised tokens of each document; 0 of one that is skipped: padding stands in its place
    fill_to                   tokens that a sequence is filled up to with padding, which counts nowhere; 0: it stays as it is
    """

    number: int
    epoch: int
    is_last_of_epoch: bool
    sequences: list[np.ndarray]
    num_tokens: int
    num_targets: int
    lengths: np.ndarray
    targets: np.ndarray
    fill_to: int

    @property
    def documents(self) -> np.ndarray:
        return np.concatenate(self.sequences)

    @property
    def trained(self) -> np.ndarray:
        """The documents without those that are skipped."""
        return self.documents[self.lengths > 0]


class Plan:
    """The steps of all epochs.

    `skips`: (step, documents that are skipped from it on), one after the other. Nothing but the step at which it begins to be
    skipped says that of a document: no other document's place depends on it.

    Args:
        lengths: tokens of each document, at least 1 and at most `max_length`.
        targets: supervised tokens of each document.
        max_length: tokens a sequence may hold.
        shuffle: new order each epoch; else the file's order, where packing fills sequences in passing.
        skipped: documents that are not trained.
    """

    def __init__(self, lengths: np.ndarray, targets: np.ndarray, max_length: int, global_batch: int, packing: bool, shuffle: bool,
                 seed: int, epochs: int, skipped: Iterable[int] = ()) -> None:
        assert len(lengths) and lengths.min() >= 1 and lengths.max() <= max_length, "documents of 1 to max_length tokens"
        self.lengths, self.targets, self.max_length = lengths, targets, max_length
        self.global_batch, self.packing, self.shuffle, self.seed, self.epochs = global_batch, packing, shuffle, seed, epochs
        self.skips: list[tuple[int, list[int]]] = [(0, list(map(int, skipped)))]
        self.by_length = None  # documents, shortest first: where a slot of a length finds its own
        if packing and shuffle:
            self.counts = np.bincount(lengths, minlength=max_length + 1)
            self.by_length = np.argsort(lengths, kind="stable").astype(np.int32)
            self.slots, self.starts = _pack_longest_first(self.counts, max_length)
        elif packing:
            self.slots, self.starts = _pack_in_passing(lengths, max_length)
        else:
            self.slots, self.starts = np.arange(len(lengths), dtype=np.int32), np.arange(len(lengths) + 1, dtype=np.int32)
        self.sequences_per_epoch = len(self.starts) - 1
        self.steps_per_epoch = -(-self.sequences_per_epoch // global_batch)
        self.num_steps = self.steps_per_epoch * epochs
        room, tokens = self.sequences_per_epoch * max_length, int(lengths.sum(dtype=np.int64))
        self.fill, self.padding = tokens / room, (room - tokens) * packing

    def step(self, number: int) -> Step:
        epoch, place = divmod(number, self.steps_per_epoch)
        documents, sizes = self._deal(epoch, place * self.global_batch, (place + 1) * self.global_batch)
        there = ~np.isin(documents, next(skipped for first, skipped in reversed(self.skips) if first <= number))
        lengths, targets = self.lengths[documents].astype(np.int64) * there, self.targets[documents] * there
        return Step(number, epoch, place == self.steps_per_epoch - 1, np.split(documents, np.cumsum(sizes)[:-1]),
                    int(lengths.sum()), int(targets.sum()), lengths, targets, self.max_length if self.packing else 0)

    def go_on(self, start: int, before: Sequence[Sequence[Any]] | None) -> None:
        """From step `start` on, after the `skips` of the steps before it; None: those were steps of another plan."""
        now = self.skips[-1][1]
        self.skips = [(first, skipped) for first, skipped in before or ()]
        if not self.skips or self.skips[-1][1] != now:
            self.skips.append((start, now))

    def times_trained(self, steps: int) -> np.ndarray:
        """How often each document has been trained once `steps` steps are done; not by steps of another plan, see `go_on`."""
        times = self._times_met(steps)
        if began := self.skips[0][0]:
            times -= self._times_met(began)
        for (first, skipped), end in zip(self.skips, [*(first for first, _ in self.skips[1:]), steps], strict=True):
            if skipped and first < steps:
                times[skipped] -= (self._times_met(min(end, steps)) - self._times_met(first))[skipped]
        return times

    def _times_met(self, steps: int) -> np.ndarray:
        """How often each document has been in a step, skipped or not."""
        epochs, rest = divmod(steps, self.steps_per_epoch)
        times = np.full(len(self.lengths), epochs, dtype=np.int64)
        for place in range(0, rest * self.global_batch, MANY):
            documents, _ = self._deal(epochs, place, min(place + MANY, rest * self.global_batch))
            times[documents] += 1
        return times

    def _deal(self, epoch: int, first: int, last: int) -> tuple[np.ndarray, list[int]]:
        """Documents of an epoch's sequences from the `first` to before the `last`, end to end, and how many each has."""
        key = np.uint64(mix(self.seed, epoch))
        numbers = np.arange(first, min(last, self.sequences_per_epoch))
        if self.shuffle:
            numbers = shuffled(numbers, self.sequences_per_epoch, _stir(key, 0))  # 0: no document is so short
        parts = [self.slots[self.starts[i] : self.starts[i + 1]] for i in numbers]
        documents = np.concatenate(parts).astype(np.int64)
        if self.by_length is not None:
            length = self.lengths[self.by_length[documents]].astype(np.int64)
            begin = (np.cumsum(self.counts) - self.counts)[length]
            documents = self.by_length[begin + shuffled(documents - begin, self.counts[length], _stir(key, length))].astype(np.int64)
        return documents, [len(part) for part in parts]


def share(step: Step, size: int, cost: Callable[[int, int, np.ndarray], float], micro_batch: int) -> list[list[int]]:
    """The places in `step.sequences` that each of `size` ranks computes, so that the slowest is done as early as may be.

    The costliest sequence that is left goes to the rank that is done with it first. A rank may get more sequences than
    another; where that takes a micro-batch more, the cost of beginning one is weighed against what is gained.

    Args:
        cost: of (tokens, supervised tokens, lengths of the documents), as `metrics.Flops.of`; padding is computed, so it costs.
    """
    bounds, costs = np.cumsum([0, *map(len, step.sequences)]), []
    for start, end in zip(bounds[:-1], bounds[1:], strict=True):
        lengths = step.lengths[start:end]
        tokens = int(lengths.sum())
        padding = max(step.fill_to - tokens, 0)
        costs.append(cost(tokens + padding, int(step.targets[start:end].sum()), np.append(lengths, padding)))
    begin = cost(TOKENS_TO_BEGIN, 0, np.zeros(1, dtype=np.int64))
    places: list[list[int]] = [[] for _ in range(size)]
    loads, counts = np.zeros(size), np.zeros(size, dtype=np.int64)
    for place in sorted(range(len(costs)), key=lambda place: (-costs[place], place)):
        done = loads + costs[place] + begin * (counts % micro_batch == 0)
        rank = int(done.argmin())  # the first of equals
        loads[rank] = done[rank]
        counts[rank] += 1
        places[rank].append(place)
    return [sorted(mine) for mine in places]


def shuffled(index: np.ndarray, count: np.ndarray | int, key: np.ndarray) -> np.ndarray:
    """Where `index` of 0 … count - 1 goes in the permutation that `key` names; each element has its own count and key.

    A Feistel network over pairs of digits, walked until the result is below `count` (Black and Rogaway, "Ciphers with
    Arbitrary Finite Domains", 2002): one to one, nothing stored. In our own integer arithmetic, because NumPy does not
    promise that its random streams stay the same between versions.
    """
    index, count, key = (np.array(x, dtype=np.uint64) for x in np.broadcast_arrays(index, count, key))
    walking = np.arange(len(index))
    while len(walking):
        below, k = count[walking], key[walking]
        radix = np.ceil(np.sqrt(below.astype(np.float64))).astype(np.uint64)
        others = (below + radix - np.uint64(1)) // radix  # radix × others pairs, the least multiple of radix that holds `below`
        high, low = np.divmod(index[walking], radix)
        for number in range(ROUNDS):
            low = (low + _stir(_stir(k, 2 * number), high)) % radix
            high = (high + _stir(_stir(k, 2 * number + 1), low)) % others
        index[walking] = low + radix * high
        walking = walking[index[walking] >= below]
    return index.astype(np.int64)


def _stir(state: np.ndarray, number: np.ndarray | int) -> np.ndarray:
    """`mix` of dropout.py, one number further, for whole arrays: _stir(mix(a), b) = mix(a, b)."""
    with np.errstate(over="ignore"):
        state = state + np.asarray(number).astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def pack(lengths: np.ndarray, rows: np.ndarray, max_length: int, longest_first: bool) -> list[np.ndarray]:
    """`rows` in sequences of at most `max_length` tokens: filled almost wholly with `longest_first`, else in their order."""
    if longest_first:
        rows = rows[np.argsort(lengths[rows], kind="stable")]
        slots, starts = _pack_longest_first(np.bincount(lengths[rows], minlength=max_length + 1), max_length)
    else:
        slots, starts = _pack_in_passing(lengths[rows], max_length)
    return np.split(rows[slots], starts[1:-1])


def _pack_longest_first(counts: np.ndarray, max_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Slots of sequences, given how many documents of each length there are.

    A sequence takes the longest document there is, then the longest that still fits, until one document or two fill it
    to the last token: of all such twos the most alike, because short documents are what the last sequences are filled
    with. (Best fit decreasing, which never looks at two, leaves several times the padding.) What was found is repeated
    while there are such documents, so the time goes by the number of different lengths, hardly by that of documents.

    Returns:
        the slots of all sequences end to end, numbered by length, shortest first; and where each sequence begins.
    """
    left, nexts = counts.tolist(), (np.cumsum(counts) - counts).tolist()
    there = sum(1 << length for length, count in enumerate(left) if count)  # bit l: a document of l tokens is left
    mirror = sum(1 << (max_length - length) for length, count in enumerate(left) if count)  # bit max_length - l likewise

    def take(length: int, number: int) -> None:
        nonlocal there, mirror
        left[length] -= number
        if not left[length]:
            there ^= 1 << length
            mirror ^= 1 << (max_length - length)

    slots, sizes = [], []
    while there:
        room, pieces = max_length, {}
        while fitting := there & ((2 << room) - 1):
            half = room // 2
            pairs = there & (mirror >> (max_length - room)) & ((2 << half) - 1)  # bit l: documents of l and of room - l tokens are left
            if room == 2 * half and left[half] == 1:
                pairs &= ~(1 << half)
            ends = pairs and room < max_length and not fitting >> room
            length = (pairs if ends else fitting).bit_length() - 1
            take(length, 1)
            pieces[length] = pieces.get(length, 0) + 1
            room -= length
        times = 1 + min(left[length] // number for length, number in pieces.items())
        columns = []
        for length, number in pieces.items():
            if times > 1:
                take(length, number * (times - 1))
            columns.append(np.arange(nexts[length], nexts[length] + number * times, dtype=np.int32).reshape(times, number))
            nexts[length] += number * times
        slots.append(np.hstack(columns).ravel())
        sizes.append(np.full(times, sum(pieces.values()), dtype=np.int32))
    return np.concatenate(slots), np.concatenate([np.zeros(1, dtype=np.int32), np.cumsum(np.concatenate(sizes), dtype=np.int32)])


def _pack_in_passing(lengths: np.ndarray, max_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Best fit: a document joins the fullest sequence begun before it that has room for it, else it begins one.

    Returns:
        the documents of all sequences end to end, and where each sequence begins.
    """
    found, number_of_packs = np.empty(len(lengths), dtype=np.int32), 0
    by_room: list[list[int]] = [[] for _ in range(max_length + 1)]  # sequences with exactly that many tokens of room
    rooms = 0  # bit r is set where by_room[r] is not empty
    for document, length in enumerate(lengths):
        length = int(length)
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            number = by_room[room].pop()
            if not by_room[room]:
                rooms &= ~(1 << room)
        else:
            room, number = max_length, number_of_packs
            number_of_packs += 1
        found[document] = number
        if left := room - length:
            by_room[left].append(number)
            rooms |= 1 << left
    sizes = np.bincount(found, minlength=number_of_packs)
    return np.argsort(found, kind="stable").astype(np.int32), np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)
