"""`fused_attn_fwd` and `fused_attn_bwd`: TransformerEngine's fused attention, on this project's backends.

The arguments, their order and the results are those of `transformer_engine.pytorch.cpp_extensions.fused_attn`.
Sequences become banded rectangles in a `SliceTable`, a `Backend` computes them with fp32 accumulators (fp64 for fp64
inputs), and sinks are folded into the log-sum-exp afterwards. Bias, dropout, 8-bit probabilities and max_logit run on
the dense maths of the `reference` backend.

Shape legend: R rows, N query heads, G key heads, D and E head dims of q/k and of v, B sequences.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from cpattn.backends import Problem, choose_backend
from cpattn.backends.base import Attending, KeyRows, Returning, Scoring
from cpattn.runtime.sinks import fold_sink, row_delta, sink_gradient

from . import dense
from .call import FusedCall, RowTensors, common_arguments
from .layouts import (
    check_disjoint,
    from_rows,
    packed_like,
    parse_layout,
    to_rows,
)
from .orders import either_order
from .quantizers import Fp8Tensor, Quantizer, dequantized
from .refusals import refuse_call, te_refusal
from .te_import import call_te

Implementation = Literal["portable", "te"]


@either_order(
    after="qkv_layout", added=("o_format", "qkv_scale_inv_format"), dropped=None, told_by="attn_bias_type"
)
@torch.no_grad()  # as the original: its result has no graph, so a backward through it is an error
def fused_attn_fwd(
    is_training: bool,
    max_seqlen_q: int,
    max_seqlen_kv: int,
    cu_seqlens_q: Tensor,
    cu_seqlens_kv: Tensor,
    q: Tensor | Fp8Tensor,
    k: Tensor | Fp8Tensor,
    v: Tensor | Fp8Tensor,
    fake_dtype: torch.dtype | None = None,
    fused_attention_backend: Any = None,
    attn_bias: Tensor | None = None,
    cu_seqlens_q_padded: Tensor | None = None,
    cu_seqlens_kv_padded: Tensor | None = None,
    page_table_k: Tensor | None = None,
    page_table_v: Tensor | None = None,
    s_quantizer: Quantizer | None = None,
    o_quantizer: Quantizer | None = None,
    attn_scale: float | None = None,
    dropout: float = 0.0,
    fast_zero_fill: bool = True,
    qkv_layout: str = "sbh3d",
    attn_bias_type: str = "no_bias",
    attn_mask_type: str = "padding",
    softmax_type: str = "vanilla",
    window_size: tuple[int, int] = (-1, -1),
    bottom_right_diagonal: bool | None = None,
    rng_gen: torch.Generator | None = None,
    softmax_offset: Tensor | None = None,
    return_max_logit: bool = False,
    cuda_graph: bool = False,
    *,
    o_format: str | None = None,
    qkv_scale_inv_format: str | None = None,
    impl: Implementation = "portable",
    backend: str = "auto",
) -> tuple[Any, ...]:
    """Attention of a batch of sequences, forward. By position in the order of 2.12, as here, or of 2.20 and 2.21.

    For each sequence, with its valid lengths sq and sk: scores = attn_scale * q k^T + bias, masked; the softmax over
    them, with a further logit in its denominator (0 for off-by-one, softmax_offset for learnable); dropout; times v.

    Args:
        is_training: with False the auxiliary tensors come all the same; dropout must be 0.
        max_seqlen_q, max_seqlen_kv: padded lengths (bshd, sbhd), bounds on the lengths (thd), or pages times page
            size (paged).
        cu_seqlens_q, cu_seqlens_kv: int32 [B + 1]; lengths by difference. Read on the host. Masks without "padding"
            ignore them.
        q: [B, S, N, D] and the like, or [t, N, D]; fp16, bf16, and here also fp32 and fp64; or Fp8Tensor.
        k, v: the same with G heads (N % G == 0); v may have another head dim in layouts that store it apart. Paged:
            [num_pages, page_size, G, D] (bshd) or [page_size, num_pages, G, D] (sbhd).
        fake_dtype: dtype of the result for Fp8Tensors; None is theirs.
        fused_attention_backend: TransformerEngine's choice of kernel; here without effect.
        attn_bias: [1 or B, 1 or N, 1 or max_seqlen_q, max_seqlen_kv] with attn_bias_type "post_scale_bias".
        cu_seqlens_q_padded, cu_seqlens_kv_padded: int32 [B + 1], thd: the first row of each sequence. None: packed.
        page_table_k, page_table_v: int32 [B, pages].
        s_quantizer, o_quantizer: rounding of the probabilities, and the format of the result.
        attn_scale: None is 1 / sqrt(D).
        dropout: probability. The mask is a hash of (rng_state, sequence, head, query, key): not TransformerEngine's
            stream, but the same on every device and for every kernel block.
        qkv_layout: see `LAYOUTS`.
        attn_mask_type: no_mask, padding, causal, padding_causal, causal_bottom_right, padding_causal_bottom_right.
        softmax_type: vanilla, off-by-one, learnable.
        window_size: (left, right), -1 unbounded: query i sees keys D - left .. D + right, D = i or i + sk - sq.
            Causal masks have right 0.
        bottom_right_diagonal: D = i + sk - sq; None: for the *_bottom_right masks.
        rng_gen: generator for dropout; None is torch's default CPU one.
        softmax_offset: fp32 [1, N, 1, 1].
        return_max_logit: also return the largest visible score of each head, sinks apart.
        cuda_graph: refused: lengths are read on the host.
        o_format: of the result: sbhd, bshd, bhsd, or thd where q has it; None is q's (the original's default is sbhd).
        qkv_scale_inv_format: without effect: an Fp8Tensor knows where its scales belong.
        impl: "te" hands the call to TransformerEngine where that is installed.
        backend: local kernel, as in `make_key`.

    Returns:
        (out, aux) or (out, aux, max_logit [N]). out in o_format with v's head dim, padding rows 0; an Fp8Tensor
        with o_quantizer. aux = [stats, rng_state, bias if any, softmax_offset if any]; stats fp32 (fp64 for fp64),
        natural-log sum of exp of all logits: [B, N, S, 1], or [t, N, 1] for thd; -inf in rows that see nothing.
        rng_state int64 [seed, offset].

    Raises:
        ValueError: what TransformerEngine refuses, with its reason, and what it would read or write out of bounds.

    Source: TransformerEngine 2.12, transformer_engine/pytorch/csrc/extensions/attention.cpp (its contract; the code
    here is independent).
    """
    arguments = {name: value for name, value in locals().items() if name not in ("impl", "backend")}
    if impl == "te":
        reason = te_refusal(**arguments)
        if reason is not None:
            raise ValueError(f"TransformerEngine refuses this call: {reason}")
        return call_te(fused_attn_fwd, arguments)
    out_dtype = fake_dtype or q.dtype if isinstance(q, Fp8Tensor) else q.dtype
    q, k, v = (dequantized(t) for t in (q, k, v))
    common = common_arguments({**arguments, "q": q, "k": k, "v": v})
    refuse_call(is_training=is_training, **common)
    call = FusedCall.make(q, k, v, common)
    extras = dense.Extras(
        bias=attn_bias, dropout=dropout, rng_state=_new_rng_state(rng_gen, dropout), s_quantizer=s_quantizer
    )
    rows = call.rows(q, k, v, page_table_k, page_table_v)
    out, lse = _accumulators(rows, call.num_rows)
    _forward(call, rows, extras, backend, out, lse)
    maximum = _max_logit(call, rows, extras) if return_max_logit else None
    sink = _sink(softmax_type, softmax_offset, lse)
    if sink is not None:
        lse = fold_sink(out, lse, sink, where=call.valid_rows(lse.device))
    result: Any = from_rows(out.to(out_dtype), call.format_of("o_format", o_format), call.batch)
    if o_quantizer is not None:
        result = o_quantizer.quantize(result)
    aux: list[Any] = [call.stats(lse), extras.rng_state]
    if attn_bias is not None:
        aux.append(attn_bias)
    if softmax_type == "learnable":
        aux.append(softmax_offset)
    return (result, aux) if maximum is None else (result, aux, maximum)


@either_order(
    after="qkv_layout",
    added=("o_format", "do_format", "dqkv_layout", "qkv_scale_inv_format", "do_scale_inv_format"),
    dropped="dqkv_dtype",
    told_by="dqkv_dtype",
)
@torch.no_grad()
def fused_attn_bwd(
    max_seqlen_q: int,
    max_seqlen_kv: int,
    cu_seqlens_q: Tensor,
    cu_seqlens_kv: Tensor,
    q: Tensor | Fp8Tensor,
    k: Tensor | Fp8Tensor,
    v: Tensor | Fp8Tensor,
    o: Tensor | Fp8Tensor,
    d_o: Tensor | Fp8Tensor,
    fake_dtype: torch.dtype | None = None,
    dqkv_dtype: Any = None,
    aux_ctx_tensors: Sequence[Tensor] = (),
    fused_attention_backend: Any = None,
    cu_seqlens_q_padded: Tensor | None = None,
    cu_seqlens_kv_padded: Tensor | None = None,
    s_quantizer: Quantizer | None = None,
    dp_quantizer: Quantizer | None = None,
    dqkv_quantizer: Quantizer | None = None,
    attn_scale: float | None = None,
    dropout: float = 0.0,
    fast_zero_fill: bool = True,
    qkv_layout: str = "sbh3d",
    attn_bias_type: str = "no_bias",
    attn_mask_type: str = "padding",
    softmax_type: str = "vanilla",
    window_size: tuple[int, int] = (-1, -1),
    bottom_right_diagonal: bool | None = None,
    deterministic: bool = False,
    cuda_graph: bool = False,
    *,
    o_format: str | None = None,
    do_format: str | None = None,
    dqkv_layout: str | None = None,
    qkv_scale_inv_format: str | None = None,
    do_scale_inv_format: str | None = None,
    impl: Implementation = "portable",
    backend: str = "auto",
) -> tuple[Any, ...]:
    """Gradients of `fused_attn_fwd`. By position in the order of 2.12, as here, or of 2.20 and 2.21.

    Nothing of the softmax is recomputed but the scores: `o` and the stats are inputs. With those of a whole attention
    and a part of its keys, the result is the exact share of that part.

    Args:
        o, d_o: result and its gradient, in o_format and do_format (None: q's) with v's head dim.
        dqkv_layout: of dq, dk and dv; None is qkv_layout.
        dqkv_dtype: without effect; gradients have q's dtype (TransformerEngine 2.20 dropped the argument, 2.12 has
            it here).
        aux_ctx_tensors: as `fused_attn_fwd` returned them.
        s_quantizer, dp_quantizer, dqkv_quantizer: rounding of probabilities and of score gradients, and the format
            of dq, dk, dv.
        deterministic: without effect: every result repeats bit for bit on CPU, and on CUDA follows the backend.
        The others: as in `fused_attn_fwd`.

    Returns:
        [dq, dk, dv, dbias or None, dsoftmax_offset or None]. dq, dk, dv as dqkv_layout stores them (interleaved ones
        are views of one buffer), 0 in padding rows; dbias in the bias's shape and dtype; dsoftmax_offset fp32
        [1, N, 1, 1].

    Raises:
        ValueError: as in `fused_attn_fwd`; also for paged layouts, which have no backward, and for key slots that
            overlap, which TransformerEngine would overwrite.
    """
    arguments = {name: value for name, value in locals().items() if name not in ("impl", "backend")}
    if impl == "te":
        reason = te_refusal(**arguments)
        if reason is not None:
            raise ValueError(f"TransformerEngine refuses this call: {reason}")
        return tuple(call_te(fused_attn_bwd, arguments))
    if parse_layout(qkv_layout).paged:
        raise ValueError(f"qkv_layout {qkv_layout!r}: paged attention has no backward (it is for inference)")
    stats, rng_state, bias, softmax_offset = _unpack_aux(aux_ctx_tensors, attn_bias_type, softmax_type)
    dtype = fake_dtype or q.dtype if isinstance(q, Fp8Tensor) else q.dtype
    q, k, v, o, d_o = (dequantized(t) for t in (q, k, v, o, d_o))
    read = {"q": q, "k": k, "v": v, "attn_bias": bias, "softmax_offset": softmax_offset}
    common = common_arguments({**arguments, **read})
    refuse_call(is_training=True, **common)
    call = FusedCall.make(q, k, v, common)
    check_disjoint(call.k_rows, "dk and dv")
    extras = dense.Extras(bias, dropout, rng_state, s_quantizer, dp_quantizer)
    rows = call.rows(q, k, v, None, None)
    out, dout = to_rows(o, call.format_of("o_format", o_format)), to_rows(d_o, call.format_of("do_format", do_format))
    lse = call.stats_to_rows(stats).to(rows.accumulator)
    lse = lse.masked_fill(lse == -torch.inf, torch.inf)  # exp(score - inf) = 0: no NaN from rows that see nothing
    grads = [torch.zeros(t.shape, dtype=rows.accumulator, device=t.device) for t in (rows.q, rows.k, rows.v)]
    dbias = None if bias is None else torch.zeros(bias.shape, dtype=rows.accumulator, device=bias.device)
    _backward(call, rows, extras, backend, (dout, out, lse), grads, dbias)
    layout, formats = call.gradient_layout(dqkv_layout)
    parts = [from_rows(g.to(dtype), f, call.batch) for g, f in zip(grads, formats, strict=True)]
    stored: tuple[Any, ...] = packed_like(layout, parts)
    if dqkv_quantizer is not None:
        stored = tuple(dqkv_quantizer.quantize(t) for t in stored)
    dsink = None
    if softmax_type == "learnable":
        assert softmax_offset is not None
        delta = row_delta(dout, out, lse.dtype).masked_fill(~call.valid_rows(lse.device), 0.0)
        dsink = sink_gradient(delta, lse, softmax_offset.reshape(-1)).view(1, -1, 1, 1)
    return (*stored, None if dbias is None or bias is None else dbias.to(bias.dtype), dsink)


class FusedAttention(torch.autograd.Function):
    """`fused_attn_fwd` and `fused_attn_bwd` as one differentiable function; use `fused_attn`.

    Once: a second derivative is an error. Lengths and offsets are those of forward, whatever is written to their
    tensors afterwards.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, offset: Tensor | None, call: dict[str, Any]
    ) -> Tensor:
        inputs = {**call, "q": q, "k": k, "v": v, "attn_bias": bias, "softmax_offset": offset}
        out, aux = fused_attn_fwd(True, **inputs)[:2]
        ctx.save_for_backward(q, k, v, out, *aux)
        ctx.call = {name: _own(value) for name, value in call.items() if name in _BACKWARD_ARGUMENTS}
        ctx.call["do_format"] = call.get("o_format")
        ctx.has_bias = bias is not None
        return out  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        dq, dk, dv, dbias, doffset = _FusedGradient.apply(ctx.call, dout, *ctx.saved_tensors)
        return dq, dk, dv, dbias if ctx.has_bias else None, doffset, None


