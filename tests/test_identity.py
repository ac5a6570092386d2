"""A run goes on only as the run that it was: what decides its result is compared with the checkpoint, and a difference refused by name."""

import json
import os
import shutil

import pytest
import torch
from conftest import flip, loaded, ragged_rows, steps, write_rows
from test_resume import LONG, LORA, result, stop_after

from engine import checkpoint, config, optim, rundir, train
from engine.config import Recipe
from engine.data import dataset
from engine.data.tokenizer import load_tokenizer
from engine.errors import CHECKPOINT, PREEMPTED, USER, EngineError

DIGESTS = {name: "0" * 64 for name in config.CONTENT}


def another(value):
    """A value of the same type that differs."""
    if isinstance(value, bool):
        return not value
    return value + 1 if isinstance(value, (int, float)) else "other" if isinstance(value, str) or value is None else [*value, "other"] if isinstance(
        value, list) else {**value, "other": 1}


@pytest.fixture(scope="module")
def rows(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    cfg = config.Data(train=str(write_rows(folder / "rows.jsonl", ragged_rows(3))), max_length=64, cache=str(folder / "cache"))
    return dataset.load(cfg, "train", load_tokenizer(tiny))


def identity_of(cfg: Recipe) -> dict:
    return {**config.semantic(cfg), **DIGESTS}


@pytest.mark.parametrize("key", [*config.options(), *config.CONTENT])
def test_every_key_either_decides_a_run_or_may_differ(key, rows, capsys, tmp_path):
    """One table says which, and nothing else: what is not in it is refused by name, or allowed by name with one warning, and kept."""
    cfg, state = Recipe(), {"step": 7, "identity": identity_of(Recipe()), "files": []}
    saved = json.loads(json.dumps(state))
    if key in DIGESTS:
        now = {**identity_of(cfg), key: "1" * 64}
    else:
        section, name = key.split(".")
        setattr(getattr(cfg, section), name, another(getattr(getattr(cfg, section), name)))
        now = identity_of(cfg)
    if key.startswith(config.HARDWARE):
        assert checkpoint.compare_identity(tmp_path, saved, now, [], rows, True) == set() and capsys.readouterr().err == ""
        return
    with pytest.raises(EngineError, match=f"now\\): {key}: .* → |now\\): data: ") as caught:
        checkpoint.compare_identity(tmp_path, saved, dict(now), [other for other in config.options() if other != key], rows, True)
    assert caught.value.exit_code == CHECKPOINT
    if key in config.FIXED:
        assert f"no checkpoint fits with another {key}" in caught.value.text
        return
    assert f"resume.allow=[{key}]" in caught.value.text
    assert checkpoint.compare_identity(tmp_path, saved, now, [key], rows, True) == {key}
    said = capsys.readouterr().err
    assert said.count("WARNING") == said.count("\n") == 1 and f" {key}: " in said
    assert len(now["allowed"]) == 1 and now["allowed"][0].startswith(f"after step 7: {key}: ")
    later = {**now}
    later.pop("allowed")
    assert checkpoint.compare_identity(tmp_path, {"step": 9, "identity": json.loads(json.dumps(now)), "files": []}, later, [], rows, True) == set()
    assert later["allowed"] == now["allowed"], "what was allowed is kept by those that come after"


def test_an_option_that_a_checkpoint_does_not_know_had_its_default(rows, tmp_path):
    saved = identity_of(Recipe())
    del saved["data.skip"], saved["optim.lora_plus"]
    state = {"step": 7, "identity": saved, "files": []}
    assert checkpoint.compare_identity(tmp_path, state, identity_of(Recipe()), [], rows, True) == set()
    with pytest.raises(EngineError, match="optim.lora_plus: 1.0 → 16"):
        checkpoint.compare_identity(tmp_path, state, {**identity_of(Recipe()), "optim.lora_plus": 16}, [], rows, True)


@pytest.mark.parametrize(("name", "words"), [
    ("optim.lrr", "is no part of a run; did you mean optim.lr?"), ("lr", "is no part of a run; did you mean optim.lr?"),
    ("weigths", "did you mean weights?"), ("train.micro_batch", "may differ anyway; take it out"), ("lora.rank", "it cannot be allowed"),
])
def test_a_name_in_resume_allow_that_allows_nothing_is_an_error(recipe, name, words):
    with pytest.raises(EngineError) as caught:
        config.load(recipe(f"resume.allow=[optim.lr, {name}]"))
    assert caught.value.exit_code == USER and f"resume.allow got {name}, " in caught.value.text and words in caught.value.text
    assert caught.value.text.count("resume.allow") == 1


@pytest.fixture
def stopped(recipe, ranks, tiny, tmp_path):
    """A LoRA run on its own copies of model and rows that was stopped after step 3; `arguments(…)` go on with it."""
    shutil.copytree(tiny, tmp_path / "model")
    base = (*LORA, *LONG, f"model.path={tmp_path}/model")
    assert ranks(1, lambda: stop_after(3, recipe(*base))).wait() == [PREEMPTED]
    return lambda *more: recipe(*base, *more)


def refusal(arguments: list[str]) -> str:
    with pytest.raises(EngineError) as caught:
        train.main(arguments)
    assert caught.value.exit_code == CHECKPOINT, caught.value
    return caught.value.text


def test_base_tokenizer_and_template_are_refused_when_they_change(stopped, tmp_path, monkeypatch):
    before = (tmp_path / "rows.jsonl").read_text()
    text = refusal(stopped("data.template=plain"))
    assert "data.template: alpaca → plain" in text and "rows.jsonl is as it was, but is read in another way" in text
    assert "optim.lr: 0.01 → 0.02" in refusal(stopped("optim.lr=0.02")) and "lora.rank: 4 → 8" in refusal(stopped("lora.rank=8"))
    rows = tmp_path / "rows.jsonl"
    rows.write_text(rows.read_text().replace("red", "blue"))
    text = refusal(stopped("data.template=plain"))  # every row has other tokens, so which line has changed cannot be told
    assert f"{rows} has changed: SHA-256 " in text and f"{rows}:1" not in text
    rows.write_text(before)
    flip(tmp_path / "model/model.safetensors")
    assert "): weights: " in refusal(stopped())
    flip(tmp_path / "model/model.safetensors")
    from sentencepiece import sentencepiece_model_pb2 as proto

    model = proto.ModelProto()
    model.ParseFromString((tmp_path / "model/tokenizer.model").read_bytes())
    model.pieces[-1].score -= 1
    (tmp_path / "model/tokenizer.model").write_bytes(model.SerializeToString())
    assert "tokenizer: " in refusal(stopped())


def test_changed_data_is_refused_with_its_line_and_a_renamed_file_goes_on(stopped, ranks, recipe, tmp_path):
    path = tmp_path / "rows.jsonl"
    plain = path.read_text()
    lines = plain.splitlines(keepends=True)
    path.write_text("".join([*lines[:10], lines[10].replace("output\": \"", "output\": \"red "), *lines[11:]]))
    assert f"data: {path} has changed: the first row that differs is {path}:11 (23 → 23 rows)" in refusal(stopped())
    path.write_text("".join([*lines[:4], "\n", lines[5], lines[4], *lines[6:]]))
    assert f"the first row that differs is {path}:6 (23 → 23 rows)" in refusal(stopped()), "an empty line is no row"
    path.write_text(plain + lines[0])
    assert f"rows are new from {path}:24 on (23 → 24 rows)" in refusal(stopped())
    path.write_text("".join(lines[:-2]))
    assert f"rows are gone after {path}:21 (23 → 21 rows)" in refusal(stopped())
    path.write_text(plain.replace("}\n", "} \n"))
    assert "its rows are the same, what is between them is not" in refusal(stopped())
    other = tmp_path / "another name.jsonl"
    path.unlink()
    other.write_text(plain)
    assert ranks(1, stopped(f"data.train={other}", "train.micro_batch=1", "train.activation_checkpointing=1")).wait() == [0]


def test_rows_that_are_added_can_be_allowed_and_the_ledger_counts_from_there(stopped, ranks, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(path.read_text() + json.dumps(ragged_rows(1)[0]) + "\n")
    started = ranks(2, stopped("resume.allow=[data]"))
    assert started.wait() == [0, 0], started.log.read_text()
    said = started.log.read_text()
    assert said.count("as resume.allow says: data: ") == 1 and f"rows are new from {path}:24 on" in said
    account = json.loads((tmp_path / "runs/run/ledger.json").read_text())["train"]
    lines = steps(tmp_path / "runs/run")
    assert account["tokens_trained"] == sum(line["train/tokens"] for line in lines[3:]) and account["files"][0]["rows"] == 24


@pytest.mark.parametrize("change", ["shape", "name"])
def test_the_checkpoint_of_another_model_changes_no_parameter(stopped, recipe, tiny, tmp_path, monkeypatch, change):
    """A checkpoint whose identity agrees while its tensors do not fit: made by swapping them, sealed as a whole one is."""
    folder = tmp_path / "runs/run/checkpoints"
    saved = loaded(folder, 3)
    tensors = dict(saved.model)
    first, last = list(tensors)[0], list(tensors)[-1]
    tensors[first] = tensors[first] + 1  # would be seen if anything were copied before all were compared
    tensors[last if change == "shape" else f"{last}.other"] = torch.zeros(3, 5)
    shutil.rmtree(folder / "step-000000003")
    checkpoint.save(folder, 3, checkpoint.Snapshot(tensors, saved.optimizer, saved.state), 9, None)
    held, build = {}, optim.build

    def keep(trained, *rest):
        held.update({name: (parameter, parameter.detach().clone()) for name, parameter in trained.items()})
        return build(trained, *rest)

    monkeypatch.setattr(optim, "build", keep)
    text = refusal(stopped())
    wanted = f"{last}: expected {list(saved.model[last].shape)} float32, found [3, 5] float32" if change == "shape" else \
        f"{last}.other: expected nothing, found [3, 5] float32"
    assert wanted in text and held and all(torch.equal(parameter, before) for parameter, before in held.values())


@pytest.mark.parametrize("change", ["shape", "type", "name", "missing"])
def test_moments_that_are_not_the_models_are_refused(stopped, tmp_path, change):
    """Kernels walk a moment as far as its parameter goes."""
    folder = tmp_path / "runs/run/checkpoints"
    saved = loaded(folder, 3)
    tensors = dict(saved.optimizer)
    key = next(key for key in tensors if key.endswith(".exp_avg"))
    found = tensors.pop(key)
    if change != "missing":
        tensors[f"{key}.other" if change == "name" else key] = {"shape": torch.zeros(1), "type": found.half(), "name": found}[change]
    shutil.rmtree(folder / "step-000000003")
    checkpoint.save(folder, 3, checkpoint.Snapshot(saved.model, tensors, saved.state), 9, None)
    text = refusal(stopped())
    assert f"moments are not the model's: {key}" in text and ("found [1] float32" in text) == (change == "shape"), text


def test_a_checkpoint_of_a_newer_engine_is_refused_and_not_passed_over(stopped, tmp_path):
    path = tmp_path / "runs/run/checkpoints/step-000000003/manifest.json"
    manifest = {key: value for key, value in json.loads(path.read_text()).items() if key != "seal"}
    path.write_text(checkpoint._sealed({**manifest, "format": checkpoint.FORMAT + 1}))
    assert "was written by a newer engine, in format 2" in refusal(stopped())
    path.write_text(path.read_text().replace('"format": 2', '"format": 3'))  # with a seal that is not its own: damage, not another engine
    assert checkpoint.newest_whole(path.parents[1]) == 2


def test_other_arithmetic_is_one_warning(stopped, ranks, tmp_path):
    path = tmp_path / "runs/run/run.json"
    record = json.loads(path.read_text())
    for of, name, value in ((record["versions"], "torch", "1.13.0"), (record["machine"], "cpu_capability", "AVX9"),
                            (record["machine"], "threads_per_rank", 7), (record, "engine", "that of before")):
        assert name in of
        of[name] = value
    path.write_text(json.dumps(record))
    started = ranks(2, stopped())
    assert started.wait() == [0, 0]
    said = started.log.read_text()
    assert said.count("WARNING") == 1 and "may no longer be those of one run to the bit" in said
    assert "torch: 1.13.0 → " in said and "engine: that of before → " in said and "cpu_capability: AVX9 → " in said and "threads_per_rank: 7 → 1" in said


@pytest.mark.parametrize("name", rundir.BITS)
def test_each_fact_that_sums_round_by_is_recorded_and_compared(name, tmp_path):
    now = {"versions": {"torch": "2"}, "engine": "a", "machine": rundir.hardware()}
    (tmp_path / "run.json").write_text(json.dumps({**now, "machine": {**now["machine"], name: "other"}}))
    assert [one.partition(":")[0] for one in rundir._other_bits(tmp_path / "run.json", now)] == [name]
    (tmp_path / "run.json").write_text(json.dumps(now))
    assert rundir._other_bits(tmp_path / "run.json", now) == []


def test_numbers_flushed_to_zero_are_noticed():
    assert rundir.hardware()["denormals"] is True
    torch.set_flush_denormal(True)
    try:
        assert rundir.hardware()["denormals"] is False
    finally:
        torch.set_flush_denormal(False)


def test_the_same_machine_is_no_warning(stopped, ranks):
    started = ranks(1, stopped())
    assert started.wait() == [0] and "WARNING" not in started.log.read_text()


def test_a_copied_checkpoint_goes_on_whatever_its_times(stopped, ranks, recipe, trained, tmp_path):
    """By its name the newest is the newest, not by its clock: a copy whose newest file is the oldest ends as the run itself does."""
    other = tmp_path / "elsewhere"
    shutil.copytree(tmp_path / "runs", other, copy_function=shutil.copyfile)
    names = sorted(path.name for path in (other / "run/checkpoints").iterdir())
    assert names == ["step-000000002", "step-000000003"]
    for age, name in enumerate(names):
        for path in [*(other / "run/checkpoints" / name).iterdir(), other / "run/checkpoints" / name]:
            os.utime(path, (1e9 - 1e6 * age, 1e9 - 1e6 * age))
    assert ranks(1, stopped()).wait() == [0]
    started = ranks(1, stopped(f"run.folder={other}"))
    assert started.wait() == [0] and "resumed after step 3" in started.log.read_text()
    assert result(other / "run") == result(tmp_path / "runs/run")


def test_another_precision_that_is_allowed_begins_with_its_own_loss_scale(stopped, ranks, tmp_path):
    assert ranks(1, lambda: stop_after(5, stopped("train.precision=fp16", "train.loss_scale=64", "resume.allow=[train.precision, train.loss_scale]"))
                 ).wait() == [PREEMPTED]
    lines = steps(tmp_path / "runs/run")
    assert [line["train/loss_scale"] for line in lines] == [1, 1, 1, 64, 64]
