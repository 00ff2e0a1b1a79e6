"""The kernels of `row_kernels.py`, in Triton. Importing this module needs triton.

One program serves one row (merge, pack), a row's columns (add), or a tile of rows and heads (8-bit floats). Orders are
fixed: parts of a row are taken in the order of its segment.
"""

# triton reads annotations: none are postponed here.
import triton
import triton.language as tl

_INF = tl.constexpr(float("inf"))
_NAN = tl.constexpr(float("nan"))


@triton.jit
def _segment(rows, offsets, n, indexed: tl.constexpr, segmented: tl.constexpr):
    """The row that program n writes, and the range of its parts."""
    row = tl.cast(n, tl.int64)
    if indexed:
        row = tl.load(rows + n)
    if segmented:
        return row, tl.load(offsets + n), tl.load(offsets + n + 1)
    return row, tl.cast(n, tl.int64), tl.cast(n, tl.int64) + 1


@triton.jit
def merge_kernel(
    out_THD, lse_TH, part_out, part_lse, rows, offsets, order, num_heads, stride_ot, stride_oh, stride_lt, stride_lh,
    stride_pt, stride_ph, stride_mt, stride_mh, dim: tl.constexpr, width: tl.constexpr, heads: tl.constexpr,
    indexed: tl.constexpr, segmented: tl.constexpr,
):  # fmt: skip
    """Merge partial results into a row, one after the other; see `merge_partials`."""
    row, first, last = _segment(rows, offsets, tl.program_id(0), indexed, segmented)
    head, col = tl.arange(0, heads), tl.arange(0, width)
    has_head = head < num_heads
    inside = has_head[:, None] & (col < dim)[None, :]
    out_at = out_THD + row * stride_ot + head[:, None] * stride_oh + col[None, :]
    lse_at = lse_TH + row * stride_lt + head * stride_lh
    out = tl.load(out_at, mask=inside, other=0.0).to(tl.float32)
    lse = tl.load(lse_at, mask=has_head, other=-_INF)
    for nth in range(first, last):
        part = tl.cast(nth, tl.int64)
        if segmented:
            part = tl.load(order + nth)
        part_at = part_out + part * stride_pt + head[:, None] * stride_ph + col[None, :]
        other = tl.load(part_at, mask=inside, other=0.0).to(tl.float32)
        other_lse = tl.load(part_lse + part * stride_mt + head * stride_mh, mask=has_head, other=-_INF)
        out, lse = _merged(out, lse, other, other_lse)
    tl.store(out_at, out.to(out_THD.dtype.element_ty), mask=inside)
    tl.store(lse_at, lse, mask=has_head)


@triton.jit
def _merged(out, lse, other, other_lse):
    """One partial result merged into another, [heads, width] and [heads]."""
    diff = other_lse - lse
    weight = 1 / (1 + tl.exp(-diff))
    weight = tl.where(diff != diff, 0.0, weight)[:, None]  # neither has seen a key
    step = other - out
    out = tl.where(weight < 0.5, out + weight * step, other - step * (1 - weight))
    high = tl.maximum(lse, other_lse)
    return out, tl.where(high == -_INF, high, high + tl.log(1 + tl.exp(-tl.abs(diff))))


@triton.jit
def _load_of(number, parts, at, inside, other: tl.constexpr, count: tl.constexpr):
    """In fp32, from that one of several buffers; of none, `other`."""
    value = tl.full(at.shape, other, tl.float32)
    for nth in tl.static_range(count):
        if number == nth:
            value = tl.load(parts[nth] + at, mask=inside, other=other).to(tl.float32)
    return value


@triton.jit
def _and(inside, scalar):
    """inside & scalar; the interpreter makes numbers of a truth value that it repeats, and wants none in a mask."""
    return inside & (tl.zeros(inside.shape, tl.int32) + scalar.to(tl.int32) > 0)


