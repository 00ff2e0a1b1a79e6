"""The calls that code written for `magi_attention.api` makes, on this runtime.

    from cpattn.magi_api import calc_attn, dispatch, magi_attn_flex_key, undispatch

Names, argument order and defaults are those of MagiAttention's main branch of November 2026 (what older versions have
by other names is kept); a key is a `cpattn.AttnKey`. What
differs: nothing is ever padded (`pad_size` is taken and not needed: ranks may hold different numbers of
tokens), overlapping rectangles mean their union, any head dim and dtype and the CPU are served, several
masks of one group do not disturb each other, and changing a cu_seqlens tensor in place changes nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

import cpattn.ops.layout as _layout
from cpattn.keys.cache import clear_key_cache
from cpattn.keys.key import AttnKey
from cpattn.keys.make import make_key
from cpattn.masks.spec import AttnMaskSpec, Document
from cpattn.ops.attention import attention
from cpattn.solver import UNBOUNDED, SliceTable
from cpattn.solver.rounds import CAUSAL_PIECE, FULL_PIECE, INV_PIECE, corner_pieces

__all__ = [
    "AttnForwardMeta",
    "AttnMaskType",
    "AttnOverlapMode",
    "AttnRange",
    "AttnRanges",
    "BSDispatchAlg",
    "DPDispatchAlg",
    "DispatchAlg",
    "DispatchConfig",
    "DistAttnConfig",
    "DistAttnRuntimeDictManager",
    "DistAttnRuntimeKey",
    "GeneralAttnMaskType",
    "GreedyOverlapAlg",
    "GrpCollConfig",
    "LBDispatchAlg",
    "MinHeapDispatchAlg",
    "OverlapAlg",
    "OverlapConfig",
    "SequentialDispatchAlg",
    "SortedSequentialSelectAlg",
    "ToppHeapDispatchAlg",
    "UniformOverlapAlg",
    "apply_padding",
    "calc_attn",
    "clear_cache",
    "compute_pad_size",
    "dispatch",
    "dist_attn_runtime_dict_mgr",
    "flex_flash_attn_func",
    "full_attention_to_varlen_attention",
    "get_most_recent_key",
    "get_position_ids",
    "infer_attn_mask_from_cu_seqlens",
    "infer_attn_mask_from_sliding_window",
    "infer_varlen_mask_from_batch",
    "magi_attn_flex_dispatch",
    "magi_attn_flex_key",
    "magi_attn_varlen_dispatch",
    "magi_attn_varlen_key",
    "make_flex_key_for_new_mask_after_dispatch",
    "make_varlen_key_for_new_mask_after_dispatch",
    "pad_at_dim",
    "roll",
    "roll_simple",
    "squash_batch_dim",
    "undispatch",
    "unpad_at_dim",
]

DEFAULT_CHUNK_SIZE = 512


class AttnMaskType(Enum):
    """Mask type of a rectangle; the values are what `AttnMaskSpec` takes."""

    FULL = "full"
    CAUSAL = "causal"
    BICAUSAL = "bi_causal"
    INVCAUSAL = "inv_causal"

    @classmethod
    def from_int_type(cls, int_type: int) -> AttnMaskType:
        """0 full, 1 causal, 2 inverse causal, 3 both. Raises ValueError for another number."""
        if int_type not in range(len(_BY_NUMBER)):
            raise ValueError(f"mask type {int_type}: 0 is full, 1 causal, 2 inverse causal, 3 bi-causal")
        return cls(_BY_NUMBER[int_type])

    def to_int_type(self) -> int:
        """The inverse of `from_int_type`."""
        return _BY_NUMBER.index(self.value)


_BY_NUMBER = ("full", "causal", "inv_causal", "bi_causal")
GeneralAttnMaskType: TypeAlias = "str | AttnMaskType | Sequence[str | AttnMaskType]"
DistAttnRuntimeKey = AttnKey


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

    @classmethod
    def from_range(cls, attn_range: Any, check: bool = False) -> AttnRange:
        """From a pair (start, end) or an `AttnRange`; always checked."""
        start, end = attn_range.to_naive_range() if isinstance(attn_range, AttnRange) else attn_range
        return cls(int(start), int(end))

    def to_naive_range(self) -> tuple[int, int]:
        """(start, end)."""
        return self.start, self.end

    def clone(self) -> AttnRange:
        """The same range."""
        return AttnRange(self.start, self.end)

    def offset(self, offset: int) -> AttnRange:
        """The range moved by so many tokens."""
        return AttnRange(self.start + offset, self.end + offset)

    def truncate(self, start: int | None = None, end: int | None = None) -> AttnRange:
        """What of it lies in [start, end); empty where nothing does."""
        low = self.start if start is None else max(self.start, start)
        high = self.end if end is None else min(self.end, end)
        return AttnRange(low, max(low, high))

    def intersect(self, other: AttnRange) -> AttnRange:
        """The tokens of both."""
        return self.truncate(other.start, other.end)

    def intersect_size(self, other: AttnRange) -> int:
        """How many tokens are in both."""
        return self.intersect(other).seqlen

    def union(self, other: AttnRange) -> list[AttnRange]:
        """The tokens of either, as one range or, where they lie apart, as two in order."""
        return list(AttnRanges([r for r in (self, other) if r.seqlen]).merge())

    def union_size(self, other: AttnRange) -> int:
        """How many tokens are in either."""
        return sum(r.seqlen for r in self.union(other))

    def diff_by(self, other: AttnRange) -> list[AttnRange]:
        """The tokens of the other that are not in this one."""
        return list(AttnRanges([other]).find_hole_ranges(AttnRanges([self])))

    def is_subrange_of(self, other: AttnRange) -> bool:
        """Whether the other has all of its tokens."""
        return other.start <= self.start and self.end <= other.end

    def is_overlap_with(self, other: AttnRange) -> bool:
        """Whether a token is in both."""
        return self.intersect_size(other) > 0

    def is_empty(self) -> bool:
        """Whether it has no token."""
        return self.seqlen == 0

    def __len__(self) -> int:
        return self.seqlen


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

    @property
    def start(self) -> int:
        """The smallest start. Raises ValueError where there is no range."""
        if not self._ranges:
            raise ValueError("there is no range, so there is no start")
        return min(r.start for r in self._ranges)

    @property
    def max_seqlen(self) -> int:
        """Tokens of the longest range."""
        return max((r.seqlen for r in self._ranges), default=0)

    @property
    def points(self) -> list[int]:
        """Starts and ends, each once, in order."""
        return sorted({point for r in self._ranges for point in r.to_naive_range()})

    def is_empty(self) -> bool:
        """Whether there is no range."""
        return not self._ranges

    def is_valid(self) -> bool:
        """True: a range that is none cannot be made."""
        return True

    def check_valid(self) -> None:
        """Nothing to do: see `is_valid`."""

    def insert(self, idx: int, attn_range: AttnRange, check: bool = False) -> None:
        """Put a range at a place."""
        self._ranges.insert(idx, attn_range)

    def extend(self, attn_ranges: Iterable[AttnRange], check: bool = False) -> None:
        """Add ranges."""
        self._ranges.extend(attn_ranges)

    def pop(self, idx: int = -1) -> AttnRange:
        """Take a range out. Raises IndexError where there is none."""
        return self._ranges.pop(idx)

    def clear_empty(self) -> AttnRanges:
        """Those that have a token."""
        return AttnRanges(r for r in self._ranges if r.seqlen)

    def clone(self) -> AttnRanges:
        """Another list of the same ranges."""
        return AttnRanges(self._ranges)

    def sort(self) -> AttnRanges:
        """By start; equal starts keep their order."""
        return AttnRanges(sorted(self._ranges, key=lambda r: r.start))

    def merge(self) -> AttnRanges:
        """The same tokens as ranges that neither overlap nor touch, in order."""
        return self.merge_with_split_alignment(1)

    def merge_with_split_alignment(self, split_alignment: int = 1) -> AttnRanges:
        """As `merge`, of the ranges widened to multiples of split_alignment."""
        merged: list[AttnRange] = []
        for r in self.sort():
            start = r.start // split_alignment * split_alignment
            end = -(-r.end // split_alignment) * split_alignment
            if merged and start <= merged[-1].end:
                merged[-1] = AttnRange(merged[-1].start, max(merged[-1].end, end))
            else:
                merged.append(AttnRange(start, end))
        return AttnRanges(merged)

    def chunk(self, chunk_size: int, check: bool = True) -> list[AttnRanges]:
        """The ranges cut, in their order, into lists of chunk_size tokens; the last may have fewer.

        Raises:
            ValueError: ranges overlap, or chunk_size is below 1.
        """
        if chunk_size < 1 or (check and not self.is_non_overlap()):
            raise ValueError(f"chunk of {chunk_size} tokens: at least 1, and ranges must not overlap: {self}")
        chunks: list[AttnRanges] = []
        room = 0
        for start, end in self.to_naive_ranges():
            while start < end:
                if not room:
                    chunks.append(AttnRanges())
                    room = chunk_size
                taken = min(room, end - start)
                chunks[-1].append(AttnRange(start, start + taken))
                start, room = start + taken, room - taken
        return chunks

    def truncate(self, start: int | None = None, end: int | None = None) -> AttnRanges:
        """What of each lies in [start, end); without those that have nothing there."""
        return AttnRanges(r.truncate(start, end) for r in self._ranges).clear_empty()

    def is_sorted(self) -> bool:
        """Whether starts never fall."""
        return all(a.start <= b.start for a, b in itertools.pairwise(self._ranges))

    def is_merged(self) -> bool:
        """Whether they are in order and neither overlap nor touch."""
        return all(a.end < b.start for a, b in itertools.pairwise(self._ranges))

    def is_non_overlap(self) -> bool:
        """Whether no token is in two of them."""
        return self.total_seqlen == self.merge().total_seqlen

    def is_cu_seqlens(self, seqlen: int) -> bool:
        """Whether they follow one another from 0 to seqlen."""
        bounds = [0, *(r.end for r in self._ranges)]
        return [r.start for r in self._ranges] == bounds[:-1] and bounds[-1] == seqlen

    def to_cu_seqlens(self, seq_len: int) -> list[int]:
        """Prefix sums. Raises ValueError where `is_cu_seqlens` is False."""
        if not self.is_cu_seqlens(seq_len):
            raise ValueError(f"{self} does not go from 0 to {seq_len} without gaps: no prefix sums")
        return [0, *(r.end for r in self._ranges)]

    def make_ranges_local(self, other_attn_ranges: AttnRanges, is_self_merged: bool = False) -> AttnRanges:
        """Where the other's ranges lie among this list's tokens, merged and laid end to end.

        Raises:
            ValueError: a range has tokens that are not in one of the merged ranges.
        """
        own = list(self.merge())
        begins = list(itertools.accumulate((r.seqlen for r in own), initial=0))
        local = AttnRanges()
        for r in other_attn_ranges:
            at = next((n for n, whole in enumerate(own) if r.is_subrange_of(whole)), None)
            if at is None:
                raise ValueError(f"range [{r.start}, {r.end}) is not within one of {AttnRanges(own)}")
            local.append(r.offset(begins[at] - own[at].start))
        return local

    def find_hole_ranges(
        self, other_attn_ranges: AttnRanges, is_self_merged: bool = False, is_other_merged: bool = False
    ) -> AttnRanges:
        """This list's tokens that the other has not, merged."""
        holes = AttnRanges()
        taken = other_attn_ranges.merge()
        for r in self.merge():
            at = r.start
            for hole in taken.truncate(r.start, r.end):
                holes.extend(AttnRanges([AttnRange(at, hole.start)]).clear_empty())
                at = hole.end
            holes.extend(AttnRanges([AttnRange(at, r.end)]).clear_empty())
        return holes

    def find_overlap_ranges(
        self, other_attn_ranges: AttnRanges, is_self_merged: bool = False, is_other_merged: bool = False
    ) -> AttnRanges:
        """The tokens of both, merged."""
        own, theirs = self.merge(), other_attn_ranges.merge()
        return AttnRanges(part for r in own for part in theirs.truncate(r.start, r.end)).merge()

    def intersect_size(self) -> int:
        """Tokens that are in several ranges, once for each range after the first."""
        return self.total_seqlen - self.merge().total_seqlen

    def intersect_size_with(self, other: AttnRanges) -> int:
        """Tokens that are in both lists, counted as `intersect_size` does over the two together."""
        both = self.find_overlap_ranges(other)
        parts = AttnRanges(p for r in [*self, *other] for p in both.truncate(r.start, r.end))
        return parts.intersect_size()

    def union_size(self) -> int:
        """`total_seqlen`."""
        return self.total_seqlen

    def union_size_with(self, other: AttnRanges) -> int:
        """Tokens of both lists, overlaps counted again."""
        return self.total_seqlen + other.total_seqlen

    def to_tensor(self, device: Any = "cpu") -> Tensor:
        """int32 [ranges, 2]."""
        return torch.tensor(self.to_naive_ranges(), dtype=torch.int32, device=device).reshape(-1, 2)

    def __setitem__(self, index: Any, value: Any) -> None:
        self._ranges[index] = list(value) if isinstance(index, slice) else value

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
class DispatchAlg:
    """How tokens are placed: here balanced by the planner, or in order."""

    layout: str = field(default="balanced", init=False)


