"""A model as one GGUF file for llama.cpp and what is built on it: config, weights and tokenizer.

Llama and Qwen2 architectures. Vectors are written in fp32, matrices in the type asked for. What GGUF cannot say, or this
file does not know how to say, is refused by name. The inverse of gguf_in.py; names and rules of both are in that file.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from engine.data.chat_template import own_template
from engine.data.tokenizer import load_tokenizer, read_json
from engine.errors import EngineError, extra
from engine.gguf_in import ARCHITECTURES, CONTROL, IN_BLOCK, NORMAL, OF_LLAMA3, UNUSED, USER_DEFINED, WHOLE, pre_tokenizers
from engine.models import FAMILIES
from engine.models.config import ModelConfig
from engine.models.llama import ROPE_SCALINGS

TYPES = {"fp32": "F32", "fp16": "F16", "bf16": "BF16", "q8_0": "Q8_0"}
NAMES = {**{model_type: name for name, (model_type, _) in ARCHITECTURES.items()}, "mistral": "llama"}  # of config.json's model_type, the architecture's


def write(path: Path, config: dict[str, Any], tensors: Iterable[tuple[str, Tensor]], folder: Path, dtype: str, base: Path | None = None) -> None:
    """Writes `path`.

    Args:
        config: the content of config.json.
        tensors: with Hugging Face's names, without the head where it is tied.
        folder: of the tokenizer.
        dtype: of matrices: "fp32", "fp16", "bf16" or "q8_0" (8 bits in blocks of 32 with a scale).
        base: the model's folder, where the tokenizer's is another.

    Raises:
        EngineError: an architecture, a rope scaling, a tokenizer or a shape that is not written.
    """
    gguf, model, architecture = extra("gguf", path), check(path, config, folder, dtype), NAMES[config["model_type"]]
    writer = gguf.GGUFWriter(path, architecture)
    write_config(writer, model, gguf)
    write_tokenizer(writer, path, folder, config, base)
    kind = getattr(gguf.GGMLQuantizationType, TYPES[dtype])
    heads = {}
    if architecture == "llama":  # llama.cpp turns neighbours there: see gguf_in.tensors_of
        heads = {"q_proj": model.num_attention_heads, "k_proj": model.num_key_value_heads}
    for name, tensor in tensors:
        values = tensor.detach().cpu().float().numpy()
        if not np.isfinite(values).all():
            refuse(path, f"{name} is not finite")
        if count := heads.get(name.split(".")[-2]):
            values = values.reshape(count, 2, values.shape[0] // count // 2, -1).swapaxes(1, 2).reshape(values.shape)
        of_tensor = kind if values.ndim > 1 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(gguf_name(path, name), gguf.quants.quantize(values, of_tensor), raw_dtype=of_tensor)
    writer.add_file_type(getattr(gguf.LlamaFileType, {"fp32": "ALL_F32"}.get(dtype, f"MOSTLY_{TYPES[dtype]}")))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def check(path: Path, config: dict[str, Any], folder: Path, dtype: str) -> ModelConfig:
    """The model's config, if such a model can be written; arguments and errors as of `write`. Looks at no weight, so it can be asked before training."""
    extra("gguf", path)
    if (model_type := config.get("model_type")) not in NAMES:
        refuse(path, f"model_type is {model_type!r}, expected one of {', '.join(NAMES)}")
    model = FAMILIES[model_type].config(config, str(path))
    if any(model.windows):
        refuse(path, f"{sum(map(bool, model.windows))} layers see a window of tokens only")
    for width in (model.hidden_size, model.intermediate_size, model.num_attention_heads * model.head_dim):
        if dtype == "q8_0" and width % 32:
            refuse(path, f"has rows of {width} numbers, Q8_0 takes multiples of 32; choose fp16 or bf16")
    if model_type != "qwen2" and (model.qkv_bias or model.o_bias):
        refuse(path, "attention_bias is true, which a GGUF of Llama has no place for")
    if model.ropes[0].kind == "llama3" and {key: model.ropes[0].parameters[key] for key in OF_LLAMA3} != OF_LLAMA3:
        refuse(path, f"its positions are scaled by {model.ropes[0].parameters}, expected Llama 3.1's: {OF_LLAMA3}, and any factor")
    if not rule_of(path, folder):
        pieces_of(path, folder)
    return model


