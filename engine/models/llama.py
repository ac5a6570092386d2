"""Llama, from embedding to final norm, over rows laid end to end. Parts first, the model last.

Mistral, Qwen2 and Qwen3 are this with a few fields of their config; what differs by more is a subclass in a file of its own.
Parameter names are those of Hugging Face's checkpoints, so weights need no map. Shapes: T tokens, D hidden_size,
H query heads, K key/value heads, C head_dim, F intermediate_size, V vocab_size.

Sources: Touvron et al. 2023 (Llama 2); Ainslie et al. 2023 (grouped queries); Su et al. 2021 (rotary positions);
Zhang and Sennrich 2019 (RMSNorm); Shazeer 2020 (SwiGLU).
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from engine.attention import Angles, KVCache
from engine.dropout import DropoutKeys, KeyedDropout
from engine.linear import Embedding, Linear, arithmetic_dtype, widened
from engine.models.config import ModelConfig, Rope

Attend = Callable[[int, Tensor, Tensor, Tensor, int | None, Angles], Tensor]


class RMSNorm(nn.Module):
    neutral = 1.0  # the weight that changes nothing, from which a random model starts

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.full((width,), self.neutral)), eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps, arithmetic_dtype(x))


class Attention(nn.Module):
    norm = RMSNorm

    def __init__(self, config: ModelConfig, number: int) -> None:
        super().__init__()
        self.number, self.window, self.head_dim, self.query_scale = number, config.windows[number], config.head_dim, config.query_scale
        self.project_inputs(config)
        self.o_proj = Linear(config.num_attention_heads * config.head_dim, config.hidden_size, bias=config.o_bias)
        if config.qk_norm:
            self.q_norm, self.k_norm = self.norm(config.head_dim, config.rms_norm_eps), self.norm(config.head_dim, config.rms_norm_eps)

    def project_inputs(self, config: ModelConfig) -> None:
        width, kv_width = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, width, bias=config.qkv_bias)
        self.k_proj = Linear(config.hidden_size, kv_width, bias=config.qkv_bias)
        self.v_proj = Linear(config.hidden_size, kv_width, bias=config.qkv_bias)

    def inputs(self, x: Tensor) -> tuple[Tensor, ...]:
        """x (T, D) -> queries (T, H · C), keys and values (T, K · C)."""
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)

    def forward(self, x: Tensor, angles: Angles, attend: Attend) -> Tensor:
        q_THC, k_TKC, v_TKC = (projected.unflatten(-1, (-1, self.head_dim)) for projected in self.inputs(x))
        if hasattr(self, "q_norm"):
            q_THC, k_TKC = self.q_norm(q_THC), self.k_norm(k_TKC)
        if self.query_scale != 1:
            q_THC = q_THC * self.query_scale
        out_THC = attend(self.number, q_THC, k_TKC, v_TKC, self.window, angles)
        return self.o_proj(out_THC.flatten(-2))


class MLP(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class Block(nn.Module):
    attention, mlp_kind, norm = Attention, MLP, RMSNorm

    def __init__(self, config: ModelConfig, number: int, dropout: float, keys: DropoutKeys) -> None:
        super().__init__()
        self.input_layernorm = self.norm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = self.attention(config, number)
        self.post_attention_layernorm = self.norm(config.hidden_size, config.rms_norm_eps)
        self.mlp = self.mlp_kind(config)
        self.attention_dropout, self.mlp_dropout = KeyedDropout(dropout, keys), KeyedDropout(dropout, keys)

    def forward(self, x: Tensor, angles: Angles, attend: Attend) -> Tensor:
        x = x + self.attention_dropout(self.self_attn(self.input_layernorm(x), angles, attend))
        return x + self.mlp_dropout(self.mlp(self.post_attention_layernorm(x)))


class Llama(nn.Module):
    """Tokens laid end to end -> the hidden state after each of them.

    Args:
        arithmetic: type of the activations outside autocast.
        checkpoint_every: recompute the activations of every n-th block in the backward; 0 of none.
        dropout: share of each block's two outputs zeroed in training, with masks from `keys`.
    """

    block, norm = Block, RMSNorm

    def __init__(self, config: ModelConfig, arithmetic: torch.dtype = torch.float32, checkpoint_every: int = 0,
                 dropout: float = 0.0, keys: DropoutKeys | None = None) -> None:
        super().__init__()
        self.config, self.arithmetic, self.checkpoint_every = config, arithmetic, checkpoint_every
        self.model = nn.Module()
        self.model.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.model.layers = nn.ModuleList(self.block(config, number, dropout, keys or DropoutKeys(0)) for number in range(config.num_hidden_layers))
        self.model.norm = self.norm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """ids and positions (T,) -> (T, D). Logits are the caller's: `lm_head`, or the loss, at the tokens that need them."""
        config = self.config
        x = self.model.embed_tokens(ids).to(self.arithmetic)
        if config.embedding_scale != 1:
            x = x * torch.tensor(config.embedding_scale, dtype=x.dtype)
        far, near = config.ropes
        dtype = arithmetic_dtype(x)  # once for all layers, each of which would keep a copy for the backward
        far_angles = rotary_angles(positions, config.head_dim, far, dtype)
        near_angles = far_angles if near == far else rotary_angles(positions, config.head_dim, near, dtype)
        for number, (block, window) in enumerate(zip(self.model.layers, config.windows, strict=True)):
            angles = far_angles if window is None else near_angles
            if self.checkpoint_every and self.training and number % self.checkpoint_every == 0:
                # Nothing in a block draws from a stream of random numbers, so there is no stream to rewind.
                x = checkpoint(block, x, angles, attend, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, angles, attend)
        return self.model.norm(x)

    def cache(self, rows: int, capacity: int) -> KVCache:
        """An empty cache for generating `rows` sequences of up to `capacity` tokens."""
        config, weight = self.config, self.model.embed_tokens.weight
        return KVCache(rows, capacity, config.num_hidden_layers, config.num_key_value_heads, config.head_dim, self.arithmetic, weight.device)


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """x (..., width) divided by its root mean square, times `weight` (width,), in `dtype`."""
    return _RMSNorm.apply(x, weight, eps, dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up."""
    return _SwiGLU.apply(gate, up)


class _RMSNorm(torch.autograd.Function):
    """Keeps its input and one number a token for the backward; composed from torch's operations it would keep three copies.

    On CUDA torch has a kernel for each direction, which passes over memory once; below, x crosses it a dozen times, in a CPU's cache.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        ctx.by_kernel = x.is_cuda and x.dtype in (weight.dtype, torch.float32)  # where it is both, a weight in x's type is the weight
        if ctx.by_kernel:
            out, inverse = torch.ops.aten._fused_rms_norm(x, x.shape[-1:], weight.to(x.dtype), eps)
            ctx.save_for_backward(x, weight, inverse)
            return out.to(dtype)
        wide = widened(x)
        inverse = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return (wide * inverse).mul_(weight).to(dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        x, weight, inverse = ctx.saved_tensors
        if ctx.by_kernel:
            wanted = [True, ctx.needs_input_grad[1]]
            grad_x, grad_weight = torch.ops.aten._fused_rms_norm_backward(grad.to(x.dtype), x, x.shape[-1:], inverse, weight.to(x.dtype), wanted)
            return grad_x, None if grad_weight is None else grad_weight.to(weight.dtype), None, None
        normed, grad = widened(x) * inverse, widened(grad)
        grad_weight = (grad * normed).flatten(0, -2).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        grad = grad * weight.to(grad.dtype)
        along = (grad * normed).mean(-1, keepdim=True)
        return ((grad - normed.mul_(along)) * inverse).to(x.dtype), grad_weight, None, None


class _SwiGLU(torch.autograd.Function):
    """Keeps the two inputs and nothing between."""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)


def rotary_angles(positions: Tensor, head_dim: int, rope: Rope, dtype: torch.dtype) -> Angles:
    """Cosines and sines (T, C/2) in `dtype` of position × frequency in fp32."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
    frequencies = ROPE_SCALINGS[rope.kind](1.0 / rope.theta**exponents, rope.parameters)
    angles = positions[:, None].float() * frequencies
    return angles.cos().to(dtype), angles.sin().to(dtype)


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
