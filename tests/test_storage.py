"""Storage that fails: full, too small, read-only, moved away, shared by two runs. Every failure is told with its code, none costs a checkpoint.

Disks are real ones in namespaces of mounts (disks.py); full disks are met at every write.
"""

import contextlib
import errno
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import disks
import pytest
import torch
from conftest import ROOT, Ranks, flip, loaded, repeatable
from test_resume import FULL, LONG, stop_after
from test_torn import contents, snapshot

from engine import checkpoint, config, errors, metrics, publish, rundir, space, train
from engine.checkpoint import FILES, MANIFEST
from engine.errors import CHECKPOINT, DONE, ENVIRONMENT, PREEMPTED, SECURITY, USER, EngineError
from engine.record import Record

STEPS = ("train.epochs=4", "checkpoint.every_steps=2", "checkpoint.keep=2", "train.global_batch=4", "data.packing=true")


def whole(folder: Path) -> dict[str, dict[str, bytes]]:
    return {path.name: contents(path) for path in folder.glob("step-*") if checkpoint.damage(path) is None}


UNDISTURBED: dict[str, object] = {}


def undisturbed(recipe) -> dict[str, object]:
    """The record and the last checkpoint of a run of STEPS that nothing happened to; trained once."""
    if not UNDISTURBED:
        arguments = recipe(*STEPS, name="whole")
        run = Path(next(one for one in arguments if one.startswith("run.folder=")).partition("=")[2]) / "whole"
        assert Ranks(1, lambda: train.main(arguments), run.parent.parent / "whole.log").wait() == [DONE]
        UNDISTURBED.update(numbers=repeatable(run), checkpoint=sorted(whole(run / "checkpoints").items())[-1])
    return UNDISTURBED


def train_with(arguments: list[str], at_step: int = 0, then: Callable[[], None] = lambda: None) -> Callable[[], int]:
    """Training that does `then` once `at_step` is logged and what was saved before lies on the disk."""
    log_step = metrics.Log.step

    def step(self, number, scalars):
        log_step(self, number, scalars)
        if number == at_step:
            for writer in [thread for thread in threading.enumerate() if thread.name == "checkpoint"]:
                writer.join()
            then()

    def run() -> int:
        metrics.Log.step = step
        threading.excepthook = threading.__excepthook__  # pytest's own keeps what a thread raises to itself
        return train.main(arguments)

    return run


def fails_to_save(folder: Path, step: int, keep: int = 1) -> EngineError | None:
    try:
        checkpoint.save(folder, step, snapshot(float(step)), keep=keep, best=None)
    except EngineError as error:
        assert error.exit_code == ENVIRONMENT and str(folder) in error.text and "are free" in error.text, error
        return error
    return None


def three(folder: Path) -> dict[str, dict[str, bytes]]:
    for step in (10, 20, 30):
        checkpoint.save(folder, step, snapshot(float(step)), keep=3, best=None)
    return whole(folder)


# --- B1, B2, B3: no room ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["bytes", "files"])
def test_a_disk_that_is_full_at_every_write_keeps_the_older_checkpoints(tmp_path, what):
    """The disk is given one page, or one file, more until a save succeeds: it is full at each write of a save in turn."""

    def sweep() -> None:
        disk = disks.memory_disk(tmp_path / "disk", 1 << 20, 1000)
        folder = disk / "checkpoints"
        folder.mkdir()
        older, failures = three(folder), 0
        used = os.statvfs(disk)
        pages, files = used.f_blocks - used.f_bfree, used.f_files - used.f_ffree
        for more in range(40):
            disks.resize(disk, *((4096 * (pages + more), 1000) if what == "bytes" else (1 << 20, files + more)))
            if fails_to_save(folder, 40) is None:
                break
            failures += 1
            assert {path.name: contents(path) for path in folder.iterdir()} == older, "something was left, or an older checkpoint was touched"
            assert checkpoint.newest_whole(folder) == 30
        assert failures >= 4 and checkpoint.newest_whole(folder) == 40 and os.listdir(folder) == ["step-000000040"]

    disks.child(sweep)


