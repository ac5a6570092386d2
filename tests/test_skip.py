"""data.skip: rows that are gone on without, while every other row keeps its step, its place and its dropout, and the ledger balances."""

import json

import numpy as np
import pytest
import torch
from conftest import load_dataset, ragged_rows, steps, write_rows
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_gradient import reference_gradients
from test_loader import CPU, documents
from test_resume import stop_after

from engine import train
from engine.attention import PackedAttention
from engine.config import Data
from engine.data import dataset, ledger
from engine.data.loader import Loader, collate
from engine.data.plan import Plan
from engine.data.tokenizer import load_tokenizer
from engine.dropout import DropoutKeys
from engine.errors import CHECKPOINT, PREEMPTED, USER, EngineError
from engine.loss import summed_cross_entropy
from engine.models import weights


def account_of(run) -> tuple[dict, list[dict]]:
    rejected = [json.loads(line) for line in (run / "rejected.jsonl").read_text().splitlines()]
    return json.loads((run / "ledger.json").read_text())["train"], rejected


@pytest.mark.parametrize(("size", "packing"), [(1, True), (2, True), (2, False), (4, False)])
def test_the_gradient_is_that_of_the_batch_without_the_row(tiny, recipe, trained, tmp_path, size, packing):
    rows = ragged_rows(7, seed=5)
    write_rows(tmp_path / "rows.jsonl", rows)
    trained(size, recipe("train.micro_batch=2", "train.max_steps=1", "optim.betas=[0, 0.999]", "optim.clip_norm=0", f"data.packing={packing}",
                         f"data.skip=['{tmp_path}/rows.jsonl:2', '{tmp_path}/rows.jsonl:6']"))
    fewer = write_rows(tmp_path / "fewer.jsonl", [row for line, row in enumerate(rows, 1) if line not in (2, 6)])
    expected = reference_gradients(load_dataset(fewer, load_tokenizer(tiny), "alpaca", 64, "error", tmp_path / "cache"), tiny)
    moments = load_file(tmp_path / "runs/run/checkpoints/step-000000001/optimizer.safetensors")
    for name, gradient in expected.items():
        assert (moments[f"{name}.exp_avg"].double() - gradient).norm() <= 3e-6 * gradient.norm(), name
    account, rejected = account_of(tmp_path / "runs/run")
    assert account["files"][0]["skipped"] == {"0": 2} and account["files"][0]["trained"] == {"1": 5} and account["documents_trained"] == 5
    assert [(one["row"].rpartition(":")[2], one["fate"], one["reason"]) for one in rejected] == [(line, "skipped", "skipped by data.skip") for line in "26"]


