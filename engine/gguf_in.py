"""A GGUF file -> a model folder in Hugging Face layout, which every command reads.

Llama and Qwen2 architectures. Quantised weights are widened, which adds size and no accuracy. What the file holds and the
folder would not is refused by name. Memory: one of the folder's files, and one tensor in fp32.

Read downward: the whole, header, config, weights, tokenizer. The format: docs/gguf.md and gguf-py in ggml's repositories.
"""

import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from engine.data.memo import WORDS
from engine.errors import EngineError, extra
from engine.publish import published

# GGUF's architecture -> config.json's model_type and class. All count their parts in the same names.
ARCHITECTURES = {"llama": ("llama", "LlamaForCausalLM"), "qwen2": ("qwen2", "Qwen2ForCausalLM")}
# What of Llama 3.1's scaling of positions every model has; a GGUF holds divisors in its place, from which the factor alone is told.
OF_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
WITH_BIAS = {"llama": (), "qwen2": ("attn_q", "attn_k", "attn_v")}


class Metadata(dict):
    """The file's keys; `metadata[key]` needs the key, `metadata.get(key)` does not."""

    source: Path

    @property
    def architecture(self) -> str:
        return self["general.architecture"]

    def of_model(self, key: str, *default: Any) -> Any:
        """The key `ARCHITECTURE.key`; needed where no default is given."""
        key = f"{self.architecture}.{key}"
        return self.get(key, *default) if default else self[key]

    def __missing__(self, key: str) -> NoReturn:
        self.refuse(f"has no {key}; convert to GGUF again with a current llama.cpp")

    def refuse(self, what: str) -> NoReturn:
        raise EngineError("CONVERT-UNSUPPORTED", f"{self.source}: {what}")


def to_folder(source: Path, target: Path, dtype: str) -> None:
    """Writes the folder `target` from `source`; `dtype` is "bf16", "fp16" or "fp32".

    Raises:
        EngineError: the target exists or cannot be written; the source is no GGUF, or holds what is not carried over.
    """
    if target.exists():
        raise EngineError("CONVERT-TARGET", f"{target}: exists already; name another folder, or remove this one")
    gguf = extra("gguf", source)

    import torch

    from engine.data.tokenizer import load_tokenizer
    from engine.models import weights
    from engine.precision import DTYPES

    try:
        check_header(source)
        file = gguf.GGUFReader(source)
        metadata = Metadata((name, field.contents()) for name, field in file.fields.items())
    except (OSError, ValueError, LookupError, OverflowError) as error:
        raise EngineError("CONVERT-FILE", f"{source}: cannot be read as GGUF: {error}; fetch it again") from error
    metadata.source = source
    raw = {tensor.name: tensor for tensor in file.tensors}
    names, config = hf_names(metadata, raw), config_of(metadata, raw)
    with published(target) as building:
        building.mkdir()
        write_tokenizer(building, metadata)
        weights.write_folder(building, config, tensors_of(metadata, raw, names, config, DTYPES[dtype]))
        # What was written is read back: names and shapes must be what config.json means, ids must have an embedding.
        weights.build(building, "pretrained", 0, DTYPES[dtype], DTYPES[dtype], torch.device("meta"))
        if (size := load_tokenizer(building).size) > config["vocab_size"]:
            metadata.refuse(f"the tokenizer has {size} ids, token_embd.weight {config['vocab_size']} rows")


# ---- Header ---------------------------------------------------------------------------------------------------------

STRING, ARRAY = 8, 9  # types of values; of others their bytes
BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
ITEMS = 1 << 22  # keys, values in arrays and tensors: the largest vocabularies with their merges have under two millions


def check_header(source: Path) -> None:
    """Holds what the header claims against the file. The library takes it on trust: it reads on beyond the end, and keeps an object an item.

    Raises:
        ValueError: the header is longer than the file, or has more than any model's.
        OSError: the file cannot be read.
    """
    with source.open("rb") as file:
        size, items, order = os.fstat(file.fileno()).st_size, 0, "little"

        def number(width: int) -> int:
            if len(found := file.read(width)) < width:
                raise ValueError("it ends within its header")
            return int.from_bytes(found, order)

        def skip(width: int) -> None:
            if width > size - file.tell():
                raise ValueError(f"at byte {file.tell():,} its header claims {width:,} bytes, the file has {size - file.tell():,} more")
            file.seek(width, os.SEEK_CUR)

        def take(count: int, what: str) -> int:
            nonlocal items
            items += count
            if items > ITEMS:
                raise ValueError(f"its header claims {count:,} {what}, expected at most {ITEMS:,} in all")
            return count

        skip(4)
        if not number(4) & 0xFFFF:  # the version, written in the other order
            order = "big"
        take(number(8), "tensors")
        for _ in range(take(number(8), "keys")):
            skip(number(8))
            kind, count = number(4), 1
            if kind == ARRAY:
                kind, count = number(4), take(number(8), "values in an array")
            if kind == STRING:
                for _ in range(count):
                    skip(number(8))
            elif kind in BYTES:
                skip(count * BYTES[kind])
            else:
                raise ValueError(f"its header has a value of type {kind}, expected one of its simple types")


