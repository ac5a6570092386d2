"""The kernels as nvcc compiles them, run on the CPU by tests/ptx.py: each instruction of simt.h, then values and gradients against float64.

Bugs planted in what simt.h gives nvcc alone, which the emulator cannot see, must be seen here, and so must those of the kernels.
"""

import ctypes
from pathlib import Path

import numpy as np
import pytest
import torch
from emulation import SOURCES, Params, run_forward
from packs import BF16, FP16, judge, make, off
from ptx import Compiled, PTXError, needs_nvcc
from test_kernels import PLANTED, RARER, copied, launch
from test_kernels_machine import FLOATS, LANES, TYPES, WORDS, Pointers, follows_the_manual, operands
from torch import Tensor

pytestmark = needs_nvcc


def probe(compiled: Compiled, dtype: torch.dtype) -> tuple[np.ndarray, np.ndarray]:
    """What each lane finds in words and in numbers, see kernels/probe.cu."""
    tensors = [*operands(dtype), torch.zeros(LANES, WORDS, dtype=torch.int32), torch.zeros(LANES, FLOATS)]
    compiled.call("probe", ctypes.byref(Pointers(*(x.data_ptr() for x in tensors))), int(dtype == FP16), tensors=tensors)
    return tensors[2].numpy().view(np.uint32), tensors[3].numpy()


class Kernels:
    """As those of emulation.py."""

    def __init__(self, folder: Path, sources: Path = SOURCES, architecture: int = 80) -> None:
        self.compiled = Compiled(folder, [sources / "forward.cu", sources / "backward.cu"], architecture)

    def run(self, name: str, params: Params, tensors: list[Tensor], seed: int) -> None:
        function = f"_ZN9attention{len(name)}{name}ERKNS_6ParamsEPv"  # attention::forward(const Params &, void *stream)
        self.compiled.call(function, ctypes.byref(params), None, tensors=tensors, seed=seed)


def check(kernels: Kernels, lengths: list[int], heads: int, kv_heads: int, width: int, dtype: torch.dtype, rotary: bool, capacity: int | None = None,
          seed: int = 0) -> None:
    case, grad = make(lengths, heads, kv_heads, width, dtype, rotary, capacity=capacity, gap=8)
    found, lse, _ = launch(case, grad, seed, kernels)
    judge(found, case, lengths, grad)
    # The emulator rounds in other places; what goes on is the same.
    emulated, emulated_lse, _ = launch(case, grad, seed)
    assert torch.allclose(lse, emulated_lse, rtol=1e-5, atol=1e-5, equal_nan=True), "lse"
    for one, other in zip(found, emulated, strict=True):
        assert off(one, other.double()) <= torch.finfo(dtype).eps / 8


@pytest.fixture(scope="module")
def kernels(tmp_path_factory) -> Kernels:
    return Kernels(tmp_path_factory.mktemp("ptx"))


# ---- Instructions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", [80, 90, 120])
def test_instructions_do_what_the_manual_says(tmp_path, architecture):
    compiled = Compiled(tmp_path, [SOURCES / "probe.cu"], architecture)
    for dtype in TYPES.values():
        follows_the_manual(*probe(compiled, dtype), dtype)


