"""Invariant 5: only a checkpoint whose every byte is as written is loaded, and nothing is ever unpickled."""

import errno
import json
import os
import pickle
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import flip, loaded, write_rows
from test_resume import stop_after

from engine import checkpoint, train
from engine.checkpoint import FILES, Snapshot
from engine.errors import CHECKPOINT, ENVIRONMENT, PREEMPTED, EngineError
from engine.models import weights


def snapshot(value: float) -> Snapshot:
    return Snapshot({"w": torch.full((5, 3), value)}, {"w.exp_avg": torch.full((5, 3), value), "w.step": torch.tensor(value)}, {"note": value})


@pytest.fixture
def folder(tmp_path) -> Path:
    for step in (10, 20):
        checkpoint.save(tmp_path, step, snapshot(float(step)), keep=5, best=None)
    return tmp_path


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def swap(path: Path) -> None:
    """With the same file of another step: each is sound by itself."""
    shutil.copyfile(path.parent.parent / "step-000000010" / path.name, path)


DAMAGE = {"flip": flip, "truncate": truncate, "missing": Path.unlink, "empty": lambda path: path.write_bytes(b""), "swap": swap}


@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_with_one_warning(folder, capsys, name, how):
    DAMAGE[how](folder / "step-000000020" / name)
    assert checkpoint.newest_whole(folder) == 10
    assert capsys.readouterr().err.count("WARNING") == 1
    with pytest.raises(EngineError):
        loaded(folder, 20)
    assert torch.equal(loaded(folder, 10).model["w"], torch.full((5, 3), 10.0))


def test_a_whole_checkpoint_comes_back_bit_for_bit(folder):
    found = loaded(folder, checkpoint.newest_whole(folder))
    assert torch.equal(found.model["w"], torch.full((5, 3), 20.0)) and torch.equal(found.optimizer["w.step"], torch.tensor(20.0))
    assert found.state == {"note": 20.0, "step": 20}


def test_history_without_a_whole_checkpoint_is_no_fresh_start(folder):
    for step in (10, 20):
        flip(folder / f"step-{step:09d}" / FILES[0])
    with pytest.raises(EngineError, match="no checkpoint is whole") as caught:
        checkpoint.newest_whole(folder)
    assert caught.value.exit_code == CHECKPOINT


def test_what_the_machine_cannot_read_now_is_not_taken_for_damage(folder, monkeypatch):
    def refuse(path: Path) -> str:
        raise OSError(errno.ESTALE, "Stale file handle", str(path))

    monkeypatch.setattr(checkpoint, "_sha256", refuse)
    with pytest.raises(EngineError, match="says nothing of what it holds") as caught:
        checkpoint.newest_whole(folder)
    assert caught.value.exit_code == ENVIRONMENT


def test_a_manifest_of_another_step_is_no_checkpoint(folder):
    shutil.copytree(folder / "step-000000010", folder / "step-000000030")
    assert checkpoint.newest_whole(folder) == 20


def test_what_an_interrupted_writer_leaves_is_not_seen(folder):
    shutil.copytree(folder / "step-000000020", folder / ".tmp-step-000000030")
    (folder / "step-000000020.old").mkdir()
    assert checkpoint.newest_whole(folder) == 20


def test_keeps_the_newest_and_the_best(tmp_path):
    for step in range(1, 8):
        checkpoint.save(tmp_path, step, snapshot(float(step)), keep=2, best=3 if step >= 3 else None)
    assert sorted(path.name[-1] for path in tmp_path.iterdir()) == ["3", "6", "7"]


def test_older_checkpoints_stay_until_the_new_one_was_read_again(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, 1, snapshot(1.0), keep=1, best=None)
    monkeypatch.setattr(checkpoint, "damage", lambda path: "bytes that differ")
    with pytest.raises(EngineError, match="reads back differently"):
        checkpoint.save(tmp_path, 2, snapshot(2.0), keep=1, best=None)
    monkeypatch.undo()
    assert checkpoint.damage(tmp_path / "step-000000001") is None


def test_files_are_synced_before_the_rename_and_the_parent_after(tmp_path, monkeypatch):
    events = []
    real_rename = checkpoint.os.rename
    monkeypatch.setattr(checkpoint, "fsync", lambda path: events.append(f"sync {path.name}"))
    monkeypatch.setattr(checkpoint.os, "rename", lambda a, b: (events.append("rename"), real_rename(a, b)))
    checkpoint.save(tmp_path, 1, snapshot(1.0), keep=1, best=None)
    at = events.index("rename")
    assert sorted(events[: at - 1]) == sorted(f"sync {name}" for name in (*FILES, "manifest.json"))
    assert events[at - 1] == "sync .tmp-step-000000001" and events[at + 1 :] == [f"sync {tmp_path.name}"]


