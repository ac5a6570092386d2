"""From a line of JSONL to supervised tokens: boundaries, ends, ledgers, and refusals by path and line."""

import json
from pathlib import Path

import pytest
from conftest import a_row, lists, load_dataset, ragged_rows, write_rows

from engine import train
from engine.data import build
from engine.data.reading import read_rows
from engine.data.template import EOS, TEMPLATES
from engine.data.tokenizer import JsonTokenizer, end_of, load_tokenizer, prompt_ids
from engine.errors import USER, EngineError

SPECIALS = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "[INST]", "[/INST]",
            "<think>", "</think>", "<start_of_turn>", "<end_of_turn>"]


@pytest.fixture(scope="session")
def bpe(tmp_path_factory) -> Path:
    """A byte-level BPE tokenizer with control tokens, made here."""
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("bpe")
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIALS, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
    model.train_from_iterator([" ".join(row.values()) for row in ragged_rows(100)], trainer)
    model.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    model.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<|im_end|>", "lstrip": False}}))
    return folder


@pytest.mark.parametrize("kind", ["sentencepiece", "bpe"])
@pytest.mark.parametrize("template", TEMPLATES)
def test_prompt_is_tokenised_alike_in_training_and_generation_and_the_end_is_supervised_once(tiny, bpe, tmp_path, kind, template):
    tokenizer = load_tokenizer(tiny if kind == "sentencepiece" else bpe)
    if kind == "sentencepiece" and any(segment.special and segment.text != EOS for segment in TEMPLATES[template](a_row("a", "", "b"))):
        with pytest.raises(EngineError, match="lacks"):
            prompt_ids(next(read_rows(write_rows(tmp_path / "r.jsonl", ragged_rows(1)))), template, tokenizer)
        return
    rows = ragged_rows(12) + [{"instruction": "a\n", "input": " ", "output": "\n b "}, {"instruction": "红", "input": "🙂", "output": "🙂"}]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    data = load_dataset(path, tokenizer, template, 200, "error", tmp_path / "cache")
    for number, row in enumerate(read_rows(path)):
        ids = data.tokens[data.offsets[number] : data.offsets[number + 1]].tolist()
        mask = data.supervised[data.offsets[number] : data.offsets[number + 1]].tolist()
        prompt = prompt_ids(row, template, tokenizer)
        assert ids[: len(prompt)] == prompt and not any(mask[: len(prompt)]) and all(mask[len(prompt) :])
        assert ids[-1] == end_of(template, tokenizer) and ids[len(prompt) :].count(ids[-1]) == 1
        assert ids[: len(tokenizer.prefix)] == tokenizer.prefix and len(tokenizer.prefix) == 1
        assert ids.count(tokenizer.prefix[0]) == 1, "the beginning of the sequence appears twice"
        assert tokenizer.decode(ids[len(prompt) : -1]).strip() == row.messages[-1].content.strip()


def test_the_seeds_template_to_the_letter():
    text = lambda row: "".join(segment.text for segment in TEMPLATES["alpaca"](row)).removesuffix(EOS)  # noqa: E731
    full, bare = ({"instruction": "I", "input": given, "output": "O"} for given in ("X", " \n"))
    assert text(a_row(**full)) == "### Instruction:\nI\n\n### Input:\nX\n\n### Response:\nO"
    assert text(a_row(**bare)) == "### Instruction:\nI\n\n### Response:\nO"


@pytest.mark.parametrize("kind", ["sentencepiece", "bpe"])
def test_control_tokens_in_a_row_stay_text(tiny, bpe, kind):
    tokenizer = load_tokenizer(tiny if kind == "sentencepiece" else bpe)
    for text in SPECIALS:
        ids = tokenizer.encode(f"red {text} cat")
        assert len(ids) > 4 and not set(ids) & {tokenizer.eos, *tokenizer.prefix}
        assert tokenizer.decode(ids) == f"red {text} cat"


def test_ids_equal_transformers(bpe):
    transformers = pytest.importorskip("transformers")
    ours, theirs = load_tokenizer(bpe), transformers.PreTrainedTokenizerFast(tokenizer_file=str(bpe / "tokenizer.json"))
    assert isinstance(ours, JsonTokenizer)
    for text in ("red cat 红猫 🙂🏽", "a\u0301\u0300", "x" + " " * 10_000, "\0", "", "\r\n\t", "１２３"):
        assert ours.encode(text) == theirs(text, add_special_tokens=False)["input_ids"] == lists(ours.encode_all([text]))[0]


