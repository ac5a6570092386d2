"""Which file of rows has changed since a checkpoint, and in which line: what a refused resume says about its data.

A run's identity has one digest of all its documents. Beside it a checkpoint keeps a line about each file, with the name of its arrays
in the cache. The cache is keyed by content, so the rows as they were are mostly still there to compare with.
"""

from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from engine.data.cache import File
from engine.data.dataset import Dataset

FACTS = ["all", "length", "targets", "answer"]  # of build.ROW: rows that agree in these are the same


def table(dataset: Dataset) -> list[list[Any]]:
    """Path, SHA-256, rows and cache folder of each file."""
    return [[str(file.path), file.index["sha256"], file.kept, file.folder.name] for file in dataset.files]


def told(before: list[list[Any]], dataset: Dataset, alike: bool) -> str:
    """The first file that is not what it was when `before` was its dataset's table, in words.

    Args:
        alike: rows became tokens in the same way, so that they can be compared.
    """
    now = table(dataset)
    if sorted(one[1] for one in before) == sorted(one[1] for one in now) and [one[1] for one in before] != [one[1] for one in now]:
        return f"the same files in another order: {_names(before)} → {_names(now)}"
    for old, new, file in zip_longest(before, now, dataset.files):
        if new is None:
            return f"{old[0]} is no longer among them"
        if old is None:
            return f"{new[0]} is new"
        if old[1] != new[1]:
            return f"{new[0]} has changed: {_first_row(file, old, alike)}"
        if old[3] != new[3]:
            return f"{new[0]} is as it was, but is read in another way (format, template, system prompt, supervise, or the tokenizer)"
    return "the files are as they were, but are mixed or cut in another way"


def _names(files: list[list[Any]]) -> str:
    return ", ".join(one[0] for one in files)


def _first_row(file: File, old: list[Any], alike: bool) -> str:
    """The first row in which a file differs from what it was, as path:line, if they can be compared."""
    _, sha256, count, name = old
    was = File(file.path, file.source, {}, file.folder.parent / name)
    counts = f"{count:,} → {file.kept:,} rows"
    if not (alike and was.folder.is_dir()):
        return f"SHA-256 {sha256[:12]}… → {file.index['sha256'][:12]}…, {counts}"
    one, other = _rows(was), _rows(file)
    common = min(len(one), len(other))
    if len(differ := np.flatnonzero(one[FACTS][:common] != other[FACTS][:common])):
        return f"the first row that differs is {file.path}:{other['line'][differ[0]]} ({counts})"
    if len(other) > common:
        return f"rows are new from {file.path}:{other['line'][common]} on ({counts})"
    if len(one) > common:
        return f"rows are gone after {file.path}:{other['line'][common - 1]} ({counts})" if common else "its rows are gone"
    return "its rows are the same, what is between them is not"


def _rows(file: File) -> np.ndarray:
    return np.concatenate([np.load(path) for path in sorted(Path(file.folder).glob("*.rows.npy"))])
