"""The calls that code written for `magi_attention.api` makes, on this runtime.

    from cpattn.magi_api import calc_attn, dispatch, magi_attn_flex_key, undispatch

Names, argument order and defaults are those of MagiAttention 1.1; a key is a `cpattn.AttnKey`. What
differs: nothing is ever padded (`pad_size` is taken and not needed: ranks may hold different numbers of
tokens), overlapping rectangles mean their union, any head dim and dtype and the CPU are served, several
masks of one group do not disturb each other, and changing a cu_seqlens tensor in place changes nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

import cpattn.ops.layout as _layout
from cpattn.keys.cache import clear_key_cache
from cpattn.keys.key import AttnKey
from cpattn.keys.make import make_key
from cpattn.masks.spec import AttnMaskSpec, Document
from cpattn.ops.attention import attention

__all__ = [
    "AttnForwardMeta",
    "AttnMaskType",
    "AttnOverlapMode",
    "AttnRange",
    "AttnRanges",
    "DispatchConfig",
    "DistAttnConfig",
    "MinHeapDispatchAlg",
    "OverlapConfig",
    "SequentialDispatchAlg",
    "UniformOverlapAlg",
    "calc_attn",
    "clear_cache",
    "compute_pad_size",
    "dispatch",
    "full_attention_to_varlen_attention",
    "get_most_recent_key",
    "get_position_ids",
    "infer_attn_mask_from_cu_seqlens",
    "infer_attn_mask_from_sliding_window",
    "magi_attn_flex_dispatch",
    "magi_attn_flex_key",
    "magi_attn_varlen_dispatch",
    "magi_attn_varlen_key",
    "make_flex_key_for_new_mask_after_dispatch",
    "make_varlen_key_for_new_mask_after_dispatch",
    "roll",
    "squash_batch_dim",
    "undispatch",
]

DEFAULT_CHUNK_SIZE = 512


class AttnMaskType(Enum):
    """Mask type of a rectangle; the values are what `AttnMaskSpec` takes."""

    FULL = "full"
    CAUSAL = "causal"
    BICAUSAL = "bi_causal"
    INVCAUSAL = "inv_causal"


class AttnOverlapMode(Enum):
    """Who chooses the number of stages: the caller or the planner."""

    STATIC = "static"
    DYNAMIC = "dynamic"


@dataclass(frozen=True, slots=True)
class AttnRange:
    """Tokens [start, end)."""

    start: int
    end: int

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.end:
            raise ValueError(f"range [{self.start}, {self.end}): it needs 0 <= start <= end")

    @property
    def seqlen(self) -> int:
        """Tokens of the range."""
        return self.end - self.start

    def to_naive_range(self) -> tuple[int, int]:
        """(start, end)."""
        return self.start, self.end


class AttnRanges:
    """A list of ranges."""

    def __init__(self, ranges: Iterable[AttnRange] = ()) -> None:
        self._ranges = list(ranges)

    @classmethod
    def from_ranges(cls, ranges: Iterable[Any], check: bool = False) -> AttnRanges:
        """From pairs (start, end) or `AttnRange`s; ranges are always checked."""
        return cls(AttnRange(*(r.to_naive_range() if isinstance(r, AttnRange) else map(int, r))) for r in ranges)

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens: Sequence[int], seq_len: int | None = None) -> AttnRanges:
        """From prefix sums, whose last must be seq_len where that is given."""
        sums = [int(n) for n in cu_seqlens]
        if not sums or sums[0] != 0 or (seq_len is not None and sums[-1] != seq_len):
            raise ValueError(f"cu_seqlens is {sums}: it must go from 0 to {seq_len if seq_len else 'the length'}")
        return cls.from_ranges(itertools.pairwise(sums))

    @property
    def size(self) -> int:
        """Number of ranges."""
        return len(self._ranges)

    @property
    def total_seqlen(self) -> int:
        """Tokens of all ranges, overlaps counted again."""
        return sum(r.seqlen for r in self._ranges)

    @property
    def end(self) -> int:
        """The largest end."""
        return max((r.end for r in self._ranges), default=0)

    def append(self, attn_range: AttnRange, check: bool = False) -> None:
        """Add a range."""
        self._ranges.append(attn_range)

    def to_naive_ranges(self) -> list[tuple[int, int]]:
        """[(start, end), ...]."""
        return [r.to_naive_range() for r in self._ranges]

    def __len__(self) -> int:
        return len(self._ranges)

    def __iter__(self) -> Iterator[AttnRange]:
        return iter(self._ranges)

    def __getitem__(self, index: Any) -> Any:
        return AttnRanges(self._ranges[index]) if isinstance(index, slice) else self._ranges[index]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AttnRanges) and self._ranges == other._ranges

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"AttnRanges({self.to_naive_ranges()})"


@dataclass(frozen=True)
class MinHeapDispatchAlg:
    """Balanced placement."""

    layout: str = field(default="balanced", init=False)


@dataclass(frozen=True)
class SequentialDispatchAlg:
    """Contiguous placement."""

    layout: str = field(default="contiguous", init=False)


@dataclass(frozen=True)
class UniformOverlapAlg:
    """Stages of equal size; the planner decides."""

    random_costs: bool = False
    random_seed: int = 42


@dataclass(frozen=True)
class DispatchConfig:
    """chunk_size: grain of placement, None for the default. alg: the placement."""

    chunk_size: int | None = None
    alg: Any = field(default_factory=MinHeapDispatchAlg)
    uneven_shard: bool = True


@dataclass(frozen=True)
class OverlapConfig:
    """degree: number of remote stages, where mode is STATIC and enable is True; else the planner's choice."""

    enable: bool = True
    mode: AttnOverlapMode = AttnOverlapMode.STATIC
    degree: int | None = None
    dynamic_max_degree: int | None = None
    min_chunk_size: int = 512
    max_num_chunks: int = 64
    alg: Any = field(default_factory=UniformOverlapAlg)

    @property
    def num_stages(self) -> int | None:
        """What `make_key` takes."""
        if not self.enable:
            return 1
        return self.degree if self.mode is AttnOverlapMode.STATIC and self.degree else None


