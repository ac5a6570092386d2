"""The ranks of a launch on one node: started, told what this process is told, ended together, started again.

As torchrun does it, which `nodes.py` has for several, but without importing torch: that would hold every start up by a second or two,
and 200 MB of memory.
"""

import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple

from engine.errors import FATAL, LAUNCHER, PREEMPTED
from engine.signals import StopRequest

LOOK_S = 0.05
SAVING_S = 330.0  # after a failure, before the ranks that are left are killed: longer than Saver gives a save in flight
STOP_S = 600.0  # after a request to stop
KILLED_S = 30.0  # one that a driver holds cannot be killed


class Ended(NamedTuple):
    """How a launch came to its end.

    failures: (rank, exit code) in the order in which that was seen, also of those that ended because others had.
    asked: the signal that the launch was first told to stop by, if it was.
    codes: by rank, as far as they are known; minus a signal's number where one ended it.
    """

    failures: list[tuple[int, int]]
    asked: int | None
    codes: list[int | None]


def launched(module: list[str], size: int, restarts: int, own_stops: bool) -> Ended:
    """Runs `size` ranks of `python -m MODULE [ARGUMENT ...]`, and all again, `restarts` times at most, after one has failed.

    Args:
        own_stops: ranks start with requests to stop held back, which they release once they can note them.
    """
    heard: list[int] = []
    for one in sent_on():
        signal.signal(one, lambda number, _: heard.append(number))
    for count in range(restarts + 1):
        with _held_back(StopRequest.SIGNALS if own_stops else ()):
            ranks = _start(module, size, count)
        ended = _watched(ranks, heard)
        if ended.asked or not ended.failures or ended.failures[0][1] in (PREEMPTED, *FATAL):
            break
    return ended


def sent_on() -> list[signal.Signals]:
    """The signals that ranks are told. SIGINT also where a script that put this into the background has it ignored; not SIGHUP under nohup."""
    return [*StopRequest.SIGNALS, *(one for one in (signal.SIGHUP, signal.SIGQUIT) if signal.getsignal(one) != signal.SIG_IGN)]


@contextmanager
def _held_back(signals: tuple[signal.Signals, ...]) -> Iterator[None]:
    """What starts in the block has `signals` blocked."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start(module: list[str], size: int, count: int) -> list[subprocess.Popen]:
    """Ranks that meet on this node alone, at a port that no start before had."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), LAUNCHER: str(os.getpid()),
             "TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": str(count), "TORCHELASTIC_USE_AGENT_STORE": "False"}
    defaults = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "1"} | ({"OMP_NUM_THREADS": "1"} if size > 1 else {})  # torchrun's
    return [subprocess.Popen([sys.executable, "-u", "-m", *module], env={**defaults, **os.environ, **group, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                             start_new_session=True) for rank in range(size)]


def _watched(ranks: list[subprocess.Popen], heard: list[int]) -> Ended:
    """Waits for the end of all. The first that fails ends the others, a signal in `heard` is sent on."""
    failures: dict[int, int] = {}
    asked, end, killed = None, math.inf, False

    def tell(*signals: int) -> None:
        for process in ranks:
            for one in signals if process.poll() is None else ():
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, one)

    while True:
        codes, told = [process.poll() for process in ranks], bool(failures or asked)
        failures |= {rank: code for rank, code in enumerate(codes) if code and rank not in failures}
        if failures and not told:
            tell(signal.SIGCONT, signal.SIGTERM)  # one that was stopped has to hear what it is told
            end = time.monotonic() + SAVING_S
        if heard:
            number = heard.pop(0)
            if asked or not failures:  # else they know, and somebody's first request to stop shall not be their second
                tell(number)
            asked, end = asked or number, time.monotonic() + STOP_S
        if None not in codes or (killed and time.monotonic() > end):
            return Ended(list(failures.items()), asked, codes)
        if time.monotonic() > end:
            tell(signal.SIGKILL)
            killed, end = True, time.monotonic() + KILLED_S
        time.sleep(LOOK_S)
