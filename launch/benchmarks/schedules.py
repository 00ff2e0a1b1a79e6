"""The attention layer under other schedules: references written here over this project's kernel, and installed peers.

Each schedule owns some rows of the sequence on every rank, and computes out, dq, dk, dv of its rows from q, k, v and
dout of its rows. The references are what one would write by hand with care: collectives are as few as possible, and
those that are fastest on gloo (an all-to-all with uneven splits beats an all-gather and a reduce-scatter).

Shape legend: T local tokens, S tokens of the sequence, H heads, D head dim, P ranks.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

import cpattn
from cpattn.backends.base import Attending, KeyRows, Returning, Scoring
from cpattn.backends.sdpa_cpu import CpuSdpaBackend
from cpattn.masks.spec import AttnMaskSpec, lower_mask
from cpattn.runtime.execute import accumulator_dtype
from cpattn.solver import Placement, SliceTable, merge_neighbours, place_contiguous, place_zigzag

aten = torch.ops.aten


class Results(NamedTuple):
    """Local rows of the four results, [T, H, D]."""

    out: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor


class Schedule(Protocol):
    """rows: int64 [T], the global indices of this rank's rows, in the order in which tensors hold them."""

    name: str
    rows: np.ndarray

    def run(self, q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> Results:
        """Forward and backward of one attention layer; all tensors [T, H, D]."""
        ...


def _scoring(q: Tensor) -> Scoring:
    return Scoring(q.shape[-1] ** -0.5)


class Kernel:
    """This project's CPU kernel on one slice table: forward into accumulators, backward into accumulators."""

    def __init__(self, table: SliceTable, num_queries: int, num_keys: int):
        self._backend = CpuSdpaBackend()
        self.work = self._backend.prepare(table, num_queries, num_keys, torch.device("cpu"))
        self.once = self._backend.writes_once(self.work)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, fresh: bool) -> None:
        self._backend.forward(Attending(q, out, lse), KeyRows(k, v), self.work, _scoring(q), fresh=fresh)

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, grads: Sequence[Tensor]
    ) -> None:
        dq, dk, dv = grads
        queries = Returning(dout, q, out, lse, dq)
        self._backend.backward(queries, KeyRows(k, v), self.work, _scoring(q), KeyRows(dk, dv))

    def whole(self, q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> Results:
        """Both passes where these are all keys that the queries see."""
        out, lse = empty_partial(q, once=self.once)
        self.forward(q, k, v, out, lse, fresh=True)
        out, lse = out.to(q.dtype), lse.masked_fill(lse == -torch.inf, torch.inf)
        grads = [zeros_like_rows(t) for t in (q, k, v)]
        self.backward(dout, q, k, v, out, lse, grads)
        return Results(out, *(g.to(q.dtype) for g in grads))


def empty_partial(q: Tensor, *, once: bool = False) -> tuple[Tensor, Tensor]:
    """Accumulators of rows that have seen no key yet; `once`: rows are written once, so out needs no fp32."""
    wide = accumulator_dtype(q.dtype)
    return torch.zeros(q.shape, dtype=q.dtype if once else wide), torch.full(q.shape[:2], -torch.inf, dtype=wide)


def zeros_like_rows(x: Tensor) -> Tensor:
    return torch.zeros(x.shape, dtype=accumulator_dtype(x.dtype))


def slices_between(table: SliceTable, q_runs: np.ndarray, k_runs: np.ndarray) -> SliceTable:
    """The mask between two lists of token runs, [n, 2] each, in the rows of buffers that hold them end to end."""
    parts = []
    every = np.arange(len(table))
    q_at = 0
    for q0, q1 in q_runs.tolist():
        k_at = 0
        for k0, k1 in k_runs.tolist():
            cut = table.crop(every, *(np.full(len(table), x) for x in (q0, q1, k0, k1))).table
            parts.append(cut.shift(q_at - q0, k_at - k0))
            k_at += k1 - k0
        q_at += q1 - q0
    return merge_neighbours(SliceTable.concat(parts))


def place_zigzag_by_document(lengths: Sequence[int], cp_size: int) -> Placement:
    """Every document in 2 * cp_size pieces, of which rank r owns the r-th from either end."""
    ends, owners = [], []
    start = 0
    for length in lengths:
        piece = place_zigzag(length, cp_size)
        ends.append(start + piece.ends)
        owners.append(piece.owners)
        start += length
    return Placement.from_runs(np.concatenate(ends), np.concatenate(owners), cp_size=cp_size)


class LocalKernel:
    """The whole layer on every rank at once: what one device would do without context parallelism."""

    def __init__(self, spec: AttnMaskSpec):
        self.name = "local kernel"
        self.rows = np.arange(spec.total_seqlen)
        self._kernel = Kernel(lower_mask(spec), spec.total_seqlen, spec.total_seqlen)

    def run(self, q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> Results:
        return self._kernel.whole(q, k, v, dout)


class TorchKernel:
    """One causal call of torch's own kernel on the whole sequence, on every rank at once."""

    def __init__(self, spec: AttnMaskSpec):
        self.name = "torch kernel"
        self.rows = np.arange(spec.total_seqlen)

    def run(self, q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> Results:
        q, k, v, dout = (as_heads_first(t) for t in (q, k, v, dout))
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True)
        grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(dout, q, k, v, out, lse, 0.0, True)
        return Results(*(as_rows(t) for t in (out, *grads)))


class Ours:
    """`cpattn.attention` with a key of the given options."""

    def __init__(self, name: str, spec: AttnMaskSpec, shape: tuple[int, int], **options: Any):
        self.name = name
        heads, dim = shape
        group = dist.group.WORLD if dist.get_world_size() > 1 else None
        self.key = cpattn.make_key(spec, num_heads_q=heads, num_heads_kv=heads, head_dim=dim, cp_group=group, **options)
        tokens = torch.arange(spec.total_seqlen)
        self.rows = cpattn.dispatch(tokens, self.key).numpy()

    def run(self, q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> Results:
        leaves = [t.detach().requires_grad_() for t in (q, k, v)]
        out = cpattn.attention(leaves[0], leaves[1], leaves[2], self.key)
        dq, dk, dv = torch.autograd.grad(out, leaves, dout)
        return Results(out.detach(), dq, dk, dv)


class AllGather:
    """Every rank gathers all keys and values once, keeps them for backward and scatters dK, dV in fp32.

    again: they are not kept, but gathered once more.
    """

    def __init__(self, spec: AttnMaskSpec, placement: Placement, *, again: bool = False):
        self.name, self._again = "all-gather", again
        rank, self._size = dist.get_rank(), dist.get_world_size()
        self.rows = placement.tokens_of(rank)
        runs = np.concatenate([placement.runs_of(r) for r in range(self._size)])
        table = slices_between(lower_mask(spec), placement.runs_of(rank), runs)
        self._counts = placement.num_tokens.tolist()
        self._kernel = Kernel(table, len(self.rows), spec.total_seqlen)

    def run(self, q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> Results:
        mine, heads = len(self.rows), k.shape[1]
        kv = torch.cat([k, v], 1)
        gathered = self._gather(kv)
        keys, values = gathered[:, :heads], gathered[:, heads:]
        out, lse = empty_partial(q, once=self._kernel.once)
        self._kernel.forward(q, keys, values, out, lse, fresh=True)
        out, lse = out.to(q.dtype), lse.masked_fill(lse == -torch.inf, torch.inf)
        if self._again:
            gathered = self._gather(kv)
            keys, values = gathered[:, :heads], gathered[:, heads:]
        dq, dkv = zeros_like_rows(q), zeros_like_rows(gathered)
        self._kernel.backward(dout, q, keys, values, out, lse, (dq, dkv[:, :heads], dkv[:, heads:]))
        parts = dkv.new_empty((mine * self._size, *dkv.shape[1:]))
        exchange(parts, dkv, [mine] * self._size, self._counts)
        total = parts.unflatten(0, (self._size, mine)).sum(0).to(k.dtype)
        return Results(out, dq.to(q.dtype), total[:, :heads], total[:, heads:])

    def _gather(self, kv: Tensor) -> Tensor:
        gathered = kv.new_empty((sum(self._counts), *kv.shape[1:]))
        exchange(gathered, kv.repeat(self._size, 1, 1), self._counts, [len(kv)] * self._size)
        return gathered


class Ulysses:
    """All tokens of a part of the heads: one all-to-all of q, k and v in, one of out back, and so in backward.

    Needs a number of heads that the ranks divide.
    """

    def __init__(self, spec: AttnMaskSpec):
        self.name = "Ulysses"
        self._size = dist.get_world_size()
        placement = place_contiguous(spec.total_seqlen, self._size)
        self.rows = placement.tokens_of(dist.get_rank())
        self._counts = placement.num_tokens.tolist()
        self._kernel = Kernel(lower_mask(spec), spec.total_seqlen, spec.total_seqlen)

    def run(self, q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> Results:
        q_, k_, v_ = self._to_heads(q, k, v)
        out, lse = empty_partial(q_, once=self._kernel.once)
        self._kernel.forward(q_, k_, v_, out, lse, fresh=True)
        out = out.to(q.dtype)
        (home,) = self._to_rows(out)
        (dout_,) = self._to_heads(dout)
        grads = [zeros_like_rows(t) for t in (q_, k_, v_)]
        lse = lse.masked_fill(lse == -torch.inf, torch.inf)
        self._kernel.backward(dout_, q_, k_, v_, out, lse, grads)
        return Results(home, *self._to_rows(*(g.to(q.dtype) for g in grads)))

    def _to_heads(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """[T, H, D] each to [S, H / P, D] each."""
        mine = len(self.rows)
        stacked = torch.stack([t.unflatten(1, (self._size, -1)) for t in tensors], 2)  # [T, P, n, H/P, D]
        send = stacked.transpose(0, 1).flatten(0, 1).contiguous()
        received = send.new_empty((sum(self._counts), *send.shape[1:]))
        exchange(received, send, self._counts, [mine] * self._size)
        return received.unbind(1)

    def _to_rows(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """[S, H / P, D] each to [T, H, D] each."""
        mine = len(self.rows)
        send = torch.stack(tensors, 1)
        received = send.new_empty((mine * self._size, *send.shape[1:]))
        exchange(received, send, [mine] * self._size, self._counts)
        by_rank = received.unflatten(0, (self._size, mine)).permute(2, 1, 0, 3, 4)  # [n, T, P, H/P, D]
        return by_rank.flatten(2, 3).unbind(0)


class Ring:
    """Keys and values go round in P - 1 hops, each behind the kernel on the block before; gradients follow in fp32."""

    def __init__(self, spec: AttnMaskSpec, placement: Placement):
        self.name = "ring"
        self._rank, self._size = dist.get_rank(), dist.get_world_size()
        self.rows = placement.tokens_of(self._rank)
        self._counts = placement.num_tokens.tolist()
        table, mine = lower_mask(spec), placement.runs_of(self._rank)
        self._kernels = []
        for step in range(self._size):
            block = (self._rank - step) % self._size
            slices = slices_between(table, mine, placement.runs_of(block))
            self._kernels.append(Kernel(slices, len(self.rows), self._counts[block]))

    def run(self, q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> Results:
        heads = k.shape[1]
        own = torch.cat([k, v], 1)
        out, lse = empty_partial(q)
        kv, coming, arrived = own, own, None
        for step, kernel in enumerate(self._kernels):
            if step + 1 < self._size:
                coming, arrived = self._pass_on(kv, step)
            kernel.forward(q, kv[:, :heads], kv[:, heads:], out, lse, fresh=step == 0)
            if arrived is not None:
                arrived.wait()
                kv, arrived = coming, None
        out, lse = out.to(q.dtype), lse.masked_fill(lse == -torch.inf, torch.inf)
        dq = zeros_like_rows(q)
        kv, total, passed = own, zeros_like_rows(own), None
        for step, kernel in enumerate(self._kernels):
            if step + 1 < self._size:
                coming, arrived = self._pass_on(kv, step)
            here = zeros_like_rows(kv)
            kernel.backward(dout, q, kv[:, :heads], kv[:, heads:], out, lse, (dq, here[:, :heads], here[:, heads:]))
            if passed is not None:
                passed.wait()
                here += total
            # The gradient of a block travels with it, and home from the last rank that uses it.
            total, passed = self._pass_on(here, step)
            if arrived is not None:
                arrived.wait()
                kv, arrived = coming, None
        if passed is not None:
            passed.wait()
        dkv = total.to(k.dtype)
        return Results(out, dq.to(q.dtype), dkv[:, :heads], dkv[:, heads:])

    def _pass_on(self, block: Tensor, step: int) -> tuple[Tensor, Any]:
        """Send the block of this step to the next rank; the block of the next step comes from the one before."""
        after, before = (self._rank + 1) % self._size, (self._rank - 1) % self._size
        rows = self._counts[(self._rank - step - 1) % self._size]
        received = block.new_empty((rows, *block.shape[1:]))
        sends, receives = [0] * self._size, [0] * self._size
        sends[after], receives[before] = block.shape[0], rows
        return received, exchange(received, block, receives, sends, wait=False)


def exchange(
    received: Tensor, send: Tensor, receives: Sequence[int], sends: Sequence[int], *, wait: bool = True
) -> Any:
    """Rows with uneven splits from all to all; the handle, where it is not waited for."""
    work = all_to_all(received, send.contiguous(), list(receives), list(sends))
    if wait:
        work.wait()
    return work


def all_to_all(received: Tensor, send: Tensor, receives: list[int], sends: list[int]) -> Any:
    """One collective; the handle."""
    return dist.all_to_all_single(received, send, receives, sends, async_op=True)


def as_heads_first(x: Tensor) -> Tensor:
    """[T, H, D] as [1, H, T, D]."""
    return x.transpose(0, 1).unsqueeze(0)


def as_rows(x: Tensor) -> Tensor:
    """[1, H, T, D] as [T, H, D]."""
    return x.squeeze(0).transpose(0, 1)


class TorchRing:
    """torch's own ring (head-tail balance, all-to-all rotation) over its CPU kernel; causal only.

    The public `context_parallel` does not run on CPU; its ring template, driven with the CPU kernel, does.
    """

    def __init__(self, spec: AttnMaskSpec):
        from torch.distributed.tensor.experimental._context_parallel import _attention as ring

        self.name = "torch ring"
        self._ring: Any = ring
        ring.set_rotate_method("alltoall")
        ring._cp_options.enable_load_balance = True
        self.rows = zigzag_rows(spec)

    def run(self, q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> Results:
        q, k, v, dout = (as_heads_first(t) for t in (q, k, v, dout))
        group = dist.group.WORLD

        def forward(query: Tensor, key: Tensor, value: Tensor, is_causal: bool, **_: Any) -> tuple[Tensor, Tensor]:
            result: tuple[Tensor, Tensor] = aten._scaled_dot_product_flash_attention_for_cpu(
                query, key, value, 0.0, is_causal
            )
            return result

        def backward(*, grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Any:
            out, lse, causal = options["out"], options["logsumexp"], options["is_causal"]
            return aten._scaled_dot_product_flash_attention_for_cpu_backward(
                grad_out, query, key, value, out, lse, 0.0, causal
            )

        out, lse = self._ring._templated_ring_attention(group, 2, forward, q, k, v, is_causal=True)
        dq, dk, dv = self._ring._templated_ring_attention_backward(
            group, 2, backward, dout, "grad_out", q, k, v, out, lse, is_causal=True
        )
        return Results(*(as_rows(t) for t in (out, dq, dk, dv)))


class ParaAttn:
    """para-attn's Ulysses attention over torch's CPU kernel; causal only."""

    def __init__(self, spec: AttnMaskSpec):
        from para_attn.para_attn_interface import ulysses_attn_func

        self.name = "para-attn Ulysses"
        self._attention: Callable[..., Tensor] = ulysses_attn_func
        self._group = dist.group.WORLD
        self.rows = place_contiguous(spec.total_seqlen, dist.get_world_size()).tokens_of(dist.get_rank())

    def run(self, q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> Results:
        q, k, v, dout = (as_heads_first(t) for t in (q, k, v, dout))
        leaves = [t.detach().requires_grad_() for t in (q, k, v)]
        out = self._attention(*leaves, is_causal=True, mesh=self._group)
        return Results(*(as_rows(t) for t in (out.detach(), *torch.autograd.grad(out, leaves, dout))))


class RingFlashAttn:
    """ring-flash-attn's zigzag ring, its flash-attn kernel replaced by torch's CPU kernel; causal, bf16 only.

    Its gradients are wrong in fp32, where its conversion to fp32 aliases a buffer that it uses again.
    """

    def __init__(self, spec: AttnMaskSpec):
        _install_flash_attn_stand_in()
        from ring_flash_attn.zigzag_ring_flash_attn import zigzag_ring_flash_attn_func

        self.name = "ring-flash-attn zigzag"
        self._attention: Callable[..., Tensor] = zigzag_ring_flash_attn_func
        self.rows = zigzag_rows(spec)

    def run(self, q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> Results:
        leaves = [t.unsqueeze(0).detach().requires_grad_() for t in (q, k, v)]
        out = self._attention(*leaves, causal=True, group=dist.group.WORLD)
        grads = torch.autograd.grad(out, leaves, dout.unsqueeze(0))
        return Results(*(t.squeeze(0) for t in (out.detach(), *grads)))


def zigzag_rows(spec: AttnMaskSpec) -> np.ndarray:
    """This rank's rows of pieces r and 2P - 1 - r."""
    rows: np.ndarray = place_zigzag(spec.total_seqlen, dist.get_world_size()).tokens_of(dist.get_rank())
    return rows


def _install_flash_attn_stand_in() -> None:
    """Modules of flash-attn's names over torch's CPU kernel, and without the peer's adapters for other libraries."""

    def _flash_attn_forward(
        q: Tensor, k: Tensor, v: Tensor, dropout_p: float, softmax_scale: float, causal: bool,
        window_size_left: int, window_size_right: int, softcap: float, alibi_slopes: None, return_softmax: bool,
    ) -> tuple[Tensor, Tensor, None, None]:  # fmt: skip
        heads_first = (t.transpose(1, 2) for t in (q, k, v))
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(*heads_first, 0.0, causal, scale=softmax_scale)
        return out.transpose(1, 2), lse, None, None

    def _flash_attn_backward(
        dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor, dq: Tensor, dk: Tensor,
        dv: Tensor, dropout_p: float, softmax_scale: float, causal: bool, window_size_left: int,
        window_size_right: int, softcap: float, alibi_slopes: None, deterministic: bool,
    ) -> None:  # fmt: skip
        dout, q, k, v, out = (t.transpose(1, 2) for t in (dout, q, k, v, out))
        grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dout, q, k, v, out, softmax_lse, 0.0, causal, scale=softmax_scale
        )
        for into, grad in zip((dq, dk, dv), grads, strict=True):
            into.copy_(grad.transpose(1, 2))

    interface: Any = types.ModuleType("flash_attn.flash_attn_interface")
    interface._flash_attn_forward, interface._flash_attn_backward = _flash_attn_forward, _flash_attn_backward
    for name in ("_flash_attn_varlen_forward", "_flash_attn_varlen_backward"):
        setattr(interface, name, None)
    package: Any = types.ModuleType("flash_attn")
    package.flash_attn_interface = interface
    adapters: Any = types.ModuleType("ring_flash_attn.adapters")
    adapters.substitute_hf_flash_attn = adapters.update_ring_flash_attn_params = None
    sys.modules.update(
        {"flash_attn": package, "flash_attn.flash_attn_interface": interface, "ring_flash_attn.adapters": adapters}
    )


def is_installed(package: str) -> bool:
    """Whether a peer can be imported."""
    return importlib.util.find_spec(package) is not None