class _FusedGradient(torch.autograd.Function):
    """`fused_attn_bwd` in a graph, so that a derivative of it is an error and not a silent zero."""

    @staticmethod
    def forward(ctx: Any, call: dict[str, Any], dout: Tensor, *saved: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, *aux = saved
        return fused_attn_bwd(q=q, k=k, v=v, o=out, d_o=dout, aux_ctx_tensors=aux, **call)[:5]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[None, ...]:
        raise RuntimeError(
            "fused_attn has no second derivative: do without create_graph, or write the attention in plain torch"
        )


def _own(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


_BACKWARD_ARGUMENTS = frozenset(
    [
        "max_seqlen_q",
        "max_seqlen_kv",
        "cu_seqlens_q",
        "cu_seqlens_kv",
        "cu_seqlens_q_padded",
        "cu_seqlens_kv_padded",
        "attn_scale",
        "dropout",
        "qkv_layout",
        "attn_bias_type",
        "attn_mask_type",
        "softmax_type",
        "window_size",
        "bottom_right_diagonal",
        "impl",
        "backend",
        "fake_dtype",
        "s_quantizer",
        "dp_quantizer",
        "deterministic",
        "o_format",
    ]
)


def fused_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_kv: Tensor,
    max_seqlen_q: int,
    max_seqlen_kv: int,
    *,
    attn_bias: Tensor | None = None,
    softmax_offset: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """`fused_attn_fwd` with gradients for q, k, v, the bias and the softmax offset.

    Args:
        options: the further arguments of `fused_attn_fwd` by name; `dp_quantizer` goes to the backward.

    Returns:
        out, as in `fused_attn_fwd`. Interleaved q, k, v passed as views of one buffer get their gradient through
        those views.
    """
    call = {
        "cu_seqlens_q": cu_seqlens_q,
        "cu_seqlens_kv": cu_seqlens_kv,
        "max_seqlen_q": max_seqlen_q,
        "max_seqlen_kv": max_seqlen_kv,
        **options,
    }
    return FusedAttention.apply(q, k, v, attn_bias, softmax_offset, call)  # type: ignore[no-any-return]


def _forward(
    call: FusedCall, rows: RowTensors, extras: dense.Extras, backend: str, out_RNE: Tensor, lse_RN: Tensor
) -> None:
    if not len(call.table):
        return
    if extras.bias is not None or extras.dropout or extras.s_quantizer is not None:
        queries = Attending(rows.q, out_RNE, lse_RN)
        dense.forward(queries, KeyRows(rows.k, rows.v), call.sequences(), extras, call.scale)
        return
    kernel = choose_backend(_problem(rows), backend)
    work = kernel.prepare(call.table, rows.q.shape[0], rows.k.shape[0], rows.q.device)
    q, scale, _ = _positive_scale(rows.q, call.scale)
    kernel.forward(Attending(q, out_RNE, lse_RN), KeyRows(rows.k, rows.v), work, Scoring(scale))


def _backward(
    call: FusedCall,
    rows: RowTensors,
    extras: dense.Extras,
    backend: str,
    results: tuple[Tensor, Tensor, Tensor],
    grads: list[Tensor],
    dbias: Tensor | None,
) -> None:
    if not len(call.table):
        return
    dout, out, lse = results
    dq, dk, dv = grads
    keys, dkeys = KeyRows(rows.k, rows.v), KeyRows(dk, dv)
    dout, out = (t if t.stride(-1) == 1 and 0 not in t.stride() else t.contiguous() for t in (dout, out))
    quantized = extras.s_quantizer is not None or extras.dp_quantizer is not None
    if extras.bias is not None or extras.dropout or quantized:
        queries = Returning(dout, rows.q, out, lse, dq)
        dense.backward(queries, keys, call.sequences(), extras, call.scale, dkeys, dbias)
        return
    kernel = choose_backend(_problem(rows), backend)
    work = kernel.prepare(call.table, rows.q.shape[0], rows.k.shape[0], rows.q.device)
    q, scale, sign = _positive_scale(rows.q, call.scale)
    queries = Returning(dout.to(q.dtype), q, out.to(q.dtype), lse.contiguous(), dq)
    kernel.backward(queries, keys, work, Scoring(scale), dkeys)
    if sign != 1:
        dq *= sign


def _positive_scale(q: Tensor, scale: float) -> tuple[Tensor, float, int]:
    """q and scale with the same scores and a scale above 0, and the factor from q to that q.

    Fused kernels multiply masked scores of -inf by the scale.
    """
    if scale > 0:
        return q, scale, 1
    return (-q, -scale, -1) if scale < 0 else (torch.zeros_like(q), 1.0, 0)


def _max_logit(call: FusedCall, rows: RowTensors, extras: dense.Extras) -> Tensor:
    return dense.max_logit(rows.q, rows.k, call.sequences(), extras, scale=call.scale, dtype=rows.accumulator)


def _problem(rows: RowTensors) -> Problem:
    return Problem(rows.q.device.type, rows.q.dtype, rows.q.shape[1], rows.k.shape[1], rows.k.shape[2], rows.v.shape[2])


def _accumulators(rows: RowTensors, num_rows: int) -> tuple[Tensor, Tensor]:
    num_heads, device = rows.q.shape[1], rows.q.device
    out = torch.zeros(num_rows, num_heads, rows.v.shape[2], dtype=rows.accumulator, device=device)
    return out, torch.full((num_rows, num_heads), -math.inf, dtype=rows.accumulator, device=device)


def _sink(softmax_type: str, softmax_offset: Tensor | None, lse_RN: Tensor) -> Tensor | None:
    """The further logit of each head, [N], or None."""
    if softmax_type == "vanilla":
        return None
    if softmax_type == "off-by-one":
        return lse_RN.new_zeros(lse_RN.shape[1])
    assert softmax_offset is not None
    return softmax_offset.detach().reshape(-1).to(lse_RN.dtype)


def _new_rng_state(generator: torch.Generator | None, dropout: float) -> Tensor:
    """int64 [seed, offset]; draws the offset from the generator only where dropout needs one."""
    if not dropout:
        return torch.zeros(2, dtype=torch.int64)
    generator = generator or torch.default_generator
    offset = torch.randint(1 << 62, (1,), generator=generator, device=generator.device).cpu()
    seed = generator.initial_seed()
    return torch.cat([torch.tensor([seed & (1 << 63) - 1], dtype=torch.int64), offset])


def _unpack_aux(
    aux: Sequence[Tensor], attn_bias_type: str, softmax_type: str
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    rest = list(aux)
    expected = 2 + (attn_bias_type == "post_scale_bias") + (softmax_type == "learnable")
    if len(rest) < expected:
        raise ValueError(
            f"aux_ctx_tensors has {len(rest)} tensors: expected {expected} from fused_attn_fwd (stats, rng_state, and "
            f"the bias and the softmax offset where there are such)"
        )
    stats, rng_state = rest[:2]
    bias = rest[2] if attn_bias_type == "post_scale_bias" else None
    return stats, rng_state, bias, rest[-1] if softmax_type == "learnable" else None