def test_a_limit_on_the_size_of_files_keeps_the_older_checkpoints(tmp_path):
    def sweep() -> None:
        older, codes = three(tmp_path), []
        for limit in (*range(0, 600, 20), 1 << 20):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, 1 << 20))
            codes.append(fails_to_save(tmp_path, 40, keep=4) is None)
            if not codes[-1]:
                assert {path.name: contents(path) for path in tmp_path.iterdir()} == older
        assert codes == sorted(codes) and codes.count(False) > 15 and codes[-1]

    (started := Ranks(1, sweep, tmp_path.parent / "limit.log")).wait()
    assert started.log.read_text() == "", started.log.read_text()


LONG_HALF = pytest.mark.faults
LEAVE = [0, 20_000, *(pytest.param(size, marks=LONG_HALF) for size in (*range(2_000, 20_000, 1_500), *range(25_000, 400_000, 25_000)))]


@pytest.mark.parametrize("leave", LEAVE)
def test_training_that_meets_a_full_disk_stops_with_code_4_and_goes_on_later(recipe, tmp_path, leave):
    """`leave` bytes are left after the third step, so that it is now the record, now TensorBoard, now a file of a checkpoint that finds no room."""

    def run() -> None:
        disk = disks.memory_disk(tmp_path / "runs", 8 << 20)
        (disk / "run/tensorboard").mkdir(parents=True)
        arguments = recipe(*STEPS)
        code = Ranks(1, train_with(arguments, 3, lambda: disks.fill(disk, leave)), tmp_path / "full.log").wait()
        log = (tmp_path / "full.log").read_text()
        assert code == [ENVIRONMENT] and log.count("ERROR E-ENVIRONMENT") == 1 and "Traceback" not in log, (code, log)
        folder = disk / "run/checkpoints"
        assert checkpoint.newest_whole(folder) >= 2 and not list(folder.glob(".tmp*")) and not (disk / "run/finished.json").exists()
        (disk / "ballast").unlink()
        assert Ranks(1, lambda: train.main(arguments), tmp_path / "again.log").wait() == [DONE], (tmp_path / "again.log").read_text()
        steps = [line["step"] for line in repeatable(disk / "run")]
        assert steps == list(range(1, len(steps) + 1)) and len(steps) > 8

    disks.child(run)


def test_a_disk_that_would_fill_up_is_told_before_the_first_step(recipe, tmp_path):
    def run() -> None:
        disk = disks.memory_disk(tmp_path / "runs", 300_000)
        assert Ranks(1, lambda: train.main(recipe(*STEPS)), tmp_path / "small.log").wait() == [ENVIRONMENT]
        log = (tmp_path / "small.log").read_text()
        assert "ERROR E-ENVIRONMENT-SPACE" in log and "bytes are free, expected" in log and "for 4 checkpoints" in log
        assert (disk / "run/metrics.jsonl").read_text() == ""
        assert json.loads((disk / "run/last_error.json").read_text())["exit_code"] == ENVIRONMENT

    disks.child(run)


@pytest.mark.faults
@pytest.mark.parametrize("size, name", [(300_000, "ENVIRONMENT-SPACE"), (8 << 20, "ENVIRONMENT-CHECKPOINT")])
def test_the_launcher_returns_code_4_of_two_ranks_with_one_line(recipe, tmp_path, size, name):
    """The whole way, `engine.launch` and all: the disk is too small, or is filled by another while the ranks train."""

    def run() -> None:
        disk = disks.memory_disk(tmp_path / "runs", size)
        command = [sys.executable, "-m", "engine.launch", "--standalone", "--nproc-per-node", "2", "-m", "engine.train", *recipe(*STEPS, "train.epochs=60")]
        launched = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        record = disk / "run/metrics.jsonl"
        while launched.poll() is None and not (record.exists() and len(record.read_text().splitlines()) > 3):
            time.sleep(0.01)
        if launched.poll() is None:
            disks.fill(disk, 60_000)
        _, said = launched.communicate(timeout=120)
        assert launched.returncode == ENVIRONMENT, said
        told = [line for line in said.splitlines() if line.startswith("ERROR E-")]  # of rank 0; the other only lost its peer
        assert len(told) == 1 and name in told[0], said
        assert json.loads((disk / "run/last_error.json").read_text())["exit_code"] == ENVIRONMENT
        assert (disk / "run/checkpoints").is_dir() and not list((disk / "run/checkpoints").glob(".tmp*"))

    disks.child(run)