@dataclass(frozen=True)
class MinHeapDispatchAlg(DispatchAlg):
    """Balanced placement."""


@dataclass(frozen=True)
class LBDispatchAlg(DispatchAlg):
    """Balanced placement."""


@dataclass(frozen=True)
class DPDispatchAlg(DispatchAlg):
    """Balanced placement."""


@dataclass(frozen=True)
class BSDispatchAlg(DispatchAlg):
    """Balanced placement."""


@dataclass(frozen=True)
class ToppHeapDispatchAlg(DispatchAlg):
    """Balanced placement; top_p has no effect."""

    top_p: float = 0.0


@dataclass(frozen=True)
class SequentialDispatchAlg(DispatchAlg):
    """Contiguous placement."""

    layout: str = field(default="contiguous", init=False)


@dataclass(frozen=True)
class SortedSequentialSelectAlg(DispatchAlg):
    """Balanced placement."""


@dataclass(frozen=True)
class OverlapAlg:
    """How remote keys are cut into stages: the planner decides."""


@dataclass(frozen=True)
class UniformOverlapAlg(OverlapAlg):
    """Stages of equal size; the planner decides."""

    random_costs: bool = False
    random_seed: int | None = None


@dataclass(frozen=True)
class GreedyOverlapAlg(OverlapAlg):
    """The planner decides."""


