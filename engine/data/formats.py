"""A line of JSONL -> a row of messages. A format is one function; what it rejects, it rejects with the reason."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import EngineError


@dataclass(frozen=True)
class Row:
    """What one line asks and answers. `line` counts from 1; `task` groups rows in the table of exact matches."""

    line: int
    instruction: str
    input: str
    output: str
    task: str = ""


def read_rows(path: Path, answered: bool = True) -> Iterator[Row]:
    """The rows of a JSONL file, blank lines left out.

    Args:
        answered: every row must have its output, as in training.

    Raises:
        EngineError: `path:line` of the first line that is no row, or a file that holds none.
    """
    empty = True
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    empty = False
                    yield alpaca(_parse(line.rstrip(b"\r\n"), path, number), path, number, answered)
    except OSError as error:
        raise EngineError("DATA-FILE", f"{path}: cannot be read: {error.strerror}") from error
    if empty:
        raise EngineError("DATA-EMPTY", f"{path}: holds no row; expected JSON objects, one a line")


def alpaca(record: dict[str, Any], path: Path, number: int, answered: bool) -> Row:
    """{"instruction", "input", "output"} and, if wished, "task"; other fields are left alone. `input` may be absent or blank."""
    for key, needed in (("instruction", True), ("input", False), ("output", answered), ("task", False)):
        value = record.get(key, None if needed else "")
        if not isinstance(value, str):
            got = "no such field" if key not in record else f"{json.dumps(value)[:40]}"
            raise EngineError("DATA-ROW", f'{path}:{number}: "{key}": got {got}, expected text')
        if any("\ud800" <= character <= "\udfff" for character in value):
            raise EngineError("DATA-ROW", f'{path}:{number}: "{key}": got half a character (a lone surrogate), expected whole ones')
    return Row(number, record["instruction"], record.get("input", ""), record.get("output", ""), record.get("task", ""))


def _parse(line: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        record = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
    except UnicodeDecodeError as error:
        raise EngineError("DATA-ROW", f"{path}:{number}:{error.start + 1}: byte 0x{line[error.start]:02x} is not UTF-8; save the file as UTF-8") from error
    except ValueError as error:
        column = getattr(error, "colno", 1)
        raise EngineError("DATA-ROW", f"{path}:{number}:{column}: not JSON: {getattr(error, 'msg', error)}; expected one object a line") from error
    if not isinstance(record, dict):
        raise EngineError("DATA-ROW", f"{path}:{number}: got a {type(record).__name__}, expected an object with instruction, input, output")
    return record


