"""Files become records: all of them, once, each with its line; and every fault is told by its place, soon, whatever the file."""

import builtins
import json
import os
import random
import re
import sys
import time
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.data import parquet as parquets
from engine.data import reading
from engine.data.build import BATCH_BYTES, batches
from engine.data.formats import BadRow
from engine.data.reading import Span, expand, read_rows, records, survey
from engine.errors import ENVIRONMENT, USER, EngineError

GOOD = b'{"instruction": "a", "output": "b"}'


def found(path: Path, size: int = reading.SPAN) -> list[tuple]:
    """Everything in a file, faults as (line, column, reason)."""
    return [(line, one.column, one.reason) if isinstance(one, BadRow) else (line, one) for span in survey(path, size).spans for line, one in records(span)]


def written(tmp_path: Path, content: bytes, name: str = "rows.jsonl") -> Path:
    (tmp_path / name).write_bytes(content)
    return tmp_path / name


# ---- One record ----------------------------------------------------------------------------------------------------------

DEEP = b"[" * 100_000
FAULTS = [  # what a line holds, where its fault is, what is said of it
    (b'{"a": "b"', 10, "not JSON: Expecting ',' delimiter"),
    (b'{"a": "b', 7, "not JSON: Unterminated string"),
    (b'{"a": 1 "b": 2}', 9, "Expecting ',' delimiter"),
    (b'{"a": 1} {"b": 2}', 10, "a second object; expected one object a line"),
    (b'{"a": 1}, ', 9, "more after the value (',')"),
    (b'  {"a": 1}x', 11, "more after the value ('x')"),
    ('{"é": "红🙂"'.encode() + b" x}", 12, "Expecting ',' delimiter"),
    ('{"é": "红🙂'.encode() + b'\xe9"}', 10, "byte 0xe9 is not UTF-8; save the file as UTF-8"),
    (b'{"a": "\xc0\x80"}', 8, "byte 0xc0 is not UTF-8"),
    (b'{"a": "\xed\xa0\x80"}', 8, "byte 0xed is not UTF-8"),
    (b'{"a": "x\0y"}', 9, "byte 0x00 is no text"),
    (b"\0\0\0", 1, "byte 0x00 is no text"),
    (b'{"a": "x\ty"}', 9, "Invalid control character"),
    (rb'{"a": "\x"}', 8, r"Invalid \escape"),
    (rb'{"a": "x\ud800y"}', 9, r"half a character (\ud800, a lone surrogate)"),
    (rb'{"a": "\ud83d\ude00 \\ud800 \uDC00"}', 29, r"half a character (\uDC00"),
    (rb'{"\ud83d": 1}', 3, "half a character"), (rb'{"\ud83d": 1, "\ud83d": 2}', 15, 'the key " " is given twice'),
    (b'{"a": 1, "b": 2, "a": 3}', 18, 'the key "a" is given twice'),
    (b'{"b": [{"a": 1, "x": {"a": 1}}, {"a": 1, "\\u0061" : 2}], "a": 3}', 42, 'the key "a" is given twice'),
    (b'{"a": "\\"a\\": 1", "x" : "a", "a": [}', 36, "not JSON: Expecting value"),
    (b'{"a": "7", "b": ' + b"1" * 5000 + b"}", 17, "an integer of 5000 digits; expected at most 4300"),
    (b'{"a": -' + b"1" * 4301 + b"}", 7, "an integer of 4301 digits"),
    (b'{"a": "NaN", "b": [1, NaN]}', 23, "NaN is no number of JSON's"),
    (b'{"a": -Infinity}', 7, "-Infinity is no number of JSON's"),
    (b'{"a": 1e5, "b": -1e999}', 17, 'the number "-1e999" is larger than any that can be held'),
    (b'{"a": ' + DEEP + b"]" * 100_000 + b"}", 262, "brackets within 256 others"),
    (b'{"a":' * 100_000, 1281, "brackets within 256 others"),
    (DEEP, 257, "brackets within 256 others"),
    (b"\xef\xbb\xbf" + GOOD, 1, "a byte order mark amid the file"),
    (b"null", 1, "got null, expected an object"), (b" [1]", 2, "got a list, expected an object"), (b'"a"', 1, "got text, expected an object"),
    (b"12", 1, "got a number, expected an object"), (b"true", 1, "got true or false, expected an object"),
]


