"""`cudnn`: cuDNN's attention through nvidia-cudnn-frontend's Python graphs, the kernels TE calls.

A graph is built once for its sizes and mask and executed with tensors. Sequences are ragged: their
first elements in `ragged_offset`, their lengths in `seq_len_q/kv`; so slices are sequences over the
buffers as they lie. Sizes are rounded up to powers of two, the rest of the batch has length 0.
What no sequence covers is not written. Statistics are the log-sum-exp, natural log, fp32, at the
offsets of their rows; backward takes them and out as inputs, so those of the whole attention go in.
A left bound of L + 1 lets a row see L keys back from its diagonal.
Source: nvidia-cudnn-frontend 1.18.0, `pygraph.sdpa`, `pygraph.sdpa_backward`.

Shape legend as in `base.py`; B sequences.
"""

from __future__ import annotations

import importlib
import os
import threading
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cpattn.solver import SliceTable
from cpattn.solver.rounds import CAUSAL_PIECE, INV_PIECE

from .base import Attending, KeyRows, Problem, Returning, Scoring, bucket, kernel_head_dim, pad_head_dim
from .installed import device_capability, failing_import, missing_package
from .offsets import Mask, OffsetCall, OffsetWork, plan_offsets, refuse_cudnn, within, writes_once
from .rows import add_rows, merge_rows, take_rows

_MIN_BATCH, _MIN_SEQLEN = 8, 128
# With another head dim the front end drops the total lengths and sizes backward's workspace by the padded batch.
_ALIGN_DIM = 16


class _GraphKey(NamedTuple):
    """Everything that a graph is built for.

    total_q, total_k: rows of the buffers that the ragged offsets may point to, which size what backward
        accumulates in; 0 in forward, which asks for nothing of the kind.
    """

    backward: bool
    dtype: torch.dtype
    batch: int
    max_seqlen_q: int
    max_seqlen_k: int
    total_q: int
    total_k: int
    num_heads_q: int
    num_heads_kv: int
    head_dim: int
    mask: Mask
    scale: float
    device: int
    deterministic: bool


class _Graph(NamedTuple):
    """A built graph and its tensors by name."""

    graph: Any
    tensors: dict[str, Any]
    workspace_bytes: int


# It tells the front end to take the linear one of Hopper's two deterministic backwards.
_LINEAR_SWITCH = "CUDNN_FRONTEND_ATTN_DP_WORKSPACE_LIMIT"


def _refuse_determinism() -> str | None:
    """Why backward cannot repeat bit for bit with memory linear in tokens.

    Source: nvidia-cudnn-frontend 1.32.0, scaled_dot_product_flash_attention.h (NVIDIA/cudnn-frontend#398): on Blackwell
    from cuDNN 9.18 on, on Hopper from 9.25 on and by an environment variable of the front end's, read when
    a graph is built; else it takes a workspace of padded queries by padded keys.
    """
    cudnn = importlib.import_module("cudnn")
    version, capability = cudnn.backend_version(), device_capability("cuda")
    if capability is not None and capability[0] >= 10:
        return None if version >= 91800 else f"its deterministic backward needs cuDNN 9.18, here is {version}"
    if version < 92500:
        return f"its deterministic backward takes memory quadratic in tokens before cuDNN 9.25, here is {version}"
    if os.environ.get(_LINEAR_SWITCH) != "0":
        return f"its deterministic backward takes memory quadratic in tokens unless {_LINEAR_SWITCH}=0 is set"
    return None


