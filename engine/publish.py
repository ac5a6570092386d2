"""A file or folder that is there whole or not at all: made under a temporary name beside its own, renamed at the end."""

import errno
import fcntl
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO

from engine import watchdog
from engine.errors import ENVIRONMENT, EngineError, rank_in_launch


@contextmanager
def published(target: Path) -> Iterator[Path]:
    """Yields the name to write under; what is there takes the place of `target` when the block ends well, and goes if not.

    What was there goes last: between two renames of folders, and no longer, it lies beside as .old-NAME and nothing has the name.

    Raises:
        EngineError: the disk refuses.
    """
    building, old = target.with_name(f".tmp-{target.name}"), target.with_name(f".old-{target.name}")
    try:
        remove(building)
        building.parent.mkdir(parents=True, exist_ok=True)
        yield building
        watchdog.aside(partial(_synced, building))
        if target.is_dir() or (building.is_dir() and os.path.lexists(target)):  # a file takes a file's place at once
            remove(old)
            os.rename(target, old)
        os.rename(building, target)
        fsync(target.parent)
        remove(old)
    except OSError as error:
        if error.filename and not str(error.filename).startswith(str(target.parent)):
            raise  # it is not about what is written
        raise _unwritable(target, error) from error
    finally:
        if os.path.lexists(old) and not os.path.lexists(target):
            os.rename(old, target)
        remove(building)


def built_once(target: Path, build: Callable[[Path], None], waiting: str | None = None) -> Path:
    """`target`, made by `build` where it is not there. One process of a node makes it, the others wait.

    Args:
        build: writes the file or folder whose name it is given.
        waiting: what rank 0 says on standard error if it has to wait.
    """
    if target.exists():  # only whole ones have the name
        return target
    with locked(target, waiting):
        if not target.exists():
            with published(target) as building:
                build(building)
    return target


@contextmanager
def locked(target: Path, waiting: str | None = None) -> Iterator[None]:
    """Holds the lock that belongs to `target`, and lets go with the process at the latest."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = target.with_name(f"{target.name}.lock").open("w")
    except OSError as error:
        raise _unwritable(target, error) from error
    with lock:
        try:
            lock_now(lock)
        except BlockingIOError:
            if waiting and rank_in_launch() == 0:
                print(waiting, file=sys.stderr, flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def lock_now(lock: IO[str]) -> None:
    """Takes the lock of an open file, which goes with the file.

    Raises:
        BlockingIOError: another process holds it.
        EngineError: the file system has no locks.
    """
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
            raise EngineError("ENVIRONMENT-LOCKS", f"{lock.name}: its file system gives no locks ({error.strerror}), expected flock, without which two runs "
                              "would write over each other; mount it with locks, or name a place on another disk", ENVIRONMENT) from error
        raise


def fsync(path: Path) -> None:
    """Waits until a file's content, or a folder's names, are on the disk itself."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _synced(building: Path) -> None:
    """A name that outlives a loss of power must not stand for less than it says."""
    for path in [building, *building.rglob("*")]:
        fsync(path)


def _unwritable(target: Path, error: OSError) -> EngineError:
    return EngineError("ENVIRONMENT-DISK", f"{target}: cannot be written: {error}; free some space or name another place", ENVIRONMENT)


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif os.path.lexists(path):
        path.unlink(missing_ok=True)
