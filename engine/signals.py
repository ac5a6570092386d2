"""A request to stop: noted by a handler, obeyed by all ranks together at the end of the step; before they have met, at once."""

import os
import signal
import threading
import time
from types import FrameType

from engine.errors import PREEMPTED, rank_in_launch

SAME_S = 1.0  # a scheduler that signals every process of a job signals the launcher too, which sends it on to the ranks once more


class StopRequest:
    """`asked` turns true on SIGTERM, SIGINT or SIGUSR1; another of them, a second or more after the first, ends the process at once.

    Until `ranks_agree` the first one leaves the block that the main thread is in, as Ctrl-C does: there is nothing to save yet. Before the block it
    ends the process, for there torch is imported: its own code drops an exception that comes while it imports numpy, and goes on with half of that.
    Python runs handlers between two calls of its own, and a call into torch can wait for minutes. So a thread listens too.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def __init__(self) -> None:
        self.asked, self.at_once, self.inside = False, True, False
        self.before = {number: signal.signal(number, self._handle) for number in self.SIGNALS}
        self.reads, writes = os.pipe()
        os.set_blocking(writes, False)
        self.outer = signal.set_wakeup_fd(writes)
        threading.Thread(target=self._listen, name="signals", daemon=True).start()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self.SIGNALS)  # which launch.py holds back

    def ranks_agree(self) -> None:
        """From here on a request waits for the end of the step."""
        self.at_once = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        if self.at_once:
            if rank_in_launch() == 0:
                os.write(2, b"told to stop before the ranks had met: there is nothing to save\n")  # print may be at work below
            if not self.inside:
                os._exit(PREEMPTED)
            raise SystemExit(PREEMPTED)

    def _listen(self) -> None:
        first = None
        while signals := os.read(self.reads, 1):
            if signals[0] in self.SIGNALS:
                first = first or time.monotonic()
                if time.monotonic() - first > SAME_S:
                    os._exit(128 + signals[0])

    def __enter__(self) -> "StopRequest":
        self.inside = True
        return self

    def __exit__(self, *_: object) -> None:
        """Signals do again what they did; the end of the pipe ends the thread."""
        os.close(signal.set_wakeup_fd(self.outer))
        for number, handler in self.before.items():
            signal.signal(number, handler)
