"""engine.verify holds on the engine, and fails in the right line where something is planted in the code that it looks at."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch

from engine import attention, checkpoint, distributed, optim, train, verify
from engine.errors import BUG, PEER, USER

PACKED = ("data.packing=true", "data.max_length=128", "train.global_batch=4", "train.micro_batch=3", "model.dropout=0.1")


def edited(module, old: str, new: str) -> None:
    """Runs a module's source again with one place changed."""
    source = Path(module.__file__).read_text(encoding="utf-8")
    assert source.count(old) == 1, old
    exec(compile(source.replace(old, new), module.__file__, "exec"), vars(module))


@pytest.fixture
def verified(ranks, recipe, tmp_path):
    """`verified(plant, *options)`: exit code and output of a verification in a process of its own, after `plant()`."""

    def run(plant, *options: str) -> tuple[int, str]:
        def planted() -> int:
            plant()
            return verify.main(recipe(*PACKED, *options))

        started = ranks(1, planted)
        [code] = started.wait()
        assert not list((tmp_path / "runs").glob(".*")), "something is left behind"
        return code, started.log.read_text()

    return run


@pytest.mark.parametrize("options", [(), ("lora.rank=4", "lora.dropout=0.2", "lora.targets=[all-linear]", "train.precision=bf16", "model.dtype=bf16"),
                                     ("optim.name=adamw_bf16", "model.dtype=bf16", "optim.shard=true", "train.attention=reference", "data.packing=false")],
                         ids=["full", "lora", "bf16"])
def test_holds_on_the_engine(verified, options):
    code, output = verified(lambda: None, *options)
    assert code == 0 and "All 9 checks hold" in output, output


def mean_of_means():
    edited(train, "scale.value * world.size / (step.num_targets or 1)", "scale.value / max(1, len(batch.targets)) / len(batches)")


def never_exchanged():
    edited(train, "sync_if(ddp_model, batch is batches[-1])", "sync_if(ddp_model, False)")


def gradients_kept():
    edited(train, "            optimizer.zero_grad(set_to_none=True)\n", "")


def one_document_for_the_loop():
    edited(train, "PackedAttention(batch.documents, device, attention)", "PackedAttention([sum(batch.documents)], device, attention)")


def one_document():
    edited(attention, "self.path, self.lengths = path, list(lengths)", "self.path, self.lengths = path, [sum(lengths)]")


def kernel_off_by_a_thousandth():
    plain = attention._sdpa
    attention._sdpa = lambda q, k, v, window: plain(q * 1.001, k, v, window)


def moment_forgotten():
    load = optim.load_state
    optim.load_state = lambda optimizer, trained, tensors: load(optimizer, trained, {
        name: torch.zeros_like(tensor) if name.endswith("exp_avg") else tensor for name, tensor in tensors.items()})


def checkpoint_overlooked():
    checkpoint.newest_whole = lambda folder: None


def bit_flipped():
    edited(train, "                optimizer.step()\n", "                optimizer.step()\n                if number == 1 and world.rank == 1:\n"
           "                    list(trained.values())[3].data.view(-1).view(__import__('torch').int32)[5] ^= 1\n")


@pytest.mark.parametrize(("plant", "name", "line"), [
    (mean_of_means, "SPLIT", "1 rank × micro-batch 3"), (never_exchanged, "REPLICAS", "replicas"), (gradients_kept, "SPLIT", "1 rank × micro-batch 3"),
    (one_document_for_the_loop, "SPLIT", "1 rank × micro-batch 3"), (one_document, "PACKED", "packed"), (kernel_off_by_a_thousandth, "ATTENTION", "attention"),
    (moment_forgotten, "RESUME", "resumed"), (checkpoint_overlooked, "RESUME", "resumed"), (bit_flipped, "REPLICAS", "replicas"),
], ids=lambda value: getattr(value, "__name__", None))
def test_what_is_planted_is_found(verified, plant, name, line):
    def planted() -> None:
        plant()
        verify.SPLITS = ((1, 3), (2, 1))  # the others take time and find the same

    code, output = verified(planted)
    failed = [row for row in output.splitlines() if " FAIL " in row]
    assert code == BUG and failed[0].startswith(line) and f"ERROR E-VERIFY-{name} {line}" in output, output


def test_a_flipped_bit_is_named(ranks):
    def main() -> int:
        world = distributed.init("cpu", 60)
        tensors = {"whole": torch.ones(5), "half": torch.ones(3, 2, dtype=torch.bfloat16), "last": torch.zeros(())}
        distributed.check_replicas(tensors, world)
        if world.rank == 2:
            tensors["half"].view(torch.int16)[1, 1] ^= 1 << 15
        distributed.check_replicas(tensors, world)
        return 0

    started = ranks(4, main)
    assert started.wait() == [PEER] * 4
    assert started.log.read_text().count("half differs from rank 0's on rank 2 (and 0 more parameters differ)") == 4


def test_ended_from_outside_it_leaves_nothing(ranks, recipe, tmp_path):
    started = ranks(1, lambda: verify.main(recipe(*PACKED)))
    end = time.monotonic() + 60
    while not list((tmp_path / "runs").glob(".verify-*/split")):
        assert time.monotonic() < end, started.log.read_text()
        time.sleep(0.01)
    os.kill(started.pids[0], signal.SIGTERM)
    started.wait()
    assert not list((tmp_path / "runs").glob(".*"))


def test_a_mistake_in_recipe_or_rows_is_the_users(verified):
    assert verified(lambda: None, "optim.lrr=1")[0] == USER
    code, output = verified(lambda: None, "data.max_length=12")
    assert code == USER and "ERROR E-DATA-LENGTH" in output
