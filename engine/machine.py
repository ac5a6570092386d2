"""What this machine gives a process: cores, memory, what limits them in a container, and a disk that keeps what is written to it."""

import os
import re
import resource
import shutil
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from engine import gpus, precision, rundir
from engine.distributed import variables
from engine.finding import Finding, gb, read, tried
from engine.publish import lock_now, published

PROC, CGROUPS, SHARED, INFINIBAND = Path("/proc"), Path("/sys/fs/cgroup"), Path("/dev/shm"), Path("/sys/class/infiniband")
WRITTEN = 64  # MiB
FLEETING = {"overlay": "this is the container's own layer, which goes with it: mount a folder there (docker run -v)",
            "tmpfs": "this is memory, and empty after a restart: choose a folder on a disk"}


def processor() -> Iterator[Finding]:
    own_bf16 = "multiplies in bf16" if precision.cpu_multiplies_bf16() else "has no bf16 instructions, so train.precision=bf16 computes in fp32 on it"
    yield Finding("CPU", f"{rundir.cpu_name()}; torch takes {torch.backends.cpu.get_cpu_capability()}; {own_bf16}")
    allowed, quota = cores()
    yield Finding("cores", f"{allowed} of {os.cpu_count()}" + (f", and by the cgroup's quota the time of {quota:g}" if quota < allowed else ""))


def cores() -> tuple[int, float]:
    """Cores that this process may run on, and of how many its cgroups give it the time."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    shares = [*(text.split() for text in _of_cgroups("cpu.max")), *zip(_of_cgroups("cpu.cfs_quota_us"), _of_cgroups("cpu.cfs_period_us"), strict=True)]
    return allowed, min([float(allowed), *(int(quota) / int(period) for quota, period in shares if quota.isdecimal())])  # unlimited: max, -1


def _of_cgroups(name: str) -> list[str]:
    """What files of this name hold in the cgroups around this process; those of version 2 and of version 1 have different names."""
    lines = [line.split(":", 2) for line in read(PROC / "self/cgroup").splitlines()]
    own = [CGROUPS / controllers / path.lstrip("/") for _, controllers, path in lines]
    return [text for folder in own for around in (folder, *folder.parents) if (text := read(around / name))]


def threads() -> Iterator[Finding]:
    ranks, (allowed, quota) = gpus.count() or 2, cores()
    if variables("OMP_NUM_THREADS"):
        each, why = torch.get_num_threads(), "by OMP_NUM_THREADS"
    else:
        each, why = 1 if gpus.count() else max(1, allowed // ranks), "by ./torchrun.sh, as OMP_NUM_THREADS is not set"
    yield Finding("threads", f"{each} for each of {ranks} rank{'s' * (ranks > 1)}, {why}",
                  f"set OMP_NUM_THREADS={max(1, int(quota / ranks))}, or start fewer ranks (NPROC_PER_NODE)" if ranks * each > quota else "")


def memory() -> Iterator[Finding]:
    total, limit, available = room()
    yield Finding("memory", f"{gb(total)}, {gb(available)} available" + (f", {gb(limit)} allowed by the cgroup" if limit < total else ""),
                  "end what holds the rest: a rank that finds none is killed" if available < limit / 10 else "")


def room() -> tuple[int, int, int]:
    """Bytes of memory that there are, that this process's cgroups allow it, and that are available."""
    facts = {name: 1024 * int(size) for name, size in re.findall(r"^(\w+): +(\d+) kB", read(PROC / "meminfo"), re.MULTILINE)}
    total = facts.get("MemTotal") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = min([total, *(int(text) for name in ("memory.max", "memory.limit_in_bytes") for text in _of_cgroups(name) if text.isdecimal())])
    return total, limit, min(limit, facts.get("MemAvailable", limit))


def limits() -> Iterator[Finding]:
    if SHARED.is_dir():
        size = shutil.disk_usage(SHARED).total
        yield Finding("/dev/shm", gb(size), "NCCL needs it between GPUs: docker run --ipc host, or --shm-size 8g" if gpus.count() and size < 1e9 else "")
    files, locked = (resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_NOFILE, resource.RLIMIT_MEMLOCK))
    yield Finding("open files", "no limit" if files == resource.RLIM_INFINITY else f"{files:,} a process", "ulimit -n 65536" if 0 <= files < 1024 else "")
    if any(INFINIBAND.glob("*")) and locked != resource.RLIM_INFINITY:
        yield Finding("locked memory", f"{gb(locked)}, where InfiniBand needs more", "ulimit -l unlimited, or docker run --ulimit memlock=-1")


def disk(folder: Path) -> Iterator[Finding]:
    """Of the folder, or where it is not made yet of the nearest above; tried in one of its own in there, which goes again."""
    there = next(one for one in (folder, *folder.absolute().parents) if one.is_dir())
    room, kind = shutil.disk_usage(there), _file_system(there)
    yield Finding("room", f"{gb(room.free)} free of {gb(room.total)}, {kind or 'of a kind not known'}", FLEETING.get(kind, ""))
    try:
        with TemporaryDirectory(prefix=".doctor-", dir=there) as made:  # whoever reads may leave, so it is gone before what is found is told
            found = [*_written(Path(made)), *tried("rename", partial(_renamed, Path(made))), *tried("locks", partial(_locked, Path(made)))]
    except OSError as error:
        found = [Finding("folder", f"{there}: {error.strerror or error}", "look at its disk and owner, or set run.folder", True)]
    yield from found


def _file_system(folder: Path) -> str:
    """Its kind, as the kernel names it: of the mounts above the folder, of the last on the innermost place."""
    path, mounts = folder.resolve(), [line.split()[1:3] for line in read(PROC / "self/mounts").splitlines()]
    above = [(len(place), kind) for place, kind in mounts if path.is_relative_to(place.replace("\\040", " "))]
    return sorted(above, key=lambda mount: mount[0])[-1][1] if above else ""


def _written(folder: Path) -> Iterator[Finding]:
    block, begun = os.urandom(1 << 20), time.perf_counter()
    with (folder / "written").open("wb") as file:
        for _ in range(WRITTEN):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    yield Finding("speed", f"{WRITTEN * 1.048576 / (time.perf_counter() - begun):,.0f} MB/s, fsync included; a checkpoint is written beside training")


def _renamed(folder: Path) -> Iterator[Finding]:
    for text in ("before", "after"):
        with published(folder / "renamed") as building:
            building.mkdir()
            (building / "file").write_text(text)
    is_new = (folder / "renamed/file").read_text() == "after"
    yield Finding("rename", f"a folder {'takes' if is_new else 'did not take'} another's place", "" if is_new else "set another run.folder", not is_new)


def _locked(folder: Path) -> Iterator[Finding]:
    with (folder / "lock").open("w") as one, (folder / "lock").open("w") as other:
        lock_now(one)
        try:
            lock_now(other)
        except BlockingIOError:
            yield Finding("locks", "flock keeps a second one out")
            return
    yield Finding("locks", "flock lets two have the same lock: two runs would write over each other", "mount it with locks, or set another run.folder", True)
