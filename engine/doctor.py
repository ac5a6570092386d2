"""Whether this machine can train, by how fast a path, and what to change where something is off.

    python -m engine.doctor
    python -m engine.doctor --folder /mnt/runs
    python -m engine.doctor --json

What can be tried is tried: packages are imported, a folder is written to, ranks are started and meet, every GPU computes. Exit code 4 where anything
is wrong. Nothing here imports a package before its probe does, since one that is not there is to be a finding.
"""

import argparse
import json
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

from engine import __version__
from engine.arguments import Parser
from engine.errors import DONE, ENVIRONMENT, PEER, EngineError, first_line, run
from engine.finding import Finding, Probe, of_error, tried

EXAMPLE = "python -m engine.doctor --folder runs"
OLDEST = (3, 10)
NEEDED = ("torch", "numpy", "sentencepiece", "safetensors", "omegaconf", "tensorboard", "tqdm")  # setup.py's
EXTRAS = {"hub": ("tokenizers", "huggingface_hub", "gguf"), "parquet": ("pyarrow",), "gpu": ("nvidia-ml-py",)}
INSTALL = "pip install -c constraints.txt -e "
MEET_S, RANKS_S = 20.0, 200.0  # the ranks' train.timeout_s, to meet they have five times as long; until they are ended
HEADS = SimpleNamespace(num_attention_heads=32, num_key_value_heads=8, head_dim=128, windows=(None,))  # Llama 3's


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = Parser("doctor", EXAMPLE, "Says whether this machine can train, how, and what to change. Takes some seconds and leaves nothing behind.")
    parser.add_argument("--folder", type=Path, default=Path("runs"), metavar="DIR", help="where runs are to lie, whose disk is tried [runs]")
    parser.add_argument("--json", action="store_true", help="the findings as JSON")
    parser.add_argument("--as-rank", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.folder.exists() and not args.folder.is_dir():
        parser.error(f"--folder: got the file {args.folder}, expected a folder")
    return args


def contents(folder: Path) -> dict[str, dict[str, Probe]]:
    """All probes. Ranks come before GPUs, one of which may take a single process: this one, once it has computed there."""
    return {"Python": {"Python": python, "packages": packages},
            "Engine": {"engine": source, "extras": extras},
            "CPU": {"CPU": later("machine", "processor"), "threads": later("machine", "threads"), "memory": later("machine", "memory"),
                    "limits": later("machine", "limits")},
            f"Disk of {folder}": {"disk": later("machine", "disk", folder)},
            "Ranks, started as ./torchrun.sh does": {"variables": variables, "ranks": ranks},
            "GPU": {"driver": later("gpus", "driver"), "devices": later("gpus", "devices"), "together": later("gpus", "together"),
                    "utilisation": later("gpus", "utilisation")},
            "Attention": {"attention": attention_path, "kernels": kernels}}


def later(module: str, name: str, *args: Path) -> Probe:
    """A probe in a module that imports packages."""
    return lambda: getattr(import_module(f"engine.{module}"), name)(*args)


def main(argv: list[str]) -> int:
    args = arguments(argv)
    if args.as_rank:
        return as_rank()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # by way of what removes files and ends ranks
    found: list[tuple[str, Finding]] = []
    for group, probes in contents(args.folder).items():
        if not args.json:
            print(group, flush=True)  # what takes seconds is named before
        for finding in (finding for name, probe in probes.items() for finding in tried(name, probe)):
            found.append((group, finding))
            if not args.json:
                print(finding, flush=True)
        if "torch" not in sys.modules:  # all that follows would say so
            break
    print(json.dumps([{"group": group, "verdict": finding.verdict, **asdict(finding)} for group, finding in found], indent=2) if args.json
          else summary([finding for _, finding in found]))
    return ENVIRONMENT if any(finding.is_wrong for _, finding in found) else DONE


def summary(found: list[Finding]) -> str:
    counts = Counter(finding.verdict for finding in found)
    told = f"{counts['wrong']} wrong, " * (counts["wrong"] > 0) + f"{counts['note']} note{'s' * (counts['note'] != 1)}, {counts['ok']} ok"
    if counts["wrong"]:
        return f"This machine cannot train as it is: {told}"
    from engine import gpus

    return f"This machine can train, on {f'{count} GPU' + 's' * (count > 1) if (count := gpus.count()) else 'its CPU'}: {told}"


def python() -> Iterator[Finding]:
    is_old = sys.version_info < OLDEST
    yield Finding("Python", f"{platform.python_version()}, {platform.platform()}", "install {}.{} or later".format(*OLDEST) if is_old else "", is_old)


def packages() -> Iterator[Finding]:
    there, missing = {}, []
    for name in NEEDED:
        try:
            import_module(name)
            there[name] = version(name)
        except Exception as error:  # of torch's libraries one that cannot be loaded is an OSError
            if isinstance(error, ModuleNotFoundError) and error.name == name:
                missing.append(name)
            else:
                yield Finding(name, f"cannot be imported: {first_line(error)}", f"{INSTALL}.", True)
    if there:
        yield Finding("packages", ", ".join(f"{name} {number}" for name, number in there.items()))
    if missing:
        yield Finding("missing", ", ".join(missing), f"{INSTALL}." + ", then start this again: all else needs torch" * ("torch" in missing), True)


def source() -> Iterator[Finding]:
    from engine import rundir

    yield Finding("engine", f"{__version__}, commit {rundir.commit()[:7]}{rundir.commit()[40:]}")
    for name, numbers in rundir.TESTED.items():
        found = rundir.installed(name) or ""
        if not found.startswith(f"{numbers}."):
            yield Finding(name, f"{found} is not what the tests run with, {numbers}", f"{INSTALL}.")


def extras() -> Iterator[Finding]:
    from engine import gpus, rundir

    for extra, names in EXTRAS.items():
        found = {name: rundir.installed(name) for name in names}
        is_idle = extra == "gpu" and not gpus.traces()
        yield Finding(f"[{extra}]", ", ".join(f"{name} {number or 'is not installed'}" for name, number in found.items()) + ", nor needed here" * is_idle,
                      "" if all(found.values()) or is_idle else f"{INSTALL}'.[{extra}]'")


def variables() -> Iterator[Finding]:
    from engine import distributed

    launched = distributed.variables("TORCHELASTIC_RUN_ID")
    stale = {} if launched else distributed.variables("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    yield Finding("variables", f"{' '.join(f'{name}={value}' for name, value in stale.items()) or 'none'} of a launcher that is gone",
                  f"unset {' '.join(stale)}: python -m engine.train would take itself for one of its ranks" if stale else "")


def ranks() -> Iterator[Finding]:
    """Processes of a launcher's own: none has what this one has done before, and nothing of theirs stays here."""
    from engine import gpus

    size, kind = (gpus.count(), "NCCL") if gpus.count() else (2, "gloo")
    command = [sys.executable, "-m", "engine.launch", "--standalone", "--nproc-per-node", str(size), "-m", "engine.doctor", "--as-rank"]
    begun = time.perf_counter()
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=RANKS_S)
    except subprocess.TimeoutExpired:
        yield Finding("ranks", f"{size} by {kind} did not come to their end within {RANKS_S:g} s", "look at nvidia-smi and dmesg for what holds them", True)
        return
    if done.returncode == DONE:
        did = f"{size} by {kind} started, met, summed right and left" if size > 1 else "one started and left, without another to meet,"
        yield Finding("ranks", f"{did} in {time.perf_counter() - begun:.1f} s")
        return
    said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
    failed = of_error("ranks", next((line for line in said if "ERROR E-" in line), said[-1]))
    change = "look at what it names" if "resumes" in failed.change else failed.change  # nothing was trained
    more = "; NCCL_DEBUG=INFO tells more, NCCL_P2P_DISABLE=1 whether it is what GPUs send each other directly" if size > 1 and kind == "NCCL" else ""
    yield Finding("ranks", failed.found, change + more, True)


