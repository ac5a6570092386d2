"""A launch on several nodes: torchrun itself, which has ranks meet, and starts all nodes' again together.

What it lacks for ranks that save before they go is put into it here. This process is no rank and trains nothing, so it may import
torch.distributed beside distributed.py.
"""

import logging
import os
import signal
import subprocess
import threading
import time
import traceback
from contextlib import suppress
from typing import Any

from engine.errors import ENVIRONMENT, FATAL, LAUNCHER, PEER, PREEMPTED, EngineError, first_line
from engine.node import SAVING_S, STOP_S, Ended, leave, request, sent_on
from engine.signals import StopRequest


def launched(argv: list[str], own_stops: bool) -> Ended:
    """torchrun's own main with its own options.

    Args:
        own_stops: ranks start with requests to stop held back, which they release once they can note them.

    Raises:
        EngineError: the nodes have not met.
    """
    if "LOGLEVEL" not in os.environ:  # torchrun's own variable: whoever sets it wants to read what torchrun does
        logging.disable(logging.CRITICAL)
    # Told to stop, ranks finish their step and save. A large checkpoint takes longer than torchrun's 30 seconds.
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", f"{STOP_S:.0f}")
    # What torchrun sends on to the ranks; by itself it would die of Slurm's SIGUSR1, and not live on under nohup.
    os.environ.setdefault("PET_SIGNALS_TO_HANDLE", ",".join(one.name for one in sent_on()))
    os.environ[LAUNCHER] = str(os.getpid())
    _listen()
    torchrun, error_of_ranks, told_to_stop, did_not_meet = _torchrun()

    if own_stops:  # for this process a thread without a task takes them
        threading.Thread(target=threading.Event().wait, daemon=True).start()
        signal.pthread_sigmask(signal.SIG_BLOCK, StopRequest.SIGNALS)
    try:
        torchrun.run(_options(torchrun, argv))  # main without its wrapper, which would log the failure once more
    except error_of_ranks as error:
        return Ended(_in_time(error.failures), None, [])
    except told_to_stop as error:
        return Ended([], request(error.sigval), _exit_codes(error))
    except did_not_meet as error:
        if "EADDRINUSE" in str(error):
            raise EngineError("ENVIRONMENT-PORT", "another program listens on MASTER_PORT here; set another, the same on all nodes", ENVIRONMENT) from error
        raise EngineError("PEER-MEETING", f"the nodes did not meet: {first_line(error).rstrip('.')}; expected the same "
                          "MASTER_ADDR, MASTER_PORT and NNODES on each, and each NODE_RANK once", PEER) from error
    return Ended([], None, [])


def _options(torchrun: Any, argv: list[str]) -> Any:
    """What torchrun makes of `argv`."""
    options = torchrun.parse_args(argv)
    try:
        torchrun.config_from_args(options)
    except ValueError as error:
        raise EngineError("LAUNCH-OPTION", f"torchrun says: {error}") from error
    return options


def _listen() -> None:
    """Python runs handlers between two calls of its own, and torch may wait for other nodes in one, for minutes. So a thread listens, too, until
    torchrun has ranks, and handlers of its own."""

    def listen() -> None:
        while number := os.read(reads, 1):
            if signal.getsignal(number[0]) is leave:
                leave()

    reads, writes = os.pipe()
    os.set_blocking(writes, False)
    signal.set_wakeup_fd(writes)
    threading.Thread(target=listen, daemon=True).start()


def _torchrun() -> tuple[Any, Any, Any, Any]:
    """The module, with what ranks of the engine need of it, and how it says that ranks failed, that it was told to stop, that nodes did not meet."""
    from torch.distributed import DistError, run
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
    from torch.distributed.elastic.multiprocessing.api import PContext, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError

    look, close = LocalElasticAgent._monitor_workers, PContext.close

    def look_for_the_last_word(agent, group):
        found = look(agent, group)
        if found.failures and _in_time(found.failures)[0][1] in (PREEMPTED, *FATAL):
            agent._remaining_restarts = 0
        return found

    def close_once_saved(ranks, death_sig=None, timeout=0):
        timeout, left = max(timeout, SAVING_S), [one.proc for one in ranks.subprocess_handlers.values() if one.proc.poll() is None]
        end = time.monotonic() + timeout
        for process in left:
            process.send_signal(signal.SIGCONT)  # one that was stopped has to hear what it is told
        if death_sig is None:
            ranks.have_lost_one = True
        elif vars(ranks).pop("have_lost_one", False):  # as they know since; somebody's first request to stop shall not be their second
            for process in left:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.0, end - time.monotonic()))
        close(ranks, death_sig and request(death_sig), timeout)
        ranks.have_lost_one = False  # not where a request to stop has interrupted this

    LocalElasticAgent._monitor_workers = look_for_the_last_word  # torchrun would start again what stopped as asked, or cannot be mended
    PContext.close = close_once_saved  # after a failure torchrun would give a save in flight 30 seconds
    return run, ChildFailedError, SignalException, (DistError, RendezvousError)


def _in_time(failures: dict[int, Any]) -> list[tuple[int, int]]:
    """(Rank, its exit code) of torchrun's failures; within a second in its own order, that of observation."""
    return [(rank, failure.exitcode) for rank, failure in sorted(failures.items(), key=lambda item: item[1].timestamp)]


def _exit_codes(error: BaseException) -> list[int | None]:
    """By rank, read off the frame of torchrun that `error` came through: it has waited for them, but tells nobody."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        processes = getattr(getattr(frame.f_locals.get("agent"), "_pcontext", None), "subprocess_handlers", {})
        if processes:
            return [processes[rank].proc.returncode for rank in sorted(processes)]
    return []
