"""Bytes on disk -> records, each with its line. Knows files, not what their records mean.

JSON Lines, one JSON array of records, or Parquet through the [parquet] extra. `survey` goes over a file's bytes once and cuts it
into spans, which `records` reads apart from each other, in any process; neither holds more than a block and one record.
"""

import glob
import hashlib
import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from engine.data import parquet
from engine.data.formats import FORMATS, BadRow, Row
from engine.data.strict import locate, parse
from engine.errors import EngineError

BLOCK = 1 << 20  # bytes read at once
SPAN = 32 << 20  # bytes of a span, about
MAX_RECORD = 16 << 20  # bytes of a record
SUFFIXES = (".jsonl", ".json", ".ndjson", ".parquet")  # what is taken of a folder
COMPRESSED = (".gz", ".zip", ".zst", ".bz2", ".xz")
# How files begin that are something else.
STRANGERS = {b"\x1f\x8b": "gzip", b"PK\x03\x04": "zip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz"}
UTF16 = {b"\xff\xfe": "it begins with FF FE", b"\xfe\xff": "it begins with FE FF", b"{\0": "every second byte is zero", b"[\0": "every second byte is zero",
         b"\0{": "every second byte is zero", b"\0[": "every second byte is zero"}
BOM = b"\xef\xbb\xbf"
BLANK = b" \t\r\n"
CONTINUATION = bytes(range(0x80, 0xC0))  # the second to fourth byte of a character


@dataclass(frozen=True)
class Span:
    """A part of a file with whole records: from byte `start` to before byte `end`, of parquet from row to row.

    `kind`: lines, array or parquet. `first_line`, `first_column`: the line of its first byte or the number of its first row, from
    1, and the character on that line.
    """

    path: Path
    kind: str
    start: int
    end: int
    first_line: int = 1
    first_column: int = 1


@dataclass(frozen=True)
class FileSurvey:
    """`lines`: of text, or rows of parquet. `state`: the file's before it was read, see `state_of`."""

    path: Path
    state: tuple[int, ...]
    sha256: str
    bytes: int
    lines: int
    kind: str
    spans: tuple[Span, ...]


# ---- Which files ---------------------------------------------------------------------------------------------------------


def expand(pattern: str | Path) -> list[Path]:
    """The files that a path, a pattern with * or ?, or a folder stands for, by name. Of a folder those ending in SUFFIXES count.

    Raises:
        EngineError: there is none, or one that cannot be read as it is.
    """
    path, expected = Path(pattern), ""
    try:
        if os.path.isdir(path):
            found = [one for one in path.iterdir() if not one.name.startswith(".") and one.suffix.lower() in (*SUFFIXES, *COMPRESSED) and not one.is_dir()]
            expected = f"files that end in {', '.join(SUFFIXES)}"
        elif glob.has_magic(str(pattern)) and not os.path.exists(path):
            found, expected = [Path(one) for one in glob.glob(str(pattern), recursive=True) if not os.path.isdir(one)], "files of that name"
        else:
            found = [path]
    except OSError as error:
        raise _unreadable(path, error) from error
    if not found:
        raise EngineError("DATA-FILE", f"{pattern}: got none, expected {expected}")
    found = sorted(found, key=str)
    for one in found:
        _check_file(one)
    return found


