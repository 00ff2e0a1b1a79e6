"""`cpattn.magi_api`: the calls of code written for `magi_attention.api`, against dense fp64."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from cpattn import AttnMaskSpec, magi_api
from cpattn.magi_api import (
    AttnMaskType,
    AttnRange,
    AttnRanges,
    DispatchConfig,
    DistAttnConfig,
    OverlapConfig,
    SequentialDispatchAlg,
    calc_attn,
    compute_pad_size,
    dispatch,
    get_most_recent_key,
    get_position_ids,
    infer_attn_mask_from_cu_seqlens,
    infer_attn_mask_from_sliding_window,
    magi_attn_flex_dispatch,
    magi_attn_flex_key,
    magi_attn_varlen_key,
    make_varlen_key_for_new_mask_after_dispatch,
    roll,
    undispatch,
)
from tests_dist.support.harness import fresh_group, run_on_ranks
from tests_dist.support.oracle import dense_attention, make_inputs

HEADS = {"num_heads_q": 4, "num_heads_kv": 2, "head_dim": 16}
TREE = AttnMaskSpec.prefix_tree([20, 13, 17], [[0, 1], [0, 2]])[0]


def inputs_of(total):
    return make_inputs(AttnMaskSpec.causal(total), heads=(4, 2))


def truth(inputs, spec, **options):
    q, k, v = (t.double() for t in inputs[:3])
    return dense_attention(q, k, v, spec.to_dense(), scale=16**-0.5, **options)


def attend(inputs, key, **options):
    """The steps of the API's own examples; (out, lse) over all tokens, on every rank."""
    out, meta = calc_attn(*(dispatch(t, key) for t in inputs[:3]), key, **options)
    return undispatch(out, key), undispatch(meta.lse, key)


def examples_on_rank():
    group = fresh_group()
    inputs = inputs_of(50)
    results = {}
    flex = magi_attn_flex_key(
        q_ranges=AttnRanges.from_ranges(TREE.q_ranges),
        k_ranges=AttnRanges.from_ranges(TREE.k_ranges),
        attn_mask_type=[AttnMaskType(kind) for kind in TREE.mask_types],
        total_seqlen_q=50,
        total_seqlen_k=50,
        pad_size=compute_pad_size(50, dist.get_world_size(group), 16),
        cp_group_or_mesh=group,
        dist_attn_config=DistAttnConfig(
            dispatch_config=DispatchConfig(chunk_size=4, alg=SequentialDispatchAlg()),
            overlap_config=OverlapConfig(degree=2),
        ),
        **HEADS,
    )
    results["flex"] = attend(inputs, flex, softcap=3.0, sink=torch.zeros(3, 4))
    sums = torch.tensor([0, 21, 50])
    varlen = magi_attn_varlen_key(sums, sums, causal=True, cp_group_or_mesh=group, **HEADS)
    assert get_most_recent_key(group) is varlen
    window = make_varlen_key_for_new_mask_after_dispatch(sums, sums, varlen, window_size=(6, 0))
    with pytest.raises(ValueError, match="cu_seqlens_k ends at 40 and the key was dispatched over 50 tokens"):
        make_varlen_key_for_new_mask_after_dispatch(sums, torch.tensor([0, 21, 40]), varlen)
    results["varlen"], results["window"] = attend(inputs, varlen), attend(inputs, window)
    sums[1] = 30  # in place: the key of the old lengths stays what it is
    results["varlen again"] = attend(inputs, varlen)
    moved = magi_attn_varlen_key(sums, sums, causal=True, cp_group_or_mesh=group, **HEADS)
    results["moved"] = attend(inputs, moved)

    stream = torch.arange(50.0)[:, None]
    local = dispatch(stream, varlen)
    assert torch.equal(local[:, 0].long(), get_position_ids(varlen).cpu())
    rolls = {shift: undispatch(roll(local, shift, 0, varlen), varlen)[:, 0] for shift in (-1, 3, -50, 120)}
    assert magi_attn_flex_dispatch(stream, [[0, 50]], [[0, 50]], "causal", 50, 50, **HEADS)[0].shape[0] == 50
    return results, rolls


def test_examples_of_the_api():
    expected = {
        "flex": truth(inputs_of(50), TREE, softcap=3.0, sink=torch.full((4,), 3.0).log()),
        "varlen": truth(inputs_of(50), AttnMaskSpec.varlen([21, 29])),
        "varlen again": truth(inputs_of(50), AttnMaskSpec.varlen([21, 29])),
        "moved": truth(inputs_of(50), AttnMaskSpec.varlen([30, 20])),
        "window": truth(inputs_of(50), AttnMaskSpec.sliding_window([21, 29], (6, 0))),
    }
    for results, rolls in run_on_ranks(2, examples_on_rank):
        for name, (out, lse) in expected.items():
            torch.testing.assert_close(results[name][0].double(), out, atol=2e-6, rtol=2e-6, msg=name)
            torch.testing.assert_close(results[name][1].double(), lse, atol=2e-6, rtol=2e-6, msg=name)
        for shift, rolled in rolls.items():
            assert torch.equal(rolled, torch.arange(50.0).roll(shift))


