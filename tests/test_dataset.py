"""The cache and what is made of it: built once and whole, cut and mixed as the recipe says, every row accounted for."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, ragged_rows, steps, write_rows
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine import checkpoint, errors, train
from engine.config import Data
from engine.data import build, cache, dataset, ledger
from engine.data.loader import Loader
from engine.data.plan import Plan
from engine.data.tokenizer import load_tokenizer
from engine.errors import BUG, CHECKPOINT, PEER, USER, EngineError


@pytest.fixture
def load(tiny, tmp_path):
    def made(train, **options) -> dataset.Dataset:
        cfg = Data(train=train, **{"max_length": 96, "cache": str(tmp_path / "cache"), **options})
        return dataset.load(cfg, "train", load_tokenizer(tiny))

    return made


def rows_of(found: dataset.Dataset) -> list[tuple]:
    return [tuple(map(tuple, found.read(document))) for document in range(len(found))]


def test_processes_and_spans_change_nothing(load, tmp_path, monkeypatch):
    path = write_rows(tmp_path / "rows.jsonl", [{**row, "task": f"t{i % 3}"} for i, row in enumerate(ragged_rows(3000))])
    whole = load(str(path))
    monkeypatch.setattr("engine.data.cache.SPAN_BYTES", 10_000)
    monkeypatch.setattr(build, "WORKER_BYTES", 1000)
    parts = load(str(path), cache=str(tmp_path / "other"), workers=3)
    assert len(parts.files[0].index["spans"]) > 10 and len(whole.files[0].index["spans"]) < 3
    assert rows_of(parts) == rows_of(whole) and np.array_equal(parts.rows, whole.rows) and parts.tasks == whole.tasks and parts.digest == whole.digest
    assert [parts.where(row) for row in (0, 1500, 2999)] == [f"{path}:{line}" for line in (1, 1501, 3000)]


def test_the_second_run_reads_no_text(load, tmp_path, monkeypatch):
    path = write_rows(tmp_path / "rows.jsonl", ragged_rows(9))
    os.utime(path, (1e9, 1e9))  # a file that has rested; one just written is looked at again
    first = load(str(path))
    monkeypatch.setattr(cache, "survey", lambda *_: pytest.fail("the text was read"))
    monkeypatch.setattr(build, "build", lambda *_: pytest.fail("the text was tokenised"))
    again = load(str(path), max_length=40, too_long="truncate")
    assert again.digest != first.digest and rows_of(load(str(path))) == rows_of(first) and load(str(path)).digest == first.digest


@pytest.mark.parametrize("change", [{"template": "plain"}, {"supervise": "all"}, {"format": "messages", "on_bad_row": "skip"}, {"text": "x"}])
def test_what_decides_the_ids_is_in_the_key(load, tmp_path, change):
    path = write_rows(tmp_path / "rows.jsonl", ragged_rows(4))
    first = load(str(path))
    if "text" in change:
        path.write_text(path.read_text() + '{"instruction": "a", "output": "b"}\n')
    if change.get("format"):
        with pytest.raises(EngineError, match="none of 4 rows"):
            load(str(path), **change)
    else:
        assert load(str(path), **{key: value for key, value in change.items() if key != "text"}).digest != first.digest


def test_a_build_that_is_killed_leaves_nothing_that_looks_whole(tiny, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", ragged_rows(40_000))
    code = ("import sys\nfrom pathlib import Path\nfrom engine.config import Data\nfrom engine.data import build, dataset\n"
            "from engine.data.tokenizer import load_tokenizer\nbuild.WORKER_BYTES = 1000\n"
            "dataset.load(Data(train=sys.argv[1], max_length=96, cache=sys.argv[2], workers=2), 'train', load_tokenizer(Path(sys.argv[3])))\n")
    command = [sys.executable, "-c", code, str(path), str(tmp_path / "cache"), str(tiny)]
    started = subprocess.Popen(command, cwd=ROOT)
    end = time.monotonic() + 60
    while not list((tmp_path / "cache").glob(".tmp-*/*")):
        assert time.monotonic() < end and started.poll() is None
        time.sleep(0.005)
    started.send_signal(signal.SIGKILL)
    started.wait()
    assert not [entry for entry in (tmp_path / "cache").iterdir() if (entry / "index.json").exists() and not entry.name.startswith(".tmp")]
    subprocess.run(command, cwd=ROOT, check=True, timeout=120)
    found = dataset.load(Data(train=str(path), max_length=96, cache=str(tmp_path / "cache")), "train", load_tokenizer(tiny))
    assert len(found) == 40_000 and not list((tmp_path / "cache").glob(".tmp-*"))


def test_a_file_that_changes_under_the_reader_is_refused(load, tmp_path, monkeypatch):
    path = write_rows(tmp_path / "rows.jsonl", ragged_rows(9))
    write = build.write_span

    def meanwhile(*arguments):
        path.write_text(path.read_text() + "\n")
        return write(*arguments)

    monkeypatch.setattr(build, "write_span", meanwhile)
    with pytest.raises(EngineError, match="has changed while it was read"):
        load(str(path))
    monkeypatch.undo()
    assert len(load(str(path))) == 9


def test_a_worker_that_dies_is_told(load, tmp_path, monkeypatch):
    path = write_rows(tmp_path / "rows.jsonl", ragged_rows(3000))
    monkeypatch.setattr("engine.data.cache.SPAN_BYTES", 10_000)
    monkeypatch.setattr(build, "WORKER_BYTES", 1000)
    write, here = build.write_span, os.getpid()
    monkeypatch.setattr(build, "write_span", lambda *all: write(*all) if os.getpid() == here else os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(EngineError, match="rows.jsonl: the process that tokenised it ended with exit code -9"):
        load(str(path), workers=2)
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)  # and no process is left


BAD = '{"instruction": "a", "output": "b"}\n{"instruction": 3, "output": "b"}\n\n{broken\n{"instruction": "c", "output": "d"}\n'


def test_bad_rows_are_errors_that_name_all_of_them_or_are_listed(load, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(BAD)
    with pytest.raises(EngineError) as caught:
        load(str(path))
    assert f"{path}:2" in caught.value.text and f"{path}:4:2" in caught.value.text and "data.on_bad_row=skip" in caught.value.text
    found = load(str(path), on_bad_row="skip")
    entry = ledger.account(found)["files"][0]
    assert (entry["records"], entry["rejected"], entry["rows"], entry["kept"]) == (4, 2, 2, 2)
    assert [one["row"] for one in ledger.left_out(found)] == [f"{path}:2:17", f"{path}:4:2"]
    assert [found.where(row) for row in (0, 1)] == [f"{path}:1", f"{path}:5"]


def long_rows(tmp_path) -> Path:
    return write_rows(tmp_path / "long.jsonl", [{"instruction": "cat", "output": "dog " * 60}, {"instruction": "cat " * 60, "output": "dog"},
                                                {"instruction": "cat", "output": "dog"}])


@pytest.mark.parametrize(("too_long", "fates", "documents"), [("truncate", {"truncated": 1, "no_target_left": 1}, 2), ("drop", {"too_long": 2}, 1),
                                                             ("split", {"split": 2}, None)])
def test_rows_over_max_length(load, tmp_path, too_long, fates, documents):
    path = long_rows(tmp_path)
    whole, found = load(str(path), max_length=200), load(str(path), max_length=40, too_long=too_long)
    entry = ledger.account(found)["files"][0]
    assert {name: entry[name] for name in ledger.FATES.values() if entry[name]} == fates
    assert documents in (None, len(found)) and (found.targets > 0).all() and (found.lengths <= 40).all()
    for document in range(len(found)):
        ids, supervised = found.read(document)
        start, full = found.start[document], whole.read(int(found.row[document]))
        assert ids.tolist() == full[0][start : start + len(ids)].tolist() and supervised[1:].sum() == found.targets[document]
    if too_long == "split":  # every target of a piece's second token on is in exactly one piece
        lost = sum(int(whole.read(int(row))[1][int(start)]) for row, start in zip(found.row, found.start, strict=True))
        assert found.targets.sum() == whole.targets.sum() - lost


def test_a_row_that_is_too_long_is_an_error_unless_the_recipe_says_what_to_do(load, tmp_path):
    with pytest.raises(EngineError, match=r"long.jsonl:1: has \d+ tokens, data.max_length is 40 \(and 1 more such rows\)"):
        load(str(long_rows(tmp_path)), max_length=40)


def test_sources_are_repeated_or_weighed(load, tmp_path):
    a, b, c = (str(write_rows(tmp_path / f"{name}.jsonl", ragged_rows(count, seed))) for seed, (name, count) in enumerate((("a", 10), ("b", 30), ("c", 7))))
    found = load([{"path": a, "repeat": 3}, {"path": b}])
    assert np.bincount(found.source).tolist() == [30, 30] and np.bincount(found.row).tolist() == [3] * 10 + [1] * 30
    found = load([{"path": a, "weight": 1}, {"path": b, "weight": 1}, {"path": c, "weight": 0.5}])
    assert np.bincount(found.source).tolist() == [30, 30, 15]
    times = np.bincount(found.row)
    assert set(times[:40]) == {1, 3} and sorted(set(times[40:])) == [2, 3] and np.array_equal(times, found.times)
    again = load([{"path": a, "weight": 2}, {"path": b, "weight": 2}, {"path": c, "weight": 1}])
    assert np.array_equal(again.row, found.row), "only the weights' proportions count"


def test_a_directory_and_a_glob_are_sources(load, tmp_path, capsys):
    folder = tmp_path / "many"
    folder.mkdir()
    for name, seed in (("b.jsonl", 1), ("a.jsonl", 2), ("c.jsonl", 1)):
        write_rows(folder / name, ragged_rows(3, seed))
    found, globbed = load(str(folder)), load(str(folder / "*.jsonl"))
    assert [file.path.name for file in found.files] == ["a.jsonl", "b.jsonl", "c.jsonl"] and globbed.digest == found.digest and len(found) == 9
    assert "c.jsonl has the same content as" in capsys.readouterr().err
    (folder / "b.jsonl").rename(folder / "aa.jsonl")
    assert load(str(folder)).digest == found.digest, "a file's name is not its content"


@given(lengths=st.lists(st.integers(1, 90), min_size=1, max_size=25), too_long=st.sampled_from(["truncate", "drop", "split"]), size=st.integers(1, 4),
       global_batch=st.integers(1, 7), epochs=st.integers(1, 3), cuts=st.lists(st.floats(0, 1), max_size=3), packing=st.booleans(),
       repeat=st.integers(1, 2), bad=st.integers(0, 2))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_ledger_balances_for_any_lengths_ranks_resumes_and_epochs(tiny, tmp_path, lengths, too_long, size, global_batch, epochs, cuts, packing,
                                                                      repeat, bad):
    """Rows trained as ranks count them, launch after launch, are the rows that the plan says; each lies in the file with its fate."""
    path = tmp_path / "ledger.jsonl"
    rows = [{"instruction": "cat " * (length // 3), "output": "dog " * (length - length // 3)} for length in lengths]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{}\n" * bad)
    cfg = Data(train=[{"path": str(path), "repeat": repeat}], max_length=48, too_long=too_long, on_bad_row="skip", packing=packing,
               cache=str(tmp_path / "cache"))
    try:
        found = dataset.load(cfg, "train", load_tokenizer(tiny))
    except EngineError as error:
        assert error.name == "DATA-EMPTY"
        return
    plan = Plan(found.lengths, found.targets, 48, global_batch, packing, True, 1, epochs)
    stops = sorted({round(cut * plan.num_steps) for cut in cuts} | {plan.num_steps})
    seen, counted, start = np.zeros(len(found), np.int64), ledger.Counts(), 0
    for stop in stops:  # each launch counts what it trained and leaves its sums to the next
        for rank in range(size):
            for _, batches in Loader(found, plan, rank, size, 2, lambda tokens, *_: tokens, torch.device("cpu"), start, stop):
                counted += ledger.Counts.of(batches)
                for batch in batches:
                    np.add.at(seen, batch.trained, 1)
        start = stop
        times = plan.times_trained(stop)
        assert np.array_equal(seen, times)
        account = ledger.account(found, times)
        ledger.compare(account, counted)
    assert set(seen) == {epochs}
    entry = account["files"][0]
    assert entry["records"] == len(lengths) + bad and entry["rejected"] == bad and entry["trained"] == {str(epochs * repeat): entry["kept"]}
    with pytest.raises(EngineError) as caught:
        ledger.compare(account, counted + ledger.Counts(documents=1))
    assert caught.value.exit_code == BUG


def test_rows_that_change_under_a_run_change_nothing_in_it_and_are_refused_after_it(recipe, ranks, tmp_path):
    """A run trains what it read at its start: the cache cannot be written to by a change of the file."""
    from test_resume import stop_after

    from engine import metrics

    path = tmp_path / "rows.jsonl"
    before = cache.survey(path).sha256
    changed = metrics.Log.step

    def change(self, number, scalars):
        if number == 1:
            path.write_text(path.read_text() + '{"instruction": "a", "output": "b"}\n')
        changed(self, number, scalars)

    def run() -> int:
        metrics.Log.step = change
        return stop_after(2, recipe())

    assert ranks(1, run).wait() == [75]
    ledger_found = json.loads((tmp_path / "runs/run/ledger.json").read_text())["train"]
    assert ledger_found["files"][0]["sha256"] == before and ledger_found["files"][0]["records"] == 23 and cache.survey(path).lines == 24
    with pytest.raises(EngineError, match="data: .* → ") as caught:
        train.main(recipe())
    assert caught.value.exit_code == CHECKPOINT


def test_fewer_rows_than_a_global_batch_are_a_smaller_step(recipe, trained, tmp_path):
    write_rows(tmp_path / "rows.jsonl", ragged_rows(3))
    trained(2, recipe("train.epochs=2"))
    lines = steps(tmp_path / "runs/run")
    assert [line["step"] for line in lines] == [1, 2]
    assert json.loads((tmp_path / "runs/run/ledger.json").read_text())["train"]["files"][0]["trained"] == {"2": 3}


MEASURE = """
import json, sys
import torch
from pathlib import Path
from engine.config import Data
from engine.data import cache, dataset, ledger
from engine.data.loader import Loader
from engine.data.plan import Plan
from engine.data.tokenizer import load_tokenizer

