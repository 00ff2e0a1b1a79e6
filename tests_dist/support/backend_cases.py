"""The conformance suite of local kernels: slice tables, and the check that a backend computes them.

A backend gets a table in parts, as the runtime's stages hand it out: forward merges the parts,
backward runs each with the out and lse of the whole. The truth is dense fp64 under the table's own
0/1 matrix; the error allowed is twice that of plain SDPA in the same dtype, plus rounding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from cpattn.backends import Backend, Problem
from cpattn.backends.base import Attending, KeyRows, Returning, Scoring
from cpattn.solver import UNBOUNDED, SliceTable, disjoint_union
from tests_dist.support.oracle import Inputs, Results, dense_attention


@dataclass(frozen=True, slots=True, eq=False)
class Case:
    """A slice table over buffers of num_queries and num_keys rows, and the heads of the tensors."""

    table: SliceTable
    num_queries: int
    num_keys: int
    heads: tuple[int, int] = (2, 2)
    head_dim: int = 16
    head_dim_v: int = 16
    softcap: float | None = None

    def problem(self, dtype: torch.dtype, device_type: str = "cpu") -> Problem:
        return Problem(
            device_type, dtype, *self.heads, self.head_dim, self.head_dim_v, self.softcap is not None
        )

    def inputs(self, dtype: torch.dtype) -> Inputs:
        generator = torch.Generator().manual_seed(7)

        def normal(rows: int, num_heads: int, dim: int) -> Tensor:
            return torch.randn(rows, num_heads, dim, generator=generator, dtype=torch.float64).to(dtype)

        return Inputs(
            normal(self.num_queries, self.heads[0], self.head_dim),
            normal(self.num_keys, self.heads[1], self.head_dim),
            normal(self.num_keys, self.heads[1], self.head_dim_v),
            normal(self.num_queries, self.heads[0], self.head_dim_v),
        )


def _table(*rows: tuple[int, int, int, int, int | None, int | None]) -> SliceTable:
    """Slices (q0, q1, k0, k1, lo, hi); None leaves an edge open."""
    columns = np.array(
        [
            (q0, q1, k0, k1, -UNBOUNDED if lo is None else lo, UNBOUNDED if hi is None else hi)
            for q0, q1, k0, k1, lo, hi in rows
        ],
        dtype=np.int64,
    ).reshape(-1, 6)
    return SliceTable.from_columns(*columns.T)


def _documents(lengths: list[int], window: int | None = None) -> SliceTable:
    starts = np.cumsum([0, *lengths])[:-1].tolist()
    lo = None if window is None else -(window - 1)
    return _table(*((s, s + n, s, s + n, lo, 0) for s, n in zip(starts, lengths, strict=True)))


def random_table(seed: int, size: int = 150, slices: int = 7) -> SliceTable:
    """Random banded rectangles of all kinds, made disjoint; rows without any key are common."""
    rng = np.random.default_rng(seed)
    q0, k0 = rng.integers(0, size, slices), rng.integers(0, size, slices)
    q1 = np.minimum(q0 + rng.integers(1, size, slices), size)
    k1 = np.minimum(k0 + rng.integers(1, size, slices), size)
    shift = k0 - q0
    lo = np.where(rng.random(slices) < 0.5, shift - rng.integers(-size // 3, size // 3, slices), -UNBOUNDED)
    hi = np.where(rng.random(slices) < 0.5, shift + rng.integers(-9, size // 2, slices), UNBOUNDED)
    return disjoint_union(SliceTable.from_columns(q0, q1, k0, k1, lo, hi))


CASES: dict[str, Case] = {
    "full": Case(_table((0, 70, 0, 90, None, None)), 70, 90),
    "causal": Case(_table((0, 129, 0, 129, None, 0)), 129, 129, heads=(4, 2)),
    "causal_more_keys": Case(_table((3, 63, 10, 110, None, 47)), 70, 120),
    "causal_cropped": Case(_table((0, 100, 20, 80, None, 10)), 100, 100),
    "inverse_causal": Case(_table((0, 64, 0, 64, 0, None)), 64, 64),
    "inverse_causal_cropped": Case(_table((5, 90, 0, 77, -31, None)), 95, 77),
    "bi_causal": Case(_table((10, 50, 0, 100, -10, 50)), 60, 100),
    "narrow_band": Case(_table((0, 150, 0, 150, -3, 2)), 150, 150),
    "window": Case(_documents([211], 32), 211, 211),
    "two_windows": Case(
        SliceTable.concat([_documents([90], 17), _documents([60], 40).shift(90, 90)]), 150, 150
    ),
    "window_of_remote_keys": Case(_table((0, 80, 0, 40, 20, 51)), 80, 45),
    "documents": Case(_documents([37, 1, 120, 8, 3, 90]), 259, 259, heads=(4, 1)),
    "equal_documents": Case(_documents([24] * 9), 216, 216),
    "blocks": Case(_table(*((i, i + 24, 0, i + 24, None, None) for i in range(0, 120, 24))), 120, 120),
    # Tiles of one shape at equal distances that write the same rows: all of them, and half of them.
    "comb": Case(_table(*((3, 43, k, k + 5, None, None) for k in range(0, 60, 10))), 50, 60),
    "stairs": Case(_table(*((r, r + 20, 3 * r, 3 * r + 25, None, None) for r in range(0, 90, 10))), 100, 280),
    "shared_prefix": Case(
        SliceTable.concat(
            [_documents([50, 30, 30, 9]), _table((50, 119, 0, 50, None, None), (80, 110, 50, 60, None, None))]
        ),
        119,
        119,
    ),
    "one_query": Case(_table((4, 5, 0, 77, None, None)), 9, 77),
    "one_key": Case(_table((4, 99, 3, 4, None, None)), 99, 9),
    "one_pair": Case(_table((0, 1, 0, 1, None, None)), 1, 1),
    "same_keys_for_all": Case(_table((0, 10, 0, 33, None, None), (20, 31, 0, 33, None, None)), 40, 33),
    "empty": Case(_table(), 13, 7),
    "random_0": Case(random_table(0), 150, 150),
    "random_1": Case(random_table(1), 150, 150, heads=(3, 1)),
    "random_2": Case(random_table(2, 90, 12), 90, 90),
    "random_3": Case(random_table(3, 330, 5), 330, 330),
    "grouped_heads": Case(random_table(4), 150, 150, heads=(8, 2), head_dim=32, head_dim_v=32),
    "odd_head_dim": Case(random_table(5), 150, 150, head_dim=20, head_dim_v=20),
    "narrow_values": Case(random_table(6), 150, 150, head_dim=48, head_dim_v=24),
    "wide_values": Case(random_table(7), 150, 150, head_dim=16, head_dim_v=40),
    "head_dim_128": Case(random_table(8, 100), 100, 100, head_dim=128, head_dim_v=128),
    "head_dim_256": Case(random_table(9, 70), 70, 70, heads=(1, 1), head_dim=256, head_dim_v=256),
    "wide_window": Case(_documents([1900], 1000), 1900, 1900, heads=(1, 1)),
    "wider_window": Case(_documents([2300], 1600), 2300, 2300, heads=(1, 1), head_dim=8, head_dim_v=8),
    "large_causal": Case(_table((0, 1300, 0, 1500, None, 200)), 1300, 1500, heads=(2, 1)),
    "softcap": Case(random_table(10), 150, 150, heads=(4, 2), softcap=2.0),
}

# Large enough for the triangles of a wide window; not worth their time in every dtype.
LARGE = {"wide_window", "wider_window", "large_causal"}
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def run_backend(
    backend: Backend, case: Case, dtype: torch.dtype, *, num_parts: int = 2, device: str = "cpu"
) -> Results:
    """What the backend computes for the table, handed over in parts, on the CPU in the end."""
    inputs = Inputs(*(t.to(device) for t in case.inputs(dtype)))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    parts = [case.table.take(np.arange(p, len(case.table), num_parts)) for p in range(num_parts)]
    works = [backend.prepare(p, case.num_queries, case.num_keys, inputs.q.device) for p in parts]
    keys, scoring = KeyRows(inputs.k, inputs.v), Scoring(case.head_dim**-0.5, case.softcap)
    shape = (case.num_queries, case.heads[0], case.head_dim_v)
    once = num_parts == 1 and backend.writes_once(works[0])
    out = torch.zeros(shape, dtype=dtype if once else wide, device=device)
    lse = torch.full(shape[:2], -torch.inf, dtype=wide, device=device)
    for number, work in enumerate(works):
        backend.forward(Attending(inputs.q, out, lse), keys, work, scoring, fresh=number == 0)
    grads = [torch.zeros(t.shape, dtype=wide, device=device) for t in inputs[:3]]
    blind = lse.masked_fill(lse == -torch.inf, torch.inf)
    for work in works:
        queries = Returning(inputs.dout, inputs.q, out.to(dtype), blind, grads[0])
        backend.backward(queries, keys, work, scoring, KeyRows(*grads[1:]))
    return Results(*(t.cpu() for t in (out.to(dtype), lse, *(g.to(dtype) for g in grads))))


def check_backend(
    backend: Backend, name: str, dtype: torch.dtype, *, num_parts: int = 2, device: str = "cpu"
) -> None:
    """Raise AssertionError where the backend is less exact than it may be."""
    got = run_backend(backend, CASES[name], dtype, num_parts=num_parts, device=device)
    exact, plain = _expected(name, dtype)
    eps = torch.finfo(dtype).eps
    for field, mine, truth, theirs in zip(Results._fields, got, exact, plain, strict=True):
        assert mine.shape == truth.shape, f"{field} has shape {tuple(mine.shape)}"
        if field == "lse":
            assert torch.equal(torch.isinf(mine), torch.isinf(truth)), "lse is -inf elsewhere"
        finite = torch.isfinite(truth)
        assert torch.isfinite(mine[finite]).all(), f"{field} has NaN or infinity"
        if not finite.any():
            continue
        error = (mine.double() - truth)[finite].abs().max().item()
        allowed = 2 * (theirs.double() - truth)[finite].abs().max().item()
        # In fp64 the truth itself is rounded, by the order of its sums; and long sums round more often on one thread.
        # Gradients are differences of dO.V and dO.O, which are larger than they are: as in the runtime's oracle.
        steps = (100 if dtype == torch.float64 else 8 if field.startswith("d") else 4)
        steps *= max(1.0, math.sqrt(CASES[name].num_queries / 256))
        rounding = steps * eps * max(1.0, truth[finite].abs().max().item())
        assert error <= allowed + rounding, (
            f"{field} is off by {error:.3g}, plain attention by {allowed / 2:.3g}, rounding {rounding:.3g}"
        )


@lru_cache(maxsize=256)
def _expected(name: str, dtype: torch.dtype) -> tuple[Results, Results]:
    """The truth in fp64, and what plain attention makes of it in the dtype."""
    case = CASES[name]
    inputs = case.inputs(dtype)
    visible = case.table.to_dense(case.num_queries, case.num_keys)
    exact = _by_autograd(inputs, torch.float64, visible, case, dense=True)
    plain = _by_autograd(inputs, dtype, visible, case, dense=case.softcap is not None)
    return exact, plain._replace(lse=exact.lse.float())


def _by_autograd(inputs: Inputs, dtype: torch.dtype, visible: np.ndarray, case: Case, *, dense: bool) -> Results:
    leaves = [t.to(dtype).requires_grad_() for t in inputs[:3]]
    scale = case.head_dim**-0.5
    if dense:
        out, lse = dense_attention(*leaves, visible, scale=scale, softcap=case.softcap)
    else:
        seen = torch.from_numpy(visible.any(1))
        mask = torch.from_numpy(visible) | ~seen[:, None]  # SDPA gives NaN to rows that see nothing
        q, k, v = (t.transpose(0, 1)[None] for t in leaves)
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        out = out[0].transpose(0, 1) * seen[:, None, None].to(dtype)
        lse = out.detach().sum(-1)  # SDPA has none; the caller puts the exact one here
    grads = torch.autograd.grad(out, leaves, inputs.dout.to(dtype))
    return Results(out.detach(), lse.detach(), *grads)
