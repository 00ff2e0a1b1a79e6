"""Linear attention and its kin on any placement: one exchange of affine maps, whatever the lengths.

Every fragment reduces to the map of the state from its begin to its end. The maps of a document's earlier fragments are
fetched (each once by each rank that needs it), composed in document order, and every fragment runs from its true state.

Shape legend: T local tokens, G key heads, H value heads, K head dim of q and k, V of v, N chunks, C rows of a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cpattn.collectives import RowRoutes
from cpattn.keys.key import AttnKey, require_key
from cpattn.ops.layout import cached_tensor
from cpattn.ops.travel import RowSaying, TravellingRows, start_cast_rows
from cpattn.solver import expand_counts

from .chunks import AffineMaps, Reading, work_chunks
from .fragments import FragmentTable, IntArray, fragments_of, index_tensor, locate, routes_of
from .fused import Kernel, refuse_mamba2, refuse_recurrence, scan_chunks, takes_fused, work_fragments

# Rows of a chunk: fewer where fragments are short. With a decay for each channel, products within a chunk are made of
# C x C x K numbers.
CHUNK_SIZES = (64, 32, 16, 8)
CHUNK_SIZES_BY_CHANNEL = (16, 8)
# Of mamba_ssm's kernel: the models' own size, and fewer for short fragments.
CHUNK_SIZES_OF_MAMBA = (256, 128, 64, 32, 16)
# Rows of chunks that stand for nothing, at most, for each row that does.
MAX_PADDING = 0.5


@torch.compiler.disable  # indices differ with the batch: a graph would serve one
def linear_attention(
    q_TGK: Tensor,
    k_TGK: Tensor,
    v_THV: Tensor,
    key: AttnKey,
    *,
    decay: Tensor | None = None,
    beta_TH: Tensor | None = None,
    scale: float | None = None,
    kernel: Kernel = "auto",
) -> Tensor:
    """Linear recurrence along each document, whatever ranks its tokens lie on; exact, forward and backward.

    With S_0 = 0 at each document's begin, a_t = exp(decay_t), and out_t = scale * q_t^T S_t:

        S_t = diag(a_t) S_(t-1) + k_t v_t^T                                     without beta
        S_t = (I - beta_t k_t k_t^T) diag(a_t) S_(t-1) + beta_t k_t v_t^T       with beta, the delta rule

    The first is lightning attention (a constant decay for each head), Mamba-2 (q = C, k = B, v = dt x, decay = dt A)
    and gated linear attention (a decay for each channel); the second is DeltaNet, GDN, and KDA (for each channel).

    Args:
        q_TGK, k_TGK: [T_local, G, K]; G divides H, each key head serves H / G value heads in a row.
        v_THV: [T_local, H, V].
        key: whose placement the rows have; its mask must have documents. One key serves all mixers of a model.
        decay: log of the decay, at most 0, [T_local, H], or [T_local, H, K] for each channel; None: no decay.
        beta_TH: [T_local, H]; None: no delta rule.
        scale: of q; None is 1.
        kernel: "torch", "fused" (fla, on CUDA, for 16-bit v), or "auto": fused where it serves.

    Returns:
        [T_local, H, V] in v's dtype. States are computed in fp32 at least (fp64 if v is fp64).

    Raises:
        ValueError: shapes do not fit the key or each other, the mask has no documents, or `kernel` does not serve.
    """
    require_key(key, "linear_attention")
    with key.checking("linear_attention"):
        _check(q_TGK, k_TGK, v_THV, decay, beta_TH, key)
    # A rank without rows has nothing for a kernel; maps are the same either way, so ranks may differ in this.
    if takes_fused(kernel, "linear_attention", refuse_recurrence(q_TGK, v_THV)) and key.num_tokens:
        return _by_fragments(q_TGK, k_TGK, v_THV, key, (decay, beta_TH), 1.0 if scale is None else scale)
    dtype = torch.promote_types(v_THV.dtype, torch.float32)
    by_channel = decay is not None and decay.dim() == 3
    plan = _plan(key, CHUNK_SIZES_BY_CHANNEL if by_channel else CHUNK_SIZES, v_THV.device)
    groups = v_THV.shape[1] // q_TGK.shape[1]
    if decay is None:
        decay = v_THV.new_zeros(v_THV.shape[:2])
    decay = decay if by_channel else decay.unsqueeze(-1)
    q = plan.chunked((q_TGK if scale is None else q_TGK * scale).to(dtype)).repeat_interleave(groups, 2)
    k = plan.chunked(k_TGK.to(dtype)).repeat_interleave(groups, 2)
    beta = None if beta_TH is None else plan.chunked(beta_TH.to(dtype))
    work = work_chunks(q, k, plan.chunked(v_THV.to(dtype)), plan.chunked(decay.to(dtype)), beta)
    travelling = _send_maps(work.maps, plan.exchange, key, 1.0 if scale is None else scale)
    reading = work.reading()  # while maps travel; and backward, while their gradients do
    out = reading.finish(_states(work.maps, travelling.wait(), plan))
    return out.flatten(0, 1).index_select(0, plan.places).to(v_THV.dtype)


def mamba2(
    x_THV: Tensor,
    dt_TH: Tensor,
    A_H: Tensor,
    B_TGK: Tensor,
    C_TGK: Tensor,
    key: AttnKey,
    *,
    D: Tensor | None = None,
    kernel: Kernel = "auto",
) -> Tensor:
    """The scan of Mamba-2 along each document: S_t = exp(dt_t A) S_(t-1) + dt_t B_t x_t^T, out_t = C_t^T S_t + D x_t.

    Args:
        x_THV: [T_local, H, V]. dt_TH: [T_local, H], at least 0. A_H: [H], at most 0.
        B_TGK, C_TGK: [T_local, G, K]; G divides H.
        key: as in `linear_attention`, which this is with q = C, k = B, v = dt x and decay dt A.
        D: [H], or None.
        kernel: "torch", "fused" (mamba_ssm, on CUDA, for 16-bit x), or "auto": fused where it serves.

    Returns:
        [T_local, H, V] in x's dtype. States are computed in fp32 at least.

    Raises:
        ValueError: shapes do not fit the key or each other, the mask has no documents, or `kernel` does not serve.
    """
    wide = torch.promote_types(x_THV.dtype, torch.float32)
    x, dt, A = x_THV.to(wide), dt_TH.to(wide), A_H.to(wide)
    decay = dt * A
    if takes_fused(kernel, "mamba2", refuse_mamba2(x_THV)) and key.num_tokens:
        with key.checking("linear_attention"):
            _check(C_TGK, B_TGK, x_THV, decay, None, key)
        out = _by_mamba_chunks((x_THV, dt, A, B_TGK, C_TGK), decay, key)
    else:
        out = linear_attention(C_TGK, B_TGK, x * dt[..., None], key, decay=decay, kernel="torch")
    out = out if D is None else out + D.to(wide)[:, None] * x
    return out.to(x_THV.dtype)


def _by_mamba_chunks(inputs: tuple[Tensor, ...], decay: Tensor, key: AttnKey) -> Tensor:
    """`mamba2` without D, chunk by chunk through the fused kernel; in fp32. inputs: x, dt, A, B and C."""
    x, dt, A, B, C = inputs
    plan = _plan(key, CHUNK_SIZES_OF_MAMBA, x.device)
    until = plan.chunked(decay).cumsum(1).exp().unsqueeze(-1)
    out, states = scan_chunks(plan.chunked(x), plan.chunked(dt), A, plan.chunked(B), plan.chunked(C))
    maps = AffineMaps(until[:, -1].unsqueeze(-1), states)
    travelling = _send_maps(maps, plan.exchange, key)
    read = plan.chunked(C).to(until.dtype).repeat_interleave(x.shape[1] // C.shape[1], 2) * until
    out = Reading(out.to(until.dtype), read).finish(_states(maps, travelling.wait(), plan))
    return out.flatten(0, 1).index_select(0, plan.places)


def _by_fragments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key: AttnKey,
    gates: tuple[Tensor | None, Tensor | None],
    scale: float,
) -> Tensor:
    """`linear_attention` whose local part is one call of a fused kernel. gates: decay and beta."""
    exchange, bounds, later = _fragment_plan(key, v.device)
    work = work_fragments(q, k, v, *gates, scale=scale, bounds=bounds)
    begins = _begins(_send_maps(work.maps, exchange, key, scale).wait(), exchange)
    out = list(work.out.split([b - a for _, a, b in later]))
    for number, (is_later, first, end) in enumerate(later):
        if is_later:  # the others begin their document, in a state of zero
            read = torch.einsum("thk,hkv->thv", work.read[first:end], begins[number])
            out[number] = out[number].float() + read
    return torch.cat([rows.to(v.dtype) for rows in out])


class _FragmentPlan(NamedTuple):
    """bounds: first rows of this rank's fragments, and the number of rows. later: for each whether its document began
    before it, its first row and its end.
    """

    exchange: _MapExchange
    bounds: Tensor
    later: tuple[tuple[bool, int, int], ...]


def _fragment_plan(key: AttnKey, device: torch.device) -> _FragmentPlan:
    table = fragments_of(key, "linear_attention")

    def make() -> _FragmentPlan:
        mine = table.of_rank(key.cp_rank)
        bounds = np.append(table.rows[mine], key.num_tokens)
        ones = np.ones(len(mine), dtype=np.int64)
        later = (mine > table.firsts[mine]).tolist()
        spans = zip(later, bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)
        exchange = _map_exchange(table, mine, np.arange(len(mine)), ones, key, device)
        return _FragmentPlan(exchange, index_tensor(bounds, device), tuple(spans))

    return cached_tensor(key, ("fragment plan", device), make)  # type: ignore[no-any-return]


class _Scan(NamedTuple):
    """Sequences of maps that are run through side by side, longest first.

    steps: for each step the numbers of the maps, one for each sequence that is as long. order: the sequences in the
    order of the steps' entries. back: the inverse of it.
    """

    steps: tuple[Tensor, ...]
    order: Tensor
    back: Tensor

    def maps(self, maps: AffineMaps) -> AffineMaps:
        """The maps of each sequence as one."""
        if not self.steps:
            return maps.take(self.order)
        total, finished = maps.take(self.steps[0]), []
        for rows in self.steps[1:]:
            finished.append(AffineMaps(total.a[len(rows) :], total.b[len(rows) :]))
            total = maps.take(rows).after(AffineMaps(total.a[: len(rows)], total.b[: len(rows)]))
        finished.append(total)
        return AffineMaps(*(torch.cat(parts[::-1]) for parts in zip(*finished, strict=True))).take(self.back)

    def states(self, maps: AffineMaps, begins: Tensor) -> Tensor:
        """States before each step, then after the last, [states, H, K, V]; begins: those before the first."""
        state = begins.index_select(0, self.order)
        states = [state]
        for rows in self.steps:
            state = maps.take(rows).of(state[: len(rows)])
            states.append(state)
        return torch.cat(states)


class _ScanLayout(NamedTuple):
    """A scan, and where its states lie: that before step s of sequence i in row first[s] + place[i]."""

    scan: _Scan
    first: IntArray
    place: IntArray
    num_states: int


class _MapExchange(NamedTuple):
    """Which maps of fragments travel, and what becomes of them.

    senders: the maps of the fragments that others need. routes: brings the maps of earlier fragments.
    across: maps, among [own senders, fetched], of each document that begins before this rank's part of it.
    begun: for each own fragment the state of `across` in which it begins, or the zero behind them all.
    """

    senders: _Scan
    routes: RowRoutes
    across: _Scan
    begun: Tensor


class _RecurrencePlan(NamedTuple):
    """What one rank does, besides the numbers.

    size: rows of a chunk. rows: the local row of each row of its chunks [N * C], or that of zeros behind them all.
    places: of each local row among the rows of chunks. exchange: of maps.
    inside: the chunks of each own fragment. before: for each chunk its state among those of `inside`.
    """

    size: int
    rows: Tensor
    places: Tensor
    exchange: _MapExchange
    inside: _Scan
    before: Tensor

    def chunked(self, x: Tensor) -> Tensor:
        """Local rows [T, ...] as chunks [N, C, ...], zeros in rows that stand for nothing."""
        rows = torch.cat([x, x.new_zeros(1, *x.shape[1:])]).index_select(0, self.rows)
        return rows.unflatten(0, (-1, self.size))


class _TravellingMaps(NamedTuple):
    """This rank's maps that others need, as rows, and those of other ranks on their way here. like: any maps."""

    own: Tensor
    others: TravellingRows
    like: AffineMaps

    def wait(self) -> AffineMaps:
        """Own maps, then those fetched."""
        rows = torch.cat([self.own, self.others.wait()])
        a, b = rows.split([_width(self.like.a), _width(self.like.b)], dim=1)
        return AffineMaps(a.unflatten(1, self.like.a.shape[1:]), b.unflatten(1, self.like.b.shape[1:]))


