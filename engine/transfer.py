"""Tensors of the CPU on a device, without waiting for it."""

import torch
from torch import Tensor


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """x, of the CPU, on `device`.

    A GPU may be steps behind the thread that gives it work. From pinned memory it copies when it comes to that, and its stream keeps the
    copy before what uses it; from other memory torch would first wait until the GPU has done all before, and then it would have nothing to do.
    """
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)
