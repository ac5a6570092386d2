"""What is off with a machine is told in a line of its own, with what to change: faked one by one, and this machine's own truth."""

import ast
import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import disks
import pytest
import torch
from conftest import ROOT

from engine import attention, distributed, doctor, finding, gpus, machine, publish
from engine.errors import DONE, ENVIRONMENT, PEER
from engine.finding import Finding

H100 = SimpleNamespace(name="NVIDIA H100 80GB HBM3", major=9, minor=0, total_memory=80e9, free=79e9)
PRODUCT_ERROR = gpus._product_error


def of(probe) -> dict[str, Finding]:
    return {one.name: one for one in probe()}


@pytest.fixture(autouse=True)
def apart(monkeypatch, tmp_path):
    """From this machine's own GPUs, limits and variables."""
    for name in ("DEV", "DRIVER"):
        monkeypatch.setattr(gpus, name, tmp_path / name)
    for name in ("PROC", "CGROUPS", "SHARED", "INFINIBAND"):
        monkeypatch.setattr(machine, name, tmp_path / name)
    monkeypatch.setattr(gpus, "LIBRARY", "no library")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    for name in ("CUDA_VISIBLE_DEVICES", "CUDA_HOME", "CUDA_PATH", "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)


def written(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def program(tmp_path: Path, name: str, text: str, code: int = 0) -> None:
    written(tmp_path / f"bin/{name}", f"#!/bin/sh\necho '{text}'\nexit {code}\n").chmod(0o755)


@pytest.fixture
def driver(monkeypatch, tmp_path):
    """One GPU, whose driver knows CUDA 12.4, beside a torch for CUDA 13.0 that cannot use it."""
    program(tmp_path, "nvidia-smi", "Driver Version                  : 550.54.14\nCUDA Version                    : 12.4\nAttached GPUs                   : 1")
    written(tmp_path / "DEV/nvidia0", "")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def fake_gpus(monkeypatch):
    def make(*there) -> None:
        faked = {"is_available": lambda: True, "device_count": lambda: len(there), "get_device_properties": lambda number: there[number],
                 "get_device_name": lambda number: there[number].name, "mem_get_info": lambda number: (there[number].free, there[number].total_memory),
                 "get_arch_list": lambda: ["sm_80", "sm_90"], "can_device_access_peer": lambda one, other: {one, other} == {0, 1},
                 "utilization": lambda device: 7, "get_device_capability": lambda device: (there[0].major, there[0].minor)}
        for name, what in faked.items():
            monkeypatch.setattr(torch.cuda, name, what)
        monkeypatch.setattr(torch.version, "cuda", "12.6")
        monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 27, 5))
        monkeypatch.setattr(gpus, "_product_error", lambda device, dtype: PRODUCT_ERROR(torch.device("cpu"), dtype))

    return make


# --- The command -------------------------------------------------------------------------------------------------------