def _send_maps(maps: AffineMaps, exchange: _MapExchange, key: AttnKey, scale: float = 1.0) -> _TravellingMaps:
    """Start the exchange of the maps of fragments. Ranks without rows take part in it, too.

    scale: of queries, for ranks to compare.
    """
    mine = exchange.senders.maps(maps)
    own = torch.cat([mine.a.flatten(1), mine.b.flatten(1)], dim=1)
    saying = RowSaying(key, "linear_attention", {"maps": [tuple(x.shape[1:]) for x in maps], "scale": float(scale)})
    return _TravellingMaps(own, start_cast_rows(own, exchange.routes, saying), maps)


def _begins(known: AffineMaps, exchange: _MapExchange) -> Tensor:
    """The state in which each own fragment begins. known: maps of fragments, as `across` numbers them."""
    nothing = known.b[:0].sum(0, keepdim=True)
    across = exchange.across.states(known, nothing.expand(len(exchange.across.order), -1, -1, -1))
    return torch.cat([across, nothing]).index_select(0, exchange.begun)


def _states(maps: AffineMaps, known: AffineMaps, plan: _RecurrencePlan) -> Tensor:
    """The state in which each chunk begins, [N, H, K, V]. known: maps of fragments, as `across` numbers them."""
    return plan.inside.states(maps, _begins(known, plan.exchange)).index_select(0, plan.before)


