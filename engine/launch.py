"""torchrun that leaves with the engine's exit codes: python -m engine.launch [torchrun's options] -m engine.train [arguments]

torchrun itself ends every failure with exit code 1 and a page of text. This process is no rank and trains nothing, so it
may import torch.distributed beside distributed.py.
"""

import logging
import os
import signal
import subprocess
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from engine import config
from engine.errors import DONE, ENVIRONMENT, LAUNCHER, PEER, PREEMPTED, EngineError, run
from engine.signals import StopRequest

TRAIN = "engine.train"


def main(argv: list[str]) -> int:
    if TRAIN in argv:
        config.load(argv[argv.index(TRAIN) + 1 :])  # a mistake in the recipe is reported once, and before torch takes its seconds
    if "LOGLEVEL" not in os.environ:  # torchrun's own variable: whoever sets it wants to read what torchrun does
        logging.disable(logging.CRITICAL)
    # Told to stop, ranks finish their step and save. A large checkpoint takes longer than torchrun's 30 seconds.
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")
    # What torchrun sends on to the ranks; by itself it would die of Slurm's SIGUSR1, and not live on under nohup. A script's background job has
    # SIGINT ignored, which a request to stop shall not be.
    sent_on = [*StopRequest.SIGNALS, *(one for one in (signal.SIGHUP, signal.SIGQUIT) if signal.getsignal(one) != signal.SIG_IGN)]
    os.environ.setdefault("PET_SIGNALS_TO_HANDLE", ",".join(one.name for one in sent_on))
    os.environ[LAUNCHER] = str(os.getpid())
    leave_when_asked()

    if "--standalone" not in argv:
        return launched(argv)
    with file_to_meet_at() as path:  # torch's way listens on every interface of the machine, without a password
        at = argv.index("--standalone")
        os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # ranks meet at one of them, see distributed.py
        return launched([*argv[:at], "--rdzv-backend=c10d", "--rdzv-conf=store_type=file", f"--rdzv-endpoint={path}", "--local-addr=127.0.0.1",
                         *argv[at + 1 :]])


def leave_when_asked() -> None:
    """Until torchrun has ranks, and handlers of its own. A thread listens too: Python runs handlers between two calls of its own, and torch may
    wait for other nodes in one, for minutes."""

    def leave(*_: object) -> None:
        os._exit(PREEMPTED)

    def listen() -> None:
        while number := os.read(reads, 1):
            if signal.getsignal(number[0]) is leave:
                leave()

    for one in StopRequest.SIGNALS:
        signal.signal(one, leave)
    reads, writes = os.pipe()
    os.set_blocking(writes, False)
    signal.set_wakeup_fd(writes)
    threading.Thread(target=listen, daemon=True).start()


@contextmanager
def file_to_meet_at() -> Iterator[str]:
    """In memory where the system has such files (Linux), else in a folder of this user's alone, gone after the block."""
    if hasattr(os, "memfd_create"):
        yield f"/proc/self/fd/{os.memfd_create('meeting')}"
        return
    with tempfile.TemporaryDirectory(prefix="meeting-") as folder:
        yield os.path.join(folder, "file")


def launched(argv: list[str]) -> int:
    """torchrun's own main, and the exit code that belongs to how it ended."""
    from torch.distributed import DistError
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
    from torch.distributed.elastic.multiprocessing.api import PContext, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError

    from engine.restarts import FATAL
    from engine.saver import PATIENCE_S

    look, close = LocalElasticAgent._monitor_workers, PContext.close

    def look_for_the_last_word(agent, group):
        found = look(agent, group)
        if found.failures and in_time(found.failures)[0][1] in (PREEMPTED, *FATAL):
            agent._remaining_restarts = 0
        return found

    def close_once_saved(ranks, death_sig=None, timeout=0):
        timeout, left = max(timeout, PATIENCE_S + 30), [one.proc for one in ranks.subprocess_handlers.values() if one.proc.poll() is None]
        end = time.monotonic() + timeout
        if death_sig is None:
            ranks.have_lost_one = True
            for process in left:
                process.send_signal(signal.SIGCONT)  # one that was stopped has to hear what it is told
        elif vars(ranks).pop("have_lost_one", False):  # as they know since; somebody's first request to stop shall not be their second
            for process in left:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.0, end - time.monotonic()))
        close(ranks, death_sig, timeout)
        ranks.have_lost_one = False  # not where a request to stop has interrupted this

    LocalElasticAgent._monitor_workers = look_for_the_last_word  # torchrun would start again what stopped as asked, or cannot be mended
    PContext.close = close_once_saved  # after a failure torchrun would give a save in flight 30 seconds

    if TRAIN in argv:  # ranks start with these held back, until they can note them; for this process a thread without a task takes them
        threading.Thread(target=threading.Event().wait, daemon=True).start()
        signal.pthread_sigmask(signal.SIG_BLOCK, StopRequest.SIGNALS)
    try:
        torchrun.run(torchrun.parse_args(argv))  # main without its wrapper, which would log the failure once more
    except ChildFailedError as error:
        return first_cause(in_time(error.failures))
    except SignalException as error:
        return code_after(error.sigval, exit_codes_of_ranks(error))
    except (DistError, RendezvousError) as error:
        if "EADDRINUSE" in str(error):
            raise EngineError("ENVIRONMENT-PORT", "another program listens on MASTER_PORT here; set another, the same on all nodes", ENVIRONMENT) from error
        raise EngineError("PEER-MEETING", f"the nodes did not meet: {str(error).splitlines()[0].rstrip('.')}; expected the same "
                          "MASTER_ADDR, MASTER_PORT and NNODES on each, and each NODE_RANK once", PEER) from error
    return DONE


def in_time(failures: dict[int, Any]) -> list[tuple[int, int]]:
    """(Rank, its exit code) of torchrun's failures; within a second in its own order, that of observation."""
    return [(rank, failure.exitcode) for rank, failure in sorted(failures.items(), key=lambda item: item[1].timestamp)]


def first_cause(failures: list[tuple[int, int]]) -> int:
    """The exit code that tells most of `failures`, (rank, its exit code) in the order of time.

    A rank that left with PEER lost another, and later signals are torchrun's, sent to whoever was left, who may have obeyed
    with PREEMPTED: none is a cause.
    """
    rank, code = failures[0]
    if code < 0:
        advice = ("if nobody sent it, memory ran out: lower train.micro_batch or data.max_length" if code == -signal.SIGKILL
                  else "its last words, if any, are above")
        raise EngineError("PEER-KILLED", f"rank {rank} was ended by {signal.Signals(-code).name}; {advice}", PEER)
    return next((later for _, later in failures if later > 0 and later not in (PEER, PREEMPTED)), code)


def code_after(signum: int, codes: list[int | None]) -> int:
    """The exit code of a launch that was told to stop by `signum`: the ranks' own if they had one to give."""
    if set(codes) == {DONE}:  # it came when the work was over
        return DONE
    if all(code == -signum for code in codes):  # it came before they could note it: there was nothing to save
        return PREEMPTED
    return next((code for code in codes if code is not None and code > 0 and code != PEER), PEER if PEER in codes else 128 + signum)


def exit_codes_of_ranks(error: BaseException) -> list[int | None]:
    """By rank, read off the frame of torchrun that `error` came through: it has waited for them, but tells nobody."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        processes = getattr(getattr(frame.f_locals.get("agent"), "_pcontext", None), "subprocess_handlers", {})
        if processes:
            return [processes[rank].proc.returncode for rank in sorted(processes)]
    return []


if __name__ == "__main__":
    run(main)
