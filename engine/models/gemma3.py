"""Gemma 3, text (Gemma Team 2025): Llama with norms on both sides of attention and MLP, and GeGLU in place of SwiGLU.

Weights of norms are stored less one. Most layers see a window and have positions of their own.
"""

import math
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from engine.attention import Angles
from engine.linear import arithmetic_dtype
from engine.models.config import ModelConfig, windows
from engine.models.llama import MLP, Attend, Attention, Block, Llama, RMSNorm, rms_norm

OWN = {"max_position_embeddings": 131072, "num_key_value_heads": 4, "head_dim": 256, "tie_word_embeddings": True, "attention_bias": False,
       "query_pre_attn_scalar": 256, "sliding_window": 4096, "sliding_window_pattern": 6, "_sliding_window_pattern": 6, "layer_types": None,
       "rope_theta": 1e6, "rope_local_base_freq": 10000.0}
ONLY = {"hidden_activation": "gelu_pytorch_tanh", "hidden_act": "gelu_pytorch_tanh", "attn_logit_softcapping": None, "final_logit_softcapping": None,
        "use_bidirectional_attention": False}


def features(raw: dict[str, Any]) -> dict[str, Any]:
    """As `config.read` takes them."""
    by_kind = raw.get("rope_parameters") or {"full_attention": raw.get("rope_scaling")}
    return {
        "qk_norm": True, "qkv_bias": raw["attention_bias"], "o_bias": raw["attention_bias"], "embedding_scale": math.sqrt(raw["hidden_size"]),
        "query_scale": math.sqrt(raw["head_dim"] / raw["query_pre_attn_scalar"]),
        "windows": windows(raw, lambda number: (number + 1) % raw["sliding_window_pattern"] != 0),
        "ropes": ((raw["rope_theta"], by_kind.get("full_attention") or {}), (raw["rope_local_base_freq"], by_kind.get("sliding_attention") or {})),
    }


class Gemma3Norm(RMSNorm):
    neutral = 0.0

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight.float() + 1, self.eps, arithmetic_dtype(x))


class Gemma3Attention(Attention):
    norm = Gemma3Norm


class Gemma3MLP(MLP):
    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))


class Gemma3Block(Block):
    attention, mlp_kind, norm = Gemma3Attention, Gemma3MLP, Gemma3Norm

    def __init__(self, config: ModelConfig, *others: Any) -> None:
        super().__init__(config, *others)
        self.pre_feedforward_layernorm = Gemma3Norm(config.hidden_size, config.rms_norm_eps)
        self.post_feedforward_layernorm = Gemma3Norm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, angles: Angles, attend: Attend) -> Tensor:
        x = x + self.attention_dropout(self.post_attention_layernorm(self.self_attn(self.input_layernorm(x), angles, attend)))
        return x + self.mlp_dropout(self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x))))


class Gemma3(Llama):
    block, norm = Gemma3Block, Gemma3Norm
