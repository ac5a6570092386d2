"""Packages the engine, and compiles its CUDA kernels where torch, nvcc and CUDA are there; installing needs none of them.

    pip install -e .                                                    without kernels: pip builds apart from the installed torch
    pip install --no-build-isolation -e .                               with kernels where they can be built; -v shows why not
    TORCH_CUDA_ARCH_LIST="9.0" python setup.py build_ext --inplace      the kernels alone, for a Hopper; fails where they cannot be built
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import find_packages, setup

ARCHITECTURES, OLDEST = "8.0;9.0+PTX;12.0", 8.0  # on a machine without a GPU; what kernels need


def extension() -> dict:
    """What setup needs to build engine._C; nothing, and the reason printed, where it cannot be built."""
    try:
        import torch
        from torch.utils import cpp_extension
        from torch.utils.cpp_extension import BuildExtension, CUDAExtension
    except ImportError as error:
        return left_out(f"torch cannot be imported ({error}); pip install --no-build-isolation -e . uses the installed one")
    if torch.version.cuda is None:
        return left_out(f"torch {torch.__version__} is built without CUDA")
    home = cpp_extension.CUDA_HOME = toolkit(cpp_extension.CUDA_HOME)
    if home is None:
        return left_out(f"no nvcc; set CUDA_HOME to the folder of CUDA {torch.version.cuda}")
    here = ["{}.{}".format(*torch.cuda.get_device_capability(number)) for number in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace("native", "") or ";".join(sorted(set(here))) or ARCHITECTURES
    possible = architectures(wanted, f"{home}/bin/nvcc")
    if not possible:
        return left_out(f"kernels need {OLDEST} or newer, and an nvcc that knows it: got {wanted}; TORCH_CUDA_ARCH_LIST names others")
    os.environ["TORCH_CUDA_ARCH_LIST"] = possible

    class Build(BuildExtension):
        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except Exception as error:  # another CUDA than torch's, a compiler that is too new, an error in what it compiles
                left_out(" ".join(str(error).replace("\\n", " ").split()))
                self.extensions.clear()

    sources = [f"kernels/{name}" for name in ("bindings.cpp", "forward.cu", "backward.cu")]
    depends = [f"kernels/{name}" for name in ("attention.h", "block.h", "simt.h")]
    return {"ext_modules": [CUDAExtension("engine._C", sources, depends=depends)], "cmdclass": {"build_ext": Build}}


def toolkit(found: str | None) -> str | None:
    """The folder of CUDA: the one that torch has `found`, or where its nvcc says it lies, for an nvcc on PATH may be a script or a link alone."""
    if found is None or not shutil.which(f"{found}/bin/nvcc"):
        return None
    if os.path.exists(f"{found}/include/cuda_runtime_api.h"):
        return found
    said = subprocess.run([f"{found}/bin/nvcc", "--dryrun", "-E", "-x", "cu", os.devnull], capture_output=True, text=True, check=False).stderr
    top = re.search(r"^#\$ TOP=(.+)", said, re.MULTILINE)
    return os.path.realpath(top[1].strip()) if top else found


def architectures(wanted: str, nvcc: str) -> str:
    """Of a TORCH_CUDA_ARCH_LIST what kernels and nvcc are made for; names, such as Hopper, are torch's to know."""
    said = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=False).stdout
    known = {f"{major}.{minor}" for major, minor in re.findall(r"compute_(\d+)(\d)", said) if float(f"{major}.{minor}") >= OLDEST}
    return ";".join(one for one in re.split("[; ]+", wanted) if re.sub(r"a?(\+PTX)?$", "", one) in known or one[:1].isalpha())


def left_out(reason: str) -> dict:
    """Says why there are no kernels: an error where they were asked for, and no reason to stop where the engine is installed."""
    if "build_ext" in sys.argv:
        raise SystemExit(f"engine._C, the CUDA kernels, cannot be built: {reason}")
    print(f"engine._C, the CUDA kernels, is not built: {reason}")
    return {}


here = Path(__file__).resolve().parent
version = re.search(r'^__version__ = "(.+)"$', (here / "engine" / "__init__.py").read_text(encoding="utf-8"), re.MULTILINE)[1]

hub = ["tokenizers", "huggingface_hub>=2.4", "gguf"]
parquet = ["pyarrow"]

setup(
    name="ddp-instruct-engine",
    version=version,
    description="A PyTorch DDP training engine for instruction tuning that you can read, trust and outrun",
    license="Apache-2.0",
    packages=find_packages(include=["engine", "engine.*"]),
    **extension(),
    python_requires=">=3.10",
    install_requires=["torch>=2.9", "sentencepiece", "numpy", "tensorboard", "omegaconf", "safetensors", "tqdm"],
    extras_require={
        "hub": hub,
        "parquet": parquet,
        "gpu": ["nvidia-ml-py"],
        "dev": [*hub, *parquet, "pytest", "pytest-xdist", "hypothesis", "ruff", "transformers", "peft"],  # the last two are references in tests
    },
)
