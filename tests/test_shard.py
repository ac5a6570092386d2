"""Moments sharded over ranks: the same numbers and the same files as whole ones, in a share of the memory, and no pickle."""

import json
import random
import shutil

import pytest
import torch
from safetensors.torch import load_file
from test_checkpoint import unpickles
from test_resume import LONG, kill_after, result, stop_after
from torch import nn

from engine import distributed, optim, tensorfile, train
from engine.config import Optim
from engine.errors import PREEMPTED

KINDS = {"adamw": ("model.dropout=0.1",), "adamw_bf16": ("optim.name=adamw_bf16", "model.dtype=bf16"),
         "lora": ("lora.rank=4", "lora.targets=[q_proj,down_proj]", "optim.weight_decay=0.1")}
SHARD = "optim.shard=true"


@pytest.mark.parametrize(("kind", "size"), [("adamw", 1), *((kind, size) for kind in KINDS for size in (2, 4))])
def test_a_sharded_run_is_bit_identical_to_a_whole_one(recipe, ranks, trained, tmp_path, kind, size):
    trained(size, recipe(*KINDS[kind], "train.max_steps=4", "train.epochs=2", name="whole"))
    started = ranks(size, recipe(*KINDS[kind], "train.max_steps=4", "train.epochs=2", SHARD, name="shard"))
    assert started.wait() == [0] * size, started.log.read_text()
    assert result(tmp_path / "runs/shard") == result(tmp_path / "runs/whole")
    said = next(line for line in started.log.read_text().splitlines() if line.split()[:1] == ["optimizer"])
    assert ("not sharded, although asked for: there is one rank" if size == 1 else f"sharded over {size} ranks") in said
    assert said.split("  ")[-1] == json.loads((tmp_path / "runs/shard/run.json").read_text())["optimizer"]


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", ["adamw", "adamw_bf16"])
def test_each_rank_holds_its_share_of_the_moments(ranks, tmp_path, size, name):
    def main() -> None:
        world = distributed.init("cpu", 60)
        draw = torch.Generator().manual_seed(0)
        shapes = [(40, 30)] * 10 + [(60, 30)] * 6 + [(30,)] * 9
        dtype = torch.bfloat16 if name == "adamw_bf16" else torch.float32
        trained = {f"w{number}": nn.Parameter(torch.randn(shape, generator=draw).to(dtype)) for number, shape in enumerate(shapes)}
        optimizer, _ = optim.build(trained, Optim(name=name, shard=True), 0, world)
        for parameter in trained.values():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        held = sum(value.nbytes for state in optimizer.optim.state.values() for slot, value in state.items() if slot != "step")
        (tmp_path / f"{world.rank}.json").write_text(json.dumps([held, sum(2 * parameter.nbytes for parameter in trained.values())]))
        assert not optimizer.state, "a second copy of the moments"
        distributed.close(world)

    assert ranks(size, main).wait() == [0] * size
    held, whole = zip(*(json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(size)), strict=True)
    assert sum(held) == whole[0]
    assert all(bytes_ == pytest.approx(whole[0] / size, rel=0.1) for bytes_ in held), held


@pytest.mark.parametrize("kind", ["adamw", "adamw_bf16"])
def test_killed_and_resumed_equals_undisturbed(recipe, ranks, trained, tmp_path, kind):
    trained(2, recipe(*KINDS[kind], *LONG, SHARD, name="whole"))
    draw = random.Random(len(kind))
    kill_after(ranks(2, recipe(*KINDS[kind], *LONG, SHARD, name="cut")), tmp_path / "runs/cut", draw.randrange(3, 10), draw.random() * 0.03)
    trained(2, recipe(*KINDS[kind], *LONG, SHARD, name="cut"))
    assert result(tmp_path / "runs/cut") == result(tmp_path / "runs/whole")


@pytest.mark.parametrize("kind", ["adamw", "adamw_bf16"])
def test_a_checkpoint_goes_on_at_another_world_size_sharded_or_not(recipe, ranks, trained, tmp_path, kind):
    """Two ranks stop; four or one go on. Whether moments were sharded before or are after, the result is that of whole ones."""
    short = (*KINDS[kind], "train.max_steps=6", "train.epochs=2")
    for name, shard in (("shard", "true"), ("whole", "false")):
        assert ranks(2, lambda name=name, shard=shard: stop_after(3, recipe(*short, f"optim.shard={shard}", name=name))).wait() == [PREEMPTED] * 2
    for size, changes in ((4, [("whole", "false"), ("shard", "true")]), (1, [("whole", "false"), ("shard", "false")])):
        results = []
        for before, after in changes:
            name = f"{before}-{size}-{after}"
            shutil.copytree(tmp_path / "runs" / before, tmp_path / "runs" / name)
            trained(size, recipe(*short, f"optim.shard={after}", name=name))
            results.append(result(tmp_path / "runs" / name))
        assert all(each == results[0] for each in results)


def test_a_sharded_run_and_its_resume_never_unpickle(recipe, ranks, tmp_path):
    def watched() -> int:
        seen = unpickles(lambda: train.main(recipe("train.epochs=3", SHARD)))
        print(f"unpickled: {seen}")
        return len(seen)

    run = tmp_path / "runs/run"
    for _ in range(2):
        started = ranks(2, watched)
        assert started.wait() == [0, 0], started.log.read_text()
        (run / "finished.json").unlink()
        for path in sorted((run / "checkpoints").iterdir())[1:]:
            shutil.rmtree(path)


def test_the_watch_would_see_torchs_own_way_to_bring_shards_together(ranks):
    def main() -> int:
        world = distributed.init("cpu", 60)
        parameters = [nn.Parameter(torch.ones(3)) for _ in range(2)]
        optimizer, _ = optim.build({str(number): one for number, one in enumerate(parameters)}, Optim(shard=True), 0, world)
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        seen = unpickles(optimizer.consolidate_state_dict)
        distributed.close(world)
        return len(seen)

    assert 0 not in ranks(2, main).wait()


def test_gathered_tensors_arrive_as_they_were(ranks, tmp_path):
    def main() -> None:
        world = distributed.init("cpu", 60)
        found = distributed.gather_tensors(tensors_of(world.rank), world)
        if world.is_first:
            tensorfile.save(found, tmp_path / "found.safetensors")
        assert world.is_first or found == {}
        distributed.close(world)

    assert ranks(3, main).wait() == [0, 0, 0]
    found, expected = load_file(tmp_path / "found.safetensors"), {name: tensor for rank in range(3) for name, tensor in tensors_of(rank).items()}
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def tensors_of(rank: int) -> dict[str, torch.Tensor]:
    """None on rank 1; kinds and shapes of every sort elsewhere."""
    draw = torch.Generator().manual_seed(rank)
    kinds = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int64": torch.int64}
    return {} if rank == 1 else {f"{rank}.{name}.{shape}": (100 * torch.randn(shape, generator=draw)).to(dtype)
                                 for name, dtype in kinds.items() for shape in [(), (5,), (3, 4)]}
