"""What may be wrong with rows, seen in the cached arrays alone: no text is read, so a million rows take a second or two.

An *error* keeps training from starting, a *warning* is one line at its start, a *note* is reported by `engine.audit` alone.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from engine.config import Data
from engine.data.build import DOUBLE_BOS, HOLDS_CONTROL, NAMES_CONTROL
from engine.data.dataset import NAMED, SILENT, TOO_LONG, Dataset, check_fit
from engine.data.tokenizer import Tokenizer, end_of, read_json, text_of
from engine.errors import EngineError, warn

ERROR, WARNING, NOTE = "error", "warning", "note"
MANY_DUPLICATES = 0.01  # share of the rows from which on training speaks of them


@dataclass(frozen=True)
class Finding:
    """`count` of `of` records are `what`; `advice`: why it matters and what to do. `rows`: "path:line: what" of the first NAMED.

    `of` is 0 for what is no matter of rows.
    """

    kind: str
    severity: str
    count: int
    of: int
    what: str
    advice: str
    rows: tuple[str, ...] = ()

    def headline(self) -> str:
        share = 100 * self.count / self.of if self.of else 0
        return f"{self.count:,} of {self.of:,} ({f'{share:.1f}' if share >= 0.1 else 'under 0.1'} %) {self.what}" if self.of else self.what


def findings(train: Dataset, held_out: Dataset | None, data: Data) -> Iterator[Finding]:
    """All that the arrays show, errors first."""
    yield from errors(train, held_out, data)
    yield from doubts(train, held_out)
    for name, dataset in (("data.train", train), ("data.validation", held_out)):
        if dataset is not None:
            yield from _notes(dataset, name, data)


def before_training(train: Dataset, held_out: Dataset | None, data: Data, speaks: bool) -> None:
    """Raises EngineError for what no run can mend later; what its user must know is a line each on standard error, if this rank `speaks`."""
    refuse(errors(train, held_out, data), "DATA")
    for found in doubts(train, held_out) if speaks else ():
        if found.severity == WARNING:
            first = f", as {found.rows[0]}" if found.rows else ""
            warn(f"{found.headline()}{first}; {found.advice}; python -m engine.audit RECIPE shows more")


def refuse(found: Iterable[Finding], area: str) -> None:
    """Raises an EngineError with a line for each row that the errors among the findings name."""
    lines = []
    for one in found:
        if one.severity == ERROR:
            rows = list(one.rows) or [one.what]
            more = f" (and {one.count - len(rows):,} more such rows)" if one.count > len(rows) else ""
            rows[-1] += f"{more}; {one.advice}"
            lines += [f"{area}-{one.kind} {row}" for row in rows]
    if lines:
        name, text = "\nERROR E-".join(lines).split(" ", 1)
        raise EngineError(name, text)


# ---- Of one dataset ------------------------------------------------------------------------------------------------------


def errors(train: Dataset, held_out: Dataset | None, data: Data) -> Iterator[Finding]:
    """What keeps a run from starting. Records that cannot be read and rows that are too long are refused by `dataset.load`
    already where it is strict."""
    for dataset in filter(None, (train, held_out)):
        rejected = sum(file.rejected for file in dataset.files)
        if rejected and data.on_bad_row == "error":
            yield Finding("UNREADABLE", ERROR, rejected, _records(dataset), "records cannot be read",
                          "mend them, or set data.on_bad_row=skip to leave them out", _rejected(dataset))
        if data.too_long == "error":
            yield from _flagged(dataset, dataset.fates == TOO_LONG, "TOO-LONG", ERROR, f"rows are longer than data.max_length = {data.max_length}",
                                "raise it, or set data.too_long to truncate, drop or split", dataset.reason_left_out)
        yield from _flagged(dataset, dataset.rows["targets"] == 0, "NO-TARGET", ERROR, "rows have no supervised token",
                            "nothing is learnt from them: leave them out, or mend what their messages say of train",
                            lambda row: "has no supervised token: the template writes nothing of its own for the messages that are to be learnt")
        flags = dataset.rows["flags"]
        double = (flags & DOUBLE_BOS) > 0
        yield from _flagged(dataset, double, "DOUBLE-BOS", ERROR, "rows begin with the beginning of a sequence twice",
                            "the tokenizer writes it in front of every row: take it out of the text", lambda row: "begins a sequence twice")
        yield from _flagged(dataset, ((flags & HOLDS_CONTROL) > 0) & ~double, "CONTROL-TOKEN", ERROR, "rows have text that became a control token",
                            "a row could begin or end a sequence at will: mark the token as special in tokenizer.json, or take it out of the text",
                            lambda row: "has text that became a control token")


def misfit(dataset: Dataset, held_out: Dataset | None, tokenizer: Tokenizer, model: dict[str, Any], added: int) -> Iterator[Finding]:
    """What `check_fit` refuses, with the rows whose ids have no embedding."""
    try:
        check_fit(dataset, held_out, tokenizer, model, added)
    except EngineError as error:
        beyond = np.concatenate([np.zeros(0, bool), *_rows_beyond(dataset, max(model["vocab_size"], tokenizer.size if added else 0))])
        rows = np.flatnonzero(beyond)
        what, _, advice = error.text.rpartition("; ")
        yield Finding(error.name.partition("-")[2], ERROR, len(rows), len(beyond) * bool(len(rows)), f"rows have ids without an embedding: {what}" if len(rows)
                      else what, advice, tuple(f"{dataset.where(row)}: has an id without an embedding: {what}" for row in rows[:NAMED].tolist()))


def doubts(train: Dataset, held_out: Dataset | None) -> Iterator[Finding]:
    """What may be meant as it is, and spoils a run where it is not."""
    yield from _ends_lost(train)
    yield from _duplicates(train)
    if held_out is not None:
        yield from _overlap(train, held_out)


def _ends_lost(dataset: Dataset) -> Iterator[Finding]:
    yield from _flagged(dataset, (dataset.times > 0) & ~ends_kept(dataset), "END-LOST", WARNING,
                        f"rows lose the end of their answer to data.max_length = {dataset.max_length}",
                        "a model that seldom sees an answer end does not learn to stop: raise it, or set data.too_long=drop",
                        lambda row: f"has {dataset.rows['length'][row]} tokens, its end is cut off")
    yield from _flagged(dataset, dataset.fates == SILENT, "NO-TARGET-LEFT", WARNING,
                        f"rows are left out, as no supervised token of theirs lies within data.max_length = {dataset.max_length}",
                        "raise it, or shorten their questions", lambda row: f"has {dataset.rows['length'][row]} tokens")


def _duplicates(dataset: Dataset) -> Iterator[Finding]:
    rows = np.flatnonzero(dataset.times > 0)
    whole, question = _first_alike(dataset.rows["all"][rows]), _first_alike(dataset.rows["prompt"][rows])
    again = whole != np.arange(len(rows))
    severity = WARNING if again.mean() > MANY_DUPLICATES else NOTE
    yield from _pairs(dataset, rows[again], dataset, rows[whole[again]], "DUPLICATE", severity, len(rows), "rows are the same as one before, token by token",
                      "each counts as often as it is there: leave the copies out, or take them for a weight that you want", "is {} again")
    other = (dataset.rows["all"][rows] != dataset.rows["all"][rows[question]]) & ~again & (dataset.rows["answer"][rows] >= 0)
    yield from _pairs(dataset, rows[other], dataset, rows[question[other]], "OTHER-ANSWER", NOTE, len(rows),
                      "rows ask what one before asks, and answer otherwise",
                      "a model learns the mixture of the answers: fine for open questions, an error in one of them for others",
                      "asks what {} asks, with another answer")


def _overlap(train: Dataset, held_out: Dataset) -> Iterator[Finding]:
    of, by = np.flatnonzero(held_out.times > 0), np.flatnonzero(train.times > 0)
    copies = np.isin(held_out.rows["all"][of], train.rows["all"][by])
    asked = np.isin(held_out.rows["prompt"][of], train.rows["prompt"][by]) & ~copies & (held_out.rows["answer"][of] >= 0)
    # No error: who wants to see a model learn rows by heart validates on them on purpose.
    for found, key, kind, severity, what, advice, text in (
            (of[copies], "all", "OVERLAP", WARNING, "rows of data.validation are rows of data.train as well",
             "the validation loss is better than the model is: leave them out of one of the two", "is also {}"),
            (of[asked], "prompt", "SAME-QUESTION", NOTE, "rows of data.validation ask what a row of data.train asks, and answer otherwise",
             "whether that is held out is for you to say", "asks what {} asks, with another answer")):
        values = train.rows[key][by]
        firsts = np.array([by[np.argmax(values == held_out.rows[key][row])] for row in found[:NAMED]], np.int64)
        yield from _pairs(held_out, found, train, firsts, kind, severity, len(of), what, advice, text)


def _notes(dataset: Dataset, name: str, data: Data) -> Iterator[Finding]:
    rejected = sum(file.rejected for file in dataset.files)
    if rejected and data.on_bad_row == "skip":
        yield Finding("SKIPPED", NOTE, rejected, _records(dataset), f"records of {name} cannot be read and are left out", "as data.on_bad_row=skip says",
                      _rejected(dataset))
    if data.too_long != "error":
        yield from _flagged(dataset, dataset.fates == TOO_LONG, "DROPPED", NOTE, f"rows of {name} are left out as too long",
                            f"as data.too_long={data.too_long} says", dataset.reason_left_out)
    yield from _flagged(dataset, (dataset.rows["flags"] & NAMES_CONTROL) > 0, "CONTROL-NAME", NOTE,
                        f"rows of {name} have the name of a control token in their text", "it is learnt as text, letter by letter, and is no control token: "
                        "take it out if it is left over from another template", lambda row: "names a control token")
    ignored: Counter[str] = Counter()
    for file in dataset.files:
        for span in file.index["spans"]:
            ignored.update(span["ignored"])
    if ignored:
        fields = ", ".join(f"{field} ({count:,})" for field, count in ignored.most_common(2 * NAMED))
        yield Finding("UNREAD-FIELD", NOTE, 0, 0, f"{name} has fields that nobody reads, with the records that have them: {fields}",
                      "fine, unless one is misspelt")


def padding(folder: Path, tokenizer: Tokenizer, data: Data) -> Iterator[Finding]:
    """A tokenizer that pads with what ends answers."""
    pad = text_of(read_json(folder / "tokenizer_config.json").get("pad_token"))
    end = tokenizer.name(end_of(data.template, tokenizer))
    if pad == end:
        yield Finding("PAD-IS-END", NOTE, 0, 0, f"the tokenizer pads with {end}, which also ends answers",
                      "harmless here: padding is known by its place and never by its id, so ends are learnt; trainers that mask every padding id would "
                      "never learn to stop")


def ends_kept(dataset: Dataset) -> np.ndarray:
    """(R,) whether a document has the token that ends the row."""
    found = np.zeros(len(dataset.rows), bool)
    found[dataset.row[dataset.start + dataset.lengths == dataset.rows["length"][dataset.row]]] = True
    return found


def ends_learnt(dataset: Dataset) -> np.ndarray:
    """(R,) whether the token that ends the row is supervised."""
    found, first = [np.zeros(0, bool)], 0
    for supervised, count in _spans(dataset, "supervised"):
        found.append(supervised[np.cumsum(dataset.rows["length"][first : first + count], dtype=np.int64) - 1])
        first += count
    return np.concatenate(found)


# ---- Parts ---------------------------------------------------------------------------------------------------------------


def _flagged(dataset: Dataset, flags: np.ndarray, kind: str, severity: str, what: str, advice: str, tell: Any) -> Iterator[Finding]:
    rows = np.flatnonzero(flags)
    if len(rows):
        yield Finding(kind, severity, len(rows), len(dataset.rows), what, advice, tuple(f"{dataset.where(row)}: {tell(row)}" for row in rows[:NAMED].tolist()))


def _pairs(dataset: Dataset, rows: np.ndarray, other: Dataset, others: np.ndarray, kind: str, severity: str, of: int, what: str, advice: str,
           text: str) -> Iterator[Finding]:
    """Rows that are told by one of `other` that they resemble."""
    if len(rows):
        named = zip(rows[:NAMED].tolist(), others[:NAMED].tolist(), strict=True)
        yield Finding(kind, severity, len(rows), of, what, advice, tuple(f"{dataset.where(one)}: {text.format(other.where(two))}" for one, two in named))


def _first_alike(hashes: np.ndarray) -> np.ndarray:
    """For each the index of the first that is equal."""
    _, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    return first[inverse]


def _records(dataset: Dataset) -> int:
    return sum(file.index["records"] for file in dataset.files)


def _rejected(dataset: Dataset) -> tuple[str, ...]:
    return tuple(islice((f"{where}: {reason}" for file in dataset.files for where, reason in file.rejects()), NAMED))


def _spans(dataset: Dataset, kind: str) -> Iterator[tuple[np.ndarray, int]]:
    """An array of each span, mapped, and the span's rows."""
    for file in dataset.files:
        for number, span in enumerate(file.index["spans"]):
            if span["rows"]:
                yield np.load(file.folder / f"{number:05d}.{kind}.npy", mmap_mode="r"), span["rows"]


def _rows_beyond(dataset: Dataset, limit: int) -> Iterator[np.ndarray]:
    """Of each span, whether its rows have an id from `limit` on."""
    first = 0
    for tokens, count in _spans(dataset, "tokens"):
        lengths = dataset.rows["length"][first : first + count]
        yield np.maximum.reduceat(tokens, np.cumsum(lengths, dtype=np.int64) - lengths) >= limit
        first += count
