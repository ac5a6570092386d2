"""metrics.jsonl: one line a step, each on its way to the disk before the step counts as done, so that a kill loses none."""

import json
import math
import os
from pathlib import Path
from typing import Any

from engine.errors import ENVIRONMENT, EngineError
from engine.publish import fsync, published


class Record:
    """
    Args:
        last: the last step whose line stays; those of later ones, from a launch that was cut off, go. -1: a new run.
    """

    def __init__(self, path: Path, last: int) -> None:
        self.path = path
        _keep_steps(path, last)
        self.file = path.open("ab", buffering=0)
        fsync(path.parent)

    def add(self, line: dict[str, Any]) -> None:
        """
        Raises:
            EngineError: the disk refuses, or the file that is written to is no longer the one of that name: the run's folder was moved
                or deleted, and what is written from here on would be lost or make a second folder.
        """
        rest = (json.dumps(plain(line), allow_nan=False) + "\n").encode()
        try:
            while rest:
                rest = rest[self.file.write(rest):]
            there = os.path.samestat(os.fstat(self.file.fileno()), os.stat(self.path))
        except FileNotFoundError:
            there = False
        except OSError as error:
            raise self._unwritable(error) from error
        if not there:
            raise EngineError("ENVIRONMENT-MOVED", f"{self.path}: is not the file this run began: it or its folder was moved, deleted or replaced; "
                              "put it back and start the same command again", ENVIRONMENT)

    def settle(self) -> None:
        """Waits until all lines are on the disk itself: a checkpoint may not outlive a loss of power that its record does not.

        Raises:
            EngineError: the disk refuses.
        """
        try:
            os.fsync(self.file.fileno())
        except OSError as error:
            raise self._unwritable(error) from error

    def close(self) -> None:
        self.file.close()

    def _unwritable(self, error: OSError) -> EngineError:
        return EngineError("ENVIRONMENT-RECORD", f"{self.path}: cannot be written: {error.strerror}; the checkpoints are untouched, "
                           "the same command resumes from the newest", ENVIRONMENT)


def _keep_steps(path: Path, last: int) -> None:
    """Drops the lines that a run wrote after the checkpoint it now resumes from, and whatever is no line: one cut in the middle, zeros."""
    if not path.exists():
        return
    kept, there = [], path.read_bytes()
    for line in there.split(b"\n")[:-1]:
        try:
            if 0 <= json.loads(line)["step"] <= last:
                kept.append(line + b"\n")
        except (ValueError, TypeError, LookupError):
            continue
    if (text := b"".join(kept)) != there:
        with published(path) as building:
            building.write_bytes(text)


def plain(value: Any) -> Any:
    """`value` as JSON can have it, which has no name for a number that is not finite: those as text, "inf", "-inf" or "nan"."""
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items()}
    if isinstance(value, list):
        return [plain(one) for one in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
