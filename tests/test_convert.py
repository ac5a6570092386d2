"""GGUF to a model folder: weights and ids are those of the model that the GGUF was made from."""

import json
import math
import os
from pathlib import Path

import gguf
import numpy as np
import pytest
import sentencepiece
import tokenizers
import torch
from conftest import lists
from disks import child, memory_disk
from safetensors.torch import load_file, save_file
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from engine import adapter, convert, gguf_in, gguf_out, lora
from engine.attention import PackedAttention
from engine.data.added_tokens import extend
from engine.data.tokenizer import copy_tokenizer, load_tokenizer
from engine.dropout import DropoutKeys
from engine.errors import CHECKPOINT, ENVIRONMENT, USER, EngineError
from engine.export import load_for_inference
from engine.models import weights

TEXTS = ["Hello world", "", " two  spaces   and\ttabs \n\n  newlines\r\n", "digits 12345 678 9 and  42", "你好，世界！今天是2024年。", "🙂🤖 emoji 👩‍👩‍👧",
         "def f(x):\n    return x ** 2  # I'll we've I'M", "a user who writes <|im_start|>user <|im_end|> and <s> </s> <unk>", "cafe\u0301 É ½ ²³ ٣"]
NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output", "self_attn.q_proj": "attn_q",
         "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
         "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
WORDS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|%s| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"


def byte_level(use_regex: bool) -> dict:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def split(pattern: str) -> dict:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


SPLITS = {  # as in the tokenizer.json of SmolLM2, GPT-2, Llama-3 and Qwen2
    "smollm": [{"type": "Digits", "individual_digits": True}, byte_level(True)],
    "gpt-2": [byte_level(True)],
    "llama-bpe": [split(WORDS % "\\p{N}{1,3}"), byte_level(False)],
    "qwen2": [split(WORDS % "\\p{N}"), byte_level(False)],
}
VOCABULARY = 448
CORPUS = [text * 3 for text in TEXTS if "<|im" not in text] + ["the cat sat on the mat 100 200 300 1 2 3 2024 2025"] * 5


def bpe(pre: str) -> tokenizers.Tokenizer:
    """A trained byte-level tokenizer with the split rule of `pre`, special tokens at both ends and a user-defined one."""
    raw = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": {"type": "NFC"} if pre == "qwen2" else None,
           "pre_tokenizer": {"type": "Sequence", "pretokenizers": SPLITS[pre]}, "post_processor": None,
           "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
           "model": {"type": "BPE", "vocab": {}, "merges": [], "ignore_merges": pre == "llama-bpe"}}
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(raw))
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=420, show_progress=False, special_tokens=["<|endoftext|>", "<|im_start|>"],
                                             initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens(["<|im_end|>"])
    tokenizer.add_tokens([tokenizers.AddedToken("<tool>", normalized=False)])
    return tokenizer


def bpe_keys(pre: str, tokenizer: tokenizers.Tokenizer, **more) -> dict:
    """What llama.cpp's converter writes of it, filling up to the model's vocabulary."""
    added, merges = tokenizer.get_added_tokens_decoder(), json.loads(tokenizer.to_str())["model"]["merges"]
    tokens = [tokenizer.id_to_token(i) or f"[PAD{i}]" for i in range(VOCABULARY)]
    types = [(3 if added[i].special else 4) if i in added else 5 if tokenizer.id_to_token(i) is None else 1 for i in range(VOCABULARY)]
    return {"model": "gpt2", "pre": pre, "tokens": tokens, "token_type": types, "merges": [" ".join(pair) for pair in merges],
            "bos_token_id": 1, "eos_token_id": tokenizer.token_to_id("<|im_end|>"), "unknown_token_id": 0, "padding_token_id": 0, **more}


def spm(folder: Path, **more) -> bytes:
    """A trained BPE model that has to spell Chinese and emoji in bytes."""
    (folder / "corpus.txt").write_text("\n".join(text for text in CORPUS if text.isascii()), encoding="utf-8")
    settings = {"vocab_size": 400, "model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity",
                "remove_extra_whitespaces": False, "control_symbols": ["<|im_end|>"], "user_defined_symbols": ["<tool>", "two▁▁words"]}
    sentencepiece.SentencePieceTrainer.train(input=str(folder / "corpus.txt"), model_prefix=str(folder / "original"), minloglevel=2, num_threads=1,
                                             **{**settings, **more})
    return (folder / "original.model").read_bytes()


