"""One process: format conversions and cache copies against plain loops, and what they refuse."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from cpattn.te_ops import (
    convert_bshd_to_thd,
    convert_thd_to_bshd,
    copy_to_kv_cache,
    fa_prepare_bwd,
    fa_prepare_fwd,
    interleaved,
    mha_fill,
)

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.uint8)
LENGTHS = [(3, 0, 5, 1), (0, 0), (4,), (2, 2, 2), ()]


def prefix_sums(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def values(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randint(1, 100, shape, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_thd_to_bshd_and_back(lengths, dtype):
    cu, t, room = prefix_sums(lengths), sum(lengths) + 2, 6
    packed = values(t, 2, 3, dtype=dtype)
    expected = torch.zeros(len(lengths), room, 2, 3, dtype=dtype)
    for i, n in enumerate(lengths):
        expected[i, :n] = packed[cu[i] : cu[i] + n]
    padded = convert_thd_to_bshd(packed, cu, len(lengths), room)
    assert torch.equal(padded, expected)
    back = convert_bshd_to_thd(padded, cu, t)
    assert torch.equal(back[: sum(lengths)], packed[: sum(lengths)])
    assert not back[sum(lengths) :].any()


def test_conversions_have_gradients():
    cu = prefix_sums((2, 0, 3))
    packed = torch.randn(6, 1, 2, dtype=torch.float64, requires_grad=True)
    padded = torch.randn(3, 4, 1, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: convert_thd_to_bshd(x, cu, 3, 4), packed)
    assert torch.autograd.gradgradcheck(lambda x: convert_thd_to_bshd(x, cu, 3, 4), packed)
    assert torch.autograd.gradcheck(lambda x: convert_bshd_to_thd(x, cu, 6), padded)
    buffer = torch.randn(2, 3, 2, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(interleaved, buffer)
    qkv = [torch.randn(2, 3, 1, 2, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    assert torch.autograd.gradcheck(fa_prepare_bwd, qkv)


def test_conversions_raise_where_the_original_overruns():
    x = values(6, 1, 2)
    with pytest.raises(ValueError, match="a sequence has 5 tokens: it does not fit max_seq_len = 4"):
        convert_thd_to_bshd(x, prefix_sums((1, 5)), 2, 4)
    with pytest.raises(ValueError, match="from 0 to 7: expected a start at 0 and at most t = 6"):
        convert_thd_to_bshd(x, prefix_sums((3, 4)), 2, 4)
    with pytest.raises(ValueError, match="cu_seqlens has 3 entries: expected 4 for b = 3"):
        convert_thd_to_bshd(x, prefix_sums((3, 3)), 3, 4)
    with pytest.raises(ValueError, match="a sequence has 5 tokens"):
        convert_bshd_to_thd(values(2, 4, 1, 2), prefix_sums((1, 5)), 6)
    with pytest.raises(ValueError, match="at most t = 4"):
        convert_bshd_to_thd(values(2, 4, 1, 2), prefix_sums((3, 2)), 4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("start", [0, 3, 7, 9])
def test_mha_fill(start, dtype):
    x = values(7, 2, 3, dtype=dtype)
    expected = x.clone()
    expected[start:] = 0
    assert torch.equal(mha_fill(x.clone(), start), expected)
    assert torch.equal(mha_fill(x.clone(), torch.tensor([start], dtype=torch.int32)), expected)
    expected[start:] = 2
    filled = x.clone()
    assert mha_fill(filled, torch.tensor(start), 2) is filled
    assert torch.equal(filled, expected)
    with pytest.raises(ValueError, match="expected one element"):
        mha_fill(x, torch.tensor([1, 2]))


@pytest.mark.parametrize("shape", [(3, 2, 4, 8), (1, 1, 1, 128), (5, 1, 2, 3)])
def test_fa_prepare(shape):
    s, b, n, d = shape
    buffer = values(s, b, n, 3 * d)
    out = fa_prepare_fwd(buffer[..., :d])
    assert out.shape == (3, b, s, n, d)
    assert out.is_contiguous()
    for j in range(3):
        for i in range(s):
            assert torch.equal(out[j, :, i], buffer[i, :, :, j * d : (j + 1) * d])
    assert torch.equal(fa_prepare_bwd(*out), buffer)


def test_fa_prepare_refuses_other_views():
    buffer = values(3, 2, 4, 24)
    with pytest.raises(ValueError, match=r"Wrong stride\."):
        fa_prepare_fwd(buffer[..., :4])
    with pytest.raises(ValueError, match=r"Wrong stride\. The storage behind qkvi ends"):
        fa_prepare_fwd(buffer[..., 8:16])
    with pytest.raises(ValueError, match="expected one shape"):
        fa_prepare_bwd(buffer, buffer, buffer[:2])


@pytest.mark.parametrize("fmt", ["bshd", "sbhd", "thd"])
@pytest.mark.parametrize("paged", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_copy_to_kv_cache(fmt, paged, dtype):
    """Against the contract's loop; head dims of k and v differ."""
    old, new, room, pages = (3, 0, 4, 2), (2, 3, 0, 4), 8, 4 if paged else 1
    b, ctx, size = 4, max(new), room // pages
    packed = [values(sum(new) + 1, 2, d, dtype=dtype) for d in (3, 5)]
    starts = [0, *itertools.accumulate(new)]
    fresh = []
    for x in packed:
        padded = values(b, ctx, *x.shape[1:], dtype=dtype)
        for i, n in enumerate(new):
            padded[i, :n] = x[starts[i] : starts[i] + n]
        fresh.append({"thd": x, "bshd": padded, "sbhd": padded.transpose(0, 1).contiguous()}[fmt])
    table = torch.randperm(b * pages, generator=torch.Generator().manual_seed(2)).view(b, pages).to(torch.int32)
    caches = [values(b * pages, size, 2, d, dtype=dtype) for d in (3, 5)]
    expected = [c.clone() for c in caches]
    for i in range(b):
        for n in range(new[i]):
            at = old[i] + n
            for cache, x in zip(expected, packed, strict=True):
                cache[table[i, at // size], at % size] = x[starts[i] + n]
    cached = prefix_sums(tuple(o + n for o, n in zip(old, new, strict=True)))
    copy_to_kv_cache(*fresh, *caches, table, prefix_sums(new), cached, fmt, b, ctx, room, pages, False)
    assert all(torch.equal(a, e) for a, e in zip(caches, expected, strict=True))


def test_copy_reindexes_a_plain_cache():
    """[0, 3, 1, 2]: rows up to the last descent move; the rest have ended."""
    cache = values(4, 6, 1, 2)
    before = cache.clone()
    old, new = (2, 3, 1, 1), (1, 2, 1, 1)
    fresh = values(4, 2, 1, 2) + 1000
    cached = prefix_sums(tuple(o + n for o, n in zip(old, new, strict=True)))
    rows = torch.tensor([0, 3, 1, 2], dtype=torch.int32)
    copy_to_kv_cache(fresh, fresh, cache, cache.clone(), rows, prefix_sums(new), cached, "bshd", 4, 2, 6, 1, True)
    expected = before.clone()
    expected[1, :3] = before[3, :3]
    for i in range(4):
        expected[i, old[i] : old[i] + new[i]] = fresh[i, : new[i]]
    assert torch.equal(cache, expected)


def test_copy_refuses_what_would_overrun():
    new, cache = values(2, 3, 1, 2), values(4, 2, 1, 2)
    table, cu = torch.tensor([[0, 1], [2, 3]], dtype=torch.int32), prefix_sums((3, 3))

    def copy(**changes: object) -> None:
        given = {
            "new_k": new,
            "new_v": new,
            "k_cache": cache,
            "v_cache": cache,
            "page_table": table,
            "cu_new_lens": cu,
            "cu_cached_lens": cu,
            "qkv_format": "bshd",
            "b": 2,
            "max_ctx_len": 3,
            "max_seq_len": 4,
            "max_pages_per_seq": 2,
            "is_non_paged": False,
        }
        copy_to_kv_cache(**{**given, **changes})  # type: ignore[arg-type]

    copy()
    with pytest.raises(ValueError, match="must be of the same data type"):
        copy(new_v=new.double())
    with pytest.raises(ValueError, match="a sequence grows to 5 tokens: max_seq_len is 4"):
        copy(cu_cached_lens=prefix_sums((5, 3)))
    with pytest.raises(ValueError, match="has fewer cached than new tokens"):
        copy(cu_cached_lens=prefix_sums((2, 3)))
    with pytest.raises(ValueError, match="page 9 is written: the cache has pages 0 to 3"):
        copy(page_table=torch.tensor([[0, 9], [2, 3]], dtype=torch.int32))
    with pytest.raises(ValueError, match="cu_new_lens counts 6 tokens: new_k has 4 rows"):
        copy(qkv_format="thd", new_k=values(4, 1, 2), new_v=values(4, 1, 2))
    with pytest.raises(ValueError, match="qkv_format is 'bhsd'"):
        copy(qkv_format="bhsd")
    with pytest.raises(ValueError, match=r"expected contiguous \[pages, 2, heads, dim\]"):
        copy(k_cache=values(4, 3, 1, 2))
    with pytest.raises(ValueError, match="max_seq_len is 5 and max_pages_per_seq 2: a sequence's room"):
        copy(max_seq_len=5)
    with pytest.raises(ValueError, match="page 0 takes a new token of sequence 0 and one of sequence 1"):
        copy(page_table=torch.tensor([[0, 1], [0, 3]], dtype=torch.int32))
    with pytest.raises(ValueError, match=r"page_table has dtype torch.float32 and shape \(2, 2\): expected int32"):
        copy(page_table=table.float())
