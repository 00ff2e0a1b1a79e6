"""Row kernels in the interpreter against torch: bit for bit, but for merges (whose exp and log round otherwise)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from cpattn.collectives import Fp8Rows, merge_partials, packing, row_kernels
from cpattn.collectives.row_kernels import RowSegments, add_rows, decode_fp8, encode_fp8, merge_rows, pack_rows
from tests_dist.support.interpreter import needs_interpreter, quicken

pytestmark = needs_interpreter


@pytest.fixture(scope="module", autouse=True)
def _quick() -> Iterator[None]:
    quicken()
    row_kernels._DEVICES.add("cpu")
    yield
    row_kernels._DEVICES.discard("cpu")


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# Seven parts that three senders sent to rows of a buffer of six; rows 1 and 4 get none.
INDEX, SPLITS = torch.tensor([0, 3, 5, 3, 2, 3, 0]), (3, 1, 3)


def test_segments_keep_the_order_of_senders() -> None:
    segments = RowSegments.of(INDEX)
    assert [t.tolist() for t in segments] == [[0, 2, 3, 5], [0, 2, 3, 6, 7], [0, 6, 4, 1, 3, 5, 2]]


@pytest.mark.parametrize("fresh", [False, True])
def test_sums_of_all_senders_equal_an_index_add_for_each(fresh: bool) -> None:
    """Two tensors of different widths in one packed buffer."""
    like = [torch.empty(0, 2, 5), torch.empty(0, 2, 3)]
    packed = torch.empty(7, packing.packed_row_bytes(like), dtype=torch.uint8)
    parts = packing.unpack_rows(packed, like)
    for number, part in enumerate(parts):
        part.copy_(normal(*part.shape, seed=number))
    before = [normal(6, 2, 5, seed=5), normal(6, 2, 3, seed=6)]
    mine, theirs = [t.clone() for t in before], [t.clone() for t in before]
    add_rows(mine, parts, segments=RowSegments.of(INDEX), fresh=fresh)
    if fresh:
        theirs = [t.index_fill(0, INDEX, 0.0) for t in theirs]
    for start, end in ((0, 3), (3, 4), (4, 7)):
        for total, part in zip(theirs, parts, strict=True):
            total.index_add_(0, INDEX[start:end], part[start:end])
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merges(dtype: torch.dtype) -> None:
    """With rows that neither, only one, or both sides saw; by segments, by an index, and row by row."""
    out, lse = normal(6, 3, 5), normal(6, 3, seed=1)
    lse[0, 0], out[0, 0] = -torch.inf, 0
    part, part_lse = normal(7, 3, 5, dtype=dtype, seed=2), normal(7, 3, seed=3)
    part_lse[0, 0], part_lse[6, 0], part_lse[1] = -torch.inf, -torch.inf, -torch.inf
    expected, expected_lse = out.clone(), lse.clone()
    for number, row in enumerate(INDEX.tolist()):
        at, one = slice(row, row + 1), slice(number, number + 1)
        merge_partials(expected[at], expected_lse[at], part[one], part_lse[one])
    mine, mine_lse = out.clone(), lse.clone()
    merge_rows(mine, mine_lse, part, part_lse, segments=RowSegments.of(INDEX))
    torch.testing.assert_close((mine, mine_lse), (expected, expected_lse), atol=1e-6, rtol=1e-6)
    assert torch.equal(mine[[1, 4]], out[[1, 4]])
    assert mine_lse[0, 0] == -torch.inf
    rows = torch.tensor([5, 0, 3])
    once, once_lse = out[rows].clone(), lse[rows].clone()
    merge_partials(once, once_lse, part[:3], part_lse[:3])
    by_index, by_index_lse = out.clone(), lse.clone()
    merge_rows(by_index, by_index_lse, part[:3], part_lse[:3], index=rows)
    torch.testing.assert_close((by_index[rows], by_index_lse[rows]), (once, once_lse), atol=1e-6, rtol=1e-6)
    aside, aside_lse = out[rows].clone(), lse[rows].clone()
    merge_rows(aside, aside_lse, part[:3], part_lse[:3])
    assert torch.equal(aside, by_index[rows])
    assert torch.equal(aside_lse, by_index_lse[rows])


def test_packing_copies_bytes() -> None:
    """Four tensors of three dtypes, one of them strided by head; odd bytes; all rows and some."""
    q, dout = normal(6, 2, 8, dtype=torch.bfloat16), normal(2, 6, 6, dtype=torch.bfloat16, seed=1).transpose(0, 1)
    lse, delta = normal(6, 2, seed=2), normal(6, 2, seed=3)
    bits = torch.arange(6 * 2 * 3, dtype=torch.uint8).view(6, 2, 3)
    for tensors in ((q, dout, lse, delta), (bits, q), (lse, delta), (bits, bits + 1)):
        for index in (INDEX, None):
            rows = 6 if index is None else len(index)
            shapes = [(t.shape[1:], t.dtype) for t in tensors]
            packed = packing.empty_packed(rows, shapes, q.device).zero_()
            views = packing.unpack(packed, shapes)
            places = [v.data_ptr() - packed.data_ptr() for v in views]
            # Kernels read 16 bytes at once; codes are decoded first, and what lies beside them is read by element.
            codes = any(t.dtype == torch.uint8 for t in tensors)
            assert all(place % (8 if codes else 16) == 0 for place in places)
            assert row_kernels.can_pack(tensors)
            pack_rows(packed, tensors, places, index)
            for view, tensor in zip(views, tensors, strict=True):
                assert torch.equal(view, tensor if index is None else tensor[index])


def test_gathered_rows_are_contiguous_and_the_last_may_be_turned() -> None:
    """dout, q and out with lse, which a kernel wants head by head; and one head, one row, no row."""
    q, dout = normal(6, 2, 8, dtype=torch.bfloat16), normal(2, 6, 8, dtype=torch.bfloat16, seed=1).transpose(0, 1)
    for lse in (normal(6, 2, seed=2), normal(6, 1, seed=2)):
        for index in (INDEX, INDEX[1:2], INDEX[:0]):
            *rows, turned = row_kernels.gather_rows((dout, q, lse), index, turned=1)
            assert all(torch.equal(a, b[index]) and a.is_contiguous() for a, b in zip(rows, (dout, q), strict=True))
            assert turned.T.is_contiguous()
            assert torch.equal(turned, lse[index])


@pytest.mark.parametrize("fmt", ["e4m3", "e5m2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_8_bit_floats_are_those_of_torch(fmt: str, dtype: torch.dtype) -> None:
    """Every size from subnormal to the largest, ties, zeros, and rows that are not finite."""
    sizes = torch.exp2(torch.linspace(-30, 30, 12))[:, None, None]
    x = torch.cat([normal(12, 2, 20) * sizes, (torch.arange(240).view(6, 2, 20) - 100) / 16, torch.zeros(1, 2, 20)])
    x = x.clamp(-1e4, 1e4) if dtype == torch.float16 else x
    x[3, 0] *= torch.exp2(-torch.arange(20.0))  # down to what vanishes beside the row's largest
    x[4, 1, 3], x[5, 0, 0], x[6, 1] = torch.nan, torch.inf, torch.tensor(1e-45)
    x = x.to(dtype)
    x[7] = torch.finfo(dtype).max
    codec = Fp8Rows(fmt)
    row_kernels._DEVICES.discard("cpu")
    (theirs,) = codec.encode((x,))
    (decoded,) = codec.decode((theirs,), dtype)
    row_kernels._DEVICES.add("cpu")
    mine, back = torch.empty_like(theirs), torch.empty_like(x)
    encode_fp8(x, mine, fmt)
    finite = x.float().isfinite().all(-1)
    assert torch.equal(mine[finite], theirs[finite])
    decode_fp8(mine, back, fmt)
    assert torch.equal(back[finite], decoded[finite])
    assert back[~finite].isnan().all()
    assert (~finite).sum() == 2