@pytest.mark.parametrize(("line", "column", "words"), FAULTS, ids=[f"{number}-{fault[0][:24]!r}" for number, fault in enumerate(FAULTS)])
def test_a_fault_is_told_with_line_and_column_and_is_that_lines_alone(tmp_path, line, column, words):
    path, began = written(tmp_path, GOOD + b"\n\n" + line + b"\r\n" + GOOD), time.perf_counter()
    good = json.loads(GOOD)
    (first, fault, last) = found(path)
    assert first == (1, good) and last == (4, good) and fault[:2] == (3, column) and words in fault[2] and "\n" not in fault[2] and len(fault[2]) < 200
    with pytest.raises(EngineError) as caught:
        list(read_rows(path))
    assert str(caught.value).startswith(f"ERROR E-DATA-ROW {path}:3:{column}: ") and caught.value.exit_code == USER
    assert time.perf_counter() - began < 1


def test_what_is_right_is_taken_as_json_takes_it(tmp_path):
    for value in ({"a": [1, 2.5e3, -0.0, None, True, {"b": {}}], "": "\u0000\u2028\ud7ff\ue000 🙂"}, {"a": "[" * 5000}, {"a": 10**4299}, {"a": [[]] * 400}):
        for ascii_only in (False, True):
            path = written(tmp_path, b" \t" + json.dumps(value, ensure_ascii=ascii_only).encode() + b" \r\n")
            assert found(path) == [(1, value)]


def test_deep_inside_other_calls_nothing_changes(tmp_path):
    """How deep a record may be does not depend on how deep the program is."""
    path = written(tmp_path, b'{"a": ' + b"[" * 255 + b"]" * 255 + b"}")

    def deep(calls: int) -> list[tuple]:
        return deep(calls - 1) if calls else found(path)

    assert deep(sys.getrecursionlimit() - 600)[0][0] == 1 and len(deep(400)[0]) == 2


# ---- One file ------------------------------------------------------------------------------------------------------------


def test_line_ends_blank_lines_and_a_byte_order_mark_change_nothing(tmp_path):
    rows = [{"instruction": f"红 {number}", "output": "é"} for number in range(4)]
    lines = [json.dumps(row, ensure_ascii=False).encode() for row in rows]
    expected = [(number, row) for number, row in enumerate(rows, 1)]
    for content in (b"\n".join(lines), b"\n".join(lines) + b"\n", b"\r\n".join(lines) + b"\r\n", b"\xef\xbb\xbf" + b"\n".join(lines) + b"\n\n \t\r\n"):
        assert found(written(tmp_path, content)) == expected
    assert found(written(tmp_path, b"\n \r\n".join(lines))) == [(2 * number - 1, row) for number, row in expected]


@pytest.mark.parametrize("content", [b"", b"\n", b" \n\r\n\t", b"\xef\xbb\xbf", b"[]", b" [ \n ] \n"])
def test_a_file_without_a_row_is_an_error(tmp_path, content):
    path = written(tmp_path, content)
    assert found(path) == []
    with pytest.raises(EngineError, match="rows.jsonl: holds no row"):
        list(read_rows(path))