@pytest.mark.parametrize("options", [FULL, ("lora.rank=4",), ("lora.rank=4", "lora.init=pissa"), ("optim.name=adamw_bf16", "model.dtype=bf16",
                         "train.precision=bf16")], ids=["full", "lora", "pissa", "bf16"])
def test_the_room_asked_for_is_what_a_checkpoint_takes(recipe, trained, tmp_path, monkeypatch, options):
    asked = tmp_path / "asked"
    monkeypatch.setattr(space, "check", lambda folder, count, each, exports: asked.write_text(f"{count} {each}"))
    trained(1, recipe(*options, "train.max_steps=3", "checkpoint.every_steps=1", "checkpoint.keep=1"))
    count, each = map(int, asked.read_text().split())
    folder, = (tmp_path / "runs/run/checkpoints").iterdir()
    taken = sum(path.stat().st_size for path in folder.iterdir())
    assert count == 3 and taken <= each <= taken + space.BESIDE_TENSORS


@pytest.mark.parametrize("options", [(), ("lora.rank=4",), ("lora.rank=4", "lora.init=pissa", "lora.modules_to_save=[embed_tokens]"), ("export.dtype=bf16",)])
def test_the_room_asked_for_is_what_the_exports_take(recipe, trained, tmp_path, monkeypatch, options):
    asked = tmp_path / "asked"
    monkeypatch.setattr(space, "check", lambda folder, count, each, exports: asked.write_text(f"{exports}"))
    trained(1, recipe(*options, "train.max_steps=1", f"export.kinds=[{'adapter,' if 'lora.rank=4' in options else ''}model]"))
    taken = sum(path.stat().st_size for path in (tmp_path / "runs/run/export").rglob("*.safetensors"))
    assert taken - 2 * space.BESIDE_TENSORS / 4 <= int(asked.read_text()) <= taken


def test_room_that_only_an_export_lacks_is_told_before_the_first_step(recipe, tmp_path):
    def run() -> None:
        disk = disks.memory_disk(tmp_path / "runs", 300_000)
        options = ("lora.rank=1", "lora.targets=[q_proj]", "checkpoint.keep=1", "train.max_steps=1", "log.tensorboard=false")
        assert Ranks(1, lambda: train.main(recipe(*options, "export.kinds=[adapter]")), tmp_path / "small.log").wait() == [DONE]
        shutil.rmtree(disk / "run")
        assert Ranks(1, lambda: train.main(recipe(*options, "export.kinds=[model,gguf]")), tmp_path / "large.log").wait() == [ENVIRONMENT]
        log = (tmp_path / "large.log").read_text()
        assert "ERROR E-ENVIRONMENT-SPACE" in log and "bytes of exports" in log and (disk / "run/metrics.jsonl").read_text() == "", log

    disks.child(run)


def test_room_is_asked_for_as_many_checkpoints_as_will_lie_there_at_once():
    often, seldom = config.Checkpoint(every_s=0, every_steps=2, keep=3), config.Checkpoint(every_s=0, each_epoch=False, keep=3)
    clocked = config.Checkpoint(each_epoch=False, keep=3)
    assert space.copies(often, False, existing=0, start=0, num_steps=100, steps_per_epoch=10) == 4
    assert space.copies(often, True, existing=0, start=0, num_steps=100, steps_per_epoch=10) == 5
    assert space.copies(often, False, existing=3, start=50, num_steps=100, steps_per_epoch=10) == 1
    assert space.copies(often, False, existing=9, start=50, num_steps=100, steps_per_epoch=10) == 1
    assert space.copies(often, False, existing=0, start=0, num_steps=3, steps_per_epoch=10) == 2
    assert space.copies(seldom, True, existing=0, start=0, num_steps=100, steps_per_epoch=10) == 1
    assert space.copies(often, False, existing=3, start=100, num_steps=100, steps_per_epoch=10) == 0
    assert space.copies(often, False, existing=3, start=120, num_steps=100, steps_per_epoch=10) == 0
    assert space.copies(clocked, True, existing=0, start=0, num_steps=100, steps_per_epoch=10) == 5
    assert space.copies(clocked, False, existing=2, start=98, num_steps=100, steps_per_epoch=10) == 2


