"""The kernels on the CPU: kernels/emulator.cpp built by g++, once for each content, and called with guarded tensors."""

import ctypes
import hashlib
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import pytest
import torch
from conftest import ROOT
from packs import Case
from torch import Tensor

from engine.fused_attention import BLOCK

SOURCES = ROOT / "kernels"
TYPES = {torch.bfloat16: 0, torch.float16: 1}
POISON = 0x7FFF  # a NaN in bf16 and in fp16, and twice one in fp32
MARGIN = 4096  # elements on either side of each tensor


class Params(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("q", "k", "v", "out", "lse", "grad_out", "grad_q", "grad_k", "grad_v", "delta", "cosine", "sine",
                                                     "tiles")]
    _fields_ += [(name, ctypes.c_int64) for name in ("q_stride", "k_stride", "v_stride")]
    _fields_ += [(name, ctypes.c_int32) for name in ("tile_count", "heads", "kv_heads", "head_dim")] + [("scale", ctypes.c_float), ("type", ctypes.c_int32)]


class Report(ctypes.Structure):
    COUNTS = ("errors", "conflicts", "blocks", "shared_bytes", "mma", "ldmatrix", "passes", "barriers", "exp2", "copied_bytes", "loaded_bytes",
              "stored_bytes")
    _fields_ = [(name, ctypes.c_int64) for name in COUNTS] + [("first_error", ctypes.c_char * 256)]

    def counts(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in self.COUNTS}


