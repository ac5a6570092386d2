"""Accidents with numbers: named before they reach a weight, written down, made again to the bit, and trained around."""

import json
import math
import os
import shutil
import time
from collections import deque
from pathlib import Path

import pytest
import torch
from conftest import ragged_rows, steps, write_rows
from safetensors.torch import load_file, save_file
from test_resume import FULL, LONG, LORA, result, stop_after

from engine import blackbox, checkpoint, distributed, dropout, linear, optim, replay, space, train
from engine.data.tokenizer import load_tokenizer
from engine.errors import BUG, CHECKPOINT, NUMERIC, PEER, PREEMPTED, USER, EngineError, rank_in_launch
from engine.models import weights


def at_step(step: int, rank: int, arguments: list[str], what) -> int:
    """Trains; every gradient of the first trained parameter goes through `what` on `rank` in `step`, before ranks exchange it."""
    build, now = optim.build, {}
    note = dropout.DropoutKeys.set

    def keys_set(self, number, *rest):
        now["step"] = number + 1
        note(self, number, *rest)

    def hooked(trained, *rest):
        now["trained"] = trained
        parameter = next(iter(trained.values()))
        parameter.register_hook(lambda gradient: what(gradient) if now.get("step") == step and rank_in_launch() == rank else gradient)
        return build(trained, *rest)

    optim.build, dropout.DropoutKeys.set = hooked, keys_set
    return train.main(arguments)


def nan_first(gradient: torch.Tensor) -> torch.Tensor:
    gradient = gradient.clone()
    gradient.view(-1)[0] = math.nan
    return gradient


def box_of(run: Path, step: int) -> dict:
    return json.loads((run / f"blackbox/step-{step:09d}/blackbox.json").read_text())


def rows_of(part: list[dict]) -> set[str]:
    return {one["row"] for batch in part for one in batch["documents"]}


@pytest.mark.parametrize("kind", [FULL, LORA], ids=["full", "lora"])
def test_a_nan_in_one_ranks_gradient_stops_all_before_the_update_and_names_rank_and_rows(recipe, ranks, tmp_path, kind):
    arguments = recipe(*kind, *LONG, "checkpoint.every_steps=1", "data.packing=false", "train.micro_batch=1")
    started = ranks(4, lambda: at_step(9, 2, arguments, nan_first))
    assert started.wait() == [NUMERIC] * 4, started.log.read_text()
    run = tmp_path / "runs/run"
    box = box_of(run, 9)
    [named] = rows_of(box["ranks"][2])
    message = json.loads((run / "last_error.json").read_text())["message"]
    assert "not finite at step 9; nothing was updated" in message and "On rank 2 these rows" in message and str(run / "blackbox/step-000000009") in message
    assert named in message and named.startswith(f"{tmp_path}/rows.jsonl:")
    assert [bool(batch["not_finite"]) for of_rank in box["ranks"] for batch in of_rank] == [False, False, True, False]
    assert sorted(path.name for path in (run / "checkpoints").iterdir())[-1] == "step-000000008", "something was saved after it"
    for path in run.glob("checkpoints/*/*.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(path).values()), path
    saved = load_file(run / "checkpoints/step-000000008/model.safetensors")
    assert box["weights"] == {name: int(distributed.bit_sums({name: saved[name]})) for name in box["weights"]}, "a weight was updated"
    held = run / "blackbox/step-000000009/checkpoint/step-000000008/model.safetensors"
    assert held.samefile(run / "checkpoints/step-000000008/model.safetensors")


def poisoned_token(number: int, arguments: list[str]) -> int:
    """Trains a model that makes NaN of one token."""
    plain = linear.Embedding.forward
    linear.Embedding.forward = lambda self, ids: torch.where((ids == number)[:, None], math.nan, plain(self, ids))
    return train.main(arguments)


def test_the_row_that_breaks_a_step_is_named_among_its_neighbours_and_can_be_gone_on_without(recipe, ranks, tiny, tmp_path):
    """From the accident to the end of the run: the row's id as the message has it, into data.skip, allowed, trained to the end."""
    rows = ragged_rows(23)
    rows[12]["output"] = "red quiz cat"
    write_rows(tmp_path / "rows.jsonl", rows)
    tokenizer = load_tokenizer(tiny)
    common = {number for row in ragged_rows(23) for text in row.values() for number in tokenizer.encode(text)}
    odd = min(set(tokenizer.encode(rows[12]["output"])) - common)
    options = ("data.packing=true", "train.global_batch=4", "train.epochs=2", "checkpoint.every_steps=1", "train.micro_batch=2", "model.dropout=0.1")
    started = ranks(2, lambda: poisoned_token(odd, recipe(*options)))
    assert started.wait() == [NUMERIC] * 2, started.log.read_text()
    message = json.loads((tmp_path / "runs/run/last_error.json").read_text())["message"]
    id = f"{tmp_path}/rows.jsonl:13"
    assert f"these rows have a loss that is not finite: {id}. Black box: " in message
    [box] = (tmp_path / "runs/run/blackbox").iterdir()
    found = json.loads((box / "blackbox.json").read_text())
    [of_rank] = [rank for rank, part in enumerate(found["ranks"]) if id in rows_of(part)]
    assert f"On rank {of_rank} " in message
    losses = {one["row"]: [token[3] for token in one["learnt"]] for part in found["ranks"] for batch in part for one in batch["documents"]}
    assert [row for row, each in losses.items() if "nan" in each] == [id], "nothing of others of the same sequence is to blame"
    step, ended = found["step"], ranks(2, lambda: poisoned_token(odd, recipe(*options, f"data.skip=['{id}']", "resume.allow=[data.skip]")))
    assert ended.wait() == [0, 0], ended.log.read_text()
    entry = json.loads((tmp_path / "runs/run/ledger.json").read_text())["train"]["files"][0]
    assert entry["skipped"] == {"0": 1} and entry["trained"] == {"2": 22}
    lines = steps(tmp_path / "runs/run")
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1)) and len(lines) > step