@dataclass(frozen=True)
class GrpCollConfig:
    """Buffers and SMs of MagiAttention's own collectives; without effect here."""

    num_sms: int = 24
    nvl_chunk_size: int = 8
    nvl_buffer_size: int = 256
    rdma_chunk_size: int = 16
    rdma_buffer_size: int = 128
    num_nvl_bytes: int = int(2e9)
    num_rdma_bytes: int = 0


@dataclass(frozen=True)
class DispatchConfig:
    """chunk_size: grain of placement, None for the default. alg: the placement."""

    chunk_size: int | None = None
    alg: Any = field(default_factory=MinHeapDispatchAlg)
    uneven_shard: bool = True


@dataclass(frozen=True)
class OverlapConfig:
    """degree: number of remote stages where mode is STATIC and enable is True, 0 for one; None: the planner's choice.

    The cost factors have no effect: `cpattn calibrate` measures.
    """

    enable: bool = True
    mode: AttnOverlapMode = AttnOverlapMode.STATIC
    degree: int | None = None
    dynamic_max_degree: int | None = None
    min_chunk_size: int = 512
    max_num_chunks: int = 64
    alg: Any = field(default_factory=UniformOverlapAlg)
    calc_cost_factor: float = 1.0
    comm_cost_factor: float = 1.0

    @property
    def num_stages(self) -> int | None:
        """What `make_key` takes."""
        if not self.enable or self.degree == 0:
            return 1
        return self.degree if self.mode is AttnOverlapMode.STATIC and self.degree else None


