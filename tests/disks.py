"""Disks that fill up, turn read-only or are too small, for real: mounts in a namespace that only the calling process sees."""

import ctypes
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from forks import forked

LIBC = ctypes.CDLL(None, use_errno=True)
NEW_MOUNTS, NEW_USER = 0x00020000, 0x10000000
RDONLY, REMOUNT, BIND, RECURSIVE, PRIVATE = 1, 32, 4096, 16384, 1 << 18


def _call(function: Callable[..., int], *arguments) -> None:
    if function(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{function.__name__}: {os.strerror(number)}")


def _mount(source: str, target: Path, kind: str | None, flags: int, options: str | None = None) -> None:
    _call(LIBC.mount, source.encode(), str(target).encode(), kind and kind.encode(), ctypes.c_ulong(flags), options and options.encode())


def own_mounts() -> None:
    """From here on mounts are this process's alone, and go with it. For a forked child."""
    user, group = os.geteuid(), os.getegid()
    _call(LIBC.unshare, NEW_MOUNTS | (NEW_USER if user else 0))
    if user:
        for name, text in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
            Path(f"/proc/self/{name}").write_text(text)
    _mount("none", Path("/"), None, RECURSIVE | PRIVATE)


def memory_disk(path: Path, size: int, files: int = 0) -> Path:
    """An empty disk of `size` bytes at `path`, of at most `files` files and folders if that is given."""
    path.mkdir(parents=True, exist_ok=True)
    _mount("tmpfs", path, "tmpfs", 0, f"size={size},nr_inodes={files}")
    return path


def resize(path: Path, size: int, files: int = 0) -> None:
    _mount("tmpfs", path, None, REMOUNT, f"size={size},nr_inodes={files}")


def fill(path: Path, leave: int) -> None:
    """A file as large as the disk can take, less `leave` bytes."""
    ballast = path / "ballast"
    ballast.unlink(missing_ok=True)
    disk = os.statvfs(path)
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, disk.f_bavail * disk.f_frsize - leave))


def read_only(path: Path) -> None:
    _mount(str(path), path, None, BIND)
    _mount("none", path, None, BIND | REMOUNT | RDONLY)


def child(what: Callable[[], None]) -> None:
    """Runs `what` in a fork with mounts of its own; skips where the machine does not allow them, fails with what it raised."""

    def mounted() -> None:
        try:
            own_mounts()
        except OSError as error:
            pytest.skip(f"no mounts of one's own here: {error}")
        what()

    forked(mounted)