# ---- Config ---------------------------------------------------------------------------------------------------------


def config_of(metadata: Metadata, raw: dict[str, Any]) -> dict[str, Any]:
    """The content of config.json."""
    heads, hidden, inner = (metadata.of_model(key) for key in ("attention.head_count", "embedding_length", "feed_forward_length"))
    kv_heads = metadata.of_model("attention.head_count_kv", heads)
    if any(isinstance(value, list) for value in (heads, kv_heads, inner)):
        metadata.refuse("head counts or widths differ between layers, in a folder they cannot")
    head_dim = metadata.of_model("attention.key_length", hidden // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if (got := metadata.of_model(key, head_dim)) != head_dim:
            metadata.refuse(f"{metadata.architecture}.{key} is {got}, expected the width of a head, {head_dim}")
    theta = decimal(metadata.of_model("rope.freq_base", 10000.0))
    model_type, hf_class = ARCHITECTURES[metadata.architecture]
    biases = {"attention_bias": False, "mlp_bias": False} if model_type == "llama" else {"use_sliding_window": False}
    return {
        "architectures": [hf_class], "model_type": model_type, "vocab_size": int(raw["token_embd.weight"].shape[1]),
        "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": metadata.of_model("block_count"),
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim, "hidden_act": "silu",
        "max_position_embeddings": metadata.of_model("context_length"),
        "rms_norm_eps": decimal(metadata.of_model("attention.layer_norm_rms_epsilon")),
        "rope_theta": theta, "rope_scaling": rope_scaling(metadata, raw.get("rope_freqs.weight"), theta, head_dim),
        "tie_word_embeddings": "output.weight" not in raw, **biases, "initializer_range": 0.02,
        **{f"{name}_token_id": number for name, number in special_ids(metadata).items() if name != "unk"},
    }


def decimal(value: float) -> float:
    """The shortest decimal number that rounds to this fp32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def rope_scaling(metadata: Metadata, divisors: Any, theta: float, head_dim: int) -> dict[str, Any] | None:
    """The `rope_scaling` of config.json. `divisors`: the tensor rope_freqs, by which frequencies are divided, or None.

    Llama 3.1 and later have that tensor in place of parameters. The published models' are tried and must give it.
    """
    import torch

    from engine.models.llama import ROPE_SCALINGS

    kind = metadata.of_model("rope.scaling.type", "none")
    if kind not in ("none", "linear") or (kind == "linear" and divisors is not None):
        beside = " beside rope_freqs.weight" if divisors is not None else ""
        metadata.refuse(f"{metadata.architecture}.rope.scaling.type is {kind!r}{beside}, which is not computed here")
    if divisors is None:
        return {"rope_type": kind, "factor": decimal(metadata.of_model("rope.scaling.factor"))} if kind == "linear" else None
    found = torch.tensor(divisors.data.tolist(), dtype=torch.float64)
    scaling = {"rope_type": "llama3", "factor": float(found.max()), **OF_LLAMA3}
    frequencies = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    expected = frequencies / ROPE_SCALINGS["llama3"](frequencies, scaling)
    if found.shape != expected.shape or not torch.allclose(found, expected, rtol=1e-5):
        metadata.refuse("rope_freqs.weight is not the scaling of Llama 3.1 and later, the only such one computed here")
    return scaling


# ---- Weights --------------------------------------------------------------------------------------------------------

WHOLE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
IN_BLOCK = {"attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
            "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj",
            "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}


def hf_names(metadata: Metadata, raw: dict[str, Any]) -> dict[str, str]:
    """Name in the file -> name in the folder, for every tensor but rope_freqs, which goes into the config."""
    if metadata.architecture not in ARCHITECTURES:
        metadata.refuse(f"general.architecture is {metadata.architecture!r}, expected one of {', '.join(ARCHITECTURES)}")
    if (parts := metadata.get("split.count", 1)) > 1:
        metadata.refuse(f"is one of {parts} parts; join them with llama.cpp's llama-gguf-split --merge")
    if "token_embd.weight" not in raw:
        metadata.refuse("has no tensor token_embd.weight")
    names = {f"{name}.weight": f"{hf_name}.weight" for name, hf_name in WHOLE.items() if f"{name}.weight" in raw}
    for name in raw:
        if (block := re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)) and block[2] in IN_BLOCK and (
                block[3] == "weight" or block[2] in WITH_BIAS[metadata.architecture]):
            names[name] = f"model.layers.{block[1]}.{IN_BLOCK[block[2]]}.{block[3]}"
    if unknown := [name for name in raw if name not in names and name != "rope_freqs.weight"]:
        metadata.refuse(f"has {len(unknown)} tensors that the folder would lack, the first: {unknown[0]}")
    return names


def tensors_of(metadata: Metadata, raw: dict[str, Any], names: dict[str, str], config: dict[str, Any], dtype: Any) -> Iterator[tuple[str, Any]]:
    """The folder's tensors with their names, in `dtype`.

    llama.cpp turns neighbours (2i, 2i + 1) of a head by one angle, Hugging Face's layout turns (i, i + C/2). What writes
    GGUF reorders the rows of the query and key projections for that, and here they are put back.
    """
    import torch
    from gguf.quants import dequantize
    from tqdm import tqdm

    turned = metadata.architecture == "llama"  # Qwen2's rows are in the same order in both
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]} if turned else {}
    for name, hf_name in tqdm(names.items(), desc="weights", unit=" tensors", disable=not sys.stderr.isatty(), leave=False):
        try:
            values = np.array(dequantize(raw[name].data, raw[name].tensor_type), dtype=np.float32)
        except NotImplementedError:
            metadata.refuse(f"{name} is of type {raw[name].tensor_type.name}, which the package gguf does not dequantise")
        if count := heads.get(name.split(".")[-2]):
            if len(values) != count * config["head_dim"]:
                metadata.refuse(f"{name} is {list(values.shape)}, expected {count} heads of {config['head_dim']} rows")
            values = values.reshape(count, config["head_dim"] // 2, 2, -1).swapaxes(1, 2).reshape(values.shape)
        tensor = torch.from_numpy(values).to(dtype)
        if not tensor.isfinite().all():
            metadata.refuse(f"{name} is not finite in {dtype}; bf16 and fp32 hold larger numbers than fp16")
        yield hf_name, tensor


# ---- Tokenizer ------------------------------------------------------------------------------------------------------

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # tokenizer.ggml.token_type; sentencepiece counts alike


def special_ids(metadata: Metadata) -> dict[str, int]:
    """Ids by Hugging Face's names, of those that the file names; the end-of-sequence is always among them."""
    keys = {name: f"tokenizer.ggml.{key}_token_id" for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))}
    ids = {name: metadata[key] for name, key in keys.items() if key in metadata or name == "eos"}
    if beyond := [keys[name] for name, number in ids.items() if number >= len(metadata["tokenizer.ggml.tokens"])]:
        metadata.refuse(f"{beyond[0]} lies beyond the tokens")
    return ids


