"""Packages the engine, and compiles its CUDA kernels where torch, nvcc and CUDA are there; installing needs none of them.

    pip install -e .                                                    without kernels: pip builds apart from the installed torch
    pip install --no-build-isolation -e .                               with kernels
    TORCH_CUDA_ARCH_LIST="9.0" python setup.py build_ext --inplace      the kernels alone, for a Hopper
"""

import os
import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup

ARCHITECTURES = "8.0;9.0+PTX;12.0"  # on a machine without a GPU; kernels need 8.0


def extension() -> dict:
    """What setup needs to build engine._C; nothing, and the reason printed, where it cannot be built."""
    try:
        import torch
        from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CUDAExtension
    except ImportError as error:
        reason = f"torch cannot be imported ({error}); pip install --no-build-isolation -e . uses the installed one"
    else:
        if torch.version.cuda is None:
            reason = f"torch {torch.__version__} is built without CUDA"
        elif CUDA_HOME is None or not shutil.which(f"{CUDA_HOME}/bin/nvcc"):
            reason = f"no nvcc; set CUDA_HOME to the folder of CUDA {torch.version.cuda}"
        else:
            if not torch.cuda.is_available():
                os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ARCHITECTURES)
            sources = [f"kernels/{name}" for name in ("bindings.cpp", "forward.cu", "backward.cu")]
            depends = [f"kernels/{name}" for name in ("attention.h", "block.h", "simt.h")]
            return {"ext_modules": [CUDAExtension("engine._C", sources, depends=depends)], "cmdclass": {"build_ext": BuildExtension}}
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
        "dev": [*hub, *parquet, "pytest", "hypothesis", "ruff", "transformers", "peft"],  # the last two are references in tests
    },
)
