"""A step's micro-batches: the same tokens however they are split, padding that counts nowhere, threads that tell and leave."""

import threading
import time
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from conftest import NO_GPU

from engine.attention import PackedAttention
from engine.data.loader import AHEAD, Loader, collate
from engine.data.plan import Plan
from engine.loss import summed_cross_entropy
from engine.models import weights

CPU = torch.device("cpu")


@dataclass
class Documents:
    """As much of a Dataset as the loader knows."""

    lengths: np.ndarray
    source: np.ndarray
    ids: list[np.ndarray]
    supervised: list[np.ndarray]

    @property
    def targets(self) -> np.ndarray:
        return np.asarray([mask.sum() for mask in self.supervised])

    def read(self, document: int) -> tuple[np.ndarray, np.ndarray]:
        return self.ids[document], self.supervised[document]


def documents(count: int, longest: int = 40) -> Documents:
    draw = np.random.default_rng(count)
    lengths = draw.integers(2, longest + 1, count).astype(np.int32)
    supervised = [np.arange(length) >= draw.integers(1, length + 1) for length in lengths]  # of some rows nothing
    return Documents(lengths, draw.integers(0, 3, count).astype(np.int16), [draw.integers(1, 300, length).astype(np.int32) for length in lengths],
                     supervised)


def cost(tokens: int, targets: int, lengths: np.ndarray) -> float:
    return tokens + 0.01 * float((lengths**2).sum())


def plan_of(rows: Documents, packing: bool, epochs: int = 2, global_batch: int = 5) -> Plan:
    return Plan(rows.lengths, rows.targets, 64, global_batch, packing, True, 3, epochs)


def loader_of(rows: Documents, plan: Plan, rank: int = 0, size: int = 1, micro_batch: int = 2, first: int = 0) -> Loader:
    return Loader(rows, plan, rank, size, micro_batch, cost, CPU, first, plan.num_steps)


def threads() -> list[str]:
    """Threads of loaders that are still there a moment later."""
    end = time.monotonic() + 5
    while found := [thread.name for thread in threading.enumerate() if thread.name.startswith("loader")]:
        if time.monotonic() > end:
            break
        time.sleep(0.01)
    return found


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("micro_batch", [1, 2, 4])
def test_ranks_and_micro_batches_share_a_step_without_changing_it(packing, size, micro_batch):
    rows = documents(41)
    plan = plan_of(rows, packing)
    for together in zip(*(loader_of(rows, plan, rank, size, micro_batch) for rank in range(size)), strict=True):
        step, found, targets, places = together[0][0], [], 0, []
        for other, batches in together:
            assert [sequence.tolist() for sequence in other.sequences] == [sequence.tolist() for sequence in step.sequences]
            for batch in batches:
                targets, places = targets + len(batch.targets), places + batch.places * (len(batch.ids) > 1)
                assert len(batch.places) <= micro_batch and sum(batch.documents) == sum(batch.lengths) == len(batch.ids) == len(batch.positions)
                found += [tuple(part.tolist()) for part in batch.ids.split(batch.documents) if part.any()]
        assert sorted(found) == sorted(tuple(rows.ids[document]) for sequence in step.sequences for document in sequence)
        assert targets == step.num_targets and sorted(places) == list(range(len(step.sequences)))
        assert step.num_tokens == sum(map(len, found)) == step.lengths.sum()


def test_a_loader_starts_at_any_step():
    rows = documents(60)
    plan = plan_of(rows, True)
    whole, rest = list(loader_of(rows, plan)), list(loader_of(rows, plan, first=plan.num_steps - 3))
    assert [step.number for step, _ in whole] == list(range(plan.num_steps)) and [step.number for step, _ in rest] == list(range(plan.num_steps))[-3:]
    for (_, batches), (_, again) in zip(whole[-3:], rest, strict=True):
        assert all(torch.equal(one.ids, other.ids) and torch.equal(one.at, other.at) for one, other in zip(batches, again, strict=True))
    assert not list(Loader(rows, plan, 0, 1, 2, cost, CPU, 4, 4)) and len(list(Loader(rows, plan, 0, 1, 2, cost, CPU, 4, 5))) == 1


@pytest.mark.parametrize("packing", [True, False])
def test_targets_are_the_next_token_of_the_same_document(packing):
    rows = documents(50)
    for step, batches in loader_of(rows, plan_of(rows, packing)):
        for batch in batches:
            assert torch.equal(batch.ids[batch.at + 1], batch.targets)
            assert all(torch.equal(part, torch.arange(len(part))) for part in batch.positions.split(batch.documents))
            assert int((batch.positions[batch.at + 1] == 0).sum()) == 0
            assert {tensor.dtype for tensor in (batch.ids, batch.positions, batch.at, batch.targets, batch.sources)} == {torch.int64}
        per_source = np.bincount(torch.cat([batch.sources for batch in batches]).numpy(), minlength=3)
        inside = np.concatenate(step.sequences)
        assert per_source.tolist() == [int(rows.targets[inside][rows.source[inside] == source].sum()) for source in range(3)]


def test_nothing_is_predicted_across_documents():
    rows = documents(3)
    rows.supervised = [np.ones(length, dtype=bool) for length in rows.lengths]
    batch = collate(rows, [np.asarray([0, 1]), np.asarray([2])], [0, 1], CPU, 97)
    assert len(batch.at) == rows.lengths.sum() - 3 and (batch.positions[batch.at + 1] > 0).all()


