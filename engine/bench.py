"""How fast parts of the engine are on this machine, beside what else does the same; the figures come as Markdown.

    python -m engine.bench data --model models/smollm2-135m --rows shared/data/gsm8k_train.jsonl

`data`: rows as text -> ids and masks, packed and on disk. Every side does it in a process of its own, in turns, round after round;
medians count. The clock starts when libraries are imported and the tokenizer is loaded, which has a column of its own; the start of
this engine's workers, who load it too, is in its time. Ids and masks of all sides are compared before a figure is printed.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from engine.arguments import Parser, between
from engine.config import Data
from engine.data import dataset
from engine.data.plan import Plan
from engine.data.tokenizer import load_tokenizer
from engine.errors import BUG, EngineError, extra, run

BATCH = 1000  # rows that the libraries get at once, as datasets.map has it
Ids = tuple[list[int], int]  # a row's ids, and how many of them are not learnt


def main(argv: list[str]) -> None:
    parser = Parser("bench", EXAMPLE, "Figures of this machine, as Markdown. WHAT --help tells more.")
    parser.add_argument("what", choices=BENCHES, metavar="WHAT", help=f"one of: {', '.join(BENCHES)}")
    BENCHES[parser.parse_args(argv[:1]).what](argv[1:])


# ---- data ----------------------------------------------------------------------------------------------------------------


def data(argv: list[str]) -> None:
    parser = Parser("bench data", EXAMPLE, "Rows a second from text to packed ids on disk: this engine, transformers, datasets.")
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="folder with a tokenizer.json and the config.json beside it")
    parser.add_argument("--rows", type=Path, required=True, metavar="FILE", help='JSON Lines of {"instruction", "input", "output"}')
    parser.add_argument("--rounds", type=between(int, 1), default=5, help="how often each side is timed [5]")
    parser.add_argument("--max-length", type=between(int, 2), default=2048, help="tokens of a sequence [2048]")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)  # what this command starts itself with, and a folder to write to
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.side:
        print(json.dumps(SIDES[args.side][1](args)))
        return
    if not (args.model / "tokenizer.json").is_file():
        raise EngineError("BENCH-MODEL", f"{args.model}: has no tokenizer.json, which the other sides need")
    extra("transformers", "engine.bench data", "dev")
    sides = [side for side in SIDES if side != "datasets" or _version("datasets")]
    found: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(args.rounds):
            for side in sides:
                found[side].append(_timed(args, side, Path(folder) / ("ours" if side == "cached" else side) / str(number)))
                print(f"round {number + 1} of {args.rounds}, {side}: {found[side][-1]['seconds']:.2f} s", file=sys.stderr)
        differing = {side: _differing(Path(folder) / "ours/0", Path(folder) / side / "0") for side in sides if side not in ("ours", "cached")}
        if differing["apart"]:
            raise EngineError("BENCH-DIFFERENT", f"{differing['apart']:,} rows have other ids or masks in transformers; the figures would mean nothing", BUG)
    _print(args, found, differing)


def _timed(args: argparse.Namespace, side: str, folder: Path) -> dict[str, float]:
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "engine.bench", "data", "--side", side, "--model", str(args.model.absolute()), "--rows", str(args.rows.absolute()),
               "--max-length", str(args.max_length), "--folder", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    if done.returncode:
        raise EngineError("BENCH-SIDE", f"{side}: ended with exit code {done.returncode}: {done.stderr.strip()[-2000:]}", done.returncode)
    return json.loads(done.stdout.splitlines()[-1])


def _print(args: argparse.Namespace, found: dict[str, list[dict[str, float]]], differing: dict[str, int]) -> None:
    from engine.rundir import commit, hardware

    machine, (rows, tokens) = hardware(), (int(found["ours"][0][key]) for key in ("rows", "tokens"))
    versions = ", ".join(f"{name} {_version(name)}" for name in ("tokenizers", "transformers", "datasets", "numpy") if _version(name))
    median = {side: {key: statistics.median(one[key] for one in rounds) for key in ("seconds", "cpu_seconds", "loading")} for side, rounds in found.items()}
    print(f"{rows:,} rows, {tokens:,} tokens of {args.rows.name} with the tokenizer of {args.model.name}; {args.rounds} rounds, medians (least to most).\n")
    print("| side | rows/s | against transformers | seconds | CPU seconds | tokenizer loads in |\n|---|---|---|---|---|---|")
    for side, rounds in found.items():
        seconds, times = median[side]["seconds"], [one["seconds"] for one in rounds]
        ratio = f"{median['apart']['seconds'] / seconds:.3g} ×"
        note = f" ({differing[side]:,} rows have other ids at the border)" if differing.get(side) else ""
        print(f"| {SIDES[side][0]}{note} | {rows / seconds:,.0f} | {ratio} | {seconds:.3g} ({min(times):.3g} to {max(times):.3g}) "
              f"| {median[side]['cpu_seconds']:.2f} | {median[side]['loading']:.2f} s |")
    print(f"\n{machine['cpu']}, {machine['cores']} cores; Python {platform.python_version()}, {versions}; commit {commit()[:7]}.\n\n"
          f"    python -m engine.bench data --model {args.model} --rows {args.rows} --rounds {args.rounds}")


def ours(args: argparse.Namespace) -> dict[str, float]:
    clock = _clock()
    tokenizer = load_tokenizer(args.model)
    loading, clock = clock()["seconds"], _clock()
    rows = dataset.load(Data(train=str(args.rows), max_length=args.max_length, cache=str(args.folder / "cache")), "train", tokenizer)
    Plan(rows.lengths, rows.targets, args.max_length, 64, True, True, 0, 1)
    found = {**clock(), "loading": loading}
    ids, masks = zip(*map(rows.read, range(len(rows))), strict=True)
    _save(args.folder, np.concatenate(ids), np.concatenate(masks), rows.lengths)
    return {**found, "rows": len(rows), "tokens": int(rows.lengths.sum())}


def apart(args: argparse.Namespace) -> dict[str, float]:
    return _by_transformers(args, _apart)


def together(args: argparse.Namespace) -> dict[str, float]:
    return _by_transformers(args, _together)


def _by_transformers(args: argparse.Namespace, encode: Callable[[Any, list[dict[str, str]]], list[Ids]]) -> dict[str, float]:
    theirs, begin, end, loading = _theirs(args)
    clock = _clock()
    ids: list[np.ndarray] = []
    masks: list[np.ndarray] = []
    for batch in _records(args.rows):
        for row, before in encode(theirs, batch):
            ids.append(np.array([*begin, *row, end], np.int32))
            masks.append(np.arange(len(ids[-1])) >= before + len(begin))
    lengths = np.array(list(map(len, ids)), np.int32)
    firsts = _pack(lengths.tolist(), args.max_length)
    np.save(args.folder / "firsts.npy", firsts)
    _save(args.folder, np.concatenate(ids), np.concatenate(masks), lengths)
    return {**clock(), "loading": loading}


def mapped(args: argparse.Namespace) -> dict[str, float]:
    datasets = extra("datasets", "engine.bench data", "dev")
    theirs, begin, end, loading = _theirs(args)

    def encode(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        found = _together(theirs, [dict(zip(batch, row, strict=True)) for row in zip(*batch.values(), strict=True)])
        return {"ids": [[*begin, *row, end] for row, _ in found], "masks": [[0] * (len(begin) + n) + [1] * (len(row) + 1 - n) for row, n in found]}

    clock = _clock()
    rows = datasets.load_dataset("json", data_files=str(args.rows), split="train", cache_dir=str(args.folder / "cache"))
    rows = rows.map(encode, batched=True, num_proc=os.cpu_count(), remove_columns=rows.column_names).with_format("numpy")
    lengths = np.array([len(ids) for batch in rows.iter(BATCH) for ids in batch["ids"]], np.int32)
    np.save(args.folder / "firsts.npy", _pack(lengths.tolist(), args.max_length))
    found = {**clock(), "loading": loading}
    _save(args.folder, np.concatenate([ids for batch in rows.iter(BATCH) for ids in batch["ids"]]),
          np.concatenate([masks for batch in rows.iter(BATCH) for masks in batch["masks"]]), lengths)
    return found


def _apart(theirs: Any, batch: list[dict[str, str]]) -> list[Ids]:
    prompts = theirs([_prompt(row) for row in batch], add_special_tokens=False)["input_ids"]
    answers = theirs([row["output"] for row in batch], add_special_tokens=False)["input_ids"]
    return [(prompt + answer, len(prompt)) for prompt, answer in zip(prompts, answers, strict=True)]


def _together(theirs: Any, batch: list[dict[str, str]]) -> list[Ids]:
    """As TRL: prompts, and prompts with their answers."""
    prompts = [_prompt(row) for row in batch]
    before = theirs(prompts, add_special_tokens=False)["input_ids"]
    whole = theirs([prompt + row["output"] for prompt, row in zip(prompts, batch, strict=True)], add_special_tokens=False)["input_ids"]
    return [(row, len(prompt)) for row, prompt in zip(whole, before, strict=True)]


def _theirs(args: argparse.Namespace) -> tuple[Any, list[int], int, float]:
    """The library's fast tokenizer, what begins a sequence and what ends it, and the seconds that the first took to load."""
    own = load_tokenizer(args.model)
    transformers = extra("transformers", "engine.bench data", "dev")
    load, clock = transformers.AutoTokenizer.from_pretrained, _clock()
    return load(args.model, split_special_tokens=True), own.prefix, own.eos, clock()["seconds"]