@dataclass(slots=True)
class CudnnBackend:
    """cuDNN's packed attention, without TransformerEngine."""

    device_type: str = "cuda"
    name: str = "cudnn"
    kernel: str = "cuDNN attention (nvidia-cudnn-frontend)"
    _graphs: dict[_GraphKey, _Graph] = field(default_factory=dict, repr=False)
    # cuDNN handles are not to be shared between threads (autograd has its own).
    _local: threading.local = field(default_factory=threading.local, repr=False)

    def refusal(self, problem: Problem) -> str | None:
        if missing := missing_package("cudnn", "nvidia-cudnn-frontend"):
            return missing
        if problem.device_type != self.device_type:
            return f"this kernel runs on {self.device_type}, the tensors are on {problem.device_type}"
        if refusal := refuse_cudnn(problem, self.device_type):
            return refusal
        if broken := failing_import("cudnn", "nvidia-cudnn-frontend"):
            return broken
        return _refuse_determinism() if torch.are_deterministic_algorithms_enabled() else None

    def prepare(
        self, slices: SliceTable, num_queries: int, num_keys: int, device: torch.device
    ) -> OffsetWork:
        return plan_offsets(slices, device)

    def writes_once(self, work: OffsetWork) -> bool:
        return writes_once(work)

    def forward(
        self, queries: Attending, keys: KeyRows, work: OffsetWork, scoring: Scoring, *, fresh: bool = False
    ) -> None:
        (q_QND, out_QNE, lse_QN), (k_KGD, v_KGE) = queries, keys
        head_dim, head_dim_v = kernel_head_dim(k_KGD, v_KGE, _ALIGN_DIM), v_KGE.shape[-1]
        q, k, v = (pad_head_dim(t, head_dim).contiguous() for t in (q_QND, k_KGD, v_KGE))
        for call in work.forward:
            q_, k_, v_ = q[call.q_span], k[call.k_span], v[call.k_span]
            out = torch.empty_like(q_)
            stats = torch.empty(q_.shape[:2], dtype=torch.float32, device=q.device)
            self._execute(
                _graph_key(call, q_, k_, scoring.scale, backward=False),
                call,
                {"q": q_, "k": k_, "v": v_, "out": out, "stats": stats},
            )
            rows = within(call.rows, call.q_span)
            part = take_rows(out, rows)[..., :head_dim_v], take_rows(stats, rows)
            merge_rows(out_QNE, lse_QN, call.rows, *part, first=fresh and call.first)

    def backward(
        self, queries: Returning, keys: KeyRows, work: OffsetWork, scoring: Scoring, dkeys: KeyRows
    ) -> None:
        (dout_QNE, q_QND, out_QNE, lse_QN, dq_QND), (k_KGD, v_KGE), (dk_KGD, dv_KGE) = queries, keys, dkeys
        head_dim, d, e = kernel_head_dim(k_KGD, v_KGE, _ALIGN_DIM), k_KGD.shape[-1], v_KGE.shape[-1]
        q, k, v, dout, out = (
            pad_head_dim(t.to(q_QND.dtype), head_dim).contiguous()
            for t in (q_QND, k_KGD, v_KGE, dout_QNE, out_QNE)
        )
        for call in work.backward:
            q_, k_, v_ = q[call.q_span], k[call.k_span], v[call.k_span]
            dq, dk, dv = torch.empty_like(q_), torch.empty_like(k_), torch.empty_like(v_)
            self._execute(
                _graph_key(call, q_, k_, scoring.scale, backward=True),
                call,
                {
                    "q": q_,
                    "k": k_,
                    "v": v_,
                    "out": out[call.q_span],
                    "dout": dout[call.q_span],
                    "stats": lse_QN[call.q_span].contiguous(),
                    "dq": dq,
                    "dk": dk,
                    "dv": dv,
                },
            )
            rows, k_rows = within(call.rows, call.q_span), within(call.keys, call.k_span)
            add_rows(dq_QND, call.rows, take_rows(dq, rows)[..., :d])
            add_rows(dk_KGD, call.keys, take_rows(dk, k_rows)[..., :d])
            add_rows(dv_KGE, call.keys, take_rows(dv, k_rows)[..., :e])

    def _execute(self, key: _GraphKey, call: OffsetCall, rows: dict[str, Tensor]) -> None:
        cudnn = importlib.import_module("cudnn")
        handle = self._handle(cudnn, rows["q"].device)
        if key not in self._graphs:
            self._graphs[key] = _build(cudnn, handle, key)
        graph, tensors, workspace_bytes = self._graphs[key]
        buffers = {tensors[name]: tensor for name, tensor in {**rows, **_ragged(key, call)}.items()}
        workspace = torch.empty(max(workspace_bytes, 1), dtype=torch.uint8, device=rows["q"].device)
        graph.execute(buffers, workspace, handle=handle)

    def _handle(self, cudnn: Any, device: torch.device) -> Any:
        handles = self._local.__dict__.setdefault("handles", {})
        if device not in handles:
            handles[device] = cudnn.create_handle()
        if device.type == "cuda":
            cudnn.set_stream(handles[device], torch.cuda.current_stream(device).cuda_stream)
        return handles[device]


