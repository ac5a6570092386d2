"""Checkpoints that cost the loop a copy: the state of one step goes into host memory, a thread writes it while training goes on.

At most one save is in flight. Saves by step, at ends of epochs and on leaving wait for it; one that is due by the clock alone is not
begun. What goes wrong in the thread is raised in the loop, in the step after at the latest.
"""

import copy
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from engine import checkpoint, distributed, errors, optim, watchdog
from engine.config import Checkpoint
from engine.distributed import World
from engine.errors import ENVIRONMENT, EngineError

SHARE = 0.01  # of the time at most, that saves by the clock hold the loop up: what takes 3 s to copy is saved every 5 min, not every minute
PATIENCE_S = 300.0  # that a run which failed gives the save in flight, when its peers know and have left
DISK_S = 2.0  # where the failure was a disk's
NO_DISKS = ("ENVIRONMENT-MEMORY", "ENVIRONMENT-GPU")  # failures of the machine that a disk has no part in


class Saver:
    """Saves under `folder` as `cfg` says. A context inside the run's lock, and around what tells and records a failure: no write outlives
    it, unless the run fails and the disk hangs.

    All ranks take the same steps through it; rank 0 alone (`speaks`) holds a copy and writes.
    """

    def __init__(self, folder: Path, cfg: Checkpoint, speaks: bool) -> None:
        self.folder, self.cfg, self.speaks = folder, cfg, speaks
        self.buffers: dict[str, Tensor] = {}
        self.taken: tuple[int, checkpoint.Snapshot] | None = None
        self.thread: threading.Thread | None = None
        self.error: BaseException | None = None
        self.began, self.held = time.monotonic(), 0.0

    def __enter__(self) -> "Saver":
        errors.finishing.append(self.finish)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None) -> None:
        errors.finishing.remove(self.finish)
        if error is None:
            self.wait()
        else:
            self.finish(error)

    def finish(self, error: BaseException) -> None:
        """Waits for the save in flight, for a while: `error` ends the run, and what was taken before it is as good as ever."""
        if not (thread := self.thread):  # held, for this may be the watchdog's thread, and the loop's lets go of it
            return
        thread.join(DISK_S)
        of_disk = isinstance(error, EngineError) and error.exit_code == ENVIRONMENT and error.name not in NO_DISKS
        if thread.is_alive() and not of_disk:
            print(f"the run has failed; finishing the checkpoint in flight, for {PATIENCE_S:g} s at most; a second signal leaves at once", file=sys.stderr,
                  flush=True)
            thread.join(PATIENCE_S)

    def is_due(self) -> bool:
        """Whether it is time for a save by the clock and none is in flight; of rank 0, which tells the others.

        Raises:
            EngineError, OSError: the last save failed.
        """
        if self.error or (self.thread and not self.thread.is_alive()):
            self.wait()
        interval = max(self.cfg.every_s, self.held / SHARE)
        return bool(self.speaks and self.cfg.every_s and not self.thread and time.monotonic() - self.began >= interval)

    def take(self, step: int, kept: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, state: dict[str, Any], world: World) -> float:
        """Copies weights, moments and `state` after `step` steps, by all ranks together. Seconds that this held the loop up, among
        them the wait for a save in flight.

        Raises:
            EngineError: replicas differ, and nothing is saved; or the last save failed, then also OSError.
        """
        called, known = time.monotonic(), bool(self.buffers)
        if self.speaks:
            self.wait()
        self.began = time.monotonic()
        distributed.check_replicas(kept, world)
        moments = optim.state(optimizer, kept, world)  # sharded ones cross to rank 0, so every rank takes part
        if self.speaks:
            self.taken = step, checkpoint.Snapshot(self._copied(kept), self._copied(moments), copy.deepcopy(state))
            if world.device.type == "cuda":
                torch.cuda.synchronize(world.device)
        ended = time.monotonic()
        self.held = ended - self.began if known else 0.0  # what each save costs: not the wait for one before, nor the memory that the first one asks for
        return ended - called

    def write(self, leaving: bool, *first: Callable[[], None]) -> None:
        """Begins to write what was taken, if anything was; waits for its end where the run is `leaving`.

        Args:
            first: called in the thread before the checkpoint is written: to bring onto the disk what may not be missing once it is there.
        """
        if self.taken:
            self.thread = threading.Thread(target=self._write, args=(first, *self.taken), name="checkpoint", daemon=True)
            self.taken = None
            self.thread.start()
        if leaving:
            self.wait()

    def wait(self) -> None:
        """Until nothing is in flight. Raises what the thread met."""
        if self.thread:
            with watchdog.phase("saving a checkpoint"):
                watchdog.join(self.thread)  # it is at work, and other ranks may be waiting for this one
            self.thread = None
        if self.error:
            raise self.error

    def _copied(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Copies in memory that is the same from save to save: the system gives new pages at a fraction of a copy's speed.

        From a GPU they are under way when this returns, into pinned memory, which alone takes them at the bus's speed.
        """
        for name, tensor in tensors.items():
            if name not in self.buffers:
                self.buffers[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self.buffers[name].copy_(tensor.detach(), non_blocking=True)
        return {name: self.buffers[name] for name in tensors}

    def _write(self, first: tuple[Callable[[], None], ...], step: int, snapshot: checkpoint.Snapshot) -> None:
        """No torch kernels here: a second thread that runs them gets a pool of threads of its own, beside the loop's."""
        try:
            for needed in first:
                needed()
            checkpoint.save(self.folder, step, snapshot, self.cfg.keep, snapshot.state["best"]["step"])
        except BaseException as error:  # whatever it is, the loop raises it
            self.error = error
