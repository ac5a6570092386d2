"""What the cache knows of a file of rows: that it is as it was, where its arrays are, and the arrays themselves, mapped."""

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from engine.data import build
from engine.data.build import Job
from engine.data.reading import SPAN, FileSurvey, Span, place, state_of, survey
from engine.data.tokenizer import Tokenizer
from engine.errors import ENVIRONMENT, EngineError
from engine.publish import built_once, locked, published

SPANS, SPAN_BYTES = 64, 256 << 10  # spans of a file, about, and the least bytes of one; large files have more, of reading.SPAN
RELEASED_BYTES, MAPPED = 16 << 20, 64  # read of mapped arrays before they are let go; shards mapped at a time
RESTED_S = 2  # seconds without a write after which a file's times are believed


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

    def rejects(self) -> Iterator[tuple[str, str]]:
        """Place and reason of each record that could not be read."""
        for number, span in enumerate(self.index["spans"]):
            if span["rejected"]:
                with (self.folder / f"{number:05d}.rejected.jsonl").open(encoding="utf-8") as file:
                    for line in file:
                        *where, reason = json.loads(line).values()
                        yield place(self.path, *where), reason


def tokenised(path: Path, source: int, job: Job, tokenizer: Tokenizer, cache: Path, workers: int | None) -> File:
    """A file with its arrays, which one process of a node makes where the cache does not have them, while the others wait."""
    found = known_survey(path, cache)
    folder = built_once(cache / job.key(found.sha256, tokenizer)[:24], lambda building: build.build(building, found, job, tokenizer, workers),
                        f"Another process tokenises {path}; waiting for it")
    return File(path, source, json.loads((folder / "index.json").read_text(encoding="utf-8")), folder)


def known_survey(path: Path, cache: Path) -> FileSurvey:
    """`survey`, from the cache where the file is as it was: a second run reads no text. One process of a node looks, the others wait."""
    memo = cache / f"file-{hashlib.sha256(str(path.absolute()).encode()).hexdigest()[:24]}.json"

    def known() -> FileSurvey | None:
        try:
            found = json.loads(memo.read_text(encoding="utf-8"))
            if found["version"] == build.VERSION and tuple(found["state"]) == state_of(path):
                spans = tuple(Span(path, *span) for span in found["spans"])
                return FileSurvey(path, tuple(found["state"]), found["sha256"], found["bytes"], found["lines"], found["kind"], spans)
        except (OSError, ValueError, LookupError):
            return None
        return None

    if at_once := known():
        return at_once
    with locked(memo):
        if meanwhile := known():
            return meanwhile
        found = survey(path, max(SPAN_BYTES, min(SPAN, path.stat().st_size // SPANS)))
        # A write within the clock's tick of the last one would not be seen, so a file must have rested for a while.
        if found.state == state_of(path) and abs(time.time_ns() - found.state[1]) > RESTED_S * 1e9:
            spans = [[span.kind, span.start, span.end, span.first_line, span.first_column] for span in found.spans]
            with published(memo) as building:
                building.write_text(json.dumps({**vars(found), "version": build.VERSION, "path": None, "spans": spans}), encoding="utf-8")
    return found


class Shards:
    """The spans' arrays, mapped as they are read; so many of them at a time, as each takes two of a process's open files."""

    def __init__(self, files: Sequence[File], lengths: np.ndarray) -> None:
        spans = [(file.folder / f"{number:05d}", span["rows"]) for file in files for number, span in enumerate(file.index["spans"])]
        spans = [span for span in spans if span[1]]
        self.paths, counts = [path for path, _ in spans], [count for _, count in spans]
        self.first = np.cumsum([0, *counts])[:-1]
        ends = np.cumsum(lengths, dtype=np.int64)
        self.offset = ends - lengths
        self.offset -= np.repeat(self.offset[self.first], counts)
        self.maps = lru_cache(MAPPED)(self._map)
        self.read_bytes = 0

    def read(self, shard: int, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """Several threads may read."""
        tokens, supervised = self.maps(shard)
        found = np.array(tokens[begin:end]), np.array(supervised[begin:end])
        self.read_bytes += 4096 * 16 + 5 * (end - begin)  # the kernel maps sixteen pages around each that is touched
        if self.read_bytes > RELEASED_BYTES:  # as long as they are mapped they count as the process's own memory
            self.read_bytes = 0
            self.maps.cache_clear()
        return found

    def _map(self, shard: int) -> tuple[np.ndarray, np.ndarray]:
        return _mapped(f"{self.paths[shard]}.tokens.npy", np.int32), _mapped(f"{self.paths[shard]}.supervised.npy", bool)


def _mapped(path: str, dtype: type) -> np.ndarray:
    """An array of a .npy file. np.load parses the header as Python, which CPython 3.11 fails at now and then in two threads at once."""
    try:
        with open(path, "rb") as file:
            header = int.from_bytes(file.read(10)[8:], "little")
        return np.memmap(path, dtype, mode="r", offset=10 + header)
    except OSError as error:
        raise EngineError("ENVIRONMENT-CACHE", f"{path}: cannot be read any more: {error.strerror}; nothing may be removed from data.cache during a run",
                          ENVIRONMENT) from error
