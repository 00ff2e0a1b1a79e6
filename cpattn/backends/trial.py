"""A kernel run on slices, checked against `reference` on sampled rows, and timed: how `backend="fastest"` chooses.

Inputs are normal with variance 1. What `reference` says is known for a few runs of rows: the first and last rows of
slices, which see where bands begin and end. All others must be finite, and those that see nothing must say so.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cpattn.solver import IntArray, SliceTable

from .base import Attending, Backend, KeyRows, Problem, Returning, Scoring, stores_first
from .reference import ReferenceBackend

SOFTCAP = 2.0  # so that it shows at scores of variance 1
_RUNS, _RUN_ROWS = 8, 3
# Pairs of rows and keys over all heads that a trial computes at most: some 0.1 s of a slow kernel.
_MOST_PAIRS = {"cuda": 1 << 35, "cpu": 1 << 25}
_BLOCK_ROWS = 512


class Results(NamedTuple):
    """What a kernel computes of slices; out in the inputs' dtype, the others in the accumulators'."""

    out: Tensor
    lse: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor


class Trial(NamedTuple):
    """What became of a kernel. seconds: of both passes, infinite where it failed. fault: in words; "" if it agrees."""

    kernel: str
    seconds: float
    fault: str = ""


class Sample(NamedTuple):
    """Slices over buffers, and inputs for them: q, k, v and dout as in `Backend`."""

    problem: Problem
    table: SliceTable
    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor

    @classmethod
    def of(cls, problem: Problem, table: SliceTable, num_queries: int, num_keys: int, device: torch.device) -> Sample:
        """Inputs of these sizes."""
        generator = torch.Generator(device).manual_seed(0)

        def normal(rows: int, heads: int, dim: int) -> Tensor:
            shape = (rows, heads, dim)
            return torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(problem.dtype)

        p = problem
        return cls(
            problem,
            table,
            normal(num_queries, p.num_heads_q, p.head_dim),
            normal(num_keys, p.num_heads_kv, p.head_dim),
            normal(num_keys, p.num_heads_kv, p.head_dim_v),
            normal(num_queries, p.num_heads_q, p.head_dim_v),
        )

    def thinned(self) -> Sample:
        """With few enough pairs for every kernel to be tried, also a slow one."""
        most = _MOST_PAIRS["cpu" if self.q.device.type == "cpu" else "cuda"]
        return self._replace(table=thinned(self.table, most // self.problem.num_heads_q))

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, v and dout."""
        return self.q, self.k, self.v, self.dout

    @property
    def scoring(self) -> Scoring:
        return Scoring(float(self.problem.head_dim**-0.5), SOFTCAP if self.problem.softcap else None)


def kernel_name(backend: Backend) -> str:
    """Of a kernel among those that share a name; the same wherever the same is installed."""
    return f"{backend.name} ({backend.kernel})"