def damaged_run(recipe, trained, tmp_path, which: str) -> None:
    trained(1, recipe("train.epochs=2", "checkpoint.keep=5"))
    (tmp_path / "runs/run/finished.json").unlink()
    for path in (tmp_path / "runs/run/checkpoints").glob(which):
        flip(path / "model.safetensors")


def test_training_goes_on_from_the_older_checkpoint_and_ends_the_same(recipe, trained, ranks, tmp_path):
    damaged_run(recipe, trained, tmp_path, "step-000000006")
    before = (tmp_path / "runs/run/export/model/model.safetensors").read_bytes()
    started = ranks(1, recipe("train.epochs=2", "checkpoint.keep=5"))
    assert started.wait() == [0] and started.log.read_text().count("WARNING passing over damaged checkpoints") == 1
    assert (tmp_path / "runs/run/export/model/model.safetensors").read_bytes() == before


def test_training_refuses_to_start_over_a_history_of_damage(recipe, trained, ranks, tmp_path):
    damaged_run(recipe, trained, tmp_path, "step-*")
    assert ranks(1, recipe("train.epochs=2", "checkpoint.keep=5")).wait() == [CHECKPOINT]
    assert json.loads((tmp_path / "runs/run/last_error.json").read_text())["exit_code"] == CHECKPOINT


@pytest.mark.parametrize("nodes", [1, 2])
def test_a_resume_reads_the_sums_once_a_node(recipe, ranks, tmp_path, nodes):
    """Rank 0 has them from looking for the newest; of another node one rank reads what that node's ranks will read. Another byte there stops all."""
    arguments, read, flipped = recipe("train.epochs=2", "checkpoint.keep=5"), tmp_path / "read", "optimizer.safetensors"
    assert set(ranks(2, lambda: stop_after(4, arguments)).wait()) == {PREEMPTED}

    def watched() -> int:
        rank = int(os.environ["RANK"])
        os.environ["LOCAL_RANK"] = str(rank if nodes == 1 else 0)
        sums, load = checkpoint._sha256, weights.load_kept

        def noted(path):
            with read.open("a") as file:
                file.write(f"{rank} {path.name}\n")
            return sums(path) if path.name != flipped or not rank else "of other bytes"

        weights.load_kept = lambda *some: (setattr(checkpoint, "_sha256", sums), load(*some))
        checkpoint._sha256 = noted
        return train.main(arguments)

    if nodes == 2:
        started = ranks(2, watched)
        assert started.wait()[1] == CHECKPOINT and "optimizer.safetensors has SHA-256" in started.log.read_text(), started.log.read_text()
        read.unlink()
    flipped = ""
    assert ranks(2, watched).wait() == [0, 0]
    assert sorted(read.read_text().splitlines()) == sorted(f"{rank} {name}" for rank in range(nodes) for name in FILES)


def unpickles(main) -> list[str]:
    """What `main` unpickles, by the interpreter's own audit events and by the functions of the module."""
    seen: list[str] = []
    sys.addaudithook(lambda event, arguments: seen.append(f"{event} {arguments}") if event == "pickle.find_class" else None)
    for name in ("load", "loads", "Unpickler"):
        plain = getattr(pickle, name)
        setattr(pickle, name, lambda *a, plain=plain, name=name, **k: (seen.append(name), plain(*a, **k))[1])
    main()
    return seen


@pytest.mark.parametrize("size", [1, 2])
def test_training_and_resume_never_unpickle(recipe, ranks, tmp_path, size):
    rows = write_rows(tmp_path / "validation.jsonl", [{"instruction": "red", "input": "", "output": "blue"}] * 3)

    def watched() -> int:
        seen = unpickles(lambda: train.main(recipe("train.epochs=3", f"data.validation={rows}", "evaluate.exact_match_rows=2", "evaluate.samples=1")))
        print(f"unpickled: {seen}")
        return len(seen)

    assert ranks(size, watched).wait() == [0] * size
    run = tmp_path / "runs/run"
    (run / "finished.json").unlink()
    for path in sorted((run / "checkpoints").iterdir())[1:]:
        shutil.rmtree(path)
    assert ranks(size, watched).wait() == [0] * size


def test_the_watch_for_pickle_can_fail(ranks):
    assert ranks(1, lambda: len(unpickles(lambda: pickle.loads(pickle.dumps(Path("x")))))).wait() != [0]