cache.RELEASED_BYTES = 1 << 20  # so that what is mapped for a time does not look as if it grew with the rows

def high_water(process="self"):
    return next(int(line.split()[1]) // 1024 for line in open(f"/proc/{process}/status") if line.startswith("VmHWM"))

before = high_water()
rows = dataset.load(Data(train=sys.argv[1], max_length=512, cache=sys.argv[2], workers=2), "train", load_tokenizer(Path(sys.argv[3])))
plan = Plan(rows.lengths, rows.targets, 512, 64, True, True, 0, 1)
counted = ledger.Counts()
for step, batches in Loader(rows, plan, 0, 1, 8, lambda tokens, *_: tokens, torch.device("cpu"), 0, plan.num_steps):
    counted += ledger.Counts.of(batches)
ledger.accounts(rows, None, plan.times_trained(plan.num_steps), counted)
print(json.dumps([len(rows), before, high_water()]))
"""


def test_memory_grows_by_little_more_than_the_facts_of_rows(tiny, tmp_path):
    """Reading, planning and an epoch of 80,000 rows; what a row costs is what a million may cost: 350 MB beside torch's own."""
    costs = []
    for count in (20_000, 80_000):
        path = write_rows(tmp_path / f"{count}.jsonl", ragged_rows(1000) * (count // 1000))
        command = [sys.executable, "-c", MEASURE, str(path), str(tmp_path / "cache"), str(tiny)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        costs.append(json.loads(done.stdout))
    (few, base, peak_of_few), (many, _, peak_of_many) = costs
    a_million = (peak_of_many - peak_of_few) / (many - few) * 1e6
    assert peak_of_few - base + a_million < 350, f"a million rows would take {peak_of_few} - {base} + {a_million:.0f} MB"
    assert base < peak_of_few <= peak_of_many


def test_a_file_rewritten_within_a_moment_is_seen(load, tmp_path):
    """Of the same size and, on a coarse clock, at the same time."""
    path = tmp_path / "rows.jsonl"
    digests = set()
    for letter in "abcdef":
        path.write_text(json.dumps({"instruction": letter, "output": letter}) + "\n")
        digests.add(load(str(path)).digest)
        assert not list((tmp_path / "cache").glob("file-*.json")), "a file that has not rested is looked at again"
    assert len(digests) == 6


def test_another_tokenizer_has_arrays_of_its_own(tiny, load, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", ragged_rows(9))
    quickstart = dataset.load(Data(train=str(path), max_length=256, cache=str(tmp_path / "cache")), "train", load_tokenizer(ROOT / "recipes/quickstart/model"))
    assert quickstart.digest != load(str(path)).digest and quickstart.files[0].folder != load(str(path)).files[0].folder


@pytest.mark.parametrize("fault", ["a document less", "one for another"])
def test_a_loader_that_trains_something_else_stops_the_run_before_the_update(recipe, ranks, tmp_path, monkeypatch, fault):
    from engine.data import loader

    plain = loader.collate

    def faulty(rows, sequences, *rest):
        if len(sequences) == 2:  # a whole micro-batch
            sequences = sequences[:1] if fault == "a document less" else [sequences[0], sequences[0]]
        return plain(rows, sequences, *rest)

    monkeypatch.setattr(loader, "collate", faulty)
    started = ranks(2, recipe())
    assert set(started.wait()) == {BUG} and "E-LEDGER-STEP" in started.log.read_text() and "step 0 trained" in started.log.read_text()
    assert not (tmp_path / "runs/run/metrics.jsonl").read_text() and not list((tmp_path / "runs/run/checkpoints").iterdir())


def test_maps_are_let_go_and_never_take_more_than_so_many_open_files(load, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "SPAN_BYTES", 5000)
    monkeypatch.setattr(cache, "MAPPED", 4)
    found = load(str(write_rows(tmp_path / "rows.jsonl", ragged_rows(1000))))
    before = len(os.listdir("/proc/self/fd"))
    assert len(found.files[0].index["spans"]) > 15 and len(rows_of(found)) == 1000
    assert len(os.listdir("/proc/self/fd")) <= before + 2 * 4
    monkeypatch.setattr(cache, "RELEASED_BYTES", 0)
    found.read(0)
    assert len(os.listdir("/proc/self/fd")) <= before, "what was read is let go"


def test_a_file_replaced_between_its_digest_and_its_rows_is_refused(load, tmp_path, monkeypatch):
    """Else the arrays of one content would lie in the cache under the name of another."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"instruction": "cat", "output": "apple"}\n')
    look = cache.survey

    def replaced(*arguments):
        found = look(*arguments)
        path.write_text('{"instruction": "cat", "output": "lemon"}\n')
        return found

    monkeypatch.setattr(cache, "survey", replaced)
    with pytest.raises(EngineError, match="has changed while it was read"):
        load(str(path))
    monkeypatch.undo()
    path.write_text('{"instruction": "cat", "output": "apple"}\n')
    assert load(str(path)).rows["length"][0] == load(str(path)).read(0)[0].size and not list((tmp_path / "cache").glob(".tmp-*"))


def test_ids_do_not_hang_on_what_the_process_read_before(tmp_path):
    """Qwen's <think> is not marked as a control token; the template makes it one, also for plain text that comes first."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    made = tokenizers.Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[]))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    made.add_tokens(["<think>", "</think>"])
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    (tmp_path / "text.jsonl").write_text('{"text": "a <think> b"}\n')
    chat = write_rows(tmp_path / "chat.jsonl", [{"instruction": "a", "output": "b"}])

    def ids(*sources, where: str):
        cfg = Data(train=list(sources), template="qwen3", cache=str(tmp_path / where))
        found = dataset.load(cfg, "train", load_tokenizer(tmp_path))
        return [found.read(number)[0].tolist() for number in range(len(found)) if found.sources[found.source[number]].format == "text"]

    text, row = {"path": str(tmp_path / "text.jsonl"), "format": "text"}, {"path": str(chat)}
    assert ids(text, where="one") == ids(row, text, where="two") == ids(text, row, where="three")


def test_a_fault_in_a_worker_is_the_same_line_as_without_workers(load, tmp_path, monkeypatch):
    path = write_rows(tmp_path / "rows.jsonl", ragged_rows(3000))
    with pytest.raises(EngineError) as alone:
        load(str(path), template="chatml")
    monkeypatch.setattr(cache, "SPAN_BYTES", 10_000)
    monkeypatch.setattr(build, "WORKER_BYTES", 1000)
    with pytest.raises(EngineError) as in_worker:
        load(str(path), template="chatml", workers=2)
    assert str(in_worker.value) == str(alone.value) and "the template needs the control token <|im_start|>" in str(alone.value)


def test_ranks_that_read_different_rows_do_not_train_together(recipe, ranks, tmp_path):
    """As on two nodes with files of their own."""
    def main() -> int:
        from engine.errors import rank_in_launch

        mine = write_rows(tmp_path / f"node{rank_in_launch()}.jsonl", [{"instruction": "cat", "output": ("red", "dog", "red")[rank_in_launch()]}] * 9)
        return train.main(recipe(f"data.train={mine}"))

    started = ranks(3, main)
    assert set(started.wait()) == {PEER}
    assert "E-PEER-DIFFERS data: rank 1 has " in started.log.read_text() and "ranks that differ: 1)" in started.log.read_text()
    assert not list((tmp_path / "runs/run/checkpoints").iterdir())


@pytest.mark.parametrize("option", ["evaluate.rows=3", "evaluate.every_steps=1", "checkpoint.every_steps=1", "log.spike_z=3", "train.micro_batch=1",
                                    "optim.shard=true"])
def test_ranks_that_would_exchange_other_things_do_not_train_together(recipe, ranks, tmp_path, option):
    """As on nodes whose copies of a recipe differ in an option that may change from launch to launch."""
    started = ranks(2, lambda: train.main(recipe(f"data.validation={tmp_path / 'rows.jsonl'}", *([option] if os.environ["RANK"] == "1" else []))))
    assert started.wait() == [PEER] * 2, started.log.read_text()
    assert f"E-PEER-DIFFERS {option.partition('=')[0]}: rank 1 has " in started.log.read_text()
    assert not (tmp_path / "runs/run/metrics.jsonl").exists()


def test_who_finds_a_mistake_first_tells_it(recipe, ranks, tmp_path):
    """Rank 0 is still at the checkpoints when the launcher has to end it, for another rank has found that a row is wrong."""
    (tmp_path / "rows.jsonl").write_text("{}\n")

    def main() -> None:
        checkpoint.newest_whole = lambda folder: time.sleep(60)
        sys.argv = ["engine.train", *recipe()]
        errors.run(train.main)

    started = ranks(3, main)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in started.pids[1:]]
    os.kill(started.pids[0], signal.SIGTERM)
    assert codes == [USER] * 2 and os.waitpid(started.pids[0], 0)
    assert started.log.read_text().count("ERROR E-DATA-") == 1, started.log.read_text()


def test_a_split_row_counts_as_trained_when_all_its_pieces_were(load, tmp_path):
    found = load([{"path": str(long_rows(tmp_path)), "repeat": 2}], max_length=40, too_long="split")
    row = int(found.row[np.flatnonzero(np.bincount(found.row)[found.row] > 2)[0]])  # of two pieces or more
    times = np.zeros(len(found), np.int64)
    times[np.flatnonzero((found.row == row) & (found.start == 0))] = 1
    assert set(ledger.account(found, times)["files"][0]["trained"]) == {"0"}


def test_weights_that_would_fill_the_memory_are_refused(load, tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "MOST_DOCUMENTS", 1000)
    a, b = (str(write_rows(tmp_path / f"{name}.jsonl", ragged_rows(10, seed))) for seed, name in enumerate("ab"))
    with pytest.raises(EngineError, match=r"an epoch would have 20,010 documents, the rows of a 2,000 times each"):
        load([{"path": a, "weight": 2000}, {"path": b, "weight": 1}])


def test_an_empty_file_among_others_is_an_error_or_passed_over(load, tmp_path):
    (folder := tmp_path / "many").mkdir()
    (folder / "a.jsonl").write_text("\n")
    write_rows(folder / "b.jsonl", ragged_rows(3))
    with pytest.raises(EngineError, match="a.jsonl: holds no row"):
        load(str(folder))
    assert len(load(str(folder), on_bad_row="skip")) == 3