def test_this_machine_can_train_and_nothing_stays_behind(tmp_path, monkeypatch):
    """With the rank of a launch that is gone in its environment, which its own ranks are not to take for theirs."""
    monkeypatch.undo()
    environment = {**os.environ, "RANK": "5"}
    environment.pop("CUDA_VISIBLE_DEVICES", None)  # by which GPUs are hidden from tests
    done = subprocess.run([sys.executable, "-m", "engine.doctor", "--folder", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == DONE and not done.stderr, done.stdout + done.stderr
    for line in (r"ok     packages       torch \S+, numpy", r"ok     cores          \d+ of \d+", r"ok     speed          [\d,]+ MB/s", "ok     rename  ",
                 "ok     locks  ", "note   variables      RANK=5 of", r"ok     ranks          \d+ by (gloo|NCCL) started, met, summed right",
                 "ok     (GPU|driver)  ", "ok     attention      (cpu|sdpa|varlen|fused), by", "(ok|note)   +engine._C  "):
        assert re.search(f"^  {line}", done.stdout, re.MULTILINE), (line, done.stdout)
    assert re.search(r"^This machine can train, on (its CPU|\d+ GPUs?): ", done.stdout.splitlines()[-1]) and not list(tmp_path.iterdir())


def test_a_probe_that_fails_is_a_line_and_the_others_come(monkeypatch, capsys):
    def broken():
        yield Finding("first", "seen")
        raise RuntimeError("CUDA error: unknown\nand a page of it")

    def lacks():
        raise ModuleNotFoundError("No module named 'torch'")

    monkeypatch.setattr(doctor, "contents", lambda folder: {"group": {"odd": broken, "lacks": lacks, "well": lambda: [Finding("well", "a \x1b[2J b")]}})
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    assert doctor.main([]) == ENVIRONMENT
    said = capsys.readouterr().out
    assert "  ok     first          seen\n  wrong  odd            RuntimeError: CUDA error: unknown\n" in said and "a page" not in said
    assert "  wrong  lacks          not looked at: No module named 'torch'\n" in said and "  ok     well           a \\x1b[2J b\n" in said
    assert "\x1b" not in said and said.endswith("This machine cannot train as it is: 2 wrong, 0 notes, 2 ok\n")
    assert doctor.main(["--json"]) == ENVIRONMENT
    assert [(one["group"], one["name"], one["verdict"]) for one in json.loads(capsys.readouterr().out)] == [
        ("group", "first", "ok"), ("group", "odd", "wrong"), ("group", "lacks", "wrong"), ("group", "well", "ok")]


def test_notes_are_no_failure(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "contents", lambda folder: {"group": {"small": lambda: [Finding("small", "is small", "make it larger")]}})
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    assert doctor.main([]) == DONE
    assert capsys.readouterr().out == ("group\n  note   small          is small\n                        make it larger\n"
                                       "This machine can train, on its CPU: 1 note, 0 ok\n")


def test_one_that_is_ended_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.undo()
    endless = "from engine import doctor, errors, machine; machine.WRITTEN = 1 << 14; errors.run(doctor.main)"
    with subprocess.Popen([sys.executable, "-c", endless, "--folder", str(tmp_path)], cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        end = time.monotonic() + 60
        while not list(tmp_path.glob(".doctor-*/written")) and time.monotonic() < end:
            time.sleep(0.01)
        process.terminate()
        assert process.wait(20) == 128 + signal.SIGTERM
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_a_file_is_an_error(tmp_path):
    with pytest.raises(doctor.EngineError, match="--folder: got the file .*, expected a folder; example: python -m engine.doctor"):
        doctor.main(["--folder", str(written(tmp_path / "file", ""))])


# --- Python ------------------------------------------------------------------------------------------------------------


def test_packages_are_those_of_setup_py():
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    given = {node.arg: ast.unparse(node.value) for node in ast.walk(tree) if isinstance(node, ast.keyword)}
    assigned = {ast.unparse(node.targets[0]): ast.unparse(node.value) for node in ast.walk(tree) if isinstance(node, ast.Assign)}

    def names(text: str) -> set[str]:
        return set(re.findall(r"'([\w-]+)", text))

    assert names(given["install_requires"]) == set(doctor.NEEDED) and given["python_requires"] == "'>={}.{}'".format(*doctor.OLDEST)
    assert names(assigned["hub"]) == set(doctor.EXTRAS["hub"]) and names(assigned["parquet"]) == set(doctor.EXTRAS["parquet"])
    assert f"'gpu': {list(doctor.EXTRAS['gpu'])}" in given["extras_require"]


def test_missing_broken_and_untested_packages(monkeypatch):
    from engine import rundir

    real = doctor.import_module

    def imported(name):
        if name == "sentencepiece":
            raise ModuleNotFoundError("No module named 'sentencepiece'", name=name)
        if name == "safetensors":
            raise OSError("libsomething.so: cannot open shared object file")
        return real(name)

    monkeypatch.setattr(doctor, "import_module", imported)
    monkeypatch.setattr(rundir, "TESTED", {"torch": "1.0"})
    found = of(doctor.packages) | of(doctor.source)
    assert found["missing"].is_wrong and found["missing"].found == "sentencepiece"
    assert found["safetensors"].is_wrong and found["safetensors"].found == "cannot be imported: libsomething.so: cannot open shared object file"
    assert found["torch"].verdict == "note" and "is not what the tests run with, 1.0" in found["torch"].found
    assert {one.change for one in found.values() if one.change} == {"pip install -c constraints.txt -e ."}
    monkeypatch.setattr(sys, "version_info", (3, 9, 1))
    assert of(doctor.python)["Python"].is_wrong


def test_without_torch_the_rest_is_not_looked_at(monkeypatch, capsys):
    def imported(name):
        raise ModuleNotFoundError(f"No module named '{name}'", name=name)

    def looks() -> None:
        raise AssertionError("it was looked at")

    monkeypatch.setattr(doctor, "import_module", imported)
    monkeypatch.setattr(doctor, "contents", lambda folder: {"Python": {"Python": doctor.python, "packages": doctor.packages}, "CPU": {"CPU": looks}})
    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    assert doctor.main([]) == ENVIRONMENT
    said = capsys.readouterr().out.splitlines()
    assert said[2].startswith("  wrong  missing        torch, numpy, ") and "all else needs torch" in said[3]
    assert said[4:] == ["This machine cannot train as it is: 1 wrong, 0 notes, 1 ok"]


def test_missing_extras_are_notes_that_tell_what_to_install(monkeypatch, driver):
    from engine import rundir

    monkeypatch.setattr(rundir, "installed", lambda name: None if name in ("gguf", "nvidia-ml-py") else "1.0")
    found = of(doctor.extras)
    assert found["[hub]"].verdict == found["[gpu]"].verdict == "note" and found["[parquet]"].verdict == "ok"
    assert found["[hub]"].change == "pip install -c constraints.txt -e '.[hub]'" and "gguf is not installed" in found["[hub]"].found
    monkeypatch.setattr(gpus, "traces", list)
    assert of(doctor.extras)["[gpu]"].verdict == "ok"


# --- GPU ---------------------------------------------------------------------------------------------------------------


def test_no_gpu_is_fine():
    assert of(gpus.driver)["GPU"].verdict == "ok" and not [*gpus.devices(), *gpus.together(), *gpus.utilisation()]


def refused() -> Finding:
    found = of(gpus.driver)["GPU"]
    assert found.is_wrong
    return found


def test_a_torch_for_cpus_beside_a_gpu(monkeypatch, driver):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "built for CPUs alone" in refused().found and "built for CUDA" in refused().change


def test_a_driver_too_old_for_torch(driver):
    assert "its driver 550.54.14 supports CUDA up to 12.4, torch" in refused().found and "is built for 13.0" in refused().found
    assert refused().change == "update the driver, or install a torch built for CUDA 12"


@pytest.mark.parametrize("visible", ["", "-1", "NoDevFiles", "1", "3,0"])
def test_gpus_hidden_by_a_variable(monkeypatch, driver, visible):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert f"CUDA_VISIBLE_DEVICES={visible} hides it" in refused().found


@pytest.mark.parametrize("visible", ["0", "GPU-8932f937", "MIG-5"])
def test_a_variable_that_hides_nothing_is_not_to_blame(monkeypatch, driver, visible):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert "supports CUDA up to 12.4" in refused().found


def test_a_container_that_was_given_no_gpu(tmp_path, driver):
    """Of the host's driver it sees a file in /proc, from which its version is read."""
    (tmp_path / "DEV/nvidia0").unlink()
    (tmp_path / "bin/nvidia-smi").unlink()
    written(tmp_path / "DRIVER", "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build  (root@host)\nGCC version: 12")
    assert "the driver 570.86.15 is loaded, but this container was given no device" in refused().found and "docker run --gpus all" in refused().change


def test_a_driver_that_fails_is_told_in_its_own_words(tmp_path, driver):
    program(tmp_path, "nvidia-smi", "Failed to initialize NVML: Driver/library version mismatch", 18)
    assert "nvidia-smi says: Failed to initialize NVML: Driver/library version mismatch" in refused().found and "restart it" in refused().change


def test_what_torch_says_where_nothing_else_is_known(monkeypatch, driver):
    def init():
        raise RuntimeError("CUDA unknown error\nmore")

    monkeypatch.setattr(torch.version, "cuda", "12.1")
    monkeypatch.setattr(torch.cuda, "init", init)
    assert refused().found.endswith("torch says: CUDA unknown error (driver 550.54.14)")


def test_gpus_that_work(fake_gpus, driver):
    fake_gpus(H100, H100)
    found = of(gpus.driver) | of(gpus.devices) | of(gpus.together) | of(gpus.utilisation)
    assert {one.verdict for one in found.values()} == {"ok"} and set(found) == {"driver", "GPU 0", "GPU 1", "peers", "utilisation"}
    assert found["driver"].found.startswith("550.54.14, for CUDA up to 12.4; torch") and "built for CUDA 12.6, NCCL 2.27.5" in found["driver"].found
    assert found["GPU 1"].found == "NVIDIA H100 80GB HBM3, capability 9.0, 80.0 GB, 79.0 GB free, multiplies right in bf16"
    assert found["peers"].found == "2 of 2 pairs exchange directly" and found["utilisation"].found == "7 % by NVML"


@pytest.mark.parametrize("arches, capability, runs", [
    ("sm_80 sm_90", (9, 0), True), ("sm_80", (8, 9), True), ("sm_86", (8, 0), False), ("sm_80 sm_90", (12, 0), False), ("sm_90 compute_90", (12, 0), True),
    ("compute_90", (8, 0), False), ("sm_90a", (9, 0), True), ("compute_90a", (10, 0), False), ("sm_80 sm_100", (10, 3), True), ("", (8, 0), False)])
def test_code_runs_where_it_was_made_for(monkeypatch, arches, capability, runs):
    monkeypatch.setattr(torch.cuda, "get_arch_list", arches.split)
    assert gpus._has_code(*capability) == runs


def test_a_gpu_without_code_in_torch_and_one_beside_it(fake_gpus):
    fake_gpus(SimpleNamespace(**{**vars(H100), "name": "New", "major": 12}), H100)
    found = of(gpus.devices)
    assert found["GPU 0"].is_wrong and "has no code for it, but for sm_80 sm_90" in found["GPU 0"].found and found["GPU 1"].verdict == "ok"


def test_a_gpu_that_multiplies_wrong(fake_gpus, monkeypatch):
    fake_gpus(H100)
    real = torch.mm
    for off, is_wrong in ((1.001, False), (1.02, True), (float("nan"), True)):
        monkeypatch.setattr(torch, "mm", lambda a, b, off=off: real(a, b) * off)
        found = of(gpus.devices)["GPU 0"]
        assert found.is_wrong == is_wrong and ("multiplies wrong" in found.found) == is_wrong


def test_a_gpu_that_fails_leaves_the_next_its_line(fake_gpus, monkeypatch):
    fake_gpus(H100, H100)
    monkeypatch.setattr(gpus, "_product_error", lambda device, dtype: 0.0 if device.index else 1 / 0)
    found = of(gpus.devices)
    assert found["GPU 0"].found == "ZeroDivisionError: division by zero" and found["GPU 1"].verdict == "ok"


def test_memory_that_others_hold_old_gpus_and_mixed_ones(fake_gpus, monkeypatch):
    fake_gpus(H100, SimpleNamespace(**{**vars(H100), "free": 9e9}), SimpleNamespace(name="Tesla T4", major=7, minor=5, total_memory=16e9, free=16e9))
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_90"])
    found = of(gpus.devices) | of(gpus.together)
    assert found["GPU 1"].verdict == "note" and "another process" in found["GPU 1"].change
    assert found["GPU 2"].found.endswith("it has no bf16: train.precision=fp16")
    assert found["kinds"].verdict == "note" and "here 0,1 by" in found["kinds"].change
    assert found["kinds"].found == "2 × NVIDIA H100 80GB HBM3, 1 × Tesla T4: a run takes one kind"
    assert found["peers"].found == "2 of 6 pairs exchange directly, the others by way of the host's memory"


def test_utilisation_that_cannot_be_had_is_a_note(fake_gpus, monkeypatch):
    fake_gpus(H100)

    def missing(device):
        raise ModuleNotFoundError("pynvml")

    monkeypatch.setattr(torch.cuda, "utilization", missing)
    assert of(gpus.utilisation)["utilisation"].change == "pip install -c constraints.txt -e '.[gpu]'"


# --- Attention ---------------------------------------------------------------------------------------------------------


def test_the_path_of_attention_and_its_kernels(fake_gpus, tmp_path, monkeypatch):
    assert re.match("(cpu|sdpa), by train.attention=auto for 32/8 heads of 128 in (bfloat16|float32): ", of(doctor.attention_path)["attention"].found)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert set(of(doctor.kernels)) == {"engine._C"}
    fake_gpus(H100)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "nvcc" if name == "nvcc" and (tmp_path / "bin/nvcc").exists() else None)
    for ratio, told in ((1.0, "varlen, by train.attention=auto for 32/8 heads of 128 in bfloat16: torch's FlashAttention: 1.00 ×"),
                        (3.0, "sdpa, by train.attention=auto for 32/8 heads of 128 in bfloat16: torch's kernel per document")):
        monkeypatch.setattr(attention, "_trial", lambda *_, ratio=ratio: (ratio, True))
        assert of(doctor.attention_path)["attention"].found.startswith(told)
    assert of(doctor.kernels)["nvcc"].change.startswith("set CUDA_HOME to the folder of CUDA 12.6")
    for release, verdict in (("12.4", "ok"), ("13.0", "note"), ("", "note")):
        program(tmp_path, "nvcc", f"Cuda compilation tools, release {release}, V{release}.131")
        assert of(doctor.kernels)["nvcc"].verdict == verdict


@pytest.mark.parametrize("reason", ["the extension is not there", None])
def test_the_extension_is_there_or_not(fake_gpus, monkeypatch, reason):
    from engine import fused_attention

    fake_gpus(H100)
    monkeypatch.setattr(fused_attention, "refusal", lambda *_: reason)
    found = of(doctor.kernels)["engine._C"]
    assert found.verdict == ("note" if reason else "ok") and (reason or "built") in found.found


# --- CPU ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("files, quota", [({}, 4), ({"job/cpu.max": "150000 100000", "cpu.max": "max 100000"}, 1.5), ({"cpu.max": "300000 100000"}, 3),
                                          ({"cpu,cpuacct/job/cpu.cfs_quota_us": "50000", "cpu,cpuacct/job/cpu.cfs_period_us": "100000"}, 0.5),
                                          ({"cpu,cpuacct/job/cpu.cfs_quota_us": "-1", "cpu,cpuacct/job/cpu.cfs_period_us": "100000"}, 4)])
