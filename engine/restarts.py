"""A launcher that starts failed ranks again, torchrun --max-restarts: not where it cannot help, and not for ever."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from engine import checkpoint
from engine.errors import FATAL, PEER, PREEMPTED, EngineError, last, restarts_in_launch

IN_VAIN = 3  # restarts in a row from one checkpoint


def check(run: Path, rank: int) -> None:
    """Before a rank does anything. restarts.json counts how often the launcher began again at the newest checkpoint, for rank 0.

    Raises:
        SystemExit: ranks have stopped as asked, which a restart would undo.
        EngineError: the run has ended with a fatal code, which is the error's, or restarts have not brought it to another checkpoint.
    """
    note, newest = run / "restarts.json", checkpoint.newest(run / "checkpoints") or 0
    if not restarts_in_launch():
        for path in (note, run / "stopped") if rank == 0 else ():
            path.unlink(missing_ok=True)
        return
    if (run / "stopped").exists():  # each rank looks, for they may not meet any more: another node's launcher may have ended
        raise SystemExit(PREEMPTED)
    error, before = last(run), _read(note)
    code, told = (error.exit_code, error.line) if error else (PEER, "no rank had time to say why")
    if code in FATAL:
        raise EngineError("RESTART-FATAL", f"{run}: started again, which cannot help: {told}", code)
    if rank != 0:
        return
    count = before.get("restarts", 0) + 1 if before.get("from_step") == newest else 1
    if count > IN_VAIN:
        raise EngineError("RESTART-LOOP", f"{run}: gave up, {IN_VAIN} restarts from step {newest} brought no newer checkpoint; the last ended with: {told}",
                          code)
    with suppress(OSError):  # a full disk is reported elsewhere
        note.write_text(json.dumps({"from_step": newest, "restarts": count}) + "\n", encoding="utf-8")


def stopped(run: Path) -> int:
    """For every rank once all have stopped as asked: the exit code, and a note for those that the same launch may start again."""
    with suppress(OSError):
        (run / "stopped").touch()
    return PREEMPTED


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
