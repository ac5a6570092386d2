"""Gives a Python process and those that it starts the GPU of gpu.cpp, and the emulated kernels on it.

For that this folder is in PYTHONPATH, and SIMULATED_GPU names two libraries: gpu.cpp's, and that of kernels/bindings.cpp. The first must be
there before torch is, which asks for its accelerator once. Functions of `torch.cuda` for which a torch built for CPUs has nothing in torch._C
are replaced, as far as the engine uses them.
"""

import atexit
import ctypes
import os
import time
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

GPUS, CAPABILITY, BYTES = 4, (9, 0), 16 * 2**30


class Event:
    """Work is done when it is asked for, so what has been recorded is over."""

    def __init__(self, enable_timing: bool = False) -> None:
        self.at = 0.0

    def record(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, other: "Event") -> float:
        return 1000 * (other.at - self.at)


def install(gpu: str, kernels: str) -> None:
    libraries = Path(find_spec("torch").submodule_search_locations[0]) / "lib"
    for name in ("libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL(str(libraries / name), ctypes.RTLD_GLOBAL)
    memory = ctypes.CDLL(gpu)
    for counter in (memory.held_bytes, memory.most_bytes):
        counter.restype = ctypes.c_int64

    import torch

    ctypes.CDLL(kernels)
    properties = SimpleNamespace(name="simulated H100", major=CAPABILITY[0], minor=CAPABILITY[1], total_memory=BYTES, multi_processor_count=1)
    stream = SimpleNamespace(synchronize=lambda: None)
    torch.cuda.Event = Event
    for name, value in {"_lazy_init": None, "is_initialized": True, "is_available": True, "device_count": GPUS,
                        "synchronize": None, "empty_cache": None, "current_stream": stream, "get_device_name": properties.name,
                        "get_device_capability": CAPABILITY, "get_device_properties": properties}.items():
        setattr(torch.cuda, name, lambda *_, value=value: value)  # each a function of its own, as torch's compiler wants them
    torch.cuda.current_device = lambda: memory.current_device()
    torch.cuda.set_device = lambda device: memory.set_device(torch.device(device).index or 0)
    torch.cuda.memory_allocated = lambda *_: memory.held_bytes()
    torch.cuda.max_memory_allocated = lambda *_: memory.most_bytes()
    torch.cuda.reset_peak_memory_stats = lambda *_: memory.forget_most()
    torch.cuda.mem_get_info = lambda *_: (BYTES - memory.held_bytes(), BYTES)
    import flash  # of this folder
    import nccl

    flash.install()
    nccl.install()
    atexit.register(time.sleep, 0.2)  # in which autograd's thread of the device lets go of what is Python's


if "SIMULATED_GPU" in os.environ:
    install(*os.environ["SIMULATED_GPU"].split(os.pathsep))
