"""Text -> ids and back: sentencepiece's `tokenizer.model`, or a `tokenizer.json` through the [hub] extra.

Text is never searched for control tokens: a row that contains "</s>" gets the tokens of these four characters.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from engine.data.formats import Message, Row
from engine.data.memo import joined, memo_of, ranges
from engine.data.template import BOS, EOS, TEMPLATES, control_tokens
from engine.errors import EngineError, extra

# Files of a tokenizer, the last three for other tools to use it.
VOCABULARIES = ("tokenizer.json", "tokenizer.model")
COMPANIONS = (*VOCABULARIES, "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


class Tokenizer(Protocol):
    size: int  # ids lie below it
    pieces: int  # and those of text, so that only tokens that were added are beyond it
    prefix: list[int]  # begins every sequence: [bos], or nothing
    eos: int
    ends: frozenset[int]  # eos, and what generation_config.json lists beside it
    digest: str  # SHA-256 of the files that decide ids
    spaced: frozenset[str]  # the places, see `_places`, where it takes text for a word's beginning and may put a space in front

    def encode(self, text: str) -> list[int]: ...
    def encode_all(self, texts: Sequence[str], spaced: bool = True) -> tuple[np.ndarray, np.ndarray]: ...  # see `joined`; not spaced: no space is put in front
    def encode_rendered(self, text: str) -> list[int]: ...  # names of control tokens are these tokens, as in a chat template's text
    def special(self, name: str) -> int: ...
    def specials(self) -> list[str]: ...
    def name(self, number: int) -> str: ...
    def decode(self, ids: Sequence[int]) -> str: ...
    def show(self, ids: Sequence[int]) -> str: ...  # with control tokens


def load_tokenizer(folder: Path, model: Path | None = None) -> "Tokenizer":
    """The tokenizer of a folder; `model`: the model's folder, where it is another."""
    settings, generation = read_json(folder / "tokenizer_config.json"), read_json(folder / "generation_config.json")
    if (folder / "tokenizer.json").is_file():
        found = JsonTokenizer(folder, settings, generation, read_json((model or folder) / "config.json"))
    elif (folder / "tokenizer.model").is_file():
        found = SentencePiece(folder, settings, generation)
    else:
        raise EngineError("TOKENIZER-FILE", f"{folder}: has neither tokenizer.model nor tokenizer.json; copy the one that the model was trained with into it")
    return found


class SentencePiece:
    spaced = frozenset({"alone", "begin"})  # as Llama's and Mistral's own code has it: within a chat a template writes its spaces itself

    def __init__(self, folder: Path, settings: dict[str, Any], generation: dict[str, Any]) -> None:
        from sentencepiece import SentencePieceProcessor

        path = folder / "tokenizer.model"
        try:
            model = path.read_bytes()
            self.model = SentencePieceProcessor(model_proto=model)
            # Fields that are given twice count as the last says: normalizer_spec { add_dummy_prefix: false }
            self.unspaced = SentencePieceProcessor(model_proto=model + b"\x1a\x02\x18\x00")
        except (RuntimeError, OSError) as error:
            raise EngineError("TOKENIZER-FILE", f"{path}: cannot be read as a sentencepiece model: {error}") from error
        self.size = self.pieces = self.model.get_piece_size()
        self.eos = self.model.eos_id()
        if self.eos < 0:
            raise EngineError("TOKENIZER-EOS", f"{path}: has no end-of-sequence piece, so answers could never end; take the model's own")
        self.ends = frozenset({self.eos, *_listed_ends(generation, folder)})
        begins = settings.get("add_bos_token", True) and self.model.bos_id() >= 0
        self.prefix = [self.model.bos_id()] if begins else []
        self.digest = _digest([path], {"add_bos_token": begins})

    def encode(self, text: str) -> list[int]:
        return self.model.encode(text)

    def encode_all(self, texts: Sequence[str], spaced: bool = True) -> tuple[np.ndarray, np.ndarray]:
        if spaced:
            return joined(self.model.encode(list(texts)))
        # A text's own first space is put there by the model, as some models drop those that are written.
        return joined([self.model.encode(text[1:]) if len(text) > 1 and text[0] == " " else self.unspaced.encode(text) for text in texts])

    def encode_rendered(self, text: str) -> list[int]:
        ids: list[int] = []
        for part in re.split(f"({'|'.join(map(re.escape, sorted(self.specials(), key=len, reverse=True)))})", text):
            number = self.model.piece_to_id(part)
            begins = not ids or ids[-1] == self.model.bos_id()
            ids += [number] if self.model.is_control(number) else self.encode_all([part], spaced=begins)[0].tolist()
        return ids

    def special(self, name: str) -> int:
        number = self.model.piece_to_id(name)
        if not self.model.is_control(number):  # user-defined pieces are found in text, so a row could write them
            raise _lacks(name)
        return number

    def specials(self) -> list[str]:
        return [self.model.id_to_piece(number) for number in range(self.size) if self.model.is_control(number)]

    def name(self, number: int) -> str:
        return self.model.id_to_piece(number)

    def decode(self, ids: Sequence[int]) -> str:
        return self.model.decode([int(number) for number in ids if number < self.size])  # embeddings may have more rows than there are pieces

    def show(self, ids: Sequence[int]) -> str:
        text = "".join(map(self.name, ids)).replace("▁", " ")
        return re.sub("(<0x[0-9A-F]{2}>)+", lambda found: bytes.fromhex(found[0].replace("<0x", "").replace(">", "")).decode(errors="replace"), text)


