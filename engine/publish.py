"""A file or folder that is there whole or not at all: made under a temporary name beside its own, renamed at the end."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from engine.errors import ENVIRONMENT, EngineError


@contextmanager
def published(target: Path) -> Iterator[Path]:
    """Yields the name to write under; what is there takes the place of `target` when the block ends well, and goes if not.

    Raises:
        EngineError: the disk refuses.
    """
    building = target.with_name(f".tmp-{target.name}")
    try:
        remove(building)
        building.parent.mkdir(parents=True, exist_ok=True)
        yield building
        remove(target)
        os.rename(building, target)
    except OSError as error:
        raise EngineError("ENVIRONMENT-DISK", f"{target}: cannot be written: {error}; free some space or name another place", ENVIRONMENT) from error
    finally:
        remove(building)


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif os.path.lexists(path):
        path.unlink()
