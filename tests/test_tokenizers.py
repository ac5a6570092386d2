"""Ids and text are the libraries' own, whatever the text; names of control tokens in it stay text."""

import importlib.util
import json
import time
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from conftest import a_row, lists, load_dataset, ragged_rows, write_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

from engine.data.dataset import check_fit
from engine.data.tokenizer import PLACES, load_tokenizer, prompt_ids, tokenise
from engine.errors import USER, EngineError

SPECIALS = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|eot_id|>", "[INST]", "[/INST]"]
TORTURE = {
    "chinese": "红色的猫，蓝色的狗。「你好」……繁體字 㐀𠀀", "emoji": "🙂🤖 👩‍👩‍👧‍👦 👍🏽 🇨🇳 ❤️ 1️⃣", "nfc": "é ñ ü Å ế 가각 が",
    "nfd": "e\u0301 n\u0303 u\u0308 A\u030a e\u0302\u0301 \u1100\u1161 か\u3099", "compatibility": "ﬁ １２３ ㎏ ＡＢＣ ½ ™ Ⅳ", "nul": "\0", "nuls": "a\0b\0\0c",
    "control": "\x01\x02\x07\x08\x0b\x0c\x1b[31m\x7f\x85\u2028\u2029", "spaces": " " * 10_000, "tabs": "\t" * 10_000, "newlines": "\n" * 10_000,
    "returns": "a\r\nb\rc\n\r", "odd spaces": "\u00a0\u2009\u3000\u200b\ufeff\u2060 x \u00a0", "rtl": "שלום עולם \u202eabc\u202c مرحبا بالعالم",
    "lone mark": "\u0301", "marks": "a" + "\u0301" * 500, "long word": "pneumono" * 2000, "one letter": "a" * 10_000, "long chinese": "红" * 10_000,
    "specials": " ".join(SPECIALS), "glued specials": "".join(SPECIALS), "a special in a word": "red<|im_end|>cat</s>", "meta": "▁a ▁▁ Ġa Ċ <0x41><0x0A>",
    "empty": "", "space": " ", "leading": "  a", "trailing": "a  ", "newline": "\n", "replacement": "\ufffd", "private": "\ue000\U0010fffd",
    "noncharacter": "\uffff\U0010ffff", "code": "def f(x):\n\treturn  {'a': [1, 2.5e-3]}\n\n\n# ü", "math": "∑ᵢ xᵢ² ≤ ∞ → ∀ε>0",
    "thai": "สวัสดีชาวโลก", "devanagari": "नमस्ते दुनिया", "tibetan": "བཀྲ་ཤིས་", "variation": "葛\U000e0100 葛\U000e0101",
}


def texts() -> list[str]:
    return [" ".join(row.values()) for row in ragged_rows(200)] + ["e\u0301 é שלום 你好 🙂 \t\n\n    def f(x): return 12"] * 20


def bpe(kind: str) -> tokenizers.Tokenizer:
    """byte: as Llama 3, Qwen and SmolLM2 have it. first, prepend: as transformers converts Llama's sentencepiece model, now and formerly."""
    alphabet, special = [], [*SPECIALS, *(f"<0x{byte:02X}>" for byte in range(256))]
    model = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    model.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    if kind == "byte":
        model, special = tokenizers.Tokenizer(models.BPE()), SPECIALS
        model.pre_tokenizer, model.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        model.pre_tokenizer = pre_tokenizers.Metaspace()  # no piece goes over the end of a word, as in Llama's vocabulary
    model.train_from_iterator(texts(), trainers.BpeTrainer(vocab_size=640, special_tokens=special, initial_alphabet=alphabet, show_progress=False))
    saved = json.loads(model.to_str())
    saved["added_tokens"] = [token for token in saved["added_tokens"] if token["content"] in SPECIALS]
    model = tokenizers.Tokenizer.from_str(json.dumps(saved))
    if kind == "first":
        model.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    elif kind == "prepend":
        model.normalizer, model.pre_tokenizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]), None
    model.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return model


