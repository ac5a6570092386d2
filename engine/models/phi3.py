"""Phi-3: Llama with queries, keys and values in one projection, and gate and up in another, as its checkpoints hold them.

They stay one matrix in memory too: adapters on `qkv_proj` and `gate_up_proj` then fit Phi-3 in every other tool.
"""

from torch import Tensor, nn

from engine.linear import Linear
from engine.models.config import ModelConfig
from engine.models.llama import Attention, Block, Llama, swiglu


class Phi3Attention(Attention):
    def project_inputs(self, config: ModelConfig) -> None:
        self.widths = [heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)]
        self.qkv_proj = Linear(config.hidden_size, sum(self.widths), bias=False)

    def inputs(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.qkv_proj(x).split(self.widths, dim=-1)


class Phi3MLP(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_up_proj = Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(*self.gate_up_proj(x).chunk(2, dim=-1)))


class Phi3Block(Block):
    attention, mlp_kind = Phi3Attention, Phi3MLP


class Phi3(Llama):
    block = Phi3Block