@triton.jit
def _entries_of(offsets, order, row, fresh: tl.constexpr, converts: tl.constexpr):
    """The range of a row's entries, whether it is written, and whether there is anything to read before them.

    Of an entry the bits, from the lowest: the call in four, one for the first entry that a row has in any launch of a
    work; a call of 15 is none, so that a fresh row that none has anything for is written once.
    """
    first, last = tl.load(offsets + row), tl.load(offsets + row + 1)
    entry = tl.load(order + first, mask=last > first, other=15)
    written, seen = (entry & 15) != 15, first >= 0
    if fresh:
        written, seen = last > first, (entry & 16) == 0
    if converts:
        written = first >= 0
    return first, last, written, seen


@triton.jit
def merge_calls_kernel(
    out_THD, lse_TH, before_THD, parts, part_lses, num_rows, offsets, order, num_heads, stride_ot, stride_oh, stride_bt,
    stride_bh, stride_lt, stride_lh, stride_pt, stride_ph, dim: tl.constexpr, width: tl.constexpr, heads: tl.constexpr,
    count: tl.constexpr, fresh: tl.constexpr, converts: tl.constexpr,
):  # fmt: skip
    """Merge into a row what several calls of a kernel have for it, in their order. num_rows: of each call's results.

    fresh: rows have seen nothing before their first entry. converts: all rows are read from before_THD.
    """
    row = tl.program_id(0).to(tl.int64)
    first, last, written, seen = _entries_of(offsets, order, row, fresh, converts)
    head, col = tl.arange(0, heads), tl.arange(0, width)
    has_head = _and(head < num_heads, written)
    inside = has_head[:, None] & (col < dim)[None, :]
    out_at = out_THD + row * stride_ot + head[:, None] * stride_oh + col[None, :]
    lse_at = lse_TH + row * stride_lt + head * stride_lh
    before_at = out_at
    if converts:
        before_at = before_THD + row * stride_bt + head[:, None] * stride_bh + col[None, :]
    out = tl.load(before_at, mask=_and(inside, seen), other=0.0).to(tl.float32)
    lse = tl.load(lse_at, mask=_and(has_head, seen), other=-_INF)
    for nth in range(first, last):
        entry = tl.load(order + nth)
        number, part = entry & 15, (entry >> 5).to(tl.int64)
        at = part * stride_pt + head[:, None] * stride_ph + col[None, :]
        other = _load_of(number, parts, at, inside, 0.0, count)
        rows = 0
        for call in tl.static_range(count):
            rows = tl.where(number == call, num_rows[call], rows)
        other_lse = _load_of(number, part_lses, head.to(tl.int64) * rows + part, has_head, -_INF, count)
        out, lse = _merged(out, lse, other, other_lse)
    tl.store(out_at, out.to(out_THD.dtype.element_ty), mask=inside)
    tl.store(lse_at, lse, mask=has_head)


