"""NVIDIA's GPUs: whether torch can use those that are here, why not, and that they compute right."""

import ctypes
import re
import shutil
import subprocess
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from itertools import permutations
from pathlib import Path

import torch

from engine import metrics
from engine.distributed import variables
from engine.errors import first_line
from engine.finding import Finding, gb, read, tried

DEV, DRIVER, LIBRARY = Path("/dev"), Path("/proc/driver/nvidia/version"), "libcuda.so.1"
TOLD = ("Driver Version", "CUDA Version", "Attached GPUs")  # by nvidia-smi; the second is the newest that the driver supports
PRODUCT_LIMIT = 0.01  # of the error of a product, relative to its size: rounding to 16 bits is below a third of it


def count() -> int:
    """How many torch can use. Nothing is computed on any."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # `_unusable` tells why there is none
        return torch.cuda.device_count() if torch.cuda.is_available() else 0


def traces() -> list[str]:
    """What shows that there is a GPU, or its driver, whether or not torch can use it."""
    return [str(path) for path in (shutil.which("nvidia-smi"), DRIVER, *_nodes()) if path and Path(path).exists()]


def driver() -> Iterator[Finding]:
    built = f"torch {torch.__version__} is built {f'for CUDA {torch.version.cuda}' if torch.version.cuda else 'without CUDA'}"
    if not traces():
        yield Finding("GPU", f"none with NVIDIA's driver is here, so training takes the CPU; {built}")
        return
    told = _drivers_word()
    if not count():
        why, change = _unusable(told)
        yield Finding("GPU", f"torch cannot use what is here ({', '.join(traces())}): {why}", change, True)
        return
    yield Finding("driver", f"{told.get('Driver Version', 'of a version not known')}, for CUDA up to {told.get('CUDA Version', '?')}; {built}, NCCL "
                  f"{'.'.join(map(str, torch.cuda.nccl.version()))}, cuDNN {torch.backends.cudnn.version()}")


def _nodes() -> list[Path]:
    return sorted(DEV.glob("nvidia[0-9]*"))


def _drivers_word() -> dict[str, str]:
    """Those of TOLD that can be had, from its own files, for a container may lack nvidia-smi; and why nvidia-smi failed if it did."""
    found, number = {}, ctypes.c_int()
    if kernel := re.search(r"Kernel Module.*?\s(\d+\.[\d.]+)", read(DRIVER)):
        found["Driver Version"] = kernel[1]
    with suppress(OSError, subprocess.SubprocessError):
        asked = subprocess.run(["nvidia-smi", "-q"], capture_output=True, text=True, errors="replace", timeout=60)
        found |= dict(re.findall(rf"^({'|'.join(TOLD)}) *: (\S+)", asked.stdout, re.MULTILINE))
        if asked.returncode:
            found["failed"] = f"nvidia-smi says: {asked.stdout} {asked.stderr}"
    with suppress(OSError, AttributeError):
        if ctypes.CDLL(LIBRARY).cuDriverGetVersion(ctypes.byref(number)) == 0:
            found["CUDA Version"] = f"{number.value // 1000}.{number.value % 1000 // 10}"
    return found


def _unusable(told: dict[str, str]) -> tuple[str, str]:
    """Why torch can use none of the GPUs, and what to change."""
    built, version, supported = torch.version.cuda, told.get("Driver Version", ""), told.get("CUDA Version")
    there = int(told.get("Attached GPUs", 0)) or len(_nodes())
    visible = variables("CUDA_VISIBLE_DEVICES").get("CUDA_VISIBLE_DEVICES", "0")
    first = re.match(r"\s*(?:(\d+)|GPU-|MIG-)", visible)
    if built is None:
        return (f"torch {torch.__version__} is built for CPUs alone",
                "pip install --force-reinstall -c constraints.txt torch, from a package index whose torch is built for CUDA")
    if not there:
        return (told.get("failed", f"the driver {version} is loaded, but this container was given no device"),
                "in a container: docker run --gpus all, with NVIDIA's container toolkit on the host; else look at how the driver is installed")
    if not first or int(first[1] or 0) >= there:
        return f"CUDA_VISIBLE_DEVICES={visible} hides it", f"unset CUDA_VISIBLE_DEVICES, or name GPUs from 0 to {there - 1}"
    if supported and _major(supported) < _major(built):
        return (f"its driver {version} supports CUDA up to {supported}, torch {torch.__version__} is built for {built}",
                f"update the driver, or install a torch built for CUDA {_major(supported)}")
    try:
        torch.cuda.init()
        why = "torch gives no reason"
    except Exception as error:
        why = f"torch says: {first_line(error)}"
    return told.get("failed", f"{why} (driver {version})"), "look at nvidia-smi and dmesg; if the driver was updated since this machine started, restart it"


def _major(cuda: str) -> int:
    return int(cuda.partition(".")[0])


def devices() -> Iterator[Finding]:
    for number in range(count()):
        yield from tried(f"GPU {number}", partial(_device, number))


def _device(number: int) -> Iterator[Finding]:
    facts = torch.cuda.get_device_properties(number)
    name, told = f"GPU {number}", f"{facts.name}, capability {facts.major}.{facts.minor}, {gb(facts.total_memory)}"
    if not _has_code(facts.major, facts.minor):
        yield Finding(name, f"{told}: torch {torch.__version__} has no code for it, but for {' '.join(torch.cuda.get_arch_list())}",
                      "install a torch that has: an older one for an old GPU, a newer one for a new GPU", True)
        return
    dtype = torch.bfloat16 if facts.major >= 8 else torch.float16
    if not (error := _product_error(torch.device("cuda", number), dtype)) <= PRODUCT_LIMIT:
        yield Finding(name, f"{told}: multiplies wrong, a product in {dtype} is off by {error:.2g} of its size, expected {PRODUCT_LIMIT:g} at most",
                      "do not train on it: look for Xid in dmesg and for ECC in nvidia-smi -q", True)
        return
    free, total = torch.cuda.mem_get_info(number)
    yield Finding(name, f"{told}, {gb(free)} free, multiplies right in {'bf16' if facts.major >= 8 else 'fp16; it has no bf16: train.precision=fp16'}",
                  "another process holds much of its memory: nvidia-smi names it" if free < 0.8 * total else "")


def _has_code(*capability: int) -> bool:
    """Whether torch's build runs there: sm_86 does on 8.6 and 8.9, compute_86, which the driver compiles, on all newer, sm_90a on 9.0 alone."""
    for kind, major, minor, alone in re.findall(r"(sm|compute)_(\d+)(\d)([af]?)", " ".join(torch.cuda.get_arch_list())):
        made_for = int(major), int(minor)
        if made_for == capability or (not alone and made_for <= capability and (kind == "compute" or made_for[0] == capability[0])):
            return True
    return False


