"""One safetensors file from tensors wherever they lie, readable by whoever may read its folder."""

import os
import re
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

# A new file's mode, as open() would give it. Asking for the mask means setting it, so it is asked for once, at import.
os.umask(_mask := os.umask(0o022))


def save(tensors: dict[str, Tensor], path: Path) -> None:
    """Writes the tensors under their names.

    Raises:
        OSError: the disk refuses. safetensors has an error of its own for it, which would pass for a bug of ours.
    """
    try:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})
    except SafetensorError as error:
        if number := re.search(r"\(os error (\d+)\)", str(error)):
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
        raise
    os.chmod(path, 0o666 & ~_mask)  # safetensors leaves it to its owner alone