def spm_keys(model: bytes, **more) -> dict:
    pieces = ModelProto.FromString(model).pieces
    fill = VOCABULARY - len(pieces)
    tokens = [one.piece.replace("▁", " ") if one.type == 4 else one.piece for one in pieces]
    return {"model": "llama", "pre": "default", "tokens": tokens + [f"[PAD{i}]" for i in range(fill)],
            "scores": [one.score for one in pieces] + [-1000.0] * fill, "token_type": [one.type for one in pieces] + [5] * fill,
            "bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0, **more}


def llama(family=(LlamaConfig, LlamaForCausalLM), **changes) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
              "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "rope_parameters": {"rope_type": "default", "rope_theta": 20000.0},
              "tie_word_embeddings": True, "initializer_range": 0.1, "attn_implementation": "eager"}
    model = family[1](family[0](**{**config, **changes})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.uniform_(*((-0.5, 0.5) if name.endswith("bias") else (0.5, 1.5)))
    return model


def qwen2(**changes) -> Qwen2ForCausalLM:
    return llama((Qwen2Config, Qwen2ForCausalLM), **changes)


def permuted(rows: np.ndarray, heads: int) -> np.ndarray:
    """As llama.cpp's converter writes the rows of a query or key projection."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def write_gguf(path: Path, model: LlamaForCausalLM, keys: dict, kind: str = "F32", architecture: str = "llama", facts: dict | None = None,
               tensors: dict | None = None) -> Path:
    """`facts` and `tensors` are added; a None takes one away. The model gets the weights that `kind` leaves of its own."""
    config, qtype = model.config, gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(path, architecture)
    known = {"block_count": config.num_hidden_layers, "context_length": config.max_position_embeddings, "embedding_length": config.hidden_size,
             "feed_forward_length": config.intermediate_size, "attention.head_count": config.num_attention_heads,
             "attention.head_count_kv": config.num_key_value_heads, "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
             "rope.freq_base": config.rope_parameters["rope_theta"]}
    if architecture == "llama":
        known |= {"rope.dimension_count": config.head_dim, "attention.key_length": config.head_dim}
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, list: writer.add_array}
    for key, value in [*((f"{architecture}.{key}", value) for key, value in {**known, **(facts or {})}.items()),
                       *((f"tokenizer.ggml.{key}", value) for key, value in keys.items())]:
        if value is not None:
            add[type(value)](key, value)
    writer.add_chat_template("{{ messages }}")
    written = {}
    for name, parameter in model.named_parameters():
        part = ".".join(name.split(".")[3:-1])
        data, matrix = parameter.detach().numpy(), parameter.dim() == 2
        stored = gguf.quants.quantize(data, qtype) if matrix else data
        with torch.no_grad():
            parameter.copy_(torch.from_numpy(gguf.quants.dequantize(stored, qtype) if matrix else data.copy()))
        heads = {"self_attn.q_proj": config.num_attention_heads, "self_attn.k_proj": config.num_key_value_heads}.get(part)
        stored = permuted(stored, heads) if heads and architecture == "llama" else stored
        label = f"blk.{name.split('.')[2]}.{NAMES[part]}.{name.split('.')[-1]}" if part else f"{NAMES[name.removesuffix('.weight')]}.weight"
        written[label] = (stored, qtype if matrix else None)
    for name, data in {**written, **{name: data if data is None or isinstance(data, tuple) else (data, None)
                                     for name, data in (tensors or {}).items()}}.items():
        if data is not None:
            writer.add_tensor(name, data[0], raw_dtype=data[1])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def llama3_divisors(head_dim: int, theta: float, factor: float) -> np.ndarray:
    """As llama.cpp's converter computes rope_freqs.weight."""
    divisors = []
    for frequency in 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim):
        length = 2 * math.pi / float(frequency)
        smooth = (8192 / length - 1.0) / (4.0 - 1.0)
        divisors.append(1.0 if length < 8192 / 4.0 else factor if length > 8192 / 1.0 else 1 / ((1 - smooth) / factor + smooth))
    return np.array(divisors, dtype=np.float32)


