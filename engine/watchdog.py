"""Who moves, who stands still, who is gone: each rank tells its progress and watches the others'.

The main thread marks what it is at, which is a few attributes set. Twice a second a thread puts these marks into the group's
store, as JSON, and takes the others'. Another judges, for the first may wait for a store that does not answer. A rank hangs if
someone has waited for it for `timeout_s` and it neither came nearer nor was heard; work that lasts long alone (a save, an
export, answers to many rows) is none, for nobody waits, or the rank moves.
"""

import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from engine import errors
from engine.errors import PEER, EngineError

PERIOD = 0.5  # seconds between beats of up to RANKS ranks; of more, in proportion: the store answers each with the beats of all
RANKS = 64
ALL_WAIT = 5  # times `timeout_s` after which an exchange that every rank is in is lost: nobody is late then, so a network or a device is
IN_VAIN = "waited in vain"
NO_BEAT = (ValueError, TypeError, LookupError, OverflowError, RecursionError)  # what comes of a text that no rank wrote


@dataclass
class Progress:
    """Where a rank's main thread is.

    phase            in words; `own` says that it is long work, in which time spent on a core counts as progress
    exchanges, marks how many exchanges between ranks it has begun, and marks since: what must grow for others to go on
    since            time.monotonic() of the last progress
    inside           an exchange
    watched          by others
    """

    step: int = 0
    phase: str = "starting"
    own: bool = True
    exchanges: int = 0
    marks: int = 0
    since: float = 0.0
    inside: bool = False
    watched: bool = False

    @property
    def age(self) -> float:
        return time.monotonic() - self.since

    @property
    def place(self) -> str:
        return f"step {self.step}, {self.phase}"


now = Progress()


def mark(phase: str, own: bool = False) -> None:
    """The main thread has got so far."""
    now.phase, now.own, now.marks, now.since = phase, own, now.marks + 1, time.monotonic()


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Work in which a rank may be long on its own. What fails in it has failed there, so that is where the rank stays."""
    before = now.phase, now.own
    now.phase, now.own, now.since = name, True, time.monotonic()
    yield
    now.phase, now.own = before
    now.marks, now.since = now.marks + 1, time.monotonic()


def join(thread: threading.Thread) -> None:
    """Waits for a thread's end. What a disk takes is progress, as long as it may be."""
    while thread.is_alive():
        thread.join(1.0)
        if threading.current_thread() is threading.main_thread():
            now.since = time.monotonic()


def aside(work: Callable[[], None]) -> None:
    """Does what a disk may take long for in a thread where others watch this one, as `join` waits for it; raises what it raises."""
    if not now.watched:
        work()
        return
    raised: list[BaseException] = []

    def caught() -> None:
        try:
            work()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=caught, name="disk", daemon=True)
    thread.start()
    join(thread)
    if raised:
        raise raised[0]


@contextmanager
def exchange() -> Iterator[None]:
    """A point where every rank waits for all others."""
    outer = now.inside
    now.exchanges, now.marks, now.since, now.inside = now.exchanges + 1, 0, time.monotonic(), True
    try:
        yield
    finally:
        now.marks, now.since, now.inside = now.marks + 1, time.monotonic(), outer


@dataclass
class Beat:
    """What a rank tells. `age`: seconds since its last progress; `left`: why it leaves, `cause` if for a reason of its own; `late`: ranks
    that it has waited for in vain; `process`: on which machine it is which process."""

    number: int
    step: int
    phase: str
    exchanges: int
    marks: int
    age: float
    stack: str = ""
    left: str = ""
    cause: bool = False
    late: tuple[int, ...] = ()
    process: tuple[str, int] = ("", 0)

    def __post_init__(self) -> None:  # anyone who reaches the port can write it
        for name, kind in (("number", int), ("step", int), ("phase", str), ("exchanges", int), ("marks", int), ("age", float), ("stack", str), ("left", str)):
            if not isinstance(getattr(self, name), kind):
                raise TypeError(name)
        self.late = tuple(int(rank) for rank in self.late)
        self.process = str(self.process[0]), int(self.process[1])
        self.phase, self.stack, self.left = self.phase[:80], self.stack[:1000], self.left[:1000]