def test_cores_are_those_that_a_container_may_use(monkeypatch, tmp_path, files, quota):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    written(tmp_path / "PROC/self/cgroup", "5:cpu,cpuacct:/job\n0::/job\n")
    for name, text in files.items():
        written(tmp_path / "CGROUPS" / name, f"{text}\n")
    assert machine.cores() == (4, quota)
    monkeypatch.delenv("OMP_NUM_THREADS")
    found = of(machine.threads)["threads"]
    assert found.found.startswith("2 for each of 2 ranks") and (found.verdict == "note") == (quota < 4)
    assert quota == 4 or f"OMP_NUM_THREADS={max(1, int(quota / 2))}, " in found.change


def test_memory_that_a_container_may_use(tmp_path):
    written(tmp_path / "PROC/meminfo", "MemTotal:       64000000 kB\nMemFree: 1 kB\nMemAvailable:   32000000 kB\n")
    assert of(machine.memory)["memory"].found == "65.5 GB, 32.8 GB available"
    written(tmp_path / "PROC/self/cgroup", "0::/\n")
    written(tmp_path / "CGROUPS/memory.max", "8000000000\n")
    assert of(machine.memory)["memory"].found == "65.5 GB, 8.0 GB available, 8.0 GB allowed by the cgroup"
    written(tmp_path / "PROC/meminfo", "MemTotal:       64000000 kB\nMemAvailable:   320000 kB\n")
    assert of(machine.memory)["memory"].verdict == "note"