@torch.no_grad()
def assert_same_logits(folder: Path, model: LlamaForCausalLM) -> None:
    ids = torch.randint(VOCABULARY, (100,), generator=torch.Generator().manual_seed(1))
    ours = weights.build(folder, "pretrained", 0, torch.float32, torch.float32, torch.device("cpu"))
    logits = ours.lm_head(ours(ids, torch.arange(100), PackedAttention([100], ids.device)))
    expected = model(ids[None]).logits[0]
    assert expected.std() > 0.1
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


CASES = {
    "tied": ("F32", {}, {}, {}),
    "untied, half precision, no groups": ("F16", {"tie_word_embeddings": False, "num_key_value_heads": 4}, {}, {}),
    "quantised, heads wider than the model": ("Q8_0", {"head_dim": 32}, {}, {}),
    "4 bits, one group": ("Q4_0", {"num_key_value_heads": 1}, {}, {}),
    "bf16": ("BF16", {}, {}, {}),
    "linear positions": ("F32", {"rope_parameters": {"rope_type": "linear", "rope_theta": 20000.0, "factor": 4.0}},
                         {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, {}),
    "positions of Llama 3.2": ("F32", {"head_dim": 32, "rope_parameters": {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192}}, {}, {"rope_freqs.weight": llama3_divisors(32, 500000.0, 32.0)}),
}


@pytest.fixture(scope="module")
def keys() -> dict:
    return bpe_keys("smollm", bpe("smollm"))


@pytest.mark.parametrize("case", CASES)
def test_logits_are_the_models(case, keys, tmp_path):
    kind, changes, facts, tensors = CASES[case]
    model = llama(**changes)
    write_gguf(tmp_path / "in.gguf", model, keys, kind, facts=facts, tensors=tensors)
    convert.main([str(tmp_path / "in.gguf"), str(tmp_path / "out"), "--dtype", "fp32"])
    assert_same_logits(tmp_path / "out", model)
    reread = LlamaForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, reread.state_dict()[name]), name
    for field in ("rope_parameters", "rms_norm_eps", "head_dim", "tie_word_embeddings", "max_position_embeddings"):
        assert getattr(reread.config, field) == getattr(model.config, field), field
    assert reread.generation_config.eos_token_id == keys["eos_token_id"]


@pytest.mark.parametrize("kind", ["F32", "Q8_0", "Q4_0", "Q4_1"])
@pytest.mark.parametrize("tied", [True, False])
def test_qwen2_comes_in_and_goes_back(kind, tied, tmp_path):
    """Biases on queries, keys and values; rows of projections as they are."""
    model = qwen2(tie_word_embeddings=tied)
    write_gguf(tmp_path / "in.gguf", model, bpe_keys("qwen2", bpe("qwen2")), kind, "qwen2")
    convert.main([str(tmp_path / "in.gguf"), str(tmp_path / "out"), "--dtype", "fp32"])
    assert_same_logits(tmp_path / "out", model)
    reread = Qwen2ForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert all(torch.equal(tensor, reread.state_dict()[name]) for name, tensor in model.state_dict().items())
    convert.main([str(tmp_path / "out"), str(tmp_path / "back.gguf"), "--dtype", "fp32"])
    convert.main([str(tmp_path / "back.gguf"), str(tmp_path / "again"), "--dtype", "fp32"])
    assert_same_logits(tmp_path / "again", model)
    config = json.loads((tmp_path / "out/config.json").read_text())
    (tmp_path / "out/config.json").write_text(json.dumps({**config, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}))
    with pytest.raises(EngineError, match="1 layers see a window"):
        convert.main([str(tmp_path / "out"), str(tmp_path / "no.gguf")])


def fp16(low: float, high: float, count: int, draw: np.random.Generator) -> np.ndarray:
    return draw.uniform(low, high, count).astype(np.float16)