@given(lengths=st.lists(st.integers(3, 90), min_size=2, max_size=30), size=st.integers(1, 3), global_batch=st.integers(1, 6), epochs=st.integers(1, 3),
       packing=st.booleans(), too_long=st.sampled_from(["truncate", "split"]), repeat=st.integers(1, 2),
       launches=st.lists(st.tuples(st.floats(0, 1), st.sets(st.integers(1, 30), max_size=4)), min_size=1, max_size=4))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_ledger_balances_whatever_is_skipped_and_when(tiny, tmp_path, lengths, size, global_batch, epochs, packing, too_long, repeat, launches):
    """Launches that each go on with another list: steps have the documents they would have had, less those skipped; times and sums are as trained."""
    path = write_rows(tmp_path / "skip.jsonl", [{"instruction": "cat", "output": "dog " * length} for length in lengths])
    cfg = Data(train=[{"path": str(path), "repeat": repeat}], max_length=64, too_long=too_long, packing=packing, cache=str(tmp_path / "cache"))
    whole = dataset.load(cfg, "train", load_tokenizer(tiny))
    undisturbed = Plan(whole.lengths, whole.targets, 64, global_batch, packing, True, 1, epochs)
    stops = sorted(round(cut * undisturbed.num_steps) for cut, _ in launches[1:]) + [undisturbed.num_steps]
    seen, state, start = np.zeros(len(whole), np.int64), None, 0
    for stop, (_, lines) in zip(stops, launches, strict=True):
        cfg.skip = [f"{path}:{line}" for line in sorted(lines) if line <= len(lengths)]
        rows = dataset.load(cfg, "train", load_tokenizer(tiny))
        assert rows.digest == whole.digest
        plan, counted = Plan(rows.lengths, rows.targets, 64, global_batch, packing, True, 1, epochs, rows.skipped), ledger.Counts()
        if state:
            counted = ledger.go_on(plan, start, json.loads(json.dumps(state)), {"data.skip"})
        steps = [list(Loader(rows, plan, rank, size, 2, lambda tokens, *_: tokens, torch.device("cpu"), start, stop)) for rank in range(size)]
        for together in zip(*steps, strict=True):
            step, batches = together[0][0], [batch for _, mine in together for batch in mine]
            counted += ledger.as_planned(step, ledger.Counts.of(batches))
            planned = undisturbed.step(step.number)
            assert [sequence.tolist() for sequence in step.sequences] == [sequence.tolist() for sequence in planned.sequences]
            there = ~np.isin(planned.documents, rows.skipped)
            assert sorted(np.concatenate([batch.trained for batch in batches])) == sorted(planned.documents[there])
            assert step.num_targets == planned.targets[there].sum() == sum(len(batch.targets) for batch in batches)
            for batch in batches:
                np.add.at(seen, batch.trained, 1)
                if len(batch.trained):  # what dropout goes by
                    assert batch.lengths == [64 if packing else int(whole.lengths[step.sequences[place]].sum()) for place in batch.places]
        start, state = stop, {"skips": plan.skips, "trained": counted}
        times = plan.times_trained(stop)
        assert np.array_equal(times, seen)
        account = ledger.account(rows, times)
        ledger.compare(account, counted)
        entry = account["files"][0]
        assert sum(entry.get("skipped", {}).values()) == len(cfg.skip) and sum(entry["trained"].values()) == entry["kept"] - len(cfg.skip)


def test_another_list_is_refused_unless_it_is_allowed_and_the_ledger_tells_both(recipe, ranks, trained, tmp_path):
    one, two = (f"{tmp_path}/rows.jsonl:{line}" for line in (3, 8))
    steps = ("train.epochs=4", "data.packing=true", "train.global_batch=4", "checkpoint.every_steps=2")
    assert set(ranks(2, lambda: stop_after(8, recipe(*steps))).wait()) == {PREEMPTED}
    with pytest.raises(EngineError) as caught:
        train.main(recipe(*steps, f"data.skip=['{one}']"))
    assert caught.value.exit_code == CHECKPOINT and f"data.skip: [] → ['{one}']" in caught.value.text and "resume.allow=[data.skip]" in caught.value.text
    before = account_of(tmp_path / "runs/run")[0]
    second = ranks(2, lambda: stop_after(15, recipe(*steps, f"data.skip=['{one}', '{two}']", "resume.allow=[data.skip]")))
    assert set(second.wait()) == {PREEMPTED}, second.log.read_text()
    assert second.log.read_text().count("WARNING") == 1 and "as resume.allow says: data.skip: [] → [" in second.log.read_text()
    middle, rejected = account_of(tmp_path / "runs/run")
    assert sum(middle["files"][0]["skipped"].values()) == 2 and [item["row"] for item in rejected] == [one, two]
    assert set(middle["files"][0]["skipped"]) <= {"1", "2"} and middle["documents_trained"] > before["documents_trained"]
    # the second row is taken up again; goes on at another world size
    trained(1, recipe(*steps, f"data.skip=['{one}']", "resume.allow=[data.skip]"))
    account, rejected = account_of(tmp_path / "runs/run")
    entry = account["files"][0]
    assert [item["row"] for item in rejected] == [one] and sum(entry["skipped"].values()) == 1 and sum(entry["trained"].values()) == 22
    assert entry["trained"].get("4", 0) >= 21, "rows that were never skipped"
    newest = max((tmp_path / "runs/run/checkpoints").iterdir())
    state = json.loads((newest / "state.json").read_text())
    assert [first for first, _ in state["skips"]] == [0, 8, 15] and len(state["identity"]["allowed"]) == 2
    assert state["identity"]["data.skip"] == [one] and "after step 8: data.skip: [] → " in state["identity"]["allowed"][0]