class JsonTokenizer:
    def __init__(self, folder: Path, settings: dict[str, Any], generation: dict[str, Any], config: dict[str, Any]) -> None:
        path = folder / "tokenizer.json"
        tokenizers = extra("tokenizers", path)
        try:
            self.model = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the package raises bare Exception
            raise EngineError("TOKENIZER-FILE", f"{path}: cannot be read: {error}") from error
        self.as_special = lambda name: tokenizers.AddedToken(name, special=True, normalized=False)
        self.added = self.model.get_added_tokens_decoder()
        self.spaced, self.unspaced = PLACES, self.model
        if "".join(self.model.encode("a", add_special_tokens=False).tokens).startswith(("▁", "Ġ")):
            whole = read_json(path)
            whole |= {key: _unspaced(whole.get(key)) for key in ("normalizer", "pre_tokenizer")}
            self.unspaced = tokenizers.Tokenizer.from_str(json.dumps(whole))
            self.spaced = frozenset({"alone", "begin", "control"} if self._spaces_after_control() else {"alone"})
        for model in (self.model, self.unspaced):
            model.no_truncation()
            model.no_padding()
        self.prefix = self.model.encode("", add_special_tokens=True).ids[:1]
        for model in (self.model, self.unspaced):
            model.encode_special_tokens = True
        self.memo = memo_of(self.model)
        self.pieces = self.model.get_vocab_size(with_added_tokens=False)
        self.size = max(self.model.get_vocab_size(with_added_tokens=True), max(self.added, default=0) + 1)  # added ids may leave gaps
        self.eos = self._eos(settings, generation, config, path)
        self.ends = frozenset({self.eos, *_listed_ends(generation, folder)})
        self.prefix = [] if self.prefix == [self.eos] else self.prefix
        self.digest = _digest([path], {"eos": self.eos})

    def _eos(self, settings: dict[str, Any], generation: dict[str, Any], config: dict[str, Any], path: Path) -> int:
        named = text_of(settings.get("eos_token"))
        number = self.model.token_to_id(named) if named else None
        for source in (generation, config):
            listed = source.get("eos_token_id")
            number = number if number is not None else listed[0] if isinstance(listed, list) else listed
        if number is None:
            raise EngineError("TOKENIZER-EOS", f"{path}: no end-of-sequence token is named in tokenizer_config.json, generation_config.json or config.json; "
                              "name it in one of them")
        return number

    def encode(self, text: str) -> list[int]:
        return self.model.encode(text, add_special_tokens=False).ids

    def encode_all(self, texts: Sequence[str], spaced: bool = True) -> tuple[np.ndarray, np.ndarray]:
        if self.memo:  # it knows no tokenizer that puts spaces in front
            return self.memo.encode(texts)
        model = self.model if spaced else self.unspaced
        return joined([one.ids for one in model.encode_batch_fast(list(texts), add_special_tokens=False)])

    def encode_rendered(self, text: str) -> list[int]:
        self.model.encode_special_tokens = False
        try:
            return self.encode(text)
        finally:
            self.model.encode_special_tokens = True

    def special(self, name: str) -> int:
        number = self.model.token_to_id(name)
        if number not in self.added:
            raise _lacks(name)
        if not self.added[number].special:  # some files say so of control tokens; rows could write them
            for model in (self.model, self.unspaced):
                model.add_special_tokens([self.as_special(name)])
            self.added, self.memo = self.model.get_added_tokens_decoder(), memo_of(self.model)
        return number

    def specials(self) -> list[str]:
        return [token.content for token in self.added.values() if token.special]

    def name(self, number: int) -> str:
        return self.model.id_to_token(number)

    def decode(self, ids: Sequence[int]) -> str:
        return self.model.decode([int(number) for number in ids], skip_special_tokens=True)

    def show(self, ids: Sequence[int]) -> str:
        return self.model.decode(list(ids), skip_special_tokens=False)

    def _spaces_after_control(self) -> bool:
        names = self.specials()
        return bool(names) and self.model.encode(f"{names[0]}a", add_special_tokens=False).ids[1:] == self.encode("a")


