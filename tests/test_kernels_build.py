"""setup.py and the extension: what is said where it cannot be built, and that it builds, loads and registers where nvcc is."""

import ctypes
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import setuptools
from conftest import ROOT


@pytest.mark.parametrize(("missing", "reason"), [
    ({"torch": None}, "torch cannot be imported"), ({"torch.version.cuda": None}, r"torch .* is built without CUDA"),
    ({"torch.version.cuda": "13.0", "torch.utils.cpp_extension.CUDA_HOME": None}, "no nvcc; set CUDA_HOME to the folder of CUDA 13.0"),
])
def test_without_what_it_needs_the_extension_is_left_out_and_why_is_said(monkeypatch, capsys, missing, reason):
    given = {}
    monkeypatch.setattr(setuptools, "setup", lambda **options: given.update(options))
    monkeypatch.chdir(ROOT)
    for name, value in missing.items():
        if name == "torch":
            monkeypatch.setitem(sys.modules, name, value)
        else:
            monkeypatch.setattr(name, value)
    runpy.run_path("setup.py")
    assert re.search(rf"^engine._C, the CUDA kernels, is not built: {reason}", capsys.readouterr().out, re.MULTILINE)
    assert given["name"] and "ext_modules" not in given


# A runtime in whose place no GPU is needed: it keeps an error until it is asked for, as CUDA's does, and knows no kernel.
RUNTIME = r"""extern "C" {
int last = 0;
int cudaFuncSetAttribute(const void *, int, int) { return last = 98; }
int cudaGetLastError() { const int told = last; last = 0; return told; }
int cudaPeekAtLastError() { return last; }
""" + "\n".join(f"int {name}() {{ return 0; }}" for name in (
    "cudaLaunchKernel", "__cudaLaunchKernel", "__cudaGetKernel", "__cudaPushCallConfiguration", "__cudaPopCallConfiguration", "__cudaRegisterFatBinary",
    "__cudaRegisterFatBinaryEnd", "__cudaUnregisterFatBinary", "__cudaRegisterFunction", "__cudaInitModule")) + "\n}\n"


@pytest.mark.skipif(not shutil.which("nvcc"), reason="needs nvcc")
def test_a_launch_that_fails_is_told_once(tmp_path):
    """Or torch would raise it at its own next launch."""
    (tmp_path / "runtime.cpp").write_text(RUNTIME)
    command = ["nvcc", "-std=c++17", "-arch=sm_80", "-shared", "-Xcompiler", "-fPIC", "--cudart=none", "-o", "it.so", "runtime.cpp", ROOT / "kernels/probe.cu"]
    subprocess.run(command, cwd=tmp_path, check=True)
    library = ctypes.CDLL(str(tmp_path / "it.so"))
    assert library.probe(bytes(32), 0) == 98 and library.cudaPeekAtLastError() == 0


@pytest.mark.faults
def test_the_extension_is_built_and_brings_the_operators(tmp_path):
    """Where torch has no CUDA it is told that it has, and its two libraries for it are empty ones: none of their symbols is used."""
    home = shutil.which("nvcc") and Path(subprocess.run(["nvcc", "--dryrun", "-E", "-x", "cu", "/dev/null"], capture_output=True, text=True).stderr
                                         .split("TOP=")[1].split()[0]).resolve()
    if not home or not (home / "lib64/libcudart.so").exists():
        pytest.skip("needs nvcc and libcudart")
    libraries = tmp_path / "libraries"
    libraries.mkdir()
    for name in ("c10_cuda", "torch_cuda"):
        subprocess.run(["gcc", "-shared", "-x", "c", "-o", libraries / f"lib{name}.so", "/dev/null"], check=True)
    known = ("import torch; from torch.utils import cpp_extension\n"
             f"if not torch.version.cuda: torch.version.cuda, cpp_extension.CUDA_HOME = '13.0', {str(home)!r}")
    sources = tmp_path / "sources"
    shutil.copytree(ROOT, sources, ignore=shutil.ignore_patterns("*.so", "__pycache__", ".*", "runs", "tests", "build"))
    code = f"{known}\nimport runpy, sys; sys.argv = ['setup.py', 'build_ext', '--inplace']; runpy.run_path('setup.py', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], cwd=sources, capture_output=True, text=True,
                          env={**os.environ, "LIBRARY_PATH": str(libraries), "TORCH_CUDA_ARCH_LIST": "8.0", "MAX_JOBS": "1"})
    assert list((sources / "engine").glob("_C.*.so")), done.stdout[-2000:] + done.stderr[-4000:]
    code = ("from engine import fused_attention as f; assert f._missing('cuda') is None, f._missing('cuda'); import torch; "
            "print(torch._C._dispatch_has_kernel_for_dispatch_key('engine::attention_backward', 'CUDA'))")
    paths = f"{libraries}:{home}/lib64:{os.environ.get('LD_LIBRARY_PATH', '')}"
    done = subprocess.run([sys.executable, "-c", code], cwd=sources, capture_output=True, text=True, env={**os.environ, "LD_LIBRARY_PATH": paths})
    assert done.stdout.strip() == "True", done.stderr[-3000:]
