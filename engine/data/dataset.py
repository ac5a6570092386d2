"""Rows as token ids: tokenised once, kept in memory-mapped arrays under a cache keyed by content, every row accounted for.

    tokens.npy      int32, all rows end to end        supervised.npy  bool, beside it
    offsets.npy     int64, rows + 1                   lines.npy       int64, the row's line in the file
    ledger.json     what became of every line
"""

import hashlib
import json
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from engine.config import Data
from engine.data.formats import Row, read_rows
from engine.data.template import TEMPLATES
from engine.data.tokenizer import Tokenizer, end_of, tokenise
from engine.errors import EngineError
from engine.publish import built_once

VERSION = 2  # of the arrays' meaning; a change makes old caches strangers
BATCH = 1024  # rows tokenised in one call


@dataclass(frozen=True)
class Dataset:
    """`digest` names content and tokenisation; `ledger` counts rows by fate and lists those left out."""

    path: Path
    tokens: np.ndarray
    supervised: np.ndarray
    offsets: np.ndarray
    lines: np.ndarray
    ledger: dict[str, Any]
    digest: str

    def __len__(self) -> int:
        return len(self.lines)

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    @cached_property
    def source(self) -> np.ndarray:
        return np.zeros(len(self), dtype=np.int16)

    def read(self, document: int) -> tuple[np.ndarray, np.ndarray]:
        """Its ids, and which of them are supervised."""
        where = slice(self.offsets[document], self.offsets[document + 1])
        return self.tokens[where], self.supervised[where]

    @cached_property
    def targets(self) -> np.ndarray:
        return self.targets_per_row()

    def targets_per_row(self) -> np.ndarray:
        """Supervised tokens of each row. A row's first token is never predicted, and templates never supervise it."""
        counts = np.concatenate([[0], np.cumsum(self.supervised, dtype=np.int64)])
        return counts[self.offsets[1:]] - counts[self.offsets[:-1]]


def load_dataset(path: Path, tokenizer: Tokenizer, template: str, max_length: int, too_long: str, cache: Path, system: str | None = None) -> Dataset:
    """The dataset of a JSONL file, from the cache where it is there. One process of a node builds it, the others wait.

    Args:
        too_long: what to do with a row over max_length: "error", "truncate" (the answer's end is cut) or "drop".
    """
    content = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            content.update(block)
    key = {"version": VERSION, "content": content.hexdigest(), "tokenizer": tokenizer.digest, "template": template,
           "system": system, "max_length": max_length, "too_long": too_long}
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    folder = built_once(cache / digest[:24], lambda building: _build(building, path, tokenizer, template, max_length, too_long, system))
    arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("tokens", "supervised", "offsets", "lines")}
    return Dataset(path, **arrays, ledger=json.loads((folder / "ledger.json").read_text(encoding="utf-8")), digest=digest)


def _build(folder: Path, path: Path, tokenizer: Tokenizer, template: str, max_length: int, too_long: str, system: str | None) -> None:
    tokens, supervised, offsets, lines = [], [], [0], []
    ledger: dict[str, Any] = {"file": path.name, "rows": 0, "kept": 0, "truncated": 0, "dropped": 0, "rejected": []}
    rows = list(tqdm(read_rows(path), desc=f"reading {path.name}", unit=" rows", disable=not sys.stderr.isatty(), leave=False))
    progress = tqdm(total=len(rows), desc=f"tokenising {path.name}", unit=" rows", disable=not sys.stderr.isatty(), leave=False)
    for start in range(0, len(rows), BATCH):
        batch = rows[start : start + BATCH]
        for row, (ids, mask) in zip(batch, _tokenise(batch, tokenizer, template, system), strict=True):
            ledger["rows"] += 1
            reason, cut = None, len(ids) > max_length
            if cut and too_long == "error":
                raise EngineError("DATA-LENGTH", f"{path}:{row.line}: has {len(ids)} tokens, data.max_length is {max_length}; "
                                  "raise it, or set data.too_long to truncate or drop")
            if cut and too_long == "drop":
                reason = f"{len(ids)} tokens, max_length is {max_length}"
            elif not any(mask[:max_length]):
                reason = f"no supervised token within max_length {max_length}"
            ids, mask = ids[:max_length], mask[:max_length]
            if reason is not None:
                ledger["dropped"] += 1
                ledger["rejected"].append({"line": row.line, "reason": reason})
                continue
            ledger["truncated"] += cut
            tokens.append(np.asarray(ids, dtype=np.int32))
            supervised.append(np.asarray(mask, dtype=bool))
            offsets.append(offsets[-1] + len(ids))
            lines.append(row.line)
        progress.update(len(batch))
    progress.close()
    ledger["kept"] = len(lines)
    if not lines:
        raise EngineError("DATA-EMPTY", f"{path}: none of {ledger['rows']} rows can be trained on; the first: line "
                          f"{ledger['rejected'][0]['line']}, {ledger['rejected'][0]['reason']}")
    folder.mkdir()
    np.save(folder / "tokens.npy", np.concatenate(tokens))
    np.save(folder / "supervised.npy", np.concatenate(supervised))
    np.save(folder / "offsets.npy", np.asarray(offsets, dtype=np.int64))
    np.save(folder / "lines.npy", np.asarray(lines, dtype=np.int64))
    (folder / "ledger.json").write_text(json.dumps(ledger), encoding="utf-8")


def _tokenise(rows: list[Row], tokenizer: Tokenizer, template: str, system: str | None) -> list[tuple[list[int], list[bool]]]:
    """Ids and mask of each row, the token that ends the answer included and supervised."""
    write, end = TEMPLATES[template], end_of(template, tokenizer)
    return [(ids + [end], mask + [True]) for ids, mask in tokenise([write(row, system) for row in rows], write.chat, tokenizer)]


def load_both(cfg: Data, tokenizer: Tokenizer) -> tuple[Dataset, Dataset | None]:
    """Training rows, and validation rows where the recipe names them."""
    return tuple(load_dataset(Path(path), tokenizer, cfg.template, cfg.max_length, cfg.too_long, Path(cfg.cache), cfg.system) if path else None
                 for path in (cfg.train, cfg.validation))


def check_fit(dataset: Dataset, tokenizer: Tokenizer, model: dict[str, Any], max_length: int, added: int = 0) -> None:
    """Raises EngineError where data or tokenizer go beyond a model, given its config.json: ids past the embedding, lengths
    past the positions. The last `added` of the tokenizer's ids get rows of their own."""
    highest = int(dataset.tokens.max())
    if tokenizer.size - added > model["vocab_size"] or highest >= max(model["vocab_size"], tokenizer.size):
        raise EngineError("DATA-VOCABULARY", f"the tokenizer has {tokenizer.size} ids, the model's vocab_size is {model['vocab_size']}, the data's "
                          f"highest id {highest}; use the tokenizer that belongs to the model")
    positions = model.get("max_position_embeddings", 2048)
    if max_length > positions:
        raise EngineError("DATA-POSITIONS", f"data.max_length is {max_length}, the model has {positions} positions (max_position_embeddings); lower it")