def _check_file(path: Path) -> None:
    """Raises EngineError for what is no file to read, without waiting for it to become one."""
    try:
        str(path).encode()
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            kinds = {stat.S_IFIFO: "a pipe", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device", stat.S_IFSOCK: "a socket", stat.S_IFDIR: "a folder"}
            raise EngineError("DATA-FILE", f"{path}: is {kinds.get(stat.S_IFMT(mode), 'no file')}, expected a regular file")
        if path.suffix.lower() in COMPRESSED:
            raise EngineError("DATA-FILE", f"{path}: is compressed ({path.suffix}), which is not read; unpack it")
        path.open("rb").close()
    except OSError as error:
        raise _unreadable(path, error) from error
    except ValueError as error:  # a name with a zero byte, or in another encoding, by which neither ledger nor messages could name its rows
        raise EngineError("DATA-FILE", f"{str(path)!r}: cannot be read by this name, rename it: {error}") from error


def _unreadable(path: Path, error: OSError) -> EngineError:
    return EngineError("DATA-FILE", f"{path}: cannot be read: {error.strerror or error}")


def state_of(path: Path) -> tuple[int, ...]:
    """What changes when a file does: its size, times and inode.

    Raises:
        EngineError: it is not there any more.
    """
    try:
        found = path.stat()
    except OSError as error:
        raise _unreadable(path, error) from error
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino


# ---- Once over the bytes -------------------------------------------------------------------------------------------------


def survey(path: Path, size: int = SPAN) -> FileSurvey:
    """What a file holds and where it can be cut, from one pass over its bytes.

    Args:
        size: bytes of a span; the last may have less, others as much more as their last record takes.

    Raises:
        EngineError: it cannot be read, is no text, or an array without an end.
    """
    _check_file(path)
    state = state_of(path)
    try:
        with path.open("rb") as file:
            head = file.read(BLOCK)
            for magic, what in STRANGERS.items():
                if head.startswith(magic):
                    raise EngineError("DATA-FILE", f"{path}: is compressed (it begins as {what} does), which is not read; unpack it")
            for magic, why in UTF16.items():
                if head.startswith(magic):
                    raise EngineError("DATA-FILE", f"{path}: looks like UTF-16 ({why}); save it as UTF-8")
            data = _Pass(file, head)
            if head.startswith(b"PAR1"):
                kind = "parquet"
                for _ in data:
                    pass
                data.lines, spans = _row_spans(path, size)
            elif head.removeprefix(BOM).lstrip(BLANK)[:1] == b"[":
                kind, spans = "array", _array_spans(path, data, size)
            else:
                kind, spans = "lines", _line_spans(path, data, size)
    except OSError as error:
        raise _unreadable(path, error) from error
    return FileSurvey(path, state, data.digest.hexdigest(), data.bytes, data.lines, kind, tuple(spans))


class _Pass:
    """A file's blocks, once; what they are in all is counted on the way."""

    def __init__(self, file: BinaryIO, head: bytes) -> None:
        self.file, self.head = file, head
        self.digest, self.bytes, self.lines = hashlib.sha256(), 0, 0

    def __iter__(self) -> Iterator[bytes]:
        block, last = self.head, b"\n"
        while block:
            self.digest.update(block)
            self.bytes, self.lines, last = self.bytes + len(block), self.lines + block.count(b"\n"), block[-1:]
            yield block
            block = self.file.read(BLOCK)
        self.lines += last != b"\n"


def _line_spans(path: Path, blocks: Iterable[bytes], size: int) -> list[Span]:
    spans, start, first, line, at = [], 0, 1, 1, 0  # `first`: the line at byte `start`; `line`: at what comes next; `at`: the block's first byte
    for block in blocks:
        done = 0
        while end := block.find(b"\n", max(done, start + size - 1 - at)) + 1:
            line += block.count(b"\n", done, end)
            spans.append(Span(path, "lines", start, at + end, first))
            start, first, done = at + end, line, end
        line += block.count(b"\n", done)
        at += len(block)
    return spans if at == start else [*spans, Span(path, "lines", start, at, first)]


def _array_spans(path: Path, blocks: Iterable[bytes], size: int) -> list[Span]:
    """An array's spans begin behind its bracket or a comma and end before one."""
    marks, spans, empty, at, line, column = _Marks(), [], True, 0, 1, 1
    start, first = -1, (1, 1)
    for block in blocks:
        if start < 0:
            start = at = block.index(b"[") + 1
            line, column = first = _after(block[:at].removeprefix(BOM), 1, 1)
            block = block[at:]
        done = 0
        for end in [] if marks.closed else marks.find(block):
            closing = marks.closed and block[end] != ord(",")
            empty = empty and closing and not block[done:end].strip(BLANK)
            if at + end - start >= size or closing:
                if not empty:
                    spans.append(Span(path, "array", start, at + end, *first))
                line, column = first = _after(block[done : end + 1], line, column)
                start, done = at + end + 1, end + 1
        if marks.closed and (rest := block[done:].lstrip(BLANK)):
            line, column = _after(block[done : len(block) - len(rest)], line, column)
            raise EngineError("DATA-FILE", f"{path}:{line}:{column}: the array ends before this; expected one array of objects{_first_fault(spans)}")
        empty = empty and not block[done:].strip(BLANK)
        line, column = _after(block[done:], line, column)
        at += len(block)
    if not marks.closed:
        cut = _first_fault([*spans, Span(path, "array", start, at, *first)])
        raise EngineError("DATA-FILE", f"{path}: the array has no end; expected ] after its last object{cut}")
    return spans


def _row_spans(path: Path, size: int) -> tuple[int, list[Span]]:
    """A parquet file's rows, and spans of whole groups of them."""
    spans, start, end, held = [], 0, 0, 0
    for end, weight in parquet.groups(path):
        held += weight
        if held >= size:
            spans.append(Span(path, "parquet", start, end, start + 1))
            start, held = end, 0
    return end, spans if start == end else [*spans, Span(path, "parquet", start, end, start + 1)]


def _first_fault(spans: Iterable[Span]) -> str:
    """What is wrong with an array as a whole may begin with a quote or a bracket in one of its elements."""
    for span in spans:
        for line, found in records(span):
            if isinstance(found, BadRow):
                return f". The first fault: {place(span.path, line, found.column)}: {found.reason}"
    return ""


def _after(part: bytes, line: int, column: int) -> tuple[int, int]:
    """Line and column of what comes after `part`, which begins at these."""
    at = part.rfind(b"\n") + 1
    return line + part.count(b"\n"), (1 if at else column) + len(part[at:].translate(None, CONTINUATION))


class _Marks:
    """Finds the commas between an array's elements and the bracket that closes it, block after block."""

    DEEPER = np.zeros(256, np.int8)
    DEEPER[list(b"[{")], DEEPER[list(b"]}")] = 1, -1

    def __init__(self) -> None:
        self.inside, self.escaped, self.depth, self.closed = False, False, 0, False  # inside a string; after a backslash

    def find(self, block: bytes) -> list[int]:
        """Where in `block` the marks are; `closed` says that the last is the closing bracket."""
        if self.escaped:
            block = b" " + block[1:]
        if b"\\" in block:  # pairs first, so that what is left escapes what it stands before
            block = block.replace(b"\\\\", b"  ")
            self.escaped = block.endswith(b"\\")
            block = block.replace(b'\\"', b"  ")
        else:
            self.escaped = False
        letters = np.frombuffer(block, np.uint8)
        inside = (np.cumsum(letters == ord('"'), dtype=np.uint8) & 1).astype(bool) ^ self.inside
        depth = np.cumsum(self.DEEPER[letters] * ~inside, dtype=np.int32) + self.depth
        found = np.flatnonzero((depth <= 0) & ~inside & ((letters == ord(",")) | (depth < 0)))
        closings = np.flatnonzero(depth[found] < 0)
        if len(closings):
            self.closed, found = True, found[: closings[0] + 1]
        if len(block):
            self.inside, self.depth = bool(inside[-1]), int(depth[-1])
        return found.tolist()


# ---- Records -------------------------------------------------------------------------------------------------------------


def records(span: Span) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
    """The line and the content of each record of a span, or what is wrong with it. Blank lines are none.

    Raises:
        EngineError: the file cannot be read, or is not what it was when it was surveyed.
    """
    try:
        if span.kind == "parquet":
            yield from parquet.rows(span.path, span.start, span.end, MAX_RECORD)
            return
        with span.path.open("rb") as file:
            yield from (_array_records if span.kind == "array" else _line_records)(span, _span_blocks(file, span))
    except OSError as error:
        raise _unreadable(span.path, error) from error


def _span_blocks(file: BinaryIO, span: Span) -> Iterator[bytes]:
    file.seek(span.start)
    left = span.end - span.start
    while left:
        if not (block := file.read(min(BLOCK, left))):
            raise EngineError("DATA-CHANGED", f"{span.path}: has become shorter while it was read; start again")
        left -= len(block)
        yield block.removeprefix(BOM) if file.tell() == len(block) else block


def _line_records(span: Span, blocks: Iterable[bytes]) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
    line, begun = span.first_line, _Record()
    for block in blocks:
        first, *pieces = block.split(b"\n")
        begun.add(first)
        if pieces:
            last = pieces.pop()
            for piece in (begun.whole(), *pieces):
                if piece is None:
                    yield line, _too_long()
                elif piece.strip(BLANK):
                    yield line, _parsed(piece)
                line += 1
            begun = _Record()
            begun.add(last)
    if (piece := begun.whole()) is None:
        yield line, _too_long()
    elif piece.strip(BLANK):
        yield line, _parsed(piece)


def _array_records(span: Span, blocks: Iterable[bytes]) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
    line, column, begun, marks = span.first_line, span.first_column, _Record(), _Marks()
    for block in blocks:
        done = 0
        for end in [*marks.find(block), None]:
            part = block[done:end]
            if not begun.size:  # the element begins with what is not blank
                body = part.lstrip(BLANK)
                line, column = _after(part[: len(part) - len(body)], line, column)
                part = body
            begun.add(part)
            if end is not None:
                yield _element(begun.whole(), line, column)
                line, column = _after(b",", *begun.after(line, column))
                begun, done = _Record(), end + 1
    yield _element(begun.whole(), line, column)


def _element(piece: bytes | None, line: int, column: int) -> tuple[int, dict[str, Any] | BadRow]:
    """Line and content of what begins at `line` and `column`. A fault's line is its own, which may not be the element's first."""
    if piece is None:
        return line, _too_long(column)
    found = _parsed(piece, "an object", column)
    if isinstance(found, BadRow):
        down, found.column = _position(piece.decode(errors="replace"), found.column, column)
        line += down
    return line, found


class _Record:
    """A record as it comes, block by block. Of one over MAX_RECORD only its extent is kept."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []
        self.size, self.extent = 0, (0, 1)  # `extent`: lines and columns of parts that were let go

    def add(self, part: bytes) -> None:
        self.size += len(part)
        self.parts.append(part)
        if self.size > MAX_RECORD:
            for one in self.parts:
                self.extent = _after(one, *self.extent)
            self.parts = []

    def whole(self) -> bytes | None:
        if self.size > MAX_RECORD:
            return None
        self.parts = [b"".join(self.parts)]  # not twice in memory
        return self.parts[0]

    def after(self, line: int, column: int) -> tuple[int, int]:
        """Line and column of what comes after a record that begins at these."""
        lines, columns = self.extent
        line, column = line + lines, columns if lines else column + columns - 1
        return _after(b"".join(self.parts), line, column)


def _too_long(column: int = 1) -> BadRow:
    return BadRow(f"the record is over {MAX_RECORD >> 20} MiB; shorten or split it", column)


class Record(dict):
    """A record with the bytes it was read from, which begin at `column` of their line."""

    read_from: bytes
    column: int

    @property
    def size(self) -> int:
        return len(self.read_from)


def position(record: Any, line: int, found: BadRow) -> tuple[int, int | None]:
    """Line and column of a fault that a format found in a record; of parquet the row, and no column."""
    if not isinstance(record, Record):
        return line, found.column
    text = record.read_from.decode()
    down, column = _position(text, locate(text, found.path), record.column)
    return line + down, column


def _position(text: str, column: int, first_column: int) -> tuple[int, int]:
    """Lines further down, and the column there, of a character of a text that begins at `first_column` of its line."""
    before = text[: column - 1]
    return before.count("\n"), column + (first_column - 1 if "\n" not in before else -before.rindex("\n") - 1)


def _parsed(piece: bytes, what: str = "one object a line", column: int = 1) -> dict[str, Any] | BadRow:
    try:
        value = parse(piece.decode(), what)
    except UnicodeDecodeError as error:
        column = len(piece[: error.start].decode()) + 1
        return BadRow(f"byte 0x{piece[error.start]:02x} is not UTF-8; save the file as UTF-8", column)
    except BadRow as error:
        return error.with_traceback(None)  # it would hold on to the text
    if isinstance(value, dict):
        record = Record(value)
        record.read_from, record.column = piece, column
        return record
    kind = {list: "a list", str: "text", bool: "true or false", type(None): "null"}.get(type(value), "a number")
    return BadRow(f"got {kind}, expected an object", len(piece) - len(piece.lstrip(BLANK)) + 1)


def place(path: Path, line: int, column: int | None) -> str:
    """path:line:column, as messages, ledger and data.skip name a row."""
    return f"{path}:{line}" + (f":{column}" if column else "")


def read_rows(path: Path, format: str = "alpaca", answered: bool = True) -> Iterator[Row]:
    """The rows of a file, for those who want them all and right.

    Args:
        format: one of FORMATS.
        answered: every row must end with an answer, as in training.

    Raises:
        EngineError: `path:line` of the first that is no row, or a file that holds none.
    """
    empty = True
    for span in survey(path).spans:
        for line, found in records(span):
            empty = False
            try:
                if isinstance(found, BadRow):
                    raise found
                row = FORMATS[format](found, line, answered)
            except BadRow as error:
                raise EngineError("DATA-ROW", f"{place(path, *position(found, line, error))}: {error.reason}") from None
            yield row
    if empty:
        raise EngineError("DATA-EMPTY", f"{path}: holds no row; expected JSON objects, one a line")
