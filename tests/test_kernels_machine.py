"""The emulator against the instructions' written meaning, and, on a GPU, against the GPU.

kernels/probe.cu uses every member of `Simt` once. On a CPU its results must be what the PTX manual says, taken down here in numpy;
on a GPU they must be the emulator's. simt.h as it was when it passed there is noted in kernels/proven.txt, for each architecture by its
SHA-256 and with nvcc's version, so that a change of an instruction that has not been on a GPU since is seen: the test that looks is
skipped then, and says so.
"""

import ctypes
import hashlib
import shutil
import subprocess
from datetime import date

import numpy as np
import pytest
import torch
from conftest import NO_GPU
from emulation import SOURCES, Report, compile_once
from test_kernels_compile import version

LANES, WORDS, FLOATS = 64, 32, 16
PROVEN, SIMT = SOURCES / "proven.txt", SOURCES / "simt.h"
TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Pointers(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("words", "floats", "found", "numbers")]


def operands(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Elements (lanes, 8) and floats (lanes, 4)."""
    draw = torch.Generator().manual_seed(0)
    return torch.randn(LANES, 8, generator=draw).to(dtype), torch.randn(LANES, 4, generator=draw) * 3


def run(library: ctypes.CDLL, dtype: torch.dtype, device: str) -> tuple[np.ndarray, np.ndarray]:
    elements, floats = (x.to(device) for x in operands(dtype))
    found, numbers = torch.zeros(LANES, WORDS, dtype=torch.int32, device=device), torch.zeros(LANES, FLOATS, device=device)
    if device != "cpu":
        torch.cuda.synchronize()
    assert library.probe(ctypes.byref(Pointers(*(x.data_ptr() for x in (elements, floats, found, numbers)))), int(dtype == torch.float16)) == 0
    if device != "cpu":
        torch.cuda.synchronize()
    return found.cpu().numpy().view(np.uint32), numbers.cpu().numpy()


@pytest.fixture(scope="module")
def emulated() -> ctypes.CDLL:
    library = ctypes.CDLL(str(compile_once(SOURCES, "probe.cu", "-std=c++17", "-xc++")))
    library.probe_report.restype = ctypes.POINTER(Report)
    return library


@pytest.mark.parametrize("dtype", TYPES.values(), ids=TYPES)
def test_the_emulator_does_what_the_manual_says(emulated, dtype):
    follows_the_manual(*run(emulated, dtype, "cpu"), dtype)
    report = emulated.probe_report().contents
    assert report.errors == 0, report.first_error


def follows_the_manual(found: np.ndarray, numbers: np.ndarray, dtype: torch.dtype) -> None:
    """Words and numbers that kernels/probe.cu found."""
    elements, floats = operands(dtype)
    words, floats = elements.view(torch.int32).numpy().view(np.uint32), floats.numpy()
    lane, wide = np.arange(LANES), elements.double().numpy()
    bits = words.view(np.uint16).reshape(LANES, 8)

    assert (found[:, :4] == np.where(lane[:, None] % 5 == 0, 0, words[::-1])).all(), "copy_async"
    assert (found[:, 4:8] == words[::-1]).all(), "copy_async of another lane"
    assert (found[:, 8:11] == np.stack([0 * lane + 0x3F800000, 0 * lane + 0xBF800000, words[::-1, 3]], 1)).all(), "shared memory"
    assert (numbers[:, :2] == [1, -1]).all(), "load_shared8"

    # Lane l gives row l % 8 of matrix l / 8; matrix i comes to lane 4 g + t as row g, columns 2 t and 2 t + 1; transposed, the reverse.
    matrices, g, t = bits.reshape(2, 4, 8, 8), lane % 32 // 4, lane % 4
    for i in range(4):
        plain, turned = matrices[lane // 32, i], matrices[lane // 32, i].transpose(0, 2, 1)
        for column, these in ((12, plain), (16, turned)):
            low, high = (these[lane, g, 2 * t + part].astype(np.uint32) for part in (0, 1))
            assert (found[:, column + i] == low | high << 16).all(), ("ldmatrix", column, i)

    for i in range(5):
        assert (numbers[:, 2 + i] == floats[lane ^ 1 << i, 0]).all(), "xor_lane"
    assert (numbers[:, 7:9] == wide[:, :2]).all(), "unpack"
    given = torch.tensor([[70000.0, -1e-9], [1.00390625, 1.01171875], [1.00048828125, 1.00146484375]]).expand(LANES, 3, 2)
    packed = torch.cat([torch.from_numpy(floats[:, None, 2:]), given], 1).to(dtype).view(torch.int32).numpy().view(np.uint32)[..., 0]
    assert (found[:, 20:24] == packed).all(), "pack"
    assert (found[:, 24] == 0).all() and (found[:, 25] == lane // 32).all(), "block, warp"
    assert np.allclose(numbers[:, 9], np.exp2(floats[:, 1].astype(np.float64)), rtol=3e-7) and (numbers[:, 10] == 0).all(), "exp2"

    # Fragments of mma.m16n8k16, by the manual's formulas for the row and column of each element of a lane.
    for warp in range(2):
        a, b, c = np.zeros((16, 16)), np.zeros((16, 8)), np.zeros((16, 8))
        for one in range(32):
            mine, sums, group, thread = wide[32 * warp + one], floats[32 * warp + one], one >> 2, one % 4
            for i in range(8):
                a[group + (0 if i < 2 or 4 <= i < 6 else 8), thread * 2 + (i & 1) + (0 if i < 4 else 8)] = mine[i]
            for i in range(4):
                b[thread * 2 + (i & 1) + (0 if i < 2 else 8), group] = mine[2 + i]
                c[group + (0 if i < 2 else 8), thread * 2 + (i & 1)] = sums[i]
        product = a @ b + c
        for one in range(32):
            expected = [product[(one >> 2) + (0 if i < 2 else 8), one % 4 * 2 + (i & 1)] for i in range(4)]
            assert np.allclose(numbers[32 * warp + one, 11:15], expected, rtol=1e-5, atol=1e-5), "mma"


def digest() -> str:
    return hashlib.sha256(SIMT.read_bytes()).hexdigest()


def note(known: str, architecture: str, found: str) -> str:
    """The lines of proven.txt, with what was found on an architecture in the place of what was known of it."""
    lines = {line.split()[0]: line for line in known.splitlines()} | {architecture: f"{architecture} {found}"}
    return "".join(f"{lines[name]}\n" for name in sorted(lines, key=lambda name: int(name.removeprefix("sm_"))))


def test_each_architecture_has_a_line_of_its_own():
    known = note(note("", "sm_120", "aa V13.0.88 one"), "sm_90", "bb V13.0.88 two")
    assert known == "sm_90 bb V13.0.88 two\nsm_120 aa V13.0.88 one\n"
    assert note(known, "sm_90", "cc V13.1.1 three") == "sm_90 cc V13.1.1 three\nsm_120 aa V13.0.88 one\n"


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available() or not shutil.which("nvcc"), reason=f"{NO_GPU}, and nvcc")
def test_the_gpu_does_what_the_emulator_does(emulated, tmp_path):
    architecture = "sm_{}{}".format(*torch.cuda.get_device_capability())
    subprocess.run(["nvcc", "-std=c++17", f"-arch={architecture}", "-shared", "-Xcompiler", "-fPIC", "-o", f"{tmp_path}/probe.so", str(SOURCES / "probe.cu")],
                   check=True)
    library = ctypes.CDLL(f"{tmp_path}/probe.so")
    for dtype in TYPES.values():
        (here, numbers), (there, others) = run(emulated, dtype, "cpu"), run(library, dtype, "cuda")
        assert (here == there).all(), f"words {sorted(set(np.nonzero(here != there)[1].tolist()))} differ"
        assert (numbers[:, :9] == others[:, :9]).all() and np.allclose(numbers[:, 9:15], others[:, 9:15], rtol=2e-6, atol=2e-6)
    PROVEN.write_text(note(PROVEN.read_text(), architecture, f"{digest()} {version()} {torch.cuda.get_device_name()} {date.today()}"))


def test_the_wrappers_are_those_that_ran_on_a_gpu():
    known = [line.split(maxsplit=2) for line in PROVEN.read_text().splitlines()]
    stale = ", ".join(f"{architecture} ({proven[:12]}, {where})" for architecture, proven, where in known if proven != digest())
    if stale or not known:
        pytest.skip(f"simt.h as it is has not run on {stale or 'any GPU'}; ./tests/run.sh --cuda on one notes it")