def test_limits_that_matter(monkeypatch, tmp_path, fake_gpus):
    (tmp_path / "SHARED").mkdir()
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda folder: SimpleNamespace(total=64 << 20))
    monkeypatch.setattr(machine.resource, "getrlimit", lambda kind: (256, 256))
    found = of(machine.limits)
    assert found["/dev/shm"].verdict == "ok" and found["open files"].change == "ulimit -n 65536" and "locked memory" not in found
    fake_gpus(H100)
    written(tmp_path / "INFINIBAND/mlx5_0", "")
    found = of(machine.limits)
    assert found["/dev/shm"].verdict == "note" and "--ipc host, or --shm-size 8g" in found["/dev/shm"].change
    assert "memlock=-1" in found["locked memory"].change
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda folder: SimpleNamespace(total=8 << 30))
    monkeypatch.setattr(machine.resource, "getrlimit", lambda kind: (machine.resource.RLIM_INFINITY,) * 2)
    assert {one.verdict for one in of(machine.limits).values()} == {"ok"} and len(of(machine.limits)) == 2


# --- Disk --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def runs(tmp_path, monkeypatch) -> Path:
    """A folder that is still empty when the test is over."""
    monkeypatch.setattr(machine, "WRITTEN", 4)
    folder = tmp_path / "runs"
    folder.mkdir()
    yield folder
    assert not list(folder.iterdir())


