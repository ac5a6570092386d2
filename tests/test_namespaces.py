"""Two machines, as far as the network goes: two ranks on each side of a cable that can be pulled. And who comes to the port unasked."""

import ctypes
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from datetime import timedelta

import pytest
import torch.distributed as dist
from conftest import Ranks, free_port
from test_preemption import last_step, saved, until
from test_resume import FULL, LONG, result, steps_done
from test_watchdog import ENDLESS, command, lines

from engine.errors import ENVIRONMENT, PEER, PREEMPTED

NEW_NETWORK = 0x40000000
LIBC = ctypes.CDLL(None, use_errno=True)


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


class Cable:
    """Namespaces `a` and `b` of 10.97.0.1 and 10.97.0.2, joined by a cable."""

    def __init__(self) -> None:
        self.names = [f"engine-{os.getpid()}-{side}" for side in "ab"]
        for name in self.names:
            ip("netns", "add", name)
        ip("link", "add", "cable", "netns", self.names[0], "type", "veth", "peer", "name", "cable", "netns", self.names[1])
        for number, name in enumerate(self.names, 1):
            ip("-n", name, "addr", "add", f"10.97.0.{number}/24", "dev", "cable")
            self.up(name, "lo")
            self.up(name, "cable")

    @staticmethod
    def up(name: str, link: str) -> None:
        ip("-n", name, "link", "set", link, "up")

    def pull(self) -> None:
        ip("-n", self.names[1], "link", "set", "cable", "down")

    def plug(self) -> None:
        self.up(self.names[1], "cable")

    def enter(self, side: int) -> None:
        """From here on this process, with what it starts, is on that side. For a forked child."""
        with open(f"/var/run/netns/{self.names[side]}") as file:
            if LIBC.setns(file.fileno(), NEW_NETWORK):
                raise OSError(ctypes.get_errno(), "setns")
        os.environ.update(GLOO_SOCKET_IFNAME="cable", MASTER_ADDR="10.97.0.1", MASTER_PORT="29500")


@pytest.fixture
def cable() -> Iterator[Cable]:
    if os.geteuid() or not shutil.which("ip"):
        pytest.skip("network namespaces need root and the command ip")
    names = []
    try:
        try:
            made = Cable()
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces of one's own here: {error.stderr}")
        names = made.names
        yield made
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