@dataclass(frozen=True)
class DistAttnConfig:
    """Options of a key."""

    dispatch_config: DispatchConfig = field(default_factory=DispatchConfig)
    overlap_config: OverlapConfig = field(default_factory=OverlapConfig)
    grpcoll_config: GrpCollConfig = field(default_factory=GrpCollConfig)


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


def roll_simple(x: Tensor, shift: int, dim: int, key: AttnKey) -> Tensor:
    """`roll`, which there is in one form only."""
    return roll(x, shift, dim, key)


def flex_flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_ranges: Any = None,
    k_ranges: Any = None,
    attn_type_map: Any = None,
    *,
    sink: Tensor | None = None,
    sink_layout: str = "sh",
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    return_max_logits: bool = False,
    **kernel_options: Any,
) -> tuple[Tensor, AttnForwardMeta]:
    """(out, meta) of attention over tensors that one rank has whole: no group, nothing dispatched.

    Args:
        q: [T_q, num_heads_q, dim]. k, v: [T_k, num_heads_kv, dim].
        q_ranges, k_ranges: int [rectangles, 2] (or pairs).
        attn_type_map: int [rectangles], as `AttnMaskType.from_int_type`; None: all full.
        sink: [sinks, num_heads_q] ("sh") or [num_heads_q].
        kernel_options: of FFA's kernels (deterministic, sm_margin, max_seqlen_q, ...): without effect.

    Raises:
        ValueError: tokens are chosen by index_attn_indices, another sink layout, or ranges are missing.
        NotImplementedError: return_max_logits.
    """
    if kernel_options.get("index_attn_indices") is not None or q_ranges is None or k_ranges is None:
        raise ValueError("the mask is said by q_ranges and k_ranges (attention by index_attn_indices is not served)")
    if sink is not None and sink_layout != "sh":
        raise ValueError(f"sink_layout is {sink_layout!r}: 'sh', logits of each head, is served")
    rows, keys = ([tuple(map(int, r)) for r in ranges] for ranges in (q_ranges, k_ranges))
    numbers = [0] * len(rows) if attn_type_map is None else [int(n) for n in attn_type_map]
    kinds = [AttnMaskType.from_int_type(n) for n in numbers]
    spec = _flex_spec(rows, keys, kinds, len(q), None if len(q) == len(k) else len(k))
    (num_q, head_dim), (num_kv, head_dim_v) = q.shape[1:], v.shape[1:]
    key = make_key(spec, num_heads_q=num_q, num_heads_kv=num_kv, head_dim=head_dim, head_dim_v=head_dim_v)
    return calc_attn(q, k, v, key, sink, softmax_scale, softcap, return_max_logits)


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
    global_window_size: int = 0,
) -> tuple[AttnRanges, AttnRanges, list[AttnMaskType], int, int]:
    """(q_ranges, k_ranges, mask types, total_seqlen_q, total_seqlen_k) of packed documents.

    Args:
        window_size: (left, right) keys beside the query's own, -1 for all, as `infer_attn_mask_from_sliding_window`
            has them for each document. Not together with causal: a causal window is (left, 0).
        global_window_size: so many first keys of each document are seen by all of its queries, as far as the window's
            right side lets them; only with a window.

    Raises:
        ValueError: a window together with causal, a negative number, or documents that do not pair up.
    """
    if global_window_size < 0:
        raise ValueError(f"global_window_size is {global_window_size}: a number of keys, 0 or more")
    q_sums, k_sums = ([int(n) for n in c] for c in (cu_seqlens_q, cu_seqlens_k))
    if tuple(window_size) == (-1, -1):
        q_ranges, k_ranges = AttnRanges.from_cu_seqlens(q_sums), AttnRanges.from_cu_seqlens(k_sums)
        if len(q_ranges) != len(k_ranges):
            raise ValueError(f"{len(q_ranges)} documents of queries and {len(k_ranges)} of keys: they must pair up")
        kind = AttnMaskType.CAUSAL if causal else AttnMaskType.FULL
        return q_ranges, k_ranges, [kind] * len(q_ranges), q_sums[-1], k_sums[-1]
    if causal:
        raise ValueError(f"window_size is {window_size} and causal is True: a causal window is causal=False, (left, 0)")
    if len(q_sums) != len(k_sums):
        raise ValueError(f"{len(q_sums) - 1} documents of queries and {len(k_sums) - 1} of keys: they must pair up")
    rects: tuple[AttnRanges, AttnRanges, list[AttnMaskType]] = AttnRanges(), AttnRanges(), []
    for (q0, q1), (k0, k1) in zip(itertools.pairwise(q_sums), itertools.pairwise(k_sums), strict=True):
        first = min(k0 + global_window_size, k1)
        left, right = (None if side < 0 or side >= k1 - k0 - 1 else side for side in window_size)
        ahead = None if right is None else right + k0 - q0
        aligned, shift = max(q0, q1 - (k1 - k0)), k1 - q1
        band = (None if left is None else shift - left, None if right is None else shift + right)
        _add_band(rects, (q0, q1), (k0, first), None, ahead)
        _add_band(rects, (aligned, q1), (first, k1), *band)
    return *rects, q_sums[-1], k_sums[-1]


