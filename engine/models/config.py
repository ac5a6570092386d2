"""config.json -> the numbers a model computes with. A field that would change the arithmetic is obeyed or refused by name.

What a family adds to Llama is a few fields here, given by its line in `models.FAMILIES`; what needs other code is a file
beside llama.py. Every field of config.json must be known: to this engine, or as one that arithmetic does not depend on.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from engine.errors import EngineError

# Names of parameters that a rope type has, beside its frequency base.
ROPE_PARAMETERS = {"default": set(), "linear": {"factor"},
                   "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}}


@dataclass(frozen=True)
class Rope:
    """Rotary positions: the base of the frequencies, and how they are scaled."""

    theta: float
    kind: str
    parameters: dict[str, Any]


@dataclass(frozen=True)
class ModelConfig:
    """A decoder. `windows`: how far back each layer sees, in tokens, itself included; None sees all.

    `ropes`: positions of layers that see all, and of layers with a window.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    initializer_range: float
    windows: tuple[int | None, ...]
    ropes: tuple[Rope, Rope]
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: bool = False
    query_scale: float = 1.0  # of the queries, beside attention's own 1 / √head_dim
    embedding_scale: float = 1.0


Features = Callable[[dict[str, Any]], dict[str, Any]]

NEEDED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
DEFAULTS = {"num_key_value_heads": None, "head_dim": None, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
            "initializer_range": 0.02, "rope_theta": 10000.0}
ROPE = {"rope_parameters", "rope_scaling", "rope_theta"}
# Whole numbers from 1 on, and what is more than any model has: names and shapes are compared with the weights' only once a model is laid out.
COUNTS = {**dict.fromkeys((*NEEDED, "num_key_value_heads", "head_dim", "max_position_embeddings", "sliding_window"), 1 << 31), "num_hidden_layers": 10_000}
REALS = ("rms_norm_eps", "initializer_range", "rope_theta")
# Fields with one value that is computed here; what is not in config.json has it.
ONLY = {"hidden_act": "silu", "mlp_bias": False, "attention_dropout": 0.0, "partial_rotary_factor": 1.0, "rope_interleaved": False}
# Fields that say nothing about arithmetic: names, ids, types of stored weights, defaults of generation, marks of other tools.
INERT = set("""_name_or_path architectures attn_implementation auto_map begin_suppress_tokens bos_token_id cache_implementation chunk_size_feed_forward
    do_sample dtype eos_token_id id2label initializer_range is_llama_config label2id length_penalty max_length min_length model_type num_beams
    num_return_sequences output_attentions output_hidden_states pad_token_id pretraining_tp problem_type repetition_penalty return_dict
    temperature tokenizer_class top_k top_p torch_dtype transformers.js_config transformers_version typical_p unsloth_fixed unsloth_version use_bfloat16
    use_cache vocab_size diversity_penalty early_stopping encoder_no_repeat_ngram_size no_repeat_ngram_size num_beam_groups remove_invalid_values
    return_dict_in_generate _attn_implementation_autoset""".split())


def read(raw: dict[str, Any], source: str, features: Features, own: dict[str, Any], only: dict[str, Any]) -> ModelConfig:
    """The config of a family.

    Args:
        features: fields of config.json, defaults filled in -> fields of ModelConfig in which the family differs from Llama;
            its `ropes` are pairs of a frequency base and `rope_parameters`.
        own: the fields that `features` reads, and the family's other defaults.
        only: as ONLY, for this family.

    Raises:
        EngineError: every field that is missing, unknown, or has a value that is not computed here.
    """
    only, known = {**ONLY, **only}, {**DEFAULTS, **own}
    problems = [f"{key} is missing" for key in NEEDED if key not in raw]
    problems += [f"{key} is {raw[key]!r}, expected {value!r}" for key, value in only.items() if raw.get(key, value) != value and key not in own]
    problems += [f"{key} is {value!r}, a field not known here; if the arithmetic does not depend on it, remove it" for key, value in raw.items()
                 if value not in (None, False, [], {}) and not any(key in some for some in (NEEDED, known, only, INERT, ROPE))]
    filled = {**known, **raw}
    problems += [f"{key} is {str(filled[key])[:50]!r}, expected a whole number from 1 to {most:,}" for key, most in COUNTS.items()
                 if filled.get(key) is not None and not (type(filled[key]) is int and 1 <= filled[key] <= most)]
    problems += [f"{key} is {str(filled[key])[:50]!r}, expected a number" for key in REALS if not _is_number(filled[key])]
    found, ropes = {}, ()
    if not problems:
        try:
            found = features(filled)
            alike = (filled["rope_theta"], raw.get("rope_parameters") or raw.get("rope_scaling") or {})
            ropes = tuple(_rope(theta, given, problems) for theta, given in found.pop("ropes", (alike, alike)))
        except (TypeError, ValueError, LookupError, AttributeError, ZeroDivisionError) as error:
            problems.append(f"a value is not of the kind that its field has: {error}")
    if not problems and (count := len(found.get("windows", ()))) not in (0, raw["num_hidden_layers"]):
        problems.append(f"layer_types has {count} layers, expected num_hidden_layers, {raw['num_hidden_layers']}")
    if problems:
        raise EngineError("MODEL-CONFIG", f"{source}: {'; '.join(dict.fromkeys(problems))}; this engine does not compute such a model")
    heads, layers = raw["num_attention_heads"], raw["num_hidden_layers"]
    common = {
        **{key: filled[key] for key in (*NEEDED, "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "initializer_range")},
        "num_key_value_heads": filled["num_key_value_heads"] or heads, "head_dim": filled["head_dim"] or raw["hidden_size"] // heads,
        "windows": (None,) * layers, "ropes": ropes,
    }
    return ModelConfig(**{**common, **found})


def _rope(theta: float, given: dict[str, Any], problems: list[str]) -> Rope:
    """From `rope_parameters`, which may hold the base too, or the `rope_scaling` of older files."""
    given = dict(given)
    kind = given.pop("type", "default")
    kind = given.pop("rope_type", kind)
    theta = given.pop("rope_theta", None) or theta
    if given.pop("partial_rotary_factor", 1.0) != 1.0:
        problems.append("partial_rotary_factor of the positions is not 1")
    if kind not in ROPE_PARAMETERS:
        problems.append(f"rope type is {kind!r}, expected one of {', '.join(ROPE_PARAMETERS)}")
    elif given.keys() != ROPE_PARAMETERS[kind]:
        problems.append(f"rope type {kind!r} has the parameters {sorted(given)}, expected {sorted(ROPE_PARAMETERS[kind])}")
    elif not all(map(_is_number, (theta, *given.values()))):
        problems.append(f"the positions have {theta!r} and {given}, expected numbers")
    return Rope(theta, kind, given)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < math.inf


def windows(raw: dict[str, Any], slides: Callable[[int], bool]) -> tuple[int | None, ...]:
    """How far back each layer sees: by `layer_types` where config.json has them, else `slides` tells of a layer's number."""
    kinds = raw.get("layer_types") or ["sliding_attention" if slides(number) else "full_attention" for number in range(raw["num_hidden_layers"])]
    return tuple(raw["sliding_window"] if kind == "sliding_attention" else None for kind in kinds)
