"""Control tokens added to a model's tokenizer: a folder like the model's own in all but these. Rows for them in the embedding
are weights.add_rows."""

import hashlib
import json
from pathlib import Path
from typing import Any

from engine.data.tokenizer import copy_tokenizer, load_tokenizer, read_json
from engine.errors import EngineError, extra
from engine.publish import built_once


def extend(source: Path, names: list[str], cache: Path) -> Path:
    """The folder of a tokenizer that knows `names` besides what that of `source` knows; `source` itself where there are none.

    Raises:
        EngineError: the tokenizer knows one of them already, or the cache cannot be written.
    """
    if not names:
        return source
    tokenizer = load_tokenizer(source)
    key = hashlib.sha256(json.dumps([tokenizer.digest, names]).encode()).hexdigest()
    return built_once(cache / f"tokenizer-{key[:24]}", lambda folder: _write(source, names, folder))


def _write(source: Path, names: list[str], folder: Path) -> None:
    folder.mkdir()
    tokenizer = load_tokenizer(source)
    copy_tokenizer(source, folder)
    settings = read_json(folder / "tokenizer_config.json")
    settings["eos_token"] = tokenizer.name(tokenizer.eos)  # the folder stands without a config.json
    first = tokenizer.size
    if (path := folder / "tokenizer.json").is_file():
        first = _add_to_json(path, names)
    if (path := folder / "tokenizer.model").is_file():
        _add_to_sentencepiece(path, names)
    decoder = settings.setdefault("added_tokens_decoder", {})
    for number, name in enumerate(names, first):
        decoder[str(number)] = {"content": name, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _add_to_json(path: Path, names: list[str]) -> int:
    tokenizers = extra("tokenizers", path)
    tokenizer: Any = tokenizers.Tokenizer.from_file(str(path))
    _refuse_known([name for name in names if tokenizer.token_to_id(name) is not None], path)
    tokenizer.add_special_tokens([tokenizers.AddedToken(name, special=True, normalized=False) for name in names])
    tokenizer.save(str(path))
    return tokenizer.token_to_id(names[0])


def _add_to_sentencepiece(path: Path, names: list[str]) -> None:
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    model = ModelProto.FromString(path.read_bytes())
    known = {piece.piece for piece in model.pieces}
    _refuse_known([name for name in names if name in known], path)
    for name in names:
        model.pieces.add(piece=name, score=0.0, type=ModelProto.SentencePiece.CONTROL)
    model.trainer_spec.vocab_size = len(model.pieces)
    path.write_bytes(model.SerializeToString())


def _refuse_known(known: list[str], path: Path) -> None:
    if known:
        raise EngineError("TOKENIZER-ADDED", f"model.add_tokens: got {', '.join(known)}, which {path.name} has already; leave them out")