def thinned(table: SliceTable, most_pairs: int) -> SliceTable:
    """The table, or so many of its blocks of 512 query rows, evenly spread, that it has about that many pairs."""
    area = table.area()
    if area <= most_pairs:
        return table
    cuts = np.arange(0, int(table.q1.max()) + _BLOCK_ROWS, _BLOCK_ROWS)
    pieces = table.split_q(cuts).table
    step = -(-area // most_pairs)
    return pieces.take(pieces.q0 // _BLOCK_ROWS % step == step // 2)


def try_kernel(backend: Backend, sample: Sample, expected: Results | None = None) -> Trial:
    """Run a kernel twice: once to be checked, once more for its time. Errors are faults too.

    expected: what `reference_rows` gives; None asks it.
    """
    name = kernel_name(backend)
    try:
        run = BoundKernel(backend, sample)
        fault = find_fault(sample, run(), expected or reference_rows(sample))
        return Trial(name, torch.inf if fault else _timed(run, sample.q.device), fault)
    except Exception as error:  # whatever a driver or a compiler says of it
        return Trial(name, torch.inf, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}")


class BoundKernel:
    """A kernel with its work on a sample, run as the runtime runs it on one rank; prepared once."""

    def __init__(self, backend: Backend, sample: Sample) -> None:
        self._backend, self._sample = backend, sample
        self._work = backend.prepare(sample.table, len(sample.q), len(sample.k), sample.q.device)
        self._once, self._stores = backend.writes_once(self._work), stores_first(backend)
        self._wide = torch.float64 if sample.q.dtype == torch.float64 else torch.float32

    def forward(self) -> tuple[Tensor, Tensor]:
        """out in q's dtype, and lse."""
        q, k, v, dout = self._sample.inputs
        out = self._accumulator(dout, q.dtype if self._once else self._wide)
        lse = torch.full(q.shape[:2], -torch.inf, dtype=self._wide, device=q.device)
        queries, scoring = Attending(q, out, lse), self._sample.scoring
        self._backend.forward(queries, KeyRows(k, v), self._work, scoring, fresh=True)
        return out.to(q.dtype), lse

    def backward(self, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk and dv in the accumulators' dtype."""
        q, k, v, dout = self._sample.inputs
        dq, dk, dv = (self._accumulator(t, self._wide) for t in (q, k, v))
        first: dict[str, Any] = {"fresh_dq": True, "fresh_dkv": True} if self._stores else {}
        queries, scoring = Returning(dout, q, out, blind_to_inf(lse), dq), self._sample.scoring
        self._backend.backward(queries, KeyRows(k, v), self._work, scoring, KeyRows(dk, dv), **first)
        return dq, dk, dv

    def __call__(self) -> Results:
        out, lse = self.forward()
        return Results(out, lse, *self.backward(out, lse))

    def _accumulator(self, like: Tensor, dtype: torch.dtype) -> Tensor:
        return (torch.empty if self._stores else torch.zeros)(like.shape, dtype=dtype, device=like.device)


def blind_to_inf(lse: Tensor) -> Tensor:
    """lse as backward takes it: +inf in rows that see nothing."""
    return lse.masked_fill(lse == -torch.inf, torch.inf)


def sampled_runs(table: SliceTable, *, keys: bool = False) -> list[tuple[int, int]]:
    """A few runs [start, end) of query rows (or key rows), disjoint: at both ends of slices that are evenly spread."""
    table = table.transpose() if keys else table
    spread = np.linspace(0, len(table) - 1, _RUNS // 2 if len(table) else 0)
    chosen = np.unique(spread.astype(np.int64))
    runs: list[tuple[int, int]] = []
    for q0, q1 in sorted(table.data[chosen, :2].tolist()):
        for start in (q0, max(q0, q1 - _RUN_ROWS)):
            start = max(start, runs[-1][1] if runs else 0)
            runs += [(start, min(q1, start + _RUN_ROWS))] if start < q1 else []
    return runs


def reference_rows(sample: Sample) -> Results:
    """out, lse and dq of the sampled query rows by `reference`; dk and dv are left to `_key_gradients`."""
    runs = sampled_runs(sample.table)
    rows = _index(runs, sample.q.device)
    q, dout = sample.q[rows], sample.dout[rows]
    table = _only(sample.table, runs)
    few = sample._replace(table=table, q=q, dout=dout)
    return BoundKernel(ReferenceBackend(), few)()


def find_fault(sample: Sample, got: Results, expected: Results) -> str:
    """Where a kernel's results are wrong, in words; "" if they agree.

    expected: of the sampled query rows. dk and dv are compared given the kernel's own out and lse.
    """
    seen = torch.from_numpy(rows_that_see(sample.table, len(sample.q))).to(got.lse.device)
    if not torch.equal(torch.isfinite(got.lse).all(1), seen) or (got.out[~seen] != 0).any():
        return "rows that see nothing and rows that see something are not told apart"
    for name, t in got._asdict().items():
        if name != "lse" and not torch.isfinite(t).all():
            return f"{name} has NaN or infinity"
    rows = _index(sampled_runs(sample.table), sample.q.device)
    keys = _index(sampled_runs(sample.table, keys=True), sample.q.device)
    mine = Results(*(t[rows] for t in got[:3]), *(t[keys] for t in got[3:]))
    truth = expected._replace(**_key_gradients(sample, got))
    return _compare(mine, truth, sample.problem.dtype)


def rows_that_see(table: SliceTable, num_rows: int) -> np.ndarray:
    """bool [num_rows]: whether a query row sees any key. Every row of a canonical slice sees one."""
    counts = np.zeros(num_rows + 1, dtype=np.int64)
    np.add.at(counts, table.q0, 1)
    np.add.at(counts, table.q1, -1)
    return counts.cumsum()[:-1] > 0


def _key_gradients(sample: Sample, got: Results) -> dict[str, Tensor]:
    """dk and dv of the sampled keys by `reference`, from a kernel's out and lse."""
    runs = sampled_runs(sample.table, keys=True)
    table = _only(sample.table.transpose(), runs).transpose()
    keys = _index(runs, sample.q.device)
    k, v = sample.k[keys], sample.v[keys]
    backend, q = ReferenceBackend(), sample.q
    work = backend.prepare(table, len(q), len(k), q.device)
    dq, dk, dv = (torch.zeros(t.shape, dtype=got.lse.dtype, device=q.device) for t in (q, k, v))
    queries = Returning(sample.dout, q, got.out, blind_to_inf(got.lse), dq)
    backend.backward(queries, KeyRows(k, v), work, sample.scoring, KeyRows(dk, dv))
    return {"dk": dk, "dv": dv}


def _compare(mine: Results, truth: Results, dtype: torch.dtype) -> str:
    """Row by row: half the digits of the dtype must agree, and of lse, which is summed in fp32, three decimals.

    The gradients of scores are small differences, so dq is measured by out beside itself, dk by dv: sums with the same
    weights that nothing cancels.
    """
    most = torch.finfo(dtype).eps ** 0.5
    error = (mine.lse - truth.lse).abs().nan_to_num(0.0).max().item() if len(mine.lse) else 0.0
    if error > (bound := min(1e-3, most)):
        return f"lse is off by {error:.2g} in a row ({bound:.2g} is allowed)"
    for name, beside in (("out", truth.out), ("dq", truth.out), ("dk", truth.dv), ("dv", truth.dv)):
        right = getattr(truth, name)
        size = torch.maximum(_norms(right), _norms(beside)).clamp_min(1e-30)
        off = (_norms(getattr(mine, name).double() - right.double()) / size).max().item() if len(size) else 0.0
        if off > most:
            return f"{name} is off by {off:.2g} of its size in a row ({most:.2g} is allowed)"
    return ""


def _norms(x: Tensor) -> Tensor:
    """Root mean square of each row."""
    return x.double().flatten(1).square().mean(1).sqrt()


def _index(runs: list[tuple[int, int]], device: torch.device) -> Tensor:
    parts = [np.arange(a, b) for a, b in runs] or [np.zeros(0, dtype=np.int64)]
    return torch.from_numpy(np.concatenate(parts)).to(device)


def _only(table: SliceTable, runs: list[tuple[int, int]]) -> SliceTable:
    """What the rows of the runs see, as rows of a buffer that has these alone."""
    everywhere, parts, at = np.arange(len(table)), [SliceTable.empty()], 0
    for start, end in runs:
        parts.append(_rows_of(table, everywhere, start, end).shift(at - start, 0))
        at += end - start
    return SliceTable.concat(parts)


def _rows_of(table: SliceTable, parents: IntArray, start: int, end: int) -> SliceTable:
    lots = np.iinfo(np.int32).max
    ends = (np.full(len(table), x) for x in (start, end, -lots, lots))
    return table.crop(parents, *ends).table


def _timed(run: Callable[[], Results], device: torch.device) -> float:
    """Seconds of a run."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
