"""What became of every row: trained so many times, skipped, truncated, split, dropped, rejected or not reached, in sums that balance.

Sums are taken twice over: by file, from what the reader counted, and by document, from what the loop says that it trained.
"""

import json
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from engine.data.dataset import KEPT, SILENT, SPLIT, TOO_LONG, TRUNCATED, Dataset
from engine.data.loader import MicroBatch
from engine.data.plan import Plan, Step
from engine.errors import BUG, EngineError


class Counts(NamedTuple):
    """What was trained, as whole numbers that ranks and steps add up. `numbers` sums each document's number plus one: it tells
    whether they were the planned documents, not only as many."""

    documents: int = 0
    numbers: int = 0
    tokens: int = 0
    targets: int = 0

    @classmethod
    def of(cls, batches: Iterable[MicroBatch]) -> "Counts":
        """What micro-batches hold, padding not counted."""
        return sum(((len(batch.trained), int((batch.trained + 1).sum()), batch.num_tokens, len(batch.targets)) for batch in batches), cls())

    @classmethod
    def planned(cls, step: Step) -> "Counts":
        """What all ranks together train in a step."""
        return cls(len(step.trained), int((step.trained + 1).sum()), step.num_tokens, step.num_targets)

    def __add__(self, other: Iterable[float]) -> "Counts":
        return Counts(*(one + round(another) for one, another in zip(self, other, strict=True)))


def as_planned(step: Step, counts: Iterable[float]) -> Counts:
    """What all ranks trained in a step, if it is what was planned.

    Raises:
        EngineError: it is not, which is a bug and stops the run before its weights are touched.
    """
    found, planned = Counts() + counts, Counts.planned(step)
    if found != planned:
        raise EngineError("LEDGER-STEP", f"step {step.number} trained {found}, planned {planned}; this is a bug, nothing was updated", BUG)
    return found


PLANNED = {"data", "data.packing", "data.shuffle", "train.seed", "train.global_batch"}  # parts of a run that decide its plan


def go_on(plan: Plan, start: int, state: dict[str, Any], changed: Collection[str]) -> Counts:
    """What was counted before `start`, and the plan told what it skipped; from nothing where steps before were of another plan.

    Args:
        state: a checkpoint's.
        changed: the parts in which its run differs from this one.
    """
    same = not PLANNED & set(changed)
    plan.go_on(start, state["skips"] if same else None)
    return Counts(*state["trained"]) if same else Counts()


FATES = {TRUNCATED: "truncated", SPLIT: "split", TOO_LONG: "too_long", SILENT: "no_target_left"}


def account(dataset: Dataset, times: np.ndarray | None = None) -> dict[str, Any]:
    """The ledger of a dataset.

    Args:
        times: (D,) how often each document was trained; None for rows that are not trained on, as in validation.

    Raises:
        EngineError: the sums do not balance, which is a bug and stops the run.
    """
    row_times = None if times is None else _times_of_rows(dataset, times)
    files, first = [], 0
    for file in dataset.files:
        rows = slice(first, first + file.kept)
        first += file.kept
        fates = dataset.fates[rows]
        entry = {"file": str(file.path), "source": dataset.sources[file.source].name, "sha256": file.index["sha256"], "bytes": file.index["bytes"],
                 "records": file.index["records"], "rejected": file.rejected, "rows": file.kept, "kept": int(np.isin(fates, KEPT).sum()),
                 **{name: int((fates == fate).sum()) for fate, name in FATES.items()}}
        if row_times is not None:
            skipped = np.isin(np.arange(first - file.kept, first), dataset.skip)
            for name, those in (("trained", ~skipped), *([("skipped", skipped)] if skipped.any() else [])):  # rows by how often they were trained
                entry[name] = {str(k): count for k, count in sorted(Counter(row_times[rows][np.isin(fates, KEPT) & those].tolist()).items())}
        _balance(entry, file.index["records"] == file.rejected + file.kept, "records = rejected + rows")
        _balance(entry, entry["rows"] == entry["kept"] + entry["too_long"] + entry["no_target_left"], "rows = kept + too_long + no_target_left")
        told = [*entry.get("trained", {"": entry["kept"]}).values(), *entry.get("skipped", {}).values()]
        _balance(entry, sum(told) == entry["kept"], "kept = Σ trained + Σ skipped")
        files.append(entry)
    found = {"digest": dataset.digest, "files": files, "documents": len(dataset)}
    if times is not None:
        numbers = np.arange(1, len(times) + 1, dtype=np.int64)
        found |= {"documents_trained": int(times.sum()), "numbers_trained": int(times @ numbers),
                  "tokens_trained": int(times @ dataset.lengths.astype(np.int64)), "targets_trained": int(times @ dataset.targets.astype(np.int64))}
    return found


def accounts(rows: Dataset, held_out: Dataset | None, times: np.ndarray, counted: Counts) -> dict[str, Any]:
    """ledger.json: of the rows trained on, compared with the loop's own counts, and of those held out."""
    found = {"train": account(rows, times)}
    compare(found["train"], counted)
    return found | ({"validation": account(held_out)} if held_out else {})


def write(folder: Path, rows: Dataset, held_out: Dataset | None, plan: Plan, step: int, counted: Counts) -> None:
    """After `step` steps of a plan: ledger.json counts every row of every file by its fate; rejected.jsonl names those left out, with the
    reason."""
    found = accounts(rows, held_out, plan.times_trained(step), counted)
    with (folder / "rejected.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(one, ensure_ascii=False) + "\n" for one in left_out(rows, held_out))
    (folder / "ledger.json").write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def compare(account: dict[str, Any], counted: Counts) -> None:
    """Raises EngineError where the loop, summed over its steps and all launches of the run, trained something else."""
    for name, number in zip(("documents_trained", "numbers_trained", "tokens_trained", "targets_trained"), counted, strict=True):
        _balance(account, account[name] == number, f"{name} = {number}, the loop's own count")


def left_out(*datasets: Dataset | None) -> Iterator[dict[str, str]]:
    """Rows that no document holds, and records that are no rows: where and why."""
    for dataset in filter(None, datasets):
        for file in dataset.files:
            yield from ({"row": where, "fate": "rejected", "reason": reason} for where, reason in file.rejects())
        yield from ({"row": dataset.where(row), "fate": "skipped", "reason": "skipped by data.skip"} for row in dataset.skip.tolist())
        for row in np.flatnonzero(~np.isin(dataset.fates, KEPT)).tolist():
            yield {"row": dataset.where(row), "fate": FATES[int(dataset.fates[row])], "reason": dataset.reason_left_out(row)}


def _times_of_rows(dataset: Dataset, times: np.ndarray) -> np.ndarray:
    """(R,) how often each row was trained whole: a split row as often as that of its pieces which was trained least."""
    trained = np.bincount(dataset.row, weights=times, minlength=len(dataset.rows)).astype(np.int64)
    pieces = np.flatnonzero(dataset.fates[dataset.row] == SPLIT)
    if len(pieces):
        names, number = np.unique(dataset.row[pieces].astype(np.int64) << 32 | dataset.start[pieces], return_inverse=True)
        of_pieces = np.bincount(number, weights=times[pieces]).astype(np.int64)
        rows = (names >> 32).astype(np.int64)
        trained[rows] = np.iinfo(np.int64).max
        np.minimum.at(trained, rows, of_pieces)
    return trained


def _balance(entry: dict[str, Any], holds: bool, what: str) -> None:
    if not holds:
        raise EngineError("LEDGER-BALANCE", f"the ledger does not balance: expected {what}, got {entry}; this is a bug, do not trust the run", BUG)