def diverging(*more: str) -> tuple[str, ...]:
    """A learning rate that does real harm after six steps of warming up."""
    return ("model.dropout=0.1", "optim.lr=1e12", "optim.schedule=constant", "optim.warmup_steps=0", "optim.clip_norm=0", "checkpoint.every_steps=1", *more)


def replayed(ranks, box: Path, before=lambda: None) -> tuple[int, str]:
    def main() -> int:
        before()
        return replay.main([str(box)])

    started = ranks(1, main)
    [code] = started.wait()
    assert not list(box.parent.glob(".*")), "something is left behind"
    return code, started.log.read_text()


@pytest.mark.parametrize("size", [1, 2])
def test_a_divergence_is_made_again_to_the_bit(recipe, ranks, tmp_path, size):
    """Weights that a learning rate has ruined: the loss of every row is not finite, on every rank."""
    assert ranks(size, recipe(*LONG, *diverging())).wait() == [NUMERIC] * size
    [box] = (tmp_path / "runs/run/blackbox").iterdir()
    found = json.loads((box / "blackbox.json").read_text())
    tokens = [token for of_rank in found["ranks"] for batch in of_rank for one in batch["documents"] for token in one["learnt"]]
    assert len(tokens) == found["num_targets"] and found["checkpoint"] == found["step"] - 1 and found["kind"] == "not finite"
    code, said = replayed(ranks, box)
    assert code == 0 and "reproduced bit for bit" in said, said


JUNK = (26, 28, 30, 32, 34)  # steps whose rows are nothing like all others


def dull_rows(tmp_path: Path) -> None:
    rows = [{"instruction": "red cat", "input": "", "output": "blue dog eats"}] * 72
    junk = ragged_rows(30, seed=9)
    for step in JUNK:
        rows[2 * step - 2 : 2 * step] = [{**one, "output": "one 跑 apple 红 three sleeps"} for one in junk[step - 10 : step - 8]]
    write_rows(tmp_path / "rows.jsonl", rows)


DULL = ("train.global_batch=2", "train.micro_batch=1", "data.shuffle=false", "checkpoint.every_steps=3", "checkpoint.keep=1", "model.dropout=0.1",
        "optim.schedule=constant", "optim.lr=1e-2", "log.spike_window=20")


