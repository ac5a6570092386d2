"""JSON that means one thing only: what other parsers pass over or guess at (a key given twice, NaN, half a character) is a fault
with a place. As fast as json.loads on what is right; only faults are searched for their column.
"""

import json
import math
import re
import sys
from collections.abc import Sequence
from typing import Any

DEPTH = 256  # brackets within each other
DIGITS = getattr(sys, "get_int_max_str_digits", int)() or 4300  # of an integer, as Python itself reads them
BLANK = " \t\r\n"

# What a text is made of where it matters: strings, brackets, numbers, the constants that JSON has not. The rest is passed over.
_TOKEN = re.compile(r'"[^"]*"?|[\[{]|[\]}]|-?\d[\d.eE+-]*|-?Infinity|NaN')
_COLON = re.compile(r"[ \t\r\n]*:")
# An escape; group 1: of a surrogate without its other half.
_ESCAPE = re.compile(r"\\(?:u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|(u[dD][89a-fA-F][0-9a-fA-F]{2})|.)", re.DOTALL)


class BadRow(Exception):
    """A record that cannot be trained on. Who reads knows the line.

    column   where, in characters from 1, for text that is no record
    path     which value of a record is at fault, as keys and indices: ("messages", 1, "content")
    """

    def __init__(self, reason: str, column: int | None = None, path: tuple[str | int, ...] = ()) -> None:
        super().__init__(reason)
        self.reason, self.column, self.path = reason, column, path


class _Ambiguous(ValueError):
    pass


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise _Ambiguous
    return made


def _float(number: str) -> float:
    value = float(number)
    if math.isinf(value):
        raise _Ambiguous
    return value


def _constant(name: str) -> None:
    raise _Ambiguous


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_float=_float, parse_constant=_constant)


def parse(text: str, what: str = "one object a line") -> Any:
    """The one value that `text` is.

    Args:
        what: belongs there, for the fault's text.

    Raises:
        BadRow: with the column, from 1, of the fault in `text`.
    """
    text = text.rstrip(BLANK)
    start = len(text) - len(text.lstrip(BLANK))
    if text.count("[") + text.count("{") > DEPTH:  # else it cannot be deeper
        _search(text, ambiguous=False)
    try:
        value, end = _DECODER.raw_decode(text, start)
    except json.JSONDecodeError as error:
        raise BadRow(_reason(text, error, what), error.pos + 1) from None
    except ValueError:  # an integer that is too long, too
        _search(text, ambiguous=True)
        raise BadRow(f"not JSON that can be read; expected {what}", start + 1) from None
    if rest := text[end:].lstrip(BLANK):
        found = "a second object" if rest[0] == "{" else f"more after the value ({rest[0]!r})"
        raise BadRow(f"not JSON: {found}; expected {what}", len(text) - len(rest) + 1)
    if "\\ud" in text or "\\uD" in text:
        for escape in _ESCAPE.finditer(text):
            if escape[1]:
                raise BadRow(f"half a character ({escape[0]}, a lone surrogate); expected whole ones", escape.start() + 1)
    return value


def locate(text: str, path: Sequence[str | int]) -> int:
    """The column, from 1, of the value at `path` in a text that `parse` took; of what should hold it, where it is not there."""

    def skip(at: int, letters: str = BLANK) -> int:
        while text[at] in letters:
            at += 1
        return at

    at = skip(0)
    for part in path:
        opening, found, at_inner = text[at], None, at + 1
        number = 0
        while opening in "{[" and text[at_inner := skip(at_inner, BLANK + ",")] not in "}]":
            key: str | int = number
            if opening == "{":
                key, at_inner = json.decoder.scanstring(text, at_inner + 1)
                at_inner = skip(at_inner, BLANK + ":")
            if key == part:
                found = at_inner
                break
            _, at_inner = _DECODER.raw_decode(text, at_inner)
            number += 1
        if found is None:
            break
        at = found
    return at + 1


def _reason(text: str, error: json.JSONDecodeError, what: str) -> str:
    found = text[error.pos : error.pos + 1]
    if found == "\0":
        return "byte 0x00 is no text; expected " + what
    if found == "\ufeff":
        return "a byte order mark amid the file; expected " + what
    return f"not JSON: {error.msg}; expected {what}"


def _search(text: str, ambiguous: bool) -> None:
    """Raises BadRow at the first thing in `text` that is too deep or, if asked, `ambiguous`."""
    keys: list[set[str]] = [set()]  # of every object that is open
    for token in _TOKEN.finditer(text.replace("\\\\", "  ").replace('\\"', "  ")):  # as long as before, and no string holds a quote
        found, column = token[0], token.start() + 1
        if found in "[{":
            keys.append(set())
            if len(keys) > DEPTH + 1:
                raise BadRow(f"not JSON that can be read: brackets within {DEPTH} others", column)
        elif found in "]}":
            keys = keys[:-1] or [set()]
        elif not ambiguous:
            continue
        elif found[0] == '"':
            if _COLON.match(text, token.end()):
                if (key := json.loads(text[token.start() : token.end()])) in keys[-1]:
                    raise BadRow(f"the key {shown(key)} is given twice", column)
                keys[-1].add(key)
        elif found.endswith(("NaN", "Infinity")):
            raise BadRow(f"not JSON: {found} is no number of JSON's", column)
        elif (digits := found.lstrip("-")).isdigit():
            if len(digits) > DIGITS:
                raise BadRow(f"an integer of {len(digits)} digits; expected at most {DIGITS}", column)
        elif math.isinf(float(found)):
            raise BadRow(f"the number {shown(found)} is larger than any that can be held", column)


WRITTEN = re.compile(r'"(?![\w.-]{0,20}"|[^"\\]{0,3}")(?:[^"\\]|\\.)*"')  # a JSON string that is more than one short word


def shown(value: Any) -> str:
    """A value as a fault's text has it: one line that any terminal can print. Single words are shown, such as the names of roles;
    what people wrote is not: logs are read by others than rows."""
    text = WRITTEN.sub('"…"', json.dumps(value, ensure_ascii=False, default=str))
    text = "".join(letter if letter.isprintable() else " " for letter in text[:41])
    return text if len(text) <= 40 else f"{text[:40]}…"
