"""Work list."""
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

BLOCK = 64


def tile_list(lengths: Sequence[int], capacity: int | None = None) -> Tensor:
    sizes = np.asarray(lengths, np.int64)
    starts, blocks = np.cumsum(sizes) - sizes, -(-sizes // BLOCK)
    slots = np.cumsum(blocks) - blocks
    document = np.repeat(np.arange(len(sizes)), blocks)
    block = np.arange(len(document)) - slots[document]
    tiles = np.stack([starts[document], sizes[document], block, slots[document]], 1)[np.argsort(-block, kind="stable")]
    if capacity is not None:
        if len(tiles) > capacity:
            raise ValueError(f"{len(tiles)} blocks of {BLOCK} tokens, capacity {capacity}")
        tiles = np.pad(tiles, ((0, capacity - len(tiles)), (0, 0)))
    return torch.from_numpy(tiles.astype(np.int32))