def test_a_disk_that_keeps_what_is_written(runs):
    for folder in (runs, runs / "not made/yet"):
        found = of(lambda folder=folder: machine.disk(folder))
        assert list(found) == ["room", "speed", "rename", "locks"] and {one.verdict for one in found.values()} == {"ok"}


def test_read_only_and_full(runs):
    def run() -> None:
        disks.read_only(runs)
        found = of(lambda: machine.disk(runs))
        assert found["folder"].is_wrong and "Read-only file system" in found["folder"].found and "run.folder" in found["folder"].change

    def full() -> None:
        disks.memory_disk(runs, 1 << 20)
        assert "No space left" in of(lambda: machine.disk(runs))["folder"].found

    disks.child(run)
    disks.child(full)


def test_no_locks_and_locks_that_do_not_hold(runs, monkeypatch):
    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    for flock, words in ((none, "gives no locks (No locks available)"), (lambda *_: None, "flock lets two have the same lock")):
        monkeypatch.setattr(publish.fcntl, "flock", flock)
        found = of(lambda: machine.disk(runs))
        assert found["locks"].is_wrong and words in found["locks"].found and "mount it with locks" in found["locks"].change
        assert found["speed"].verdict == found["rename"].verdict == "ok"


def test_no_rename_of_folders(runs, monkeypatch):
    real = os.rename

    def refuses(old, new):
        if Path(old).is_dir():
            raise OSError(errno.EXDEV, "Invalid cross-device link", str(old))
        real(old, new)

    monkeypatch.setattr(os, "rename", refuses)
    found = of(lambda: machine.disk(runs))
    assert found["rename"].is_wrong and "Invalid cross-device link" in found["rename"].found and found["locks"].verdict == "ok"


