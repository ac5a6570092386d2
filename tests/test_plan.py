"""Invariants 2 and 3: which rows form a step depends on neither ranks nor micro-batches; each epoch holds every row once."""

import numpy as np
import pytest
import torch
from conftest import ragged_rows, write_rows
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.data.dataset import load_dataset
from engine.data.loader import micro_batches
from engine.data.plan import Plan, pack, permutation
from engine.data.tokenizer import load_tokenizer

CPU = torch.device("cpu")


@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=60), global_batch=st.integers(1, 9), packing=st.booleans(),
       shuffle=st.booleans(), seed=st.integers(0, 5))
@settings(max_examples=150, deadline=None)
def test_each_epoch_holds_every_row_once_and_no_sequence_is_too_long(lengths, global_batch, packing, shuffle, seed):
    lengths = np.asarray(lengths)
    plan = Plan(lengths, lengths // 2, 40, global_batch, packing, shuffle, seed, epochs=3)
    for epoch in range(3):
        steps = [plan.step(epoch * plan.steps_per_epoch + place) for place in range(plan.steps_per_epoch)]
        rows = np.concatenate([np.concatenate(step.sequences) for step in steps])
        assert sorted(rows) == list(range(len(lengths)))
        assert [step.is_last_of_epoch for step in steps] == [False] * (len(steps) - 1) + [True]
        assert all(len(step.sequences) == global_batch for step in steps[:-1]) and 1 <= len(steps[-1].sequences) <= global_batch
        assert all(lengths[sequence].sum() <= 40 for step in steps for sequence in step.sequences)
        assert sum(step.num_tokens for step in steps) == lengths.sum() and sum(step.num_targets for step in steps) == (lengths // 2).sum()


@pytest.mark.parametrize("packing", [True, False])
def test_ranks_and_micro_batches_share_a_step_without_changing_it(tiny, tmp_path, packing):
    rows = load_dataset(write_rows(tmp_path / "rows.jsonl", ragged_rows(29)), load_tokenizer(tiny), "alpaca", 64, "error", tmp_path)
    plan = Plan(rows.lengths, rows.targets_per_row(), 64, 8, packing, True, 1, epochs=2)
    for number in range(plan.num_steps):
        step = plan.step(number)
        wanted = sorted(tuple(rows.tokens[rows.offsets[row] : rows.offsets[row + 1]]) for sequence in step.sequences for row in sequence)
        for size in (1, 2, 4):
            for micro_batch in (1, 2, 4):
                found, targets, places = [], 0, []
                for rank in range(size):
                    for batch in micro_batches(step, rows, rank, size, micro_batch, CPU):
                        if batch.documents == [1]:
                            continue  # the empty one of a rank without work
                        parts = batch.ids.split(batch.documents)
                        assert all(torch.equal(p, torch.arange(len(p))) for p in batch.positions.split(batch.documents))
                        found += [tuple(part.tolist()) for part in parts]
                        targets, places = targets + len(batch.targets), places + batch.places
                assert sorted(found) == wanted and targets == step.num_targets and sorted(places) == list(range(len(step.sequences)))


def test_targets_are_the_next_token_of_the_same_row(tiny, tmp_path):
    rows = load_dataset(write_rows(tmp_path / "rows.jsonl", ragged_rows(9)), load_tokenizer(tiny), "alpaca", 64, "error", tmp_path)
    (batch,) = micro_batches(Plan(rows.lengths, rows.targets_per_row(), 64, 99, True, False, 0, 1).step(0), rows, 0, 1, 99, CPU)
    assert torch.equal(batch.ids[batch.at + 1], batch.targets)
    assert int((batch.positions[batch.at + 1] == 0).sum()) == 0


def test_order_is_the_same_in_every_version():
    assert permutation(12, 7, 3).tolist() == [2, 3, 1, 11, 10, 6, 9, 5, 7, 8, 0, 4]
    assert sorted(permutation(10_000, 1)) == list(range(10_000))


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = [tuple(permutation(100, seed, epoch)) for seed in range(3) for epoch in range(3)]
    assert len(set(orders)) == 9


def test_packing_fills_sequences():
    lengths = np.random.default_rng(0).integers(50, 400, 2000)
    packs = pack(lengths, np.arange(2000), 2048, longest_first=True)
    assert lengths.sum() / (len(packs) * 2048) > 0.99


def test_without_shuffling_rows_keep_the_order_of_the_file():
    lengths = np.full(10, 4)
    assert [row for sequence in Plan(lengths, lengths, 8, 2, True, False, 0, 1).step(0).sequences for row in sequence] == [0, 1, 2, 3]