# --- B4, B5: the place is not what it was ------------------------------------------------------------------------------


def test_a_read_only_place_is_told_at_once(recipe, tmp_path):
    def run() -> None:
        (tmp_path / "runs").mkdir()
        disks.read_only(tmp_path / "runs")
        began = time.monotonic()
        with pytest.raises(EngineError, match="cannot be written.*Read-only") as caught:
            train.main(recipe(*STEPS))
        assert caught.value.exit_code == ENVIRONMENT and time.monotonic() - began < 2

    disks.child(run)


def test_a_place_that_turns_read_only_stops_the_run_at_the_next_save(recipe, tmp_path):
    def run() -> None:
        folder = tmp_path / "runs/run/checkpoints"
        code = Ranks(1, train_with(recipe(*STEPS), 3, lambda: disks.read_only(folder)), tmp_path / "log").wait()
        assert code == [ENVIRONMENT], (tmp_path / "log").read_text()
        assert "Read-only file system" in json.loads((tmp_path / "runs/run/last_error.json").read_text())["message"]
        assert list(whole(folder)) == ["step-000000002"] == os.listdir(folder)

    disks.child(run)


@pytest.mark.parametrize("how", ["moved", "replaced", pytest.param("deleted", marks=LONG_HALF)])
def test_a_run_directory_that_goes_away_is_not_made_again(recipe, ranks, tmp_path, how):
    run = tmp_path / "runs/run"

    def away() -> None:
        os.rename(run, tmp_path / "runs/away")
        if how == "replaced":
            shutil.copytree(tmp_path / "runs/away", run)
        if how == "deleted":
            shutil.rmtree(tmp_path / "runs/away")

    started = ranks(1, train_with(recipe(*STEPS), 3, away))
    assert started.wait() == [ENVIRONMENT]
    assert "ERROR E-ENVIRONMENT-MOVED" in started.log.read_text() and "Traceback" not in started.log.read_text()
    if how == "replaced":
        assert list(whole(run / "checkpoints")) == ["step-000000002"]
    else:
        assert not run.exists()
    if how == "moved":
        assert list(whole(tmp_path / "runs/away/checkpoints")) == ["step-000000002"]
        os.rename(tmp_path / "runs/away", run)
        assert ranks(1, recipe(*STEPS)).wait() == [DONE]


def test_a_save_makes_no_folder_for_itself(tmp_path):
    with pytest.raises(EngineError) as caught:
        checkpoint.save(tmp_path / "gone" / "checkpoints", 1, snapshot(1.0), keep=1, best=None)
    assert caught.value.exit_code == ENVIRONMENT and not (tmp_path / "gone").exists()


# --- B6 to B9: what lies among the checkpoints -------------------------------------------------------------------------


def test_what_is_damaged_is_set_aside_and_its_room_goes_to_others(recipe, ranks, trained, tmp_path):
    assert ranks(1, lambda: stop_after(6, recipe(*STEPS))).wait() == [PREEMPTED]
    folder = tmp_path / "runs/run/checkpoints"
    assert sorted(os.listdir(folder)) == ["step-000000004", "step-000000006"]
    flip(folder / "step-000000006/model.safetensors")
    damaged = contents(folder / "step-000000006")
    (folder / ".tmp-step-000000005").mkdir()
    started = ranks(1, lambda: stop_after(8, recipe(*STEPS)))
    assert started.wait() == [PREEMPTED]
    warning, = [line for line in started.log.read_text().splitlines() if line.startswith("WARNING passing over")]
    assert "step-000000006: model.safetensors has SHA-256" in warning and "the manifest says" in warning
    assert sorted(os.listdir(folder)) == ["step-000000006", "step-000000006.corrupt", "step-000000008"]
    assert contents(folder / "step-000000006.corrupt") == damaged
    trained(1, recipe(*STEPS))
    last, files = undisturbed(recipe)["checkpoint"]
    assert repeatable(tmp_path / "runs/run") == undisturbed(recipe)["numbers"] and last == sorted(whole(folder))[-1]
    assert all((folder / last / name).read_bytes() == files[name] for name in FILES[:2])


