"""Fakes of TransformerEngine's fused attention, of cuDNN's Python graphs, and of FFA."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from itertools import pairwise
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .dense import attend, attend_backward, band, check_rows, require

BREAKABLE = ("top_left", "lse_base_2", "local_lse", "ignores_window", "no_scale", "packed_starts", "max_not_added")


class _Engine:
    """Sequences at offsets; what the two cuDNN front ends have in common."""

    def __init__(self, broken: str | None) -> None:
        self.broken = broken

    def sequences(
        self,
        lengths: tuple[list[int], list[int]],
        starts: tuple[list[int], list[int]],
        window: tuple[int, int],
        bottom_right: bool,
        sizes: tuple[int, int],
    ) -> list[tuple[slice, slice, Tensor]]:
        found = []
        packed = [0, 0]
        for n, (rows, keys) in enumerate(zip(*lengths, strict=True)):
            if rows == 0:
                continue
            at = packed if self.broken == "packed_starts" else [starts[0][n], starts[1][n]]
            require(at[0] + rows <= sizes[0] and at[1] + keys <= sizes[1], "a sequence leaves the buffer")
            visible = band(
                rows,
                keys,
                *((-1, -1) if self.broken == "ignores_window" else window),
                bottom_right=bottom_right and self.broken != "top_left",
            )
            require(self.broken is not None or bool(visible.any(1).all()), "a row without any key is undefined")
            found.append((slice(at[0], at[0] + rows), slice(at[1], at[1] + keys), visible))
            packed = [packed[0] + rows, packed[1] + keys]
        return found

    def forward(self, q: Tensor, k: Tensor, v: Tensor, sequences: Any, scale: float) -> tuple[Tensor, Tensor]:
        _disjoint([s[0] for s in sequences], "queries of a forward call overlap")
        out = torch.full((*q.shape[:2], v.shape[-1]), torch.nan)
        stats = torch.full(q.shape[:2], torch.nan)
        scale = 1.0 if self.broken == "no_scale" else scale
        for rows, keys, visible in sequences:
            out[rows], stats[rows] = attend(q[rows], k[keys], v[keys], visible, scale)
            if self.broken == "max_not_added":
                scores = torch.einsum("tnd,sd->tns", q[rows].float(), k[keys, 0].float()) * scale
                stats[rows] -= scores.masked_fill(~visible[:, None], -torch.inf).amax(-1)
        if self.broken == "lse_base_2":
            stats *= 1.4426950408889634
        return out.to(q.dtype), stats

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        stats: Tensor,
        sequences: Any,
        scale: float,
    ) -> list[Tensor]:
        _disjoint([s[0] for s in sequences], "queries of a backward call overlap")
        _disjoint([s[1] for s in sequences], "keys of a backward call overlap")
        grads = [torch.full(t.shape, torch.nan) for t in (q, k, v)]
        scale = 1.0 if self.broken == "no_scale" else scale
        for rows, keys, visible in sequences:
            sums = stats[rows]
            if self.broken == "local_lse":
                sums = attend(q[rows], k[keys], v[keys], visible, scale)[1]
            part = attend_backward(dout[rows], q[rows], k[keys], v[keys], out[rows], sums, visible, scale)
            grads[0][rows], grads[1][keys], grads[2][keys] = part
        return [g.to(q.dtype) for g in grads]


def _disjoint(ranges: list[slice], message: str) -> None:
    ordered = sorted((r.start, r.stop) for r in ranges)
    require(all(a[1] <= b[0] for a, b in pairwise(ordered)), message)


def transformer_engine(broken: str | None = None, *, version: str = "2.12") -> dict[str, ModuleType]:
    """`...cpp_extensions.fused_attn` and `...constants`, with the arguments of 2.12 or 2.20."""
    engine = _Engine(broken)
    module = ModuleType("transformer_engine.pytorch.cpp_extensions.fused_attn")
    constants = ModuleType("transformer_engine.pytorch.constants")
    constants.TE_DType = {torch.bfloat16: "kBFloat16", torch.float16: "kFloat16"}  # type: ignore[attr-defined]
    backends: Any = {"F16_arbitrary_seqlen": "F16_arbitrary_seqlen"}
    if version == "2.20":
        backends = Enum("FusedAttnBackend", {"F16_arbitrary_seqlen": 1, "FP8": 2})
    module.FusedAttnBackend = backends  # type: ignore[attr-defined]

    def sequences(a: SimpleNamespace) -> Any:
        require(a.qkv_layout == "thd_thd_thd", f"layout {a.qkv_layout}")
        require(a.fused_attention_backend == backends["F16_arbitrary_seqlen"], "backend")
        require(a.fake_dtype == a.q.dtype, "fake_dtype")
        check_rows(a.q, a.k, a.v, max_head_dim=256, same_dims=False)
        require(all(t.is_contiguous() for t in (a.q, a.k, a.v)), "q, k and v must be contiguous")
        for name in ("cu_seqlens_q", "cu_seqlens_kv", "cu_seqlens_q_padded", "cu_seqlens_kv_padded"):
            value = getattr(a, name)
            require(value is not None, f"{name} is None: a null pointer is dereferenced")
            require(value.dtype == torch.int32, f"{name} is {value.dtype}")
            require(value.shape == a.cu_seqlens_q.shape, f"{name} has shape {tuple(value.shape)}")
        lengths = tuple(t.diff().tolist() for t in (a.cu_seqlens_q, a.cu_seqlens_kv))
        starts = tuple(t[:-1].tolist() for t in (a.cu_seqlens_q_padded, a.cu_seqlens_kv_padded))
        require(a.cu_seqlens_q_padded[-1].item() <= len(a.q), "the filler offset leaves the buffer")
        require(max(lengths[0]) <= a.max_seqlen_q and max(lengths[1]) <= a.max_seqlen_kv, "max_seqlen")
        require(a.attn_mask_type in ("padding", "padding_causal", "padding_causal_bottom_right"), "ragged mask")
        bottom_right = a.bottom_right_diagonal
        if bottom_right is None:
            bottom_right = a.attn_mask_type == "padding_causal_bottom_right"
        if bottom_right or a.window_size != (-1, -1):
            require(a.max_seqlen_q <= a.max_seqlen_kv, "the selector refuses more queries than keys here")
        causal = a.attn_mask_type != "padding"
        left, right = a.window_size
        require(not causal or right in (-1, 0), "a causal window has nothing on its right")
        sizes = len(a.q), len(a.k)
        return engine.sequences(lengths, starts, (left, 0 if causal else right), bottom_right, sizes)  # type: ignore[arg-type]

    def forward(a: SimpleNamespace) -> tuple[Any, ...]:
        require(a.is_training, "statistics are kept for training only")
        out, stats = engine.forward(a.q, a.k, a.v, sequences(a), a.attn_scale)
        out = out.nan_to_num(nan=0.0) if broken is None else out  # thd: out is zero-filled, stats are not
        return out, [stats.unsqueeze(-1), torch.zeros(2, dtype=torch.int64)]

    def backward(a: SimpleNamespace) -> tuple[Any, ...]:
        stats, rng_state = a.aux_ctx_tensors
        require(stats.shape == (*a.q.shape[:2], 1) and stats.dtype == torch.float32, "shape of the statistics")
        require(stats.is_contiguous() and rng_state.dtype == torch.int64, "statistics or rng state")
        require(a.o.dtype == a.q.dtype and a.d_o.dtype == a.q.dtype, "dtype of o or d_o")
        require(a.max_seqlen_q > 1 or a.max_seqlen_kv > 1, "backward refuses one row by one key")
        require(not a.deterministic, "takes memory quadratic in tokens")
        grads = engine.backward(a.d_o, a.q, a.k, a.v, a.o, stats[..., 0], sequences(a), a.attn_scale)
        return (*grads, None, None)

    if version == "2.12":

        def fused_attn_fwd(
            is_training,
            max_seqlen_q,
            max_seqlen_kv,
            cu_seqlens_q,
            cu_seqlens_kv,
            q,
            k,
            v,
            fake_dtype,
            fused_attention_backend,
            attn_bias=None,
            cu_seqlens_q_padded=None,
            cu_seqlens_kv_padded=None,
            attn_scale=None,
            dropout=0.0,
            fast_zero_fill=True,
            qkv_layout="sbh3d",
            attn_bias_type="no_bias",
            attn_mask_type="padding",
            softmax_type="vanilla",
            window_size=(-1, -1),
            bottom_right_diagonal=None,
        ):
            return forward(SimpleNamespace(**locals()))

        def fused_attn_bwd(
            max_seqlen_q,
            max_seqlen_kv,
            cu_seqlens_q,
            cu_seqlens_kv,
            q,
            k,
            v,
            o,
            d_o,
            fake_dtype,
            dqkv_dtype,
            aux_ctx_tensors,
            fused_attention_backend,
            cu_seqlens_q_padded=None,
            cu_seqlens_kv_padded=None,
            attn_scale=None,
            dropout=0.0,
            fast_zero_fill=True,
            qkv_layout="sbh3d",
            attn_bias_type="no_bias",
            attn_mask_type="padding",
            softmax_type="vanilla",
            window_size=(-1, -1),
            bottom_right_diagonal=None,
            deterministic=False,
        ):
            require(dqkv_dtype == constants.TE_DType[q.dtype], "dqkv_dtype")
            return backward(SimpleNamespace(**locals()))

    else:

        def fused_attn_fwd(
            is_training,
            max_seqlen_q,
            max_seqlen_kv,
            cu_seqlens_q,
            cu_seqlens_kv,
            q,
            k,
            v,
            fake_dtype,
            fused_attention_backend,
            attn_bias=None,
            cu_seqlens_q_padded=None,
            cu_seqlens_kv_padded=None,
            attn_scale=None,
            qkv_layout="sbh3d",
            o_format="sbhd",
            attn_mask_type="padding",
            window_size=(-1, -1),
            bottom_right_diagonal=None,
        ):
            require(o_format == "thd", "o_format")
            return forward(SimpleNamespace(**locals()))

        def fused_attn_bwd(
            max_seqlen_q,
            max_seqlen_kv,
            cu_seqlens_q,
            cu_seqlens_kv,
            q,
            k,
            v,
            o,
            d_o,
            fake_dtype,
            aux_ctx_tensors,
            fused_attention_backend,
            cu_seqlens_q_padded=None,
            cu_seqlens_kv_padded=None,
            attn_scale=None,
            qkv_layout="sbh3d",
            o_format="sbhd",
            do_format="sbhd",
            dqkv_layout="sbh3d",
            attn_mask_type="padding",
            window_size=(-1, -1),
            bottom_right_diagonal=None,
            deterministic=False,
        ):
            require((o_format, do_format, dqkv_layout) == ("thd", "thd", "thd_thd_thd"), "formats")
            return backward(SimpleNamespace(**locals()))

    module.fused_attn_fwd = fused_attn_fwd  # type: ignore[attr-defined]
    module.fused_attn_bwd = fused_attn_bwd  # type: ignore[attr-defined]
    return {m.__name__: m for m in (module, constants)}


class _GraphTensor:
    """A tensor of a graph: what was said about it."""

    def __init__(self, dim: list[int] | None = None, stride: list[int] | None = None, kind: Any = None) -> None:
        self.dim, self.stride, self.kind, self.output, self.ragged = dim, stride, kind, False, None

    def set_dim(self, dim: list[int]) -> _GraphTensor:
        self.dim = dim
        return self

    def set_stride(self, stride: list[int]) -> _GraphTensor:
        self.stride = stride
        return self

    def set_data_type(self, kind: Any) -> _GraphTensor:
        self.kind = kind
        return self

    def set_output(self, output: bool) -> _GraphTensor:
        self.output = output
        return self

    def set_ragged_offset(self, offset: _GraphTensor) -> _GraphTensor:
        self.ragged = offset  # type: ignore[assignment]
        return self


def _backward_workspace(node: SimpleNamespace) -> int:
    """Bytes that the front end asks for: dq in fp32, a sum for each row, for grouped heads dk and dv of all heads.

    Sized by the total lengths where they are given and every head dim is a multiple of 16, else by the padded batch.
    Source: nvidia-cudnn-frontend 1.32.0, scaled_dot_product_flash_attention.h, SDPA backward node:
    infer_properties_node and expand_node (softmax_sum_size, dQ_accum_size, dK_fullhead_size, dV_fullhead_size).
    """
    (batch, heads, padded_q, dim), (_, heads_kv, padded_k, _) = node.q.dim, node.k.dim
    rows_q, rows_k = batch * padded_q, batch * padded_k
    if dim % 16 == 0 and node.max_total_seq_len_q is not None:
        rows_q, rows_k = node.max_total_seq_len_q, node.max_total_seq_len_kv
    expanded = 2 * rows_k * heads * dim if heads != heads_kv else 0
    return 4 * (rows_q * heads * (dim + 1) + expanded)


def cudnn(broken: str | None = None, *, version: int = 91900) -> ModuleType:
    """`cudnn` 1.18 on a cuDNN of that version: graphs that must be built step by step before they execute.

    Source: nvidia-cudnn-frontend 1.18.0, python/pygraph; the order of steps and what `validate` refuses are its own.
    """
    module = ModuleType("cudnn")
    engine = _Engine(broken)
    data_type = Enum("data_type", "NOT_SET FLOAT HALF BFLOAT16 INT32 INT64")
    alignment = Enum("diagonal_alignment", "TOP_LEFT BOTTOM_RIGHT")
    steps = ("validate", "build_operation_graph", "create_execution_plans", "check_support", "build_plans")
    width = {"FLOAT": torch.float32, "HALF": torch.float16, "BFLOAT16": torch.bfloat16}
    width |= {"INT32": torch.int32, "INT64": torch.int64}

    class Graph:
        def __init__(self, *, io_data_type: Any, intermediate_data_type: Any, compute_data_type: Any, handle: Any):
            self.done: list[str] = []
            self.node: SimpleNamespace | None = None

        def tensor(self, *, name: str, dim: list[int], stride: list[int], data_type: Any) -> _GraphTensor:
            return _GraphTensor(dim, stride, data_type)

        def sdpa(
            self,
            *,
            name: str,
            q: Any,
            k: Any,
            v: Any,
            attn_scale: float,
            use_padding_mask: bool = False,
            seq_len_q: Any = None,
            seq_len_kv: Any = None,
            diagonal_alignment: Any = alignment.TOP_LEFT,
            diagonal_band_left_bound: int | None = None,
            diagonal_band_right_bound: int | None = None,
            generate_stats: bool | None = None,
        ) -> tuple[_GraphTensor, _GraphTensor]:
            require(bool(generate_stats), "no statistics")
            self.node = SimpleNamespace(**locals(), backward=False, out=_GraphTensor(), stats=_GraphTensor())
            return self.node.out, self.node.stats

        def sdpa_backward(
            self,
            *,
            name: str,
            q: Any,
            k: Any,
            v: Any,
            o: Any,
            dO: Any,
            stats: Any,
            attn_scale: float,
            use_padding_mask: bool = False,
            seq_len_q: Any = None,
            seq_len_kv: Any = None,
            max_total_seq_len_q: int | None = None,
            max_total_seq_len_kv: int | None = None,
            diagonal_alignment: Any = alignment.TOP_LEFT,
            diagonal_band_left_bound: int | None = None,
            diagonal_band_right_bound: int | None = None,
            use_deterministic_algorithm: bool = False,
        ) -> list[_GraphTensor]:
            self.node = SimpleNamespace(**locals(), backward=True, grads=[_GraphTensor() for _ in range(3)])
            return self.node.grads  # type: ignore[no-any-return]

        def _step(self, name: str) -> None:
            require(steps[len(self.done)] == name, f"{name} after {self.done}")
            self.done.append(name)

        def validate(self) -> None:
            self._step("validate")
            a = self.node
            assert a is not None
            require(a.use_padding_mask and a.seq_len_q is not None, "ragged rows need a padding mask")
            tensors = [a.q, a.k, a.v, *((a.o, a.dO, a.stats, *a.grads) if a.backward else (a.out, a.stats))]
            require(all(t.ragged is not None for t in tensors), "ragged offset of every tensor")
            outputs = a.grads if a.backward else [a.out, a.stats]
            require(all(t.output and t.kind is not None for t in outputs), "an output is virtual")
            require(a.q.dim[3] % 8 == 0 and a.q.dim[3] <= 256, "head dim")
            require(a.diagonal_band_left_bound is None or a.diagonal_band_left_bound >= 1, "left bound")

        def build_operation_graph(self) -> None:
            self._step("build_operation_graph")

        def create_execution_plans(self, modes: list[Any]) -> None:
            self._step("create_execution_plans")

        def check_support(self) -> None:
            self._step("check_support")

        def build_plans(self) -> None:
            self._step("build_plans")

        def get_workspace_size(self) -> int:
            return _backward_workspace(self.node) if self.node is not None and self.node.backward else 0

        def execute(self, buffers: dict[Any, Tensor], workspace: Tensor, handle: Any) -> None:
            require(tuple(self.done) == steps, "the graph is not built")
            a = self.node
            assert a is not None
            for described, buffer in buffers.items():
                require(buffer.dtype == width[described.kind.name], f"buffer is {buffer.dtype}")
                require(buffer.is_contiguous(), "a buffer is not contiguous")
            batch, heads, max_q, dim = a.q.dim
            heads_kv, max_k = a.k.dim[1], a.k.dim[2]
            lengths = tuple(buffers[t].flatten().tolist() for t in (a.seq_len_q, a.seq_len_kv))
            require(len(lengths[0]) == batch and max(lengths[0]) <= max_q and max(lengths[1]) <= max_k, "lengths")
            require(max_q > 1 or max_k > 1, "one row by one key")
            starts = []
            for t, row in ((a.q, heads * dim), (a.k, heads_kv * dim)):
                offsets = buffers[t.ragged]
                require(offsets.numel() == batch + 1, "offsets")
                require(bool((offsets % row == 0).all()), "offsets are counted in elements")
                starts.append((offsets.flatten()[:-1] // row).tolist())
            stats_offsets = buffers[a.stats.ragged].flatten()[:-1]
            require((stats_offsets // heads).tolist() == starts[0], "offsets of the statistics")
            require(workspace.numel() >= self.get_workspace_size(), "the workspace is too small")
            if a.backward:
                for t, total, held in ((a.q, a.max_total_seq_len_q, 0), (a.k, a.max_total_seq_len_kv, 1)):
                    require(total is None or total >= len(buffers[t]), f"rows {held} leave the workspace")
            left = -1 if a.diagonal_band_left_bound is None else a.diagonal_band_left_bound - 1
            right = -1 if a.diagonal_band_right_bound is None else a.diagonal_band_right_bound
            q, k, v = buffers[a.q], buffers[a.k], buffers[a.v]
            sequences = engine.sequences(
                lengths,  # type: ignore[arg-type]
                tuple(starts),  # type: ignore[arg-type]
                (left, right),
                a.diagonal_alignment == alignment.BOTTOM_RIGHT,
                (len(q), len(k)),
            )
            if a.backward:
                rows = (buffers[a.dO], q, k, v, buffers[a.o], buffers[a.stats])
                for t, grad in zip(a.grads, engine.backward(*rows, sequences, a.attn_scale), strict=True):
                    buffers[t].copy_(grad)
            else:
                out, stats = engine.forward(q, k, v, sequences, a.attn_scale)
                buffers[a.out].copy_(out)
                buffers[a.stats].copy_(stats)

    module.pygraph = Graph  # type: ignore[attr-defined]
    module.data_type = data_type  # type: ignore[attr-defined]
    module.diagonal_alignment = alignment  # type: ignore[attr-defined]
    module.heur_mode = Enum("heur_mode", "A FALLBACK")  # type: ignore[attr-defined]
    module.create_handle = object  # type: ignore[attr-defined]
    module.backend_version = lambda: version  # type: ignore[attr-defined]
    return module


@dataclass
class AttnForwardMeta:
    """What FFA's forward returns beside out. Source: MagiAttention v1.1.0, magi_attention/common/forward_meta.py."""

    lse: Tensor
    max_logits: Tensor | None


