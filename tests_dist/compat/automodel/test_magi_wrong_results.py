"""The wrong results of the original `magi_attn_utils`, by their numbers in the project's notes.

Each test states what the original did, fails if that is done here, and holds the right numbers.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from cpattn.automodel import magi_attn_utils as magi
from cpattn.automodel.magi_attn_utils import AttnMaskSpec, MagiState, make_magi_attn_func
from tests_dist.compat.automodel.custom_model import HEAD_DIM, HEADS, KV_HEADS, VOCAB, CustomModel
from tests_dist.support.harness import fresh_group, run_on_ranks
from tests_dist.support.oracle import dense_attention


@pytest.fixture(autouse=True)
def no_global_state():
    yield
    magi.set_active_cp_group(None)
    magi.set_active_attn_spec(None)
    magi._STEPS_BY_GROUP.clear()


def make_qkv(tokens, heads=(HEADS, KV_HEADS), head_dim=HEAD_DIM, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(tokens, n, head_dim, generator=generator).to(dtype) for n in (heads[0], heads[1], heads[1])]


def truth(qkv, spec):
    """Dense fp64 attention under the mask drawn from the spec."""
    q, k, v = (t.double() for t in qkv)
    return dense_attention(q, k, v, spec.to_dense(), scale=q.shape[-1] ** -0.5)[0]


def close(got, expected, limit=1e-5):
    return bool((got.double() - expected).norm() <= limit * expected.norm())


def test_1_the_key_is_that_of_the_mask_not_of_the_last_call():
    """Causal, packed, causal over the same length: the original's third call got the packed key."""
    qkv, causal, packed = make_qkv(24), AttnMaskSpec.causal(24), AttnMaskSpec.varlen([10, 14])
    attn = make_magi_attn_func()
    assert not close(truth(qkv, packed), truth(qkv, causal))
    assert close(attn(*qkv), truth(qkv, causal))
    assert close(attn(*qkv, cu_seqlens=torch.tensor([0, 10, 24])), truth(qkv, packed))
    assert close(attn(*qkv), truth(qkv, causal))


def test_2_keys_differ_by_heads_dims_and_mask():
    """Layers of different heads under one mask shared a key; two masks in turn evicted each other."""
    magi._FLEX_KEY_CACHE.clear()
    spec, other = AttnMaskSpec.causal(16), AttnMaskSpec.varlen([8, 8])
    keys = [magi._flex_key_for(None, s, *heads) for s in (spec, other) for heads in ((4, 2, 8), (2, 1, 8), (4, 2, 16))]
    assert len({id(key) for key in keys}) == 6
    assert magi._flex_key_for(None, spec, 4, 2, 8) is keys[0]  # not evicted by `other`
    attn = make_magi_attn_func()
    for heads, head_dim in (((4, 2), 8), ((2, 1), 8), ((4, 2), 16), ((6, 2), 256)):
        qkv = make_qkv(16, heads, head_dim)
        assert close(attn(*qkv), truth(qkv, spec))


def groups_in_turn_on_rank():
    """Groups made and destroyed: a key of a dead group must not be found under a reused id."""
    for _ in range(6):
        group = dist.new_group()
        key = magi._flex_key_for(group, AttnMaskSpec.causal(16), 4, 2, 8)
        assert key.cp_group is group
        dist.destroy_process_group(group)
        del group, key
    assert all(id(group) == name[0] for name, (group, _) in magi._FLEX_KEY_CACHE.items())
    magi._FLEX_KEY_CACHE.clear()


def test_2_keys_of_destroyed_groups():
    run_on_ranks(2, groups_in_turn_on_rank)


def packed_batch(lengths=(9, 17, 11), seed=0):
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    sums = torch.tensor([0, *lengths]).cumsum(0)
    ids = torch.randint(1, VOCAB, (total,), generator=generator)
    return {
        "input_ids": ids,
        "labels": torch.randint(1, VOCAB, (total,), generator=generator),
        "cu_seqlens": sums,
        "position_ids": torch.cat([torch.arange(n) for n in lengths]),
    }


def alone(model, batch, lengths):
    """The model on each document by itself."""
    parts = torch.split(batch["input_ids"], list(lengths))
    return torch.cat([model(ids, torch.arange(len(ids))) for ids in parts])


