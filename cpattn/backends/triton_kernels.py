"""Attention over banded rectangles in Triton: one launch for out and lse, one for dq, one for dk and dv.

A program owns a block of rows and a head, and walks the block's spans (`cpattn.solver.block_lists`) straight in the
buffers: whole tiles first, without a mask, then the edges. It keeps its sums in registers and merges them into the
accumulators at the end, so nothing is gathered, no partial result is stored, and no two programs write a row.

What a tile hides is chosen away, never multiplied by 0: keys outside a span are not loaded, and where a block mixes
rows of a slice with others (`mixed`), the others keep their sums, so a NaN stays in its document.

Source: arXiv:1805.02867 (online softmax), arXiv:2307.08691 (the order of the loops).

Importing this module needs triton. Legend: Q query rows, K key rows, N query heads, G key heads, D head dim of queries
and keys, E head dim of values. The last dimension of every tensor is contiguous. Scores are in units of log 2.
"""

# triton reads annotations: none are postponed here.
import triton
import triton.language as tl

# Constants of the kernels, which may read no other globals.

_LN2 = tl.constexpr(0.6931471805599453)
_INF = tl.constexpr(float("inf"))


@triton.jit
def _load_rows(base, rows, stride, inside, num_cols: tl.constexpr, width: tl.constexpr, masked: tl.constexpr):
    """[rows, width] of a buffer; zeros beyond its columns and, where masked, outside."""
    cols = tl.arange(0, width)
    at = base + rows[:, None] * stride + cols[None, :]
    if masked:
        if num_cols == width:
            return tl.load(at, mask=inside[:, None], other=0.0)
        return tl.load(at, mask=inside[:, None] & (cols < num_cols)[None, :], other=0.0)
    if num_cols == width:
        return tl.load(at)
    return tl.load(at, mask=(cols < num_cols)[None, :], other=0.0)


@triton.jit
def _dot(a, b, wide: tl.constexpr):
    """wide: operands are made fp32 first; the interpreter has no products of bf16."""
    if wide:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _dot_add(a, b, acc, mine, mixed: tl.constexpr, wide: tl.constexpr):
    """acc + a @ b; if mixed, only in the rows that are `mine`: in the others a is 0, and b may hold NaN."""
    if mixed:
        return acc + tl.where(mine[:, None], _dot(a, b, wide), 0.0)
    if wide:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def _visible(rows, keys, mine, here, lo, hi, mixed: tl.constexpr):
    """[rows, keys]: lo <= key - row <= hi, keys that are here and, if mixed, rows that are mine."""
    diff = keys[None, :] - rows[:, None]
    visible = here[None, :] & (diff >= lo) & (diff <= hi)
    if mixed:
        visible = visible & mine[:, None]
    return visible


@triton.jit
def _scores(a, b, factor, cap, capped: tl.constexpr, wide: tl.constexpr):
    """a @ b in units of log 2, and the slope of the cap (1 without one).

    factor: scale / ln 2, and with a cap scale / softcap; cap: softcap / ln 2.
    """
    scores = _dot(a, b, wide) * factor
    if capped:
        decay = tl.exp2(tl.abs(scores) * -2.8853900817779268)  # e ** -2x, in (0, 1]: no overflow
        tanh = (1 - decay) / (1 + decay)
        tanh = tl.where(scores < 0, -tanh, tanh)
        return cap * tanh, 1 - tanh * tanh
    return scores, 1.0