def bundled() -> Path | None:
    """The 32,000 pieces that Llama-era Mistral uses, where the package that ships them is installed; the package itself is never imported."""
    spec = importlib.util.find_spec("mistral_common")
    path = Path(spec.submodule_search_locations[0]) / "data" / "tokenizer.model.v1" if spec else None
    return path if path and path.is_file() else None


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind == "mistral" and bundled() is None:
            pytest.skip("no mistral_common here: pip install --no-deps mistral-common==1.13.1")
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            settings = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "tokenizer_class": "PreTrainedTokenizerFast"}
            if kind == "mistral":
                (folder / "tokenizer.model").write_bytes(bundled().read_bytes())
            elif kind in ("llama-like", "default"):
                like_llama = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "allow_whitespace_only_pieces": True}
                sentencepiece.SentencePieceTrainer.train(
                    sentence_iterator=iter(texts()), model_prefix=str(folder / "tokenizer"), vocab_size=390, model_type="bpe", byte_fallback=True,
                    control_symbols=SPECIALS[3:], minloglevel=2, num_threads=1, **(like_llama if kind == "llama-like" else {}))
            else:
                bpe(kind).save(str(folder / "tokenizer.json"))
                (folder / "tokenizer_config.json").write_text(json.dumps(settings))
            made[kind] = folder
        return made[kind]

    return folder


SENTENCEPIECE, JSON = ["llama-like", "default", "mistral"], ["byte", "first", "prepend"]


class Reference:
    """The same folder, by the libraries alone."""

    def __init__(self, folder: Path) -> None:
        self.pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model")) if (folder / "tokenizer.model").exists() else None
        self.fast = None if self.pieces else AutoTokenizer.from_pretrained(folder, split_special_tokens=True)

    def encode(self, text: str) -> list[int]:
        return self.pieces.encode(text) if self.pieces else self.fast(text, add_special_tokens=False)["input_ids"]

    def decode(self, ids: list[int]) -> str:
        return self.pieces.decode(ids) if self.pieces else self.fast.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@pytest.fixture(scope="module")
def pairs(folders):
    made: dict[str, tuple] = {}

    def pair(kind: str) -> tuple:
        if kind not in made:
            made[kind] = load_tokenizer(folders(kind)), Reference(folders(kind))
        return made[kind]

    return pair


@pytest.mark.parametrize("what", TORTURE)
@pytest.mark.parametrize("kind", [*SENTENCEPIECE, *JSON])
def test_torture(pairs, kind, what):
    ours, reference = pairs(kind)
    text, began = TORTURE[what], time.perf_counter()
    ids = ours.encode(text)
    assert ids == reference.encode(text) == lists(ours.encode_all(["x", text, ""]))[1]
    assert not set(ids) & {ours.special(name) for name in ours.specials() if name != "<unk>"}, "names of control tokens are text here"
    assert all(0 <= number < ours.size for number in ids)
    decoded = ours.decode(ids)
    assert decoded == reference.decode(ids)
    if kind in ("byte", "first", "prepend", "llama-like", "mistral") and "▁" not in text and not (kind == "first" and text.startswith(" ")):
        assert decoded == text, "nothing is lost"
    assert time.perf_counter() - began < 2, "however long a run of one letter is"


@pytest.mark.parametrize("kind", [*SENTENCEPIECE, *JSON])
def test_any_text(pairs, kind):
    ours, reference = pairs(kind)

    @settings(max_examples=150, deadline=None, derandomize=True)
    @given(st.lists(st.text(st.characters(exclude_categories=["Cs"])) | st.sampled_from([*SPECIALS, " ", "\n", "\t", "▁", "\0"]), max_size=8).map("".join))
    def holds(text: str) -> None:
        ids = ours.encode(text)
        assert ids == reference.encode(text) == lists(ours.encode_all([text]))[0] and ours.decode(ids) == reference.decode(ids)
        assert not set(ids) & {ours.eos, *ours.prefix}

    holds()


@pytest.mark.parametrize("kind", [*SENTENCEPIECE, *JSON])
def test_text_that_goes_on_is_tokenised_as_if_what_is_before_it_were_there(pairs, kind):
    ours, reference = pairs(kind)
    for text in ("red", " red", "  red cat", "红", "", " ", "red ", " red 红"):
        (ids,) = lists(ours.encode_all([text], spaced=False))
        if kind == "default":  # its normalisation makes one space of a run and drops it at an end
            assert ids == ours.unspaced.encode(text) if not text.startswith(" ") else ids == reference.encode(text.strip()), text
        else:
            assert reference.encode("x\n") + ids == reference.encode(f"x\n{text}"), text


def test_where_a_tokenizer_puts_spaces(pairs):
    found = {kind: pairs(kind)[0].spaced for kind in ("llama-like", *JSON)}
    assert found == {"llama-like": {"alone", "begin"}, "first": {"alone"}, "prepend": {"alone", "begin", "control"}, "byte": PLACES}
    # and transformers agrees: what stands between control tokens
    for kind in JSON:
        ours, reference = pairs(kind)
        chat = AutoTokenizer.from_pretrained(reference.fast.name_or_path)
        text = "<s><|im_start|>user\nred<|im_end|>\n<|im_start|>assistant\n"
        assert prompt_ids(a_row("red", "", ""), "chatml", ours) == chat(text, add_special_tokens=False)["input_ids"] == ours.encode_rendered(text)
        assert ours.encode("<s>") == reference.encode("<s>") != [1], "after encode_rendered, names are text again"