def test_a_spike_is_told_written_down_and_trained_through(recipe, ranks, tiny, tmp_path, monkeypatch):
    dull_rows(tmp_path)
    save = checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda folder, step, *more: time.sleep(2 * (step == JUNK[1] - 1)) or save(folder, step, *more))  # still in flight
    seen, damage = tmp_path / "seen", checkpoint.damage

    def counted(path):
        """At each save, once it is there and nothing is removed for it yet: how many checkpoints lie on the disk."""
        with seen.open("a") as file:
            file.write(f"{len({found.stat().st_ino for found in (tmp_path / 'runs').rglob('model.safetensors')})}\n")
        return damage(path)

    monkeypatch.setattr(checkpoint, "damage", counted)
    monkeypatch.setattr(space, "check", lambda folder, count, *more: (tmp_path / "asked").write_text(f"{count}"))
    model = tmp_path / "model"
    shutil.copytree(tiny, model)
    started = ranks(2, recipe(*DULL, f"model.path={model}"))
    assert started.wait() == [0, 0], started.log.read_text()
    run, said = tmp_path / "runs/run", started.log.read_text()
    lines = steps(run)
    assert [line["step"] for line in lines if line["train/spike"]] == list(JUNK) and not any(line["train/skipped"] for line in lines)
    warnings = [line for line in said.splitlines() if line.startswith("WARNING step")]
    assert len(warnings) == len(JUNK)
    for step, warning in zip(JUNK, warnings, strict=True):
        assert all(f"{tmp_path}/rows.jsonl:{line}" in warning for line in (2 * step - 1, 2 * step)) and "deviations above the median" in warning
    assert sorted(path.name for path in (run / "blackbox").iterdir()) == [f"step-{step:09d}" for step in JUNK[: blackbox.MOST]]
    assert max(map(int, seen.read_text().split())) == int((tmp_path / "asked").read_text()) == 3, "one kept, one held by a black box, one new"
    boxes = [run / "blackbox" / f"step-{step:09d}" for step in JUNK[: blackbox.MOST]]
    assert [(box / "checkpoint").exists() for box in boxes] == [False, False, True]
    assert json.loads((boxes[1] / "blackbox.json").read_text())["checkpoint"] == JUNK[1] - 1, "the save in flight was not waited for"
    box, found = boxes[-1], json.loads((boxes[-1] / "blackbox.json").read_text())
    assert found["checkpoint"] == JUNK[1] - 1 and sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-000000036"]
    assert found["loss"] == lines[JUNK[2] - 1]["train/loss"] and found["gradient_norm"] == lines[JUNK[2] - 1]["train/grad_norm"]
    documents = [one for of_rank in found["ranks"] for batch in of_rank for one in batch["documents"]]
    assert sum(one["loss"] for one in documents) / found["num_targets"] == pytest.approx(found["loss"], rel=1e-6)
    assert math.sqrt(sum(norm**2 for norm in found["modules"].values())) == pytest.approx(found["gradient_norm"], rel=1e-5)
    assert all("«" in one["text"] and [token[3] for token in one["learnt"]] for one in documents)
    tensors = load_file(model / "model.safetensors")
    save_file({**tensors, "model.norm.weight": tensors["model.norm.weight"] + 1}, model / "model.safetensors")  # trained since, so the checkpoint has it
    code, printed = replayed(ranks, box)
    assert code == 0 and f"again from step {JUNK[1] - 1} on 2 ranks" in printed and "reproduced bit for bit" in printed, printed
    code, printed = replayed(ranks, boxes[0])
    assert code == USER and "E-REPLAY-CHECKPOINT" in printed, printed


@pytest.mark.faults
@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("kind", [FULL, LORA, ("optim.shard=true", "train.precision=fp16", "train.loss_scale=64", "data.packing=true")],
                         ids=["full", "lora", "shard"])
def test_spikes_of_every_kind_of_run_are_made_again_to_the_bit(recipe, ranks, tmp_path, kind, size):
    dull_rows(tmp_path)
    options = dict(option.split("=", 1) for option in (*DULL, *kind, "log.spike_z=4", "checkpoint.every_steps=7"))
    started = ranks(size, recipe(*(f"{key}={value}" for key, value in options.items()), "train.epochs=3"))
    assert started.wait() == [0] * size, started.log.read_text()
    boxes = sorted((tmp_path / "runs/run/blackbox").iterdir())
    assert boxes, "no spike"
    for box in boxes[-1:]:
        code, said = replayed(ranks, box)
        assert code == 0 and "reproduced bit for bit" in said, said


