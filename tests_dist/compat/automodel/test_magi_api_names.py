"""One process: what MagiAttention's API has besides keys and attention, and what its newest version added."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import torch

from cpattn import magi_api as magi
from cpattn.magi_api import AttnMaskType, AttnRange, AttnRanges
from cpattn.masks.spec import AttnMaskSpec
from tests_dist.support.oracle import dense_attention

# magi_attention.api.__all__ at 2c64135.
PUBLIC = [
    "magi_attn_varlen_key", "magi_attn_varlen_dispatch", "magi_attn_flex_key", "magi_attn_flex_dispatch",
    "dispatch", "undispatch", "roll", "roll_simple", "calc_attn", "clear_cache", "get_most_recent_key",
    "get_position_ids", "make_varlen_key_for_new_mask_after_dispatch", "make_flex_key_for_new_mask_after_dispatch",
    "flex_flash_attn_func", "compute_pad_size", "squash_batch_dim", "infer_varlen_mask_from_batch",
    "infer_attn_mask_from_sliding_window", "infer_attn_mask_from_cu_seqlens", "AttnForwardMeta", "AttnMaskType",
    "AttnOverlapMode", "AttnRanges", "DistAttnRuntimeKey", "GeneralAttnMaskType", "DistAttnConfig",
    "DispatchConfig", "OverlapConfig", "GrpCollConfig", "DispatchAlg", "MinHeapDispatchAlg", "ToppHeapDispatchAlg",
    "SequentialDispatchAlg", "SortedSequentialSelectAlg", "LBDispatchAlg", "DPDispatchAlg", "BSDispatchAlg",
    "OverlapAlg", "UniformOverlapAlg", "GreedyOverlapAlg", "DistAttnRuntimeDictManager",
    "dist_attn_runtime_dict_mgr",
]  # fmt: skip


def test_every_public_name_is_there():
    assert set(PUBLIC) <= set(magi.__all__)
    assert all(hasattr(magi, name) for name in magi.__all__)


def dense(q: AttnRanges, k: AttnRanges, kinds: list[AttnMaskType], rows: int, columns: int) -> np.ndarray:
    spec = AttnMaskSpec(q.to_naive_ranges(), k.to_naive_ranges(), [kind.value for kind in kinds], rows, columns)
    return spec.to_dense().astype(bool)


@pytest.mark.parametrize("window", [(2, 3), (0, 0), (-1, 2), (4, -1), (30, 30)])
@pytest.mark.parametrize(("q", "k"), [((5, 15), (5, 15)), ((0, 6), (2, 14)), ((3, 14), (0, 5))])
def test_a_window_of_ranges_that_differ(q, k, window):
    """The last query stands at the last key; queries before the first key see nothing."""
    got = dense(*magi.infer_attn_mask_from_sliding_window(AttnRange(*q), AttnRange(*k), window), 20, 20)
    want = np.zeros((20, 20), dtype=bool)
    for i, j in itertools.product(range(*q), range(*k)):
        at = i + k[1] - q[1]
        left, right = (40 if side < 0 else side for side in window)
        want[i, j] = at >= k[0] and at - left <= j <= at + right
    assert (got == want).all()


@pytest.mark.parametrize("window", [(2, 0), (1, 3), (-1, 1), (0, 9)])
@pytest.mark.parametrize("first", [0, 1, 4, 50])
def test_the_first_keys_of_each_document_stay_seen(window, first):
    sums = torch.tensor([0, 12, 13, 20])
    *rects, rows, columns = magi.infer_attn_mask_from_cu_seqlens(sums, sums, False, window, global_window_size=first)
    want = np.zeros((20, 20), dtype=bool)
    for start, end in itertools.pairwise(sums.tolist()):
        left, right = (40 if side < 0 or side >= end - start - 1 else side for side in window)
        for i, j in itertools.product(range(start, end), repeat=2):
            want[i, j] = j <= i + right and (j >= i - left or j < start + first)
    assert (dense(*rects, rows, columns) == want).all()
    with pytest.raises(ValueError, match="global_window_size is -1"):
        magi.infer_attn_mask_from_cu_seqlens(sums, sums, False, window, global_window_size=-1)


def test_attention_without_a_group():
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(n, heads, 8, generator=g) for n, heads in ((10, 4), (12, 2), (12, 2)))
    q_ranges, k_ranges = torch.tensor([[0, 4], [4, 10]]), torch.tensor([[0, 4], [3, 12]])
    sink = torch.randn(2, 4, generator=g)
    out, meta = magi.flex_flash_attn_func(q, k, v, q_ranges, k_ranges, torch.tensor([1, 0]), sink=sink, softcap=3.0)
    visible = np.zeros((10, 12), dtype=bool)
    visible[:4, :4] = np.tri(4)
    visible[4:, 3:] = True
    want, lse = dense_attention(
        q.double(), k.double(), v.double(), visible, scale=8**-0.5, sink=torch.logsumexp(sink.double(), 0), softcap=3.0
    )
    torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(meta.lse.double(), lse, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="index_attn_indices is not served"):
        magi.flex_flash_attn_func(q, k, v, index_attn_indices=torch.zeros(10, 2, 128))


def test_mask_types_by_number():
    assert [AttnMaskType.from_int_type(n).value for n in range(4)] == ["full", "causal", "inv_causal", "bi_causal"]
    assert all(AttnMaskType.from_int_type(kind.to_int_type()) is kind for kind in AttnMaskType)
    with pytest.raises(ValueError, match="mask type 4"):
        AttnMaskType.from_int_type(4)


def tokens(ranges: AttnRanges) -> set[int]:
    return {token for r in ranges for token in range(r.start, r.end)}


def test_ranges_are_sets_of_tokens():
    """Every operation against sets, for random lists with overlaps and empty ranges."""
    draw = random.Random(0)
    for _ in range(200):
        starts = [[draw.randrange(30) for _ in range(draw.randrange(5))] for _ in range(2)]
        a, b = (AttnRanges.from_ranges([(s, s + draw.randrange(6)) for s in own]) for own in starts)
        merged = a.merge()
        assert tokens(merged) == tokens(a)
        assert merged.clear_empty().is_merged()
        assert tokens(a.find_hole_ranges(b)) == tokens(a) - tokens(b)
        assert tokens(a.find_overlap_ranges(b)) == tokens(a) & tokens(b)
        assert a.intersect_size() == a.total_seqlen - len(tokens(a))
        assert a.is_non_overlap() == (a.intersect_size() == 0)
        assert tokens(a.truncate(5, 20)) == tokens(a) & set(range(5, 20))
        if a.is_non_overlap():
            chunks = a.chunk(4)
            assert [t for c in chunks for r in c for t in range(r.start, r.end)] == [
                t for r in a for t in range(r.start, r.end)
            ]
            assert all(c.total_seqlen == 4 for c in chunks[:-1])
        for r, s in itertools.product(a, b):
            both = set(range(r.start, r.end)) & set(range(s.start, s.end))
            assert r.intersect_size(s) == len(both)
            assert r.union_size(s) == r.seqlen + s.seqlen - len(both)
            assert sum(d.seqlen for d in r.diff_by(s)) == s.seqlen - len(both)


def test_ranges_by_hand():
    ranges = AttnRanges.from_ranges([(15, 20), (0, 10), (20, 30)])
    assert ranges.merge().to_naive_ranges() == [(0, 10), (15, 30)]
    assert ranges.make_ranges_local(AttnRanges.from_ranges([(18, 25), (2, 4)])).to_naive_ranges() == [(13, 20), (2, 4)]
    assert ranges.merge_with_split_alignment(8).to_naive_ranges() == [(0, 32)]
    assert AttnRanges.from_cu_seqlens([0, 3, 9], 9).to_cu_seqlens(9) == [0, 3, 9]
    assert ranges.points == [0, 10, 15, 20, 30]
    assert ranges.to_tensor().tolist() == [[15, 20], [0, 10], [20, 30]]
    with pytest.raises(ValueError, match=r"range \[9, 12\) is not within one of"):
        ranges.make_ranges_local(AttnRanges.from_ranges([(9, 12)]))


def test_padding_helpers():
    x = torch.arange(6).view(2, 3)
    assert magi.pad_at_dim(x, 1, 2, 7).tolist() == [[0, 1, 2, 7, 7], [3, 4, 5, 7, 7]]
    assert magi.unpad_at_dim(magi.pad_at_dim(x, 1, 2), 1, 2).tolist() == x.tolist()
    five = AttnRanges.from_ranges([(0, 5)])
    q, k, kinds = magi.apply_padding(five, five, [AttnMaskType.FULL], 5, 3)
    assert not dense(q, k, kinds, 8, 8)[5:].any()
    assert magi.infer_varlen_mask_from_batch(3, 4)[0].tolist() == [0, 4, 8, 12]


def test_options_without_effect_are_taken():
    config = magi.DistAttnConfig(
        dispatch_config=magi.DispatchConfig(alg=magi.ToppHeapDispatchAlg(top_p=0.3)),
        overlap_config=magi.OverlapConfig(degree=0, calc_cost_factor=2.0, alg=magi.GreedyOverlapAlg()),
        grpcoll_config=magi.GrpCollConfig(num_sms=8),
    )
    assert config.overlap_config.num_stages == 1
    sums = torch.tensor([0, 9])
    key = magi.magi_attn_varlen_key(sums, sums, 2, 1, 8, causal=True, dist_attn_config=config)
    assert isinstance(key, magi.DistAttnRuntimeKey)
    assert magi.dist_attn_runtime_dict_mgr.get(key) is key
    x = torch.arange(9.0)[:, None]
    assert torch.equal(magi.roll_simple(x, 2, 0, key), torch.roll(x, 2, 0))