def _records(path: Path) -> Iterator[list[dict[str, str]]]:
    batch = []
    with path.open(encoding="utf-8") as file:
        for line in file:
            batch.append(json.loads(line))
            if len(batch) == BATCH:
                yield batch
                batch = []
    if batch:
        yield batch


def _prompt(row: dict[str, str]) -> str:
    """What the template alpaca writes before the answer."""
    given = f"### Input:\n{row['input']}\n\n" if (row.get("input") or "").strip() else ""
    return f"### Instruction:\n{row['instruction']}\n\n{given}### Response:\n"


def _pack(lengths: list[int], room: int) -> list[int]:
    """The first row of each sequence, filled in passing: the least that packing can cost."""
    firsts, left = [], 0
    for number, length in enumerate(lengths):
        if length > left:
            firsts.append(number)
            left = room
        left -= length
    return firsts


def _clock() -> Callable[[], dict[str, float]]:
    """Seconds from now on, and seconds of all cores: this process's and those of processes that it has waited for."""
    start, used = time.perf_counter(), sum(os.times()[:4])
    return lambda: {"seconds": time.perf_counter() - start, "cpu_seconds": sum(os.times()[:4]) - used}


def _save(folder: Path, ids: np.ndarray, masks: np.ndarray, lengths: np.ndarray) -> None:
    for name, array in (("ids", ids), ("masks", masks.astype(bool)), ("lengths", lengths)):
        np.save(folder / f"{name}.npy", array)


def _differing(one: Path, other: Path) -> int:
    """Rows that differ in ids or mask."""
    parts = []
    for folder in (one, other):
        ids, masks, lengths = (np.load(folder / f"{name}.npy") for name in ("ids", "masks", "lengths"))
        ends = np.cumsum(lengths)[:-1]
        parts.append(list(zip(np.split(ids, ends), np.split(masks, ends), strict=True)))
    return sum(not all(map(np.array_equal, *rows)) for rows in zip(*parts, strict=True))


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


SIDES = {"ours": ("this engine, text to packed and cached", ours), "apart": ("transformers, fast and batched, prompt and answer apart", apart),
         "together": ("transformers, prompt and prompt with answer, as TRL", together),
         "datasets": ("the same in datasets.map, a process for each core", mapped), "cached": ("this engine, from its cache", ours)}
BENCHES = {"data": data}
EXAMPLE = "python -m engine.bench data --model models/smollm2-135m --rows rows.jsonl"

if __name__ == "__main__":
    run(main)