@pytest.mark.parametrize(("content", "words"), [
    (GOOD.decode().encode("utf-16"), "looks like UTF-16 (it begins with FF FE); save it as UTF-8"), (GOOD.decode().encode("utf-16-be"), "looks like UTF-16"),
    (GOOD.decode().encode("utf-16-le"), "looks like UTF-16"), (b"\x1f\x8b\x08\0\0", "as gzip does"), (b"PK\x03\x04", "as zip does"), (b"BZh9", "as bzip2 does"),
    (b"\x28\xb5\x2f\xfd", "as zstd does"), (b"\xfd7zXZ\0", "as xz does"), (b"PAR1 but no more", "cannot be read as parquet"),
])
def test_what_is_no_text_is_told_of_the_file(tmp_path, content, words):
    with pytest.raises(EngineError) as caught:
        survey(written(tmp_path, content))
    assert words in str(caught.value) and str(tmp_path / "rows.jsonl") in str(caught.value) and caught.value.exit_code == USER


def test_the_survey_says_what_the_file_is(tmp_path):
    import hashlib

    for content, lines, kind in ((b"", 0, "lines"), (b"a", 1, "lines"), (b"a\n", 1, "lines"), (b"a\n\nb", 3, "lines"), (b"\xef\xbb\xbf \n[1]", 2, "array")):
        for size in (1, 2, 100):
            what = survey(written(tmp_path, content), size)
            assert (what.sha256, what.bytes, what.lines, what.kind) == (hashlib.sha256(content).hexdigest(), len(content), lines, kind)


PARTS = st.sampled_from(["", " ", '{"a": 1}', '{"é": "红🙂\\n"}', '{"a": "\\\\"}', '{"a": "\\\\\\""}', "[[], {}]", "x", '{"a": "' + "b" * 40 + '"}', "\r", '"'])


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(PARTS, max_size=12), st.booleans(), st.booleans(), st.integers(1, 60), st.integers(1, 30), st.integers(20, 60))
def test_lines_however_cut(tmp_path_factory, lines, mark, last, size, block, longest):
    """Spans of any size, read in blocks of any size, give what a plain split gives, and every byte is in one span."""
    content = b"\xef\xbb\xbf" * mark + "\n".join(lines).encode() + b"\n" * last
    path = written(tmp_path_factory.mktemp("lines"), content)
    if content.removeprefix(b"\xef\xbb\xbf").lstrip(b" \r\n").startswith(b"["):
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "MAX_RECORD", longest)
        patch.setattr(reading, "BLOCK", longest)
        expected = []
        for number, line in enumerate(lines, 1):
            if line.strip():
                expected.append((number, len(line.encode()) > longest))
        whole, spans = found(path), survey(path, size).spans
        patch.setattr(reading, "BLOCK", min(longest, max(block, 8)))  # the first block says what the file is
        assert survey(path, size).spans == spans
        assert found(path, size) == whole and [(one[0], "MiB" in str(one[-1])) for one in whole] == expected
    assert [span.start for span in spans[1:]] == [span.end for span in spans[:-1]] and sum(span.end - span.start for span in spans) == len(content)
    assert all(span.end - span.start >= size for span in spans[:-1])


VALUES = st.recursive(st.none() | st.booleans() | st.integers() | st.text(st.sampled_from('a"\\[]{},:\n 红🙂é'), max_size=8),
                      lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(st.sampled_from('a"\\[]{},'), max_size=3), inner, max_size=3))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(st.dictionaries(st.text(max_size=3).filter(lambda text: not any("\ud800" <= one <= "\udfff" for one in text)), VALUES, max_size=3), max_size=6),
       st.sampled_from([None, 0, 2]), st.booleans(), st.integers(1, 80), st.integers(1, 30), st.randoms(use_true_random=False))
