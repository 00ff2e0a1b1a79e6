"""A byte-level transformer of the usual kind: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

It works on rows: one row per token, all documents of a batch one after the other, no batch dimension.
Only attention looks across rows, and attention is an argument, so the same model runs on one rank with
plain torch and with its rows spread over the ranks of a context-parallel group.

Shapes: T rows on this rank, C model width, H heads, D head width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, silu

# attention(q_THD, k_THD, v_THD) -> out_THD
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]

# What torch's cross-entropy ignores: rows without a next token.
NO_LABEL = -100


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Sizes of the model."""

    num_layers: int = 2
    dim: int = 128
    num_heads_q: int = 4
    num_heads_kv: int = 2
    head_dim: int = 16
    ffn_dim: int = 384
    vocab_size: int = 256
    rope_base: float = 10000.0


class Rotary(nn.Module):
    """Rotary position embedding (arXiv:2104.09864), the two halves of a head forming the pairs."""

    frequencies: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
        self.register_buffer("frequencies", config.rope_base**-exponents, persistent=False)

    def forward(self, positions_T: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the rows' angles, each [T, 1, D/2]."""
        angles = positions_T[:, None, None].float() * self.frequencies
        return angles.cos(), angles.sin()


def rotate(x_THD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rows turned by their angles."""
    a, b = x_THD.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


class SelfAttention(nn.Module):
    """Grouped-query attention; the mask is the business of the `attention` that it is given."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads = (config.num_heads_q, config.num_heads_kv, config.num_heads_kv)
        self.head_dim = config.head_dim
        self.qkv = nn.Linear(config.dim, sum(self.num_heads) * config.head_dim, bias=False)
        self.out = nn.Linear(config.num_heads_q * config.head_dim, config.dim, bias=False)

    def forward(self, x_TC: Tensor, cos: Tensor, sin: Tensor, attention: Attention) -> Tensor:
        heads = self.qkv(x_TC).unflatten(-1, (-1, self.head_dim))
        q, k, v = heads.split(self.num_heads, dim=1)
        out = attention(rotate(q, cos, sin), rotate(k, cos, sin), v.contiguous())
        return self.out(out.flatten(1))


class SwiGLU(nn.Module):
    """Gated feed-forward layer (arXiv:2002.05202)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_up = nn.Linear(config.dim, 2 * config.ffn_dim, bias=False)
        self.down = nn.Linear(config.ffn_dim, config.dim, bias=False)

    def forward(self, x_TC: Tensor) -> Tensor:
        gate, up = self.gate_up(x_TC).chunk(2, dim=-1)
        return self.down(silu(gate) * up)


class Block(nn.Module):
    """Attention and feed-forward, each normalised before and added to the stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.dim)
        self.attention = SelfAttention(config)
        self.ffn_norm = nn.RMSNorm(config.dim)
        self.ffn = SwiGLU(config)

    def forward(self, x_TC: Tensor, cos: Tensor, sin: Tensor, attention: Attention) -> Tensor:
        x_TC = x_TC + self.attention(self.attention_norm(x_TC), cos, sin, attention)
        return x_TC + self.ffn(self.ffn_norm(x_TC))


class Transformer(nn.Module):
    """Bytes to logits over the next byte.

    The weights depend on `seed` alone, so every rank and every run starts from the same model.
    """

    def __init__(self, config: ModelConfig, *, seed: int) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.rotary = Rotary(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.dim)
        self.head = nn.Linear(config.dim, config.vocab_size, bias=False)
        generator = torch.Generator().manual_seed(seed)
        for weight in self.parameters():
            if weight.ndim == 2:
                nn.init.normal_(weight, std=0.02, generator=generator)

    def forward(self, tokens_T: Tensor, positions_T: Tensor, attention: Attention) -> Tensor:
        """Logits [T, vocab].

        Args:
            tokens_T: [T] int64, the bytes of this rank's rows.
            positions_T: [T], the position of each row in its document.
            attention: what mixes the rows.
        """
        x_TC = self.embedding(tokens_T)
        cos, sin = self.rotary(positions_T)
        for block in self.blocks:
            x_TC = block(x_TC, cos, sin, attention)
        return self.head(self.norm(x_TC))


def loss_sum(logits: Tensor, labels_T: Tensor) -> Tensor:
    """Cross-entropy summed over the rows that have a label, in nats."""
    return cross_entropy(logits.float(), labels_T, ignore_index=NO_LABEL, reduction="sum")
