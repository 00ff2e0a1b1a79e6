"""Megatron-Core's `core_attention` on this project: sbhd and thd (PackedSeqParams), over its context-parallel group.

    spec = with_cpattn(get_gpt_layer_local_spec())

Batches are cut as Megatron cuts them: a sequence (of thd, each padded document) in two chunks for each rank, rank r
with chunk r and chunk 2 * cp - 1 - r.
"""

from __future__ import annotations

import copy
import itertools
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor

from cpattn.keys.key import AttnKey
from cpattn.keys.make import make_key
from cpattn.masks.spec import AttnMaskSpec
from cpattn.ops.attention import attention

_CAUSAL = ("causal", "causal_bottom_right", "padding_causal")
_FULL = ("no_mask", "padding")


def with_cpattn(layer_spec: Any) -> Any:
    """A copy of a layer spec (`get_gpt_layer_local_spec()` or TE's) whose self attention is `CoreAttention`."""
    spec = copy.deepcopy(layer_spec)
    spec.submodules.self_attention.submodules.core_attention = CoreAttention
    return spec


class CoreAttention(MegatronModule):  # type: ignore[misc]
    """`core_attention` over the ranks of the context-parallel group; arguments as of Megatron's own.

    Args:
        cp_comm_type: without effect: keys go where they are needed.
        pg_collection: its `cp` is the group; without one, parallel_state's context-parallel group.

    Raises:
        ValueError: dropout, or a mask type that is not served.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        if dropout:
            raise ValueError(f"attention_dropout is {dropout}: not supported by cpattn's core_attention, set it to 0")
        if attention_type != "self":
            raise ValueError(f"attention_type is {attention_type!r}: cpattn's core_attention is for self attention")
        self.attn_mask_type = attn_mask_type
        scale = config.kv_channels**-0.5 if softmax_scale is None else softmax_scale
        self.softmax_scale = scale / layer_number if config.apply_query_key_layer_scaling else scale
        windowed = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
        self.window = tuple(config.window_size) if windowed else None
        self.cp_group = _group(getattr(pg_collection, "cp", None))
        self.softmax_offset = self._offset(config)
        self.current_max_attn_logits = None  # read by Megatron's qk-clip, which then finds nothing to clip

    def _offset(self, config: TransformerConfig) -> Any:
        if config.softmax_type == "vanilla":
            return None
        heads = config.num_attention_heads // config.tensor_model_parallel_size
        if config.softmax_type == "off-by-one":
            return torch.zeros(heads)
        return torch.nn.Parameter(config.init_method(torch.empty(heads, dtype=config.params_dtype)))

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attention of this rank's tokens.

        Args:
            query: [s, b, heads, dim] of this rank's s tokens, or with packed_seq_params [t, heads, dim]. key, value:
                likewise.
            attention_mask: of causal masks and packed sequences without effect, as under TransformerEngine.

        Returns:
            [s, b, heads * dim], or [t, heads * dim].

        Raises:
            ValueError: a bias, an arbitrary mask, or lengths that Megatron's cut does not divide.
        """
        kind = (self.attn_mask_type if attn_mask_type is None else attn_mask_type).name
        if attention_bias is not None or kind not in _CAUSAL + _FULL:
            what = "attention_bias" if attention_bias is not None else f"attn_mask_type {kind!r}"
            raise ValueError(f"{what}: not supported by cpattn's core_attention")
        if attention_mask is not None and kind == "padding" and packed_seq_params is None:
            raise ValueError("padding by attention_mask: pack the sequences (PackedSeqParams), or pad causally")
        if packed_seq_params is not None:
            return self._packed(query, key, value, packed_seq_params, kind in _CAUSAL)
        plan = _rows_key(self.cp_group, len(query), kind in _CAUSAL, self.window)
        # Rows of the batch see the same mask: they go through as more heads.
        q, k, v = (t.flatten(1, 2) for t in (query, key, value))
        out = self._attend(q, k, v, plan, query.shape[1])
        return out.unflatten(1, (query.shape[1], -1)).flatten(2)

    def _packed(self, q: Tensor, k: Tensor, v: Tensor, packed: PackedSeqParams, causal: bool) -> Tensor:
        if self.window is not None:
            raise ValueError(f"window_size {self.window} with packed sequences: not served by cpattn's core_attention")
        plan = _packed_key(self.cp_group, packed, causal)
        order = plan.order.to(q.device)
        if len(q) != len(order):
            raise ValueError(f"query has {len(q)} tokens and Megatron's cut gives this rank {len(order)}")
        q, k, v = (t.index_select(0, order) for t in (q, k, v))
        out = self._attend(q, k, v, plan.key, 1)
        return torch.empty_like(out).index_copy(0, order, out).flatten(1)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, key: AttnKey, rows: int) -> Tensor:
        sink = None if self.softmax_offset is None else self.softmax_offset.to(q.device).repeat(rows)
        bound = key.with_heads(q.shape[1], k.shape[1], q.shape[2], v.shape[2])
        out = attention(q, k, v, bound, softmax_scale=self.softmax_scale, sink=sink)
        assert isinstance(out, Tensor)
        return out


