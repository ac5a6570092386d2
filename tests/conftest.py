"""What the tests share: a tiny model with real parts, ragged rows, and a way to run training on several ranks.

Ranks are forked from the test process, which has imported all that they need: four gloo ranks start in a fraction of a second.
"""

import ctypes
import faulthandler
import gc
import itertools
import json
import os
import resource
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import numpy as np
import pytest
import torch
import torch.distributed.optim
import torch.utils.tensorboard

torch.set_num_threads(1)  # no pool of threads, so forking is safe

from forks import forked

from engine import blackbox, checkpoint, evaluate, export, report, rundir, saver, stragglers, train  # noqa: F401
from engine.config import Data
from engine.data import dataset
from engine.data.formats import Message, Row
from engine.errors import EngineError
from engine.metrics import MEASURED

# With other versions than the pinned ones, as on a GPU's machine, each run would say so, among the warnings that tests count.
PINNED = dict(rundir.TESTED)
rundir.TESTED.update({name: ".".join(rundir.installed(name).split(".")[:2]) for name in rundir.TESTED})

NO_GPU = "needs a CUDA device: ./tests/run.sh --cuda on a machine that has one"
ROOT = Path(__file__).resolve().parent.parent
WORDS = "red blue green cat dog fish apple pear one two three runs sleeps eats 红 蓝 猫 狗 跑".split()
TINY = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "tie_word_embeddings": True, "initializer_range": 0.1, "hidden_act": "silu"}