@pytest.mark.parametrize(("line", "words"), [
    (b'{"instruction": "a", "output": "b"', ":2:35: not JSON"), (b"[1]", ":2:1: got a list, expected an object"),
    (b'{"instruction": "a"}', ':2:1: "output": got no such field'), (b'{"instruction": "a", "output": 5}', ':2:32: "output": got 5, expected text'),
    (b'{"instruction": null, "output": "b"}', ':2:17: "instruction": got null'), (b'{"instruction": "\xff", "output": "b"}', ":2:18: byte 0xff is not UTF-8"),
    (b'{"instruction": "a", "output": "b", "input": []}', ':2:46: "input": got []'),
    (rb'{"instruction": "a", "output": "\ud83d"}', ':2:33: half a character (\\ud83d'),
])
def test_a_bad_row_is_named_by_path_and_line(recipe, tmp_path, line, words):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"instruction": "a", "output": "b"}\n' + line + b"\n")
    with pytest.raises(EngineError) as caught:
        train.main(recipe())
    assert f"{path}{words}" in str(caught.value) and caught.value.exit_code == USER and "\n" not in str(caught.value)


@pytest.mark.parametrize(("override", "words"), [
    ("data.max_length=256", "data.max_length is 256, the model has 128 positions"), ("data.max_length=20", "rows.jsonl:1: has 39 tokens"),
])
def test_lengths_beyond_the_model_or_the_recipe_are_errors(recipe, override, words):
    with pytest.raises(EngineError, match=words):
        train.main(recipe(override))


def test_an_empty_file_and_a_file_without_targets_are_errors(recipe, tmp_path):
    (tmp_path / "rows.jsonl").write_text("\n \n")
    with pytest.raises(EngineError, match="rows.jsonl: holds no row"):
        train.main(recipe())
    write_rows(tmp_path / "rows.jsonl", ragged_rows(3))
    with pytest.raises(EngineError, match="none of 3 rows can be trained on: .*rows.jsonl:1: no supervised token within max_length 3"):
        train.main(recipe("data.max_length=3", "data.too_long=truncate"))


def test_a_vocabulary_smaller_than_the_tokenizers_is_an_error(recipe, tiny, tmp_path):
    folder = tmp_path / "small"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**json.loads((tiny / "config.json").read_text()), "vocab_size": 300}))
    (folder / "tokenizer.model").write_bytes((tiny / "tokenizer.model").read_bytes())
    with pytest.raises(EngineError, match="the tokenizer has 340 ids, the model's vocab_size is 300"):
        train.main(recipe(f"model.path={folder}", "model.init=random"))


@pytest.mark.parametrize("too_long", ["truncate", "drop"])
def test_the_ledger_balances_and_names_what_was_left_out(recipe, trained, tmp_path, too_long):
    rows = ragged_rows(20)
    rows[4]["instruction"] = "cat " * 90  # all of its answer lies beyond max_length
    write_rows(tmp_path / "rows.jsonl", rows)
    trained(1, recipe("data.max_length=40", f"data.too_long={too_long}", "train.max_steps=1"))
    ledger = json.loads((tmp_path / "runs/run/ledger.json").read_text())["train"]["files"][0]
    rejected = [json.loads(line) for line in (tmp_path / "runs/run/rejected.jsonl").read_text().splitlines()]
    left_out = ledger["too_long"] + ledger["no_target_left"]
    assert ledger["rows"] == 20 == ledger["kept"] + left_out and left_out == len(rejected)
    once = min(8, ledger["kept"])  # of one step
    assert ledger["trained"] == {"0": ledger["kept"] - once, "1": once} if ledger["kept"] > once else {"1": once}
    assert f"{tmp_path}/rows.jsonl:5" in [one["row"] for one in rejected]
    assert (ledger["truncated"] > 0) == (too_long == "truncate")


def test_data_is_ready_before_ranks_wait_for_each_other(recipe, ranks, tmp_path):
    """A slow tokenizer on a short timeout: were rows tokenised under the process group, the waiting rank would give up."""
    import time

    def slow() -> int:
        plain = build.build
        build.build = lambda *arguments: (time.sleep(4), plain(*arguments))
        return train.main(recipe("train.timeout_s=2", "train.max_steps=1"))

    started = ranks(2, slow)
    assert started.wait() == [0, 0], started.log.read_text()