@triton.jit
def _sum_calls(
    into, before, parts, offsets, order, row, start, stride, cols, inner, stride_b, stride_pt, stride_ph,
    count: tl.constexpr, fresh: tl.constexpr, converts: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    first, last, written, seen = _entries_of(offsets, order, row, fresh, converts)
    col = start * block + tl.arange(0, block)
    inside = _and(col < cols, written)
    before_at = into + row * stride + col
    if converts:
        before_at = before + row * stride_b + col
    total = tl.load(before_at, mask=_and(inside, seen), other=0.0).to(tl.float32)
    for nth in range(first, last):
        entry = tl.load(order + nth)
        at = (entry >> 5).to(tl.int64) * stride_pt + (col // inner) * stride_ph + col % inner
        total += _load_of(entry & 15, parts, at, inside, 0.0, count)
    tl.store(into + row * stride + col, total.to(into.dtype.element_ty), mask=inside)


@triton.jit
def sum_calls_kernel(
    dq, dk, dv, before_dq, q_parts, k_parts, v_parts, q_offsets, q_order, k_offsets, k_order, num_queries,
    q_stride, q_cols, q_inner, q_pt, q_ph, k_stride, k_cols, k_inner, k_pt, k_ph, v_stride, v_cols, v_inner, v_pt, v_ph,
    before_stride, count: tl.constexpr, fresh_q: tl.constexpr, fresh_k: tl.constexpr, converts: tl.constexpr,
    block: tl.constexpr,
):  # fmt: skip
    """Add to a row of dq, or of dk and dv, what several calls of a kernel have for it; see `merge_calls_kernel`."""
    row, start = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if row < num_queries:
        _sum_calls(dq, before_dq, q_parts, q_offsets, q_order, row, start, q_stride, q_cols, q_inner, before_stride,
                   q_pt, q_ph, count, fresh_q, converts, block)  # fmt: skip
    else:
        row -= num_queries
        _sum_calls(dk, dk, k_parts, k_offsets, k_order, row, start, k_stride, k_cols, k_inner, 0, k_pt, k_ph, count,
                   fresh_k, False, block)  # fmt: skip
        _sum_calls(dv, dv, v_parts, k_offsets, k_order, row, start, v_stride, v_cols, v_inner, 0, v_pt, v_ph, count,
                   fresh_k, False, block)  # fmt: skip


@triton.jit
def _add_columns(into, parts, row, first, last, order, stride, part_stride, num_cols, start, block: tl.constexpr,
                 segmented: tl.constexpr, fresh: tl.constexpr):  # fmt: skip
    col = start * block + tl.arange(0, block)
    inside = col < num_cols
    at = into + row * stride + col
    total = tl.zeros([block], tl.float32)
    if not fresh:
        total = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    for nth in range(first, last):
        part = tl.cast(nth, tl.int64)
        if segmented:
            part = tl.load(order + nth)
        total += tl.load(parts + part * part_stride + col, mask=inside, other=0.0).to(tl.float32)
    tl.store(at, total.to(into.dtype.element_ty), mask=inside)


@triton.jit
def add_kernel(
    a, a_parts, b, b_parts, rows, offsets, order, a_stride, a_part_stride, a_cols, a_blocks, b_stride, b_part_stride,
    b_cols, block: tl.constexpr, indexed: tl.constexpr, segmented: tl.constexpr, fresh: tl.constexpr,
):  # fmt: skip
    """Add parts to a row of one or two buffers, one after the other; if fresh, store their sum."""
    row, first, last = _segment(rows, offsets, tl.program_id(0), indexed, segmented)
    start = tl.program_id(1)
    if start < a_blocks:
        _add_columns(a, a_parts, row, first, last, order, a_stride, a_part_stride, a_cols, start, block, segmented,
                     fresh)  # fmt: skip
    else:
        _add_columns(b, b_parts, row, first, last, order, b_stride, b_part_stride, b_cols, start - a_blocks, block,
                     segmented, fresh)  # fmt: skip


@triton.jit
def _copy_row(target, source, cols, inner, stride, step, block: tl.constexpr):
    """cols words, of which the source has each `inner` side by side and runs of them `stride` apart."""
    for start in range(0, cols, block):
        col = start + tl.arange(0, block)
        inside = col < cols
        words = tl.load(source + (col // inner).to(tl.int64) * stride + col % inner, mask=inside)
        tl.store(target + col.to(tl.int64) * step, words, mask=inside)


@triton.jit
def pack_kernel(
    targets, sources, index, target_rows, steps, rows, cols, inner, heads,
    count: tl.constexpr, indexed: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """A row of several tensors, in words, each into a row of its target; steps: between words of that."""
    n = tl.program_id(0).to(tl.int64)
    row = n
    if indexed:
        row = tl.load(index + n)
    for i in tl.static_range(count):
        _copy_row(targets[i] + n * target_rows[i], sources[i] + row * rows[i], cols[i], inner[i], heads[i], steps[i],
                  block)  # fmt: skip


@triton.jit
def encode_kernel(
    x_THD, travelling, num_pairs, num_heads, stride_t, stride_h, largest, mantissa: tl.constexpr, bias: tl.constexpr,
    dim: tl.constexpr, width: tl.constexpr, pairs: tl.constexpr,
):  # fmt: skip
    """Rows and heads as 8-bit floats and the exponent of their scale; rounds to nearest even, as torch's cast."""
    pair = tl.program_id(0).to(tl.int64) * pairs + tl.arange(0, pairs)
    exists, col = pair < num_pairs, tl.arange(0, width)
    inside = exists[:, None] & (col < dim)[None, :]
    base = (pair // num_heads) * stride_t + (pair % num_heads) * stride_h
    x = tl.load(x_THD + base[:, None] + col[None, :], mask=inside, other=0.0).to(tl.float32)
    amax = tl.max(tl.abs(x), 1)
    finite = (tl.sum((x != x).to(tl.int32), 1) == 0) & (amax < _INF)
    quotient = tl.div_rn(tl.where(finite, amax, 0.0), largest + tl.zeros_like(amax)).to(tl.int32, bitcast=True)
    exponent = (quotient >> 23) + ((quotient & 0x7FFFFF) != 0).to(tl.int32)
    exponent = tl.minimum(tl.maximum(exponent, 1), 253)
    inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    y = tl.minimum(tl.maximum(x * inverse[:, None], -largest), largest)
    bits = y.to(tl.int32, bitcast=True)
    sign, size = (bits >> 24) & 0x80, bits & 0x7FFFFFFF
    # Normal: the exponent is rebased and the mantissa rounded; what rounds up carries into the exponent by itself.
    drop: tl.constexpr = 23 - mantissa
    normal = (size + ((bias - 127) << 23) + ((1 << (drop - 1)) - 1) + ((size >> drop) & 1)) >> drop
    # Subnormal: adding a power of two shifts the mantissa to where fp32 itself rounds it.
    magic: tl.constexpr = (127 - bias + drop + 1) << 23
    shifted = size.to(tl.float32, bitcast=True) + (tl.zeros_like(size) + magic).to(tl.float32, bitcast=True)
    small = shifted.to(tl.int32, bitcast=True) - magic
    code = tl.where(size < ((128 - bias) << 23), small, normal) | sign
    code = tl.where(finite[:, None], code, 0x7F)
    target = travelling + pair * (dim + 1)
    tl.store(target[:, None] + col[None, :], code.to(tl.uint8), mask=inside)
    tl.store(target + dim, tl.where(finite, exponent, 253).to(tl.uint8), mask=exists)


@triton.jit
def decode_kernel(
    received, x_THD, num_pairs, num_heads, stride_t, stride_h, mantissa: tl.constexpr, bias: tl.constexpr,
    largest: tl.constexpr, dim: tl.constexpr, width: tl.constexpr, pairs: tl.constexpr,
):  # fmt: skip
    """The rows again; received rows may be views of a packed buffer, x_THD is contiguous."""
    pair = tl.program_id(0).to(tl.int64) * pairs + tl.arange(0, pairs)
    exists, col = pair < num_pairs, tl.arange(0, width)
    inside = exists[:, None] & (col < dim)[None, :]
    base = received + (pair // num_heads) * stride_t + (pair % num_heads) * stride_h
    code = tl.load(base[:, None] + col[None, :], mask=inside, other=0).to(tl.int32)
    exponent = tl.load(base + dim, mask=exists, other=1).to(tl.int32)
    size = code & 0x7F
    field, fraction = size >> mantissa, size & ((1 << mantissa) - 1)
    normal = (((field + 127 - bias) << 23) | (fraction << (23 - mantissa))).to(tl.float32, bitcast=True)
    unit = (tl.zeros_like(size) + ((128 - bias - mantissa) << 23)).to(tl.float32, bitcast=True)
    value = tl.where(field == 0, fraction.to(tl.float32) * unit, normal)
    value = tl.where(size == 0x7F, _NAN, value)
    value = tl.where(code >= 0x80, -value, value)
    value = value * (exponent << 23).to(tl.float32, bitcast=True)[:, None]
    value = tl.where(value > largest, largest, tl.where(value < -largest, -largest, value))  # NaN stays
    tl.store(x_THD + pair[:, None] * dim + col[None, :], value.to(x_THD.dtype.element_ty), mask=inside)