def ffa(broken: str | None = None, *, token_major: bool = True, meta: bool = True) -> ModuleType:
    """`magi_attention.functional.flex_flash_attn`; lse [T, N] with sinks (token_major), [N, T] before.

    meta: lse comes in an `AttnForwardMeta`, as from 1.1.0 on; 1.0.5 returned the tensor.
    Source: MagiAttention v1.0.5 and v1.1.0, magi_attention/functional/flex_flash_attn.py, _flex_flash_attn_forward.
    """
    module = ModuleType("magi_attention.functional.flex_flash_attn")

    def parts(a: SimpleNamespace) -> list[tuple[slice, slice, Tensor]]:
        check_rows(a.q, a.k, a.v, max_head_dim=128, same_dims=True)
        require(a.q.shape[-1] in (64, 128), "head dim")
        for x in (a.q_ranges, a.k_ranges, a.attn_type_map):
            require(x.dtype == torch.int32 and x.is_contiguous(), "ranges must be int32")
        found = []
        triples = zip(a.q_ranges.tolist(), a.k_ranges.tolist(), a.attn_type_map.tolist(), strict=True)
        for (q0, q1), (k0, k1), kind in triples:
            require(q0 < q1 <= len(a.q) and k0 < k1 <= len(a.k), "range")
            visible = torch.ones(q1 - q0, k1 - k0, dtype=torch.bool)
            if kind in (1, 3) and broken != "ignores_window":
                visible &= band(q1 - q0, k1 - k0, -1, 0, bottom_right=broken != "top_left")
            if kind in (2, 3) and broken != "ignores_window":
                visible &= band(q1 - q0, k1 - k0, 0, -1, bottom_right=False)
            found.append((slice(q0, q1), slice(k0, k1), visible))
        return found

    def whole(a: SimpleNamespace) -> Tensor:
        visible = torch.zeros(len(a.q), len(a.k), dtype=torch.bool)
        for rows, keys, part in parts(a):
            require(not (visible[rows, keys] & part).any(), "pairs are counted twice")
            visible[rows, keys] |= part
        return visible

    def forward(a: SimpleNamespace) -> tuple[Tensor, Tensor | AttnForwardMeta]:
        require(a.out_type == torch.float32 and not a.disable_fwd_atomic_reduction, "shared rows need fp32 sums")
        visible = whole(a)
        out, lse = attend(a.q, a.k, a.v, visible, 1.0 if broken == "no_scale" else a.softmax_scale, a.softcap)
        lse = lse * (1.4426950408889634 if broken == "lse_base_2" else 1.0)
        seen = visible.any(1)
        a.out[seen] = out[seen]
        lse = lse if token_major else lse.T.contiguous()
        return a.out, AttnForwardMeta(lse, None) if meta else lse

    def backward(a: SimpleNamespace) -> tuple[Any, ...]:
        visible = whole(a)
        lse = a.lse if token_major else a.lse.T
        require(lse.shape == a.q.shape[:2] and a.lse.is_contiguous(), f"lse is {tuple(a.lse.shape)}")
        scale = 1.0 if broken == "no_scale" else a.softmax_scale
        if broken == "local_lse":
            lse = attend(a.q, a.k, a.v, visible, scale, a.softcap)[1]
        grads = attend_backward(a.dout, a.q, a.k, a.v, a.out, lse, visible, scale, a.softcap)
        for target, grad in zip((a.dq, a.dk, a.dv), grads, strict=True):
            require(target.dtype == torch.float32, "gradients accumulate in fp32")
            target += grad
        return a.dq, a.dk, a.dv, None

    if token_major:

        def _flex_flash_attn_forward(
            q,
            k,
            v,
            sink,
            sink_layout,
            out,
            lse,
            q_ranges,
            k_ranges,
            attn_type_map,
            softmax_scale,
            softcap,
            out_type,
            disable_fwd_atomic_reduction,
            deterministic,
            sm_margin,
            ref_block_size=None,
            max_seqlen_q=None,
            auto_range_merge=False,
            merge_q_ranges=None,
            qk_map=None,
            fwd_unique_count=None,
        ):
            return forward(SimpleNamespace(**locals()))

        def _flex_flash_attn_backward(
            dout,
            q,
            k,
            v,
            sink,
            sink_layout,
            out,
            lse,
            dq,
            dk,
            dv,
            dsink,
            q_ranges,
            k_ranges,
            attn_type_map,
            softmax_scale,
            softcap,
            dq_type,
            dk_type,
            dv_type,
            disable_bwd_dkv_atomic_reduction,
            deterministic,
            sm_margin,
            auto_range_merge=False,
            merge_k_ranges=None,
            bwd_kq_map=None,
            bwd_unique_count=None,
        ):
            return backward(SimpleNamespace(**locals()))

    else:

        def _flex_flash_attn_forward(
            q,
            k,
            v,
            out,
            lse,
            q_ranges,
            k_ranges,
            max_seqlen_q,
            max_seqlen_k,
            attn_type_map,
            merge_q_ranges,
            qk_map,
            fwd_unique_count,
            ref_block_size,
            softmax_scale,
            softcap,
            disable_fwd_atomic_reduction,
            out_type,
            deterministic,
            sm_margin,
        ):
            return forward(SimpleNamespace(**locals()))

        def _flex_flash_attn_backward(
            dout,
            q,
            k,
            v,
            out,
            dq,
            dk,
            dv,
            lse,
            q_ranges,
            k_ranges,
            max_seqlen_q,
            max_seqlen_k,
            attn_type_map,
            merge_k_ranges,
            bwd_kq_map,
            bwd_unique_count,
            softmax_scale,
            softcap,
            disable_bwd_dkv_atomic_reduction,
            dq_type,
            dk_type,
            dv_type,
            deterministic,
            sm_margin,
        ):
            return backward(SimpleNamespace(**locals()))

    module._flex_flash_attn_forward = _flex_flash_attn_forward  # type: ignore[attr-defined]
    module._flex_flash_attn_backward = _flex_flash_attn_backward  # type: ignore[attr-defined]
    return module