# What stands before a segment: nothing that counts, or in a chat what begins a sequence, a control token, text.
PLACES = frozenset({"alone", "begin", "control", "text"})


@dataclass(frozen=True)
class Tokens:
    """Rows as ids, end to end.

    ids         int32   those of all rows
    supervised  bool    beside them: which are learnt. A row's first never is, as nothing stands before it.
    lengths     int32   ids of each row; a row ends with the token that ends its last answer
    answers     int32   where in its row the last answer begins; -1: it is no conversation
    invaded     bool    rows of whose text some became a control token
    """

    ids: np.ndarray
    supervised: np.ndarray
    lengths: np.ndarray
    answers: np.ndarray
    invaded: np.ndarray


def tell_controls(template: str, tokenizer: Tokenizer) -> None:
    """Has the tokenizer take a template's control tokens for such before it reads any text, so that ids do not hang on what it read
    before. Some files do not mark them; those that it lacks are asked for where a row needs them."""
    for name in control_tokens(template):
        with suppress(EngineError):
            tokenizer.special(name)


def tokenise(rows: Sequence[Row], template: str, system: str | None, supervise: str, tokenizer: Tokenizer) -> Tokens:
    """Ids of rows that end with an answer, and which are learnt.

    Each segment is tokenised by itself, in a chat as if what is before it were there, and each text of the batch once.

    Args:
        system: prompt for rows that have none of their own.
        supervise: "answers", "last": only the last of a row, or "all": every message and what is written around it, but not what
            the tokenizer begins a sequence with. What a message says of itself (`train`) goes before.

    Raises:
        BadRow: a row has messages that the template has no place for; `Template.check` tells of one row.
    """
    pieces: dict[tuple[str, bool | None], int] = {}  # the distinct ones of the batch: text, spaced or not, or control tokens (None), and their number
    segments, masks, starts, answers = [], [], [], []  # each segment's piece, and whether it is supervised; each row's first segment, its last answer's
    write, around = TEMPLATES[template], supervise == "all"
    tell_controls(template, tokenizer)
    for row in rows:
        wanted, last = learnt(row, supervise), len(row.messages) - 1
        text_alone = row.messages[0].role == "text"
        place = "begin" if write.chat and not text_alone else "alone"
        starts.append(len(segments))
        answers.append(-1)
        segments.append(pieces.setdefault((BOS, None), len(pieces)))
        masks.append(False)
        for text, special, turn in write(row, system):
            if turn == last and answers[-1] < 0 and not text_alone:
                answers[-1] = len(segments)
            segments.append(pieces.setdefault((text, None if special else place in tokenizer.spaced), len(pieces)))
            begins = special and text == BOS
            masks.append(not begins and (around if turn is None else wanted[turn]))
            if place != "alone":
                place = "begin" if begins else "control" if special else "text"
    found, lengths, places, invaded = _encode(pieces, tokenizer)
    which, first, at = (np.asarray(one, np.int64) for one in (segments, starts, answers))
    sizes = lengths[which]
    ids, ends = found[ranges(places[which], sizes)], np.cumsum(sizes)
    supervised, begins = np.repeat(np.asarray(masks, bool), sizes), (ends - sizes)[first]
    supervised[begins] = False
    return Tokens(ids, supervised, np.diff(begins, append=len(ids)).astype(np.int32),
                  np.where(at < 0, -1, (ends - sizes)[at] - begins).astype(np.int32), np.logical_or.reduceat(invaded[which], first))


