"""Rows of parquet files, through the [parquet] extra."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from engine.data.strict import BadRow
from engine.errors import EngineError, extra

ROWS, BYTES = 1024, 4 << 20  # read at once, and of these made Python's


class Sized(dict):
    """A row's fields; `size`: its bytes, about."""

    size: int


def groups(path: Path) -> list[tuple[int, int]]:
    """Of each row group, the rows up to its end and its bytes.

    Raises:
        EngineError: the file cannot be read, or the extra is missing.
    """
    found, end = [], 0
    with _opened(path) as file:
        names = file.schema_arrow.names
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise EngineError("DATA-FILE", f"{path}: has the column {twice[0]!r} twice, expected each once; rename or drop one")
        for number in range(file.metadata.num_row_groups):
            group = file.metadata.row_group(number)
            end += group.num_rows
            found.append((end, group.total_byte_size))
    return found


def rows(path: Path, start: int, stop: int, longest: int) -> Iterator[tuple[int, Sized | BadRow]]:
    """Number, from 1, and content of the rows from `start` to before `stop`, both from 0; fields that are null are left out.

    Args:
        longest: bytes from which on a row is a bad one, so that a span is read in bounded memory.
    """
    first = 0
    with _opened(path) as file:
        for number in range(file.metadata.num_row_groups):
            group = file.metadata.row_group(number)
            end = first + group.num_rows
            if first < stop and end > start:
                at_once = max(1, min(ROWS, BYTES * group.num_rows // max(1, group.total_byte_size)))
                for batch in file.iter_batches(batch_size=at_once, row_groups=[number], use_threads=False):
                    begin = min(max(0, start - first), len(batch))
                    yield from enumerate(_read(_spelled(batch).slice(begin, max(0, stop - first - begin)), longest), first + begin + 1)
                    first += len(batch)
            first = end


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The file, as pyarrow reads it: in this thread, without mapping it into memory."""
    pyarrow = extra("pyarrow.parquet", path, "parquet")
    try:
        with pyarrow.ParquetFile(path, memory_map=False, pre_buffer=False) as file:
            yield file
    except (OSError, ValueError, KeyError, NotImplementedError) as error:  # pyarrow's own are these
        raise EngineError("DATA-FILE", f"{path}: cannot be read as parquet: {' '.join(str(error).split())[:200]}") from error


def _spelled(batch: Any) -> Any:
    """With the values of a dictionary where a column names them by number, as pandas' categories: its size would be every row's."""
    columns = [column.dictionary_decode() if hasattr(column, "dictionary_decode") else column for column in batch.columns]
    return type(batch).from_arrays(columns, names=batch.schema.names)


def _read(batch: Any, longest: int) -> Iterator[Sized | BadRow]:
    found, fault = None, f"the row is over {longest >> 20} MiB; shorten or split it"
    if batch.nbytes <= (longest if len(batch) == 1 else BYTES):
        try:
            found = [Sized(_present(row)) for row in batch.to_pylist()]
        except (ValueError, OverflowError) as error:  # text that is not UTF-8, a date that Python has not
            fault = f"a value cannot be read: {error}"
    if found is not None:
        for row in found:
            row.size = batch.nbytes // len(batch)
            yield row
    elif len(batch) == 1:
        yield BadRow(fault)
    else:
        for place in range(len(batch)):
            yield from _read(batch.slice(place, 1), longest)


def _present(value: Any) -> Any:
    """Without the fields that are null: a table has all fields in all rows."""
    if isinstance(value, dict):
        return {key: _present(one) for key, one in value.items() if one is not None}
    return [_present(one) for one in value] if isinstance(value, list) else value