def two_groups_on_rank():
    """Each group's plan is its own, whichever was made last."""
    one, two = fresh_group(), fresh_group()
    inputs = inputs_of(40)
    keys = [
        magi_attn_varlen_key(sums, sums, causal=True, cp_group_or_mesh=group, **HEADS)
        for group, sums in ((one, torch.tensor([0, 40])), (two, torch.tensor([0, 11, 40])))
    ]
    assert [get_most_recent_key(group) for group in (one, two)] == keys
    return [attend(inputs, key)[0] for key in keys]


def test_two_groups_do_not_disturb_each_other():
    outs = run_on_ranks(2, two_groups_on_rank)[0]
    for out, lengths in zip(outs, ([40], [11, 29]), strict=True):
        expected = truth(inputs_of(40), AttnMaskSpec.varlen(lengths))[0]
        torch.testing.assert_close(out.double(), expected, atol=2e-6, rtol=2e-6)


def undispatch_gradients_on_rank():
    key = magi_attn_flex_key([[0, 12]], [[0, 12]], "full", 12, 12, cp_group_or_mesh=fresh_group(), **HEADS)
    grads = []
    for is_partial_grad, weight in ((False, 1.0), (True, 1.0 + dist.get_rank())):
        local = dispatch(torch.ones(12), key).requires_grad_()
        (undispatch(local, key, is_partial_grad) * weight * torch.arange(12.0)).sum().backward()
        grads.append(undispatch(local.grad, key))
    return grads


def test_undispatch_gradients():
    """Of one loss that all ranks share; and of the sum of the ranks' different losses."""
    for same, partial in run_on_ranks(2, undispatch_gradients_on_rank):
        assert torch.equal(same, torch.arange(12.0))
        assert torch.equal(partial, 3 * torch.arange(12.0))


def test_inferred_rectangles():
    """The documents' masks, and a window's, are those of AttnMaskSpec."""
    sums = torch.tensor([0, 7, 12], dtype=torch.int32)
    q, k, kinds, total_q, total_k = infer_attn_mask_from_cu_seqlens(sums, sums, causal=True)
    assert (q.to_naive_ranges(), kinds, total_q, total_k) == ([(0, 7), (7, 12)], [AttnMaskType.CAUSAL] * 2, 12, 12)
    assert k == q
    q, k, kinds, *_ = infer_attn_mask_from_cu_seqlens(sums, sums, window_size=(2, 1))
    drawn = AttnMaskSpec(q.to_naive_ranges(), k.to_naive_ranges(), [kind.value for kind in kinds], 12)
    assert (drawn.to_dense() == AttnMaskSpec.sliding_window([7, 5], (2, 1)).to_dense()).all()
    q, k, kinds = infer_attn_mask_from_sliding_window(AttnRange(3, 12), AttnRange(3, 12), (2, 0))
    drawn = AttnMaskSpec(q.to_naive_ranges(), k.to_naive_ranges(), [kind.value for kind in kinds], 12).to_dense()
    assert (drawn[3:, 3:] == AttnMaskSpec.sliding_window([9], (2, 0)).to_dense()).all()
    assert not drawn[:3].any()
    with pytest.raises(ValueError, match="causal is True"):
        infer_attn_mask_from_cu_seqlens(sums, sums, causal=True, window_size=(2, 0))


def test_small_values():
    assert compute_pad_size(100, 4, 16) == 28
    assert compute_pad_size(128, 4, 16) == 0
    assert [kind.value for kind in AttnMaskType] == ["full", "causal", "bi_causal", "inv_causal"]
    ranges = AttnRanges.from_ranges([[0, 4], (4, 9)])
    ranges.append(AttnRange(9, 9))
    assert (ranges.size, len(ranges), ranges.total_seqlen, ranges.end) == (3, 3, 9, 9)
    assert ranges[1] == AttnRange(4, 9)
    assert ranges[:2] == AttnRanges.from_ranges([(0, 4), (4, 9)])
    with pytest.raises(ValueError, match="0 <= start <= end"):
        AttnRange(3, 1)
    with pytest.raises(ValueError, match="no key has been made"):
        get_most_recent_key(object())
    with pytest.raises(NotImplementedError, match="return_max_logits"):
        calc_attn(*[torch.zeros(1, 1, 8)] * 3, None, return_max_logits=True)
    assert set(magi_api.__all__) <= set(dir(magi_api))
