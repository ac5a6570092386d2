"""A file of rows -> arrays in the cache: read, checked and tokenised once, by several processes, before ranks meet.

    python -m engine.data.build        a worker: its job and then its spans come on standard input, a line of JSON each

A file's folder in the cache holds for each span of the file

    00000.tokens.npy  00000.supervised.npy    ids and mask, all rows end to end
    00000.rows.npy                            a record of ROW for each row
    00000.rejected.jsonl                      what could not be read: line, column, reason

and index.json with what there is to know of the whole. Rows are kept at their full length: max_length and what happens
beyond it are decided when the arrays are read, so changing them tokenises nothing.
"""

import ctypes
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from engine.data.formats import FORMATS, BadRow, Row
from engine.data.reading import FileSurvey, Span, position, records
from engine.data.template import TEMPLATES
from engine.data.tokenizer import Tokenizer, learnt, load_tokenizer, tokenise
from engine.errors import EngineError

VERSION = 3  # of the arrays' meaning and of the code that makes them; a change makes old caches strangers
BATCH = 1024  # rows tokenised in one call
WORKER_BYTES = 1 << 20  # of text that are worth a process of their own, which takes a third of a second to start

# A row's facts. `answer`: where its last answer's first token is, -1 for plain text. The hashes are of all ids and of those before the answer.
ROW = np.dtype([("length", "i4"), ("targets", "i4"), ("answer", "i4"), ("line", "i8"), ("task", "i4"), ("flags", "u2"), ("all", "u8"), ("prompt", "u8")])
NAMES_CONTROL = 1  # its text holds the name of a control token; it was read as text
HOLDS_CONTROL = 2  # its text became a control token
DOUBLE_BOS = 4


@dataclass(frozen=True)
class Job:
    """How rows become ids: everything the arrays depend on besides the file."""

    format: str
    template: str
    system: str | None
    supervise: str

    def key(self, content: str, tokenizer: Tokenizer) -> str:
        """Names the arrays of a file with this SHA-256."""
        parts = {**asdict(self), "tokenizer": tokenizer.digest, "content": content, "version": VERSION}
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def build(folder: Path, survey: FileSurvey, job: Job, tokenizer: Tokenizer, workers: int | None) -> None:
    """Fills `folder`, which is not there yet, with the arrays of a file.

    Raises:
        EngineError: the file has changed meanwhile, or a worker died.
    """
    folder.mkdir()
    before = survey.path.stat()
    progress = tqdm(total=sum(span.end - span.start for span in survey.spans), desc=f"tokenising {survey.path.name}", unit_scale=True,
                    unit=" rows" if survey.kind == "parquet" else "B", disable=not sys.stderr.isatty(), leave=False)
    with progress:
        found = list(_write_spans(folder, survey, job, tokenizer, workers or os.cpu_count() or 1, progress))
    after = survey.path.stat()
    if (before.st_size, before.st_mtime_ns, before.st_ino) != (after.st_size, after.st_mtime_ns, after.st_ino):
        raise EngineError("DATA-CHANGED", f"{survey.path}: has changed while it was read; start again once nothing writes to it")
    index = {"sha256": survey.sha256, "bytes": survey.bytes, "lines": survey.lines, "records": sum(span["records"] for span in found),
             "highest": max((span["highest"] for span in found), default=-1), "spans": found}
    (folder / "index.json").write_text(json.dumps(index), encoding="utf-8")


