"""Failures with a name, one line of text and an exit code; everything else is a bug of ours and shows its traceback.

Text for a user reads: what, got, expected, what to change. `run` is the outermost call of every command.
"""

import ctypes
import errno
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from engine import collector
from engine.terminal import prepare, shown

DONE = 0
USER = 2  # the recipe or the data
CHECKPOINT = 3  # unusable, or made by a run that differs
ENVIRONMENT = 4  # disk, permission, lock, missing extra
PEER = 5  # a rank was lost or did not answer
NUMERIC = 6  # a loss or gradient that is not finite
SECURITY = 7  # refused on purpose
BUG = 70
PREEMPTED = 75  # told to stop, saved, may be started again
FATAL = (USER, CHECKPOINT, SECURITY)  # whatever starts again finds the same recipe, rows and checkpoints

LAUNCHER, STORE = "ENGINE_LAUNCHER", "ENGINE_STORE"  # the variables by which a launcher tells ranks its process, and rank 0 the socket for their store
WORDS_S = 5.0  # for last words from beside the main thread: the disk or the reader that they go to may be what it hangs in

DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE}  # the machine's answer, no bug


class EngineError(Exception):
    """`name` is AREA-WHAT in capitals; `text` one sentence or a few; `exit_code` one of the constants above."""

    def __init__(self, name: str, text: str, exit_code: int = USER) -> None:
        super().__init__(text)
        self.name, self.text, self.exit_code = name, text, exit_code
        self.is_first = False  # whether no other rank has failed before

    def __str__(self) -> str:
        return f"ERROR E-{self.name} {self.text}"

    @property
    def line(self) -> str:
        """The first line; where the text is a traceback, as of a bug in last_error.json, the first of the exception that it ends in."""
        lines = str(self).splitlines()
        frames = [number for number, text in enumerate(lines) if text.startswith('  File "')]
        return next(text for text in (*lines[(frames or [0])[-1] :], lines[0]) if text.strip() and not text.startswith(" "))


def first_line(error: BaseException) -> str:
    """Of its message, which torch's make pages of; its type where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def extra(package: str, source: str | Path, name: str = "hub") -> Any:
    """A package of the extra `name`, which `source` needs."""
    try:
        return import_module(package)
    except ImportError as error:
        text = f"{source} needs the package {package}: pip install -c constraints.txt -e '.[{name}]'"
        raise EngineError("ENVIRONMENT-EXTRA", text, ENVIRONMENT) from error


def rank_in_launch() -> int:
    """This process's rank as its launcher set it, before ranks have met; 0 without one. What is none distributed.py will refuse."""
    try:
        return max(0, int(os.environ.get("RANK", 0)))
    except ValueError:
        return 0


