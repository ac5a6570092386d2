"""The embedded rows are what their generator makes, many-sided, and held out for real."""

import json
import subprocess
import sys
from importlib.metadata import version

import pytest
from conftest import ROOT, load_dataset

from engine.data.tokenizer import load_tokenizer

HERE = ROOT / "recipes" / "quickstart"
FILES = ("train", "validation", "lora_train", "lora_validation")


def rows(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (HERE / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def test_the_generator_makes_the_committed_files(tmp_path):
    subprocess.run([sys.executable, str(HERE / "make.py"), "--out", str(tmp_path)], check=True, cwd=ROOT, capture_output=True)
    pinned = f"sentencepiece=={version('sentencepiece')}" in (ROOT / "constraints.txt").read_text(encoding="utf-8").split()
    for name in [*(f"{name}.jsonl" for name in FILES), "model/config.json", *["model/tokenizer.model"] * pinned]:  # another one may learn other bits
        assert (tmp_path / name).read_bytes() == (HERE / name).read_bytes(), name


def test_no_held_out_question_was_trained_on():
    for train, held_out in (("train", "validation"), ("lora_train", "lora_validation")):
        seen = {(row["instruction"], row["input"]) for row in rows(train)}
        assert not [row for row in rows(held_out) if (row["instruction"], row["input"]) in seen]


def test_many_kinds_of_task_in_two_languages_each_with_rows_held_out():
    tasks = {row["task"] for row in rows("train")}
    assert len(tasks) >= 10 and tasks == {row["task"] for row in rows("validation")}
    chinese = [any("一" <= letter <= "鿿" for letter in row["instruction"]) for row in rows("train")]
    assert 0.2 < sum(chinese) / len(chinese) < 0.8
    assert {row["task"] for row in rows("lora_train")} == {row["task"] for row in rows("lora_validation")} and not tasks & {
        row["task"] for row in rows("lora_train")}


@pytest.mark.parametrize("name", FILES)
def test_rows_fit_the_model_and_need_no_byte_pieces(tmp_path, name):
    tokenizer = load_tokenizer(HERE / "model")
    data = load_dataset(HERE / f"{name}.jsonl", tokenizer, "alpaca", 128, "error", tmp_path)
    config = json.loads((HERE / "model/config.json").read_text())
    assert tokenizer.size == config["vocab_size"] and len(data) == len(rows(name))
    assert not any(tokenizer.model.is_byte(int(piece)) for piece in set(data.tokens.tolist()))
