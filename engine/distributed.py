"""The process group: who this rank is, how ranks agree. The one file that imports torch.distributed or reads its variables."""

import json
import os
import secrets
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as TooLate
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from engine import collector, errors, watchdog
from engine.errors import ENVIRONMENT, PEER, STORE, EngineError
from engine.watchdog import Watchdog

LOOPBACK = ("127.0.0.1", "localhost")

# What lives until the process ends. The last reference to a wrapped model takes the gloo group down with the interpreter's lock held, and
# waits for a thread that may want this lock to let go of its tensors: the rank would hang at the very end. And rank 0's store would close with
# its failure, while others, whose patience ends a moment later, are still to find out what it has found.
_KEPT: list[nn.Module | dist.Store] = []

PATIENCE = 5  # times `timeout_s` in which ranks must have met
# An exchange has no time limit of its own: a rank may wait long for one that saves or exports, and the watchdog tells that from a hang.
UNLIMITED = timedelta(days=7)

# In the first line of torch's errors: the machine's lack of memory, a GPU or driver that fails, and of these what a wrong kernel or call does.
NO_MEMORY = ("can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
OF_GPU = ("CUDA error", "CUDA driver error", "cuDNN error")
NO_SAME_BITS = "does not have a deterministic implementation"
OF_KERNEL = ("device-side assert", "illegal memory access", "misaligned address", "invalid argument", "invalid configuration", "_INVALID_VALUE", "BAD_PARAM")

_watchdogs: list[Watchdog] = []  # this rank's, while it is in a group


@dataclass(frozen=True)
class World:
    """This rank's place: `rank` of `size` processes, `local_rank` on its node, computing on `device`."""

    rank: int
    size: int
    local_rank: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0


def init(device: str, timeout_s: float, deterministic: bool = True) -> World:
    """Joins the group that a launcher described in the environment; a world of one without a launcher, and no group then.

    Args:
        device: "auto", "cpu" or "cuda". CUDA ranks talk over NCCL, CPU ranks over gloo.
        deterministic: CUDA's kernels and libraries give the same bits each time; torch refuses an operation that has no way to.
    """
    rank, size, local_rank = _place()
    available = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "cuda" and not available:
        raise EngineError("ENVIRONMENT-CUDA", "train.device=cuda, but torch sees no CUDA device; set train.device=cpu", ENVIRONMENT)
    on_cuda = available > 0 and device != "cpu"
    if on_cuda and size > 1 and "LOCAL_RANK" not in os.environ:
        raise _no_launch("LOCAL_RANK is not set, which tells the GPU")
    if on_cuda and local_rank >= available:
        raise EngineError("ENVIRONMENT-CUDA", f"local rank {local_rank} has no GPU of its own, the node shows {available}; "
                          f"start at most {available} ranks a node or set train.device=cpu", ENVIRONMENT)
    where = torch.device("cuda", local_rank) if on_cuda else torch.device("cpu")
    if on_cuda:
        torch.cuda.set_device(where)
        if deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # which cuBLAS reads when it is first used
            torch.use_deterministic_algorithms(True)  # by warn_only attention's backward would stay as it is: torch then warns, and adds in any order
            torch.utils.deterministic.fill_uninitialized_memory = False  # with NaN, which would find bugs and takes time
    else:
        # oneDNN keeps a compiled product for every shape it met, megabytes each, up to 1024 of them. Packs differ in shape
        # from step to step; this many are those of a few micro-batches.
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    if size > 1:
        store = _meet(rank, size, timeout_s)
        with watchdog.exchange():
            _watchdogs[-1].start()
            dist.init_process_group("nccl" if on_cuda else "gloo", store=store, rank=rank, world_size=size,
                                    timeout=UNLIMITED, device_id=where if on_cuda else None)
    return World(rank, size, local_rank, where)


def _place() -> tuple[int, int, int]:
    """Rank, size and local rank as the launcher set them."""
    try:
        rank, size, local_rank = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    except ValueError as error:
        raise _no_launch(str(error)) from error
    if not (0 <= rank < size and 0 <= local_rank < size):
        raise _no_launch(f"RANK={rank} LOCAL_RANK={local_rank} WORLD_SIZE={size}, expected ranks from 0 to WORLD_SIZE - 1")
    if size > 1 and not (os.environ.get("MASTER_ADDR") and os.environ.get("MASTER_PORT", "").isdecimal()):
        raise _no_launch(f"WORLD_SIZE={size}, but MASTER_ADDR or MASTER_PORT is not set")
    return rank, size, local_rank


def variables(*names: str) -> dict[str, str]:
    """Those of the environment's variables that are set: a launcher's, or such as decide what torch finds."""
    return {name: os.environ[name] for name in names if name in os.environ}


def _no_launch(what: str) -> EngineError:
    return EngineError("LAUNCH-RANK", f"{what}; a launcher sets these variables: ./torchrun.sh or torchrun; for one process unset them all")


def _meet(rank: int, size: int, timeout_s: float) -> dist.Store:
    """The group's store once every rank of this start has come to it; appends this rank's watchdog.

    A launcher's store outlives its ranks, and with it what those that are gone wrote there. So each rank signs in under a word of its
    own, rank 0 publishes all words, and one who finds his own among them uses keys of that start: they begin with rank 0's word.
    """
    by_launcher, patience = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True", PATIENCE * timeout_s
    store, words = _store(rank == 0 and not by_launcher, size, patience), [f"meeting/{other}" for other in range(size)]
    own_word, start, own = secrets.token_hex(8), None, None
    store.set(words[rank], own_word)
    end, pause = time.monotonic() + patience, 0.005
    while True:
        if rank == 0 and store.check(words):
            store.set("meeting", b",".join(store.multi_get(words)))
        found = store.get("meeting").decode(errors="replace").split(",") if store.check(["meeting"]) else []
        if len(found) == size and found[rank] == own_word and found[0] != start:
            start = found[0]
            own = Watchdog(dist.PrefixStore(f"{start}/watchdog", store.clone()), rank, size, None if by_launcher else 0, timeout_s)
        if own and own.store.check([own.key(other) for other in own.others]):
            _watchdogs.append(own)
            return dist.PrefixStore(f"{start}/group", store)
        if time.monotonic() > end:
            _KEPT.append(store)
            missing = [other for other in range(size) if other != rank and not (own.store.check([own.key(other)]) if own else store.check([words[other]]))]
            raise EngineError("PEER-MISSING", f"{_address()}: rank {', '.join(map(str, missing or [0]))} of {size} did not come within {patience:g} s, "
                              f"{PATIENCE} × train.timeout_s; look at what became of it, or raise train.timeout_s", PEER)
        time.sleep(pause := min(1.5 * pause, max(0.05, size / 1000)))  # all ask one store


def _store(holds: bool, size: int, patience: float) -> dist.TCPStore:
    """On rank 0, which `holds` it, or in torchrun where that started the ranks and holds one."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    loopback = next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), None)  # of Linux, of macOS
    if on_one_node := address in LOOPBACK and loopback is not None:  # what ranks say to each other stays there too
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", loopback)
    try:
        # A store has no password and by itself listens on every interface: that of one node gets a socket that this node alone can reach.
        socket_of_one_node = (_launchers_socket() or socket.create_server(("127.0.0.1", port)).detach()) if holds and on_one_node else None
        # In a thread: within torch this one would note no request to stop, and wait for ever where somebody listens and does not answer.
        making = ThreadPoolExecutor(1).submit(dist.TCPStore, address, port, size, holds, timedelta(seconds=patience), wait_for_workers=False,
                                              master_listen_fd=socket_of_one_node)
        return making.result(patience)
    except (TooLate, dist.DistNetworkError, OSError) as error:
        if not isinstance(error, TooLate) and (isinstance(error, OSError) or "EADDRINUSE" in str(error)):
            raise EngineError("ENVIRONMENT-PORT", f"{_address()}: another program listens there; set another port, the same on all ranks",
                              ENVIRONMENT) from error
        raise EngineError("PEER-MISSING", f"{_address()}: rank 0 does not answer there for {patience:g} s; expected it to be started, and its node to be "
                          "reached", PEER) from error


def _launchers_socket() -> int | None:
    """That which node.py has opened, and rank 0 inherited."""
    found = os.environ.pop(STORE, None)
    return int(found) if found else None


def _address() -> str:
    return f"MASTER_ADDR={os.environ['MASTER_ADDR']} MASTER_PORT={os.environ['MASTER_PORT']}"


@contextmanager
def losses_told() -> Iterator[None]:
    """Makes the loss of a peer, wherever the block finds out, an EngineError that names it; tells the peers of every other failure in the block."""
    try:
        yield
    except BaseException as error:
        text, rank, own = errors.first_line(error), errors.rank_in_launch(), _watchdogs[-1] if _watchdogs else None
        if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error)):
            raise (own.lost(text) if own else EngineError("PEER-LOST", f"rank {rank} lost the others before they had met: {text}", PEER)) from error
        told = error
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(words in text for words in NO_MEMORY):
            told = EngineError("ENVIRONMENT-MEMORY", f"rank {rank} has no memory left in {watchdog.now.place}: {text}; lower train.micro_batch or "
                               "data.max_length, or set train.activation_checkpointing", ENVIRONMENT)
        elif isinstance(error, RuntimeError) and any(words in text for words in OF_GPU) and not any(words in text for words in OF_KERNEL):
            told = EngineError("ENVIRONMENT-GPU", f"the GPU of rank {rank} failed in {watchdog.now.place}: {text}; look on that machine for Xid in dmesg and "
                               "for ECC in nvidia-smi -q, then start again, which resumes from the last checkpoint", ENVIRONMENT)
        elif isinstance(error, RuntimeError) and NO_SAME_BITS in text:
            told = EngineError("TRAIN-DETERMINISTIC", f"{text.partition(',')[0]}; set train.deterministic=false: repetitions may then differ in the last bits")
        if own:
            own.leave(told.line if isinstance(told, EngineError) else f"{type(error).__name__}: {text}", cause=True)
        if told is error:
            raise
        raise told from error


def close(world: World) -> None:
    """Leaves the group once all ranks are here, so that none is gone while another still works, which may be long: rank 0 exports."""
    if world.size > 1:
        with watchdog.exchange():
            dist.barrier()
        _watchdogs.pop().stop()
        dist.destroy_process_group()


@watchdog.exchange()
def wrap(model: nn.Module, world: World) -> nn.Module:
    """`model` in DistributedDataParallel, so that backward sums gradients over ranks; `model` itself in a world of one.

    Raises:
        EngineError: ranks hold other bits, where DDP would hand out rank 0's and say nothing.
    """
    if world.size == 1:
        return model
    alike = {name: one for name, one in model.named_parameters() if ".lora_" not in name}  # a start by PiSSA may differ with the threads, and is handed out
    check_replicas(alike, world)
    wrapped = DistributedDataParallel(model, device_ids=[world.device] if world.device.type == "cuda" else None,
                                      gradient_as_bucket_view=True)
    _KEPT.append(wrapped)
    return wrapped


@watchdog.exchange()
def settle(ddp_model: nn.Module, zero_loss: Callable[[], Tensor]) -> None:
    """Runs one backward that adds nothing, so that DDP lays out its gradient buckets before the first real step.

    DDP reorders its buckets after the first backward of a process, and with more than two ranks the ring sums an
    element in an order that depends on where it lies in its bucket. Without this, the first step after a resume
    would differ in the last bit from the same step of a run that was never stopped.
    """
    zero_loss().backward()
    ddp_model.zero_grad(set_to_none=True)
    collector.resume()  # all is loaded


def sync_if(ddp_model: nn.Module, last: bool) -> AbstractContextManager:
    """Gradients are exchanged in the backward of a step's last micro-batch only."""
    if not isinstance(ddp_model, DistributedDataParallel):
        return nullcontext()
    return _finished_exchange(ddp_model.device) if last else ddp_model.no_sync()


@contextmanager
def _finished_exchange(device: torch.device) -> Iterator[None]:
    """An exchange that is over when its block is: NCCL's goes on in the background, and whoever waited for it later would not be seen waiting."""
    with watchdog.exchange():
        yield
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()


@watchdog.exchange()
def sum_over_ranks(values: list[float], world: World) -> list[float]:
    """Element-wise sum over all ranks, in float64, on every rank alike."""
    if world.size == 1:
        return list(values)
    total = torch.tensor(values, dtype=torch.float64, device=world.device)
    dist.all_reduce(total)
    return total.tolist()


@watchdog.exchange()
def from_first(number: int, world: World) -> int:
    """Rank 0's whole number, on every rank."""
    if world.size == 1:
        return number
    shared = torch.tensor([number], dtype=torch.int64, device=world.device)
    dist.broadcast(shared, src=0)
    return int(shared.item())


@watchdog.exchange()
def gather_text(text: str, world: World) -> list[str]:
    """Every rank's text, by rank, on every rank. As bytes in tensors: torch's object collectives would unpickle."""
    if world.size == 1:
        return [text]
    data = torch.frombuffer(bytearray(text.encode("utf-8") or b"\0"), dtype=torch.uint8).to(world.device)
    lengths = [torch.zeros(1, dtype=torch.int64, device=world.device) for _ in range(world.size)]
    dist.all_gather(lengths, torch.tensor([len(data)], dtype=torch.int64, device=world.device))
    longest = max(int(length) for length in lengths)
    padded = torch.zeros(longest, dtype=torch.uint8, device=world.device)
    padded[: len(data)] = data
    parts = [torch.zeros_like(padded) for _ in range(world.size)]
    dist.all_gather(parts, padded)
    return [bytes(part[: int(length)].tolist()).decode("utf-8").strip("\0") for part, length in zip(parts, lengths, strict=True)]


def check_same(facts: dict[str, Any], world: World) -> None:
    """Raises EngineError that names the first fact in which a rank differs from rank 0, and the ranks: before they train together.

    What they compute on is such a fact, for each rank updates a copy of the weights and another GPU or instruction set may round
    otherwise. Ranks may differ in `threads`, as nodes have cores: rank 0 warns, since a run with other ones would round otherwise.
    """
    facts = {**_computes_on(world.device), **facts}
    found = [json.loads(text) for text in gather_text(json.dumps(facts, default=str), world)]
    for name in facts:
        if others := [rank for rank, one in enumerate(found) if one.get(name) != found[0].get(name)]:
            if name == "threads":
                if world.is_first:
                    print(f"WARNING ranks compute with {', '.join(str(one[name]) for one in found)} threads: a repetition is bit-identical only with the "
                          "same; set OMP_NUM_THREADS alike", file=sys.stderr, flush=True)
                continue
            raise EngineError("PEER-DIFFERS", f"{name}: rank {others[0]} has {found[others[0]][name]}, rank 0 has {found[0][name]} (ranks that differ: "
                              f"{', '.join(map(str, others))}); expected the same everywhere: look at the files and options of their nodes", PEER)


def _computes_on(device: torch.device) -> dict[str, str]:
    if device.type == "cuda":
        return {"GPU": torch.cuda.get_device_name(device)}
    return {"instruction set of the CPU (ATEN_CPU_CAPABILITY=default makes all alike)": torch.backends.cpu.get_cpu_capability()}


def bit_sums(tensors: dict[str, Tensor]) -> Tensor:
    """One number a tensor: its elements' bits as whole numbers, summed modulo 2^64. One flipped bit changes it."""
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    flat = [tensor.detach().reshape(-1).view(whole[tensor.itemsize]) for tensor in tensors.values()]
    return torch.stack([sum(part.sum(dtype=torch.int64) for part in one.split(1 << 24)) for one in flat])  # a sum makes a copy of 8 bytes an element


@watchdog.exchange()
def check_replicas(tensors: dict[str, Tensor], world: World) -> None:
    """Raises EngineError unless every rank holds the same bits in every tensor, as replicas must after each step."""
    if world.size == 1:
        return
    own = bit_sums(tensors)
    of_ranks = [torch.empty_like(own) for _ in range(world.size)]
    dist.all_gather(of_ranks, own)
    differs = (torch.stack(of_ranks) != of_ranks[0]).cpu()
    if differs.any():
        number = int(differs.any(0).nonzero()[0])
        ranks = ", ".join(map(str, differs[:, number].nonzero()[:, 0].tolist()))
        raise EngineError("PEER-REPLICA", f"{list(tensors)[number]} differs from rank 0's on rank {ranks} (and {int(differs.any(0).sum()) - 1} more "
                          "parameters differ); expected the same bits everywhere. Nothing was saved: look at these ranks' hardware, before the first "
                          "step at their nodes' copies of the model, too, then start again, which resumes from the last checkpoint", PEER)


def fork_ranks(size: int, main: Callable[[list[str]], int | None], log: Path, threads: int) -> list[int]:
    """Runs `main` as each of `size` ranks, set up as a launcher does, in processes forked from this one; exit codes by rank.

    torch is imported once, so ranks start in a fraction of a second; this process must not have used a device or threads of torch
    before. Their output goes to `log`, each has `threads`. Once one has failed the others have two seconds to tell why.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        place = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    sys.stdout.flush()
    sys.stderr.flush()
    running, codes = {}, {}
    try:
        for rank in range(size):
            if pid := os.fork():
                running[pid] = rank
                continue
            try:
                output = os.open(log, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
                os.dup2(output, 1)
                os.dup2(output, 2)
                os.environ.update(place, RANK=str(rank), LOCAL_RANK=str(rank))
                torch.set_num_threads(threads)
                errors.run(main)
            finally:
                os._exit(errors.BUG)  # not reached, unless the lines above fail
        end = float("inf")
        while running and time.monotonic() < end:
            pid, status = os.waitpid(-1, os.WNOHANG if any(codes.values()) else 0)
            if pid:
                codes[rank := running.pop(pid)] = os.waitstatus_to_exitcode(status)
                end = min(end, time.monotonic() + 2) if codes[rank] else end
            else:
                time.sleep(0.02)
    finally:
        for pid, rank in running.items():
            os.kill(pid, signal.SIGKILL)
            codes[rank] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return [codes[rank] for rank in range(size)]


def shard(groups: list[dict[str, Any]], make: Callable[[list[dict[str, Any]]], torch.optim.Optimizer]) -> torch.optim.Optimizer:
    """An optimizer of which each rank runs `make` for its share of the parameters and then sends them to the others.

    Shares are of whole parameters and about equal (ZeRO stage 1: Rajbhandari et al. 2020). `optim` of what is returned is this
    rank's own part. torch's way to bring the parts together would pickle; see `gather_tensors`.
    """
    from torch.distributed.optim import ZeroRedundancyOptimizer  # takes a second to import, and few runs shard

    optimizer = ZeroRedundancyOptimizer(groups, optimizer_class=make)
    optimizer.step = _finished_exchange(groups[0]["params"][0].device)(optimizer.step)
    return optimizer


@watchdog.exchange()
def gather_tensors(tensors: dict[str, Tensor], world: World) -> dict[str, Tensor]:
    """All ranks' named tensors on rank 0, on the CPU; nothing on the others. One at a time crosses, as raw numbers.

    Every rank calls it. No two ranks may hold the same name.
    """
    heads = gather_text(json.dumps({name: [str(tensor.dtype).removeprefix("torch."), list(tensor.shape)] for name, tensor in tensors.items()}), world)
    if not world.is_first:
        for tensor in tensors.values():
            dist.send(tensor.to(world.device).contiguous(), dst=0)
        return {}
    found = {name: tensor.cpu() for name, tensor in tensors.items()}
    for rank, head in enumerate(heads[1:], 1):
        for name, (dtype, shape) in json.loads(head).items():
            assert name not in found, f"{name} comes from rank {rank} and from one before it"
            arriving = torch.empty(shape, dtype=getattr(torch, dtype), device=world.device)
            dist.recv(arriving, src=rank)
            found[name] = arriving.cpu()
    return found