@pytest.fixture
def two_hosts(cable, ranks) -> Callable[[list[str]], Ranks]:
    """Starts ranks 0 and 1 on one side, 2 and 3 on the other."""

    def start(arguments: list[str]) -> Ranks:
        return ranks(4, lambda: (cable.enter(int(os.environ["RANK"]) // 2), command(arguments)))

    return start


def test_two_hosts_ride_out_a_short_partition_to_the_bit(recipe, two_hosts, cable, trained, tmp_path):
    options = (*FULL, *LONG, "train.timeout_s=5")
    trained(4, recipe(*options, name="whole"))
    started = two_hosts(recipe(*options, name="parted"))
    until(lambda: steps_done(tmp_path / "runs/parted") >= 3, "steps")
    cable.pull()
    before = steps_done(tmp_path / "runs/parted")
    time.sleep(1.5)
    assert steps_done(tmp_path / "runs/parted") <= before + 1, "the cable was not pulled"
    cable.plug()
    assert started.wait() == [0] * 4, started.log.read_text()
    assert result(tmp_path / "runs/parted") == result(tmp_path / "runs/whole")


@pytest.mark.faults
@pytest.mark.parametrize("number", range(4))
def test_a_partition_ends_both_sides(recipe, two_hosts, cable, tmp_path, number):
    """At a random moment, a save among them."""
    run = tmp_path / "runs/run"
    started = two_hosts(recipe(*ENDLESS, "train.timeout_s=10", "checkpoint.every_steps=2"))
    until(lambda: steps_done(run) >= 4, "steps")
    time.sleep(random.Random(number).random())
    cable.pull()
    began = time.monotonic()
    assert started.wait() == [PEER] * 4, started.log.read_text()
    assert 9 < time.monotonic() - began < 20
    said = lines(started, "PEER-HUNG")
    assert any("rank 2 has been silent" in line and "rank 3 has been silent" in line for line in said), started.log.read_text()  # the side of the store
    assert any(line.startswith("[rank 2]") and "rank 0 has been silent" in line for line in said), started.log.read_text()
    assert saved(run) > 0 and json.loads((run / "last_error.json").read_text())["exit_code"] == PEER
    cable.plug()
    began, started = last_step(run), two_hosts(recipe(*ENDLESS, "train.timeout_s=10", "checkpoint.every_steps=2"))
    until(lambda: last_step(run) > began, "it goes on")
    os.kill(started.pids[3], signal.SIGUSR1)
    assert started.wait() == [PREEMPTED] * 4, started.log.read_text()


# --- the port --------------------------------------------------------------------------------------------------------


def placed(port: int, arguments: list[str], missing: int = -1) -> int:
    if int(os.environ["RANK"]) == missing:
        return 0
    os.environ["MASTER_PORT"] = str(port)
    command(arguments)
    return 0


def test_a_port_that_is_taken_is_the_machines_fault(recipe, ranks):
    with socket.socket() as other:
        other.bind(("0.0.0.0", 0))
        other.listen()
        port = other.getsockname()[1]
        started = ranks(1, lambda: (os.environ.update(WORLD_SIZE="2"), placed(port, recipe()))[1])
        assert started.wait(30) == [ENVIRONMENT]
    said, = (line for line in started.log.read_text().splitlines() if "ERROR" in line)
    assert f"MASTER_PORT={port}: another program listens there" in said


@pytest.mark.faults
@pytest.mark.parametrize("missing", [0, 2])
def test_a_rank_that_never_comes_is_named(recipe, ranks, missing):
    port = free_port()
    began = time.monotonic()
    started = ranks(3, lambda: placed(port, recipe("train.timeout_s=1"), missing))
    codes = started.wait(30)
    assert codes == [0 if rank == missing else PEER for rank in range(3)], started.log.read_text()
    assert 5 < time.monotonic() - began < 20
    said = lines(started, "PEER-MISSING")
    assert len(said) == 2 and all(("rank 2 of 3 did not come" if missing else "rank 0 does not answer") in line for line in said), said


@pytest.mark.faults
def test_who_comes_to_the_port_unasked_changes_nothing(recipe, ranks, trained, tmp_path):
    """Random bytes, and a client of torch's that writes keys: the run goes on, or stops; it never reads what it was sent as code."""
    options = (*FULL, *LONG, "train.epochs=6")
    trained(2, recipe(*options, name="whole"))
    port = free_port()
    started = ranks(2, lambda: placed(port, recipe(*options, name="visited")))
    until(lambda: steps_done(tmp_path / "runs/visited") >= 2, "steps")
    draw = random.Random(0)
    for size in (1, 20, 5000):
        with socket.create_connection(("127.0.0.1", port)) as stray:
            stray.sendall(draw.randbytes(size))
    stray = dist.TCPStore("127.0.0.1", port, None, False, timedelta(seconds=5), wait_for_workers=False)
    pickled = b"cos\nsystem\n(S'touch " + str(tmp_path / "canary").encode() + b"'\ntR."
    for key in ("watchdog/beat/0", "watchdog/beat/1", "group/0", "group/default_pg/0//store_based_barrier_key", "anything"):
        for value in (pickled, b"[" * 100_000, b'{"number": "one"}', b"\xff" * 1000):
            stray.set(key, value)
    codes = started.wait()
    assert codes in ([0, 0], [PEER, PEER]), started.log.read_text()
    assert not (tmp_path / "canary").exists()
    if codes == [0, 0]:
        assert result(tmp_path / "runs/visited") == result(tmp_path / "runs/whole")
