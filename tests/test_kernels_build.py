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
import torch.utils.cpp_extension
from conftest import ROOT
from ptx import Compiled, needs_nvcc


@pytest.fixture
def set_up(monkeypatch, capsys):
    """Runs setup.py: what it hands to setuptools, and what it printed. As if torch were built with CUDA, and nvcc one that knows up to 9.0."""
    given = {}
    monkeypatch.setattr(setuptools, "setup", lambda **options: given.update(options))
    monkeypatch.setattr(sys, "argv", ["setup.py", "editable_wheel"])
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)

    def run(folder: Path, home: Path | None = None) -> tuple[dict, str]:
        monkeypatch.chdir(folder)
        if home:
            monkeypatch.setattr("torch.version.cuda", "13.0")
            monkeypatch.setattr("torch.utils.cpp_extension.CUDA_HOME", str(home))
        given.clear()
        runpy.run_path("setup.py")
        return given, capsys.readouterr().out

    return run


@pytest.fixture
def old_cuda(tmp_path):
    (tmp_path / "cuda/bin").mkdir(parents=True)
    nvcc = tmp_path / "cuda/bin/nvcc"
    nvcc.write_text("#!/bin/sh\nprintf 'compute_75\\ncompute_80\\ncompute_90\\n'")
    nvcc.chmod(0o755)
    return tmp_path / "cuda"


@pytest.mark.parametrize(("missing", "reason"), [
    ({"torch": None}, "torch cannot be imported"), ({"torch.version.cuda": None}, r"torch .* is built without CUDA"),
    ({"torch.version.cuda": "13.0", "torch.utils.cpp_extension.CUDA_HOME": None}, "no nvcc; set CUDA_HOME to the folder of CUDA 13.0"),
])
def test_without_what_it_needs_the_extension_is_left_out_and_why_is_said(monkeypatch, set_up, missing, reason):
    for name, value in missing.items():
        if name == "torch":
            monkeypatch.setitem(sys.modules, name, value)
        else:
            monkeypatch.setattr(name, value)
    given, said = set_up(ROOT)
    assert re.search(rf"^engine._C, the CUDA kernels, is not built: {reason}", said, re.MULTILINE)
    assert given["name"] and "ext_modules" not in given
    monkeypatch.setattr(sys, "argv", ["setup.py", "build_ext", "--inplace"])
    with pytest.raises(SystemExit, match=f"engine._C, the CUDA kernels, cannot be built: {reason}"):
        set_up(ROOT)


@pytest.mark.parametrize(("gpus", "listed", "built"), [
    ([], None, "8.0;9.0+PTX"), ([(9, 0), (8, 0), (9, 0)], None, "8.0;9.0"), ([(9, 0), (7, 5)], "native", "9.0"), ([(7, 5)], None, None),
    ([(12, 0)], None, None), ([], "7.5 8.0 9.0a+PTX;12.0 Hopper", "8.0;9.0a+PTX;Hopper"), ([], "7.5", None)])
def test_architectures_are_those_of_the_kernels_and_of_nvcc(monkeypatch, set_up, old_cuda, gpus, listed, built):
    monkeypatch.setattr("torch.cuda.is_available", lambda: bool(gpus))
    monkeypatch.setattr("torch.cuda.device_count", lambda: len(gpus))
    monkeypatch.setattr("torch.cuda.get_device_capability", gpus.__getitem__)
    if listed:
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
    given, said = set_up(ROOT, old_cuda)
    assert ("ext_modules" in given) == (built is not None) and (built is None or os.environ["TORCH_CUDA_ARCH_LIST"] == built)
    assert ("is not built: kernels need 8.0 or newer, and an nvcc that knows it: got " in said) == (built is None)


def test_an_nvcc_on_the_path_that_only_leads_to_the_real_one(monkeypatch, set_up, old_cuda, tmp_path):
    """torch takes the folder above it for CUDA's, where no header is."""
    leads = tmp_path / "local/bin/nvcc"
    leads.parent.mkdir(parents=True)
    leads.write_text(f"#!/bin/sh\n[ $1 != --dryrun ] || echo '#$ TOP={old_cuda}/bin/..' >&2\nexec {old_cuda}/bin/nvcc")
    leads.chmod(0o755)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    given, _ = set_up(ROOT, tmp_path / "local")
    assert given["ext_modules"] and torch.utils.cpp_extension.CUDA_HOME == str(old_cuda)


def cuda_home() -> Path | None:
    """The folder of nvcc, where it has the libraries too."""
    home = shutil.which("nvcc") and Path(subprocess.run(["nvcc", "--dryrun", "-E", "-x", "cu", "/dev/null"], capture_output=True, text=True).stderr
                                         .split("TOP=")[1].split()[0]).resolve()
    return home if home and (home / "lib64/libcudart.so").exists() else None