def _group(group: Any) -> dist.ProcessGroup | None:
    if group is None and parallel_state.is_initialized():
        group = parallel_state.get_context_parallel_group()
    return None if group is None or dist.get_world_size(group) == 1 else group


def _size(group: dist.ProcessGroup | None) -> int:
    return 1 if group is None else dist.get_world_size(group)


# Those of a call are read off its tensors.
_HEADS: dict[str, Any] = {"num_heads_q": 1, "num_heads_kv": 1, "head_dim": 64}
_MOST_KEYS = 32
_rows_keys: dict[Any, tuple[Any, AttnKey]] = {}  # the group is kept, so that its id cannot come to mean another


def _rows_key(group: dist.ProcessGroup | None, local: int, causal: bool, window: Any) -> AttnKey:
    """The key of sequences of which this rank has `local` tokens."""
    name = (id(group), local, causal, window)
    if name not in _rows_keys:
        size = _size(group)
        if size > 1 and local % 2:
            raise ValueError(f"{local} tokens on a rank: Megatron's cut gives each rank two equal chunks")
        spec = AttnMaskSpec.varlen([local * size], causal=causal)
        if len(_rows_keys) >= _MOST_KEYS:
            del _rows_keys[next(iter(_rows_keys))]
        key = make_key(spec, **_HEADS, cp_group=group, layout="zigzag", window=window)
        _rows_keys[name] = (group, key)
    return _rows_keys[name][1]


class _Packed(NamedTuple):
    """A step's key, and the order in which it has this rank's tokens, int64 [t]."""

    key: AttnKey
    order: Tensor


def _packed_key(group: dist.ProcessGroup | None, packed: PackedSeqParams, causal: bool) -> _Packed:
    """The key of a step's packed sequences; made once and kept with them."""
    known = getattr(packed, "_cpattn", None)
    if known is not None and known[0] == (id(group), causal):
        return known[1]  # type: ignore[no-any-return]
    size = _size(group)
    sums = packed.cu_seqlens_q.tolist()
    padded = sums if packed.cu_seqlens_q_padded is None else packed.cu_seqlens_q_padded.tolist()
    lengths = [b - a for a, b in itertools.pairwise(sums)]
    room = [b - a for a, b in itertools.pairwise(padded)]
    if any(n % (2 * size) for n in room) and size > 1:
        wrong = next(n for n in room if n % (2 * size))
        raise ValueError(f"a packed sequence has {wrong} tokens with padding: not a multiple of 2 * cp = {2 * size}")
    spec = _chunked_spec(lengths, room, 2 * size, causal)
    key = make_key(spec, **_HEADS, cp_group=group, layout="zigzag")
    made = _Packed(key, _order([n // (2 * size) for n in room]))
    packed._cpattn = ((id(group), causal), made)
    return made


def _order(chunks: list[int]) -> Tensor:
    """Of this rank's tokens, first those of all first chunks, then those of all second; chunks: each document's."""
    starts = [0, *itertools.accumulate(2 * n for n in chunks)]
    documents = list(zip(starts, chunks, strict=False))
    halves = [range(start + half * n, start + (half + 1) * n) for half in (0, 1) for start, n in documents]
    return torch.tensor([token for half in halves for token in half], dtype=torch.int64)


def _chunked_spec(lengths: list[int], room: list[int], count: int, causal: bool) -> AttnMaskSpec:
    """Documents of which all first chunks come first, then all second chunks, and so on: zigzag is then their cut.

    lengths: real tokens of each; room: its tokens with padding, which count divides.
    """
    sizes = [n // count for n in room]
    before = [0, *itertools.accumulate(sizes)]
    whole = before[-1]
    rects: list[tuple[list[int], list[int], str]] = []
    for size, offset, length in zip(sizes, before, lengths, strict=False):
        spans = []
        for chunk in range(count):
            real = min(max(length - chunk * size, 0), size)
            start = chunk * whole + offset
            spans.append([start, start + real])
        for n, q in enumerate(spans):
            seen = spans[: n + 1] if causal else spans
            for m, k in enumerate(seen):
                if q[0] < q[1] and k[0] < k[1]:
                    rects.append((q, k, "causal" if causal and m == n else "full"))
    queries, keys, kinds = ([rect[n] for rect in rects] for n in range(3))
    return AttnMaskSpec(queries, keys, kinds, whole * count)  # type: ignore[arg-type]