def infer_attn_mask_from_sliding_window(
    q_range: AttnRange, k_range: AttnRange, window_size: Sequence[int]
) -> tuple[AttnRanges, AttnRanges, list[AttnMaskType]]:
    """Rectangles of a window over a document's queries and keys, the last query standing at the last key.

    Args:
        window_size: (left, right) keys before and after the one where a query stands; -1 for all. Queries before the
            first key see nothing.
    """
    sums = [[r.start, r.end] for r in (q_range, k_range)]
    q_ranges, k_ranges, kinds = AttnRanges(), AttnRanges(), list[AttnMaskType]()
    (q0, q1), (k0, k1) = sums
    left, right = (None if side < 0 or side >= k1 - k0 - 1 else side for side in window_size)
    shift = k1 - q1
    band = (None if left is None else shift - left, None if right is None else shift + right)
    _add_band((q_ranges, k_ranges, kinds), (max(q0, q1 - (k1 - k0)), q1), (k0, k1), *band)
    return q_ranges, k_ranges, kinds


def _add_band(
    rects: tuple[AttnRanges, AttnRanges, list[AttnMaskType]],
    q: tuple[int, int],
    k: tuple[int, int],
    low: int | None,
    high: int | None,
) -> None:
    """Add the rectangles of the queries q and keys k with low <= key - query <= high."""
    if q[0] >= q[1] or k[0] >= k[1]:
        return
    low, high = (-UNBOUNDED if low is None else low), (UNBOUNDED if high is None else high)
    pieces, kinds = corner_pieces(SliceTable.from_columns(*q, *k, low, high).canonical()[0])
    names = {FULL_PIECE: AttnMaskType.FULL, CAUSAL_PIECE: AttnMaskType.CAUSAL, INV_PIECE: AttnMaskType.INVCAUSAL}
    for kind, (q0, q1, k0, k1, _, _) in zip(kinds.tolist(), pieces.data.tolist(), strict=True):
        rects[0].append(AttnRange(q0, q1))
        rects[1].append(AttnRange(k0, k1))
        rects[2].append(names.get(kind, AttnMaskType.BICAUSAL))