def _graph_key(call: OffsetCall, q: Tensor, k: Tensor, scale: float, *, backward: bool) -> _GraphKey:
    return _GraphKey(
        backward,
        q.dtype,
        _power_of_two(len(call.lengths_q), _MIN_BATCH),
        _power_of_two(call.max_seqlen_q, _MIN_SEQLEN),
        _power_of_two(max(call.max_seqlen_k, call.max_seqlen_q), _MIN_SEQLEN),
        bucket(len(q)) if backward else 0,
        bucket(len(k)) if backward else 0,
        q.shape[1],
        k.shape[1],
        q.shape[2],
        call.mask,
        scale,
        q.device.index or 0,
        backward and torch.are_deterministic_algorithms_enabled(),
    )


def _power_of_two(n: int, least: int) -> int:
    return max(least, 1 << (n - 1).bit_length())


# What each tensor's rows are made of: offsets are counted in elements.
_PER_QUERY, _PER_KEY, _PER_STATISTIC = "offset_q", "offset_k", "offset_stats"


def _ragged(key: _GraphKey, call: OffsetCall) -> dict[str, Tensor]:
    sizes = ("cudnn", key.batch, key.num_heads_q, key.num_heads_kv, key.head_dim)
    if sizes not in call.cached:
        call.cached[sizes] = _make_ragged(key, call)
    ragged: dict[str, Tensor] = call.cached[sizes]
    return ragged


def _make_ragged(key: _GraphKey, call: OffsetCall) -> dict[str, Tensor]:
    """Lengths int32 [B, 1, 1, 1] and offsets int64 [B + 1, 1, 1, 1], filled up with empty sequences."""
    starts_q = _filled(call.starts_q, key.batch + 1, call.q_span.stop - call.q_span.start)
    starts_k = _filled(call.starts_k, key.batch + 1, call.k_span.stop - call.k_span.start)
    return {
        "seqlen_q": _filled(call.lengths_q, key.batch, 0).to(torch.int32),
        "seqlen_k": _filled(call.lengths_k, key.batch, 0).to(torch.int32),
        _PER_QUERY: starts_q * (key.num_heads_q * key.head_dim),
        _PER_KEY: starts_k * (key.num_heads_kv * key.head_dim),
        _PER_STATISTIC: starts_q * key.num_heads_q,
    }


def _filled(x: Tensor, length: int, value: int) -> Tensor:
    return torch.nn.functional.pad(x, (0, length - len(x)), value=value).view(-1, 1, 1, 1)


