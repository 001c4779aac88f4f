"""The layers of the small Llama: what EAGLE's modeling_llama_kv.py and kv_cache.py compute, by the same formulas."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Config:
    """Sizes of the small model. Seven layers at least, or EAGLE-3's three hidden states coincide."""

    vocab_size: int = 96
    draft_vocab_size: int = 80
    hidden_size: int = 64
    intermediate_size: int = 128
    num_hidden_layers: int = 8
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0

    def __post_init__(self):
        if self.num_hidden_layers < 7:
            raise ValueError(f"num_hidden_layers is {self.num_hidden_layers}; expected 7 or more, for three different hidden states")
        if not 1 <= self.draft_vocab_size <= self.vocab_size:
            raise ValueError(f"draft_vocab_size is {self.draft_vocab_size}; expected 1 to vocab_size, {self.vocab_size}")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def captured_layers(self) -> tuple[int, int, int]:
        """The layers whose inputs EAGLE-3 reads."""
        return 2, self.num_hidden_layers // 2, self.num_hidden_layers - 3


class KVCache:
    """Rows [1, kv heads, max_length, head_dim] of which the first current_length (a 0-dim view of a CPU tensor) are in use."""

    def __init__(self, data: Tensor, current_length: Tensor):
        self.data, self.current_length = data, current_length

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.data.shape[0], self.data.shape[1], self.current_length.item(), self.data.shape[3]

    def cat(self, tensor: Tensor, dim: int = 2) -> Tensor:
        """Appends rows and returns a view of all rows in use."""
        self.data.narrow(dim, self.current_length, tensor.shape[dim]).copy_(tensor)
        self.current_length.add_(tensor.shape[dim])
        return torch.narrow(self.data, 2, 0, self.current_length)


def initialize_past_key_values(model: nn.Module, max_length: int = 2200) -> tuple[list[list[KVCache]], list[Tensor], Tensor]:
    """(a pair of caches for each layer, [their data [2 * layers, 1, kv heads, max_length, head_dim]], lengths [2 * layers] on the CPU)."""
    config, weight = model.config, model.lm_head.weight
    shape = 2 * config.num_hidden_layers, 1, config.num_key_value_heads, max_length, config.head_dim
    data = torch.zeros(shape, device=weight.device, dtype=weight.dtype)
    lengths = torch.zeros(2 * config.num_hidden_layers, dtype=torch.long)
    caches = [[KVCache(data[2 * i + j], lengths[2 * i + j]) for j in range(2)] for i in range(config.num_hidden_layers)]
    return caches, [data], lengths


class RMSNorm(nn.Module):
    """x / rms(x) * weight, in float32."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.variance_epsilon = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)).to(x.dtype)


def rotate(x: Tensor, position_ids: Tensor, theta: float) -> Tensor:
    """Rotary embedding of x [B, H, n, D] at position_ids [B, n]."""
    size = x.shape[-1]
    frequency = theta ** -(torch.arange(0, size, 2, device=x.device).float() / size)
    angle = (position_ids[..., None].float() * frequency).repeat(1, 1, 2)[:, None]
    first, second = x.chunk(2, dim=-1)
    return (x * angle.cos() + torch.cat([-second, first], -1) * angle.sin()).to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention over a KVCache pair, which it extends, or over a pair of tensors, of which it returns longer ones."""

    def __init__(self, config: Config, input_size: int):
        super().__init__()
        self.config = config
        self.num_heads, self.num_key_value_heads = config.num_attention_heads, config.num_key_value_heads
        self.q_proj = nn.Linear(input_size, self.num_heads * config.head_dim, bias=False)
        self.k_proj = nn.Linear(input_size, self.num_key_value_heads * config.head_dim, bias=False)
        self.v_proj = nn.Linear(input_size, self.num_key_value_heads * config.head_dim, bias=False)
        self.o_proj = nn.Linear(self.num_heads * config.head_dim, config.hidden_size, bias=False)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None, position_ids: Tensor, past_key_value=None):
        """(output [B, n, hidden size], (keys, values) [B, kv heads, rows, head_dim])"""
        batch, rows, _ = hidden_states.shape

        def heads(x: Tensor, count: int) -> Tensor:
            return x.view(batch, rows, count, self.config.head_dim).transpose(1, 2)

        q = rotate(heads(self.q_proj(hidden_states), self.num_heads), position_ids, self.config.rope_theta)
        k = rotate(heads(self.k_proj(hidden_states), self.num_key_value_heads), position_ids, self.config.rope_theta)
        v = heads(self.v_proj(hidden_states), self.num_key_value_heads)
        if past_key_value is not None and isinstance(past_key_value[0], KVCache):
            k, v = (cache.cat(new) for cache, new in zip(past_key_value, (k, v)))
        elif past_key_value is not None:
            k, v = (torch.cat([old, new], 2) for old, new in zip(past_key_value, (k, v)))
        groups = self.num_heads // self.num_key_value_heads
        scores = q @ k.repeat_interleave(groups, 1).transpose(2, 3) / math.sqrt(self.config.head_dim)
        if attention_mask is not None:
            scores = scores + attention_mask
        weights = scores.softmax(-1, dtype=torch.float32).to(q.dtype)
        out = (weights @ v.repeat_interleave(groups, 1)).transpose(1, 2).reshape(batch, rows, -1)
        return self.o_proj(out), (k, v)


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: Config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


def causal_mask(queries: int, past: int, device: torch.device) -> Tensor:
    """[1, 1, queries, past + queries] float32: 0 where a query sees a key, else the lowest finite number."""
    seen = torch.ones(queries, past + queries, dtype=torch.bool, device=device).tril(past)
    return torch.where(seen, 0.0, torch.finfo(torch.float32).min)[None, None]


def hide_by_tree(mask: Tensor, tree_mask: Tensor | None) -> Tensor:
    """`mask` in whose last rows and columns the zeros of tree_mask [1, 1, rows, columns] are hidden too."""
    if tree_mask is not None:
        rows, columns = tree_mask.shape[2:]
        mask[:, :, -rows:, -columns:][tree_mask == 0] = torch.finfo(torch.float32).min
    return mask