def test_arrays_however_cut(tmp_path_factory, values, indent, mark, size, block, draw: random.Random):
    text, expected = " \n" * draw.randrange(2) + "[", []
    for number, value in enumerate(values):
        text += "\n " * draw.randrange(2)
        expected.append((text.count("\n") + 1, value))
        text += json.dumps(value, indent=indent, ensure_ascii=draw.random() < 0.5) + " " * draw.randrange(2) + "," * (number < len(values) - 1)
    path = written(tmp_path_factory.mktemp("array"), b"\xef\xbb\xbf" * mark + (text + "\n] \n").encode())
    whole, spans = found(path), survey(path, size).spans
    assert whole == expected == found(path, size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "BLOCK", max(block, 8))
        assert found(path, size) == expected and survey(path, size).spans == spans
    assert len(spans) <= max(1, len(values)) and all(span.end - span.start >= size for span in spans[:-1])


@pytest.mark.parametrize(("content", "words"), [
    (b'[{"a": 1},\n {"a": 2}', "the array has no end; expected ] after its last object"),
    (b'[{"a": 1},\n {"a": 2, "b},\n {"c": "d"}]', "no end; expected ] after its last object. The first fault: {path}:2:15: not JSON"),
    (b'[{"a": 1}},\n {"a": 2}]', "{path}:1:11: the array ends before this"), (b'[{"a": 1}]\n {"a": 2}', "{path}:2:2: the array ends before this"),
    (b"[1]]", "{path}:1:4: the array ends before this"), (b"[", "the array has no end"),
])
def test_an_array_that_is_none_is_an_error_of_the_file(tmp_path, content, words):
    path = written(tmp_path, content)
    with pytest.raises(EngineError) as caught:
        survey(path)
    assert words.format(path=path) in str(caught.value)


@pytest.mark.parametrize("fault", [fault for fault in FAULTS if re.search("UTF-8|0x00|half a|twice|integer of|no number|larger|got", fault[2])])
def test_a_fault_in_an_array_is_the_same_one(tmp_path, fault):
    line, column, words = fault
    path = written(tmp_path, b"[" + GOOD + b",\n  " + line.lstrip() + b"\n," + GOOD + b"]")
    for size in (1, 1000):
        first, one, last = found(path, size)
        assert one[:2] == (2, column + 2 - line.startswith(b" ")) and words.split(";")[0] in one[2]
        assert first == (1, json.loads(GOOD)) and last == (3, json.loads(GOOD))


@pytest.mark.parametrize(("content", "expected"), [
    (b'[{"a": 1},]', [(1, {"a": 1}), (1, 11, "Expecting value")]), (b'[,{"a": 1}]', [(1, 2, "Expecting value"), (1, {"a": 1})]),
    ('[{"é": "🙂"}, {"a": x},\n5, {"b":\n\n "\ud7ff" 7}]'.encode(),
     [(1, {"é": "🙂"}), (1, 20, "Expecting value"), (2, 1, "got a number"), (4, 6, "',' delimiter")]),
])
def test_a_fault_in_an_array_is_where_an_editor_shows_it(tmp_path, content, expected):
    for size in (1, 100):
        result = found(written(tmp_path, content), size)
        assert [one[:2] for one in result] == [one[:2] for one in expected]
        assert all(right[2] in one[2] for one, right in zip(result, expected, strict=True) if len(right) == 3)


# ---- Size ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("array", [False, True])
def test_a_record_over_the_limit_is_passed_over_in_blocks(tmp_path, array):
    between, name = (b",\n", "rows.json") if array else (b"\n", "rows.jsonl")
    almost = b'{"a": "' + b"x" * (reading.MAX_RECORD - 9) + b'"}'
    with (path := tmp_path / name).open("wb") as file:
        file.write(b"[" * array + GOOD + between + almost + between + b'{"a": "')
        for _ in range(100):
            file.write(b"x" * (1 << 20))
        file.write(b'"}' + between + almost[:9] + almost[8:] + between + GOOD + b"]" * array)
    tracemalloc.start()
    try:
        seen = [(line, one.reason if isinstance(one, BadRow) else len(one)) for span in survey(path).spans for line, one in records(span)]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    told = "the record is over 16 MiB; shorten or split it"
    assert [line for line, _ in seen] == [1, 2, 3, 4, 5] and [seen[2][1], seen[3][1]] == [told, told] and [seen[0][1], seen[1][1], seen[4][1]] == [2, 1, 2]
    assert peak < 4 * reading.MAX_RECORD, "never all of the 100 MiB, and of what is read bytes, text and values, beside the record before"