def compile_once(sources: Path, name: str, *options: str, optimize: str = "-O2", link: tuple[str, ...] = ()) -> Path:
    """The library of a source, built by g++ where it is not there yet; skips the test where there is no g++."""
    compiler = shutil.which("g++")
    if not compiler:
        pytest.skip("needs g++")
    options = [optimize, "-march=native", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-shared", "-fPIC", *options]
    text = [torch.__version__] + [path.name + path.read_text() for path in sorted(sources.iterdir()) if path.suffix in (".h", ".cu", ".cpp")]
    machine = subprocess.run([compiler, "-march=native", "-Q", "--help=target", "--version"], capture_output=True, text=True, check=True).stdout
    digest = hashlib.sha256("\0".join([*options, *link, machine, *text]).encode()).hexdigest()[:16]
    library = Path(tempfile.gettempdir()) / f"engine-kernels-{name.partition('.')[0]}-{digest}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            done = subprocess.run([compiler, *options, "-o", f"{folder}/it.so", str(sources / name), *link], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            Path(folder, "it.so").rename(library)
    return library


def compile_with_torch(sources: Path, name: str, *options: str, link: tuple[str, ...] = ()) -> Path:
    """Likewise, of a source that includes torch's headers."""
    from torch.utils import cpp_extension

    include, where = [f"-isystem{path}" for path in cpp_extension.include_paths()], [f"-L{path}" for path in cpp_extension.library_paths()]
    return compile_once(sources, name, "-std=c++20", *options, *include, optimize="-O0", link=(*where, *link, "-ltorch_cpu", "-lc10"))


class Kernels(Protocol):
    """Something that runs them."""

    def run(self, name: str, params: Params, tensors: list[Tensor], seed: int) -> Report | None:
        """`name`: forward or backward. `tensors`: all memory that there is. `seed`: of the order in which blocks and lanes go on."""


class Emulator:
    """The kernels' source, built by g++."""

    def __init__(self, sources: Path = SOURCES) -> None:
        self.library = ctypes.CDLL(str(compile_once(sources, "emulator.cpp", "-std=c++17")))

    def run(self, name: str, params: Params, tensors: list[Tensor], seed: int) -> Report:
        function = self.library[f"emulate_{name}"]
        function.argtypes, function.restype = [ctypes.POINTER(Params), ctypes.c_uint64], Report
        return function(ctypes.byref(params), seed)


@lru_cache(maxsize=1)
def emulator() -> Emulator:
    return Emulator()


def bindings(device: str) -> Path:
    """The library that gives the operators of engine/fused_attention.py the emulator's code on a device, by way of kernels/bindings.cpp."""
    kernels = compile_once(SOURCES, "emulator.cpp", "-std=c++17")
    return compile_with_torch(SOURCES, "bindings.cpp", "-DEMULATED", f"-DDEVICE={device}", link=(str(kernels),))


@lru_cache(maxsize=1)
def operators() -> None:
    torch.ops.load_library(bindings("CPU"))


class Guarded:
    """Tensors with margins on either side that nobody may write, full of NaNs as are the tensors themselves."""

    def __init__(self) -> None:
        self.margins: list[Tensor] = []
        self.tensors: list[Tensor] = []

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        size = torch.Size(shape).numel()
        whole = torch.full(((2 * MARGIN + size) * dtype.itemsize // 2,), POISON, dtype=torch.int16)
        self.margins += [whole[: MARGIN * dtype.itemsize // 2], whole[-MARGIN * dtype.itemsize // 2 :]]
        self.tensors.append(whole.view(dtype)[MARGIN : MARGIN + size].view(shape))
        return self.tensors[-1]

    def copy(self, x: Tensor) -> Tensor:
        return self.empty(*x.shape, dtype=x.dtype).copy_(x)

    def check(self) -> None:
        assert all(bool((margin == POISON).all()) for margin in self.margins), "written outside of a tensor"


def run_forward(case: Case, seed: int = 0, kernels: Kernels | None = None) -> tuple[Tensor, Tensor, Report | None]:
    """out, lse and the emulator's report."""
    memory, (tokens, heads, width) = Guarded(), case.q.shape
    out = memory.empty(tokens, heads, width, dtype=case.q.dtype)
    lse = memory.empty(heads, len(case.tiles), BLOCK, dtype=torch.float32)
    params = _params(case, memory)
    params.out, params.lse = out.data_ptr(), lse.data_ptr()
    report = (kernels or emulator()).run("forward", params, memory.tensors, seed)
    memory.check()
    return out, lse, report


def run_backward(case: Case, out: Tensor, lse: Tensor, grad: Tensor, seed: int = 0, kernels: Kernels | None = None) -> tuple[list[Tensor], Report | None]:
    """Gradients of q, k, v and the emulator's report."""
    memory = Guarded()
    grads = [memory.empty(*x.shape, dtype=x.dtype) for x in (case.q, case.k, case.v)]
    params = _params(case, memory)
    delta = memory.empty(*lse.shape, dtype=torch.float32)
    kept = [memory.copy(x) for x in (out, lse, grad)]
    params.out, params.lse, params.grad_out = (x.data_ptr() for x in kept)
    params.grad_q, params.grad_k, params.grad_v = (x.data_ptr() for x in grads)
    params.delta = delta.data_ptr()
    report = (kernels or emulator()).run("backward", params, memory.tensors, seed)
    memory.check()
    return grads, report


def _params(case: Case, memory: Guarded) -> Params:
    """With copies in guarded memory, of one element type and gap-free but for the stride between tokens, which is kept."""
    params = Params(tile_count=len(case.tiles), heads=case.q.shape[1], kv_heads=case.k.shape[1], head_dim=case.q.shape[2], scale=case.scale,
                    type=TYPES[case.q.dtype])
    for name in ("q", "k", "v"):
        given = getattr(case, name)
        whole = memory.empty(len(given), given.stride(0), dtype=given.dtype)
        held = whole[:, : given[0].numel()].view_as(given).copy_(given) if len(given) else whole
        setattr(params, name, held.data_ptr())
        setattr(params, f"{name}_stride", given.stride(0))
    params.tiles = memory.copy(case.tiles).data_ptr()
    if case.cosine is not None:
        params.cosine, params.sine = memory.copy(case.cosine).data_ptr(), memory.copy(case.sine).data_ptr()
    return params