def test_nothing_is_trained_over_a_history_of_damage(recipe, ranks, tmp_path):
    assert ranks(1, lambda: stop_after(6, recipe(*STEPS))).wait() == [PREEMPTED]
    run = tmp_path / "runs/run"
    for path in (run / "checkpoints").iterdir():
        flip(path / "optimizer.safetensors")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name not in (".lock", "stopped")}
    assert ranks(1, recipe(*STEPS)).wait() == [CHECKPOINT]
    after = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name not in (".lock", "last_error.json")}
    assert after == before, "a file was changed"


@pytest.mark.parametrize("name", [*FILES, MANIFEST, ""])
def test_a_link_in_a_checkpoint_is_refused(tmp_path, name):
    three(tmp_path)
    path = tmp_path / "step-000000030" / name
    os.rename(path, tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(EngineError, match="symbolic link") as caught:
        checkpoint.newest_whole(tmp_path)
    assert caught.value.exit_code == SECURITY
    with pytest.raises(EngineError, match="symbolic link"):
        loaded(tmp_path, 30)


def test_what_is_no_file_is_damage_and_is_not_opened(tmp_path, capsys):
    three(tmp_path)
    for step, make in ((30, os.mkfifo), (20, os.mkdir)):  # reading a pipe would wait for ever
        path = tmp_path / f"step-{step:09d}" / "state.json"
        path.unlink()
        make(path)
    assert checkpoint.newest_whole(tmp_path) == 10 and capsys.readouterr().err.count("state.json is no file") == 2


def test_an_unknown_file_is_ignored_with_a_warning(tmp_path, capsys):
    three(tmp_path)
    (tmp_path / "step-000000030/notes.txt").write_text("mine")
    assert checkpoint.newest_whole(tmp_path) == 30
    warning, = capsys.readouterr().err.splitlines()
    assert warning.startswith("WARNING") and "notes.txt" in warning
    assert sorted(loaded(tmp_path, 30).model) == ["w"]


NEARLY = ["step-000000040-old", "xstep-000000040", "step-000000040 (copy)", "step-40", "step-0000000040", "STEP-000000040", "step-000000040\n",
          " step-000000040", "step-٠٠٠٠٠٠٠٤٠", "step-000000040.corrupt", ".tmp-step-000000040", "step-00000004x", "step-000000040~"]


@pytest.mark.parametrize("name", NEARLY)
def test_what_is_only_nearly_named_like_a_checkpoint_is_never_considered(tmp_path, capsys, name):
    (tmp_path / "made").mkdir()
    checkpoint.save(tmp_path / "made", 40, snapshot(40.0), keep=1, best=None)
    os.rename(tmp_path / "made/step-000000040", tmp_path / name)
    assert checkpoint.newest_whole(tmp_path) is None
    (tmp_path / "step-000000050").write_text("a file")
    three(tmp_path)
    assert checkpoint.newest_whole(tmp_path) == 30 and capsys.readouterr().err == ""


def test_a_manifest_without_end_is_damage(tmp_path):
    """Deeply nested, no dictionary, names that lead elsewhere: each sealed or not, none is followed."""
    three(tmp_path)
    path = tmp_path / "step-000000030" / MANIFEST
    plain = {key: value for key, value in json.loads(path.read_text()).items() if key != "seal"}
    elsewhere = {**plain, "files": {f"../step-000000020/{name}": value for name, value in plain["files"].items()}}
    more = {**plain, "files": {**plain["files"], "/etc/passwd": {"bytes": 1, "sha256": ""}}}
    for text in ("[" * 100_000, "[]", "0", '"files"', "null", "NaN", *(checkpoint._sealed(made) for made in (elsewhere, more, {**plain, "step": "30"},
                 {**plain, "format": 0}, {**plain, "files": list(FILES)}, {**plain, "files": dict.fromkeys(FILES)}, {}))):
        path.write_text(text)
        with contextlib.redirect_stderr(io.StringIO()):
            assert checkpoint.newest_whole(tmp_path) == 20, text[:200]


# --- B12, B13: two runs, another run -----------------------------------------------------------------------------------


def test_a_second_run_in_the_same_place_is_refused_and_told_who_is_there(recipe, ranks, tmp_path):
    go_on = tmp_path / "go-on"

    def wait() -> None:
        while not go_on.exists():
            time.sleep(0.01)

    first = ranks(1, train_with(recipe(*STEPS), 3, wait))
    while not (tmp_path / "runs/run/metrics.jsonl").exists() or len((tmp_path / "runs/run/metrics.jsonl").read_text().splitlines()) < 3:
        time.sleep(0.01)
    began = time.monotonic()
    with pytest.raises(EngineError, match=rf"process {first.pids[0]} on {os.uname().nodename} since 2") as caught:
        train.main(recipe(*STEPS))
    assert caught.value.exit_code == ENVIRONMENT and time.monotonic() - began < 2
    go_on.touch()
    assert first.wait() == [DONE]
    assert repeatable(tmp_path / "runs/run") == undisturbed(recipe)["numbers"]


def test_the_lock_goes_with_a_process_that_is_killed(tmp_path):
    def hold() -> None:
        with rundir.locked(tmp_path / "run", 0):
            (tmp_path / "held").touch()
            time.sleep(60)

    holder = Ranks(1, hold, tmp_path / "log")
    while not (tmp_path / "held").exists():
        time.sleep(0.01)
    with pytest.raises(EngineError, match="another run is using it"), rundir.locked(tmp_path / "run", 0):
        pass
    holder.kill()
    assert holder.wait() == [-signal.SIGKILL]
    with rundir.locked(tmp_path / "run", 0):
        assert (tmp_path / "run/.lock").read_text().startswith(f"process {os.getpid()} on ")


def test_another_recipe_changes_nothing_in_the_run_it_meets(recipe, ranks, tmp_path):
    assert ranks(1, lambda: stop_after(3, recipe(*LONG))).wait() == [PREEMPTED]
    run = tmp_path / "runs/run"
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name not in (".lock", "stopped")}
    started = ranks(1, recipe(*LONG, "optim.lr=2e-2", "train.seed=5", "train.max_steps=3"))
    assert started.wait() == [CHECKPOINT]
    assert "optim.lr: 0.01 → 0.02" in started.log.read_text() and "train.seed: " in started.log.read_text()
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name not in (".lock", "last_error.json")}