@pytest.mark.parametrize("kind, verdict", [("ext4", "ok"), ("overlay", "note"), ("tmpfs", "note")])
def test_what_goes_with_a_container_or_a_restart_is_a_note(runs, tmp_path, kind, verdict):
    mounts = ("/ overlay", f"{tmp_path} xfs", f"{runs} nfs4", f"{runs} {kind}", f"{runs}-2 zfs")
    written(tmp_path / "PROC/self/mounts", "".join(f"x {mount} rw 0 0\n" for mount in mounts))
    found = of(lambda: machine.disk(runs))["room"]
    assert found.found.endswith(f", {kind}") and found.verdict == verdict


# --- Ranks -------------------------------------------------------------------------------------------------------------


def test_variables_of_a_launcher_that_is_gone(monkeypatch):
    assert of(doctor.variables)["variables"].verdict == "ok"
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "8")
    found = of(doctor.variables)["variables"]
    assert found.verdict == "note" and found.found == "RANK=0 WORLD_SIZE=8 of a launcher that is gone" and found.change.startswith("unset RANK WORLD_SIZE:")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert of(doctor.variables)["variables"].verdict == "ok"


def test_ranks_that_cannot_talk(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nowhere0")
    found = of(doctor.ranks)["ranks"]
    assert found.is_wrong and re.search("ERROR E-PEER-LOST rank [01] .*nowhere0", found.found) and found.change == "look at what it names"


def test_ranks_that_never_end_are_ended(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(doctor, "RANKS_S", 0.2)
    assert of(doctor.ranks)["ranks"].found == "2 by gloo did not come to their end within 0.2 s"


@pytest.mark.parametrize("said, found, change", [
    ("x\n[rank 1] ERROR E-PEER-MISSING rank 0 did not come; look at it\nERROR E-PEER-LOST later; no", "[rank 1] ERROR E-PEER-MISSING rank 0 did not come",
     "look at it"), ("Segmentation fault", "Segmentation fault", "do as it says"), ("", "exit code 5", "do as it says")])
def test_why_ranks_failed_is_the_engines_own_line(monkeypatch, fake_gpus, said, found, change):
    monkeypatch.setattr(doctor.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=PEER, stderr=said))
    assert of(doctor.ranks)["ranks"] == Finding("ranks", found, change, True)
    fake_gpus(H100, H100)
    assert "NCCL_DEBUG=INFO" in of(doctor.ranks)["ranks"].change
    fake_gpus(H100)
    monkeypatch.setattr(doctor.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=DONE))
    assert of(doctor.ranks)["ranks"].found.startswith("one started and left, without another to meet, in ")


def test_a_rank_that_stays_away_and_a_sum_that_is_wrong(ranks, monkeypatch):
    monkeypatch.setattr(doctor, "MEET_S", 0.2)
    started = ranks(2, lambda: doctor.as_rank() if os.environ["RANK"] == "0" else DONE)
    assert started.wait() == [PEER, DONE] and "rank 1 of 2 did not come" in started.log.read_text()
    monkeypatch.setattr(doctor, "MEET_S", 20.0)
    real = distributed.sum_over_ranks
    assert ranks(2, doctor.as_rank).wait() == [DONE] * 2
    monkeypatch.setattr(distributed, "sum_over_ranks", lambda values, world: [value + (number == 7) for number, value in enumerate(real(values, world))])
    started = ranks(2, doctor.as_rank)
    assert started.wait() == [PEER] * 2 and "1 of 131,072 sums over 2 ranks are wrong" in started.log.read_text()


def test_words():
    assert str(Finding("name", "a\nb", "c")) == "  note   name           a b\n                        c"
    assert finding.of_error("name", "what; got; do") == Finding("name", "what; got", "do", True)