def packed_on_rank(batch, drop_positions):
    group = fresh_group()
    model = CustomModel()
    magi.set_active_cp_group(group)
    batch = {k: v for k, v in batch.items() if not (drop_positions and k == "position_ids")}
    new, key = magi.magi_prepare_packed_cp(model, batch, group)
    logits = model(new["input_ids"], new["position_ids"], magi_attn_spec=new["magi_attn_spec"])
    from cpattn import undispatch

    magi.set_active_cp_group(None)
    return undispatch(logits, key).detach(), new["labels"], new["position_ids"], key.num_tokens


@pytest.mark.parametrize("drop_positions", [False, True])
def test_3_and_11_packed_tokens_labels_and_positions(drop_positions):
    """37 tokens on 4 ranks: the original padded with tokens of label 0 and trained on them (3), and
    counted positions through the documents (11)."""
    batch = packed_batch()
    results = run_on_ranks(4, packed_on_rank, batch, drop_positions)
    assert sum(tokens for *_, tokens in results) == 37
    labels = torch.cat([labels for _, labels, _, _ in results])
    assert sorted(labels.tolist()) == sorted(batch["labels"].tolist())
    positions = torch.cat([positions for _, _, positions, _ in results])
    assert sorted(positions.tolist()) == sorted(batch["position_ids"].tolist())
    assert positions.max() == 16
    expected = alone(CustomModel(), batch, (9, 17, 11)).double()
    for logits, *_ in results:
        assert close(logits, expected)


def masks_on_rank(batch):
    """A model's logits under each way to give a mask at the call, over the ranks."""
    from cpattn import undispatch

    group = fresh_group()
    magi.set_active_cp_group(group)
    tree = AttnMaskSpec.prefix_tree([9, 17, 11], [[0, 1], [0, 2]])[0]
    one_text = {**batch, "cu_seqlens": torch.tensor([0, 37])}
    results = {}
    for name, kwargs, window in (
        ("spec", {"magi_attn_spec": tree}, None),
        ("cu_seqlens", {"cu_seqlens": batch["cu_seqlens"]}, None),
        ("active", {}, None),
        ("window", {}, (4, 0)),
    ):
        model = CustomModel(window)
        new, key = magi.magi_prepare_packed_cp(model, one_text, group)
        magi.set_active_attn_spec(tree if name == "active" else None)
        results[name] = undispatch(model(new["input_ids"], new["position_ids"], **kwargs), key).detach()
        magi.set_active_attn_spec(None)
    magi.set_active_cp_group(None)
    return results


def test_5_masks_and_windows_of_the_call_hold_over_ranks():
    """The original ignored all of them as soon as there were two ranks."""
    batch = packed_batch()
    results = run_on_ranks(2, masks_on_rank, batch)[0]
    tree = AttnMaskSpec.prefix_tree([9, 17, 11], [[0, 1], [0, 2]])[0]
    ids, positions, model = batch["input_ids"], batch["position_ids"], CustomModel()
    causal = model(ids, positions).double()
    expected = {
        "spec": model(ids, positions, magi_attn_spec=tree).double(),
        "cu_seqlens": model(ids, positions, cu_seqlens=batch["cu_seqlens"]).double(),
        "active": model(ids, positions, magi_attn_spec=tree).double(),
        "window": CustomModel((4, 0))(ids, positions).double(),
    }
    for name, logits in expected.items():
        assert not close(logits, causal), f"{name} should matter"
        assert close(results[name], logits), name


def test_5_a_window_counts_keys_beside_the_query():
    """(4, 0) is four keys before the query's own; at one rank the original refused windows."""
    qkv, attn = make_qkv(20), make_magi_attn_func()
    expected = truth(qkv, AttnMaskSpec.sliding_window([20], (4, 0)))
    assert close(attn(*qkv, window_size=(4, 0)), expected)
    assert close(attn(*qkv, window_size=5), expected)
    assert close(attn(*qkv, window_size=(-1, -1)), truth(qkv, AttnMaskSpec.varlen([20])))


def rows_on_rank(batch, forward_spec):
    from cpattn import undispatch

    group = fresh_group()
    magi.set_active_cp_group(group)
    model, state = CustomModel(), MagiState(True, True, group, dist.get_world_size(group))
    context, new = state.prepare_llm_batch(model, batch, None, is_thd=False, pad_id=0, num_chunks=1)
    kwargs = {"magi_attn_spec": new["magi_attn_spec"]} if forward_spec else {}
    with context():
        logits = model(new["input_ids"], new["position_ids"], **kwargs)
    key = new["magi_attn_spec"].key
    magi.set_active_cp_group(None)
    return undispatch(logits[0], key).detach(), key.num_tokens


