"""A file of rows -> arrays in the cache: read, checked and tokenised once, by several processes, before ranks meet.

A file's folder in the cache holds for each span of the file

    00000.tokens.npy  00000.supervised.npy    ids and mask, all rows end to end
    00000.rows.npy                            a record of ROW for each row
    00000.rejected.jsonl                      what could not be read: line, column, reason

and index.json with what there is to know of the whole. Rows are kept at their full length: max_length and what happens
beyond it are decided when the arrays are read, so changing them tokenises nothing.
"""

import hashlib
import json
import os
import re
import signal
import socket
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn, TextIO, TypeVar

import numpy as np
from tqdm import tqdm

from engine.data.formats import FORMATS, BadRow, Row
from engine.data.reading import FileSurvey, Span, position, records, state_of
from engine.data.template import TEMPLATES
from engine.data.tokenizer import Tokenizer, Tokens, learnt, tell_controls, tokenise
from engine.errors import ENVIRONMENT, EngineError, die_with_parent

T = TypeVar("T")
VERSION = 5  # of the arrays' meaning and of the code that makes them; a change makes old caches strangers
FIRST_BYTES = 64 << 10  # of a first row that is kept as text, for templates to be compared on
BATCH, BATCH_BYTES = 1024, 4 << 20  # rows tokenised in one call, about, and their bytes
WORKER_BYTES = 1 << 20  # of text for each process

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
    progress = tqdm(total=sum(span.end - span.start for span in survey.spans), desc=f"tokenising {survey.path.name}", unit_scale=True,
                    unit=" rows" if survey.kind == "parquet" else "B", disable=not sys.stderr.isatty(), leave=False)
    with progress:
        found = _write_spans(folder, survey, job, tokenizer, workers or _cores(), progress)
    if survey.state != state_of(survey.path):
        raise EngineError("DATA-CHANGED", f"{survey.path}: has changed while it was read; start again once nothing writes to it", ENVIRONMENT)
    index = {"sha256": survey.sha256, "bytes": survey.bytes, "lines": survey.lines, "records": sum(span["records"] for span in found),
             "highest": max((span["highest"] for span in found), default=-1), "spans": found}
    (folder / "index.json").write_text(json.dumps(index), encoding="utf-8")


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _write_spans(folder: Path, survey: FileSurvey, job: Job, tokenizer: Tokenizer, most: int, progress: tqdm) -> list[dict[str, Any]]:
    """What `write_span` returns for each span, in their order."""
    spans = iter(range(len(survey.spans)))  # shared by this process and the threads below: each takes the next one when it is free
    done: dict[int, dict[str, Any]] = {}

    def here(number: int) -> dict[str, Any]:
        return write_span(folder, number, survey.spans[number], job, tokenizer)

    def go_on(write: Callable[[int], dict[str, Any]]) -> None:
        try:
            for number in spans:
                done[number] = write(number)
                progress.update(survey.spans[number].end - survey.spans[number].start)
        finally:
            list(spans)  # after a failure nothing is left to do for the others

    count = max(1, min(most, len(survey.spans), survey.bytes // WORKER_BYTES))  # this process is one of them
    with _workers(count - 1, here, survey.path) as workers, ThreadPoolExecutor(max(1, len(workers))) as threads:
        others = [threads.submit(go_on, worker.write) for worker in workers]
        go_on(here)
        for other in others:
            other.result()
    return [done[number] for number in range(len(survey.spans))]


@contextmanager
def _workers(count: int, write: Callable[[int], dict[str, Any]], path: Path) -> Iterator[list["_Worker"]]:
    """Processes forked from this one, each of which does `write` where it is asked to; they are gone after the block."""
    if not count:
        yield []
        return
    os.putenv("TOKENIZERS_PARALLELISM", "false")  # the processes are as many as cores; the library looks there at each call and when it is forked
    workers = [_Worker(write, path) for _ in range(count)]  # before there are threads
    failed = True
    try:
        yield workers
        failed = False
    finally:
        for worker in workers:
            worker.end(kill=failed)
        os.unsetenv("TOKENIZERS_PARALLELISM")


class _Worker:
    """A forked process: it has the tokenizer and all else from the start. Told numbers, it answers in JSON, so nothing is ever unpickled."""

    def __init__(self, write: Callable[[int], dict[str, Any]], path: Path) -> None:
        self.path = path
        self.socket, theirs = socket.socketpair()
        self.pid = os.fork()
        if not self.pid:
            self._serve(write, theirs)
        theirs.close()
        self.stream = self.socket.makefile("rw", encoding="utf-8")

    def _serve(self, write: Callable[[int], dict[str, Any]], asked: socket.socket) -> NoReturn:
        try:
            die_with_parent()  # no orphan writes beside the next launch's build; where that cannot be had, it ends with its span
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # those that reach all processes; the one that forked this one ends it
                signal.signal(number, signal.SIG_IGN)
            with asked.makefile("rw", encoding="utf-8") as stream:
                for line in stream:
                    try:
                        answer = write(int(line))
                    except EngineError as error:
                        answer = {"error": [error.name, error.text, error.exit_code]}
                    print(json.dumps(answer), file=stream, flush=True)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(1)

    def write(self, number: int) -> dict[str, Any]:
        with suppress(BrokenPipeError):  # it has died, which there is no answer tells
            print(number, file=self.stream, flush=True)
        try:
            answer = self.stream.readline()
        except ConnectionResetError:
            answer = ""
        if not answer:
            code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
            self.pid = 0
            raise EngineError("DATA-WORKER", f"{self.path}: the process that tokenised it ended with exit code {code}, its last words are "
                              "above; if it was killed, memory ran out: set data.workers=1", ENVIRONMENT)
        if error := (found := json.loads(answer)).get("error"):
            raise EngineError(*error)
        return found

    def end(self, kill: bool) -> None:
        """Waits until it is gone; `kill`: in the middle of what it does."""
        if self.pid:
            if kill:
                os.kill(self.pid, signal.SIGKILL)
            self.socket.shutdown(socket.SHUT_WR)  # closing would not do: workers forked later hold the socket too
            os.waitpid(self.pid, 0)
        with suppress(BrokenPipeError):
            self.stream.close()
        self.socket.close()


def write_span(folder: Path, number: int, span: Span, job: Job, tokenizer: Tokenizer) -> dict[str, Any]:
    """Writes a span's arrays; returns its counts: every record is kept or rejected."""
    tell_controls(job.template, tokenizer)
    named = set(tokenizer.specials()) - TEMPLATES[job.template].reads
    names = re.compile("|".join(map(re.escape, sorted(named, key=len, reverse=True))) or "(?!)")
    found: dict[str, Any] = {"records": 0, "rejected": 0, "highest": -1, "ignored": Counter(), "first": None}
    tasks: dict[str, int] = {}
    ids, supervised, facts = [np.empty(0, np.int32)], [np.empty(0, bool)], [np.empty(0, ROW)]
    with (folder / f"{number:05d}.rejected.jsonl").open("w", encoding="utf-8") as rejected:
        for batch in batches(records(span), lambda numbered: getattr(numbered[1], "size", 0)):
            if rows := list(_accepted(batch, job, found, rejected)):
                tokens = tokenise(rows, job.template, job.system, job.supervise, tokenizer)
                ids.append(tokens.ids)
                supervised.append(tokens.supervised)
                facts.append(_facts(rows, tokens, tasks, names, tokenizer))
                found["highest"] = max(found["highest"], int(tokens.ids.max()))
    for kind, parts in (("tokens", ids), ("supervised", supervised), ("rows", facts)):
        np.save(folder / f"{number:05d}.{kind}.npy", np.concatenate(parts))
    return {**found, "rows": sum(map(len, facts)), "tasks": list(tasks)}


def _accepted(batch: list[tuple[int, Any]], job: Job, found: dict[str, Any], rejected: TextIO) -> Iterator[Row]:
    """The rows of records; what is none goes to `rejected`, and either is counted."""
    read, write = FORMATS[job.format], TEMPLATES[job.template]
    for line, record in batch:
        found["records"] += 1
        try:
            if isinstance(record, BadRow):
                raise record
            row = read(record, line)
            write.check(row)
            if not any(learnt(row, job.supervise)):
                raise BadRow("no message is learnt; there is nothing to train on")
        except BadRow as bad:
            found["rejected"] += 1
            line, column = position(record, line, bad)
            print(json.dumps({"line": line, "column": column, "reason": bad.reason}, ensure_ascii=False), file=rejected)
            continue
        found["ignored"].update(read.ignored(record))
        if found["first"] is None:
            text = json.dumps(record, default=str)
            found["first"] = {"line": line, "record": json.loads(text)} if len(text) <= FIRST_BYTES else {}
        yield row


def _facts(rows: list[Row], tokens: Tokens, tasks: dict[str, int], names: re.Pattern[str], tokenizer: Tokenizer) -> np.ndarray:
    """Records of ROW. `names`: of control tokens; `tasks`: numbers of those seen, which grows."""
    facts = np.zeros(len(rows), ROW)
    ends = np.cumsum(tokens.lengths)
    starts = ends - tokens.lengths
    facts["length"], facts["answer"] = tokens.lengths, tokens.answers
    facts["targets"] = np.add.reduceat(tokens.supervised, starts, dtype=np.int64)
    facts["line"] = [row.line for row in rows]
    facts["task"] = [tasks.setdefault(row.task, len(tasks)) for row in rows]
    named = [any(names.search(message.content) or names.search(message.input) for message in row.messages) for row in rows]
    second = tokens.ids[np.minimum(starts + 1, ends - 1)]
    doubled = (second == tokenizer.prefix[0]) & (tokens.lengths > 1) if tokenizer.prefix else np.zeros(len(rows), bool)
    for flag, holds in ((NAMES_CONTROL, np.array(named)), (HOLDS_CONTROL, tokens.invaded), (DOUBLE_BOS, doubled)):
        facts["flags"] |= (flag * holds).astype(np.uint16)
    places = np.where(tokens.answers < 0, ends, starts + tokens.answers)
    facts["all"] = [_hash(tokens.ids[start:end]) for start, end in zip(starts.tolist(), ends.tolist(), strict=True)]
    facts["prompt"] = [_hash(tokens.ids[start:end]) for start, end in zip(starts.tolist(), places.tolist(), strict=True)]
    return facts


def _hash(ids: np.ndarray) -> int:
    return int.from_bytes(hashlib.blake2b(ids.tobytes(), digest_size=8).digest(), "little")


def batches(items: Iterable[T], size: Callable[[T], int]) -> Iterator[list[T]]:
    """What is worked on together: so many, or of so many bytes, by the `size` of each."""
    batch, total = [], 0
    for one in items:
        batch.append(one)
        total += size(one)
        if len(batch) == BATCH or total > BATCH_BYTES:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch
