"""How fast parts of the engine are on this machine, beside what else does the same; the figures come as Markdown.

    python -m engine.bench data --model models/smollm2-135m --rows rows.jsonl

`data`: rows as text -> ids and masks, packed and on disk. Every side does it in a process of its own, in turns, round after round;
medians count. The clock starts when libraries are imported and the tokenizer is loaded, which has a column of its own; the start of
this engine's workers, who load it too, is in its time. Ids and masks of all sides are compared before a figure is printed.

    python -m engine.bench attention

`attention`: packs of documents through every kernel that takes them, forward and backward, on a GPU. Medians on random data; what a
batch's layers share (tiles, masks, offsets) is made before. A causal product counts half, the backward 2.5 times the forward. Outputs
and gradients are compared before a figure is printed.
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
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.arguments import Parser, between
from engine.attention import PACKED, Angles, PackedAttention, refusal, rotate
from engine.config import Data
from engine.data import dataset
from engine.data.plan import Plan
from engine.data.tokenizer import load_tokenizer
from engine.errors import BUG, ENVIRONMENT, EngineError, extra, first_line, run
from engine.rundir import commit, hardware, installed

BATCH = 1000  # rows that the libraries get at once, as datasets.map has it
Ids = tuple[list[int], int]  # a row's ids, and how many of them are not learnt


def main(argv: list[str]) -> None:
    parser = Parser("bench", EXAMPLE, "Figures of this machine, as Markdown. WHAT --help says more.")
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
    sides = [side for side in SIDES if side != "datasets" or installed("datasets")]
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
    machine, (rows, tokens) = hardware(), (int(found["ours"][0][key]) for key in ("rows", "tokens"))
    versions = ", ".join(f"{name} {installed(name)}" for name in ("tokenizers", "transformers", "datasets", "numpy") if installed(name))
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


# ---- attention -----------------------------------------------------------------------------------------------------------

WIDTH = 2048  # heads × head width
APART = 2e-2  # relative L2, of outputs and gradients in 16 bits: a kernel that is off by more computes something else
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def attention(argv: list[str]) -> None:
    parser = Parser("bench attention", "python -m engine.bench attention", "TFLOP/s and memory of attention over packed documents: our kernels, and torch's.")
    parser.add_argument("--mean", type=between(int, 1), nargs="+", default=[150, 300, 1000, 4000], help="tokens of a document, on average [150 300 1000 4000]")
    parser.add_argument("--head-dim", type=between(int, 8, WIDTH), nargs="+", default=[64, 128], help=f"head widths; heads have {WIDTH} together [64 128]")
    parser.add_argument("--group", type=between(int, 1), nargs="+", default=[1, 4, 8], help="query heads that share keys [1 4 8]")
    parser.add_argument("--tokens", type=between(int, 1), default=16384, help="of a pack [16384]")
    parser.add_argument("--rounds", type=between(int, 1), default=20, help="how often each is timed [20]")
    parser.add_argument("--rotary", action="store_true", help="apply rotary embeddings to q and k as well: inside our kernels, before the others")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu tries the benchmark out, no more [cuda]")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise EngineError("BENCH-DEVICE", "bench attention: got no CUDA device, expected one", ENVIRONMENT)
    machine = hardware()
    gpu = f"{torch.cuda.get_device_name()}, capability {torch.cuda.get_device_capability()}" if args.device == "cuda" else machine["cpu"]
    print(f"Packs of {args.tokens:,} tokens in bf16{', rotary embeddings included' * args.rotary}, medians of {args.rounds}. "
          f"{gpu}, torch {torch.__version__}, CUDA {machine['cuda']}, commit {commit()[:7]}.\n\n"
          "| documents' mean | head width | heads | kernel | forward | TFLOP/s | backward | TFLOP/s | both, of varlen's | memory |\n"
          "|---|---|---|---|---|---|---|---|---|---|")
    for width in args.head_dim:
        for group in args.group:
            for mean in args.mean:
                _attention_rows(args, width, WIDTH // width, max(1, WIDTH // width // group), mean)


def _attention_rows(args: argparse.Namespace, width: int, heads: int, kv_heads: int, mean: int) -> None:
    device, draw = torch.device(args.device), torch.Generator().manual_seed(mean)
    lengths = documents(args.tokens, mean, draw)
    q, k, v, grad = (torch.randn(args.tokens, count, width, generator=draw).to(device, torch.bfloat16) for count in (heads, kv_heads, kv_heads, heads))
    turns = torch.rand(args.tokens, width // 2, generator=draw).to(device) * 2 * torch.pi
    angles = (turns.cos().bfloat16(), turns.sin().bfloat16()) if args.rotary else None
    flops = 2 * width * heads * sum(length**2 for length in lengths)  # 4 · n² · C, half of which a causal mask hides
    found: dict[str, dict[str, float] | str] = {}
    expected = None
    for kernel, (_, prepare) in KERNELS.items():
        try:
            attend, leaves = prepare(lengths, device, width, angles), [x.clone().requires_grad_() for x in (q, k, v)]
            result = [out := attend(*leaves), *torch.autograd.grad(out, leaves, grad)]
            result = [x.detach().float() for x in result]
            expected = expected or result
            off = max(float((x - truth).norm() / truth.norm()) for x, truth in zip(result, expected, strict=True))
            if not off <= APART:
                raise EngineError("BENCH-DIFFERENT", f"{kernel} is off by {off:.1e} on documents of {mean}; its figures would mean nothing", BUG)
            found[kernel] = _kernel_figures(attend, leaves, grad, args.rounds, device)
        except (RuntimeError, ImportError, TypeError, ValueError) as error:  # not made for this, or out of memory
            found[kernel] = first_line(error)
    for kernel, figures in found.items():
        row = f"| {mean} | {width} | {heads}/{kv_heads} | {KERNELS[kernel][0]} |"
        if isinstance(figures, str):
            print(f"{row} not possible: {figures} | | | | | |", flush=True)
            continue
        varlen = found["varlen"]
        against = f"{(figures['forward'] + figures['backward']) / (varlen['forward'] + varlen['backward']):.2f} ×" if isinstance(varlen, dict) else ""
        print(f"{row} {figures['forward'] * 1e3:.3f} ms | {flops / figures['forward'] / 1e12:.1f} | {figures['backward'] * 1e3:.3f} ms "
              f"| {2.5 * flops / figures['backward'] / 1e12:.1f} | {against} | {figures['memory'] / 2**20:,.0f} MiB |", flush=True)


def documents(tokens: int, mean: int, draw: torch.Generator) -> list[int]:
    """Lengths that fill a pack: exponentially distributed, as of instruction data most are short."""
    lengths: list[int] = []
    while (left := tokens - sum(lengths)) > 0:
        lengths.append(min(left, 1 + int(torch.empty(()).exponential_(1 / mean, generator=draw))))
    return lengths


def _kernel_figures(attend: Attend, leaves: list[Tensor], grad: Tensor, rounds: int, device: torch.device) -> dict[str, float]:
    """Median seconds of forward and backward, and the bytes that both take beside their inputs."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if on_gpu else 0
    out = attend(*leaves)
    torch.autograd.grad(out, leaves, grad)
    memory = torch.cuda.max_memory_allocated() - before if on_gpu else 0
    out = attend(*leaves)
    return {"forward": _median(lambda: attend(*leaves), rounds, on_gpu), "memory": memory,
            "backward": _median(lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True), rounds, on_gpu)}


