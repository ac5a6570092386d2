"""The ids of a tokenizer.json, worked out once for each word: what stands between two spaces is looked up when it comes again.

A text is cut before every space (U+0020) that follows a character which is no white space, and the chunks' ids, end to end, are the
text's. This holds for the tokenizers known here, and for them alone a memo is made, because

  - their pre-tokenizers part a text before BPE sees it, by a regex that matches from left to right and has no piece in which a space
    follows what is no white space; so none of its pieces lies across a cut;
  - its only look ahead, `\\s+(?!\\S)`, sees no further than the white space it matches, which a cut never parts;
  - Python's `\\s` holds all that theirs holds, so none of their white space stands before a cut;
  - NFC joins nothing with a space, and neither makes white space nor removes it.

A cut between two spaces, or after a line break, would break the second. Tokens that are found in text before all this, such as
Qwen's <think>, may begin or end with anything: a text that names one is not cut.
"""

import json
import re
from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np

KEPT_LETTERS = 64  # of a chunk; longer ones are hardly met again: a text of Chinese is one chunk
KEPT_CHUNKS, KEPT_IDS = 1 << 18, 1 << 22  # a memo that is fuller begins anew; it takes about 60 MB then

BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
DIGITS = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, BYTES]}
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _split(numbers: str) -> dict[str, Any]:
    split = {"type": "Split", "pattern": {"Regex": WORDS % numbers}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, {**BYTES, "use_regex": False}]}


# Pre-tokenizers of GPT-2; SmolLM2; Llama 3 to 3.3 and SmolLM3; Qwen 2, 2.5 and 3. Their trim_offsets says nothing of ids.
KNOWN = (BYTES, DIGITS, _split("{1,3}"), _split(""))


def memo_of(model: Any) -> "Memo | None":
    """A memo for a `tokenizers.Tokenizer` of which the above is known to hold; else None."""
    plain = [token for token in model.get_added_tokens_decoder().values() if not token.special]
    normalizer = _state(model.normalizer)
    holds = (_state(model.pre_tokenizer) in KNOWN and normalizer in (None, {"type": "NFC"}) and type(model.model).__name__ == "BPE"
             and not model.model.dropout and model.encode_special_tokens and model.truncation is None and model.padding is None
             and not (normalizer and any(token.normalized for token in plain)))  # they would be found in the normalized text
    return Memo(model, [token.content for token in plain]) if holds else None


def _state(part: Any) -> dict[str, Any] | None:
    """A part of a tokenizer as tokenizer.json writes it."""
    return None if part is None else json.loads(part.__getstate__(), object_hook=lambda found: {k: v for k, v in found.items() if k != "trim_offsets"})


class Memo:
    """Chunks in the order of their numbers: chunk n has the ids from starts[n] to before starts[n + 1].

    Args:
        plain: tokens that are found in text.
    """

    def __init__(self, model: Any, plain: Sequence[str]) -> None:
        self.model = model
        self.find_plain = re.compile("|".join(map(re.escape, plain)) or "(?!)").search
        self.find_run = re.compile(r"\s ").search
        self.cut = re.compile(r"(?<=\S) ").split
        self._forget()

    def _forget(self) -> None:
        self.new: list[str] = []  # chunks that have a number and no ids yet
        self.ids, self.starts = array("i"), array("q", [0])
        self.first, self.later = _Numbers(self, ""), _Numbers(self, " ")

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids (int32) of all texts, end to end, and how many each has (int64)."""
        if len(self.starts) > KEPT_CHUNKS or len(self.ids) > KEPT_IDS:
            self._forget()
        numbers: list[int] = []
        counts = [0]
        for text in texts:
            if self.find_plain(text):
                numbers.append(self.number(text))
            else:
                first, *others = self.cut(text) if self.find_run(text) else text.split(" ")
                numbers.append(self.first[first])
                numbers += map(self.later.__getitem__, others)
            counts.append(len(numbers))
        for found in self.model.encode_batch_fast(self.new, add_special_tokens=False):
            self.ids.extend(found.ids)
            self.starts.append(len(self.ids))
        self.new = []
        starts, chunks = np.frombuffer(self.starts, np.int64), np.asarray(numbers, np.int64)
        begins = starts[chunks]
        sizes = starts[chunks + 1] - begins
        ends = np.concatenate([[0], np.cumsum(sizes)])
        return np.frombuffer(self.ids, np.int32)[ranges(begins, sizes)], np.diff(ends[counts])

    def number(self, chunk: str) -> int:
        """The next number, given to a chunk."""
        self.new.append(chunk)
        return len(self.starts) + len(self.new) - 2


class _Numbers(dict):
    """Of a text's first chunks, or of the later ones without the space they begin with."""

    def __init__(self, memo: Memo, lead: str) -> None:
        self.memo, self.lead = memo, lead

    def __missing__(self, word: str) -> int:
        number = self.memo.number(self.lead + word)
        if len(word) < KEPT_LETTERS:
            self[word] = number
        return number


def ranges(begins: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """`range(begin, begin + size)` of each, end to end."""
    ends = np.cumsum(sizes)
    return np.repeat(begins - ends + sizes, sizes) + np.arange(ends[-1] if len(ends) else 0)