class _Description:
    """A graph that is being described: the tensors of the call, by name."""

    def __init__(self, cudnn: Any, handle: Any, key: _GraphKey) -> None:
        kind = cudnn.data_type
        self.key, self.io = key, kind.BFLOAT16 if key.dtype == torch.bfloat16 else kind.HALF
        self.graph = cudnn.pygraph(
            io_data_type=self.io, intermediate_data_type=kind.FLOAT, compute_data_type=kind.FLOAT, handle=handle
        )
        self.tensors: dict[str, Any] = {}
        for name, length, data_type in (
            ("seqlen_q", key.batch, kind.INT32),
            ("seqlen_k", key.batch, kind.INT32),
            (_PER_QUERY, key.batch + 1, kind.INT64),
            (_PER_KEY, key.batch + 1, kind.INT64),
            (_PER_STATISTIC, key.batch + 1, kind.INT64),
        ):
            self.tensors[name] = self._tensor(name, [length, 1, 1, 1], data_type)

    def given(self, name: str, role: str, data_type: Any = None) -> Any:
        """An input, of the dtype of the call if of no other."""
        tensor = self._tensor(name, [1, 1, 1, 1], self.io if data_type is None else data_type)
        self.tensors[name] = self._sized(tensor, role)
        return self.tensors[name]

    def asked(self, name: str, tensor: Any, role: str, data_type: Any = None) -> None:
        """An output."""
        tensor = tensor.set_output(True).set_data_type(self.io if data_type is None else data_type)
        self.tensors[name] = self._sized(tensor, role)

    def _tensor(self, name: str, dim: list[int], data_type: Any) -> Any:
        return self.graph.tensor(name=name, dim=dim, stride=[1, 1, 1, 1], data_type=data_type)

    def _sized(self, tensor: Any, role: str) -> Any:
        """Dims [B, heads, max_seqlen, head_dim] over rows [tokens, heads, head_dim]."""
        key = self.key
        heads = key.num_heads_kv if role == _PER_KEY else key.num_heads_q
        seqlen = key.max_seqlen_k if role == _PER_KEY else key.max_seqlen_q
        dim = 1 if role == _PER_STATISTIC else key.head_dim
        tensor.set_dim([key.batch, heads, seqlen, dim])
        tensor.set_stride([seqlen * heads * dim, dim, heads * dim, 1])
        tensor.set_ragged_offset(self.tensors[role])
        return tensor


def _build(cudnn: Any, handle: Any, key: _GraphKey) -> _Graph:
    """Describe the operation, let cuDNN choose an engine, compile it."""
    described = _Description(cudnn, handle, key)
    graph, tensors, given = described.graph, described.tensors, described.given
    inputs = {"q": given("q", _PER_QUERY), "k": given("k", _PER_KEY), "v": given("v", _PER_KEY)}
    options = {
        "attn_scale": key.scale,
        "use_padding_mask": True,
        "seq_len_q": tensors["seqlen_q"],
        "seq_len_kv": tensors["seqlen_k"],
        **_band(cudnn, key.mask),
    }
    if key.backward:
        grads = graph.sdpa_backward(
            name="attention_backward",
            **inputs,
            o=given("out", _PER_QUERY),
            dO=given("dout", _PER_QUERY),
            stats=given("stats", _PER_STATISTIC, cudnn.data_type.FLOAT),
            max_total_seq_len_q=key.total_q,
            max_total_seq_len_kv=key.total_k,
            use_deterministic_algorithm=key.deterministic,
            **options,
        )
        for name, grad, role in zip(("dq", "dk", "dv"), grads, (_PER_QUERY, _PER_KEY, _PER_KEY), strict=True):
            described.asked(name, grad, role)
    else:
        out, stats = graph.sdpa(name="attention", **inputs, generate_stats=True, **options)
        described.asked("out", out, _PER_QUERY)
        described.asked("stats", stats, _PER_STATISTIC, cudnn.data_type.FLOAT)
    graph.validate()
    graph.build_operation_graph()
    graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
    graph.check_support()
    graph.build_plans()
    return _Graph(graph, tensors, graph.get_workspace_size())


def _band(cudnn: Any, mask: Mask) -> dict[str, Any]:
    corner = cudnn.diagonal_alignment
    if mask.kind == CAUSAL_PIECE:
        left = {} if mask.left < 0 else {"diagonal_band_left_bound": mask.left + 1}
        return {"diagonal_alignment": corner.BOTTOM_RIGHT, "diagonal_band_right_bound": 0, **left}
    if mask.kind == INV_PIECE:
        return {"diagonal_alignment": corner.TOP_LEFT, "diagonal_band_left_bound": 1}
    return {}
