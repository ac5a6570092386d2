"""Ranks find each other, and those of their own start alone; who fails on the way there tells, and a request to stop is obeyed."""

import os
import signal
import socket
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from test_preemption import until
from test_watchdog import fail, kill_self

from engine import distributed, errors
from engine.errors import BUG, DONE, PEER, PREEMPTED, USER
from engine.signals import StopRequest


def joined(timeout_s: float) -> int:
    """Joins the group and leaves it."""
    with distributed.losses_told():
        world = distributed.init("cpu", timeout_s)
        assert distributed.sum_over_ranks([1.0], world) == [world.size]
        distributed.close(world)
    return DONE


def as_rank(rank: int, size: int, **variables: object) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), **{name: str(value) for name, value in variables.items()})


@pytest.mark.parametrize("listens", [False, True], ids=["nobody", "one that is silent"])
def test_a_rank_that_waits_for_the_first_one_obeys_a_stop(ranks, tmp_path, listens):
    def waiting() -> int:
        stop = StopRequest()
        with stop, socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            if listens:
                taken.listen()
            as_rank(1, 2, MASTER_PORT=taken.getsockname()[1])
            (tmp_path / "waits").touch()
            errors.run(lambda _: joined(60))
        return BUG

    started = ranks(1, waiting)
    until((tmp_path / "waits").exists, "it waits")
    time.sleep(0.5)
    os.kill(started.pids[0], signal.SIGTERM)
    assert started.wait(5) == [PREEMPTED], started.log.read_text()


def test_a_first_rank_that_is_not_there_is_told_in_one_line(ranks):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        started = ranks(1, lambda: (as_rank(1, 2, MASTER_PORT=silent.getsockname()[1]), joined(0.2))[1])
        assert started.wait(10) == [PEER]
    line, = started.log.read_text().splitlines()
    assert "ERROR E-PEER-MISSING" in line and "rank 0 does not answer there for 1 s" in line


@pytest.mark.parametrize("how", ["fails", "is killed"])
def test_a_rank_that_goes_while_the_group_is_made_is_named_by_the_others(ranks, how):
    def main() -> int:
        plain = dist.init_process_group

        def hooked(*arguments, **options):
            if os.environ["RANK"] == "1":
                time.sleep(0.5)
                kill_self() if how == "is killed" else fail()
            plain(*arguments, **options)

        dist.init_process_group = hooked
        return joined(3)

    began, started = time.monotonic(), ranks(2, main)
    assert started.wait(14) == [PEER, -signal.SIGKILL if how == "is killed" else BUG], started.log.read_text()
    assert time.monotonic() - began < 10, "five times the timeout is 15 s"
    said, = (line for line in started.log.read_text().splitlines() if "ERROR" in line)
    assert "rank 1 left: ValueError: planted" in said or how == "is killed" and "rank 1 " in said


# --- one store, several starts ---------------------------------------------------------------------------------------


@pytest.fixture
def agent(ranks, tmp_path) -> dict[str, object]:
    """What torchrun sets for ranks that meet at its own store, in a process of its own, which outlives them."""

    def holds() -> int:
        store = dist.TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=60), wait_for_workers=False)
        (tmp_path / "port.new").write_text(str(store.port))
        os.rename(tmp_path / "port.new", tmp_path / "port")
        time.sleep(100)
        return DONE

    ranks(1, holds)
    until((tmp_path / "port").exists, "it listens")
    return {"MASTER_PORT": (tmp_path / "port").read_text(), "TORCHELASTIC_USE_AGENT_STORE": True}


def test_nodes_that_count_restarts_differently_meet(ranks, agent):
    """c10d's rendezvous counts no change of membership, and a node counts its own."""
    started = ranks(2, lambda: (as_rank(rank := int(os.environ["RANK"]), 2, **agent, TORCHELASTIC_RESTART_COUNT=rank), joined(3))[1])
    assert started.wait(20) == [DONE, DONE], started.log.read_text()


def test_a_start_knows_nothing_of_those_before_it(ranks, agent):
    """Also where one of those is waited for: rank 1 came to the start before this one, whose rank 0 died, and goes on with the new rank 0."""
    def main(first_dies: bool) -> int:
        as_rank(rank := int(os.environ["RANK"]), 2, **agent)
        if first_dies and rank == 0:
            time.sleep(0.5)  # the other one finds what the start before has left
            distributed.Watchdog = lambda *_: kill_self()  # once it has published
        return joined(20)

    assert ranks(2, lambda: main(False)).wait(20) == [DONE, DONE]
    dies = ranks(2, lambda: main(True))
    assert os.waitpid(dies.pids[0], 0)[1] == signal.SIGKILL
    time.sleep(0.5)
    again = ranks(1, lambda: main(False))
    assert again.wait(20) == [DONE] and os.waitpid(dies.pids[1], 0)[1] == DONE, dies.log.read_text() + again.log.read_text()


# --- what a launcher forgot ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variables, said", [
    ({"RANK": "1"}, "RANK=1 LOCAL_RANK=0 WORLD_SIZE=1"), ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2"), ({"RANK": "-1"}, "RANK=-1"),
    ({"RANK": "one"}, "'one'"), ({"WORLD_SIZE": "two"}, "'two'"),
    ({"WORLD_SIZE": "2"}, "MASTER_ADDR"), ({"WORLD_SIZE": "2", "MASTER_ADDR": "host"}, "MASTER_PORT"),
])
def test_a_place_that_cannot_be_is_refused(monkeypatch, variables, said):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert errors.rank_in_launch() in (0, 1, 2), "asked before it is refused"
    with pytest.raises(errors.EngineError, match=said) as raised:
        distributed.init("cpu", 1)
    assert raised.value.exit_code == USER and raised.value.name == "LAUNCH-RANK"


def test_ranks_on_gpus_must_know_which(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(errors.EngineError, match="LOCAL_RANK is not set") as raised:
        distributed.init("auto", 1)
    assert raised.value.exit_code == USER


# --- what the machine does to a rank ---------------------------------------------------------------------------------


@pytest.mark.parametrize("error, name", [
    (torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered\nCUDA kernel errors might be"), "ENVIRONMENT-GPU"),
    (torch.AcceleratorError("CUDA error: unspecified launch failure"), "ENVIRONMENT-GPU"),
    (RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"), "ENVIRONMENT-GPU"),
    (RuntimeError("CUDA driver error: unknown error"), "ENVIRONMENT-GPU"), (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR"), "ENVIRONMENT-GPU"),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "ENVIRONMENT-MEMORY"),
    (torch.AcceleratorError("CUDA error: out of memory"), "ENVIRONMENT-MEMORY"), (torch.OutOfMemoryError("CUDA out of memory. Tried"), "ENVIRONMENT-MEMORY"),
    (torch.AcceleratorError("CUDA error: device-side assert triggered"), None), (torch.AcceleratorError("CUDA error: an illegal memory access was"), None),
    (RuntimeError("CUDA error: CUBLAS_STATUS_INVALID_VALUE when calling"), None), (RuntimeError("shapes differ"), None),
])
def test_a_gpu_that_fails_is_the_machines_fault_and_a_wrong_kernel_is_ours(error, name):
    with pytest.raises(errors.EngineError if name else type(error)) as raised, distributed.losses_told():
        raise error
    if name:
        assert (raised.value.name, raised.value.exit_code) == (name, errors.ENVIRONMENT) and str(error).splitlines()[0] in raised.value.text
        assert name != "ENVIRONMENT-GPU" or "Xid" in raised.value.text and "nvidia-smi -q" in raised.value.text