def flip_a_bit(step: int, rank: int, arguments: list[str]) -> int:
    """Trains; one bit of one weight in one rank's memory turns over once `step` is done."""
    note, held, build = dropout.DropoutKeys.set, {}, optim.build

    def keep(trained, *rest):
        held.update(trained)
        return build(trained, *rest)

    def keys_set(self, number, *rest):
        if number == step and rank_in_launch() == rank and held:
            held.pop(sorted(held)[2]).data.view(-1).view(torch.int32)[5] ^= 1
            held.clear()
        note(self, number, *rest)

    optim.build, dropout.DropoutKeys.set = keep, keys_set
    return train.main(arguments)


def test_ranks_that_begin_with_other_weights_are_told_before_anything_is_judged(recipe, ranks, tmp_path):
    """As by a node's own copy of the model: trained weights are in no digest, and DDP would hand out rank 0's without a word."""
    def main() -> int:
        build = weights.build

        def another(*arguments):
            model = build(*arguments)
            if os.environ["RANK"] == "1":
                model.model.norm.weight.data[3] += 1e-3
            return model

        weights.build = another
        return train.main(recipe(*FULL, f"data.validation={tmp_path / 'rows.jsonl'}"))

    started = ranks(2, main)
    assert started.wait() == [PEER] * 2 and "model.norm.weight differs from rank 0's on rank 1 (and 0 more" in started.log.read_text()
    assert not (tmp_path / "runs/run/metrics.jsonl").exists()


@pytest.mark.faults
@pytest.mark.parametrize("kind", [FULL, LORA], ids=["full", "lora"])
def test_a_bit_that_flips_on_one_rank_is_caught_at_the_next_checkpoint_and_costs_its_steps_alone(recipe, ranks, trained, tmp_path, kind):
    trained(4, recipe(*kind, *LONG, name="whole"))
    started = ranks(4, lambda: flip_a_bit(11, 3, recipe(*kind, *LONG, name="cut")))
    assert started.wait() == [PEER] * 4 and "differs from rank 0's on rank 3" in started.log.read_text()
    assert max(path.name for path in (tmp_path / "runs/cut/checkpoints").iterdir()) == "step-000000010"
    trained(4, recipe(*kind, *LONG, name="cut"))
    assert result(tmp_path / "runs/cut") == result(tmp_path / "runs/whole")


def test_the_losses_that_a_spike_is_judged_by_outlive_a_resume(recipe, ranks, trained, tmp_path):
    dull_rows(tmp_path)
    trained(1, recipe(*DULL, name="whole"))
    assert ranks(1, lambda: stop_after(JUNK[0] - 2, recipe(*DULL, name="cut"))).wait() == [PREEMPTED]
    trained(1, recipe(*DULL, name="cut"))
    assert result(tmp_path / "runs/cut") == result(tmp_path / "runs/whole") and '"train/spike": 1' in result(tmp_path / "runs/cut")["metrics"]


def test_what_replay_cannot_make_again_is_named(recipe, ranks, trained, tmp_path):
    dull_rows(tmp_path)
    trained(1, recipe(*DULL, "optim.lr=1e-2"))
    box = tmp_path / "runs/run/blackbox" / f"step-{JUNK[blackbox.MOST - 1]:09d}"
    plain = (box / "blackbox.json").read_text()
    found = json.loads(plain)
    token = found["ranks"][0][0]["documents"][0]["learnt"][1]
    token[3] = math.nextafter(token[3], 9)  # the last of 53 bits
    (box / "blackbox.json").write_text(json.dumps(found))
    code, said = replayed(ranks, box)
    assert code == BUG and "E-REPLAY-DIFFERS" in said and "ranks[0][0].documents[0].learnt[1][3]" in said
    (box / "blackbox.json").write_text(plain)
    rows = (tmp_path / "rows.jsonl").read_text()
    (tmp_path / "rows.jsonl").write_text(rows.replace("blue dog eats", "blue dog runs"))
    code, said = replayed(ranks, box)
    assert code == CHECKPOINT and "the first row that differs is" in said and f"{tmp_path}/rows.jsonl:1" in said