# --- B14, B16: TensorBoard and the record ------------------------------------------------------------------------------


def deleted(folder: Path) -> None:
    while folder.exists():
        shutil.rmtree(folder, ignore_errors=True)  # a thread may write a file in between


@pytest.mark.parametrize("fault", ["read-only", "full later", *(pytest.param(fault, marks=LONG_HALF)
                                                              for fault in ("full from the start", "folder deleted", "a file"))])
def test_tensorboard_that_cannot_be_written_is_one_warning(recipe, tmp_path, fault):
    def run() -> None:
        arguments, board = recipe(*STEPS), tmp_path / "runs/run/tensorboard"
        at_step, then = 0, lambda: None
        if fault == "a file":
            board.parent.mkdir(parents=True)
            board.write_text("")
        elif fault == "folder deleted":
            at_step, then = 2, lambda: deleted(board)
        else:
            board.mkdir(parents=True)
            if fault == "read-only":
                disks.read_only(board)
            else:
                disks.memory_disk(board, 4096 if fault == "full from the start" else 24 << 10)
        started = Ranks(1, train_with(arguments, at_step, then), tmp_path / "log")
        assert started.wait() == [DONE], started.log.read_text()
        log = started.log.read_text()
        assert log.count("WARNING") == log.count("TensorBoard's files cannot be written") == 1 and "Traceback" not in log, log
        assert repeatable(tmp_path / "runs/run") == undisturbed(recipe)["numbers"]

    undisturbed(recipe)
    disks.child(run)


