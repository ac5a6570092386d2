"""Ids that are looked up word by word are the library's own; where that is not known to hold, the library is asked."""

import json
import random
import re
import sys

import numpy as np
import pytest
import tokenizers
from conftest import lists, ragged_rows
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_tokenizers import TORTURE
from tokenizers import models, normalizers, pre_tokenizers, trainers

from engine.data import memo
from engine.data.memo import KNOWN, memo_of
from engine.data.tokenizer import load_tokenizer

FORMS = dict(zip(("gpt2", "smollm2", "llama3", "qwen"), KNOWN, strict=True))
SPECIALS, PLAIN = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], ["<think>", "</think>", "<tool_call>"]
NASTY = [*" \n\t\r\x0b\x0c\x1c\x1f\x85\u00a0\u1680\u2000\u2009\u2028\u2029\u202f\u205f\u3000\u180e\u200b\u200d\ufeff", "  ", " \n", "\n ", "\r\n", "\n\n",
         *"aAzßſ'stvrmd.,!?-_/09½²Ⅻ٣中文か한ñé\u0301\u0308\u0327\u0345\u0e33\u212a\u037e\u1fef\0👍🏽",
         "'ll", "'S", " the", " red", "dog", "<", "think>", *SPECIALS, *PLAIN]
KINDS = {"gpt2": {}, "smollm2": {}, "llama3": {"ignore_merges": True}, "qwen": {"normalizer": {"type": "NFC"}}}  # what else their files say
TRAINED: dict[str, str] = {}


def made(form: str, **changed) -> tokenizers.Tokenizer:
    """A small BPE behind a pre-tokenizer of that form, with some of its settings changed."""
    if form not in TRAINED:
        model = tokenizers.Tokenizer(models.BPE())
        whole = json.loads(model.to_str())
        whole["pre_tokenizer"] = json.loads(json.dumps(FORMS[form]), object_hook=trimming)
        model = tokenizers.Tokenizer.from_str(json.dumps(whole))
        texts = [" ".join(row.values()) for row in ragged_rows(200)] + ["I'll say: the dog's 12 red\n\n  cats, é ñ 中文 한か 👍🏽\t1,234 = x\r\n"] * 20
        texts += ["def f:\n    if x:\n\n\n        y   =  z\n\t\treturn .\n\n  \n     \u00a0 \u3000  \r\n\r\n   "] * 40  # so that runs of white space are tokens
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        model.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=600, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False))
        model.add_tokens([tokenizers.AddedToken(name, normalized=False) for name in PLAIN])
        TRAINED[form] = model.to_str()
    whole = json.loads(TRAINED[form])
    for name, value in changed.items():
        (whole["model"] if name in whole["model"] else whole)[name] = value
    model = tokenizers.Tokenizer.from_str(json.dumps(whole))
    model.encode_special_tokens = True
    return model


def trimming(part: dict) -> dict:
    return {**part, "trim_offsets": True} if part.get("type") == "ByteLevel" else part


def library(model: tokenizers.Tokenizer, texts: list[str]) -> list[list[int]]:
    return [one.ids for one in model.encode_batch(texts, add_special_tokens=False)]


def differing(found: memo.Memo, texts: list[str]) -> list[str]:
    """Texts of which the ids are not the library's, asked for twice: when they are new and when they are known."""
    wanted = library(found.model, texts)
    return [text for _ in range(2) for text, ids, own in zip(texts, lists(found.encode(texts)), wanted, strict=True) if ids != own]


def nasty(seed: int, count: int = 500) -> list[str]:
    draw = random.Random(seed)
    return ["".join(draw.choice(NASTY) for _ in range(draw.randrange(40))) for _ in range(count)]


@pytest.mark.parametrize("kind", KINDS)
def test_torture(kind):
    found = memo_of(made(kind, **KINDS[kind]))
    texts = [*TORTURE.values(), *nasty(0), *(" ".join(row.values()) for row in ragged_rows(100))]
    assert not differing(found, texts)
    assert found.count > 100 and not differing(found, texts[::-1]), "neither does order count"


@pytest.mark.parametrize("kind", KINDS)
def test_any_text(kind):
    model = made(kind, **KINDS[kind])
    found = memo_of(model)  # one for all examples, so that chunks of one meet those of another

    @settings(max_examples=200, deadline=None, derandomize=True)
    @given(st.lists(st.lists(st.sampled_from(NASTY) | st.text(st.characters(exclude_categories=["Cs"]), max_size=3), max_size=25).map("".join), max_size=5))
    @example([])
    @example(["", "a ", " a", " ", "a  b", "a \u0301b", "a\n b", "a <think> b", "<|im_end|> a", "x" * 300 + " y", "1 2", "a\x1c b"])
    def holds(texts: list[str]) -> None:
        assert not differing(found, texts)

    holds()


