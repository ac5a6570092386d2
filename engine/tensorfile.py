"""One safetensors file: written from tensors wherever they lie, and read as if it came from an enemy.

    8 bytes, the header's length | header: JSON, name -> {dtype, shape, data_offsets} | the tensors' bytes, end to end

Nothing is made of a file before its whole header was held against its size. Bytes are read, not mapped: a file that is cut or
overwritten while a model loads is an error here, where a mapped one would end the process or change weights that are in use.
"""

import json
import math
import os
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

HEADER = 16 << 20  # bytes; of a model with 100 layers it is 0.2 million
ENTRIES = 20_000  # one with adapters everywhere and their moments has 5,000
PIECE = 1 << 20  # bytes that are on the host at a time on their way to another type or device
TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32,
         "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}


class Entry(NamedTuple):
    begin: int  # bytes from the start of the data
    end: int
    name: str
    dtype: torch.dtype
    shape: list[int]


class Reader(Mapping):
    """An open file: its tensors by name, each read when it is asked for. `entries` has what the header says, in the order of the bytes.

    Raises:
        ValueError: it is no sound safetensors file, or was cut since it was opened; the text says how.
        OSError: it cannot be opened or read.
    """

    def __init__(self, path: Path) -> None:
        self.file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb", buffering=0)  # nobody may ever write to a pipe
        try:
            self.entries = self._entries()
        except BaseException:
            self.file.close()
            raise

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def __getitem__(self, name: str) -> Tensor:
        return self.tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def tensor(self, name: str, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> Tensor:
        """A tensor of its own in `dtype` (None: the file's) on `device`."""
        entry = self.entries[name]
        found = torch.empty(entry.shape, dtype=dtype or entry.dtype, device=device)
        self.fill(name, found)
        return found

    def fill(self, name: str, tensor: Tensor) -> None:
        """Reads into a tensor of the same shape, whatever its type and device; a piece at a time is all that lies in memory beside it."""
        entry, flat = self.entries[name], tensor.view(-1)
        if tensor.dtype == entry.dtype and tensor.device.type == "cpu":
            self._read(memoryview(flat.view(torch.uint8).numpy()), self.data + entry.begin)
            return
        buffer, each = bytearray(PIECE), PIECE // entry.dtype.itemsize
        for at, place in zip(range(0, len(flat), each), range(entry.begin, entry.end, PIECE), strict=True):
            piece = flat[at : at + each]
            self._read(memoryview(buffer)[: len(piece) * entry.dtype.itemsize], self.data + place)
            piece.copy_(torch.frombuffer(buffer, dtype=entry.dtype, count=len(piece)))

    def _read(self, into: memoryview, place: int) -> None:
        while len(into):
            count = os.preadv(self.file.fileno(), [into], place)
            if not count:
                raise ValueError(f"it was cut while it was read, at byte {place:,} or before")
            into, place = into[count:], place + count

    def _entries(self) -> dict[str, Entry]:
        status = os.fstat(self.file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("it is no file")
        if status.st_size < 8:
            raise ValueError(f"it has {status.st_size} bytes, too few for a header")
        head = bytearray(8)
        self._read(memoryview(head), 0)
        length, most = int.from_bytes(head, "little"), min(HEADER, status.st_size - 8)
        if length > most:
            raise ValueError(f"its header claims {length:,} bytes, expected at most {most:,}")
        text = bytearray(length)
        self._read(memoryview(text), 8)
        if text.count(b",") > 10 * ENTRIES:  # before they are millions of objects
            raise ValueError(f"its header is one of more than {ENTRIES:,} tensors")
        try:
            header = json.loads(text.decode("utf-8"), object_pairs_hook=_once)
        except RecursionError as error:
            raise ValueError("its header is nested too deeply") from error
        notes = header.pop("__metadata__", {}) if isinstance(header, dict) else None
        if not isinstance(notes, dict) or not all(isinstance(note, str) for note in notes.values()):
            raise ValueError("its header is not one of tensors by name, with text by name as __metadata__")
        if len(header) > ENTRIES:
            raise ValueError(f"its header is one of {len(header):,} tensors, expected at most {ENTRIES:,}")
        self.data, at = 8 + length, 0
        for entry in (entries := sorted(_entry(name, value) for name, value in header.items())):
            if entry.begin != at:
                raise ValueError(f"{entry.name} begins at byte {entry.begin:,} of the data, expected {at:,}: without gap or overlap")
            at = entry.end
        if self.data + at != status.st_size:
            raise ValueError(f"it has {status.st_size:,} bytes, by its header {self.data + at:,}")
        return {entry.name: entry for entry in entries}


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("its header has a name twice")
    return found


def _entry(name: str, value: Any) -> Entry:
    """One of the header's, with what its own fields must fulfil."""
    if not (name.isprintable() and 0 < len(name) <= 500):
        raise ValueError(f"its header names a tensor {name[:50]!r}")
    if not (isinstance(value, dict) and value.keys() == {"dtype", "shape", "data_offsets"}):
        raise ValueError(f"{name}: expected dtype, shape and data_offsets")
    dtype, shape, place = value["dtype"], value["shape"], value["data_offsets"]
    if not (isinstance(dtype, str) and dtype in TYPES):
        raise ValueError(f"{name}: its type is {str(dtype)[:50]!r}, expected one of {', '.join(TYPES)}")
    if not all(isinstance(part, list) and all(type(number) is int and 0 <= number < 1 << 60 for number in part) for part in (shape, place)) \
            or len(shape) > 8 or len(place) != 2:
        raise ValueError(f"{name}: its shape is {str(shape)[:50]} at {str(place)[:50]}, expected whole numbers, two of them the place")
    size = math.prod(shape) * TYPES[dtype].itemsize
    if place[1] - place[0] != size:
        raise ValueError(f"{name}: a {dtype} of shape {shape} takes {size:,} bytes, it has {place[1] - place[0]:,}")
    if math.prod(max(1, number) for number in shape) * TYPES[dtype].itemsize >= 1 << 63:  # torch's strides count past sizes of 0
        raise ValueError(f"{name}: its shape is {shape}, of which torch makes no tensor")
    return Entry(*place, name, TYPES[dtype], shape)


def load(path: Path) -> dict[str, Tensor]:
    """All tensors of a file, by name. Raises what `Reader` raises."""
    with Reader(path) as file:
        return {name: file.tensor(name) for name in file.entries}


def save(tensors: dict[str, Tensor], path: Path) -> None:
    """Writes the tensors under their names.

    Raises:
        OSError: the disk refuses. safetensors has an error of its own for it, which would pass for a bug of ours.
    """
    path.touch()
    mode = path.stat().st_mode  # as a new file's is here: safetensors leaves its own to their owner alone, whatever the umask
    try:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})
    except SafetensorError as error:
        if number := re.search(r"\(os error (\d+)\)", str(error)):
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
        raise
    os.chmod(path, mode)
