"""Packages the engine. The CUDA extension is compiled where it is used, so installing needs neither torch nor a compiler."""

import re
from pathlib import Path

from setuptools import find_packages, setup

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
    python_requires=">=3.10",
    install_requires=["torch>=2.9", "sentencepiece", "numpy", "tensorboard", "omegaconf", "safetensors", "tqdm"],
    extras_require={
        "hub": hub,
        "parquet": parquet,
        "dev": [*hub, *parquet, "pytest", "hypothesis", "ruff", "transformers", "peft"],  # the last two are references in tests
    },
)
