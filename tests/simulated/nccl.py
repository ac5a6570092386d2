"""NCCL's place among the ranks of one machine whose GPUs are simulated: gloo sums what lies beneath their tensors, and takes GPUs' alone."""

from collections.abc import Sequence
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d


class ProcessGroup(dist.ProcessGroup):
    """What `init_process_group("nccl")` makes, as far as DDP, ZeroRedundancyOptimizer and the engine use it."""

    class Options(SimpleNamespace):
        _timeout: timedelta

    def __init__(self, store: dist.Store, rank: int, size: int, options: Options) -> None:
        super().__init__(rank, size)
        self.gloo = dist.ProcessGroupGloo(store, rank, size, timeout=options._timeout)

    def getBackendName(self) -> str:
        return "nccl"

    def _get_backend(self, device: torch.device) -> dist.Backend:
        return self.gloo

    def _set_sequence_number_for_group(self) -> None:
        self.gloo._set_sequence_number_for_group()

    def allreduce(self, tensors: Sequence[Tensor], opts: Any = None) -> dist.Work:
        return self.gloo.allreduce(_beneath(tensors), opts or dist.AllreduceOptions())

    def broadcast(self, tensors: Sequence[Tensor], opts: Any = None) -> dist.Work:
        return self.gloo.broadcast(_beneath(tensors), opts or dist.BroadcastOptions())

    def allgather(self, found: Sequence[Sequence[Tensor]], tensors: Sequence[Tensor], opts: Any = None) -> dist.Work:
        return self.gloo.allgather([_beneath(one) for one in found], _beneath(tensors), opts or dist.AllGatherOptions())

    def send(self, tensors: Sequence[Tensor], to: int, tag: int) -> dist.Work:
        return self.gloo.send(_beneath(tensors), to, tag)

    def recv(self, tensors: Sequence[Tensor], source: int, tag: int) -> dist.Work:
        return self.gloo.recv(_beneath(tensors), source, tag)

    def barrier(self, opts: Any = None) -> dist.Work:
        return self.gloo.barrier(opts or dist.BarrierOptions())


def _beneath(tensors: Sequence[Tensor]) -> list[Tensor]:
    for tensor in tensors:
        if not tensor.is_cuda or not tensor.is_contiguous():
            raise ValueError(f"NCCL: {list(tensor.shape)} on {tensor.device} with strides {tensor.stride()}, expected a contiguous tensor of a GPU")
    return [torch.ops.simulated.beneath(tensor) for tensor in tensors]


def install() -> None:
    distributed_c10d._NCCL_AVAILABLE = True
    distributed_c10d.ProcessGroupNCCL = ProcessGroup
    torch.cuda.nccl.version = lambda: (0, 0, 0)