def _width(x: Tensor) -> int:
    return math.prod(x.shape[1:])


def _plan(key: AttnKey, sizes: Sequence[int], device: torch.device) -> _RecurrencePlan:
    table = fragments_of(key, "linear_attention")

    def make() -> _RecurrencePlan:
        mine = table.of_rank(key.cp_rank)
        lengths = table.ends[mine] - table.starts[mine]
        size = _chunk_size(lengths, sizes)
        counts = -(-lengths // size)
        ends = np.cumsum(counts)
        chunks = _layout(np.arange(counts.sum()), counts, device)
        rows, places = _chunk_rows(table.rows[mine], lengths, counts, size, key.num_tokens)
        nth = np.arange(counts.sum()) - np.repeat(ends - counts, counts)
        before = chunks.first[nth] + np.repeat(chunks.place, counts)
        exchange = _map_exchange(table, mine, np.arange(counts.sum()), counts, key, device)
        index = [index_tensor(x, device) for x in (rows, places, before)]
        return _RecurrencePlan(size, index[0], index[1], exchange, chunks.scan, index[2])

    return cached_tensor(key, ("recurrence", tuple(sizes), device), make)  # type: ignore[no-any-return]


def _map_exchange(
    table: FragmentTable, mine: IntArray, maps: IntArray, counts: IntArray, key: AttnKey, device: torch.device
) -> _MapExchange:
    """maps: numbers of the maps of this rank's fragments `mine`, `counts` for each, in order."""
    sends = ~table.is_last()[mine]
    senders = _layout(maps[np.repeat(sends, counts)], counts[sends], device)
    routes, across, begun = _across(table, mine, key, device)
    return _MapExchange(senders.scan, routes, across, index_tensor(begun, device))


def _across(
    table: FragmentTable, mine: IntArray, key: AttnKey, device: torch.device
) -> tuple[RowRoutes, _Scan, IntArray]:
    """The exchange of maps, the scan over a document's maps up to this rank's last fragment of it, and `begun`."""
    needed, placement, before = table.maps_needed()
    routes = routes_of(needed, placement, key.cp_rank, device)
    # Of each document with a fragment here that is not its first: the last such fragment tells how far to go.
    later = mine[mine > table.firsts[mine]]
    firsts, at = np.unique(table.firsts[later], return_inverse=True)
    last = np.zeros(len(firsts), dtype=np.int64)
    np.maximum.at(last, at, later)
    sequence, nth = expand_counts(last - firsts)
    layout = _layout(
        locate(before[firsts][sequence] + nth, needed, placement, key.cp_rank), last - firsts, device
    )
    begun = np.full(len(mine), layout.num_states, dtype=np.int64)
    begun[mine > table.firsts[mine]] = layout.first[later - table.firsts[later]] + layout.place[at]
    return routes, layout.scan, begun


def _layout(rows: IntArray, counts: IntArray, device: torch.device) -> _ScanLayout:
    """Sequences of `counts` rows each, one after the other, as a scan."""
    order = np.argsort(-counts, kind="stable")
    begins = (np.cumsum(counts) - counts)[order]
    most = int(counts.max(initial=0))
    active = [int((counts > step).sum()) for step in range(most)]
    steps = tuple(index_tensor(rows[begins[:count] + step], device) for step, count in enumerate(active))
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    # The state after a step is that before the next, of the sequences that end there too.
    first = np.concatenate([[0, len(counts)], len(counts) + np.cumsum(active)])[: most + 1]
    scan = _Scan(steps, index_tensor(order, device), index_tensor(place, device))
    return _ScanLayout(scan, first, place, len(counts) + sum(active))


def _chunk_size(lengths: IntArray, sizes: Sequence[int]) -> int:
    """The largest size that fills enough of its rows, or the smallest."""
    rows = lengths.sum() * (1 + MAX_PADDING)
    return next((size for size in sizes if (-(-lengths // size) * size).sum() <= rows), sizes[-1])


def _chunk_rows(
    first_rows: IntArray, lengths: IntArray, counts: IntArray, size: int, zero: int
) -> tuple[IntArray, IntArray]:
    """The local row of each row of the chunks of fragments, `zero` where there is none; and the inverse."""
    fragment, nth = expand_counts(counts * size)
    filled = nth < lengths[fragment]
    rows = np.where(filled, first_rows[fragment] + nth, zero)
    places = np.empty(int(lengths.sum()), dtype=np.int64)
    places[rows[filled]] = np.flatnonzero(filled)
    return rows, places


def _check(
    q_TGK: Tensor, k_TGK: Tensor, v_THV: Tensor, decay: Tensor | None, beta_TH: Tensor | None, key: AttnKey
) -> None:
    rows = key.num_tokens
    for name, given in (("q", q_TGK), ("k", k_TGK), ("v", v_THV), ("decay", decay), ("beta", beta_TH)):
        if given is not None and not (isinstance(given, Tensor) and given.is_floating_point()):
            raise ValueError(f"linear_attention: {name} is no tensor of floating-point numbers")
    for name, x in (("q", q_TGK), ("k", k_TGK), ("v", v_THV)):
        if x.dim() != 3 or x.shape[0] != rows:
            raise ValueError(
                f"linear_attention: {name} has shape {tuple(x.shape)}: the key expects ({rows}, heads, head dim), the "
                f"rows of rank {key.cp_rank}; did you dispatch with this key?"
            )
    heads, groups = v_THV.shape[1], q_TGK.shape[1]
    if q_TGK.shape != k_TGK.shape or not groups or heads % groups:
        raise ValueError(
            f"linear_attention: q {tuple(q_TGK.shape)}, k {tuple(k_TGK.shape)}, v {tuple(v_THV.shape)}: q and k must "
            f"have one shape, and v's heads must be a multiple of theirs"
        )
    by_head = (rows, heads)
    if decay is not None and decay.shape not in (by_head, (*by_head, q_TGK.shape[2])):
        raise ValueError(
            f"linear_attention: decay has shape {tuple(decay.shape)}: give its log as {by_head}, or "
            f"{(*by_head, q_TGK.shape[2])} for each channel"
        )
    if beta_TH is not None and beta_TH.shape != by_head:
        raise ValueError(f"linear_attention: beta has shape {tuple(beta_TH.shape)}: expected {by_head}")