# ---- Which files ---------------------------------------------------------------------------------------------------------


def test_paths_patterns_and_folders(tmp_path):
    for name in ("b.jsonl", "a.json", "c.txt", ".hidden.jsonl", "a[1].jsonl"):
        written(tmp_path, GOOD, name)
    (tmp_path / "sub.jsonl").mkdir()
    names = lambda pattern: [path.name for path in expand(pattern)]  # noqa: E731
    assert names(tmp_path) == ["a.json", "a[1].jsonl", "b.jsonl"] and names(tmp_path / "*.jsonl") == ["a[1].jsonl", "b.jsonl"]
    assert names(tmp_path / "c.txt") == ["c.txt"] and names(tmp_path / "a[1].jsonl") == ["a[1].jsonl"]
    assert names(str(tmp_path / "[bc].*")) == ["b.jsonl", "c.txt"]


def test_what_is_no_file_to_read_is_told_at_once(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "empty").mkdir()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    written(tmp_path, b"x", "rows.jsonl.gz")
    written(tmp_path, GOOD, "locked.jsonl")
    real = builtins.open

    began = time.perf_counter()
    for pattern, words in (
            (tmp_path / "pipe.jsonl", "is a pipe, expected a regular file"), ("/dev/zero", "is a device"), (tmp_path / "none.jsonl", "No such file"),
            (tmp_path / "*.nothing", "got none, expected files of that name"), (tmp_path / "empty", "got none, expected files that end in .jsonl"),
            (tmp_path / "rows.jsonl.gz", "is compressed (.gz), which is not read; unpack it"), (tmp_path / "loop", "cannot be read"),
            (tmp_path / "*.jsonl", "is a pipe"), (tmp_path, "is a pipe"), ("a\0b", "cannot be read"), ("n" * 5000, "File name too long"),
            (tmp_path / "rows.jsonl" / "x", "No such file")):
        with pytest.raises(EngineError) as caught:
            expand(pattern)
        assert words in str(caught.value) and caught.value.exit_code == USER, pattern
    for path in (tmp_path / "pipe.jsonl", Path("/dev/zero"), tmp_path / "none.jsonl", tmp_path):
        with pytest.raises(EngineError):
            survey(path)
    monkeypatch.setattr("io.open", lambda file, *more, **kinds: (_ for _ in ()).throw(PermissionError(13, "Permission denied"))
                        if str(file).endswith("locked.jsonl") else real(file, *more, **kinds))
    with pytest.raises(EngineError, match="locked.jsonl: cannot be read: Permission denied"):
        expand(tmp_path / "locked.jsonl")
    assert time.perf_counter() - began < 2


def test_a_file_that_shrinks_while_it_is_read_is_told(tmp_path):
    path = written(tmp_path, (GOOD + b"\n") * 9)
    (span,) = survey(path).spans
    os.truncate(path, 100)
    with pytest.raises(EngineError, match="has become shorter"):
        list(records(span))
    path.unlink()
    with pytest.raises(EngineError, match="cannot be read: No such file"):
        list(records(span))


# ---- Parquet -------------------------------------------------------------------------------------------------------------


