"""A small model written as Automodel's own are: attention by an `attn_func`, rows or a flat sequence."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cpattn.automodel.magi_attn_utils import make_magi_attn_func

HEADS, KV_HEADS, HEAD_DIM, VOCAB = 4, 2, 8, 53


class Config:
    """What head counts are read from."""

    num_attention_heads = HEADS
    num_key_value_heads = KV_HEADS
    head_dim = HEAD_DIM
    hidden_size = HEADS * HEAD_DIM


class Layer(nn.Module):
    """Attention alone, with positions added to queries and keys so that they matter."""

    def __init__(self, window: tuple[int, int] | None = None) -> None:
        super().__init__()
        width = HEADS * HEAD_DIM
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, KV_HEADS * HEAD_DIM)
        self.v_proj = nn.Linear(width, KV_HEADS * HEAD_DIM)
        self.attn_func = make_magi_attn_func(softmax_scale=0.5)
        self.window = window

    def forward(self, x: Tensor, position_ids: Tensor, **attn_kwargs: Any) -> Tensor:
        angle = position_ids[..., None] / torch.arange(1, HEAD_DIM + 1)
        q, k, v = (
            projection(x).unflatten(-1, (-1, HEAD_DIM)) for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = q + angle.sin().unsqueeze(-2), k + angle.cos().unsqueeze(-2)
        out = self.attn_func(q, k, v, window_size=self.window, **attn_kwargs)
        return x + out.flatten(-2)


class CustomModel(nn.Module):
    """Tokens [B, S] or [T] to logits; keyword arguments go on to the attention."""

    def __init__(self, window: tuple[int, int] | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config = Config()
        self.embedding = nn.Embedding(VOCAB, HEADS * HEAD_DIM)
        self.layers = nn.ModuleList([Layer(), Layer(window)])
        self.head = nn.Linear(HEADS * HEAD_DIM, VOCAB)

    def forward(self, input_ids: Tensor, position_ids: Tensor, **attn_kwargs: Any) -> Tensor:
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = layer(x, position_ids, **attn_kwargs)
        return self.head(x)
