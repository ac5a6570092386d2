"""Rows to train on: the arrays of the cache, cut to length and mixed as the recipe says, with every row accounted for.

A *row* is a record of a file that could be read. A *document* is what a model sees of it at once: the whole row, its
beginning, or one of its pieces; a source that is repeated has each of its documents several times. Plans and losses know
documents, the ledger knows rows.
"""

import hashlib
import json
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from engine.config import Data, Source
from engine.data import build
from engine.data.build import Job
from engine.data.cache import File, Shards, tokenised
from engine.data.formats import FORMATS, Row
from engine.data.plan import shuffled
from engine.data.reading import expand
from engine.data.tokenizer import Tokenizer
from engine.dropout import mix
from engine.errors import EngineError, rank_in_launch, warn

NAMED = 5  # rows that an error names
MOST_DOCUMENTS = 200_000_000  # in an epoch; each takes 22 bytes of every rank

WHOLE, TRUNCATED, SPLIT, TOO_LONG, SILENT = range(5)  # fates; SILENT: no supervised token is left within max_length
KEPT = (WHOLE, TRUNCATED, SPLIT)


@dataclass(frozen=True)
class Dataset:
    """R rows and D documents.

    files           in the order of their rows
    sources         what the recipe calls them
    rows            (R,) of build.ROW; `task` counts in `tasks`
    fates, times    (R,) what max_length made of each row, and how often it occurs in an epoch
    row, start, lengths, targets, source    (D,) each document's row, its first token there, its tokens, those that are learnt, its source
    digest          of all that decides the documents
    skip            rows that are not trained, although they are among the documents
    """

    files: list[File]
    sources: list[Source]
    rows: np.ndarray
    tasks: list[str]
    fates: np.ndarray
    times: np.ndarray
    row: np.ndarray
    start: np.ndarray
    lengths: np.ndarray
    targets: np.ndarray
    source: np.ndarray
    max_length: int
    digest: str
    skip: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))

    @property
    def skipped(self) -> np.ndarray:
        """Documents of rows that are not trained."""
        return np.flatnonzero(np.isin(self.row, self.skip))

    def __len__(self) -> int:
        return len(self.row)

    def read(self, document: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids and mask of a document."""
        start = int(self.start[document])
        return self._tokens(int(self.row[document]), start, start + int(self.lengths[document]))

    def prompt_and_answer(self, row: int) -> tuple[list[int], list[int]]:
        """Ids before a row's last answer, and the answer's without its end. Plain text has no answer."""
        answer, length = int(self.rows["answer"][row]), int(self.rows["length"][row])
        ids, _ = self._tokens(row, 0, length)
        return ids[:answer].tolist(), ids[answer : length - 1].tolist()

    def questions(self) -> np.ndarray:
        """Rows whose last answer a model can be asked for: plain text has none, and the prompt must fit max_length."""
        answer = self.rows["answer"]
        return np.flatnonzero((answer >= 0) & (answer < self.max_length) & (self.times > 0))

    def reason_left_out(self, row: int) -> str:
        if self.fates[row] == TOO_LONG:
            return f"{self.rows['length'][row]} tokens, max_length is {self.max_length}"
        return f"no supervised token within max_length {self.max_length}"

    def summary(self) -> str:
        """Rows by source and fate, in a line."""
        counts = np.bincount(self.source_of_rows(), weights=self.times > 0, minlength=len(self.sources)).astype(int)
        shares = np.bincount(self.source, weights=self.lengths, minlength=len(self.sources)) / self.lengths.sum()
        parts = [f"{count:,} in {source.path}" + (f" ({100 * share:.1f} % of the tokens)" if len(self.sources) > 1 else "")
                 for count, source, share in zip(counts, self.sources, shares, strict=True)]
        fates = {"truncated": TRUNCATED, "split": SPLIT, "too long": TOO_LONG, "without a supervised token": SILENT}
        found = {name: int((self.fates == fate).sum()) for name, fate in fates.items()} | {"unreadable": sum(file.rejected for file in self.files)}
        found["skipped"] = len(self.skip)
        return "; ".join(parts) + "".join(f", {count:,} {name}" for name, count in found.items() if count)

    def first_row(self) -> Row | None:
        """The text of the first row of which the cache kept it."""
        kept = ((file, span["first"]) for file in self.files for span in file.index["spans"] if span["first"])
        return next((FORMATS[self.sources[file.source].format](first["record"], first["line"]) for file, first in kept), None)

    def where(self, row: int) -> str:
        """path:line of a row."""
        file = int(np.searchsorted(self._first_row_of_file, row, "right")) - 1
        return f"{self.files[file].path}:{self.rows['line'][row]}"

    def source_of_rows(self) -> np.ndarray:
        return np.repeat([file.source for file in self.files], [file.kept for file in self.files])

    # ---- Arrays on disk ----

    def _tokens(self, row: int, start: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        shards = self._shards
        shard = int(np.searchsorted(shards.first, row, "right")) - 1
        begin = int(shards.offset[row])
        return shards.read(shard, begin + start, begin + end)

    @cached_property
    def _first_row_of_file(self) -> np.ndarray:
        return np.cumsum([0, *(file.kept for file in self.files)])[:-1]

    @cached_property
    def _shards(self) -> Shards:
        return Shards(self.files, self.rows["length"])


def load(cfg: Data, of: str, tokenizer: Tokenizer, seed: int = 0, strict: bool = True) -> Dataset | None:
    """The dataset of "train" or "validation" as the recipe has it; None where it names none.

    Files are tokenised where the cache does not know them yet, by one process of a node while its others wait.

    Args:
        seed: decides which rows of a source make up the rest of its weight.
        strict: raise for rows that cannot be read if the recipe says so, and for too long ones; else they are left out.
    """
    sources = cfg.sources(of)
    if not getattr(cfg, of):
        return None
    files, contents = [], []
    for number, source in enumerate(sources):
        job = Job(source.format, cfg.template, cfg.system, cfg.supervise)
        for path in expand(source.path):
            file = tokenised(path, number, job, tokenizer, Path(cfg.cache), cfg.workers)
            if not file.index["records"] and cfg.on_bad_row == "error":
                raise EngineError("DATA-EMPTY", f"{path}: holds no row; expected records of the format {source.format}, or set data.on_bad_row=skip")
            files.append(file)
            contents.append([number, job.key(file.index["sha256"], tokenizer)])
    _warn_of_repeated_files(files)
    if strict and cfg.on_bad_row == "error":
        _refuse_rejects(files)
    rows, tasks = _rows(files)
    found = _documents(files, sources, rows, tasks, cfg, of, seed, strict)
    how = [contents, [[source.repeat, source.weight] for source in sources], cfg.max_length, cfg.too_long, seed if any(s.weight for s in sources) else None]
    skip = _named(found, cfg.skip) if of == "train" else found.skip
    return replace(found, digest=hashlib.sha256(json.dumps(how).encode()).hexdigest(), skip=skip)


def _named(dataset: Dataset, ids: list[str]) -> np.ndarray:
    """Rows that are named path:line, each once.

    Raises:
        EngineError: an id names none that is trained on, or the lines of a file hold more rows than one.
    """
    found: list[int] = []
    for one in ids:
        path, _, line = one.rpartition(":")
        first, rows = 0, []
        for file in dataset.files:
            if line.isdecimal() and (str(file.path) == path or file.path.resolve() == Path(path).resolve()):
                mine = first + np.flatnonzero(dataset.rows["line"][first : first + file.kept] == int(line))
                if len(mine) > 1:
                    raise EngineError("DATA-SKIP", f"data.skip: {one} names {len(mine)} rows of one line; give each record of {file.path} a line of its own")
                rows += [row for row in mine.tolist() if dataset.times[row]]
            first += file.kept
        if not rows:
            raise EngineError("DATA-SKIP", f"data.skip: {one} is no row that data.train would train on; expected path:line, as black boxes name them")
        found += rows
    return np.array(sorted(set(found)), np.int64)  # np.unique would import numpy.ma


def _warn_of_repeated_files(files: list[File]) -> None:
    seen: dict[str, File] = {}
    for file in files:
        if (first := seen.setdefault(file.index["sha256"], file)) is not file and rank_in_launch() == 0:
            warn(f"{file.path} has the same content as {first.path}; its rows are trained once more")


def _refuse_rejects(files: list[File]) -> None:
    count = sum(file.rejected for file in files)
    if not count:
        return
    named = [f"{where}: {reason}" for file in files for where, reason in islice(file.rejects(), NAMED)]
    more = f"\n(and {count - NAMED:,} more)" if count > NAMED else ""
    raise EngineError("DATA-ROW", "\nERROR E-DATA-ROW ".join(named[:NAMED]) + more + "; fix the rows, or set data.on_bad_row=skip to leave them out")


def _rows(files: list[File]) -> tuple[np.ndarray, list[str]]:
    tasks: dict[str, int] = {}
    parts = [np.empty(0, build.ROW)]
    for file in files:
        for number, span in enumerate(file.index["spans"]):
            parts.append(part := np.load(file.folder / f"{number:05d}.rows.npy"))
            if span["tasks"]:
                part["task"] = np.array([tasks.setdefault(task, len(tasks)) for task in span["tasks"]])[part["task"]]
    return np.concatenate(parts), list(tasks)


def _documents(files: list[File], sources: list[Source], rows: np.ndarray, tasks: list[str], cfg: Data, of: str, seed: int, strict: bool) -> Dataset:
    """The documents of rows cut to max_length and repeated as the mix says."""
    whole = np.flatnonzero(rows["length"] <= cfg.max_length)
    none = np.zeros(0, np.int32)
    fates = np.full(len(rows), WHOLE, np.uint8)
    found = Dataset(files, sources, rows, tasks, fates, none, whole.astype(np.int32), np.zeros(len(whole), np.int32), rows["length"][whole],
                    rows["targets"][whole], none, cfg.max_length, "")
    over = np.flatnonzero(rows["length"] > cfg.max_length)
    if len(over) and cfg.too_long == "error" and strict:
        row = int(over[0])
        more = f" (and {len(over) - 1:,} more such rows)" if len(over) > 1 else ""
        raise EngineError("DATA-LENGTH", f"{found.where(row)}: has {rows['length'][row]} tokens, data.max_length is {cfg.max_length}{more}; "
                          "raise it, or set data.too_long to truncate, drop or split")
    pieces = [piece for row in over.tolist() for piece in _cut(found, row, cfg.max_length, cfg.too_long, fates)]
    if pieces:
        row, start, lengths, targets = (np.concatenate([one, np.asarray(other, np.int32)]) for one, other in
                                        zip((found.row, found.start, found.lengths, found.targets), zip(*pieces, strict=True), strict=True))
        order = np.argsort(row, kind="stable")
        found = replace(found, row=row[order], start=start[order], lengths=lengths[order], targets=targets[order])
    if not len(found):
        records = sum(file.index["records"] for file in files)
        raise EngineError("DATA-EMPTY", f"data.{of}: none of {records:,} rows can be trained on: {_first_reason(found)}")
    source_of_rows = found.source_of_rows()
    times = _times(source_of_rows, np.isin(fates, KEPT), sources, seed)
    of_documents = times[found.row]
    if (total := int(of_documents.sum())) > MOST_DOCUMENTS:
        source = sources[int(source_of_rows[int(times.argmax())])]
        raise EngineError("DATA-MIX", f"data.{of}: an epoch would have {total:,} documents, the rows of {source.name} {int(times.max()):,} times each; "
                          f"expected at most {MOST_DOCUMENTS:,}: bring the weights or repeats nearer to each other")
    passes = np.flatnonzero(of_documents)
    if total > len(passes):  # first every document once, then once more those that occur twice, and so on
        passes, first = np.repeat(np.arange(len(found)), of_documents), np.cumsum(of_documents) - of_documents
        passes = passes[np.argsort(np.arange(total) - np.repeat(first, of_documents), kind="stable")]
    return replace(found, **{name: getattr(found, name)[passes] for name in ("row", "start", "lengths", "targets")}, times=times,
                   source=source_of_rows[found.row[passes]].astype(np.int16))


def _cut(dataset: Dataset, row: int, max_length: int, too_long: str, fates: np.ndarray) -> list[tuple[int, int, int, int]]:
    """What remains of a row that is too long: (row, start, length, targets) of each piece; sets the row's fate."""
    if too_long in ("drop", "error"):
        fates[row] = TOO_LONG
        return []
    length = int(dataset.rows["length"][row])
    _, supervised = dataset._tokens(row, 0, length)
    starts = range(0, length, max_length) if too_long == "split" else [0]
    pieces = [(row, start, min(max_length, length - start), int(supervised[start + 1 : start + max_length].sum())) for start in starts]
    pieces = [piece for piece in pieces if piece[3]]  # a document's first token is never predicted
    fates[row] = (SPLIT if too_long == "split" else TRUNCATED) if pieces else SILENT
    return pieces


def _times(source_of_rows: np.ndarray, kept: np.ndarray, sources: list[Source], seed: int) -> np.ndarray:
    """How often each row occurs in an epoch.

    With weights the epoch is the shortest in which sources have their shares and every row occurs: the source that has
    most rows for its weight is passed once, others several times, the last time in part.
    """
    times = np.array([source.repeat for source in sources])[source_of_rows]
    if any(source.weight for source in sources):
        counts = np.bincount(source_of_rows[kept], minlength=len(sources))
        rows_a_weight = max(count / source.weight for count, source in zip(counts, sources, strict=True))
        for number, source in enumerate(sources):
            mine = np.flatnonzero((source_of_rows == number) & kept)
            if len(mine):
                full, rest = divmod(round(source.weight * rows_a_weight), len(mine))
                times[mine] = full
                times[mine[shuffled(np.arange(rest), len(mine), np.uint64(mix(seed, number)))]] += 1
    return times * kept


def _first_reason(dataset: Dataset) -> str:
    for file in dataset.files:
        for where, reason in file.rejects():
            return f"{where}: {reason}"
    if len(dataset.rows):
        return f"{dataset.where(0)}: {dataset.reason_left_out(0)}"
    return "the files hold none"


def check_fit(dataset: Dataset, held_out: Dataset | None, tokenizer: Tokenizer, model: dict[str, Any], added: int = 0) -> None:
    """Raises EngineError where data or tokenizer go beyond a model, given its config.json: ids past the embedding, lengths
    past the positions. The last `added` of the tokenizer's ids get rows of their own; a control token that nothing writes needs none."""
    highest = max(file.index["highest"] for part in (dataset, held_out) if part for file in part.files)
    if min(tokenizer.pieces, tokenizer.size - added) > model["vocab_size"] or highest >= max(model["vocab_size"], tokenizer.size if added else 0):
        raise EngineError("DATA-VOCABULARY", f"the tokenizer has {tokenizer.size} ids, the model's vocab_size is {model['vocab_size']}, the data's "
                          f"highest id {highest}; use the tokenizer that belongs to the model")
    positions = model.get("max_position_embeddings", 2048)
    if dataset.max_length > positions:
        raise EngineError("DATA-POSITIONS", f"data.max_length is {dataset.max_length}, the model has {positions} positions (max_position_embeddings); lower it")