def restarts_in_launch() -> int:
    """How often the launcher has started these ranks again."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def run(main: Callable[[list[str]], int | None], needs_reader: bool = True) -> None:
    """Runs `main(argv)` and leaves the process with the exit code that belongs to what happened.

    A mistake of the user's is the same on every rank, so rank 0 prints it, and who finds it first, for the launcher ends the others then; a
    failure that can strike one rank is printed by that rank, with its number.
    """
    prepare(needs_reader)
    collector.rest()
    if "TORCHELASTIC_RUN_ID" in os.environ:  # started by a launcher: its ranks do not outlive it
        die_with_parent()
        if is_gone(launcher := int(os.environ.pop(LAUNCHER, os.getppid()))):
            print(f"the launcher, process {launcher}, is gone, and so is this rank", file=sys.stderr, flush=True)
            os._exit(PEER)
    try:
        code = main(sys.argv[1:]) or DONE
    except EngineError as error:
        code = error.exit_code
        _print(error)
    except KeyboardInterrupt:
        code = 130
    except SystemExit as error:  # --help
        code = error.code or DONE
    except BrokenPipeError:  # the reader of our output left, as `| head` does
        os._exit(141)
    except Exception:
        traceback.print_exc()
        code = BUG
    # The launcher ends all ranks as soon as one has left. The rank that knows why must be the first to leave, so it
    # no longer listens to the launcher.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    _flush()
    _exit(code)


def warn(text: str) -> None:
    """A line on standard error about what may be meant as it is, and does not end the run."""
    print(f"WARNING {text}", file=sys.stderr, flush=True)


finishing: list[Callable[[BaseException], None]] = []  # what is under way in other threads and has to come to its end, whatever ends the run


def end(error: EngineError, speaks: bool) -> None:
    """Leaves the process as `run` and `recorded` would, from any thread, while the main thread waits for what will not come."""

    def say() -> None:
        if _recording:
            _note(_recording[-1], error.exit_code, str(error))
        if speaks:
            _print(error)
        _flush()

    words = threading.Thread(target=say, daemon=True)
    words.start()
    words.join(WORDS_S)
    for finish in finishing:
        finish(error)
    _exit(error.exit_code)


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()


def _exit(code: int) -> None:
    if code == PEER:  # one that only lost a peer waits for it, and for those that want to hear what it knows
        time.sleep(1.0)
    os._exit(code)  # not sys.exit: taking down torch's process group can wait for ever, see distributed.py


def die_with_parent() -> None:
    """SIGKILL to this process as soon as the thread that started it is gone; on Linux alone."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def is_gone(process: int) -> bool:
    """Whether no process of this machine has that number, or one that has ended and waits for its parent to look. One that is stopped is there."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:  # another user's
        pass
    with suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text(errors="replace").rpartition(") ")[2][:1] in ("Z", "X")
    return False


def _print(error: EngineError) -> None:
    rank = rank_in_launch()
    if rank == 0:
        print(error, file=sys.stderr)
    elif error.exit_code not in (USER, CHECKPOINT, NUMERIC) or (error.exit_code == USER and error.is_first):
        print(f"[rank {rank}] {error}", file=sys.stderr)


_recording: list[Path] = []  # where to write down what ends the run


@contextmanager
def recorded(path: Path, rank: int) -> Iterator[None]:
    """Writes `path` (last_error.json) when the block fails: exit code, rank, message. Removes a stale one first."""
    if rank == 0:
        path.unlink(missing_ok=True)
    _recording.append(path)
    try:
        yield
    except BaseException as caught:
        error = caught
        if isinstance(caught, OSError) and (caught.errno in DISK or not path.parent.is_dir()):
            text = f"{caught.filename or path.parent}: {caught.strerror}; free some space, put back what was moved, or set run.folder"
            error = EngineError("ENVIRONMENT-DISK", text, ENVIRONMENT)
        code = error.exit_code if isinstance(error, EngineError) else BUG
        detail = str(error) if isinstance(error, EngineError) else traceback.format_exc()
        if not isinstance(error, (SystemExit, KeyboardInterrupt)):
            is_first = _note(path, code, detail)
            if isinstance(error, EngineError):
                error.is_first = is_first
        if code == BUG and isinstance(error, Exception):
            print(f"[rank {rank}] {detail}", file=sys.stderr, flush=True)
            raise EngineError("BUG", f"{type(error).__name__}: {first_line(error)}; the traceback above belongs in a report", BUG) from error
        if error is not caught:
            raise error from caught
        raise
    finally:
        _recording.pop()


def last(folder: Path) -> EngineError | None:
    """What ended the run in `folder`, by its last_error.json; None where there is none that can be read. Of a bug the text is a traceback."""
    try:
        found = json.loads((folder / "last_error.json").read_text(encoding="utf-8"))
        message, code = found["message"].strip(), int(found["exit_code"])
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None
    name, _, text = message.removeprefix("ERROR E-").partition(" ") if message.startswith("ERROR E-") else ("BUG", "", message)
    return EngineError(name, text, code)


def _note(path: Path, code: int, message: str) -> bool:
    """Whether this rank's is the first, which alone is written, all of it or nothing: the disk may be what failed, and that must still be reported."""
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(json.dumps({"exit_code": code, "rank": rank_in_launch(), "message": shown(message)}, indent=2) + "\n")
    except FileExistsError:
        return False
    except OSError:
        with suppress(OSError):
            path.unlink(missing_ok=True)
        return False
    return True