def apply_padding(
    q_ranges: AttnRanges, k_ranges: AttnRanges, attn_mask_type: list[AttnMaskType], total_seqlen: int, pad_size: int
) -> tuple[AttnRanges, AttnRanges, list[AttnMaskType]]:
    """The rectangles with one more for pad_size queries behind the sequence, which see nothing."""
    return (
        AttnRanges([*q_ranges, AttnRange(total_seqlen, total_seqlen + pad_size)]),
        AttnRanges([*k_ranges, AttnRange(0, 0)]),
        [*attn_mask_type, AttnMaskType.FULL],
    )


def pad_at_dim(x: Tensor, dim: int, pad_size: int, value: float = 0.0, side: str = "right") -> Tensor:
    """x with pad_size more entries along a dimension, on its "right" or "left"."""
    if side not in ("left", "right"):
        raise ValueError(f"side is {side!r}: 'left' or 'right'")
    shape = list(x.shape)
    shape[dim] = pad_size
    padding = x.new_full(shape, value)
    return torch.cat([padding, x] if side == "left" else [x, padding], dim)


def unpad_at_dim(x: Tensor, dim: int, pad_size: int) -> Tensor:
    """x without its last pad_size entries along a dimension."""
    return x.narrow(dim, 0, x.shape[dim] - pad_size)


def squash_batch_dim(x: Tensor) -> Tensor:
    """[B, S, ...] as [B * S, ...]."""
    return x.flatten(0, 1)


def infer_varlen_mask_from_batch(batch_size: int, seq_len: int, device: Any = None) -> tuple[Tensor, Tensor]:
    """(cu_seqlens_q, cu_seqlens_k), int32, of a batch of equal rows laid out one after the other."""
    sums = torch.arange(0, batch_size + 1, dtype=torch.int32, device=device) * seq_len
    return sums, sums


def full_attention_to_varlen_attention(batch_size: int, seq_len: int) -> tuple[Tensor, Tensor]:
    """(cu_seqlens_q, cu_seqlens_k) of a batch of equal rows laid out one after the other."""
    sums = torch.arange(0, batch_size + 1) * seq_len
    return sums, sums


class DistAttnRuntimeDictManager:
    """MagiAttention's table of runtimes by key. Here a key is its own runtime: nothing is looked up or evicted."""

    def get(self, key: AttnKey) -> AttnKey:
        """The key."""
        return key

    def __contains__(self, key: object) -> bool:
        return isinstance(key, AttnKey)

    def get_most_recent_key(self, cp_group: Any) -> AttnKey:
        """`get_most_recent_key`."""
        return get_most_recent_key(cp_group)

    def clear(self, cp_group: Any = None) -> None:
        """`clear_cache`."""
        clear_cache(cp_group)


dist_attn_runtime_dict_mgr = DistAttnRuntimeDictManager()


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
