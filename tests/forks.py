"""A test's work in a process of its own, so that what it does to the process is gone afterwards."""

import os
import traceback
from collections.abc import Callable

import pytest

SKIPPED = 77


def forked(what: Callable[[], None]) -> None:
    """Runs `what` in a fork; fails with what it raised, and skips where it skips."""
    ours, theirs = os.pipe()
    pid = os.fork()
    if not pid:
        code, text = 0, ""
        try:
            os.close(ours)
            what()
        except pytest.skip.Exception as skipped:
            code, text = SKIPPED, str(skipped)
        except BaseException:
            code, text = 1, traceback.format_exc()
        finally:
            os.write(theirs, text.encode()[-60_000:])
            os._exit(code)
    os.close(theirs)
    with os.fdopen(ours, "rb") as pipe:
        said = pipe.read().decode()
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code == SKIPPED:
        pytest.skip(said)
    assert code == 0, said
