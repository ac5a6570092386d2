"""Text -> ids and back: sentencepiece's `tokenizer.model`, or a `tokenizer.json` through the [hub] extra.

Text is never searched for control tokens: a row that contains "</s>" gets the tokens of these four characters.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from engine.data.formats import Row
from engine.data.template import TEMPLATES, Segment
from engine.errors import EngineError, extra

# What besides the vocabulary a folder may hold that other tools need to use it.
COMPANIONS = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


class Tokenizer(Protocol):
    size: int  # ids lie below it
    prefix: list[int]  # begins every sequence: [bos], or nothing
    eos: int
    digest: str  # SHA-256 of the files that decide ids

    def encode(self, text: str) -> list[int]: ...
    def encode_all(self, texts: Sequence[str]) -> list[list[int]]: ...
    def special(self, name: str) -> int: ...
    def decode(self, ids: Sequence[int]) -> str: ...


def load_tokenizer(folder: Path) -> "Tokenizer":
    settings = _read_json(folder / "tokenizer_config.json")
    if (folder / "tokenizer.json").is_file():
        return JsonTokenizer(folder, settings, _read_json(folder / "generation_config.json"), _read_json(folder / "config.json"))
    if (folder / "tokenizer.model").is_file():
        return SentencePiece(folder, settings)
    raise EngineError("TOKENIZER-FILE", f"{folder}: has neither tokenizer.model nor tokenizer.json")


class SentencePiece:
    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        from sentencepiece import SentencePieceProcessor

        path = folder / "tokenizer.model"
        try:
            self.model = SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise EngineError("TOKENIZER-FILE", f"{path}: cannot be read as a sentencepiece model: {error}") from error
        self.size, self.eos = self.model.get_piece_size(), self.model.eos_id()
        if self.eos < 0:
            raise EngineError("TOKENIZER-EOS", f"{path}: has no end-of-sequence piece; answers could never end")
        begins = settings.get("add_bos_token", True) and self.model.bos_id() >= 0
        self.prefix = [self.model.bos_id()] if begins else []
        self.digest = _digest([path], {"add_bos_token": begins})

    def encode(self, text: str) -> list[int]:
        return self.model.encode(text)

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        return self.model.encode(list(texts))

    def special(self, name: str) -> int:
        number = self.model.piece_to_id(name)
        if number == self.model.unk_id() or not (self.model.is_control(number) or self.model.is_user_defined(number)):
            raise EngineError("TOKENIZER-SPECIAL", f"the template needs the control token {name}, which this tokenizer lacks; set data.template")
        return number

    def decode(self, ids: Sequence[int]) -> str:
        return self.model.decode([int(number) for number in ids if number < self.size])  # embeddings may have more rows than there are pieces


class JsonTokenizer:
    def __init__(self, folder: Path, settings: dict[str, Any], generation: dict[str, Any], config: dict[str, Any]) -> None:
        path = folder / "tokenizer.json"
        tokenizers = extra("tokenizers", path)
        try:
            self.model = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the package raises bare Exception
            raise EngineError("TOKENIZER-FILE", f"{path}: cannot be read: {error}") from error
        self.model.no_truncation()
        self.model.no_padding()
        self.prefix = self.model.encode("", add_special_tokens=True).ids[:1]
        self.model.encode_special_tokens = True
        self.size = self.model.get_vocab_size(with_added_tokens=True)
        self.eos = self._eos(settings, generation, config, path)
        self.prefix = [] if self.prefix == [self.eos] else self.prefix
        self.digest = _digest([path], {"eos": self.eos})

    def _eos(self, settings: dict[str, Any], generation: dict[str, Any], config: dict[str, Any], path: Path) -> int:
        named = settings.get("eos_token")
        named = named.get("content") if isinstance(named, dict) else named
        number = self.model.token_to_id(named) if named else None
        for source in (generation, config):
            listed = source.get("eos_token_id")
            number = number if number is not None else listed[0] if isinstance(listed, list) else listed
        if number is None:
            raise EngineError("TOKENIZER-EOS", f"{path}: no end-of-sequence token is named in tokenizer_config.json, generation_config.json or config.json")
        return number

    def encode(self, text: str) -> list[int]:
        return self.model.encode(text, add_special_tokens=False).ids

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        return [one.ids for one in self.model.encode_batch_fast(list(texts), add_special_tokens=False)]

    def special(self, name: str) -> int:
        number = self.model.token_to_id(name)
        if number is None:
            raise EngineError("TOKENIZER-SPECIAL", f"the template needs the control token {name}, which this tokenizer lacks; set data.template")
        return number

    def decode(self, ids: Sequence[int]) -> str:
        return self.model.decode([int(number) for number in ids], skip_special_tokens=True)


def join(segments: Sequence[Segment], texts: Iterator[list[int]], tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    """Ids of the segments end to end, and which are supervised; `texts` yields the ids of each segment that is text.

    Begins with the tokenizer's prefix. Each segment was tokenised by itself.
    """
    ids, supervised = list(tokenizer.prefix), [False] * len(tokenizer.prefix)
    for segment in segments:
        new = [tokenizer.special(segment.text)] if segment.special else next(texts)
        ids += new
        supervised += [segment.supervised] * len(new)
    return ids, supervised


def prompt_ids(row: Row, template: str, tokenizer: Tokenizer) -> list[int]:
    """What generation starts from: exactly the tokens that stand before the answer in training."""
    prompt = [segment for segment in TEMPLATES[template](row) if not segment.supervised]
    return join(prompt, (tokenizer.encode(segment.text) for segment in prompt if not segment.special), tokenizer)[0]


def copy_tokenizer(source: Path, target: Path) -> None:
    for name in (*COMPANIONS, "generation_config.json"):
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise EngineError("TOKENIZER-FILE", f"{path}: not JSON: {error}") from error


def _digest(paths: Sequence[Path], settings: dict[str, Any]) -> str:
    total = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for path in paths:
        total.update(path.read_bytes())
    return total.hexdigest()