def test_a_record_cut_anywhere_goes_on_with_whole_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "x": 0.5}).encode() + b"\n" for step in range(5)]
    text = b"".join(lines)
    for end in range(len(text) + 1):
        for tail in (b"", b"\0" * 9, b"\xff\xfe", b"7\n[]\nnull\n{}\n"):
            path.write_bytes(text[:end] + tail)
            record = Record(path, 3)
            record.add({"step": 4})
            record.close()
            read = [json.loads(line)["step"] for line in path.read_text().splitlines()]
            expected = [step for step in range(4) if len(b"".join(lines[: step + 1])) <= end]
            assert read == [*expected, 4], (end, tail)


# --- B17: names --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder, name", [("runs/", "a name with spaces"), ("./x/../runs", "训练-é"), ("runs", "n" * 255),
                                          ("link", "'quoted' \"$HOME\" ;#"), ("runs", "a/b"), ("runs", "50%s{x}")])
def test_a_run_may_have_any_name_that_a_folder_can_have(tmp_path, monkeypatch, folder, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "target").mkdir()
    (tmp_path / "x").mkdir()
    (tmp_path / "link").symlink_to("target")
    cfg = config.Recipe()
    cfg.run.folder, cfg.run.name = folder, name
    path = rundir.choose(cfg)
    with rundir.locked(path, 0), errors.recorded(path / "last_error.json", 0):
        checkpoint.save(path / "checkpoints", 1, snapshot(1.0), keep=1, best=None)
        assert checkpoint.newest_whole(path / "checkpoints") == 1
        log = metrics.Log(path, 0, 1, 1, True, True)
        log.record.add({"step": 1})
        log.close()
        rundir.describe(path, cfg, {})
        rundir.finish(path, {})
    assert path.resolve() == (Path(folder) / name).resolve()
    if len(name) < 250:
        assert rundir.choose(cfg).name == f"{name}-2".rpartition("/")[2]
    else:
        with pytest.raises(EngineError):
            rundir.choose(cfg)


@pytest.mark.parametrize("folder, name, code", [("runs", "n" * 256, USER), ("file", "run", ENVIRONMENT), ("f" * 300, "run", USER),
                                                ("loop", "run", ENVIRONMENT)])
def test_a_name_that_no_folder_can_have_is_told(tmp_path, monkeypatch, folder, name, code):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to("loop")
    cfg = config.Recipe()
    cfg.run.folder, cfg.run.name = folder, name
    with pytest.raises(EngineError) as caught, rundir.locked(rundir.choose(cfg), 0):
        pass
    assert caught.value.exit_code == code


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.EACCES, errno.ENOTCONN])
def test_a_mount_that_is_away_is_no_wrong_name(tmp_path, monkeypatch, number):
    """Its code is that of a disk: a launcher may start again, as it may not after a mistake in the recipe. The system's answer is made here."""
    def answer(path):
        raise OSError(number, os.strerror(number), str(path))

    cfg = config.Recipe()
    cfg.run.folder, cfg.run.name = str(tmp_path), "run"
    monkeypatch.setattr(Path, "stat", lambda path, **_: answer(path))
    with pytest.raises(EngineError, match=os.strerror(number)) as caught:
        rundir.choose(cfg)
    assert caught.value.exit_code == ENVIRONMENT


def test_what_a_resume_needs_of_the_launch_before_outlives_a_disk_that_fills_up(tmp_path):
    def run() -> None:
        disk = disks.memory_disk(tmp_path / "disk", 64 << 10)
        rundir.describe(disk, config.Recipe(), {"base": {"name": "org/name", "commit": "c" * 40}})
        disks.fill(disk, 4096)  # for the recipe
        with pytest.raises((EngineError, OSError)):
            rundir.describe(disk, config.Recipe(), {"base": {"name": "org/name", "commit": "c" * 40}, "more": "x" * 9000})
        assert rundir.commit_of_base(disk, "org/name") == "c" * 40

    disks.child(run)