def q4_k(values: int, draw: np.random.Generator) -> tuple[np.ndarray, list[float]]:
    """Random blocks of 256 numbers and what they mean, number by number: eight groups of 32 with a 6-bit scale and offset each."""
    stored, meaning = [], []
    for d, dmin in zip(fp16(0.0005, 0.002, values // 256, draw), fp16(0.001, 0.004, values // 256, draw), strict=True):
        scales, quants = draw.integers(0, 256, 12, dtype=np.uint8), draw.integers(0, 256, 128, dtype=np.uint8)
        stored.append(np.concatenate([np.array([d, dmin]).view(np.uint8), scales, quants]))
        packed = scales.tolist()
        for group in range(8):
            if group < 4:
                scale, offset = packed[group] & 63, packed[group + 4] & 63
            else:
                scale = (packed[group + 4] & 15) | (packed[group - 4] >> 6) << 4
                offset = (packed[group + 4] >> 4) | (packed[group] >> 6) << 4
            nibbles = quants[group // 2 * 32 : group // 2 * 32 + 32].tolist()
            meaning += [float(d) * scale * (nibble >> 4 if group % 2 else nibble & 15) - float(dmin) * offset for nibble in nibbles]
    return np.stack(stored), meaning


def q6_k(values: int, draw: np.random.Generator) -> tuple[np.ndarray, list[float]]:
    """Random blocks of 256 numbers: sixteen groups of 16 with an 8-bit scale each; four bits of a number here, two there."""
    stored, meaning = [], []
    for d in fp16(0.00005, 0.0002, values // 256, draw):
        low, high = draw.integers(0, 256, 128, dtype=np.uint8), draw.integers(0, 256, 64, dtype=np.uint8)
        scales = draw.integers(-100, 100, 16, dtype=np.int8)
        stored.append(np.concatenate([low, high, scales.view(np.uint8), np.array([d]).view(np.uint8)]))
        for place in range(256):
            half, quarter, column = place // 128, place % 128 // 32, place % 32
            four = int(low[half * 64 + quarter % 2 * 32 + column]) >> (4 if quarter > 1 else 0) & 15
            two = int(high[half * 32 + column]) >> 2 * quarter & 3
            meaning.append(float(d) * int(scales[place // 16]) * ((four | two << 4) - 32))
    return np.stack(stored), meaning


@pytest.mark.parametrize(("kind", "make"), [("Q4_K", q4_k), ("Q6_K", q6_k)])
def test_k_quants_mean_what_their_bits_say(kind, make, keys, tmp_path):
    """The package writes no such blocks, so they are random bits here, and read by hand."""
    model, draw = llama(hidden_size=256, intermediate_size=256, num_hidden_layers=1, num_attention_heads=16), np.random.default_rng(0)
    write_gguf(tmp_path / "plain.gguf", model, keys)
    names = [tensor.name for tensor in gguf.GGUFReader(tmp_path / "plain.gguf").tensors if len(tensor.shape) == 2 and "attn" not in tensor.name]
    blocks = {name: make((VOCABULARY if name == "token_embd.weight" else 256) * 256, draw) for name in names}
    write_gguf(tmp_path / "in.gguf", model, keys, tensors={name: (stored, gguf.GGMLQuantizationType[kind]) for name, (stored, _) in blocks.items()})
    gguf_in.to_folder(tmp_path / "in.gguf", tmp_path / "out", "fp32")
    written = load_file(tmp_path / "out/model.safetensors")
    for ours, theirs in (("embed_tokens", "token_embd"), ("layers.0.mlp.gate_proj", "blk.0.ffn_gate"), ("layers.0.mlp.down_proj", "blk.0.ffn_down")):
        expected = torch.tensor(blocks[f"{theirs}.weight"][1], dtype=torch.float64).view(-1, 256)
        assert expected.std() > 0.01 and torch.allclose(written[f"model.{ours}.weight"].double(), expected, rtol=1e-6, atol=1e-8)


def test_dtype_is_that_asked_for(keys, tmp_path):
    model = llama()
    write_gguf(tmp_path / "in.gguf", model, keys)
    gguf_in.to_folder(tmp_path / "in.gguf", tmp_path / "deep/out", "bf16")
    written = load_file(tmp_path / "deep/out/model.safetensors")
    expected = {name: tensor.bfloat16() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    assert written.keys() == expected.keys() and all(torch.equal(written[name], expected[name]) for name in expected)


@pytest.mark.parametrize(("pre", "add_bos"), [("smollm", False), ("gpt-2", True), ("default", None), ("llama-bpe", None), ("qwen2", False)])
def test_ids_are_those_of_the_byte_level_tokenizer(pre, add_bos, tmp_path):
    original = bpe("gpt-2" if pre == "default" else pre)
    write_gguf(tmp_path / "in.gguf", llama(), bpe_keys(pre, original, add_bos_token=add_bos))
    gguf_in.to_folder(tmp_path / "in.gguf", tmp_path / "out", "bf16")
    ours, theirs = load_tokenizer(tmp_path / "out"), AutoTokenizer.from_pretrained(tmp_path / "out")
    begins = add_bos or pre == "llama-bpe"
    assert ours.prefix == ([1] if begins else []) and ours.eos == original.token_to_id("<|im_end|>") and ours.size <= VOCABULARY
    assert ours.special("<|im_start|>") == 1
    assert theirs.chat_template == "{{ messages }}" and theirs.eos_token == "<|im_end|>"
    for text in [*TEXTS, "a <tool> call"]:
        with_tokens = original.encode(text, add_special_tokens=False).ids
        assert theirs(text).input_ids == [1] * begins + with_tokens, text  # theirs finds control tokens in text
        original.encode_special_tokens = True
        expected = original.encode(text, add_special_tokens=False).ids
        original.encode_special_tokens = False
        assert ours.encode(text) == lists(ours.encode_all([text]))[0] == expected, text
        assert not {0, 1, ours.eos} & set(expected)
        assert ours.decode(expected) == original.decode(expected, skip_special_tokens=True)
    assert ours.encode("<tool>") == [original.token_to_id("<tool>")]
    # Rules that a vocabulary as small as this cannot tell apart are compared as they are written.
    written, meant = (json.loads(one.to_str()) for one in (ours.model, original))
    assert [written[part] for part in ("added_tokens", "normalizer", "pre_tokenizer", "decoder")] == [
        meant[part] for part in ("added_tokens", "normalizer", "pre_tokenizer", "decoder")]
    assert written["model"]["ignore_merges"] == meant["model"]["ignore_merges"]


@pytest.mark.parametrize("dummy_prefix", [True, False])
def test_ids_are_those_of_the_sentencepiece_model(dummy_prefix, tmp_path):
    trained = spm(tmp_path, add_dummy_prefix=dummy_prefix)
    keys = spm_keys(trained, add_space_prefix=dummy_prefix, add_bos_token=dummy_prefix or None)
    keys["token_type"][2] = 1  # a file that calls the end-of-sequence normal
    write_gguf(tmp_path / "in.gguf", llama(), keys)
    gguf_in.to_folder(tmp_path / "in.gguf", tmp_path / "out", "bf16")
    original, ours = sentencepiece.SentencePieceProcessor(model_proto=trained), load_tokenizer(tmp_path / "out")
    assert ours.prefix == [1] and ours.eos == 2 and ours.size == VOCABULARY and ours.special("<|im_end|>") == original.piece_to_id("<|im_end|>")
    assert original.piece_to_id("<tool>") in ours.encode("a <tool> call")
    assert any(original.is_byte(number) for text in TEXTS for number in ours.encode(text))
    for text in [*TEXTS, "a <tool> call", "two  words", "nul \x00 byte"]:
        ids = ours.encode(text)
        assert ids == original.encode(text), text
        assert not {0, 1, 2, ours.special("<|im_end|>")} & set(ids)
        assert ours.decode(ids) == original.decode(ids) == text


@pytest.mark.parametrize(("facts", "tokenizer", "tensors", "names"), [
    ({}, {"pre": "tekken"}, {}, "tokenizer.ggml.pre is 'tekken'"),
    ({}, {"pre": None}, {}, "has no tokenizer.ggml.pre"),
    ({}, {"model": "t5"}, {}, "tokenizer.ggml.model is 't5'"),
    ({}, {"eos_token_id": None}, {}, "has no tokenizer.ggml.eos_token_id"),
    ({}, {"bos_token_id": 999}, {}, "tokenizer.ggml.bos_token_id lies beyond"),
    ({}, {"merges": ["zz zz"]}, {}, "tokenizer.ggml.merges"),
    ({"rope.scaling.type": "yarn"}, {}, {}, "llama.rope.scaling.type is 'yarn'"),
    ({"rope.dimension_count": 8}, {}, {}, "llama.rope.dimension_count is 8"),
    ({"attention.head_count": [4, 4]}, {}, {}, "between layers"),
    ({"attention.head_count": 2}, {}, {}, "attn_q.weight is [64, 64], expected 2 heads of 16 rows"),
    ({"block_count": None}, {}, {}, "has no llama.block_count"),
    ({}, {}, {"rope_freqs.weight": np.full(8, 2.0, np.float32)}, "rope_freqs.weight"),
    ({}, {}, {"blk.0.attn_q.bias": np.zeros(64, np.float32)}, "blk.0.attn_q.bias"),
    ({}, {}, {"blk.1.ffn_up.weight": None}, "missing    model.layers.1.mlp.up_proj.weight [96, 64]"),
    ({}, {}, {"blk.1.ffn_up.weight": np.zeros((96, 32), np.float32)}, "misshapen  model.layers.1.mlp.up_proj.weight"),
    ({}, {}, {"blk.1.ffn_up.weight": np.zeros((96, 64), np.int32)}, "blk.1.ffn_up.weight is of type I32"),
    ({}, {}, {"output_norm.weight": np.full(64, 1e30, np.float32)}, "output_norm.weight is not finite in torch.float16"),
])
def test_what_is_not_carried_over_is_refused_by_name(facts, tokenizer, tensors, names, keys, tmp_path):
    write_gguf(tmp_path / "in.gguf", llama(), {**keys, **tokenizer}, facts=facts, tensors=tensors)
    with pytest.raises(EngineError) as error:
        gguf_in.to_folder(tmp_path / "in.gguf", tmp_path / "out", "fp16")
    assert names in error.value.text and error.value.exit_code == USER
    assert [path.name for path in tmp_path.iterdir()] == ["in.gguf"], "nothing is left behind"


def test_files_and_folders_that_do_not_fit(keys, tmp_path, monkeypatch):
    source, target = write_gguf(tmp_path / "in.gguf", llama(), keys), tmp_path / "out"

    def refused(name: str, code: int = USER) -> str:
        with pytest.raises(EngineError) as error:
            convert.main([str(source), str(target)])
        assert (error.value.name, error.value.exit_code) == (name, code)
        return error.value.text

    target.mkdir()
    assert "exists already" in refused("CONVERT-TARGET")
    target.rmdir()
    whole = source.read_bytes()
    for end in (0, 3, 10, 100, 5000, len(whole) // 2, len(whole) - 1):
        source.write_bytes(whole[:end])
        refused("CONVERT-FILE")
    source.unlink()
    refused("CONVERT-SOURCE")
    other = write_gguf(source, llama(), keys, architecture="mamba")
    assert "general.architecture is 'mamba'" in refused("CONVERT-UNSUPPORTED")
    other.write_bytes(whole)
    (tmp_path / "file").touch()
    target = tmp_path / "file/out"
    refused("ENVIRONMENT-DISK", ENVIRONMENT)
    target = tmp_path / "out"
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    assert "[hub]" in refused("ENVIRONMENT-EXTRA", ENVIRONMENT)
    for argv in ([], ["a.gguf"], ["a.gguf", "b", "--dtype", "int8"]):
        with pytest.raises(EngineError, match="example: python -m engine.convert"):
            convert.main(argv)


@pytest.mark.parametrize("source", ["nosuch", "nosuch.gguf", "org/nosuch.gguf", "../nosuch"])
@pytest.mark.parametrize("more", [["out"], ["out.gguf"], ["out", "--adapter", "nosuch"]])
def test_a_source_that_is_not_there_is_told_so(source, more, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(EngineError) as error:
        convert.main([source, *more])
    assert error.value.text == f"{Path(source)}: is not there, expected a .gguf file, a model folder, or org/name[@revision] on the hub"
    assert (error.value.name, error.value.exit_code) == ("CONVERT-SOURCE", USER) and list(tmp_path.iterdir()) == []


@pytest.fixture
def from_gguf(keys, tmp_path) -> Path:
    """A model folder whose end of sequence config.json alone tells."""
    write_gguf(tmp_path / "in.gguf", llama(), keys)
    gguf_in.to_folder(tmp_path / "in.gguf", tmp_path / "model", "fp32")
    config, settings = (json.loads((tmp_path / "model" / name).read_text()) for name in ("config.json", "tokenizer_config.json"))
    assert config["eos_token_id"] == keys["eos_token_id"] and settings.pop("eos_token") == "<|im_end|>"
    (tmp_path / "model/tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "model/generation_config.json").unlink()
    return tmp_path / "model"


def adapter_of(base: Path, folder: Path) -> Path:
    """A folder with an adapter that changes the model, beside the tokenizer's files, as a run exports it."""
    model = weights.build(base, "pretrained", 0, torch.float32, torch.float32, torch.device("cpu"))
    lora.apply(model, lora.Settings(2, 4.0, ["q_proj", "down_proj"]), DropoutKeys(0), 1)
    for module in lora.adapters(model).values():
        torch.nn.init.normal_(module.lora_B, std=0.2, generator=torch.Generator().manual_seed(0))
    folder.mkdir()
    adapter.save(model, folder, str(base), 0.0)
    copy_tokenizer(base, folder)
    return folder


@pytest.mark.parametrize("target", ["out", "out.gguf"])
def test_an_adapters_tokenizer_goes_with_the_bases_ends(target, from_gguf, keys, tmp_path):
    """Of a base that config.json alone tells the end of sequence of, and an adapter whose maker left generation_config.json out."""
    folder, settings = adapter_of(from_gguf, tmp_path / "adapter"), {"eos_token_id": [keys["eos_token_id"], 7], "temperature": 0.6}
    (from_gguf / "generation_config.json").write_text(json.dumps(settings))
    convert.main([str(from_gguf), str(tmp_path / target), "--adapter", str(folder), "--dtype", "fp32"])
    if target.endswith(".gguf"):
        gguf_in.to_folder(tmp_path / target, tmp_path / "out", "fp32")
    else:
        assert json.loads((tmp_path / "out/generation_config.json").read_text()) == settings
    assert load_tokenizer(tmp_path / "out").eos == keys["eos_token_id"]
    expected = load_for_inference(from_gguf, tmp_path / "adapter", torch.float32, torch.device("cpu")).state_dict()
    written = load_file(tmp_path / "out/model.safetensors")
    assert all(torch.equal(written[name], expected[name]) for name in written) and len(written) == len(expected) - 1


@pytest.mark.parametrize("target", ["out", "out.gguf"])
def test_a_tokenizer_with_ids_that_the_model_lacks_is_refused(target, from_gguf, tmp_path):
    folder, names = adapter_of(from_gguf, tmp_path / "adapter"), [f"<new {number}>" for number in range(60)]
    copy_tokenizer(extend(from_gguf, names, tmp_path / "cache"), folder)  # the adapter's alone: its model has no rows for them
    with pytest.raises(EngineError, match=r"adapter: the tokenizer has \d+ ids, the model 448"):
        convert.main([str(from_gguf), str(tmp_path / target), "--adapter", str(folder)])
    assert not (tmp_path / target).exists() and not list(tmp_path.glob(".tmp*"))


@pytest.mark.parametrize(("target", "module", "name"), [("out", weights, "write_folder"), ("out.gguf", gguf_out, "write")])
def test_what_is_not_read_back_gets_no_name(target, module, name, from_gguf, tmp_path, monkeypatch):
    write = getattr(module, name)

    def write_and_cut(path: Path, *rest) -> None:
        write(path, *rest)
        written = path / "model.safetensors" if path.is_dir() else path
        os.truncate(written, written.stat().st_size - 1)

    monkeypatch.setattr(module, name, write_and_cut)
    with pytest.raises(EngineError, match=f"{target}: cannot be read back: .*; nothing of it was kept") as error:
        convert.main([str(from_gguf), str(tmp_path / target)])
    assert error.value.exit_code == CHECKPOINT and not (tmp_path / target).exists() and not list(tmp_path.glob(".tmp*"))


def test_a_disk_with_room_for_the_file_alone_is_told_as_full(from_gguf, tmp_path):
    """A GGUF file is read back by way of a folder beside it."""

    def full() -> None:
        convert.main([str(from_gguf), str(tmp_path / "out.gguf"), "--dtype", "q8_0"])
        size = (tmp_path / "out.gguf").stat().st_size
        disk = memory_disk(tmp_path / "disk", size + 64 * 1024)
        with pytest.raises(EngineError, match="cannot be written: .*No space left on device.*free some space") as error:
            convert.main([str(from_gguf), str(disk / "out.gguf"), "--dtype", "q8_0"])
        assert error.value.exit_code == ENVIRONMENT and list(disk.iterdir()) == []

    child(full)


def test_numbers_beyond_a_type_are_no_model(from_gguf, tmp_path):
    stored = load_file(from_gguf / "model.safetensors")
    save_file({**stored, "model.norm.weight": torch.full((64,), 1e5)}, from_gguf / "model.safetensors")
    with pytest.raises(EngineError, match="out: cannot be read back: .*model.norm.weight holds NaN or an infinity"):
        convert.main([str(from_gguf), str(tmp_path / "out"), "--dtype", "fp16"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("of_adapter", "of_base", "expected"), [
    ({"template": "plain", "system": None, "max_length": 9, "agreement_with_training": {"kl": 0.0}}, {"template": "chatml"},
     {"template": "plain", "system": None, "max_length": 9}),
    (None, {"template": "alpaca", "agreement_with_training": {"kl": 0.0}}, {"template": "alpaca"}),
    ({"template": ["plain"], "max_length": "9"}, {"template": "alpaca"}, {"template": "alpaca"}), (["template"], None, None), (None, None, None)])
def test_how_to_ask_is_said_by_the_adapter_else_the_base(of_adapter, of_base, expected, from_gguf, tmp_path):
    folder = adapter_of(from_gguf, tmp_path / "adapter")
    for place, note in ((folder, of_adapter), (from_gguf, of_base)):
        if note is not None:
            (place / "engine.json").write_text(json.dumps(note))
    convert.main([str(from_gguf), str(tmp_path / "out"), "--adapter", str(folder)])
    written = tmp_path / "out/engine.json"
    assert (json.loads(written.read_text()) if written.exists() else None) == expected
    convert.main([str(tmp_path / "out"), str(tmp_path / "again")])
    assert sorted(path.name for path in (tmp_path / "again").iterdir()) == sorted(path.name for path in (tmp_path / "out").iterdir())
    assert all(path.read_bytes() == (tmp_path / "again" / path.name).read_bytes() for path in (tmp_path / "out").iterdir())


@pytest.mark.parametrize("kind", [*SPLITS, "sentencepiece"])
@pytest.mark.parametrize("case", ["tied", "linear positions", "positions of Llama 3.2", "quantised, heads wider than the model"])
def test_a_folder_goes_back_to_the_file_it_came_from(kind, case, tmp_path):
    """Every key that says something about the model or its tokenizer, and every tensor."""
    if kind != "smollm" and case != "tied":
        return  # tokenizers do not depend on it
    dtype, changes, facts, tensors = CASES[case]
    keys = spm_keys(spm(tmp_path)) if kind == "sentencepiece" else bpe_keys(kind, bpe(kind))
    write_gguf(tmp_path / "in.gguf", llama(**changes), keys, dtype, facts=facts, tensors=tensors)
    convert.main([str(tmp_path / "in.gguf"), str(tmp_path / "folder"), "--dtype", "fp32"])
    convert.main([str(tmp_path / "folder"), str(tmp_path / "out.gguf"), "--dtype", {"F32": "fp32", "Q8_0": "q8_0"}[dtype]])
    before, after = (gguf.GGUFReader(tmp_path / f"{name}.gguf") for name in ("in", "out"))
    found = {name: field.contents() for name, field in after.fields.items()}
    for name, field in before.fields.items():
        if name.startswith(("llama.", "tokenizer.", "general.architecture")) and name != "tokenizer.ggml.scores":
            assert found[name] == field.contents(), name
    ours = {tensor.name: tensor for tensor in after.tensors}
    assert ours.keys() == {tensor.name for tensor in before.tensors}
    for tensor in before.tensors:
        if name != "rope_freqs.weight":
            assert ours[tensor.name].tensor_type == tensor.tensor_type and np.allclose(ours[tensor.name].data, tensor.data, rtol=1e-6), tensor.name