def test_a_step_without_a_target_moves_nothing_and_is_one_warning(recipe, ranks, tmp_path):
    write_rows(tmp_path / "rows.jsonl", ragged_rows(12))
    skip = ", ".join(f"'{tmp_path}/rows.jsonl:{line}'" for line in (5, 6, 7, 8))
    started = ranks(2, recipe("train.global_batch=4", "data.shuffle=false", f"data.skip=[{skip}]", "optim.weight_decay=0.1", "checkpoint.every_steps=1",
                              "checkpoint.keep=9", "log.every_steps=1"))
    assert started.wait() == [0, 0], started.log.read_text()
    said, run = started.log.read_text(), tmp_path / "runs/run"
    assert said.count("WARNING") == 1 and "WARNING step 2 has no target left" in said
    lines = steps(run)
    assert ["train/loss" in line for line in lines] == [True, False, True] and [line["train/skipped"] for line in lines] == [0, 1, 0]
    for name in ("model", "optimizer"):
        one, two, three = (load_file(run / f"checkpoints/step-{step:09d}/{name}.safetensors") for step in (1, 2, 3))
        assert all(torch.equal(one[key], two[key]) for key in one) and not all(torch.equal(two[key], three[key]) for key in two), name
    assert account_of(run)[0]["files"][0]["skipped"] == {"0": 4}


@pytest.mark.parametrize(("id", "words"), [("{}:99", "is no row that data.train would train on"), ("elsewhere.jsonl:1", "is no row"), ("{}", "is no row"),
                                           ("{}:0", "is no row")])
def test_an_id_that_calls_no_row_is_an_error(recipe, tmp_path, id, words):
    with pytest.raises(EngineError, match=words) as caught:
        train.main(recipe(f"data.skip=['{id.format(tmp_path / 'rows.jsonl')}']"))
    assert caught.value.exit_code == USER and caught.value.name == "DATA-SKIP"


def test_rows_of_one_line_cannot_be_told_apart(recipe, tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps(ragged_rows(5)))
    with pytest.raises(EngineError, match="names 5 rows of one line"):
        train.main(recipe(f"data.train={tmp_path}/rows.json", f"data.skip=['{tmp_path}/rows.json:1']"))


def test_a_row_is_known_by_any_path_to_its_file(recipe, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trained(1, recipe("data.skip=['./rows.jsonl:4']", "train.max_steps=1"))
    assert account_of(tmp_path / "runs/run")[0]["files"][0]["skipped"] == {"0": 1}


def test_the_others_meet_the_same_dropout_to_the_bit(tiny):
    """Without padding in a skipped row's place, rows behind it in their sequence would meet other masks."""
    rows, keys = documents(9), DropoutKeys(3)
    model = weights.build(tiny, "pretrained", 0, torch.float32, torch.float32, CPU, dropout=0.3, keys=keys).train()
    found = []
    for skipped in ((), (1, 3)):
        batch = collate(rows, [np.asarray([0, 1, 2]), np.asarray([3]), np.asarray([4, 5])], [0, 1, 2], CPU, 130, skipped)
        keys.set(7, batch.places, batch.lengths)
        each = torch.zeros(len(batch.at), dtype=torch.float64)
        hidden = model(batch.ids, batch.positions, PackedAttention(batch.documents, CPU, "sdpa"))
        summed_cross_entropy(hidden[batch.at], model.lm_head.weight, batch.targets, torch.arange(len(each)), each)
        found.append(dict(zip(batch.at.tolist(), each.tolist(), strict=True)))
    whole, less = found
    assert 0 < len(less) < len(whole) and all(whole[at] == less[at] for at in less)
    bounds = np.cumsum([0, *rows.lengths[[0, 1]]]), np.cumsum([130, rows.lengths[3]])
    assert set(whole) - set(less) == {at for at in whole if bounds[0][1] <= at < bounds[0][2] or bounds[1][0] <= at < bounds[1][1]}