def test_a_record_outlives_a_loss_of_power(tmp_path, monkeypatch):
    """Its name, and what takes its place where lines are dropped, before it does; where none is, nothing is written."""
    synced, path = [], tmp_path / "metrics.jsonl"
    monkeypatch.setattr(publish.os, "fsync", lambda descriptor: synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
    record = Record(path, -1)
    assert synced == [tmp_path.name]
    for step in (1, 2):
        record.add({"step": step})
    record.close()
    inode = path.stat().st_ino
    Record(path, 2).close()
    assert path.stat().st_ino == inode
    synced.clear()
    Record(path, 1).close()
    assert synced[:2] == [".tmp-metrics.jsonl", tmp_path.name] and path.read_text() == '{"step": 1}\n'


# --- errors that are told although the disk is the trouble -------------------------------------------------------------


def test_a_failure_is_told_though_it_cannot_be_noted(tmp_path):
    def run() -> None:
        disk = disks.memory_disk(tmp_path / "disk", 64 << 10)
        disks.fill(disk, 0)
        with pytest.raises(EngineError, match="the cause") as caught, errors.recorded(disk / "last_error.json", 0):
            raise EngineError("NUMERIC-X", "the cause", 6)
        assert caught.value.exit_code == 6 and os.listdir(disk) == ["ballast"]
        with pytest.raises(EngineError, match="No space left") as caught, errors.recorded(disk / "last_error.json", 0):
            (disk / "ledger.json").write_text("x" * 100)
        assert caught.value.exit_code == ENVIRONMENT
        with pytest.raises(EngineError):
            rundir.finish(disk, {"x": 1.0})
        assert not (disk / "finished.json").exists()

    disks.child(run)


def test_a_run_directory_that_is_gone_is_no_bug_of_ours(tmp_path):
    with pytest.raises(EngineError) as caught, errors.recorded(tmp_path / "gone/last_error.json", 1):
        (tmp_path / "gone/ledger.json").write_text("x")
    assert caught.value.exit_code == ENVIRONMENT and not (tmp_path / "gone").exists()
    with pytest.raises(EngineError) as caught, errors.recorded(tmp_path / "last_error.json", 1):
        (tmp_path / "gone/ledger.json").write_text("x")
    assert caught.value.exit_code == errors.BUG


def test_the_names_above_the_checkpoints_are_synced(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(rundir, "fsync", synced.append)
    with rundir.locked(tmp_path / "a/runs/run", 0):  # three names are new, and that of the checkpoints
        assert synced == [tmp_path / "a/runs/run", tmp_path / "a/runs", tmp_path / "a", tmp_path]
        assert (tmp_path / "a/runs/run/checkpoints").is_dir()
    synced.clear()
    with rundir.locked(tmp_path / "a/runs/run", 0):
        assert synced == [tmp_path / "a/runs/run", tmp_path / "a/runs"]


def test_a_disk_that_does_not_say_is_not_held_to_be_full(tmp_path, monkeypatch):
    space.check(tmp_path / "absent", 3, 1 << 60, 0)
    for count, exports in ((3, 0), (0, 1 << 60)):
        with pytest.raises(EngineError, match="bytes are free, expected"):
            space.check(tmp_path, count, 1 << 60, exports)
    monkeypatch.setattr(space.os, "statvfs", lambda path: os.statvfs_result([4096, 4096, 0, 0, 0, 0, 0, 0, 0, 255]))
    space.check(tmp_path, 3, 1 << 60, 0)


def test_weights_that_find_no_room_are_an_error_of_the_disk(tmp_path):
    from engine import tensorfile

    def run() -> None:
        disk = disks.memory_disk(tmp_path / "disk", 64 << 10)
        with pytest.raises(OSError, match="No space left") as caught:
            tensorfile.save({"w": torch.zeros(100_000)}, disk / "w.safetensors")
        assert caught.value.filename == str(disk / "w.safetensors")

    disks.child(run)