def refuse(path: Path, what: str) -> NoReturn:
    raise EngineError("GGUF-UNSUPPORTED", f"{path}: {what}; such a model is not written as GGUF")


def gguf_name(path: Path, name: str) -> str:
    """model.layers.3.self_attn.q_proj.weight -> blk.3.attn_q.weight"""
    module, _, part = name.rpartition(".")
    for short, long in WHOLE.items():
        if module == long:
            return f"{short}.{part}"
    for short, long in IN_BLOCK.items():
        if module.startswith("model.layers.") and module.endswith(f".{long}"):
            return f"blk.{module.split('.')[2]}.{short}.{part}"
    refuse(path, f"has a tensor {name}")


def write_config(writer: Any, model: ModelConfig, gguf: Any) -> None:
    writer.add_block_count(model.num_hidden_layers)
    writer.add_context_length(model.max_position_embeddings)
    writer.add_embedding_length(model.hidden_size)
    writer.add_feed_forward_length(model.intermediate_size)
    writer.add_head_count(model.num_attention_heads)
    writer.add_head_count_kv(model.num_key_value_heads)
    writer.add_key_length(model.head_dim)
    writer.add_value_length(model.head_dim)
    writer.add_rope_dimension_count(model.head_dim)
    rope = model.ropes[0]
    writer.add_rope_freq_base(rope.theta)
    writer.add_layer_norm_rms_eps(model.rms_norm_eps)
    writer.add_vocab_size(model.vocab_size)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    if rope.kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope.parameters["factor"])
    elif rope.kind == "llama3":  # as a tensor of divisors, for GGUF has no keys for its parameters
        frequencies = rope.theta ** -(torch.arange(0, model.head_dim, 2, dtype=torch.float64) / model.head_dim)
        writer.add_tensor("rope_freqs.weight", (frequencies / ROPE_SCALINGS["llama3"](frequencies, rope.parameters)).float().numpy())


def write_tokenizer(writer: Any, path: Path, folder: Path, config: dict[str, Any], base: Path | None) -> None:
    tokenizer, settings = load_tokenizer(folder, base), read_json(folder / "tokenizer_config.json")
    rule, size = rule_of(path, folder), config["vocab_size"]
    known = write_bpe(writer, rule, folder) if rule else write_sentencepiece(writer, path, folder, size)
    tokens = [known.get(number, (f"[PAD{number}]", UNUSED)) for number in range(size)]  # as many as the embedding has rows
    writer.add_token_list([token for token, _ in tokens])
    writer.add_token_types([kind for _, kind in tokens])
    writer.add_eos_token_id(tokenizer.eos)
    numbers = {token: number for number, (token, _) in enumerate(tokens)}
    named = {name: settings.get(f"{name}_token") for name in ("bos", "pad", "unk")}
    named = {name: token["content"] if isinstance(token, dict) else token for name, token in named.items()}
    ids = {name: numbers[token] for name, token in named.items() if token in numbers}
    if tokenizer.prefix:
        ids["bos"] = tokenizer.prefix[0]
    elif "bos" not in ids and isinstance(config.get("bos_token_id"), int):
        ids["bos"] = config["bos_token_id"]
    for name, number in ids.items():
        getattr(writer, f"add_{name}_token_id")(number)
    writer.add_add_bos_token(bool(tokenizer.prefix))
    writer.add_add_eos_token(False)
    if template := own_template(folder):
        writer.add_chat_template(template)


