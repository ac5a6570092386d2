"""A request to stop: noted by a handler, obeyed by all ranks together at the end of the step."""

import signal
from types import FrameType


class StopRequest:
    """`asked` turns true on SIGTERM, SIGINT or SIGUSR1; a second one of them ends the process at once."""

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def __init__(self) -> None:
        self.asked = False
        for number in self.SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        for other in self.SIGNALS:
            signal.signal(other, signal.SIG_DFL)
