r"""The ids of a tokenizer.json, worked out once for each word: what stands between two spaces is looked up when it comes again.

A text is cut before every space (U+0020) that follows a character which is no white space, and the chunks' ids, end to end, are the
text's. This holds for the tokenizers known here, and for them alone a memo is made, because

  - their pre-tokenizers part a text before BPE sees it, by a regex that matches from left to right and has no piece in which a space
    follows what is no white space; so none of its pieces lies across a cut;
  - its only look ahead, `\s+(?!\S)`, sees no further than the white space it matches, which a cut never parts;
  - Python's `\s` holds all that theirs holds, so none of their white space stands before a cut;
  - NFC joins nothing with a space, and neither makes white space nor removes it.

A cut between two spaces, or after a line break, would break the second. Tokens that are found in text before all this, such as
Qwen's <think>, may begin or end with anything: a text that names one is not cut.

By the same rule the library reads new chunks as one text, in half the time: those that hold one space, as their first letter, and end
with what is no white space. There each begins where a token begins with a space, and no other token does.
"""

import json
import re
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np

KEPT_LETTERS = 64  # of a chunk; longer ones are hardly met again: a text of Chinese is one chunk
KEPT_CHUNKS, KEPT_IDS = 1 << 18, 1 << 21  # a memo that has grown beyond begins anew; it takes 45 MB with words of ten letters
JOINED = 256  # words of a text

SPACE = "Ġ"  # as vocabularies of bytes write it
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
    bpe, normalizer = model.model, _state(model.normalizer)
    holds = (_state(model.pre_tokenizer) in KNOWN and normalizer in (None, {"type": "NFC"}) and type(bpe).__name__ == "BPE" and not bpe.dropout
             and not bpe.continuing_subword_prefix and not bpe.end_of_word_suffix and bpe.token_to_id(SPACE) is not None
             and model.encode_special_tokens and model.truncation is None and model.padding is None
             and not any(" " in token.content or normalizer and token.normalized for token in plain))  # found across words, or in what NFC makes
    return Memo(model, [token.content for token in plain]) if holds else None


def _state(part: Any) -> dict[str, Any] | None:
    """A part of a tokenizer as tokenizer.json writes it."""
    return None if part is None else json.loads(part.__getstate__(), object_hook=lambda found: {k: v for k, v in found.items() if k != "trim_offsets"})


class Memo:
    """Chunks have numbers, in the order in which they are first met; chunk n has `sizes[n]` ids, from `begins[n]` on.

    Args:
        plain: tokens that are found in text.
    """

    def __init__(self, model: Any, plain: Sequence[str]) -> None:
        self.model = model
        self.find_plain = re.compile("|".join(map(re.escape, plain))).search if plain else None
        self.find_run = re.compile(r"\s ").search
        self.cut = re.compile(r"(?<=\S) ").split
        self.leads = np.full(max(model.get_vocab_size(with_added_tokens=True), max(model.get_added_tokens_decoder(), default=0) + 1), -1, np.int8)
        self._forget()

    def _forget(self) -> None:
        self.first, self.later = _Numbers(self, ""), _Numbers(self, " ")
        self.count = 0
        self.words: dict[int, str] = {}  # new chunks by their number: those that may be joined
        self.others: dict[int, str] = {}
        self.ids, self.begins, self.sizes = np.empty(0, np.int32), np.empty(0, np.int64), np.empty(0, np.int64)

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """As `joined` returns the ids of all texts."""
        if self.count > KEPT_CHUNKS or len(self.ids) > KEPT_IDS:
            self._forget()
        chunks: list[int] = []
        counts = [0]
        for text in texts:
            if self.find_plain and self.find_plain(text):
                chunks.append(self.number(text, self.others))
            else:
                first, *others = self.cut(text) if self.find_run(text) else text.split(" ")
                chunks.append(self.first[first])
                chunks += map(self.later.__getitem__, others)
            counts.append(len(chunks))
        self._learn()
        found = np.asarray(chunks, np.int64)
        sizes = self.sizes[found]
        ends = np.concatenate([[0], np.cumsum(sizes)])
        return self.ids[ranges(self.begins[found], sizes)], np.diff(ends[counts])

    def number(self, chunk: str, among: dict[int, str]) -> int:
        """The next number, for a new chunk of one of the two kinds."""
        among[self.count] = chunk
        self.count += 1
        return self.count - 1

    def _learn(self) -> None:
        others, words = list(self.others.values()), list(self.words.values())
        texts = ["".join(words[start : start + JOINED]) for start in range(0, len(words), JOINED)]
        ids, sizes = joined([one.ids for one in self.model.encode_batch_fast([*others, *texts], add_special_tokens=False)])
        ends = np.cumsum(sizes[: len(others)])
        first = int(ends[-1]) if others else 0  # of the words' ids
        begins = np.concatenate([ends - sizes[: len(others)], first + np.flatnonzero(self._begin_with_space(ids[first:]))])
        numbers = np.array([*self.others, *self.words], np.int64)
        assert len(begins) == len(numbers), "each word has one token that begins with a space"
        new = np.empty((2, len(numbers)), np.int64)
        new[:, numbers - len(self.begins)] = begins + len(self.ids), np.diff(begins, append=len(ids))
        self.begins, self.sizes = np.concatenate([self.begins, new[0]]), np.concatenate([self.sizes, new[1]])
        self.ids = np.concatenate([self.ids, ids])
        self.others, self.words = {}, {}

    def _begin_with_space(self, ids: np.ndarray) -> np.ndarray:
        """Of every id. The library is asked once for each, as handing over a whole vocabulary takes it longer."""
        new = list(set(ids[self.leads[ids] < 0].tolist()))
        self.leads[new] = [self.model.id_to_token(number).startswith(SPACE) for number in new]
        return self.leads[ids] > 0


class _Numbers(dict):
    """The numbers of texts' first chunks, or of later ones, which stand here without their space."""

    def __init__(self, memo: Memo, lead: str) -> None:
        self.memo, self.lead = memo, lead

    def __missing__(self, chunk: str) -> int:
        joins = self.lead and chunk and " " not in chunk and not chunk[-1].isspace()
        number = self.memo.number(self.lead + chunk, self.memo.words if joins else self.memo.others)
        if len(chunk) < KEPT_LETTERS:
            self[chunk] = number
        return number


def joined(lists: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Ids (int32) of all lists, end to end, and how many each has (int64)."""
    sizes = np.fromiter(map(len, lists), np.int64, len(lists))
    return np.fromiter(chain.from_iterable(lists), np.int32, int(sizes.sum())), sizes


def ranges(begins: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """`range(begin, begin + size)` of each, end to end."""
    ends = np.cumsum(sizes)
    return np.repeat(begins - ends + sizes, sizes) + np.arange(ends[-1] if len(ends) else 0)