def test_a_folder_that_is_no_whole_black_box_is_refused_by_name(recipe, ranks, trained, tmp_path):
    dull_rows(tmp_path)
    trained(1, recipe(*DULL))
    box = tmp_path / "runs/run/blackbox" / f"step-{JUNK[blackbox.MOST - 1]:09d}"
    plain = {path: path.read_text() for path in (box / "blackbox.json", box / "run.json", box / "recipe.yaml")}
    found = json.loads(plain[box / "blackbox.json"])
    others = [{name: value for name, value in found.items() if name != left} for left in ("format", "step", "world_size", "threads", "ranks", "began", "kind")]
    others += [[], {}, {**found, "format": 2}, {**found, "step": "30"}, {**found, "world_size": 0}, {**found, "checkpoint": "../.."}, {**found, "ranks": [[1]]}]
    for path, text in [*((box / "blackbox.json", json.dumps(other)) for other in others), (box / "blackbox.json", "[" * 10**5), (box / "run.json", None),
                       (box / "run.json", "[]"), (box / "recipe.yaml", None)]:
        path.unlink() if text is None else path.write_text(text)
        with pytest.raises(EngineError, match="cannot be read as a black box: .*; give one as it was left") as caught:
            replay.main([str(box)])
        assert (caught.value.name, caught.value.exit_code) == ("REPLAY-BOX", USER) and "\n" not in str(caught.value), caught.value
        path.write_text(plain[path])
    shutil.rmtree(next((box / "checkpoint").iterdir()))
    with pytest.raises(EngineError, match="cannot be read as a black box: .*No such file.*checkpoint/step-0000000"):
        replay.main([str(box)])