class Watchdog:
    """Beats for `rank` and watches the `size` - 1 others.

    Args:
        store: with `set` and `multi_get`, a connection of its own.
        host: the rank that holds the store, None if it is none of them.
    """

    def __init__(self, store: Any, rank: int, size: int, host: int | None, timeout_s: float) -> None:
        self.store, self.rank, self.host, self.timeout_s = store, rank, host, timeout_s
        self.period = PERIOD * max(1.0, size / RANKS)
        self.roll_call = 5 * self.period  # in which whoever lives is heard
        self.others = [other for other in range(size) if other != rank]
        self.beats = {other: Beat(0, 0, "starting", 0, 0, 0.0) for other in self.others}
        self.number, self.left, self.cause, self.late, self.deaf = 0, "", False, (), False
        self.process = _machine(), os.getpid()
        self.stopped, self.hurry, self.sent = threading.Event(), threading.Event(), threading.Event()
        self.awake = 0.0  # seconds that this process has run: after it was stopped itself, silence is not the others' fault
        self.heard = dict.fromkeys(self.others, 0.0)  # when, by that clock
        self.seen: set[int] = set()  # whose process was there, on this machine; replaced, for another thread goes through it
        self.dead: dict[int, float] = {}  # whose is no more, and since when that is known
        self.answered = 0.0
        self.main = threading.main_thread().ident
        vars(now).update(vars(Progress(since=time.monotonic())))
        self.tell()

    @staticmethod
    def key(rank: int) -> str:
        return f"beat/{rank}"

    def start(self) -> None:
        now.watched = True
        self.hurry.set()
        for loop in (self._beat, self._judge):
            threading.Thread(target=loop, name=f"watchdog {loop.__name__}", daemon=True).start()

    def tell(self) -> None:
        self.number += 1
        stack = _stack(self.main) if now.age > self.timeout_s / 4 else ""
        beat = Beat(self.number, now.step, now.phase, now.exchanges, now.marks, now.age, stack, self.left, self.cause, self.late, self.process)
        self.store.set(self.key(self.rank), json.dumps(asdict(beat)))
        if beat.left:
            self.sent.set()

    def leave(self, why: str, cause: bool, late: tuple[int, ...] = ()) -> None:
        """Has the others told, who will find this rank gone."""
        self.left, self.cause, self.late = why, cause, late
        self.hurry.set()
        self.sent.wait(2 * self.period)

    # ---- The thread that talks ----

    def _beat(self) -> None:
        clock = time.pthread_getcpuclockid(self.main) if hasattr(time, "pthread_getcpuclockid") else None
        spent = 0.0
        while not self.stopped.is_set():
            self.hurry.wait(self.period)
            self.hurry.clear()
            if clock is not None and (used := time.clock_gettime(clock)) > spent + self.period / 20:
                spent = used
                if now.own and not now.inside:  # one that waits may spin
                    now.since = time.monotonic()
            try:
                self.tell()
                found = self.store.multi_get([self.key(other) for other in self.others])
            except Exception:  # whatever torch makes of a store that is gone
                self.deaf = True
                return
            self.answered = self.awake
            for other, text in zip(self.others, found, strict=True):
                with suppress(*NO_BEAT):
                    beat = Beat(**json.loads(text))
                    if beat.number != self.beats[other].number:
                        self.beats[other], self.heard[other] = beat, self.awake
                        if self._is_here(beat):  # machines that were copied while they ran take each other for one
                            self.seen = self.seen | {other}

    # ---- The thread that judges ----

    def _judge(self) -> None:
        before, blocked = time.monotonic(), 0.0
        while not self.stopped.wait(self.period):
            passed = time.monotonic() - before
            before += passed
            self.awake += min(passed, 2 * self.period)
            self.dead |= {other: self.awake for other in self.seen if other not in self.dead and not self._is_here(self.beats[other])}
            if any(self.rank in beat.late for beat in self.beats.values()):
                errors.end(EngineError("PEER-HUNG", "this rank is the one that hangs, as the others have told", PEER), speaks=False)
            if late := self._late():
                first = all(other in late or self.silence(other) > self.roll_call for other in range(self.rank))
                error = EngineError("PEER-HUNG", self._describe(late), PEER)
                self.leave(IN_VAIN, False, tuple(late))
                errors.end(error, speaks=first)
            if now.inside and now.age > ALL_WAIT * self.timeout_s and self._all_wait() and not self.left:
                error = EngineError("PEER-HUNG", f"all ranks have waited for {now.age:.0f} s in one exchange ({now.place}), so a network or a GPU has lost it: "
                                    "look at both (dmesg, nvidia-smi), and start again, which resumes from the last checkpoint; or raise train.timeout_s", PEER)
                self.leave(error.text, True)
                errors.end(error, speaks=True)
            # An exchange with one that has left, or was killed, does not end. Of gloo's ring its neighbours alone are told by the connection, of
            # NCCL's nobody.
            left = self.deaf and self.host is not None or self.dead or any(beat.left for beat in self.beats.values())
            blocked = blocked + passed if left and now.inside and now.age > self.period else 0.0
            if blocked > 2 * self.period and not self.left:
                errors.end(self.lost("an exchange does not end"), speaks=True)

    def _is_here(self, beat: Beat) -> bool:
        """Whether its process is there, on this machine."""
        machine, process = beat.process
        return bool(machine) and machine == self.process[0] and process > 0 and not errors.is_gone(process)

    def silence(self, other: int) -> float:
        return self.awake - self.heard[other]

    def _late(self) -> list[int]:
        """Whom this rank has waited for too long."""
        if self.left:
            return []
        if told := {rank for beat in self.beats.values() if beat.left == IN_VAIN for rank in beat.late if rank in self.beats}:
            return sorted(told)
        if now.age <= self.timeout_s:
            return []
        if self.host is not None and self.host != self.rank and self.awake - self.answered > self.timeout_s:
            return [self.host]  # it holds the store, and nobody can be heard without
        return [other for other, beat in self.beats.items() if self.silence(other) > self.timeout_s or
                (beat.age + self.silence(other) > self.timeout_s and (beat.exchanges, beat.marks) < (now.exchanges, now.marks))]

    def _all_wait(self) -> bool:
        """Whether all are heard, and in the exchange that this rank is in."""
        return all((beat.exchanges, beat.marks) == (now.exchanges, now.marks) for beat in self.beats.values())

    def _describe(self, late: list[int]) -> str:
        found = []
        for other in late[:4]:
            beat, silence = self.beats[other], self.silence(other)
            if silence > self.timeout_s:
                found.append(f"rank {other} has been silent for {silence:.0f} s (stopped, or out of reach), last heard of in step {beat.step}, {beat.phase}")
            else:
                found.append(f"rank {other} has not moved for {beat.age + silence:.0f} s: step {beat.step}, {beat.phase}" +
                             (f", at {beat.stack}" if beat.stack else ""))
        more = f" (and {len(late) - 4} more)" if len(late) > 4 else ""
        return (f"{'; '.join(found)}{more}; rank {self.rank} waits in {now.place}, expected less than train.timeout_s={self.timeout_s:g}: look at that "
                "rank's machine, or raise it, and start again, which resumes from the last checkpoint")

    def lost(self, why: str) -> EngineError:
        """What to say where an exchange failed for `why`: the ranks that have left and their words, or those that are no longer heard."""
        if self.left:
            time.sleep(60)  # the other thread is about to end the process
        self.leave("lost the others", False)
        end = time.monotonic() + self.roll_call
        while not (told := self._words()) and not (silent := self._silent()) and not self.deaf and time.monotonic() < end:
            time.sleep(self.period / 5)
        if told:
            gone = told
        elif silent:
            self.late = tuple(silent)  # and the others know
            self.hurry.set()
            gone = f"rank {', '.join(map(str, silent))} is gone without a word (killed? out of memory?)"
        elif self.deaf and self.host not in (None, self.rank):
            gone = f"rank {self.host} is gone without a word (killed? out of memory?), and the store that it held"
        else:
            gone = f"nobody knows which one is gone: {why}"
        return EngineError("PEER-LOST", f"rank {self.rank} lost the others in {now.place}: {gone}; start again, which resumes from the last checkpoint", PEER)

    def _words(self) -> str:
        """Of those that left for a reason of their own."""
        return "; ".join(f"rank {other} left: {beat.left}" for other, beat in self.beats.items() if beat.left and beat.cause)

    def _silent(self) -> list[int]:
        """Those that were dead, or had missed three beats, when the store last answered and had not said why, as this rank or another found."""
        named = {rank for beat in self.beats.values() for rank in beat.late}
        return [other for other in self.others if other in named or not self.beats[other].left and
                (self.answered - self.heard[other] > 2.5 * self.period or self.answered > self.dead.get(other, self.answered))]

    def stop(self) -> None:
        now.watched = False
        self.stopped.set()


def _machine() -> str:
    """What two processes have in common only where each sees the other under its number: a start of a machine, and a space of processes."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    return ""


def _stack(thread: int) -> str:
    """The innermost calls of a thread, the last first."""
    frame = sys._current_frames().get(thread)
    calls = traceback.extract_stack(frame)[-8:] if frame else []
    return " < ".join(f"{os.path.basename(call.filename)}:{call.lineno} {call.name}" for call in reversed(calls))