@pytest.mark.parametrize("kind", KINDS)
def test_no_letter_joins_a_space_that_follows_it(kind):
    """Every character there is, but those of large scripts' letters, stands before a space: NFC and pre-tokenizer part it there, or it is white space."""
    model = made(kind, **KINDS[kind])
    white = [chr(code) for code in range(sys.maxunicode + 1) if re.match(r"\s", chr(code))]
    letters = [chr(code) for code in [*range(0x3400), *range(0xA000, 0xAC00), *range(0xD7A4, 0xD800), *range(0xF900, 0x1_1000), *range(0x1_6000, 0x1_6200),
                                      *range(0x1_D000, 0x2_0000), *range(0xE_0000, 0xE_0200), 0x10_FFFF]]
    texts = [f"a{letter} b" for letter in letters if letter not in white]
    normal = model.normalizer.normalize_str if model.normalizer else str
    parted = model.pre_tokenizer.pre_tokenize_str
    for start in range(0, len(texts), 1000):  # a text of many, each the last of its word
        text = normal("".join(texts[start : start + 1000]))
        assert text.count(" b") == len(texts[start : start + 1000]) == sum(piece.startswith("Ġb") for piece, _ in parted(text))


@pytest.mark.parametrize("cut", [r" ", r"(?<!\S) "], ids=["at every space", "before a space after white space"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_wrong_cut_is_found(kind, cut):
    found = memo_of(made(kind, **KINDS[kind]))
    found.cut, found.find_run = re.compile(cut).split, lambda text: True
    assert differing(found, nasty(1))


def test_words_of_other_texts_may_not_make_a_token_together():
    model = made("gpt2")
    model.add_tokens([tokenizers.AddedToken("red dog", normalized=False)])
    assert memo_of(model) is None


GATES = {
    "dropout": {"dropout": 0.1}, "a suffix": {"end_of_word_suffix": "#"}, "truncation": {"truncation": {"max_length": 4, "strategy": "LongestFirst",
    "stride": 0, "direction": "Right"}}, "padding": {"padding": {"strategy": "BatchLongest", "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
    "pad_type_id": 0, "pad_token": "x"}}, "another normalizer": {"normalizer": {"type": "NFKC"}},
    "a normalizer before it": {"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]}},
    "a space in front": {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}},
    "no regex": {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}}, "none": {"pre_tokenizer": None},
    "another regex": {"pre_tokenizer": json.loads(json.dumps(FORMS["qwen"]).replace("(?!", "(?="), object_hook=trimming)},
}


@pytest.mark.parametrize("gate", GATES)
def test_where_it_is_not_known_to_hold_the_library_is_asked(gate, tmp_path):
    model = made("gpt2", **GATES[gate])
    assert memo_of(made("gpt2")) and memo_of(model) is None
    model.encode_special_tokens = False
    model.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    ours = load_tokenizer(tmp_path)
    if gate in ("truncation", "padding"):  # which reading the file switches off
        assert ours.memo
    else:
        assert ours.memo is None
    if gate != "dropout":
        assert lists(ours.encode_all(["red dog  cat", ""])) == library(ours.model, ["red dog  cat", ""])


def test_names_of_control_tokens_count_as_text_and_other_names_do_not():
    model = made("qwen")
    model.encode_special_tokens = False
    assert memo_of(model) is None
    model.normalizer = normalizers.NFC()
    model.encode_special_tokens = True
    assert memo_of(model)
    model.add_tokens([tokenizers.AddedToken("K", normalized=True)])
    assert memo_of(model) is None, "NFC makes a K of the Kelvin sign"


def test_a_token_that_becomes_a_control_token_is_text_from_then_on(tmp_path):
    made("smollm2").save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    ours = load_tokenizer(tmp_path)
    assert lists(ours.encode_all(["a <think> b"]))[0].count(ours.model.token_to_id("<think>")) == 1
    number = ours.special("<think>")
    (ids,) = lists(ours.encode_all(["a <think> b"]))
    assert ids == ours.encode("a <think> b") and number not in ids


def test_memory_is_bounded(monkeypatch):
    found = memo_of(made("gpt2"))
    monkeypatch.setattr(memo, "KEPT_CHUNKS", 40)
    monkeypatch.setattr(memo, "KEPT_IDS", 4000)
    sizes = []
    for batch in range(30):
        assert not differing(found, [f"word{batch} {number}" for number in range(20)])
        sizes.append(found.count)
    assert max(sizes) <= 40 + 21 and min(sizes[1:]) == 21, "it begins anew"
    long = "中" * 500
    assert not differing(found, [long, f"a {long}"]) and long not in found.first and long not in found.later, "not kept"
    for _ in range(10):
        found.encode([long])
    assert len(found.ids) <= 4000 + 2 * 1500 and found.ids.dtype == np.int32