# What is changed in simt.h where nvcc is its reader, and what then is seen.
WRONG = {
    "halves of a bf16 pair": (r'(cvt.rn.bf16x2.f32.*)"f"\(high\), "f"\(low\)', r'\1"f"(low), "f"(high)', "pack"),
    "fragment of the left operand": (r'"r"\(a\[1\]\), "r"\(a\[2\]\)', '"r"(a[2]), "r"(a[1])', "mma"),
    "not transposed": (r"x4.trans.shared", "x4.shared", "ldmatrix"),
    "wait for one group less": (r'"n"\(OPEN\)', '"n"(OPEN + 1)', "never waited for"),
}
ALSO_WRONG = {
    "halves of an fp16 pair": (r'(cvt.rn.f16x2.f32.*)"f"\(high\), "f"\(low\)', r'\1"f"(low), "f"(high)', "pack"),
    "fragment of the right operand": (r'"r"\(b0\), "r"\(b1\)', '"r"(b1), "r"(b0)', "mma"),
    "row of the right operand": (r"row.col.f32", "row.row.f32", "does not know mma"),
    "sums": (r'"\+f"\(c\[1\]\), "\+f"\(c\[2\]\)', '"+f"(c[2]), "+f"(c[1])', "mma"),
    "transposed": (r"m8n8.x4.shared", "m8n8.x4.trans.shared", "ldmatrix"),
    "matrices": (r'"=r"\(r\[1\]\), "=r"\(r\[2\]\)', '"=r"(r[2]), "=r"(r[1])', "ldmatrix"),
    "copies that are not valid": (r"valid \? 16 : 0", "16", "copy_async"),
    "no commit": (r'asm volatile\("cp.async.commit_group;" ::: "memory"\);', "", "copy_async|never waited for"),
    "no barrier": (r"__syncthreads\(\);", "", "copy_async|shared memory"),
    "neighbour": (r"__shfl_xor_sync\(0xffffffffu, value, mask\)", "__shfl_xor_sync(0xffffffffu, value, mask ^ 1)", "xor_lane"),
    "words of a store": (r'"r"\(w.word\[1\]\), "r"\(w.word\[2\]\)', '"r"(w.word[2]), "r"(w.word[1])', "shared memory|copy|ldmatrix"),
    "words of a load": (r'"=r"\(w.word\[1\]\), "=r"\(w.word\[2\]\)', '"=r"(w.word[2]), "=r"(w.word[1])', "copy_async"),
    "low half of bf16": (r"pair << 16", "pair & 0xffffu", "unpack"),
    "low half of fp16": (r"cvt.f32.f16 %0, low", "cvt.f32.f16 %0, high", "unpack"),
    "warp": (r"threadIdx.x / 32", "threadIdx.x / 16", "warp"),
    "block": (r"return blockIdx.y", "return blockIdx.y + 1", "block"),
    "power of e": (r"ex2.approx.ftz.f32 %0, %1", "rcp.rn.f32 %0, %1", "exp2"),
}


@pytest.mark.parametrize("bug", [*WRONG, *(pytest.param(name, marks=pytest.mark.faults) for name in ALSO_WRONG)])
def test_wrong_instructions_are_seen(tmp_path, bug):
    before, after, seen = (WRONG | ALSO_WRONG)[bug]
    sources = copied(tmp_path, ("simt.h", before, after))
    with pytest.raises((AssertionError, PTXError), match=seen):
        compiled = Compiled(tmp_path / "built", [sources / "probe.cu"])
        for dtype in TYPES.values():
            follows_the_manual(*probe(compiled, dtype), dtype)


# ---- Kernels -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "dtype", "rotary"), [(64, BF16, True), (128, FP16, True), (64, FP16, False), (128, BF16, False)])
def test_values_and_gradients(kernels, width, dtype, rotary):
    check(kernels, [1, 65, 130, 1, 37], 4, 2, width, dtype, rotary, capacity=10)


@pytest.mark.faults
@pytest.mark.parametrize("architecture", [90, 120])  # of 80 nvcc makes the same as of 90
def test_values_and_gradients_of_long_documents(tmp_path, architecture):
    kernels = Kernels(tmp_path, architecture=architecture)
    for width in (64, 128):
        for dtype in (BF16, FP16):
            for rotary in (False, True):
                for heads, kv_heads in ((2, 2), (8, 1)):
                    check(kernels, [700 // heads, 3, 200, 64], heads, kv_heads, width, dtype, rotary, seed=heads)


@pytest.mark.faults
@pytest.mark.parametrize("bug", [name for name, change in (PLANTED | RARER).items() if "bank" not in change[-1]])
def test_bugs_of_the_kernels_are_seen(tmp_path, bug):
    *change, _ = (PLANTED | RARER)[bug]
    kernels = Kernels(tmp_path / "built", copied(tmp_path, tuple(change)))
    with pytest.raises((AssertionError, PTXError)):
        for seed in range(2):
            for lengths, rotary in (([130, 65], False), ([90, 140], True)):
                check(kernels, lengths, 4, 2, 64, BF16, rotary, seed=seed)


# ---- The interpreter -----------------------------------------------------------------------------------------------------


def test_memory_outside_of_the_tensors_is_nobodys(kernels):
    case, _ = make([70], 1, 1, 64, BF16, False)
    case.tiles[0, 1] = 130  # a document of more tokens than there are
    with pytest.raises(PTXError, match="are of no tensor"):
        run_forward(case, 0, kernels)


def test_an_instruction_that_is_not_known_is_named(tmp_path):
    (tmp_path / "it.cu").write_text("struct P { float *x; };\n__global__ void __launch_bounds__(32) kernel(P p) { *p.x = __sinf(*p.x); }\n")
    with pytest.raises(PTXError, match="does not know sin.approx"):
        Compiled(tmp_path / "built", [tmp_path / "it.cu"])