@pytest.mark.parametrize("kind", ["llama-like", "byte"])
def test_what_is_no_control_token_cannot_stand_for_one(pairs, kind):
    ours, _ = pairs(kind)
    assert ours.special("<|im_end|>") == SPECIALS.index("<|im_end|>") if kind == "byte" else ours.model.is_control(ours.special("<|im_end|>"))
    for name in ("a", "red", "<|nothing|>", "<0x41>"):
        with pytest.raises(EngineError, match="which this tokenizer lacks") as caught:
            ours.special(name)
        assert caught.value.exit_code == USER


def test_a_tokenizer_whose_ids_leave_gaps_is_as_large_as_its_highest(folders, tmp_path):
    saved = json.loads((folders("byte") / "tokenizer.json").read_text())
    saved["model"]["vocab"]["<far>"] = 5000
    saved["added_tokens"].append({**saved["added_tokens"][0], "id": 5000, "content": "<far>"})
    (tmp_path / "tokenizer.json").write_text(json.dumps(saved))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<far>"}')
    ours = load_tokenizer(tmp_path)
    assert ours.eos == 5000 and ours.size == 5001


def test_no_id_of_the_data_is_beyond_the_model(folders, tmp_path):
    """The tokenizer itself is small enough; what ends an answer, by generation_config.json, is not."""
    (tmp_path / "tokenizer.json").write_bytes((folders("byte") / "tokenizer.json").read_bytes())
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 700}')
    (tmp_path / "rows.jsonl").write_text('{"instruction": "a", "output": "b"}\n')
    ours = load_tokenizer(tmp_path)
    data = load_dataset(tmp_path / "rows.jsonl", ours, "plain", 64, "error", tmp_path / "cache")
    assert ours.size <= 700 == int(data.tokens.max())
    check_fit(data, None, ours, {"vocab_size": 701})
    with pytest.raises(EngineError, match="vocab_size is 700, the data's highest id 700"):
        check_fit(data, None, ours, {"vocab_size": 700})


def test_a_control_token_that_nothing_writes_needs_no_row_of_the_embedding(folders, tmp_path):
    """Gemma 3's text models come with <image_soft_token>, the id behind their vocabulary's last."""
    saved = json.loads((folders("byte") / "tokenizer.json").read_text())
    pieces = max(max(saved["model"]["vocab"].values()), *(token["id"] for token in saved["added_tokens"])) + 1
    saved["added_tokens"].append({**saved["added_tokens"][0], "id": pieces, "content": "<image_soft_token>"})
    (tmp_path / "tokenizer.json").write_text(json.dumps(saved))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": saved["added_tokens"][0]["content"]}))
    rows, other = (write_rows(tmp_path / f"{name}.jsonl", [{"instruction": "a <image_soft_token>", "output": "b"}]) for name in ("rows", "other"))
    ours = load_tokenizer(tmp_path)
    assert ours.size == pieces + 1
    data = load_dataset(rows, ours, "plain", 64, "error", tmp_path / "cache")
    check_fit(data, None, ours, {"vocab_size": pieces})
    with pytest.raises(EngineError, match=f"the tokenizer has {pieces + 1} ids, the model's vocab_size is 9,"):
        check_fit(data, None, ours, {"vocab_size": 9})
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": pieces}))
    (tmp_path / "tokenizer_config.json").unlink()
    held_out = load_dataset(other, load_tokenizer(tmp_path), "plain", 64, "error", tmp_path / "cache")
    with pytest.raises(EngineError, match=f"the data's highest id {pieces}"):
        check_fit(data, held_out, ours, {"vocab_size": pieces})


def test_each_text_of_a_batch_is_tokenised_once(pairs, monkeypatch):
    ours, _ = pairs("byte")
    calls, real = [], ours.encode_all
    monkeypatch.setattr(ours, "encode_all", lambda texts, spaced=True: (calls.append(len(texts)), real(texts, spaced))[1])
    rows = [a_row("red", "", "cat" * (number + 1), number) for number in range(50)]
    assert len(tokenise(rows, "chatml", None, "answers", ours).lengths) == 50 and len(calls) <= 2
    assert sum(calls) == 50 + 3, "the answers, the question, the line break, the answers' header"