def _median(work: Callable[[], Any], rounds: int, on_gpu: bool) -> float:
    seconds = []
    for _ in range(rounds + 3 * on_gpu):  # the first few warm up
        if on_gpu:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            work()
            end.record()
            end.synchronize()
            seconds.append(begin.elapsed_time(end) / 1e3)
        else:
            begin = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds[3 * on_gpu :])


def _packed(path: str) -> Callable[[list[int], torch.device, int, Angles | None], Attend]:
    def prepare(lengths: list[int], device: torch.device, width: int, angles: Angles | None) -> Attend:
        if path in PACKED and (reason := refusal(path, device, torch.bfloat16, width)):
            raise ValueError(reason)
        packed = PackedAttention(lengths, device, path)
        return lambda q, k, v: packed(0, q, k, v, angles=angles)

    return prepare


def _flex(lengths: list[int], device: torch.device, width: int, angles: Angles | None) -> Attend:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if device.type != "cuda":
        raise ValueError("has no backward on CPUs")
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(device)
    mask = create_block_mask(lambda b, h, query, key: (query >= key) & (document[query] == document[key]), None, None, len(document), len(document), device)
    torch._dynamo.reset()  # or after eight shapes it would no longer compile
    compiled = torch.compile(flex_attention, dynamic=False)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in (rotate(q, angles), rotate(k, angles), v))
        return compiled(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])[0].transpose(0, 1)

    return attend


KERNELS = {"sdpa": ("torch SDPA, documents of like length together", _packed("sdpa")), "fused": ("ours, kernels/", _packed("fused")),
           "varlen": ("torch FlashAttention, varlen", _packed("varlen")), "flex": ("FlexAttention, document mask", _flex),
           "dense": ("torch SDPA, dense mask", _packed("reference"))}
SIDES = {"ours": ("this engine, text to packed and cached", ours), "apart": ("transformers, fast and batched, prompt and answer apart", apart),
         "together": ("transformers, prompt and prompt with answer, as TRL", together),
         "datasets": ("the same in datasets.map, a process for each core", mapped), "cached": ("this engine, from its cache", ours)}
BENCHES = {"data": data, "attention": attention}
EXAMPLE = "python -m engine.bench data --model models/smollm2-135m --rows rows.jsonl"

if __name__ == "__main__":
    run(main)
