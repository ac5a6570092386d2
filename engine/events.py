"""TensorBoard's event files. They show what metrics.jsonl says, so a disk that refuses them costs a warning and never the run."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from engine.errors import warn


class Events:
    """
    Args:
        last: the last step whose points stay; those of later ones are hidden. -1: a new run.
    """

    def __init__(self, folder: Path, last: int) -> None:
        self.folder, self.writer, self.told = folder, None, False
        self.plain_hook, threading.excepthook = threading.excepthook, self._not_of_tensorboard
        with self._lost_at_most():
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(folder), purge_step=last + 1, flush_secs=10)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        with self._lost_at_most():
            for name, value in values.items():
                if writer := self.writer:  # another thread may lose it
                    writer.add_scalar(name, value, step)

    def settle(self) -> None:
        """Waits until all points are in the file."""
        with self._lost_at_most():
            if self.writer:
                self.writer.flush()

    def text(self, name: str, text: str, step: int) -> None:
        with self._lost_at_most():
            if self.writer:
                self.writer.add_text(name, text, step)

    def hparams(self, options: dict[str, Any], results: dict[str, float]) -> None:
        with self._lost_at_most():
            if self.writer:
                self.writer.add_hparams(options, results, run_name=".")

    def close(self) -> None:
        with self._lost_at_most():
            if self.writer:
                self.writer.close()
        threading.excepthook = self.plain_hook

    @contextmanager
    def _lost_at_most(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            told, self.told, self.writer = self.told, True, None  # for good: its thread has ended
            if not told:
                warn(f"{self.folder}: TensorBoard's files cannot be written ({error}); training continues, metrics.jsonl has every number")

    def _not_of_tensorboard(self, what: threading.ExceptHookArgs) -> None:
        """Its thread's failure comes back at our next call, and is told there."""
        if not type(what.thread).__module__.startswith("tensorboard."):
            self.plain_hook(what)
