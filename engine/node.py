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

from engine.errors import ENVIRONMENT, FATAL, LAUNCHER, PREEMPTED, STORE, EngineError, warn
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


def prepare() -> None:
    """This process launches: it is no rank, whatever its environment says, and until there are ranks a request to stop ends it."""
    os.environ.pop("RANK", None)
    for one in StopRequest.SIGNALS:
        signal.signal(one, leave)


def leave(*_: object) -> None:
    os._exit(PREEMPTED)


def launched(module: list[str], size: int, restarts: int, own_stops: bool) -> Ended:
    """Runs `size` ranks of `python -m MODULE [ARGUMENT ...]`, and all again, `restarts` times at most, after one has failed.

    Args:
        own_stops: ranks start with requests to stop held back, which they release once they can note them.
    """
    heard: list[int] = []
    for one in sent_on():
        signal.signal(one, lambda number, _: heard.append(request(number)))
    for count in range(restarts + 1):
        with _held_back(StopRequest.SIGNALS if own_stops else ()):
            ranks = _start(module, size, count)
        ended = _watched(ranks, heard)
        again = ended.failures and ended.failures[0][1] not in (PREEMPTED, *FATAL) and None not in ended.codes  # one that is left has its GPU
        if ended.asked or not again:
            break
    return ended


def sent_on() -> list[signal.Signals]:
    """The signals that ranks hear of. SIGINT also where a script that put this into the background has it ignored; not SIGHUP under nohup."""
    return [*StopRequest.SIGNALS, *(one for one in (signal.SIGHUP, signal.SIGQUIT) if signal.getsignal(one) != signal.SIG_IGN)]


def request(number: int) -> int:
    """What ranks are told. Their launcher's terminal is gone, or had a key pressed: that is a request to stop as well."""
    return number if number in StopRequest.SIGNALS else signal.SIGTERM


@contextmanager
def _held_back(signals: tuple[signal.Signals, ...]) -> Iterator[None]:
    """What starts in the block has `signals` blocked."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start(module: list[str], size: int, count: int) -> list[subprocess.Popen]:
    """Ranks that meet on this node alone, at a socket that rank 0 takes over, so that no other program can take its port before."""
    ranks: list[subprocess.Popen] = []
    with socket.create_server(("127.0.0.1", 0)) as store:
        group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.getsockname()[1]), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size),
                 "TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": str(count), "TORCHELASTIC_USE_AGENT_STORE": "False",
                 LAUNCHER: str(os.getpid()), STORE: str(store.fileno())}
        defaults = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "1"} | ({"OMP_NUM_THREADS": "1"} if size > 1 else {})  # torchrun's
        for rank in range(size):
            try:
                ranks.append(subprocess.Popen([sys.executable, "-u", "-m", *module], start_new_session=True, pass_fds=[] if rank else [store.fileno()],
                                              env={**defaults, **os.environ, **group, "RANK": str(rank), "LOCAL_RANK": str(rank)}))
            except OSError as error:
                _tell(ranks, signal.SIGKILL)
                raise EngineError("ENVIRONMENT-PROCESS", f"process {rank + 1} of {size} cannot be started: {error.strerror}; raise what limits this user's or "
                                  "this container's processes and memory, or start fewer ranks", ENVIRONMENT) from error
    return ranks


def _tell(ranks: list[subprocess.Popen], *signals: int) -> None:
    for process in ranks:
        for one in signals if process.poll() is None else ():
            with suppress(ProcessLookupError):
                os.killpg(process.pid, one)


def _watched(ranks: list[subprocess.Popen], heard: list[int]) -> Ended:
    """Waits for the end of all. The first that fails ends the others, a signal in `heard` is sent on. Whom either reaches while stopped is woken."""
    failures: dict[int, int] = {}
    asked, end, killed = None, math.inf, False
    while True:
        codes, first = [process.poll() for process in ranks], not failures
        failures |= {rank: code for rank, code in enumerate(codes) if code and rank not in failures}
        if failures and first:
            _tell(ranks, signal.SIGCONT, *(() if asked else (signal.SIGTERM,)))
            end = min(end, time.monotonic() + SAVING_S)
        if heard:
            number = heard.pop(0)
            if asked or not failures:  # else they know, and somebody's first request to stop shall not be their second
                _tell(ranks, signal.SIGCONT, number)
            asked, end = asked or number, min(end, time.monotonic() + STOP_S)
        if None not in codes or (killed and time.monotonic() > end):
            return Ended(list(failures.items()), asked, codes)
        if time.monotonic() > end:
            warn(f"rank {', '.join(str(rank) for rank, code in enumerate(codes) if code is None)} has not left though told to, and is killed")
            _tell(ranks, signal.SIGKILL)
            killed, end = True, time.monotonic() + KILLED_S
        time.sleep(LOOK_S)