def _product_error(device: torch.device, dtype: torch.dtype) -> float:
    """Of a product of 256 × 256 there, relative to the CPU's of the same numbers in float64."""
    a, b = torch.randn(2, 256, 256, generator=torch.Generator().manual_seed(0)).to(dtype)
    truth = a.double() @ b.double()
    return float((torch.mm(a.to(device), b.to(device)).cpu().double() - truth).norm() / truth.norm())


def together() -> Iterator[Finding]:
    """Of several: whether they are of one kind, and how they reach each other."""
    kinds, pairs = Counter(names := [torch.cuda.get_device_name(number) for number in range(count())]), list(permutations(range(count()), 2))
    if len(kinds) > 1:
        most = ",".join(str(number) for number, name in enumerate(names) if name == kinds.most_common(1)[0][0])
        yield Finding("kinds", f"{', '.join(f'{number} × {name}' for name, number in kinds.items())}: a run takes one kind",
                      f"CUDA_DEVICE_ORDER=PCI_BUS_ID CUDA_VISIBLE_DEVICES=…, here {most} by torch's numbers")
    if pairs:
        direct = sum(torch.cuda.can_device_access_peer(*pair) for pair in pairs)
        yield Finding("peers", f"{direct} of {len(pairs)} pairs exchange directly" + ", the others by way of the host's memory" * (direct < len(pairs)))


def utilisation() -> Iterator[Finding]:
    if count():
        share, why = metrics.utilisation(torch.device("cuda", 0))
        why, _, change = why.partition("; ")
        yield Finding("utilisation", why if share is None else f"{share:g} % {why}", "" if share is not None else change or "see what NVML permits here")
