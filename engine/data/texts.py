"""What only the text of rows tells, in a pass over the files: which scripts it is written in, and where tokens would go over
the border between a question and its answer."""

import sys
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from engine.config import Data
from engine.data.build import batches
from engine.data.cache import known_survey
from engine.data.dataset import NAMED, Dataset
from engine.data.formats import FORMATS, BadRow, Row
from engine.data.reading import FileSurvey, records
from engine.data.template import BOS, TEMPLATES, Template
from engine.data.tokenizer import Tokenizer, learnt

# What the Unicode name of a letter begins with, by script.
SCRIPTS = {"CJK": "Han", "IDEOGRAPHIC": "Han", "HIRAGANA": "Kana", "KATAKANA": "Kana", "KATAKANA-HIRAGANA": "Kana", **{name.upper(): name for name in (
    "Latin", "Hangul", "Cyrillic", "Arabic", "Devanagari", "Greek", "Hebrew", "Thai", "Bengali", "Tamil", "Telugu", "Kannada", "Malayalam", "Gujarati",
    "Gurmukhi", "Oriya", "Sinhala", "Georgian", "Armenian", "Ethiopic", "Khmer", "Lao", "Myanmar", "Tibetan", "Mongolian")}}
NO_SCRIPT = ("white space", "punctuation and symbols", "digits", "other")
KINDS = (*NO_SCRIPT, *dict.fromkeys(SCRIPTS.values()))
UNKNOWN = 255


@dataclass
class Texts:
    """`characters`, `mainly`: by kind of KINDS the characters, and the rows that have most letters of it. `merged`: rows where a
    token would go over a border; `named`: the first of them."""

    rows: int = 0
    characters: np.ndarray = field(default_factory=lambda: np.zeros(len(KINDS), np.int64))
    mainly: np.ndarray = field(default_factory=lambda: np.zeros(len(KINDS), np.int64))
    merged: int = 0
    named: list[str] = field(default_factory=list)


def read(dataset: Dataset, data: Data, tokenizer: Tokenizer) -> Texts:
    """Goes over the files of a dataset. Records that are no rows are passed over."""
    found, scripts, write = Texts(), _Scripts(), TEMPLATES[data.template]
    surveys = [(file, known_survey(file.path, Path(data.cache))) for file in dataset.files]
    total = sum(span.end - span.start for _, survey in surveys for span in survey.spans)
    with tqdm(total=total, desc="reading text", unit_scale=True, unit="", disable=not sys.stderr.isatty(), leave=False) as progress:
        for file, survey in surveys:
            rows = _rows(survey, dataset.sources[file.source].format, data, progress)
            for batch in batches(rows, lambda row: sum(len(message.content) + len(message.input) for message in row.messages)):
                found.rows += len(batch)
                scripts.count(batch, found)
                for row, merges in zip(batch, _merges(batch, write, data.system, tokenizer), strict=True):
                    if merges:
                        found.merged += 1
                        found.named += [f"{file.path}:{row.line}: {merges}"] * (found.merged <= NAMED)
    return found


def _rows(survey: FileSurvey, format: str, data: Data, progress: tqdm) -> Iterator[Row]:
    for span in survey.spans:
        for line, record in records(span):
            try:
                if isinstance(record, BadRow):
                    continue
                row = FORMATS[format](record, line)
                TEMPLATES[data.template].check(row)
                if any(learnt(row, data.supervise)):
                    yield row
            except BadRow:
                continue
        progress.update(span.end - span.start)


class _Scripts:
    def __init__(self) -> None:
        self.kinds = np.full(sys.maxunicode + 1, UNKNOWN, np.uint8)  # of each character, once it has occurred

    def count(self, rows: list[Row], found: Texts) -> None:
        texts = ["".join(message.content + message.input for message in row.messages) for row in rows]
        codes = np.frombuffer("".join(texts).encode("utf-32-le"), "<u4")
        for code in np.unique(codes[self.kinds[codes] == UNKNOWN]).tolist():
            self.kinds[code] = KINDS.index(_kind(chr(code)))
        places = np.repeat(np.arange(len(texts)) * len(KINDS), [len(text) for text in texts])
        table = np.bincount(places + self.kinds[codes], minlength=len(texts) * len(KINDS)).reshape(len(texts), len(KINDS))
        found.characters += table.sum(axis=0)
        letters = table[:, len(NO_SCRIPT) :]
        mainly = np.where(letters.any(axis=1), letters.argmax(axis=1) + len(NO_SCRIPT), KINDS.index("other"))
        found.mainly += np.bincount(mainly, minlength=len(KINDS))


def _kind(letter: str) -> str:
    category = unicodedata.category(letter)
    if category[0] in "ZC":
        return "white space" if category[0] == "Z" or letter.isspace() else "other"
    if category[0] in "PSN":
        return "digits" if category[0] == "N" else "punctuation and symbols"
    words = unicodedata.name(letter, "").removeprefix("FULLWIDTH ").removeprefix("HALFWIDTH ").split()
    return SCRIPTS.get(words[0], "other") if words else "other"


def _merges(rows: list[Row], write: Template, system: str | None, tokenizer: Tokenizer) -> list[str]:
    """For each row what of it would get other ids, were question and answer one text; empty if nothing would."""
    joints = [list(_joints(row, write, system, tokenizer)) for row in rows]
    ids: dict[tuple[str, bool], list[int]] = {}
    wanted = {part for joint in joints for (one, begins), (other, goes_on) in joint for part in ((one, begins), (other, goes_on), (one + other, begins))}
    for spaced in (True, False):
        texts = [text for text, how in wanted if how is spaced]
        found, sizes = tokenizer.encode_all(texts, spaced)
        ids |= {(text, spaced): part.tolist() for text, part in zip(texts, np.split(found, np.cumsum(sizes)[:-1]), strict=bool(texts))}
    return [next((_tell(one[0], other[0]) for one, other in joint if ids[one[0] + other[0], one[1]] != ids[one] + ids[other]), "") for joint in joints]


def _tell(question: str, answer: str) -> str:
    return f"{question[-12:]!r} and {answer[:12]!r}"


def _joints(row: Row, write: Template, system: str | None, tokenizer: Tokenizer) -> Iterator[tuple[tuple[str, bool], tuple[str, bool]]]:
    """Text before an answer and the answer's, where no control token stands between them, each with whether it is spaced as `tokenise` has it."""
    if row.messages[0].role == "text":
        return
    place, before = "begin", None
    for text, special, turn in write(row, system):
        part = (text, (place if write.chat else "alone") in tokenizer.spaced)
        if before and not special and turn is not None and row.messages[turn].role == "assistant":
            yield before, part
        before = None if special else part
        place = "begin" if special and text == BOS else "control" if special else "text"
