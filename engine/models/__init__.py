"""Model families by the `model_type` of their config.json: the model, and how its config differs from Llama's.

To add one: a line here, and a file beside llama.py where its arithmetic differs. Gemma 2 is not among them: it bends
attention scores and logits by tanh, which no attention kernel of torch does.
"""

from dataclasses import dataclass, field
from typing import Any

from engine.models import gemma3
from engine.models.config import Features, ModelConfig, read, windows
from engine.models.llama import Llama
from engine.models.phi3 import Phi3


@dataclass(frozen=True)
class Family:
    """`features`, `own`, `only`: as `config.read` takes them."""

    model: type[Llama]
    features: Features
    own: dict[str, Any] = field(default_factory=dict)
    only: dict[str, Any] = field(default_factory=dict)

    def config(self, raw: dict[str, Any], source: str) -> ModelConfig:
        """From the content of a config.json, which came from `source`."""
        return read(raw, source, self.features, self.own, self.only)


def _biases(raw: dict[str, Any]) -> dict[str, Any]:
    return {"qkv_bias": raw["attention_bias"], "o_bias": raw["attention_bias"]}


def _qwen_windows(raw: dict[str, Any]) -> dict[str, Any]:
    used = {"windows": windows(raw, lambda number: number >= raw["max_window_layers"])}
    return used if raw["use_sliding_window"] and raw["sliding_window"] else {}


def _window_everywhere(raw: dict[str, Any]) -> dict[str, Any]:
    return {"windows": (raw["sliding_window"],) * raw["num_hidden_layers"]}


_QWEN = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28, "layer_types": None, "max_position_embeddings": 32768}

FAMILIES = {
    # Llama 2 and 3, TinyLlama, SmolLM2
    "llama": Family(Llama, _biases, {"attention_bias": False}),
    "mistral": Family(Llama, _window_everywhere, {"sliding_window": 4096, "max_position_embeddings": 131072, "num_key_value_heads": 8}),
    # Qwen2 and Qwen2.5: biases on queries, keys and values
    "qwen2": Family(Llama, lambda raw: {"qkv_bias": True, **_qwen_windows(raw)}, _QWEN),
    # Qwen3: norms on queries and keys in their place
    "qwen3": Family(Llama, lambda raw: {"qk_norm": True, **_biases(raw), **_qwen_windows(raw)}, {**_QWEN, "attention_bias": False, "head_dim": 128}),
    # queries, keys and values in one matrix, gate and up in another
    "phi3": Family(Phi3, _window_everywhere, {"sliding_window": None, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
                                              "original_max_position_embeddings": None}, {"resid_pdrop": 0.0, "embd_pdrop": 0.0}),
    # Gemma 3, text alone
    "gemma3_text": Family(gemma3.Gemma3, gemma3.features, gemma3.OWN, gemma3.ONLY),
}
