"""What the cache knows of a file of rows: that it is as it was, where its arrays are, and the arrays themselves, mapped."""

import hashlib
import json
import mmap
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.data import build
from engine.data.build import Job
from engine.data.reading import SPAN, FileSurvey, Span, survey
from engine.data.tokenizer import Tokenizer
from engine.errors import EngineError
from engine.publish import built_once, published

SPANS, SPAN_BYTES = 64, 512 << 10  # spans of a file, about, and the least bytes of one; large files have more, of reading.SPAN
RELEASED_BYTES = 16 << 20  # of mapped arrays read before their pages are given back


@dataclass(frozen=True)
class File:
    """A file of rows and its arrays in the cache."""

    path: Path
    source: int
    index: dict[str, Any]
    folder: Path

    @property
    def kept(self) -> int:
        return sum(span["rows"] for span in self.index["spans"])

    @property
    def rejected(self) -> int:
        return sum(span["rejected"] for span in self.index["spans"])

    def rejects(self) -> Iterator[tuple[int, int | None, str]]:
        """(line, column or None, reason) of each record that could not be read."""
        for number, span in enumerate(self.index["spans"]):
            if span["rejected"]:
                with (self.folder / f"{number:05d}.rejected.jsonl").open(encoding="utf-8") as file:
                    yield from (tuple(json.loads(line).values()) for line in file)


def tokenised(path: Path, source: int, job: Job, tokenizer: Tokenizer, cache: Path, workers: int | None) -> File:
    """A file with its arrays, which one process of a node makes where the cache does not have them, while the others wait."""
    found = known_survey(path, cache)
    folder = built_once(cache / job.key(found.sha256, tokenizer)[:24], lambda building: build.build(building, found, job, tokenizer, workers),
                        f"Another process tokenises {path}; waiting for it")
    return File(path, source, json.loads((folder / "index.json").read_text(encoding="utf-8")), folder)


def known_survey(path: Path, cache: Path) -> FileSurvey:
    """`survey`, from the cache where the file is as it was by size, times and inode: a second run reads no text."""
    status = path.stat()
    state = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, build.VERSION]
    memo = cache / f"file-{hashlib.sha256(str(path.absolute()).encode()).hexdigest()[:24]}.json"
    try:
        known = json.loads(memo.read_text(encoding="utf-8"))
        if known["state"] == state:
            return FileSurvey(**{**known["survey"], "path": path, "spans": tuple(Span(path, *span) for span in known["survey"]["spans"])})
    except (OSError, ValueError, LookupError):
        pass
    found = survey(path, max(SPAN_BYTES, min(SPAN, status.st_size // SPANS)))
    # A write within the clock's tick of the last one would not be seen, so a file must have rested for a while.
    if path.stat().st_mtime_ns == status.st_mtime_ns and abs(time.time_ns() - status.st_mtime_ns) > 2e9:
        with suppress(EngineError), published(memo) as building:  # another rank may be writing the same
            spans = [[span.kind, span.start, span.end, span.first_line, span.first_column] for span in found.spans]
            building.write_text(json.dumps({"state": state, "survey": {**vars(found), "path": None, "spans": spans}}), encoding="utf-8")
    return found


class Shards:
    """The spans' arrays, mapped when they are first read."""

    def __init__(self, files: Sequence[File], lengths: np.ndarray) -> None:
        spans = [(file.folder / f"{number:05d}", span["rows"]) for file in files for number, span in enumerate(file.index["spans"])]
        spans = [span for span in spans if span[1]]
        self.paths, counts = [path for path, _ in spans], [count for _, count in spans]
        self.first = np.cumsum([0, *counts])[:-1]
        ends = np.cumsum(lengths, dtype=np.int64)
        self.offset = ends - lengths
        self.offset -= np.repeat(self.offset[self.first], counts)
        self.maps: list[tuple[np.ndarray, np.ndarray] | None] = [None] * len(spans)
        self.read_bytes = 0

    def read(self, shard: int, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        if self.maps[shard] is None:
            self.maps[shard] = (_mapped(f"{self.paths[shard]}.tokens.npy", np.int32), _mapped(f"{self.paths[shard]}.supervised.npy", bool))
        tokens, supervised = self.maps[shard]
        found = np.array(tokens[begin:end]), np.array(supervised[begin:end])
        self.read_bytes += 4096 * 16 + 5 * (end - begin)  # the kernel maps sixteen pages around each that is touched
        if self.read_bytes > RELEASED_BYTES:
            self._release()
        return found

    def _release(self) -> None:
        """Pages of a mapped file count as the process's own memory until it needs them no more. They stay in the disk's cache."""
        self.read_bytes = 0
        for arrays in filter(None, self.maps):
            for array in arrays:
                array._mmap.madvise(mmap.MADV_DONTNEED)


def _mapped(path: str, dtype: type) -> np.ndarray:
    """An array of a .npy file. np.load parses the header as Python, which CPython 3.11 fails at now and then in two threads at once."""
    with open(path, "rb") as file:
        header = int.from_bytes(file.read(10)[8:], "little")
    return np.memmap(path, dtype, mode="r", offset=10 + header)