def rule_of(path: Path, folder: Path) -> str | None:
    """The rule by which a tokenizer.json splits text into words, by GGUF's name. None: it is tokenizer.model that is written, also where a
    tokenizer.json says the same in its own form, as beside Llama's and Mistral's."""
    stored = read_json(folder / "tokenizer.json")
    if not stored or ((folder / "tokenizer.model").is_file() and not any(part["type"] == "ByteLevel" for part in parts(stored["pre_tokenizer"]))):
        return None
    if stored["model"].get("type") != "BPE":
        refuse(path, f"its tokenizer is a {stored['model'].get('type')}, expected BPE")
    rules = {name: json.loads(rule.__getstate__()) for name, rule in pre_tokenizers(path).items()}
    rule = next((name for name, known in rules.items() if parts(known) == parts(stored["pre_tokenizer"])), None)
    if rule is None:
        refuse(path, f"its tokenizer splits text by {json.dumps(stored['pre_tokenizer'])[:200]}, expected one of {', '.join(rules)}")
    return rule


def parts(rule: Any) -> list[dict[str, Any]]:
    """Of a pre-tokenizer, however nested; whether an offset leaves out spaces changes no token."""
    if rule is None:
        return []
    if rule["type"] == "Sequence":
        return [part for inner in rule["pretokenizers"] for part in parts(inner)]
    return [{key: value for key, value in rule.items() if key != "trim_offsets"}]


def write_bpe(writer: Any, rule: str, folder: Path) -> dict[int, tuple[str, int]]:
    """Byte-level BPE of tokenizer.json: merges, and the name of the rule that splits text into words. Returns the tokens by their ids."""
    stored = read_json(folder / "tokenizer.json")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(rule)
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in stored["model"]["merges"]])
    return {number: (token, NORMAL) for token, number in stored["model"]["vocab"].items()} | _added(stored)


def _added(stored: dict[str, Any]) -> dict[int, tuple[str, int]]:
    return {added["id"]: (added["content"], CONTROL if added["special"] else USER_DEFINED) for added in stored.get("added_tokens", ())}


def write_sentencepiece(writer: Any, path: Path, folder: Path, size: int) -> dict[int, tuple[str, int]]:
    """Pieces and scores of tokenizer.model, and what a tokenizer.json beside it has added. Returns the tokens by their ids."""
    model = pieces_of(path, folder)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_scores(([piece.score for piece in model.pieces] + [0.0] * size)[:size])
    writer.add_add_space_prefix(model.normalizer_spec.add_dummy_prefix)
    writer.add_remove_extra_whitespaces(model.normalizer_spec.remove_extra_whitespaces)
    if model.normalizer_spec.precompiled_charsmap:
        writer.add_precompiled_charsmap(model.normalizer_spec.precompiled_charsmap)
    pieces = {number: (piece.piece.replace("▁", " ") if piece.type == USER_DEFINED else piece.piece, piece.type) for number, piece in enumerate(model.pieces)}
    return pieces | {number: one for number, one in _added(read_json(folder / "tokenizer.json")).items() if number not in pieces or pieces[number][0] != one[0]}


def pieces_of(path: Path, folder: Path) -> Any:
    """The content of tokenizer.model, if it can be written and says what a tokenizer.json beside it does."""
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    model = ModelProto.FromString((folder / "tokenizer.model").read_bytes())
    if model.trainer_spec.model_type != model.trainer_spec.BPE:
        refuse(path, "its sentencepiece model is no BPE")
    vocabulary = read_json(folder / "tokenizer.json").get("model", {}).get("vocab")
    for number, piece in enumerate(model.pieces):
        if isinstance(vocabulary, dict) and piece.type == NORMAL and vocabulary.get(piece.piece) != number:
            refuse(path, f"tokenizer.model has {piece.piece!r} as {number}, tokenizer.json as {vocabulary.get(piece.piece)}")
    return model