def test_from_the_start_other_weights_are_refused(recipe, ranks, tiny, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(tiny, model)
    assert ranks(1, recipe(*LONG, *diverging(f"model.path={model}", "checkpoint.every_steps=0", "checkpoint.each_epoch=false"))).wait() == [NUMERIC]
    [box] = (tmp_path / "runs/run/blackbox").iterdir()
    assert json.loads((box / "blackbox.json").read_text())["checkpoint"] is None
    assert replayed(ranks, box)[0] == 0
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"].view(torch.int32)[3] ^= 1
    save_file(tensors, model / "model.safetensors")
    code, said = replayed(ranks, box)
    assert code == CHECKPOINT and "model.norm.weight" in said


def test_a_loss_far_above_the_others_is_a_spike_and_others_are_not():
    draw = torch.Generator().manual_seed(0)
    before = deque((2 + 0.05 * torch.randn(64, generator=draw)).tolist())
    assert abs(blackbox.deviation(2.1, before)) < 4 and blackbox.deviation(2.7, before) > 8 and blackbox.deviation(1.0, before) < 0
    assert blackbox.deviation(9.0, deque(list(before)[:19])) == 0.0
    assert blackbox.deviation(2.001, deque([2.0] * 64)) < 1, "losses that are all alike"
    assert blackbox.deviation(2.7, deque([*list(before)[:40], *[50.0] * 12])) > 8, "others that were spikes do not hide one"


# ---- Weights and scales ----------------------------------------------------------------------------------------------


def edited(tiny: Path, tmp_path: Path, name: str, what) -> str:
    """A copy of the model with one tensor of its file changed."""
    shutil.copytree(tiny, tmp_path / "model")
    tensors = load_file(tmp_path / "model/model.safetensors")
    tensors[name] = what(tensors[name])
    save_file(tensors, tmp_path / "model/model.safetensors")
    return f"model.path={tmp_path}/model"


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_weight_that_is_no_number_is_refused_by_name_before_the_first_step(recipe, tiny, tmp_path, bad):
    name = "model.layers.1.mlp.up_proj.weight"
    option = edited(tiny, tmp_path, name, lambda tensor: torch.where(torch.arange(tensor.numel()).view_as(tensor) == 77, bad, tensor))
    with pytest.raises(EngineError, match=f"{name} holds NaN or an infinity") as caught:
        train.main(recipe(option, *LORA))
    assert caught.value.exit_code == USER and not (tmp_path / "runs/run/metrics.jsonl").exists()


def test_an_adapter_that_is_no_number_is_refused_by_name(recipe, trained, tmp_path):
    trained(1, recipe(*LORA, "train.max_steps=1"))
    path = tmp_path / "runs/run/export/adapter/adapter_model.safetensors"
    tensors = load_file(path)
    name = sorted(tensors)[-1]
    tensors[name][0, 0] = math.nan
    save_file(tensors, path)
    with pytest.raises(EngineError, match="holds NaN or an infinity"):
        train.main(recipe(f"lora.start={path.parent}", name="next"))


def test_a_norm_beyond_fp32_stops_before_the_update_and_names_the_module(recipe, ranks, tiny, tmp_path):
    """Every loss and every gradient is finite; the gradient's length is not."""
    option = edited(tiny, tmp_path, "model.norm.weight", lambda tensor: tensor * 1e25)
    started = ranks(2, recipe(option, "checkpoint.every_steps=1"))
    assert started.wait() == [NUMERIC] * 2, started.log.read_text()
    box = box_of(tmp_path / "runs/run", 1)
    assert box["gradient_norm"] == "inf" and math.isfinite(box["loss"]) and not box["not_finite"]
    total = math.sqrt(sum(norm**2 for norm in box["modules"].values()))
    assert 1e19 < total < math.inf
    message = json.loads((tmp_path / "runs/run/last_error.json").read_text())["message"]
    assert f"not the gradient's norm in fp32: it is {total:.1e}, most of it in {max(box['modules'], key=box['modules'].get)}" in message
    assert not list((tmp_path / "runs/run/checkpoints").iterdir())


STORM = ("train.precision=fp16", "train.loss_scale=16777216", "train.global_batch=2", "train.epochs=2", "checkpoint.every_steps=1", "checkpoint.keep=9")


def test_a_storm_of_overflows_is_resumed_inside_to_the_bit(recipe, ranks, trained, tmp_path):
    trained(2, recipe(*STORM, name="whole"))
    lines = steps(tmp_path / "runs/whole")
    skipped = [line["train/skipped"] for line in lines]
    assert [line["step"] for line in lines if line["train/grad_norm"] in ("inf", "nan")] == [line["step"] for line in lines if line["train/skipped"]] != []
    for path in (*(tmp_path / "runs/whole").glob("*.json"), *(tmp_path / "runs/whole/checkpoints").glob("*/*.json")):
        json.loads(path.read_text(), parse_constant=pytest.fail)
    calm = skipped.index(0)
    assert calm > 5 and not any(skipped[calm + 5 :]), "a storm, and then none"
    for stop in (2, calm - 1):
        assert set(ranks(2, lambda stop=stop: stop_after(stop, recipe(*STORM, name="cut"))).wait()) == {PREEMPTED}
    trained(2, recipe(*STORM, name="cut"))
    assert result(tmp_path / "runs/cut") == result(tmp_path / "runs/whole")


def test_a_storm_without_end_is_stopped_once_the_scale_is_one(recipe, ranks, tiny, tmp_path):
    """Logits beyond fp16, which no loss scale helps. The first scale is no power of two."""
    option = edited(tiny, tmp_path, "model.norm.weight", lambda tensor: tensor * 1e6)
    arguments = recipe(*STORM, "train.loss_scale=1000", option)
    assert ranks(1, lambda: stop_after(4, arguments)).wait() == [PREEMPTED]
    started = ranks(1, arguments)
    assert started.wait() == [NUMERIC], started.log.read_text()
    lines = steps(tmp_path / "runs/run")
    assert [line["train/loss_scale"] for line in lines] == [max(1.0, 1000 / 2**step) for step in range(10)] and all(line["train/skipped"] for line in lines)
    assert "not finite at step 11 at loss scale 1; nothing was updated" in started.log.read_text() and box_of(tmp_path / "runs/run", 11)["loss_scale"] == 1.0
    assert [line["train/lr"] for line in lines] == sorted((line["train/lr"] for line in lines), reverse=True), "the schedule goes on by steps"