def test_parquet_however_cut(tmp_path, monkeypatch):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [{"messages": [{"role": "user", "content": f"红 {number}"}, {"role": "assistant", "content": "b", "train": False if number % 2 else None}]}
            for number in range(10)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), path := tmp_path / "rows.parquet", row_group_size=4)
    expected = [(number, {"messages": [{key: value for key, value in one.items() if value is not None} for one in row["messages"]]})
                for number, row in enumerate(rows, 1)]
    assert found(path) == expected and survey(path).lines == 10 and survey(path).kind == "parquet"
    monkeypatch.setattr(parquets, "ROWS", 3)
    assert found(path, 1) == expected and [(span.start, span.end) for span in survey(path, 1).spans] == [(0, 4), (4, 8), (8, 10)]
    for width in (1, 3, 7):
        cut = [Span(path, "parquet", start, min(start + width, 10), start + 1) for start in range(0, 10, width)]
        assert [one for span in cut for one in records(span)] == expected
    assert [row.messages[1].train for row in read_rows(path, "messages")][:2] == [None, False]
    os.truncate(path, path.stat().st_size - 9)
    with pytest.raises(EngineError, match="rows.parquet: cannot be read as parquet"):
        survey(path)


def test_parquet_values_that_cannot_be_read_are_bad_rows(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    text = pyarrow.Array.from_buffers(pyarrow.string(), 3, pyarrow.array([b"a", b"\xff", b"c"], pyarrow.binary()).buffers())
    parquet.write_table(pyarrow.table({"text": text}), path := tmp_path / "rows.parquet")
    first, bad, last = found(path)
    assert first == (1, {"text": "a"}) and last == (3, {"text": "c"}) and bad[0] == 2 and "cannot be read" in bad[2]


def test_parquet_rows_of_any_size_are_read_in_bounded_memory(tmp_path):
    """A group of 1,500 rows of 100 kB, which the format keeps as a few bytes each, for they repeat; one is over the limit."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    texts = [chr(97 + number % 7) * 100_000 for number in range(1500)]
    texts[9] = "x" * (reading.MAX_RECORD + 1)
    parquet.write_table(pyarrow.table({"text": texts}), path := tmp_path / "rows.parquet")
    del texts
    span, = survey(path).spans
    largest, seen = 0, []
    tracemalloc.start()
    try:
        for batch in batches(records(span), lambda numbered: getattr(numbered[1], "size", 0)):
            largest = max(largest, sum(len(row["text"]) for _, row in batch if not isinstance(row, BadRow)))
            seen += [(number, row.reason if isinstance(row, BadRow) else row["text"][:2]) for number, row in batch]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert seen[9] == (10, "the row is over 16 MiB; shorten or split it") and len(seen) == 1500 and seen[1499] == (1500, "bb")
    assert largest < 2 * BATCH_BYTES and peak < 6 * BATCH_BYTES, (largest, peak)


def test_a_parquet_category_counts_for_what_a_row_has_of_it(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    texts = [f"{number} " * 600 for number in range(9000)]  # more than a record may have, all together
    text = pyarrow.array([*range(9000), None]).cast(pyarrow.int32())
    table = pyarrow.table({"text": pyarrow.DictionaryArray.from_arrays(text, texts), "more": [[{"a": 1}]] * 9001})
    parquet.write_table(table, path := tmp_path / "rows.parquet")
    rows = [row for span in survey(path).spans for _, row in records(span)]
    assert rows[:9000] == [{"text": one, "more": [{"a": 1}]} for one in texts] and rows[9000] == {"more": [{"a": 1}]}
    assert max(row.size for row in rows) < 10_000


def test_a_parquet_column_comes_once(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table([["a"], ["b"]], names=["output", "output"]), path := tmp_path / "rows.parquet")
    with pytest.raises(EngineError, match="has the column 'output' twice") as caught:
        survey(path)
    assert caught.value.exit_code == USER


def test_a_files_name_is_utf_8(tmp_path):
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.jsonl"))
    path.write_bytes(GOOD)
    with pytest.raises(EngineError, match="rename it") as caught:
        survey(path)
    str(caught.value).encode()


def test_without_the_extra_parquet_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(EngineError, match=r"needs the package pyarrow.parquet: pip install -c constraints.txt -e '.\[parquet\]'") as caught:
        survey(written(tmp_path, b"PAR1", "rows.parquet"))
    assert caught.value.exit_code == ENVIRONMENT