def write_tokenizer(folder: Path, metadata: Metadata) -> None:
    """tokenizer.json or tokenizer.model, with tokenizer_config.json and generation_config.json."""
    writers = {"gpt2": (write_bpe, "PreTrainedTokenizerFast"), "llama": (write_sentencepiece, "LlamaTokenizer")}
    if (kind := metadata["tokenizer.ggml.model"]) not in writers:
        metadata.refuse(f"tokenizer.ggml.model is {kind!r}, expected one of {', '.join(writers)}")
    ids, tokens, types = special_ids(metadata), metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    for name in {"bos", "eos"} & ids.keys():
        types[ids[name]] = CONTROL  # whatever the file calls them: text must never hold them
    by_default = kind == "llama" or metadata.get("tokenizer.ggml.pre") == "llama-bpe"  # llama.cpp's, where the file is silent
    begins = bool(metadata.get("tokenizer.ggml.add_bos_token", by_default)) and "bos" in ids
    write, hf_class = writers[kind]
    write(folder, metadata, list(zip(tokens, types, strict=True)), ids, begins)
    settings = {"tokenizer_class": hf_class, "add_bos_token": begins, "add_eos_token": False, "clean_up_tokenization_spaces": False,
                "model_max_length": metadata.of_model("context_length"), **{f"{name}_token": tokens[number] for name, number in ids.items()}}
    if "tokenizer.chat_template" in metadata:
        settings["chat_template"] = metadata["tokenizer.chat_template"]
    generation = {f"{name}_token_id": number for name, number in ids.items() if name != "unk"}
    for name, content in (("tokenizer_config.json", settings), ("generation_config.json", generation)):
        (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def pre_tokenizers(source: Path) -> dict[str, Any]:
    """tokenizer.ggml.pre -> the rule that splits text into words."""
    tk = extra("tokenizers", source)
    gpt2 = tk.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    byte_level = tk.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    rules = {"gpt-2": [gpt2], "default": [gpt2], "smollm": [tk.pre_tokenizers.Digits(individual_digits=True), gpt2],
             "llama-bpe": [tk.pre_tokenizers.Split(tk.Regex(WORDS % "{1,3}"), "isolated"), byte_level],
             "qwen2": [tk.pre_tokenizers.Split(tk.Regex(WORDS % ""), "isolated"), byte_level]}
    return {name: tk.pre_tokenizers.Sequence(rule) for name, rule in rules.items()}


def write_bpe(folder: Path, metadata: Metadata, tokens: list[tuple[str, int]], ids: dict[str, int], begins: bool) -> None:
    """tokenizer.json: byte-level BPE. A GGUF only names the rule that splits text into words; the rules are here."""
    tk, rules = extra("tokenizers", metadata.source), pre_tokenizers(metadata.source)
    if (pre := metadata["tokenizer.ggml.pre"]) not in rules:
        metadata.refuse(f"tokenizer.ggml.pre is {pre!r}, expected one of {', '.join(rules)}")
    if len({token for token, _ in tokens}) < len(tokens):
        metadata.refuse("tokenizer.ggml.tokens holds a token twice")
    numbers = {token: number for number, (token, kind) in enumerate(tokens) if kind != UNUSED}  # those fill up the embedding's rows
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    try:
        tokenizer = tk.Tokenizer(tk.models.BPE(numbers, merges, ignore_merges=pre == "llama-bpe"))
    except Exception as error:  # the package raises bare Exception
        metadata.refuse(f"tokenizer.ggml.merges do not fit the tokens: {error}")
    if pre == "qwen2":
        tokenizer.normalizer = tk.normalizers.NFC()
    tokenizer.pre_tokenizer, tokenizer.decoder = rules[pre], tk.decoders.ByteLevel()
    tokenizer.add_special_tokens([tk.AddedToken(token, normalized=False) for token, kind in tokens if kind in (CONTROL, UNKNOWN)])
    tokenizer.add_tokens([tk.AddedToken(token, normalized=False) for token, kind in tokens if kind == USER_DEFINED])
    if begins:
        bos = tokens[ids["bos"]][0]
        tokenizer.post_processor = tk.processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, ids["bos"])])
    tokenizer.save(str(folder / "tokenizer.json"))