def as_rank() -> int:
    """What each rank does: meets the others, sums a megabyte over them, leaves."""
    from engine import distributed

    with distributed.losses_told():
        world, values = distributed.init("auto", MEET_S, deterministic=False), range(1 << 17)
        total = distributed.sum_over_ranks([float(value * (world.rank + 1)) for value in values], world)
        off = sum(one != value * (world.size * (world.size + 1) // 2) for one, value in zip(total, values, strict=True))
        if off:
            raise EngineError("PEER-SUM", f"{off:,} of {len(total):,} sums over {world.size} ranks are wrong; look at what their numbers go through: "
                              "peer access between GPUs, network, memory", PEER)
        distributed.close(world)
    return DONE


def attention_path() -> Iterator[Finding]:
    import torch

    from engine import attention, gpus, precision

    device = torch.device("cuda", 0) if gpus.count() else torch.device("cpu")
    types = precision.choose("bf16", None, device)
    path, why = attention.choose("auto", device, types.arithmetic, HEADS)
    yield Finding("attention", f"{path}, by train.attention=auto for 32/8 heads of 128 in {str(types.arithmetic).removeprefix('torch.')}: {why}")


def kernels() -> Iterator[Finding]:
    """The fused kernels and their compiler, found as torch's cpp_extension finds it, which refuses another major version than torch's."""
    import torch

    from engine import fused_attention, gpus
    from engine.distributed import variables

    cuda, here = torch.version.cuda, gpus.count() > 0
    reason = fused_attention.refusal(torch.device("cuda", 0), torch.bfloat16, HEADS.head_dim, HEADS.windows) if here else "it is for GPUs"
    yield Finding("engine._C", f"optional, not used: {reason}" if reason else "built, train.attention=fused takes it",
                  "pip install --no-build-isolation -v -e . builds it where there is nvcc, or says why not" if here and reason else "")
    if cuda:
        home = next(iter(variables("CUDA_HOME", "CUDA_PATH").values()), None)
        nvcc = shutil.which(f"{home}/bin/nvcc" if home else "nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
        said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, timeout=60).stdout if nvcc else ""
        found = re.search(r"release ((\d+)\.\d+)", said)
        fits = found and found[2] == cuda.partition(".")[0]
        yield Finding("nvcc", f"{found[1] if found else 'none'}, to build it; torch is built for CUDA {cuda}",
                      f"set CUDA_HOME to the folder of CUDA {cuda}, if you want to build it" if here and not fits else "")


if __name__ == "__main__":
    run(main)