@pytest.mark.parametrize("forward_spec", [True, False], ids=["spec through the model", "spec of the step"])
def test_6_rows_of_a_custom_model_are_sharded(forward_spec):
    """Not packed and over ranks, the original sharded nothing and each rank attended to all alone."""
    ids = packed_batch()["input_ids"][None]
    batch = {"input_ids": ids, "labels": ids.clone()}
    results = run_on_ranks(2, rows_on_rank, batch, forward_spec)
    expected = CustomModel()(ids, torch.arange(37)[None])[0].double()
    assert sum(tokens for _, tokens in results) == 37
    for logits, tokens in results:
        assert tokens < 37
        assert close(logits, expected)


def test_6_a_prefix_tree_over_ranks():
    """The original neither dispatched the tree's mask over ranks nor refused it."""
    batch = packed_batch()
    tree = AttnMaskSpec.prefix_tree([9, 17, 11], [[0, 1], [0, 2]])[0]
    positions = torch.cat([torch.arange(9), torch.arange(17) + 9, torch.arange(11) + 9])
    given = {"input_ids": batch["input_ids"][None], "prefix_tree": ([9, 17, 11], [[0, 1], [0, 2]])}
    results = run_on_ranks(2, rows_on_rank, given, True)
    expected = CustomModel()(batch["input_ids"], positions, magi_attn_spec=tree).double()
    assert close(results[0][0], expected)
    assert "prefix_tree" in given  # the caller's batch is not changed


def test_7_without_a_group_layout_and_heads_are_kept():
    """The fallback returned [B, H, S, D] for [B, S, H, D], attended over heads for [T, H, D], and was
    causal for vision towers."""
    attn, qkv = make_magi_attn_func(), make_qkv(18)
    flat = truth(qkv, AttnMaskSpec.causal(18))
    assert close(attn(*qkv), flat)
    batched = attn(*(t[None] for t in qkv))
    assert batched.shape == (1, 18, HEADS, HEAD_DIM)
    assert close(batched[0], flat)
    assert close(attn(*qkv, is_causal=False), truth(qkv, AttnMaskSpec.varlen([18], causal=False)))


def test_8_rows_of_a_batch_do_not_see_each_other():
    """The original ran a batch of several rows as one causal sequence."""
    qkv, attn = make_qkv(24), make_magi_attn_func()
    rows = attn(*(t.unflatten(0, (3, 8)) for t in qkv))
    assert close(rows.flatten(0, 1), truth(qkv, AttnMaskSpec.varlen([8] * 3)))
    assert not close(rows.flatten(0, 1), truth(qkv, AttnMaskSpec.causal(24)))
    tree = AttnMaskSpec.prefix_tree([4, 2, 2], [[0, 1], [0, 2]])[0]
    both = attn(*(t.unflatten(0, (3, 8)) for t in qkv), magi_attn_spec=tree)
    for row in range(3):
        part = [t[8 * row : 8 * row + 8] for t in qkv]
        assert close(both[row], truth(part, tree))


def test_9_padding_between_documents_at_one_rank():
    """cu_seqlens of the real tokens gave wrong offsets, and a key shorter than q; one document was
    taken for none."""
    ids = packed_batch()["input_ids"]
    rows = torch.stack([ids[:14], ids[14:28]])  # two rows: documents of 6 + 5 and 9, padding behind each
    batch = {
        "input_ids": rows,
        "labels": rows.clone(),
        "position_ids": torch.tensor([[*range(6), 0, *range(5), 0, 0], [*range(9), *[0] * 5]]),
        "seq_lens": torch.tensor([[6, 5], [9, -1000]]),
        "seq_lens_padded": torch.tensor([[7, 7], [14, -1000]]),
    }
    model = CustomModel()
    _, flat = MagiState(True, True).prepare_llm_batch(model, batch, None, is_thd=True, pad_id=0, num_chunks=1)
    logits = model(flat["input_ids"], flat["position_ids"], magi_attn_spec=flat["magi_attn_spec"])
    documents = [(0, 6), (7, 12), (14, 23)]
    for start, end in documents:
        tokens = rows.flatten()[start:end]
        assert close(logits[start:end], model(tokens, torch.arange(end - start)).double())
    real = torch.zeros(28, dtype=torch.bool)
    for start, end in documents:
        real[start:end] = True
    assert torch.equal(flat["padding_mask"], ~real)
    assert (flat["labels"][~real] == -100).all()
    assert flat["cu_seqlens"].tolist() == [0, 6, 11, 20]
    assert flat["cu_seqlens_padded"].tolist() == [0, 7, 14, 28]
    # The same from cu_seqlens at the call, and a refusal without the padded sums.
    named = {"cu_seqlens": flat["cu_seqlens"], "cu_seqlens_padded": flat["cu_seqlens_padded"]}
    again = model(flat["input_ids"], flat["position_ids"], **named)
    assert close(again[real], logits[real].double())
    with pytest.raises(ValueError, match="pass cu_seqlens_padded"):
        model(flat["input_ids"], flat["position_ids"], cu_seqlens=flat["cu_seqlens"])