def ragged_rows(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Rows whose prompts and answers differ in length many times over; every third has no input."""
    draw = torch.Generator().manual_seed(seed)

    def words(longest: int) -> str:
        length = int(torch.randint(1, longest + 1, (1,), generator=draw))
        return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (length,), generator=draw).tolist())

    return [{"instruction": words(4), "input": "" if i % 3 == 0 else words(6), "output": words(12)} for i in range(count)]


def a_row(instruction: str, input: str = "", output: str = "", line: int = 1) -> Row:
    """The row of a record in alpaca's form, an empty answer allowed."""
    return Row(line, (Message("user", instruction, input), Message("assistant", output)))


def lists(found: tuple[np.ndarray, np.ndarray]) -> list[list[int]]:
    """The ids of each text, of what a tokenizer's `encode_all` returns."""
    ids, sizes = found
    return [part.tolist() for part in np.split(ids, np.cumsum(sizes)[:-1])[: len(sizes)]]


def write_rows(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def loaded(folder: Path, step: int) -> checkpoint.Snapshot:
    """A checkpoint's tensors, all in memory."""
    with checkpoint.opened(folder, step) as saved:
        return checkpoint.Snapshot(dict(saved.model), dict(saved.optimizer), saved.state)


def steps(run: Path) -> list[dict[str, float]]:
    """metrics.jsonl, a dict for each step."""
    return [json.loads(line, parse_constant=pytest.fail) for line in (run / "metrics.jsonl").read_text().splitlines()]  # JSON has no Infinity


def repeatable(run: Path) -> list[dict[str, float]]:
    """The same without what the clock and the machine decide."""
    return [{key: value for key, value in step.items() if not key.startswith(MEASURED)} for step in steps(run)]


def flip(path: Path) -> None:
    """One bit near the end of a file, in its last tensor."""
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(data)


def held(what: Callable[[], None], seconds: float, megabytes: float) -> None:
    """Runs `what` in a fork; fails with what it raised, or where it takes more time of a processor or more memory than that."""

    def measured() -> None:
        resource.setrlimit(resource.RLIMIT_CPU, (int(seconds) + 10,) * 2)  # what would never end does
        began, start = time.process_time(), new_peak()
        what()
        took, grown = time.process_time() - began, peak_megabytes() - start
        assert took <= seconds and grown <= megabytes, f"it took {took:.2f} s and {grown:.0f} MB"

    forked(measured)


def new_peak() -> float:
    """Lets the peak of resident memory begin anew, for a fork has its parent's, and what the parent has freed; what it begins with, in MB."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return peak_megabytes()


def peak_megabytes() -> float:
    line = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


class Rows(dataset.Dataset):
    """A dataset with the ids of all documents end to end beside it, as tests like to look at them."""

    @cached_property
    def flat(self) -> tuple[np.ndarray, np.ndarray]:
        read = [self.read(document) for document in range(len(self))]
        return np.concatenate([ids for ids, _ in read]), np.concatenate([mask for _, mask in read])

    @property
    def tokens(self) -> np.ndarray:
        return self.flat[0]

    @property
    def supervised(self) -> np.ndarray:
        return self.flat[1]

    @property
    def offsets(self) -> np.ndarray:
        return np.concatenate([[0], np.cumsum(self.lengths)])


def load_dataset(path: Path, tokenizer, template: str, max_length: int, too_long: str, cache: Path, system: str | None = None, **options) -> Rows:
    cfg = Data(train=str(path), template=template, max_length=max_length, too_long=too_long, cache=str(cache), system=system, **options)
    return Rows(**vars(dataset.load(cfg, "train", tokenizer)))


def with_weights(folder: Path, config: dict[str, Any]) -> Path:
    """A folder that has a tokenizer becomes a model's, with random weights."""
    from engine.models import weights

    (folder / "config.json").write_text(json.dumps(config))
    model = weights.build(folder, "random", 3, torch.float32, torch.float32, torch.device("cpu"))
    weights.write_folder(folder, config, weights.untied(model).items())
    return folder


def like(tiny: Path, folder: Path, **config: Any) -> Path:
    """A model folder with `tiny`'s tokenizer, and with other fields of config.json than it has, of which None are left out."""
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes((tiny / "tokenizer.model").read_bytes())
    fields = {**json.loads((tiny / "config.json").read_text()), **config}
    return with_weights(folder, {name: value for name, value in fields.items() if value is not None})


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A model folder: 3-layer Llama with grouped queries, random weights on disk, a sentencepiece tokenizer."""
    import sentencepiece

    folder = tmp_path_factory.mktemp("models") / "tiny"
    folder.mkdir()
    text = folder.parent / "text.txt"
    text.write_text("\n".join(" ".join(row.values()) for row in ragged_rows(300)) + "\n### Instruction:\n### Input:\n### Response:\n" * 20)
    rules = folder.parent / "rules.tsv"
    rules.write_text("A\t20\n")  # a line's end is a space, as in the default's 240 KB of rules, which the package gguf reads byte by byte for seconds
    sentencepiece.SentencePieceTrainer.train(input=str(text), model_prefix=str(folder / "tokenizer"), vocab_size=340, byte_fallback=True,
                                             model_type="bpe", normalization_rule_tsv=str(rules), minloglevel=2, num_threads=1)
    (folder / "tokenizer.vocab").unlink()
    return with_weights(folder, {**TINY, "vocab_size": 340})


@pytest.fixture
def wide(tiny: Path, tmp_path: Path) -> Path:
    """A model folder with heads as the fused kernels take them."""
    return like(tiny, tmp_path / "wide", head_dim=64, num_hidden_layers=2)


@pytest.fixture
def recipe(tiny: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """Arguments for `train.main`: small defaults in a fresh folder, `key=value` strings override them."""
    write_rows(tmp_path / "rows.jsonl", ragged_rows(23))
    (tmp_path / "recipe.yaml").write_text("{}")

    def arguments(*overrides: str, name: str = "run") -> list[str]:
        base = {"run.folder": tmp_path / "runs", "run.name": name, "data.cache": tmp_path / "cache", "model.path": tiny,
                "data.train": tmp_path / "rows.jsonl", "data.max_length": 64, "data.packing": "false", "optim.lr": "1e-2",
                "train.global_batch": 8, "train.micro_batch": 2, "train.device": "cpu", "evaluate.samples": 0, "log.every_steps": 1000}
        base |= dict(override.split("=", 1) for override in overrides)
        return [str(tmp_path / "recipe.yaml"), *(f"{key}={value}" for key, value in base.items())]

    return arguments


def pytest_configure(config: pytest.Config) -> None:
    """GPUs are there for the tests marked `cuda` alone: all others fork, and compute on CPUs, as on a machine without.

    The first backward of a process settles whether autograd has threads for devices, after which no fork of it may compute gradients;
    such devices as torch.compile makes up count as well.
    """
    if config.option.markexpr.strip() != "cuda":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        torch.ones(1, requires_grad=True).backward()


def pytest_collection_finish() -> None:
    gc.freeze()  # forks share these pages as long as nobody looks for garbage in them


PORTS = itertools.count(10_000 + os.getpid() * 100 % 20_000)  # below those that the system hands out: two who ask it may be told the same


def free_port() -> int:
    """One on which nobody listens, another each time."""
    while True:
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port := next(PORTS)))
            return port


class Ranks:
    """Forked processes that each call `main` as one rank of `size`; their output goes to `log`."""

    def __init__(self, size: int, main: Callable[[], int | None], log: Path) -> None:
        self.log = log
        port = free_port()
        self.pids = [self._fork(rank, size, port, main) for rank in range(size)]
        self.codes: list[int] | None = None

    def _fork(self, rank: int, size: int, port: int, main: Callable[[], int | None]) -> int:
        pid = os.fork()
        if pid:
            return pid
        code = 70
        try:
            output = os.open(self.log, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
            os.dup2(output, 1)
            os.dup2(output, 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
            faulthandler.dump_traceback_later(60, file=sys.stderr)  # where a rank that hangs is
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            code = main() or 0
        except BaseException as error:  # held until the process is gone, see errors.run
            if isinstance(error, EngineError):
                print(error)
                code = error.exit_code
            else:
                traceback.print_exc()
            sys.stdout.flush()
            os._exit(code)
        sys.stdout.flush()
        os._exit(code)

    def wait(self, timeout_s: float = 120) -> list[int]:
        """Exit codes by rank; negative for a signal."""
        end, codes = time.monotonic() + timeout_s, {}
        while len(codes) < len(self.pids):
            for pid in self.pids:
                if pid not in codes and (found := os.waitpid(pid, os.WNOHANG))[0]:
                    codes[pid] = os.waitstatus_to_exitcode(found[1])
            if time.monotonic() > end:
                self.kill()
                raise AssertionError(f"ranks hang:\n{self.log.read_text()}")
            time.sleep(0.005)
        return [codes[pid] for pid in self.pids]

    def kill(self) -> None:
        for pid in self.pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[Callable[..., Ranks]]:
    """`ranks(size, arguments_or_function)` starts ranks; what is left of them at the end of the test is killed."""
    started: list[Ranks] = []

    def start(size: int, what: list[str] | Callable[[], int | None]) -> Ranks:
        started.append(Ranks(size, (lambda: train.main(what)) if isinstance(what, list) else what, tmp_path / f"ranks-{len(started)}.log"))
        return started[-1]

    yield start
    for one in started:
        one.kill()


@pytest.fixture
def trained(ranks) -> Callable[[int, list[str]], None]:
    """`trained(size, arguments)` runs training to its end and asserts that every rank left with 0."""

    def run(size: int, arguments: list[str]) -> None:
        started = ranks(size, arguments)
        codes = started.wait()
        assert codes == [0] * size, f"exit codes {codes}\n{started.log.read_text()}"

    return run
