"""Llama, from embedding to final norm, over rows laid end to end. Read downward: the model, a block, its parts, the rest.

Parameter names are those of Hugging Face's checkpoints, so weights need no map. Shapes: T tokens, D hidden_size,
H query heads, K key/value heads, C head_dim, F intermediate_size, V vocab_size.

Sources: Touvron et al. 2023 (Llama 2); Ainslie et al. 2023 (grouped queries); Su et al. 2021 (rotary positions);
Zhang and Sennrich 2019 (RMSNorm); Shazeer 2020 (SwiGLU).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from engine.attention import KVCache
from engine.dropout import DropoutKeys, KeyedDropout
from engine.errors import EngineError
from engine.linear import Embedding, Linear, arithmetic_dtype, widened

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class LlamaConfig:
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: dict[str, Any] | None
    tie_word_embeddings: bool
    initializer_range: float

    @classmethod
    def from_hf(cls, raw: dict[str, Any], source: str) -> "LlamaConfig":
        """From the content of a config.json; fields that would change the arithmetic are obeyed or refused."""
        expected = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "partial_rotary_factor": 1.0}
        problems = [f"{key} is {raw[key]!r}, expected {value!r}" for key, value in expected.items() if raw.get(key, value) != value]
        needed = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        problems += [f"{key} is missing" for key in needed if key not in raw]
        rope = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind not in ROPE_SCALINGS:
            problems.append(f"rope type is {kind!r}, expected one of {', '.join(ROPE_SCALINGS)}")
        if problems:
            raise EngineError("MODEL-CONFIG", f"{source}: {'; '.join(problems)}; this engine does not compute such a model")
        heads = raw["num_attention_heads"]
        return cls(
            **{key: raw[key] for key in needed},
            num_key_value_heads=raw.get("num_key_value_heads") or heads,
            head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
            max_position_embeddings=raw.get("max_position_embeddings", 2048),
            rms_norm_eps=raw.get("rms_norm_eps", 1e-6),
            rope_theta=rope.pop("rope_theta", None) or raw.get("rope_theta", 10000.0),
            rope_scaling={**rope, "rope_type": kind} if kind != "default" else None,
            tie_word_embeddings=raw.get("tie_word_embeddings", False),
            initializer_range=raw.get("initializer_range", 0.02),
        )


class Llama(nn.Module):
    """Tokens laid end to end -> the hidden state after each of them.

    Args:
        arithmetic: type of the activations outside autocast.
        checkpoint_every: recompute the activations of every n-th block in the backward; 0 of none.
        dropout: share of each block's two outputs zeroed in training, with masks from `keys`.
    """

    def __init__(self, config: LlamaConfig, arithmetic: torch.dtype = torch.float32, checkpoint_every: int = 0,
                 dropout: float = 0.0, keys: DropoutKeys | None = None) -> None:
        super().__init__()
        self.config, self.arithmetic, self.checkpoint_every = config, arithmetic, checkpoint_every
        self.model = nn.Module()
        self.model.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.model.layers = nn.ModuleList(Block(config, number, dropout, keys or DropoutKeys(0)) for number in range(config.num_hidden_layers))
        self.model.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """ids and positions (T,) -> (T, D). Logits are the caller's: `lm_head`, or the loss, at the tokens that need them."""
        x = self.model.embed_tokens(ids).to(self.arithmetic)
        cos, sin = rotary_angles(positions, self.config)
        for number, block in enumerate(self.model.layers):
            if self.checkpoint_every and self.training and number % self.checkpoint_every == 0:
                # Nothing in a block draws from a stream of random numbers, so there is no stream to rewind.
                x = checkpoint(block, x, cos, sin, attend, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, cos, sin, attend)
        return self.model.norm(x)

    def cache(self, rows: int, capacity: int) -> KVCache:
        """An empty cache for generating `rows` sequences of up to `capacity` tokens."""
        config, weight = self.config, self.model.embed_tokens.weight
        return KVCache(rows, capacity, config.num_hidden_layers, config.num_key_value_heads, config.head_dim, self.arithmetic, weight.device)