@dataclass(frozen=True)
class DistAttnConfig:
    """Options of a key."""

    dispatch_config: DispatchConfig = field(default_factory=DispatchConfig)
    overlap_config: OverlapConfig = field(default_factory=OverlapConfig)


class AttnForwardMeta(NamedTuple):
    """lse: fp32 [T_local, num_heads_q]. max_logits: not computed here, always None."""

    lse: Tensor | None
    max_logits: Tensor | None = None


def magi_attn_flex_key(
    q_ranges: AttnRanges,
    k_ranges: AttnRanges,
    attn_mask_type: Any,
    total_seqlen_q: int,
    total_seqlen_k: int,
    num_heads_q: int,
    num_heads_kv: int,
    head_dim: int,
    pad_size: int = 0,
    cp_group_or_mesh: Any = None,
    dist_attn_config: DistAttnConfig | None = None,
    is_same_source: bool = True,
    is_q_permutable: bool = True,
    is_k_permutable: bool = True,
    chunk_size: int | None = None,
    head_dim_v: int | None = None,
) -> AttnKey:
    """A key for a mask made of rectangles.

    Args:
        q_ranges, k_ranges: of each rectangle (`AttnRanges`, or pairs).
        attn_mask_type: `AttnMaskType` or its value, one for all rectangles or a list.
        total_seqlen_q, total_seqlen_k: query and key tokens.
        num_heads_q, num_heads_kv, head_dim, head_dim_v: as in `make_key`.
        pad_size: not needed, nothing is padded.
        cp_group_or_mesh: ProcessGroup, DeviceMesh, or None for one rank.
        dist_attn_config: placement and stages.
        is_same_source: whether queries and keys are the same tokens; False is cross-attention.
        is_q_permutable, is_k_permutable: False keeps tokens in order (a contiguous placement).
        chunk_size: grain of placement; None takes the config's, or 512.

    Raises:
        ValueError: as `AttnMaskSpec` and `make_key`.
    """
    config = dist_attn_config or DistAttnConfig()
    spec = _flex_spec(q_ranges, k_ranges, attn_mask_type, total_seqlen_q, None if is_same_source else total_seqlen_k)
    if is_same_source and total_seqlen_q != total_seqlen_k:
        raise ValueError(
            f"total_seqlen_q is {total_seqlen_q} and total_seqlen_k is {total_seqlen_k}: with is_same_source "
            f"they are the same tokens"
        )
    contiguous = not (is_q_permutable and is_k_permutable)
    size = _group_size(cp_group_or_mesh)
    grain = chunk_size or config.dispatch_config.chunk_size or DEFAULT_CHUNK_SIZE
    key = make_key(
        spec,
        num_heads_q=num_heads_q,
        num_heads_kv=num_heads_kv,
        head_dim=head_dim,
        head_dim_v=head_dim_v,
        cp_group=cp_group_or_mesh,
        chunk_size=max(1, min(grain, total_seqlen_q // (8 * size))),
        layout="contiguous" if contiguous else getattr(config.dispatch_config.alg, "layout", "balanced"),
        num_stages=config.overlap_config.num_stages,
    )
    _note_recent(key, cp_group_or_mesh)
    return key


def magi_attn_varlen_key(
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    num_heads_q: int,
    num_heads_kv: int,
    head_dim: int,
    pad_size: int = 0,
    cp_group_or_mesh: Any = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    dist_attn_config: DistAttnConfig | None = None,
    chunk_size: int | None = None,
    head_dim_v: int | None = None,
) -> AttnKey:
    """A key for packed documents given by prefix sums; other arguments as for `magi_attn_flex_key`.

    Args:
        cu_seqlens_q, cu_seqlens_k: int [documents + 1]; read now.
        causal: each token sees its document up to itself.
        window_size: (left, right) keys beside the query's own, -1 for all; not together with causal.
    """
    q_ranges, k_ranges, kinds, total_q, total_k = infer_attn_mask_from_cu_seqlens(
        cu_seqlens_q, cu_seqlens_k, causal, window_size
    )
    return magi_attn_flex_key(
        q_ranges,
        k_ranges,
        kinds,
        total_q,
        total_k,
        num_heads_q,
        num_heads_kv,
        head_dim,
        pad_size,
        cp_group_or_mesh,
        dist_attn_config,
        is_same_source=total_q == total_k,
        chunk_size=chunk_size,
        head_dim_v=head_dim_v,
    )


def magi_attn_flex_dispatch(x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, AttnKey]:
    """(dispatch(x, key), key) with the key of `magi_attn_flex_key(*args, **kwargs)`."""
    key = magi_attn_flex_key(*args, **kwargs)
    return dispatch(x, key), key


def magi_attn_varlen_dispatch(x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, AttnKey]:
    """(dispatch(x, key), key) with the key of `magi_attn_varlen_key(*args, **kwargs)`."""
    key = magi_attn_varlen_key(*args, **kwargs)
    return dispatch(x, key), key


def make_flex_key_for_new_mask_after_dispatch(
    q_ranges: AttnRanges,
    k_ranges: AttnRanges,
    attn_mask_type: Any,
    key_for_dispatch: AttnKey,
    num_heads_q: int | None = None,
    num_heads_kv: int | None = None,
    head_dim: int | None = None,
    dist_attn_config: DistAttnConfig | None = None,
) -> AttnKey:
    """A key for another mask over the rows that `key_for_dispatch` gives each rank."""
    old = key_for_dispatch.spec
    spec = _flex_spec(q_ranges, k_ranges, attn_mask_type, old.total_seqlen, old.total_seqlen_k)
    key = key_for_dispatch.with_mask(spec).with_heads(
        num_heads_q or key_for_dispatch.num_heads_q,
        num_heads_kv or key_for_dispatch.num_heads_kv,
        head_dim or key_for_dispatch.head_dim,
        key_for_dispatch.head_dim_v if head_dim is None else None,
    )
    _note_recent(key, key.cp_group)
    return key


def make_varlen_key_for_new_mask_after_dispatch(
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    key_for_dispatch: AttnKey,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    dist_attn_config: DistAttnConfig | None = None,
) -> AttnKey:
    """A key for packed documents over the rows that `key_for_dispatch` gives each rank.

    Raises:
        ValueError: the prefix sums end elsewhere than the key's sequences do.
    """
    q_ranges, k_ranges, kinds, *totals = infer_attn_mask_from_cu_seqlens(
        cu_seqlens_q, cu_seqlens_k, causal, window_size
    )
    spec = key_for_dispatch.spec
    for name, total, expected in zip(("q", "k"), totals, (spec.total_seqlen, spec.seqlen_k), strict=True):
        if total != expected:
            raise ValueError(
                f"cu_seqlens_{name} ends at {total} and the key was dispatched over {expected} tokens: a new mask is "
                f"one over the same sequence; repeat the end for tokens that see nothing"
            )
    return make_flex_key_for_new_mask_after_dispatch(q_ranges, k_ranges, kinds, key_for_dispatch)


def dispatch(x: Tensor, key: AttnKey, pad_value: float = 0.0) -> Tensor:
    """This rank's rows of a tensor [T, ...] that all ranks hold; nothing is padded."""
    return _layout.dispatch(x, key)


def undispatch(x: Tensor, key: AttnKey, is_partial_grad: bool = False) -> Tensor:
    """The whole tensor from every rank's rows.

    Args:
        is_partial_grad: ranks have different losses, so a row's gradients are summed over the ranks.
            False: all ranks compute the same loss, and each keeps the gradient of its rows.
    """
    return _layout.undispatch(x, key) if is_partial_grad else _GatherAlike.apply(x, key)  # type: ignore[no-any-return]


class _GatherAlike(torch.autograd.Function):
    """`undispatch` for a loss that is the same on all ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, key: AttnKey) -> Tensor:
        ctx.key = key
        return _layout.undispatch(x, key)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _layout.dispatch(grad, ctx.key), None


def roll(x: Tensor, shift: int, dim: int, key: AttnKey) -> Tensor:
    """Rows moved by `shift` tokens around the whole sequence, as `torch.roll` of the whole tensor.

    Documents are not regarded: `cpattn.roll` moves within them, and is what labels want.
    """
    total = key.spec.total_seqlen
    stream = _stream_key(key)
    shift %= max(total, 1)
    moved = _layout.roll(x, stream, shift, dim, fill_value=0)
    return moved + _layout.roll(x, stream, shift - total, dim, fill_value=0) if shift else moved


def calc_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key: AttnKey,
    sink: Tensor | None = None,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    return_max_logits: bool = False,
) -> tuple[Tensor, AttnForwardMeta]:
    """(out, meta) of attention of this rank's rows [T_local, heads, dim] over the whole sequence.

    Args:
        sink: [num_heads_q] or [sinks, num_heads_q], logits without a value.
        softcap: 0 is none.

    Raises:
        NotImplementedError: return_max_logits.
        ValueError: as `cpattn.attention`.
    """
    if return_max_logits:
        raise NotImplementedError("return_max_logits: the largest logit of each head is not computed")
    if sink is not None and sink.ndim == 2:
        sink = torch.logsumexp(sink, dim=0)  # several sinks of a head act as one
    out, lse = attention(
        q, k, v, key, softmax_scale=softmax_scale, softcap=softcap or None, sink=sink, return_lse=True
    )
    _note_recent(key, key.cp_group)
    return out, AttnForwardMeta(lse)


def get_position_ids(key: AttnKey) -> Tensor:
    """Index in the whole sequence of each of this rank's rows, int64 [T_local], on the GPU where there is one.

    `cpattn.position_ids` gives positions within the documents.
    """
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None
    return _layout.position_ids(key, stream=True, device=device)


def get_most_recent_key(cp_group: Any) -> AttnKey:
    """The key of this group that was made or used last. Passing keys as arguments is safer.

    Raises:
        ValueError: there is none.
    """
    entry = _recent.get(_recent_name(cp_group))
    if entry is None:
        raise ValueError(f"no key has been made for the group {cp_group!r}")
    return entry[1]


def clear_cache(cp_group: Any = None) -> None:
    """Forget the most recent keys (of one group), and all cached plans."""
    if cp_group is None:
        _recent.clear()
    else:
        _recent.pop(_recent_name(cp_group), None)
    clear_key_cache()


def compute_pad_size(total_seqlen_q: int, cp_size: int, chunk_size: int) -> int:
    """Tokens that would make the length a multiple of cp_size * chunk_size."""
    return -total_seqlen_q % (cp_size * chunk_size)


def infer_attn_mask_from_cu_seqlens(
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
) -> tuple[AttnRanges, AttnRanges, list[AttnMaskType], int, int]:
    """(q_ranges, k_ranges, mask types, total_seqlen_q, total_seqlen_k) of packed documents.

    Args:
        window_size: (left, right) keys beside the query's own, -1 for all; documents are then the same
            for queries and keys. Not together with causal: a causal window is (left, 0).

    Raises:
        ValueError: a window together with causal, or documents that differ under a window.
    """
    q_sums, k_sums = ([int(n) for n in c] for c in (cu_seqlens_q, cu_seqlens_k))
    if tuple(window_size) == (-1, -1):
        q_ranges, k_ranges = AttnRanges.from_cu_seqlens(q_sums), AttnRanges.from_cu_seqlens(k_sums)
        if len(q_ranges) != len(k_ranges):
            raise ValueError(f"{len(q_ranges)} documents of queries and {len(k_ranges)} of keys: they must pair up")
        kind = AttnMaskType.CAUSAL if causal else AttnMaskType.FULL
        return q_ranges, k_ranges, [kind] * len(q_ranges), q_sums[-1], k_sums[-1]
    if causal:
        raise ValueError(f"window_size is {window_size} and causal is True: a causal window is causal=False, (left, 0)")
    if q_sums != k_sums:
        raise ValueError("window_size with different documents of queries and keys is not defined")
    lengths = [b - a for a, b in itertools.pairwise(q_sums)]
    left, right = (max(lengths, default=0) if side < 0 else side for side in window_size)
    spec = AttnMaskSpec.sliding_window(lengths, (left, right))
    return (
        AttnRanges.from_ranges(spec.q_ranges),
        AttnRanges.from_ranges(spec.k_ranges),
        [AttnMaskType(kind) for kind in spec.mask_types],
        spec.total_seqlen,
        spec.total_seqlen,
    )


def infer_attn_mask_from_sliding_window(
    q_range: AttnRange, k_range: AttnRange, window_size: Sequence[int]
) -> tuple[AttnRanges, AttnRanges, list[AttnMaskType]]:
    """Rectangles of a (left, right) window over one document; q_range and k_range must be the same."""
    if q_range != k_range:
        raise ValueError(f"q_range {q_range} and k_range {k_range}: a window is over one document's own keys")
    length, start = q_range.seqlen, q_range.start
    left, right = (length if side < 0 else side for side in window_size)
    spec = AttnMaskSpec.sliding_window([length], (left, right))
    q_ranges, k_ranges = (
        AttnRanges.from_ranges([(a + start, b + start) for a, b in ranges]) for ranges in (spec.q_ranges, spec.k_ranges)
    )
    return q_ranges, k_ranges, [AttnMaskType(kind) for kind in spec.mask_types]


def squash_batch_dim(x: Tensor) -> Tensor:
    """[B, S, ...] as [B * S, ...]."""
    return x.flatten(0, 1)


def full_attention_to_varlen_attention(batch_size: int, seq_len: int) -> tuple[Tensor, Tensor]:
    """(cu_seqlens_q, cu_seqlens_k) of a batch of equal rows laid out one after the other."""
    sums = torch.arange(0, batch_size + 1) * seq_len
    return sums, sums


# The group is kept with its key, so that its id cannot come to mean another group.
_recent: dict[int, tuple[Any, AttnKey]] = {}


def _note_recent(key: AttnKey, group: Any) -> None:
    for name in {_recent_name(group), _recent_name(key.cp_group)}:
        _recent[name] = (group, key)


def _recent_name(group: Any) -> int:
    if hasattr(group, "mesh_dim_names"):
        group = (group["cp"] if group.ndim > 1 else group).get_group()
    return 0 if group is None else id(group)


def _group_size(group: Any) -> int:
    if group is None:
        return 1
    if hasattr(group, "mesh_dim_names"):
        return int((group["cp"] if group.ndim > 1 else group).size())
    return dist.get_world_size(group)


def _flex_spec(q_ranges: Any, k_ranges: Any, kinds: Any, total_q: int, total_k: int | None) -> AttnMaskSpec:
    rows, keys = ([list(r) for r in AttnRanges.from_ranges(x).to_naive_ranges()] for x in (q_ranges, k_ranges))
    if isinstance(kinds, (str, AttnMaskType)):
        kinds = [kinds] * len(rows)
    names = [kind.value if isinstance(kind, AttnMaskType) else str(kind) for kind in kinds]
    return AttnMaskSpec(rows, keys, names, total_q, total_k, [Document(0, total_q)])


def _stream_key(key: AttnKey) -> AttnKey:
    """The key with the whole sequence as one document."""
    if "stream_key" not in key.cached_tensors:
        old = key.spec
        spec = AttnMaskSpec([], [], [], old.total_seqlen, old.total_seqlen_k, [Document(0, old.total_seqlen)])
        planned = key.planned._replace(spec=spec, layer_plans=(), degree_seconds=())
        key.cached_tensors["stream_key"] = AttnKey(planned, key.rank_plan, key.ranks)
    return key.cached_tensors["stream_key"]  # type: ignore[no-any-return]