@pytest.mark.parametrize(("fault", "reason"), [("cuda", "The detected CUDA version .* mismatches"), ("source", "Error compiling objects")])
def test_a_build_that_fails_does_not_end_an_installation(monkeypatch, capsys, set_up, tmp_path, fault, reason):
    if not (home := cuda_home()):
        pytest.skip("needs nvcc")
    sources = tmp_path / "sources"
    shutil.copytree(ROOT / "kernels", sources / "kernels")
    shutil.copytree(ROOT / "engine", sources / "engine", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    shutil.copy(ROOT / "setup.py", sources)
    if fault == "source":
        for path in (*sources.glob("kernels/*.cu"), sources / "kernels/bindings.cpp"):
            path.write_text("#error planted")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0")

    def install() -> str:
        given, _ = set_up(sources, home)
        if fault == "cuda":
            monkeypatch.setattr("torch.version.cuda", "12.8")
        setuptools.Distribution({**given, "script_name": "setup.py"}).run_command("build")
        return capsys.readouterr().out

    assert re.search(rf"^engine._C, the CUDA kernels, is not built: .*{reason}", install(), re.MULTILINE)
    assert list(sources.glob("build/lib*/engine/train.py")) and not list(sources.glob("build/lib*/engine/_C*"))
    monkeypatch.setattr(sys, "argv", ["setup.py", "build_ext", "--inplace"])
    with pytest.raises(SystemExit, match=f"cannot be built: .*{reason}"):
        install()


@needs_nvcc
def test_a_launch_that_fails_is_told_once(tmp_path):
    """Or torch would raise it at its own next launch."""
    library = Compiled(tmp_path, [ROOT / "kernels/probe.cu"]).library
    ctypes.c_int.in_dll(library, "refused").value = 98
    assert library.probe(bytes(32), 0) == 98 and library.cudaPeekAtLastError() == 0


STREAM = ("_ZN3c104cuda20getCurrentCUDAStreamEa", "_ZNK3c104cuda10CUDAStream6streamEv")  # getCurrentCUDAStream, CUDAStream::stream


@pytest.mark.faults
def test_the_extension_is_built_and_brings_the_operators(tmp_path):
    """Where torch has no CUDA it is told that it has, and gets what only such a torch has: two libraries, with the names that the
    extension looks for and no more, and a header that is empty."""
    if not (home := cuda_home()):
        pytest.skip("needs nvcc and libcudart")
    libraries = tmp_path / "libraries"
    libraries.mkdir()
    for name in ("c10_cuda", "torch_cuda"):
        (libraries / f"{name}.c").write_text("".join(f"void {symbol}() {{}}\n" for symbol in STREAM))
        subprocess.run(["gcc", "-shared", "-o", libraries / f"lib{name}.so", libraries / f"{name}.c"], check=True)
    (tmp_path / "headers/c10/cuda/impl").mkdir(parents=True)
    (tmp_path / "headers/c10/cuda/impl/cuda_cmake_macros.h").touch()
    known = ("import torch; from torch.utils import cpp_extension\n"
             f"if not torch.version.cuda: torch.version.cuda, cpp_extension.CUDA_HOME = '13.0', {str(home)!r}")
    sources = tmp_path / "sources"
    shutil.copytree(ROOT, sources, ignore=shutil.ignore_patterns("*.so", "__pycache__", ".*", "runs", "tests", "build"))
    code = f"{known}\nimport runpy, sys; sys.argv = ['setup.py', 'build_ext', '--inplace']; runpy.run_path('setup.py', run_name='__main__')"
    paths = {"LIBRARY_PATH": str(libraries), "CPATH": str(tmp_path / "headers")}
    done = subprocess.run([sys.executable, "-c", code], cwd=sources, capture_output=True, text=True,
                          env={**os.environ, **paths, "TORCH_CUDA_ARCH_LIST": "8.0", "MAX_JOBS": "1"})
    assert list((sources / "engine").glob("_C.*.so")), done.stdout[-2000:] + done.stderr[-4000:]
    code = ("from engine import fused_attention as f; assert f._missing('cuda') is None, f._missing('cuda'); import torch; "
            "print(torch._C._dispatch_has_kernel_for_dispatch_key('engine::attention_backward', 'CUDA'))")
    paths = f"{libraries}:{home}/lib64:{os.environ.get('LD_LIBRARY_PATH', '')}"
    done = subprocess.run([sys.executable, "-c", code], cwd=sources, capture_output=True, text=True, env={**os.environ, "LD_LIBRARY_PATH": paths})
    assert done.stdout.strip() == "True", done.stderr[-3000:]