@triton.jit
def _forward_tile(
    acc, top, total, q, rows, k_base, v_base, stride_k, stride_v, key, key_end, row0, row1, lo, hi, factor, cap,
    masked: tl.constexpr, head_dim: tl.constexpr, head_dim_v: tl.constexpr, width: tl.constexpr,
    width_v: tl.constexpr, tile_keys: tl.constexpr, capped: tl.constexpr, mixed: tl.constexpr, wide: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax: sums acc [rows, E] and total [rows], relative to 2 ** top."""
    nth = tl.arange(0, tile_keys)
    here = key + nth < key_end
    k = _load_rows(k_base + tl.cast(key, tl.int64) * stride_k, nth, stride_k, here, head_dim, width, masked)
    scores, _ = _scores(q, tl.trans(k), factor, cap, capped, wide)
    mine = (rows >= row0) & (rows < row1)
    if masked:
        scores = tl.where(_visible(rows, key + nth, mine, here, lo, hi, mixed), scores, -_INF)
    new_top = tl.maximum(top, tl.max(scores, 1))
    # A row that has seen no key yet is relative to 2 ** 0: -inf - -inf would be NaN.
    shift = tl.where(new_top == -_INF, 0.0, new_top)
    p = tl.exp2(scores - shift[:, None])
    fade = tl.exp2(top - shift)
    v = _load_rows(v_base + tl.cast(key, tl.int64) * stride_v, nth, stride_v, here, head_dim_v, width_v, masked)
    acc = _dot_add(p.to(v.dtype), v, acc * fade[:, None], mine, masked and mixed, wide)
    return acc, new_top, total * fade + tl.sum(p, 1)


@triton.jit
def forward_kernel(
    q_QND, k_KGD, v_KGE, out_QNE, lse_QN, blocks, full, edges, factor, cap,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_ot, stride_oh, stride_lt, stride_lh,
    groups: tl.constexpr, head_dim: tl.constexpr, head_dim_v: tl.constexpr, width: tl.constexpr,
    width_v: tl.constexpr, tile_rows: tl.constexpr, tile_keys: tl.constexpr, capped: tl.constexpr,
    mixed: tl.constexpr, fresh: tl.constexpr, wide: tl.constexpr,
):  # fmt: skip
    """Attention of a block of query rows and a head, merged into out and lse (stored if fresh)."""
    block, head = blocks + tl.program_id(0) * 6, tl.program_id(1).to(tl.int64)
    first, last = tl.load(block), tl.load(block + 1)
    nth = tl.arange(0, tile_rows)
    rows, exists = first + nth, first + nth < last
    start = first.to(tl.int64)
    q_base = q_QND + start * stride_qt + head * stride_qh
    q = _load_rows(q_base, nth, stride_qt, exists, head_dim, width, True)
    k_base, v_base = k_KGD + (head // groups) * stride_kh, v_KGE + (head // groups) * stride_vh
    acc = tl.zeros([tile_rows, width_v], tl.float32)
    top = tl.full([tile_rows], -_INF, tl.float32)
    total = tl.zeros([tile_rows], tl.float32)
    for span in range(tl.load(block + 2), tl.load(block + 3)):
        for key in tl.range(tl.load(full + span * 2), tl.load(full + span * 2 + 1), tile_keys):
            acc, top, total = _forward_tile(
                acc, top, total, q, rows, k_base, v_base, stride_kt, stride_vt, key, 0, 0, 0, 0, 0, factor, cap,
                False, head_dim, head_dim_v, width, width_v, tile_keys, capped, mixed, wide,
            )  # fmt: skip
    for span in range(tl.load(block + 4), tl.load(block + 5)):
        edge = edges + span * 6
        key_end, row0, row1 = tl.load(edge + 1), tl.load(edge + 2), tl.load(edge + 3)
        lo, hi = tl.load(edge + 4), tl.load(edge + 5)
        for key in tl.range(tl.load(edge), key_end, tile_keys):
            acc, top, total = _forward_tile(
                acc, top, total, q, rows, k_base, v_base, stride_kt, stride_vt, key, key_end, row0, row1, lo, hi,
                factor, cap, True, head_dim, head_dim_v, width, width_v, tile_keys, capped, mixed, wide,
            )  # fmt: skip
    blind = total == 0.0
    out = acc / tl.where(blind, 1.0, total)[:, None]
    lse = tl.where(blind, -_INF, top * _LN2 + tl.log(tl.where(blind, 1.0, total)))
    lse_at = lse_QN + start * stride_lt + nth * stride_lt + head * stride_lh
    cols = tl.arange(0, width_v)
    out_at = out_QNE + start * stride_ot + head * stride_oh + nth[:, None] * stride_ot + cols[None, :]
    inside = exists[:, None] & (cols < head_dim_v)[None, :]
    if not fresh:
        before = tl.load(lse_at, mask=exists, other=-_INF)
        high = tl.maximum(before, lse)
        shift = tl.where(high == -_INF, 0.0, high)
        old, new = tl.exp(before - shift), tl.exp(lse - shift)
        both = old + new
        weight = tl.where(both == 0.0, 0.0, new / tl.where(both == 0.0, 1.0, both))
        out_before = tl.load(out_at, mask=inside, other=0.0).to(tl.float32)
        out = tl.where(blind[:, None], out_before, out_before + weight[:, None] * (out - out_before))
        lse = tl.where(blind, before, shift + tl.log(tl.where(both == 0.0, 1.0, both)))
    tl.store(out_at, out.to(out_QNE.dtype.element_ty), mask=inside)
    tl.store(lse_at, lse, mask=exists)


@triton.jit
def _dq_tile(
    acc, q, dout, lse, delta, rows, k_base, v_base, stride_k, stride_v, key, key_end, row0, row1, lo, hi, factor, cap,
    masked: tl.constexpr, head_dim: tl.constexpr, head_dim_v: tl.constexpr, width: tl.constexpr,
    width_v: tl.constexpr, tile_keys: tl.constexpr, capped: tl.constexpr, mixed: tl.constexpr, wide: tl.constexpr,
):  # fmt: skip
    nth = tl.arange(0, tile_keys)
    here = key + nth < key_end
    k = _load_rows(k_base + tl.cast(key, tl.int64) * stride_k, nth, stride_k, here, head_dim, width, masked)
    v = _load_rows(v_base + tl.cast(key, tl.int64) * stride_v, nth, stride_v, here, head_dim_v, width_v, masked)
    scores, slope = _scores(q, tl.trans(k), factor, cap, capped, wide)
    ds = tl.exp2(scores - lse[:, None]) * (_dot(dout, tl.trans(v), wide) - delta[:, None])
    if capped:
        ds = ds * slope
    mine = (rows >= row0) & (rows < row1)
    if masked:
        ds = tl.where(_visible(rows, key + nth, mine, here, lo, hi, mixed), ds, 0.0)
    return _dot_add(ds.to(k.dtype), k, acc, mine, masked and mixed, wide)


@triton.jit
def dq_kernel(
    dout_QNE, q_QND, k_KGD, v_KGE, out_QNE, lse_QN, delta_NQ, dq_QND, blocks, full, edges, factor, cap, scale,
    num_queries, stride_gt, stride_gh, stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_ot,
    stride_oh, stride_lt, stride_lh, stride_dt, stride_dh,
    groups: tl.constexpr, head_dim: tl.constexpr, head_dim_v: tl.constexpr, width: tl.constexpr,
    width_v: tl.constexpr, tile_rows: tl.constexpr, tile_keys: tl.constexpr, capped: tl.constexpr,
    mixed: tl.constexpr, fresh: tl.constexpr, wide: tl.constexpr,
):  # fmt: skip
    """dq of a block of query rows and a head, added in place; stores delta, which `dkv_kernel` reads."""
    block, head = blocks + tl.program_id(0) * 6, tl.program_id(1).to(tl.int64)
    first, last = tl.load(block), tl.load(block + 1)
    nth = tl.arange(0, tile_rows)
    rows, exists = first + nth, first + nth < last
    start = first.to(tl.int64)
    q = _load_rows(q_QND + start * stride_qt + head * stride_qh, nth, stride_qt, exists, head_dim, width, True)
    dout_base = dout_QNE + start * stride_gt + head * stride_gh
    dout = _load_rows(dout_base, nth, stride_gt, exists, head_dim_v, width_v, True)
    out_base = out_QNE + start * stride_ot + head * stride_oh
    out = _load_rows(out_base, nth, stride_ot, exists, head_dim_v, width_v, True)
    delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(delta_NQ + head * num_queries + start + nth, delta, mask=exists)
    lse = tl.load(lse_QN + start * stride_lt + nth * stride_lt + head * stride_lh, mask=exists, other=_INF) / _LN2
    lse = tl.where(lse == -_INF, _INF, lse)  # a row that sees nothing: probabilities 0
    k_base, v_base = k_KGD + (head // groups) * stride_kh, v_KGE + (head // groups) * stride_vh
    acc = tl.zeros([tile_rows, width], tl.float32)
    for span in range(tl.load(block + 2), tl.load(block + 3)):
        for key in tl.range(tl.load(full + span * 2), tl.load(full + span * 2 + 1), tile_keys):
            acc = _dq_tile(
                acc, q, dout, lse, delta, rows, k_base, v_base, stride_kt, stride_vt, key, 0, 0, 0, 0, 0, factor,
                cap, False, head_dim, head_dim_v, width, width_v, tile_keys, capped, mixed, wide,
            )  # fmt: skip
    for span in range(tl.load(block + 4), tl.load(block + 5)):
        edge = edges + span * 6
        key_end, row0, row1 = tl.load(edge + 1), tl.load(edge + 2), tl.load(edge + 3)
        lo, hi = tl.load(edge + 4), tl.load(edge + 5)
        for key in tl.range(tl.load(edge), key_end, tile_keys):
            acc = _dq_tile(
                acc, q, dout, lse, delta, rows, k_base, v_base, stride_kt, stride_vt, key, key_end, row0, row1, lo,
                hi, factor, cap, True, head_dim, head_dim_v, width, width_v, tile_keys, capped, mixed, wide,
            )  # fmt: skip
    dq_base = dq_QND + start * stride_dt + head * stride_dh
    _add_rows(dq_base, nth, stride_dt, exists, acc * scale, head_dim, width, fresh)


@triton.jit
def _add_rows(base, rows, stride, exists, values, num_cols: tl.constexpr, width: tl.constexpr, fresh: tl.constexpr):
    """Add values [rows, width] to a buffer's rows in place; store them if fresh."""
    cols = tl.arange(0, width)
    at = base + rows[:, None] * stride + cols[None, :]
    inside = exists[:, None] & (cols < num_cols)[None, :]
    if not fresh:
        values = tl.load(at, mask=inside, other=0.0).to(tl.float32) + values
    tl.store(at, values.to(base.dtype.element_ty), mask=inside)


@triton.jit
def _dkv_tile(
    dk, dv, k, v, keys, q_base, dout_base, lse_base, delta_base, stride_q, stride_g, stride_l, row, row_end, key0, key1,
    lo, hi, factor, cap, masked: tl.constexpr, head_dim: tl.constexpr, head_dim_v: tl.constexpr, width: tl.constexpr,
    width_v: tl.constexpr, tile_rows: tl.constexpr, capped: tl.constexpr, mixed: tl.constexpr, wide: tl.constexpr,
):  # fmt: skip
    """lo, hi: of the transposed slice: lo <= i - j <= hi."""
    nth, start = tl.arange(0, tile_rows), tl.cast(row, tl.int64)
    here = row + nth < row_end
    q = _load_rows(q_base + start * stride_q, nth, stride_q, here, head_dim, width, masked)
    dout = _load_rows(dout_base + start * stride_g, nth, stride_g, here, head_dim_v, width_v, masked)
    lse_at, delta_at = lse_base + start * stride_l + nth * stride_l, delta_base + row + nth
    if masked:
        lse, delta = tl.load(lse_at, mask=here, other=_INF), tl.load(delta_at, mask=here, other=0.0)
    else:
        lse, delta = tl.load(lse_at), tl.load(delta_at)
    lse = tl.where(lse == -_INF, _INF, lse)
    scores, slope = _scores(k, tl.trans(q), factor, cap, capped, wide)
    p = tl.exp2(scores - (lse / _LN2)[None, :])
    mine = (keys >= key0) & (keys < key1)
    if masked:
        visible = _visible(keys, row + nth, mine, here, lo, hi, mixed)
        p = tl.where(visible, p, 0.0)
    dv = _dot_add(p.to(dout.dtype), dout, dv, mine, masked and mixed, wide)
    ds = p * (_dot(v, tl.trans(dout), wide) - delta[None, :])
    if capped:
        ds = ds * slope
    if masked:
        ds = tl.where(visible, ds, 0.0)
    return _dot_add(ds.to(q.dtype), q, dk, mine, masked and mixed, wide), dv


@triton.jit
def dkv_kernel(
    dout_QNE, q_QND, k_KGD, v_KGE, lse_QN, delta_NQ, dk_KGD, dv_KGE, blocks, full, edges, factor, cap, scale,
    num_queries, stride_gt, stride_gh, stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_lt,
    stride_lh, stride_dkt, stride_dkh, stride_dvt, stride_dvh,
    groups: tl.constexpr, head_dim: tl.constexpr, head_dim_v: tl.constexpr, width: tl.constexpr,
    width_v: tl.constexpr, tile_rows: tl.constexpr, tile_keys: tl.constexpr, capped: tl.constexpr,
    mixed: tl.constexpr, fresh: tl.constexpr, wide: tl.constexpr,
):  # fmt: skip
    """dk and dv of a block of key rows and a key head, added in place: the sum over its query heads, in order."""
    block, kv_head = blocks + tl.program_id(0) * 6, tl.program_id(1).to(tl.int64)
    first, last = tl.load(block), tl.load(block + 1)
    nth = tl.arange(0, tile_keys)
    keys, exists = first + nth, first + nth < last
    start = first.to(tl.int64)
    k_base = k_KGD + start * stride_kt + kv_head * stride_kh
    k = _load_rows(k_base, nth, stride_kt, exists, head_dim, width, True)
    v_base = v_KGE + start * stride_vt + kv_head * stride_vh
    v = _load_rows(v_base, nth, stride_vt, exists, head_dim_v, width_v, True)
    dk = tl.zeros([tile_keys, width], tl.float32)
    dv = tl.zeros([tile_keys, width_v], tl.float32)
    for head in range(kv_head * groups, kv_head * groups + groups):
        q_base, dout_base = q_QND + head * stride_qh, dout_QNE + head * stride_gh
        lse_base, delta_base = lse_QN + head * stride_lh, delta_NQ + head * num_queries
        for span in range(tl.load(block + 2), tl.load(block + 3)):
            for row in tl.range(tl.load(full + span * 2), tl.load(full + span * 2 + 1), tile_rows):
                dk, dv = _dkv_tile(
                    dk, dv, k, v, keys, q_base, dout_base, lse_base, delta_base, stride_qt, stride_gt, stride_lt,
                    row, 0, 0, 0, 0, 0, factor, cap, False, head_dim, head_dim_v, width, width_v, tile_rows, capped,
                    mixed, wide,
                )  # fmt: skip
        for span in range(tl.load(block + 4), tl.load(block + 5)):
            edge = edges + span * 6
            row_end, key0, key1 = tl.load(edge + 1), tl.load(edge + 2), tl.load(edge + 3)
            lo, hi = tl.load(edge + 4), tl.load(edge + 5)
            for row in tl.range(tl.load(edge), row_end, tile_rows):
                dk, dv = _dkv_tile(
                    dk, dv, k, v, keys, q_base, dout_base, lse_base, delta_base, stride_qt, stride_gt, stride_lt,
                    row, row_end, key0, key1, lo, hi, factor, cap, True, head_dim, head_dim_v, width, width_v,
                    tile_rows, capped, mixed, wide,
                )  # fmt: skip
    dk_base = dk_KGD + start * stride_dkt + kv_head * stride_dkh
    dv_base = dv_KGE + start * stride_dvt + kv_head * stride_dvh
    _add_rows(dk_base, nth, stride_dkt, exists, dk * scale, head_dim, width, fresh)
    _add_rows(dv_base, nth, stride_dvt, exists, dv, head_dim_v, width_v, fresh)