class Block(nn.Module):
    def __init__(self, config: LlamaConfig, number: int, dropout: float, keys: DropoutKeys) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, number)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)
        self.attention_dropout, self.mlp_dropout = KeyedDropout(dropout, keys), KeyedDropout(dropout, keys)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        x = x + self.attention_dropout(self.self_attn(self.input_layernorm(x), cos, sin, attend))
        return x + self.mlp_dropout(self.mlp(self.post_attention_layernorm(x)))


class Attention(nn.Module):
    def __init__(self, config: LlamaConfig, number: int) -> None:
        super().__init__()
        self.number, self.head_dim = number, config.head_dim
        width, kv_width = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, width, bias=False)
        self.k_proj = Linear(config.hidden_size, kv_width, bias=False)
        self.v_proj = Linear(config.hidden_size, kv_width, bias=False)
        self.o_proj = Linear(width, config.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        q_THC, k_TKC, v_TKC = (project(x).unflatten(-1, (-1, self.head_dim)) for project in (self.q_proj, self.k_proj, self.v_proj))
        out_THC = attend(self.number, rotate(q_THC, cos, sin), rotate(k_TKC, cos, sin), v_TKC)
        return self.o_proj(out_THC.flatten(-2))


class MLP(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(_SwiGLU.apply(self.gate_proj(x), self.up_proj(x)))


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        return _RMSNorm.apply(x, self.weight, self.eps, arithmetic_dtype(x))


class _RMSNorm(torch.autograd.Function):
    """Keeps its input and one number a token for the backward; composed from torch's operations it would keep three copies."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        wide = widened(x)
        inverse = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        # rounded to the residual's type before the weight is applied, as the reference does
        return ((wide * inverse).to(x.dtype) * weight.to(x.dtype)).to(dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        x, weight, inverse = ctx.saved_tensors
        normed, grad = widened(x) * inverse, widened(grad)
        grad_weight = (grad * normed).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        grad = grad * weight.to(grad.dtype)
        along = (grad * normed).mean(-1, keepdim=True)
        return ((grad - normed.mul_(along)) * inverse).to(x.dtype), grad_weight, None, None


class _SwiGLU(torch.autograd.Function):
    """silu(gate) · up, keeping the two inputs and nothing between."""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        sigmoid = torch.sigmoid(gate)
        silu = gate * sigmoid
        # d silu / d gate = sigmoid + silu · (1 - sigmoid)
        slope = torch.addcmul(sigmoid, silu, 1 - sigmoid)
        return slope.mul_(up).mul_(grad), silu.mul_(grad)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the pairs (x[..., i], x[..., i + C/2]) of x (T, heads, C) by angles whose cos and sin are (T, 1, C/2)."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def rotary_angles(positions: Tensor, config: LlamaConfig) -> tuple[Tensor, Tensor]:
    """cos and sin, fp32 (T, 1, C/2), of position × frequency."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=positions.device) / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents
    scaling = config.rope_scaling or {"rope_type": "default"}
    frequencies = ROPE_SCALINGS[scaling["rope_type"]](frequencies, scaling)
    angles = positions[:, None, None].float() * frequencies
    return angles.cos(), angles.sin()


def _llama3_scaling(frequencies: Tensor, scaling: dict[str, Any]) -> Tensor:
    """Llama 3.1: slow frequencies are divided by `factor`, fast ones kept, those between blended."""
    factor, low, high = scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)  # within the original length
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / factor)


ROPE_SCALINGS: dict[str, Callable[[Tensor, dict[str, Any]], Tensor]] = {
    "default": lambda frequencies, scaling: frequencies,
    "linear": lambda frequencies, scaling: frequencies / scaling["factor"],
    "llama3": _llama3_scaling,
}