def test_9_one_document_in_cu_seqlens():
    """Two entries are one document: shorter than q it is padding that must be told, and no other mask."""
    qkv, attn = make_qkv(12), make_magi_attn_func()
    magi.set_active_attn_spec(AttnMaskSpec.varlen([6, 6]))
    assert close(attn(*qkv, cu_seqlens=torch.tensor([0, 12])), truth(qkv, AttnMaskSpec.causal(12)))
    padded = {"cu_seqlens": torch.tensor([0, 7]), "cu_seqlens_padded": torch.tensor([0, 12])}
    part = [t[:7] for t in qkv]
    assert close(attn(*qkv, **padded)[:7], truth(part, AttnMaskSpec.causal(7)))


class DeafModel(CustomModel):
    """Configured for "magi" and attending by something else, as Automodel's Qwen2 did."""

    def forward(self, input_ids, position_ids, **attn_kwargs):
        return self.head(self.embedding(input_ids))


def deaf_on_rank(batch):
    group = fresh_group()
    magi.set_active_cp_group(group)
    model, state = DeafModel(), MagiState(True, True, group, 2)
    for _ in range(2):
        _, new = state.prepare_llm_batch(model, batch, None, is_thd=False, pad_id=0, num_chunks=1)
        model(new["input_ids"], new["position_ids"])


def test_10_a_mask_that_no_layer_uses_is_noticed():
    """A model that never calls the attention function dropped the prefix tree without a word."""
    batch = {"input_ids": packed_batch()["input_ids"][None]}
    with pytest.raises(Exception, match="no attention layer of DeafModel used the mask"):
        run_on_ranks(2, deaf_on_rank, batch)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes_are_kept(dtype):
    """The original computed everything in bf16."""
    qkv = make_qkv(32, dtype=dtype)
    out = make_magi_attn_func()(*qkv)
    assert out.dtype == dtype
    assert close(out, truth(qkv, AttnMaskSpec.causal(32)), limit=4 * torch.finfo(dtype).eps)


def test_what_would_be_ignored_is_refused():
    qkv, attn = make_qkv(8), make_magi_attn_func()
    with pytest.raises(ValueError, match="would ignore attention_mask, dropout_p"):
        attn(*qkv, attention_mask=torch.ones(1, 8), dropout_p=0.1)
    with pytest.raises(ValueError, match="mask is over 9 tokens and q has 8 rows"):
        attn(*qkv, magi_attn_spec=AttnMaskSpec.causal(9))
    batch = {"input_ids": torch.arange(8)[None]}
    with pytest.raises(ValueError, match="num_chunks is 2"):
        MagiState(True, True).prepare_llm_batch(CustomModel(), batch, None, False, 0, 2)
    with pytest.raises(ValueError, match="!= flat input length 9"):
        magi._packed_cp_doc_seqlens({"cu_seqlens": torch.tensor([0, 8, -1000])}, 9)


def test_softcap_and_sinks():
    qkv, attn = make_qkv(16), make_magi_attn_func()
    sinks = torch.linspace(-1, 1, HEADS)
    q, k, v = (t.double() for t in qkv)
    mask = AttnMaskSpec.causal(16).to_dense()
    expected = dense_attention(q, k, v, mask, scale=HEAD_DIM**-0.5, softcap=2.0, sink=sinks.double())[0]
    assert close(attn(*qkv, softcap=2.0, sinks=sinks), expected)


def unprepared_on_rank():
    magi.set_active_cp_group(fresh_group())
    try:
        make_magi_attn_func()(*make_qkv(8))
    finally:
        magi.set_active_cp_group(None)


def test_several_ranks_and_no_prepared_step():
    with pytest.raises(Exception, match="no step is prepared for the active group"):
        run_on_ranks(2, unprepared_on_rank)
