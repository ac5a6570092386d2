"""One safetensors file from tensors wherever they lie, readable by whoever may read its folder."""

import os
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

# A new file's mode, as open() would give it. Asking for the mask means setting it, so it is asked for once, at import.
os.umask(_mask := os.umask(0o022))


def save(tensors: dict[str, Tensor], path: Path) -> None:
    """Writes the tensors under their names."""
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})
    os.chmod(path, 0o666 & ~_mask)  # safetensors leaves it to its owner alone