def _write_spans(folder: Path, survey: FileSurvey, job: Job, tokenizer: Tokenizer, most: int, progress: tqdm) -> Iterator[dict[str, Any]]:
    """What `write_span` returns for each span, in their order."""
    count = min(most, len(survey.spans), survey.bytes // WORKER_BYTES)
    if count < 2:
        for number, span in enumerate(survey.spans):
            yield write_span(folder, number, span, job, tokenizer)
            progress.update(span.end - span.start)
        return
    spans = iter(enumerate(survey.spans))  # shared by the threads below: each takes the next one when it is free
    done: dict[int, dict[str, Any]] = {}

    def manage(_: int) -> None:
        try:
            with _Worker(folder, job, tokenizer) as worker:
                for number, span in spans:
                    done[number] = worker.write(number, span)
                    progress.update(span.end - span.start)
        except EngineError:
            list(spans)  # nothing is left to do for the others
            raise

    with ThreadPoolExecutor(count) as threads:
        list(threads.map(manage, range(count)))
    yield from (done[number] for number in range(len(survey.spans)))


class _Worker:
    """A process that writes spans. Talked to in JSON, so that nothing is ever unpickled; it ends with its standard input."""

    def __init__(self, folder: Path, job: Job, tokenizer: Tokenizer) -> None:
        self.process = subprocess.Popen([sys.executable, "-m", "engine.data.build"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                        encoding="utf-8", cwd=Path(__file__).parents[2])
        self._send({"job": asdict(job), "folder": str(folder.absolute()), "tokenizer": [str(path.absolute()) for path in tokenizer.loaded_from]})

    def write(self, number: int, span: Span) -> dict[str, Any]:
        self._send({**asdict(span), "path": str(span.path.absolute()), "number": number})
        if not (answer := self.process.stdout.readline()):
            raise EngineError("DATA-WORKER", f"{span.path}: the process that tokenised it ended with exit code {self.process.wait()}, its last words are "
                              "above; if it was killed, memory ran out: set data.workers=1")
        return json.loads(answer)

    def _send(self, message: dict[str, Any]) -> None:
        try:
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it has died, which `write` tells

    def __enter__(self) -> "_Worker":
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is not None:
            self.process.kill()
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


def write_span(folder: Path, number: int, span: Span, job: Job, tokenizer: Tokenizer) -> dict[str, Any]:
    """Writes a span's arrays; returns its counts: every record is kept or rejected."""
    name = re.compile("|".join(map(re.escape, sorted(tokenizer.specials(), key=len, reverse=True))) or "(?!)")
    found = {"records": 0, "rejected": 0, "highest": -1}
    tasks: dict[str, int] = {}
    ignored: Counter[str] = Counter()
    read, write = FORMATS[job.format], TEMPLATES[job.template]
    ids, supervised, all_facts = [np.empty(0, np.int32)], [np.empty(0, bool)], [np.empty(0, ROW)]
    with (folder / f"{number:05d}.rejected.jsonl").open("w", encoding="utf-8") as rejected:

        def reject(record: Any, line: int, bad: BadRow) -> None:
            found["rejected"] += 1
            line, column = position(record, line, bad)
            print(json.dumps({"line": line, "column": column, "reason": bad.reason}, ensure_ascii=False), file=rejected)

        for batch in _batches(records(span), BATCH):
            rows: list[Row] = []
            for line, record in batch:
                found["records"] += 1
                try:
                    if isinstance(record, BadRow):
                        raise record
                    row = read(record, line)
                    write.check(row)
                    if not any(learnt(row, job.supervise)):
                        raise BadRow("no message is learnt; there is nothing to train on")
                    rows.append(row)
                    ignored.update(read.ignored(record))
                except BadRow as bad:
                    reject(record, line, bad)
            if not rows:
                continue
            tokens = tokenise(rows, job.template, job.system, job.supervise, tokenizer)
            facts = np.zeros(len(rows), ROW)
            facts["length"], facts["answer"] = tokens.lengths, tokens.answers
            facts["line"] = [row.line for row in rows]
            facts["task"] = [tasks.setdefault(row.task, len(tasks)) for row in rows]
            starts = np.cumsum(tokens.lengths) - tokens.lengths
            facts["targets"] = np.add.reduceat(tokens.supervised, starts, dtype=np.int64)
            facts["flags"] |= HOLDS_CONTROL * tokens.invaded.astype(np.uint16)
            if tokenizer.prefix:
                second = tokens.ids[np.minimum(starts + 1, len(tokens.ids) - 1)] == tokenizer.prefix[0]
                facts["flags"] |= DOUBLE_BOS * (second & (tokens.lengths > 1)).astype(np.uint16)
            facts["flags"] |= np.array([NAMES_CONTROL * any(name.search(message.content) or name.search(message.input) for message in row.messages)
                                        for row in rows], dtype=np.uint16)
            for place, (start, length, answer) in enumerate(zip(starts.tolist(), tokens.lengths.tolist(), tokens.answers.tolist(), strict=True)):
                facts["all"][place] = _hash(tokens.ids[start : start + length])
                facts["prompt"][place] = _hash(tokens.ids[start : start + answer]) if answer >= 0 else facts["all"][place]
            found["highest"] = max(found["highest"], int(tokens.ids.max()))
            ids.append(tokens.ids)
            supervised.append(tokens.supervised)
            all_facts.append(facts)
    for kind, parts in (("tokens", ids), ("supervised", supervised), ("rows", all_facts)):
        np.save(folder / f"{number:05d}.{kind}.npy", np.concatenate(parts))
    return {**found, "rows": sum(map(len, all_facts)), "tasks": list(tasks), "ignored": ignored}


def _hash(ids: np.ndarray) -> int:
    return int.from_bytes(hashlib.blake2b(ids.tobytes(), digest_size=8).digest(), "little")


def _batches(items: Iterator, size: int) -> Iterator[list]:
    while batch := list(islice(items, size)):
        yield batch


def main() -> None:
    with suppress(AttributeError, OSError):  # not Linux: then it ends with its span
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: no orphan writes beside the next launch's build
    message = json.loads(sys.stdin.readline())
    folder, job, tokenizer = Path(message["folder"]), Job(**message["job"]), load_tokenizer(*map(Path, message["tokenizer"]))
    for line in sys.stdin:
        span = json.loads(line)
        number = span.pop("number")
        print(json.dumps(write_span(folder, number, Span(**{**span, "path": Path(span["path"])}), job, tokenizer)), flush=True)


if __name__ == "__main__":
    main()