def write_sentencepiece(folder: Path, metadata: Metadata, tokens: list[tuple[str, int]], ids: dict[str, int], begins: bool) -> None:
    """tokenizer.model: sentencepiece's BPE. Whether a sequence begins with bos is said in tokenizer_config.json."""
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    model = ModelProto()
    for (token, kind), score in zip(tokens, metadata["tokenizer.ggml.scores"], strict=True):
        # GGUF has the tokens that users defined with plain spaces, sentencepiece looks for them in escaped text
        model.pieces.add(piece=token.replace(" ", "▁") if kind == USER_DEFINED else token, score=score, type=kind)
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    trainer.model_type, trainer.vocab_size, trainer.byte_fallback = trainer.BPE, len(tokens), any(kind == BYTE for _, kind in tokens)
    for name in ("unk", "bos", "eos", "pad"):
        setattr(trainer, f"{name}_id", ids.get(name, -1))
        if name in ids:
            setattr(trainer, f"{name}_piece", tokens[ids[name]][0])
    normalizer.name, normalizer.escape_whitespaces = "identity", True
    normalizer.precompiled_charsmap = bytes(metadata.get("tokenizer.ggml.precompiled_charsmap", []))
    normalizer.add_dummy_prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    normalizer.remove_extra_whitespaces = bool(metadata.get("tokenizer.ggml.remove_extra_whitespaces", False))
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())