def test_packed_sequences_have_one_shape_and_padding_is_a_document_without_targets():
    rows = documents(50)
    plan = plan_of(rows, True)
    for step, batches in loader_of(rows, plan):
        assert all(batch.lengths == [64] * len(batch.places) for batch in batches)
        for batch in batches:
            parts = iter(zip(batch.ids.split(batch.documents), batch.documents, strict=True))
            for place in batch.places:  # a sequence's own documents, then what is missing to 64 as one document of zeros
                own = step.sequences[place]
                assert [tuple(next(parts)[0].tolist()) for _ in own] == [tuple(rows.ids[document]) for document in own]
                if missing := 64 - int(rows.lengths[own].sum()):
                    padding, length = next(parts)
                    assert length == missing and not padding.any()
            assert next(parts, None) is None
            ends = np.cumsum(batch.documents)
            padded = np.concatenate([np.arange(end - length, end) for end, length in zip(ends, batch.documents, strict=True)
                                     if not batch.ids[end - length : end].any()] or [[]])
            assert not np.isin(batch.at.numpy(), padded).any() and (batch.targets > 0).all()
    assert all(batch.lengths == [int(rows.lengths[step.sequences[place][0]]) for place in batch.places]
               for step, batches in loader_of(rows, plan_of(rows, False)) for batch in batches)


def test_a_rank_without_sequences_gets_one_token_without_a_target():
    rows = documents(3)
    plan = Plan(rows.lengths, rows.targets, 64, 8, False, True, 0, 1)
    idle = [batches for rank in range(4) for step, batches in loader_of(rows, plan, rank, 4) if not set(batches[0].ids.tolist()) - {0}]
    assert len(idle) == 1
    ((batch,),) = idle
    assert batch.ids.shape == batch.positions.shape == (1,) and batch.documents == batch.lengths == [1]
    assert len(batch.at) == len(batch.targets) == len(batch.sources) == 0


@pytest.mark.parametrize("path", ["sdpa", "reference"])
def test_padding_changes_neither_loss_nor_gradient(tiny, path):
    rows = documents(12)
    sequences = [np.asarray([0, 1]), np.asarray([2])]
    found = []
    for fill_to in (0, 97):
        model = weights.build(tiny, "pretrained", 0, torch.float64, torch.float64, CPU)
        batch = collate(rows, sequences, [0, 1], CPU, fill_to)
        hidden = model(batch.ids, batch.positions, PackedAttention(batch.documents, CPU, path))
        loss = summed_cross_entropy(hidden[batch.at], model.lm_head.weight, batch.targets)
        loss.backward()
        found.append((loss.detach(), [parameter.grad for parameter in model.parameters()]))
    assert torch.allclose(found[0][0], found[1][0], rtol=1e-12)
    assert all(torch.allclose(one, other, rtol=1e-9, atol=1e-12) for one, other in zip(found[0][1], found[1][1], strict=True))


class Broken(Documents):
    def read(self, document: int) -> tuple[np.ndarray, np.ndarray]:
        if document == 17:
            raise OSError("the disk is gone")
        return super().read(document)


def test_an_error_in_a_thread_is_raised_where_its_step_is_due():
    rows = documents(40)
    broken = Broken(rows.lengths, rows.source, rows.ids, rows.supervised)
    plan, done = plan_of(rows, False), []
    due = next(number for number in range(plan.num_steps) if 17 in np.concatenate(plan.step(number).sequences))
    with pytest.raises(OSError, match="the disk is gone") as caught:
        for step, _ in loader_of(broken, plan):
            done.append(step.number)
    assert done == list(range(due)) and any(entry.name == "read" for entry in caught.traceback)
    assert not threads()


def test_leaving_early_leaves_no_thread_behind():
    rows = documents(200)
    for _ in loader_of(rows, plan_of(rows, True)):
        break
    assert not threads()
    with pytest.raises(ZeroDivisionError) as caught:
        for step, _ in loader_of(rows, plan_of(rows, True)):
            1 / (step.number - 3)
    assert not threads() and caught  # what was raised still holds the loop's frame


def test_a_bounded_number_of_steps_is_prepared_while_the_loop_computes(monkeypatch):
    prepared, prepare = [], Loader._prepare
    monkeypatch.setattr(Loader, "_prepare", lambda self, number: (prepare(self, number), prepared.append((number, threading.current_thread().name)))[0])
    rows = documents(200)
    plan = plan_of(rows, True)
    for step, _ in loader_of(rows, plan):
        wanted = min(step.number + AHEAD, plan.num_steps - 1) + 1
        end = time.monotonic() + 5
        while len(prepared) < wanted and time.monotonic() < end:
            time.sleep(0.001)
        time.sleep(0.005)  # for one too many to show
        assert [number for number, _ in prepared] == list(range(wanted)) and {name for _, name in prepared} == {"loader_0"}
    assert not threads()


@pytest.mark.cuda
def test_tensors_arrive_on_the_device():
    if not torch.cuda.is_available():
        pytest.skip(NO_GPU)
    rows, device = documents(60), torch.device("cuda", 0)
    plan = plan_of(rows, True)
    assert all(batch.ids.is_pinned() for batch in Loader(rows, plan, 0, 1, 2, cost, device, 0, 1)._prepare(0)[1])
    for (_, here), (_, there) in zip(loader_of(rows, plan), Loader(rows, plan, 0, 1, 2, cost, device, 0, plan.num_steps), strict=True):
        for one, other in zip(here, there, strict=True):
            assert other.ids.device == device and torch.equal(one.ids, other.ids.cpu()) and torch.equal(one.sources, other.sources.cpu())
