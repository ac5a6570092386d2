"""Invariants 2 and 3: which documents form a step depends on neither ranks nor micro-batches; each epoch holds every document once."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.data.plan import TOKENS_TO_BEGIN, Plan, _stir, pack, share, shuffled
from engine.dropout import mix

# Tokens of rows of GSM8K (7,000) and self-instruct (427) in the chat form of SmolLM2, at 41 quantiles.
QUANTILES = {"gsm8k": (7000, (
    73, 99, 106, 112, 117, 121, 124, 128, 131, 134, 137, 140, 143, 146, 149, 152, 156, 159, 162, 165, 168, 172, 176, 180, 184, 188, 192, 196, 201, 206,
    211, 216, 222, 229, 237, 246, 256, 270, 288, 312, 489)), "self_instruct": (427, (
    44, 53, 57, 59, 62, 65, 68, 70, 72, 76, 80, 83, 87, 91, 94, 98, 103, 108, 113, 119, 122, 125, 131, 134, 141, 147, 152, 157, 162, 172, 182, 193, 215,
    234, 248, 262, 281, 323, 397, 468, 1410))}


def lengths_like(name: str) -> np.ndarray:
    count, quantiles = QUANTILES[name]
    return np.interp(np.linspace(0, 1, count), np.linspace(0, 1, len(quantiles)), quantiles).astype(np.int32)


def costs_of(linear: float, head: float, heads: int, layers: int):
    """What metrics.Flops.of counts for LoRA on a frozen model with that many weights in its linear layers and its head."""
    return lambda tokens, targets, lengths: 4 * linear * tokens + 4 * head * targets + layers * 14 * heads * float((lengths.astype(float) ** 2 / 2).sum())


COSTS = {"llama-2-7b": costs_of(6.476e9, 131e6, 4096, 32), "smollm2-135m": costs_of(106.2e6, 28.3e6, 576, 30)}


@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=60), global_batch=st.integers(1, 9), packing=st.booleans(),
       shuffle=st.booleans(), seed=st.integers(0, 5))
@settings(max_examples=200, deadline=None)
def test_each_epoch_holds_every_document_once_and_no_sequence_is_too_long(lengths, global_batch, packing, shuffle, seed):
    lengths = np.asarray(lengths, dtype=np.int32)
    plan = Plan(lengths, lengths // 2, 40, global_batch, packing, shuffle, seed, epochs=3)
    for epoch in range(3):
        steps = [plan.step(epoch * plan.steps_per_epoch + place) for place in range(plan.steps_per_epoch)]
        documents = np.concatenate([np.concatenate(step.sequences) for step in steps])
        assert sorted(documents) == list(range(len(lengths)))
        assert {step.epoch for step in steps} == {epoch}
        assert [step.is_last_of_epoch for step in steps] == [False] * (len(steps) - 1) + [True]
        assert all(len(step.sequences) == global_batch for step in steps[:-1]) and 1 <= len(steps[-1].sequences) <= global_batch
        assert all(1 <= lengths[sequence].sum() <= 40 for step in steps for sequence in step.sequences)
        assert sum(step.num_tokens for step in steps) == lengths.sum() and sum(step.num_targets for step in steps) == (lengths // 2).sum()
        for step in steps:
            inside = np.concatenate(step.sequences)
            assert np.array_equal(step.lengths, lengths[inside]) and np.array_equal(step.targets, lengths[inside] // 2)


@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=80), global_batch=st.integers(1, 20), packing=st.booleans(),
       size=st.integers(1, 6), micro_batch=st.integers(1, 5), weight=st.floats(0, 2))
@settings(max_examples=200, deadline=None)
def test_ranks_share_all_places_of_a_step(lengths, global_batch, packing, size, micro_batch, weight):
    lengths = np.asarray(lengths, dtype=np.int32)
    plan = Plan(lengths, lengths // 2, 40, global_batch, packing, True, 0, epochs=2)
    for number in range(plan.num_steps):
        step = plan.step(number)
        places = share(step, size, lambda tokens, targets, lengths: tokens + weight * float((lengths**2).sum()), micro_batch)
        assert len(places) == size and sorted(itertools.chain(*places)) == list(range(len(step.sequences)))
        assert places == [sorted(mine) for mine in places]
        if len(step.sequences) >= size:
            assert all(places)


def seconds(step, places, cost, micro_batch) -> float:
    """What a rank with these places spends, in units of `cost`: computed tokens, padding and micro-batches included."""
    bounds = np.cumsum([0, *map(len, step.sequences)])
    total = cost(TOKENS_TO_BEGIN, 0, np.zeros(1)) * -(-len(places) // micro_batch)
    for inside in (slice(bounds[place], bounds[place + 1]) for place in places):
        total += cost(max(step.fill_to, step.lengths[inside].sum()), step.targets[inside].sum(), step.lengths[inside])
    return total


@pytest.mark.parametrize("model", COSTS)
@pytest.mark.parametrize("name", QUANTILES)
@pytest.mark.parametrize("micro_batch", [1, 4])
@pytest.mark.parametrize("size", [2, 4])
def test_the_slowest_rank_is_near_the_mean(name, model, micro_batch, size):
    lengths, cost = np.tile(lengths_like(name), 4 if name == "self_instruct" else 1), COSTS[model]
    plan = Plan(lengths, np.random.default_rng(0).integers(1, lengths), 2048, 32, True, True, 0, epochs=1)
    for step in map(plan.step, range(plan.steps_per_epoch - 1)):  # the last has sequences left over
        spent = [seconds(step, places, cost, micro_batch) for places in share(step, size, cost, micro_batch)]
        assert max(spent) <= 1.01 * np.mean(spent)


@pytest.mark.parametrize("name", QUANTILES)
@pytest.mark.parametrize("size", [2, 4])
def test_sequences_of_all_lengths_are_balanced_too(name, size):
    lengths, cost = lengths_like(name), COSTS["smollm2-135m"]
    plan = Plan(lengths, lengths // 2, 2048, 32, False, True, 0, epochs=1)
    slowest, mean, in_turn = 0.0, 0.0, 0.0
    for step in map(plan.step, range(plan.steps_per_epoch - 1)):
        spent = [seconds(step, places, cost, 4) for places in share(step, size, cost, 4)]
        slowest, mean = slowest + max(spent), mean + np.mean(spent)
        in_turn += max(seconds(step, range(rank, 32, size), cost, 4) for rank in range(size))
    assert slowest <= 1.05 * mean and slowest - mean < (in_turn - mean) / 3


@pytest.mark.parametrize("count", range(1, 40))
@pytest.mark.parametrize(("size", "micro_batch"), [(1, 4), (2, 4), (3, 4), (4, 4), (2, 1), (4, 8)])
def test_no_rank_begins_a_micro_batch_for_a_small_gain(count, size, micro_batch):
    """Sequences of one shape whose documents differ: no more micro-batches than even counts need, and the counts are even."""
    lengths = np.concatenate([np.full(1 + 7 * (i % 3), 64 // (1 + 7 * (i % 3))) for i in range(count)])
    plan = Plan(lengths, lengths // 2, 64, count, True, False, 0, epochs=1)
    step = plan.step(0)
    places = share(step, size, lambda tokens, targets, lengths: 1000.0 * tokens + float((lengths**2).sum()), micro_batch)
    counts = [len(mine) for mine in places]
    assert max(counts) - min(counts) <= 1
    assert max(-(-n // micro_batch) for n in counts) == -(-len(step.sequences) // (size * micro_batch))


def test_a_micro_batch_is_begun_only_where_it_pays():
    """Two ranks and eight sequences, one of which costs as much as `heavy` others: the rank that has it gets fewer, unless
    the other would begin one more micro-batch for less than that costs."""

    def counts(heavy: float) -> list[int]:
        lengths = np.full(8, 1000)
        step = Plan(lengths, np.arange(8) == 0, 1000, 8, False, False, 0, epochs=1).step(0)
        return sorted(len(mine) for mine in share(step, 2, lambda tokens, targets, _: tokens + 1000 * heavy * targets, 4))

    worth = TOKENS_TO_BEGIN / 1000
    assert counts(0) == counts(0.9 + worth) == [4, 4] and counts(1.1 + worth) == [3, 5] and counts(9) == [1, 7]


def test_a_long_document_alone_gets_a_rank_of_its_own():
    lengths = np.asarray([2048] + [50] * 31)
    places = share(Plan(lengths, lengths, 2048, 32, False, False, 0, epochs=1).step(0), 4, COSTS["llama-2-7b"], 4)
    assert places[0] == [0] and all(10 <= len(mine) <= 11 for mine in places[1:])


def test_order_is_the_same_in_every_version():
    key = np.uint64(mix(7, 3))
    assert shuffled(np.arange(12), 12, key).tolist() == [3, 1, 9, 8, 0, 5, 11, 10, 2, 4, 7, 6]
    lengths = np.asarray([3, 5, 2, 7, 3, 4, 5, 3, 6, 2, 3, 5])
    plan = Plan(lengths, lengths // 2, 10, 3, True, True, 7, epochs=2)
    assert [[sequence.tolist() for sequence in plan.step(number).sequences] for number in range(plan.num_steps)] == [
        [[8, 5], [6, 9, 4], [3, 7]], [[11, 1], [10, 0, 2]], [[10, 0, 9], [8, 5], [11, 6]], [[3, 7], [1, 2, 4]]]
    plan = Plan(lengths, lengths // 2, 10, 5, False, True, 7, epochs=2)
    assert [np.concatenate(plan.step(number).sequences).tolist() for number in range(plan.num_steps)] == [
        [6, 1, 2, 4, 9], [8, 11, 3, 10, 5], [7, 0], [2, 6, 4, 0, 3], [1, 9, 10, 7, 5], [11, 8]]


@given(counts=st.lists(st.integers(1, 70), min_size=1, max_size=6), seed=st.integers(0, 2**64 - 1))
@settings(max_examples=200, deadline=None)
def test_shuffled_is_one_to_one_within_every_class(counts, seed):
    index, count = np.concatenate([np.arange(n) for n in counts]), np.repeat(counts, counts)
    key = np.repeat(_stir(np.uint64(seed), np.arange(len(counts))), counts)
    found = shuffled(index, count, key)
    assert [sorted(part) for part in np.split(found, np.cumsum(counts)[:-1])] == [list(range(n)) for n in counts]
    assert np.array_equal(found[:3], shuffled(index[:3], count[:3], key[:3]))  # an element does not depend on those beside it


@pytest.mark.parametrize("count", [2, 3, 4, 5, 6])
def test_every_order_is_equally_likely(count):
    keys, orders = 20_000, math.factorial(count)
    key = _stir(np.uint64(1), np.arange(keys))
    found = np.stack([shuffled(np.full(keys, i), count, key) for i in range(count)], axis=1)
    seen = np.unique(found, axis=0, return_counts=True)[1]
    expected = keys / orders
    chi_square = float(((seen - expected) ** 2 / expected).sum())
    assert len(seen) == orders and chi_square < orders - 1 + 5 * math.sqrt(2 * (orders - 1))


def test_stir_continues_mix():
    assert [int(x) for x in _stir(np.uint64(mix(5, 9)), np.asarray([0, 1, 2**40]))] == [mix(5, 9, 0), mix(5, 9, 1), mix(5, 9, 2**40)]


def test_epochs_and_seeds_have_orders_of_their_own():
    lengths = lengths_like("self_instruct")
    for packing in (True, False):
        orders = []
        for seed in range(3):
            plan = Plan(lengths, lengths, 2048, 8, packing, True, seed, epochs=3)
            orders += [tuple(np.concatenate(plan.step(epoch * plan.steps_per_epoch).sequences)) for epoch in range(3)]
        assert len(set(orders)) == 9


def test_documents_of_one_length_meet_others_in_every_epoch():
    lengths = np.repeat(np.asarray([10, 20, 30]), 100)
    plan = Plan(lengths, lengths, 60, 1000, True, True, 0, epochs=2)
    one, other = ({frozenset(sequence.tolist()) for sequence in plan.step(epoch).sequences} for epoch in range(2))
    assert len(one & other) <= 5


@pytest.mark.parametrize("name", QUANTILES)
def test_packing_leaves_almost_no_padding(name):
    lengths = lengths_like(name)
    plan = Plan(lengths, lengths, 2048, 32, True, True, 0, epochs=1)
    assert plan.sequences_per_epoch == -(-int(lengths.sum()) // 2048)  # no packing needs fewer
    for rows in (np.arange(50), np.arange(len(lengths))[::-1]):
        packs = pack(lengths, rows, 2048, longest_first=True)
        assert sorted(np.concatenate(packs)) == sorted(rows) and len(packs) == -(-int(lengths[rows].sum()) // 2048)


def test_a_million_rows():
    lengths = np.tile(lengths_like("gsm8k"), 143)
    plan = Plan(lengths, lengths // 2, 2048, 32, True, True, 0, epochs=3)
    assert plan.fill > 0.99
    assert sum(array.nbytes for array in (plan.by_length, plan.slots, plan.starts)) < 9 * len(lengths)
    found = np.concatenate([np.concatenate(plan.step(number).sequences) for number in range(0, plan.num_steps, 50)])
    assert len(found) > 50_000 and np.bincount(found).max() <= 3


def test_without_shuffling_documents_keep_the_order_of_the_file():
    lengths = np.full(10, 4)
    assert [row for sequence in Plan(lengths, lengths, 8, 2, True, False, 0, 1).step(0).sequences for row in sequence] == [0, 1, 2, 3]
    lengths = np.asarray([6, 6, 4, 3, 1])
    assert [sequence.tolist() for sequence in Plan(lengths, lengths, 10, 9, True, False, 0, 1).step(0).sequences] in ([[0, 2], [1, 3, 4]], [[0, 3, 4], [1, 2]])
    assert [sequence.tolist() for sequence in Plan(lengths, lengths, 10, 9, False, False, 0, 1).step(0).sequences] == [[0], [1], [2], [3], [4]]