def learnt(row: Row, supervise: str) -> list[bool]:
    """Whether each message is learnt."""
    last = len(row.messages) - 1
    return [message.train if message.train is not None else supervise == "all" or message.role == "text"
            or message.role == "assistant" and (supervise == "answers" or turn == last) for turn, message in enumerate(row.messages)]


def _encode(pieces: dict[tuple[str, bool | None], int], tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Ids of all pieces in some order, and of each piece: how many it has, where they begin, whether it is text and some are control tokens."""
    lengths, places, invaded = (np.zeros(len(pieces), kind) for kind in (np.int64, np.int64, bool))
    parts, end = [], 0
    control: np.ndarray | None = None
    for kind in (None, True, False):  # control tokens first: `special` keeps text from writing them
        names, numbers = [name for name, of in pieces if of is kind], [number for (_, of), number in pieces.items() if of is kind]
        if kind is None:
            ids, sizes = joined([tokenizer.prefix if name == BOS else [tokenizer.eos] if name == EOS else [tokenizer.special(name)] for name in names])
            control = np.array([tokenizer.eos, *tokenizer.prefix, *map(tokenizer.special, tokenizer.specials())])
        else:
            ids, sizes = tokenizer.encode_all(names, kind)
            stops = np.cumsum(sizes)
            before = np.concatenate([[0], np.cumsum(np.isin(ids, control))])  # control tokens
            invaded[numbers] = before[stops] > before[stops - sizes]
        lengths[numbers], places[numbers] = sizes, end + np.cumsum(sizes) - sizes
        parts.append(ids)
        end += len(ids)
    return np.concatenate(parts), lengths, places, invaded


def prompt_ids(row: Row, template: str, tokenizer: Tokenizer, system: str | None = None) -> list[int]:
    """What generation starts from: exactly the tokens that stand before the last answer in training. The row may lack that answer,
    which then is one without a thought."""
    if row.messages[-1].role not in ("assistant", "text"):
        row = replace(row, messages=(*row.messages, Message("assistant", "")))
    tokens = tokenise([row], template, system, "answers", tokenizer)
    return tokens.ids[: tokens.answers[0]].tolist()  # of plain text, all but its end


def end_of(template: str, tokenizer: Tokenizer) -> int:
    """The token that ends an answer."""
    name = TEMPLATES[template].end
    return tokenizer.eos if name == EOS else tokenizer.special(name)


def stops(template: str, tokenizer: Tokenizer) -> frozenset[int]:
    """The tokens after which generation stops: the template's end, the tokenizer's, and those that the model's makers list."""
    return tokenizer.ends | {end_of(template, tokenizer)}


def copy_tokenizer(source: Path, target: Path) -> None:
    for name in (*COMPANIONS, "generation_config.json"):
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (ValueError, RecursionError) as error:
        raise EngineError("TOKENIZER-FILE", f"{path}: not JSON: {error}") from error
    if not isinstance(found, dict):
        raise EngineError("TOKENIZER-FILE", f"{path}: got a {type(found).__name__}, expected an object")
    return found


def text_of(token: Any) -> Any:
    """A token as tokenizer_config.json names it: by its text, or by an object that holds the text as "content"."""
    return token.get("content") if isinstance(token, dict) else token


def _listed_ends(generation: dict[str, Any], folder: Path) -> list[int]:
    listed = generation.get("eos_token_id")
    listed = listed if isinstance(listed, list) else [] if listed is None else [listed]
    if not all(type(number) is int for number in listed):
        raise EngineError("TOKENIZER-EOS", f"{folder / 'generation_config.json'}: eos_token_id: got {listed}, expected a number or a list of numbers")
    return listed


def _lacks(name: str) -> EngineError:
    return EngineError("TOKENIZER-SPECIAL", f"the template needs the control token {name}, which this tokenizer lacks; set data.template")


def _unspaced(part: dict[str, Any] | None) -> dict[str, Any] | None:
    """A normalizer or pre-tokenizer as tokenizer.json writes it, without what puts a space in front of text."""
    if part is None or part["type"] == "Prepend":
        return None
    for key in {"normalizers", "pretokenizers"} & part.keys():
        return {**part, key: [kept for one in part[key] if (kept := _unspaced(one))]}
    never = {"prepend_scheme": "never", "add_prefix_space": False}
    return {**part, **{key: value for key, value in never.items() if key in part}}


def _digest(paths: Sequence[Path], settings: dict[str, Any]) -> str:
    total = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for path in paths:
        total.update(path.read_bytes())
    return total.hexdigest()
