"""The run directory: which one, what it says of the run, and that one run at a time uses it."""

import errno
import hashlib
import json
import os
import platform
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from engine import config, restarts
from engine.config import Recipe
from engine.errors import ENVIRONMENT, USER, EngineError, warn
from engine.publish import fsync, lock_now, published
from engine.record import plain
from engine.terminal import shown

TESTED = {"torch": "2.13", "omegaconf": "2.4", "safetensors": "0.8"}  # by the first numbers of their versions
BITS = ("cpu_capability", "threads_per_rank", "gpus", "cuda", "denormals", "fp32_products", "tf32")  # of `hardware`: what sums round by
PACKAGES = ("torch", "numpy", "sentencepiece", "safetensors", "omegaconf", "tensorboard", "tokenizers")


def choose(cfg: Recipe) -> Path:
    """`folder/name`, unless a finished run lies there: then the first of `name-2`, `name-3` … without one.

    An unfinished run is resumed, a finished one is kept as it is. All ranks look before any of them writes.
    """
    folder, number = Path(cfg.run.folder), 1
    path = folder / cfg.run.name
    try:
        while (path / "finished.json").exists():
            number += 1
            path = folder / f"{cfg.run.name}-{number}"
    except OSError as error:
        raise _unusable(path, error) from error
    return path


@contextmanager
def locked(path: Path, rank: int) -> Iterator[None]:
    """Makes the directory and holds its lock, on rank 0; other ranks pass through. A launcher's restart in vain ends here."""
    if rank != 0:
        restarts.check(path, rank)
        yield
        return
    try:
        made = [folder for folder in (path / "checkpoints", *path.parents) if not folder.exists()]
        (path / "checkpoints").mkdir(parents=True, exist_ok=True)  # not made again later: a run that was moved away is missed
        # Checkpoints outlive a loss of power only if the names above theirs do.
        for folder in dict.fromkeys((path, path.parent, *(folder.parent for folder in made))):
            fsync(folder)
        lock = (path / ".lock").open("a+", encoding="utf-8")
        lock_now(lock)
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S %z')}")
        lock.flush()
    except BlockingIOError as error:
        lock.seek(0)
        raise EngineError("ENVIRONMENT-LOCK", f"{path}: another run is using it, {lock.read() or 'one that has just begun'}; "
                          "wait for it, or choose another run.name", ENVIRONMENT) from error
    except OSError as error:
        raise _unusable(path, error) from error
    with lock:
        restarts.check(path, rank)
        yield


def describe(path: Path, cfg: Recipe, facts: dict[str, Any], start: int = 0) -> None:
    """Writes recipe.yaml, and run.json: versions, hardware, commit, command, and `facts` such as digests.

    One warning names what decides the last bit of a sum and differs from the launch that is resumed at step `start`.
    """
    (path / "recipe.yaml").write_text(config.dump(cfg), encoding="utf-8")
    for package, tested in TESTED.items():
        if (found := installed(package)) and not found.startswith(f"{tested}."):
            warn(f"{package} {found} is not what the tests run with, {tested}; constraints.txt has the versions")
    record = {"command": list(map(shown, [Path(sys.argv[0]).name, *sys.argv[1:]])), "commit": commit(), "engine": sources(),
              "python": platform.python_version(), "versions": {name: installed(name) for name in PACKAGES}, "machine": hardware(), **facts}
    if start and (changed := _other_bits(path / "run.json", record)):
        warn(f"{path}: resumed with {'; '.join(changed)} (before → now): results may no longer be those of one run to the bit")
    with published(path / "run.json") as building:  # the next launch needs what it says of the base
        building.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def sources() -> str:
    """A digest of the engine's sources as they lie here."""
    root, digest = Path(__file__).resolve().parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)} {path.stat().st_size}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def program() -> dict[str, Any]:
    """What computes: it must be the same on every rank of a run."""
    return {"engine": sources(), "python": platform.python_version(), **{name: installed(name) for name in PACKAGES},
            "threads": torch.get_num_threads()}


def _other_bits(path: Path, record: dict[str, Any]) -> list[str]:
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        pairs = {"torch": (before["versions"]["torch"], record["versions"]["torch"]), "engine": (before.get("engine"), record["engine"])}
        pairs |= {name: (before["machine"].get(name), record["machine"][name]) for name in BITS}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return []
    return [f"{name}: {one} → {other}" for name, (one, other) in pairs.items() if one != other]


def commit_of_base(path: Path, name: str) -> str | None:
    """The hub's commit that an unfinished run began with: a resume takes no newer one."""
    try:
        base = json.loads((path / "run.json").read_text(encoding="utf-8"))["base"]
    except (OSError, ValueError, LookupError):
        return None
    return base["commit"] if base["name"] == name else None


def finish(path: Path, results: dict[str, float]) -> None:
    """Marks the run as finished, with its final figures; it will not be written to again."""
    with published(path / "finished.json") as building:  # half a mark would be one
        building.write_text(json.dumps(plain(results), indent=2, allow_nan=False) + "\n", encoding="utf-8")


def hardware() -> dict[str, Any]:
    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    tiny = torch.tensor([1e-39])  # too small for a normal number
    return {"cpu": cpu_name(), "cpu_capability": torch.backends.cpu.get_cpu_capability(), "cores": os.cpu_count(),
            "threads_per_rank": torch.get_num_threads(), "gpus": gpus, "cuda": torch.version.cuda, "denormals": bool(tiny * 1 > 0),
            "fp32_products": torch.get_float32_matmul_precision(), "tf32": torch.backends.cudnn.allow_tf32}


def commit() -> str:
    """The commit of this source tree, with "+changes" where files differ from it; "unknown" outside a checkout."""
    root = Path(__file__).resolve().parent.parent
    try:
        head = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True).stdout.strip()
        dirty = subprocess.run(["git", "-C", str(root), "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True, timeout=10)
        return head + ("+changes" if dirty.stdout.strip() else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _unusable(path: Path, error: OSError) -> EngineError:
    if error.errno == errno.ENAMETOOLONG:
        return EngineError("CONFIG-RUN", f"{path}: {error.strerror}; set run.folder and run.name to what can be a folder", USER)
    return EngineError("ENVIRONMENT-RUN", f"{path}: cannot be written or read: {error}; look at its disk and owner, or set run.folder", ENVIRONMENT)


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def installed(name: str) -> str | None:
    """The version of a package, None where it is not there."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None
