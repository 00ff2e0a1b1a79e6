"""The attention factory: one process, CPU. Letters in names are those of the original's list of faults.

Where a test says what the original did, a few lines here stand for it, so that the test shows the difference.
"""

from __future__ import annotations

import re
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cpattn import AttnMaskSpec, dispatch, make_key, undispatch
from cpattn.automodel.attention_utils import (
    initialize_attn_module_and_func,
    postprocess_output_for_attn,
    preprocess_args_and_kwargs_for_attn,
)
from tests_dist.compat.automodel.dense import additive, band, cu_seqlens, dense_batch, rel_error, same_document
from tests_dist.support.harness import run_on_ranks

HEADS, GROUPS, DIM, SCALE = 4, 2, 8, 0.3
# Every implementation that computes here; "te" with the portable module.
LOCAL = ("te", "sdpa", "flex", "magi", "cpattn")


def make_layer(impl: str, **kwargs: Any) -> Callable[..., Tensor]:
    """A layer's attention: q, k, v in the layer's layout to out in the layer's layout."""
    made = {"portable": True, **kwargs} if impl == "te" else kwargs
    _, func = initialize_attn_module_and_func(impl, HEADS, DIM, DIM, SCALE, num_gqa_groups=GROUPS, **made)

    def layer(q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor | None = None, **batch: Any) -> Tensor:
        q_, k_, v_, extra = preprocess_args_and_kwargs_for_attn(q, k, v, attention_mask, impl, **batch)
        out = postprocess_output_for_attn(func(q_, k_, v_, **extra), impl)
        return out.reshape(*q.shape[:-1], v.shape[-1])

    return layer


def inputs(*shape: int, num_k: int | None = None, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of [*shape, heads, dim]; shape ends in the tokens."""
    generator = torch.Generator().manual_seed(seed)
    key_shape = shape if num_k is None else (*shape[:-1], num_k)
    return (
        torch.randn(*shape, HEADS, DIM, generator=generator),
        torch.randn(*key_shape, GROUPS, DIM, generator=generator),
        torch.randn(*key_shape, GROUPS, DIM, generator=generator),
    )


def original_sdpa(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """How the original's layer ran SDPA over [B, S, heads, dim], options being what it passed."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=SCALE, enable_gqa=True, **options).transpose(1, 2)


def before(impl: str, left: int) -> tuple[int, int]:
    """window_size for `left` keys before the query's own: under "sdpa" and "fa4" Automodel counts that key too."""
    return (left + 1 if impl in ("sdpa", "fa4") else left, 0)


class CountSyncs(TorchDispatchMode):
    """Counts reads of a tensor's value by Python."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            self.count += 1
        return func(*args, **(kwargs or {}))


# ----------------------------------------------------------------------------------------------------
# All implementations say the same.


@pytest.mark.parametrize("impl", [*LOCAL, "fa4"])
@pytest.mark.parametrize(("kind", "left"), [(tuple, None), (tuple, 3), (list, 5)])
def test_causal_batches_against_dense(impl: str, kind: type, left: int | None) -> None:
    q, k, v = inputs(2, 19)
    batch = {} if left is None else {"window_size": kind(before(impl, left))}
    leaves = [x.requires_grad_() for x in (q, k, v)]
    got = make_layer(impl)(q, k, v, **batch)
    want = dense_batch(q, k, v, band(19, 19, left), scale=SCALE)
    assert rel_error(got, want) < 1e-6
    dout = torch.randn(got.shape)
    for mine, theirs in zip(
        torch.autograd.grad(got, leaves, dout), torch.autograd.grad(want, leaves, dout.double()), strict=True
    ):
        assert rel_error(mine, theirs) < 1e-6


def test_a_windows_are_as_automodel_documents_them() -> None:
    """(W, 0) is W + 1 keys under te and W under sdpa and fa4; an int is W keys everywhere."""
    window = 4
    q, k, v = inputs(1, 17)
    counted = dense_batch(q, k, v, band(17, 17, window - 1), scale=SCALE)
    beside = dense_batch(q, k, v, band(17, 17, window), scale=SCALE)
    assert rel_error(original_sdpa(q, k, v, attn_mask=band(17, 17, window - 1)), counted) < 1e-6  # k > q - left
    for impl in (*LOCAL, "fa4"):
        want = counted if impl in ("sdpa", "fa4") else beside
        assert rel_error(make_layer(impl)(q, k, v, window_size=(window, 0)), want) < 1e-6
        for name in ("sliding_window", "window_size"):
            assert rel_error(make_layer(impl)(q, k, v, **{name: window}), counted) < 1e-6
    for impl in ("sdpa", "fa4"):
        with pytest.raises(ValueError, match=f"under attn_impl '{impl}': left counts the query's own key"):
            make_layer(impl)(q, k, v, window_size=(0, 0))


def test_a_windows_that_disagree_are_refused() -> None:
    q, k, v = inputs(1, 5)
    preprocess_args_and_kwargs_for_attn(q, k, v, None, "te", window_size=(3, 0), sliding_window=4)
    with pytest.raises(ValueError, match=r"sliding_window=W is window_size=\(W - 1, 0\)"):
        preprocess_args_and_kwargs_for_attn(q, k, v, None, "te", window_size=(4, 0), sliding_window=4)
    with pytest.raises(ValueError, match="window is 'all'"):
        preprocess_args_and_kwargs_for_attn(q, k, v, None, "sdpa", window_size="all")


@pytest.mark.parametrize("impl", LOCAL)
@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
def test_b_window_and_matrix_both_hold(impl: str, kind: torch.dtype) -> None:
    """The original dropped the matrix where a window was given."""
    q, k, v = inputs(2, 16)
    visible = torch.rand(2, 16, 16, generator=torch.Generator().manual_seed(1)) < 0.6
    visible |= torch.eye(16, dtype=torch.bool)
    matrix = visible[:, None] if kind == torch.bool else additive(visible)
    want = dense_batch(q, k, v, visible & band(16, 16, 5, right=0), scale=SCALE)
    assert rel_error(make_layer(impl)(q, k, v, matrix, window_size=before(impl, 5)), want) < 1e-6
    original = original_sdpa(q, k, v, attn_mask=band(16, 16, 4))
    assert rel_error(original, want) > 1e-2


@pytest.mark.parametrize("impl", LOCAL)
@pytest.mark.parametrize("left", [None, 4])
def test_c_packed_documents_do_not_see_each_other(impl: str, left: int | None) -> None:
    """The original's sdpa ignored cu_seqlens, and took [T, heads, dim] for [B, S, heads, dim]."""
    lengths = [7, 0, 12, 1, 9]
    q, k, v = inputs(sum(lengths))
    window = {} if left is None else {"window_size": before(impl, left)}
    got = make_layer(impl)(q, k, v, cu_seqlens=cu_seqlens(lengths), max_seqlen=12, **window)
    visible = same_document(lengths) & band(29, 29, left)
    want = dense_batch(q[None], k[None], v[None], visible, scale=SCALE)[0]
    assert rel_error(got, want) < 1e-6
    ignored = original_sdpa(q[None], k[None], v[None], is_causal=True)[0]
    assert rel_error(ignored, want) > 1e-2
    with pytest.raises(RuntimeError):  # heads for tokens
        F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True)


@pytest.mark.parametrize("impl", LOCAL)
def test_c_padding_between_documents(impl: str) -> None:
    lengths, padded = [5, 8, 3], [8, 8, 4]
    q, k, v = inputs(23)  # three rows beyond the last document
    got = make_layer(impl)(
        q, k, v, cu_seqlens=cu_seqlens(lengths), cu_seqlens_padded=cu_seqlens(padded), max_seqlen=8
    )
    want = torch.zeros(q.shape, dtype=torch.float64)
    for start, length in zip((0, 8, 16), lengths, strict=True):
        rows = slice(start, start + length)
        document = (x[None, rows] for x in (q, k, v))
        want[rows] = dense_batch(*document, band(length, length), scale=SCALE)[0]
    assert rel_error(got, want) < 1e-6
    assert (got[5:8] == 0).all()


@pytest.mark.parametrize("impl", ["sdpa", "flex", "magi", "cpattn"])
def test_c_documents_of_a_batch_in_bshd(impl: str) -> None:
    """cu_seqlens over the rows of [B, S], one after the other."""
    q, k, v = inputs(2, 10)
    got = make_layer(impl)(q, k, v, cu_seqlens=cu_seqlens([4, 6, 10]))
    visible = torch.cat([same_document([4, 6]), same_document([10])]) & band(10, 10)
    assert rel_error(got, dense_batch(q, k, v, visible, scale=SCALE)) < 1e-6


@pytest.mark.parametrize("impl", LOCAL)
def test_d_no_mask_stays_no_mask(impl: str) -> None:
    """The original's preprocessing said is_causal=True whatever the layer was made with."""
    q, k, v = inputs(2, 11)
    layer = make_layer(impl, attn_mask_type="no_mask")
    want = dense_batch(q, k, v, torch.ones(1, 11, 11, dtype=torch.bool), scale=SCALE)
    assert rel_error(layer(q, k, v, attn_mask_type="no_mask"), want) < 1e-6
    assert rel_error(original_sdpa(q, k, v, is_causal=True), want) > 1e-2
    padding = torch.ones(2, 11)
    padding[0, 7:] = 0
    got = layer(q, k, v, padding, attn_mask_type="no_mask")
    want = dense_batch(q, k, v, padding.bool()[:, None, :].expand(2, 11, 11), scale=SCALE)
    real = padding.bool()
    assert rel_error(got[real], want[real]) < 1e-6


def test_d_sdpa_refuses_a_causal_call_of_a_layer_that_is_not() -> None:
    """Model code that does not say attn_mask_type to the preprocessing gets an error, not causal numbers."""
    q, k, v = inputs(1, 6)
    layer = make_layer("sdpa", attn_mask_type="no_mask")
    padding = torch.tensor([[1, 1, 1, 1, 0, 0]])
    for mask, batch in ((None, {}), (padding, {}), (None, {"window_size": (2, 0)})):
        with pytest.raises(ValueError, match="pass attn_mask_type to preprocess_args_and_kwargs_for_attn"):
            layer(q, k, v, mask, **batch)


@pytest.mark.parametrize("impl", ["sdpa", "flex", "cpattn"])
@pytest.mark.parametrize("left", [None, 2])
def test_e_last_query_stands_at_last_key(impl: str, left: int | None) -> None:
    """The original was top-left aligned without a window, and bottom-right with one."""
    q, k, v = inputs(2, 4, num_k=9)
    window = {} if left is None else {"window_size": before(impl, left)}
    want = dense_batch(q, k, v, band(4, 9, left, shift=5), scale=SCALE)
    assert rel_error(make_layer(impl)(q, k, v, **window), want) < 1e-6
    if left is None:
        assert rel_error(original_sdpa(q, k, v, is_causal=True), want) > 1e-2


@pytest.mark.parametrize("impl", LOCAL)
def test_f_rows_that_see_nothing_are_zero(impl: str) -> None:
    """Left padding makes queries without keys: softmax over nothing is NaN unless someone takes care."""
    q, k, v = inputs(2, 9)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    padding = torch.ones(2, 9, dtype=torch.long)
    padding[0, :4] = 0
    visible = padding.bool()[:, None, :] & band(9, 9)
    scores = torch.zeros(2, 9, 9).masked_fill(~visible, -torch.inf)
    assert scores.softmax(-1)[0, :4].isnan().all()  # the original's mask, taken at its word
    got = make_layer(impl)(q, k, v, padding)
    assert (got[0, :4] == 0).all()
    want = dense_batch(q, k, v, visible, scale=SCALE)
    assert rel_error(got[padding.bool()], want[padding.bool()]) < 1e-6
    grads = torch.autograd.grad(got.sum(), leaves)
    assert all(g.isfinite().all() for g in grads)
    assert (grads[0][0, :4] == 0).all()


def test_f_kernels_are_never_given_an_empty_row() -> None:
    """So that it does not hang on the kernel whether 0 / 0 is 0."""
    _, func = initialize_attn_module_and_func("sdpa", HEADS, DIM, DIM, SCALE, num_gqa_groups=GROUPS)
    padding = torch.tensor([[0, 0, 1, 1, 1]])
    *qkv, extra = preprocess_args_and_kwargs_for_attn(*inputs(1, 5), padding, "sdpa")
    assert not extra["attn_mask"][0, 0, 0].any()
    with mock.patch.object(F, "scaled_dot_product_attention", wraps=F.scaled_dot_product_attention) as sdpa:
        func(*qkv, **extra)
    assert sdpa.call_args.kwargs["attn_mask"].any(-1).all()


def test_g_a_mask_is_read_and_built_once_for_all_layers() -> None:
    """The original read the 2-D mask and built the 4-D one anew in every layer."""
    q, k, v = inputs(2, 8)
    padding = torch.ones(2, 8, dtype=torch.long)
    padding[1, 5:] = 0

    def layers(num: int) -> list[Tensor]:
        return [
            preprocess_args_and_kwargs_for_attn(q, k, v, padding, "sdpa", window_size=(4, 0))[3]["attn_mask"]
            for _ in range(num)
        ]

    with CountSyncs() as syncs:
        masks = layers(5)
    assert syncs.count <= 3
    assert all(mask is masks[0] for mask in masks)
    with CountSyncs() as syncs:
        layers(5)
    assert syncs.count == 0
    padding[0, 0] = 0  # written to: the old mask is void
    assert not torch.equal(layers(1)[0], masks[0])


def test_h_flex_heeds_the_layers_scale_the_padding_and_the_window() -> None:
    """The original's flex used dim ** -0.5, saw padding, and raised TypeError for cu_seqlens and window_size."""
    q, k, v = inputs(2, 12)
    padding = torch.ones(2, 12)
    padding[1, 8:] = 0
    got = make_layer("flex")(q, k, v, padding, window_size=(4, 0))
    visible = padding.bool()[:, None, :] & band(12, 12, 4)
    want = dense_batch(q, k, v, visible, scale=SCALE)
    assert rel_error(got[padding.bool()], want[padding.bool()]) < 1e-6
    original = dense_batch(q, k, v, band(12, 12, 4))
    assert rel_error(original[padding.bool()], want[padding.bool()]) > 1e-3
    called = make_layer("flex")(q, k, v, scale=0.7, enable_gqa=True)
    assert rel_error(called, dense_batch(q, k, v, band(12, 12), scale=0.7)) < 1e-6


def test_i_te_matrices() -> None:
    """The original put two dims into any mask: a matrix [B, 1, S, S] became 6-D."""
    q, k, v = inputs(2, 6)
    matrix = band(6, 6)[None].expand(2, 1, 6, 6)
    assert matrix.logical_not().unsqueeze(1).unsqueeze(2).dim() == 6

    def te(mask: Tensor, **batch: Any) -> dict[str, Any]:
        return preprocess_args_and_kwargs_for_attn(q, k, v, mask, "te", **batch)[3]

    assert te(matrix) == {"window_size": (-1, 0), "attn_mask_type": "causal"}
    assert te(additive(band(6, 6, 2)), window_size=(4, 0)) == {"window_size": (2, 0), "attn_mask_type": "causal"}
    tree = matrix.clone()
    tree[0, 0, 5, 1] = False
    extra = te(tree)
    assert (extra["attn_mask_type"], extra["window_size"]) == ("arbitrary", (-1, -1))
    assert torch.equal(extra["attention_mask"], ~tree)
    with pytest.raises(ValueError, match="is a bias"):
        te(torch.randn(2, 1, 6, 6))


@pytest.mark.parametrize("impl", LOCAL)
def test_i_padding_in_four_dims(impl: str) -> None:
    """[B, 1, 1, S] says which keys there are, and the layer says causal."""
    q, k, v = inputs(2, 6)
    padding = torch.tensor([[1, 1, 1, 1, 0, 0], [1] * 6]).bool()
    want = dense_batch(q, k, v, padding[:, None] & band(6, 6), scale=SCALE)
    for mask in (padding[:, None, None], additive(padding[:, None])):
        got = make_layer(impl)(q, k, v, mask)
        assert rel_error(got[padding], want[padding]) < 1e-6
    with pytest.raises(ValueError, match=r"expected \[B, S\], \[B, 1, 1, S\]"):
        make_layer(impl)(q, k, v, torch.ones(2, 1, 6))


def test_j_magi_takes_padding_as_a_mask() -> None:
    """The original dropped attention_mask: padding was attended to."""
    q, k, v = inputs(2, 6)
    padding = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]])
    extra = preprocess_args_and_kwargs_for_attn(q, k, v, padding, "magi", max_seqlen=6)[3]
    want = torch.block_diag(*(padding[b].outer(padding[b]).bool() & band(6, 6)[0] for b in range(2))).bool()
    assert (torch.from_numpy(extra["magi_attn_spec"].to_dense()) == want).all()
    assert preprocess_args_and_kwargs_for_attn(q, k, v, torch.ones(2, 6), "magi")[3] == {}
    with pytest.raises(ValueError, match="two masks"):
        preprocess_args_and_kwargs_for_attn(
            q, k, v, padding, "magi", magi_attn_spec=AttnMaskSpec.varlen([6, 6])
        )


@pytest.mark.parametrize("impl", ["magi", "cpattn", "flex", "fa4"])
def test_j_sinks_said_at_init_come_at_each_call(impl: str) -> None:
    """As GPT-OSS's attention is made under every implementation; the original's flex took them or forgot them."""
    layer = make_layer(impl, softmax_type="learnable")
    q, k, v = inputs(2, 9)
    sinks = torch.linspace(-1, 1, HEADS)
    name = "learnable_sink" if impl == "fa4" else "sink_weights"
    want = dense_batch(q, k, v, band(9, 9), scale=SCALE, sink=sinks)
    assert rel_error(layer(q, k, v, **{name: sinks}), want) < 1e-6
    with pytest.raises(ValueError, match="made with softmax_type='learnable': each call needs"):
        layer(q, k, v)
    with pytest.raises(ValueError, match="softmax_type is 'off-by-one'"):
        initialize_attn_module_and_func(impl, 4, 8, 8, 0.3, softmax_type="off-by-one")
    with pytest.raises(ValueError, match="has no dropout"):
        initialize_attn_module_and_func(impl, 4, 8, 8, 0.3, attention_dropout=0.1)


def test_fa4_takes_what_automodel_passes_to_it() -> None:
    """Padding, and documents among padding: cu_seqlens counts the tokens of packed_token_indices only."""
    q, k, v = inputs(2, 10)
    padding = torch.ones(2, 10, dtype=torch.long)
    padding[1, 7:] = 0
    visible = band(10, 10) & padding.bool()[:, None] & padding.bool()[:, :, None]
    want = dense_batch(q, k, v, visible, scale=SCALE)
    assert rel_error(make_layer("fa4")(q, k, v, padding), want) < 1e-6
    ids = torch.tensor([[1] * 4 + [2] * 5 + [0], [3] * 6 + [0] * 4])
    packing = {
        "cu_seqlens": torch.tensor([0, 4, 9, 15], dtype=torch.int32),
        "packed_token_indices": ids.flatten().nonzero().flatten(),
        "max_seqlen": 6,
    }
    visible = band(10, 10, 2) & (ids[:, :, None] == ids[:, None]) & (ids > 0)[:, None]
    want = dense_batch(q, k, v, visible, scale=SCALE)
    assert rel_error(make_layer("fa4")(q, k, v, **packing, window_size=(3, 0)), want) < 1e-6
    packing["packed_token_indices"] = packing["packed_token_indices"].flip(0)
    with pytest.raises(ValueError, match="each document of cu_seqlens must have neighbouring places"):
        make_layer("fa4")(q, k, v, **packing)
    with pytest.raises(ValueError, match=r"'fa4' takes \[B, S, heads, dim\]"):
        make_layer("fa4")(q[0], k[0], v[0], cu_seqlens=torch.tensor([0, 10], dtype=torch.int32))


# ----------------------------------------------------------------------------------------------------
# Guards.


@pytest.mark.parametrize(
    ("impl", "name", "value"),
    [
        ("te", "softcap", 30.0),
        ("sdpa", "softcap", 30.0),
        ("te", "sink_weights", torch.zeros(4)),
        ("sdpa", "sinks", torch.zeros(4)),
        ("flex", "dropout_p", 0.1),
        ("cpattn", "dropout", 0.1),
        ("cpattn", "position_bias", torch.zeros(1)),
        ("te", "key", object()),
    ],
)
def test_what_would_be_ignored_is_refused(impl: str, name: str, value: Any) -> None:
    q, k, v = inputs(1, 4)
    with pytest.raises(ValueError, match=f"{impl!r} would ignore {name}"):
        preprocess_args_and_kwargs_for_attn(q, k, v, None, impl, **{name: value})
    preprocess_args_and_kwargs_for_attn(q, k, v, None, impl, **{name: None})


def test_unknown_names() -> None:
    q, k, v = inputs(1, 4)
    with pytest.raises(ValueError, match="Unsupported attention implementation: 'eager'"):
        initialize_attn_module_and_func("eager", 4, 8, 8, 0.3)
    with pytest.raises(ValueError, match="attn_impl is 'eager'"):
        preprocess_args_and_kwargs_for_attn(q, k, v, None, "eager")
    with pytest.raises(ValueError, match="attn_mask_type is 'tree'"):
        initialize_attn_module_and_func("sdpa", 4, 8, 8, 0.3, attn_mask_type="tree")
    with pytest.raises(TypeError, match=r"Unsupported SDPA attention kwargs: \['bogus'\]"):
        initialize_attn_module_and_func("sdpa", 4, 8, 8, 0.3, bogus=1)
    with pytest.raises(TypeError, match=r"Unsupported cpattn attention kwargs: \['bogus'\]"):
        initialize_attn_module_and_func("cpattn", 4, 8, 8, 0.3, bogus=1)
    for impl in ("sdpa", "flex", "cpattn"):
        _, func = initialize_attn_module_and_func(impl, 4, 8, 8, 0.3)
        with pytest.raises(TypeError, match=r"Unsupported .* kwargs: \['bogus'\]"):
            func(q, k, v, bogus=1)


def test_masks_that_say_two_things_are_refused() -> None:
    q, k, v = inputs(1, 6)
    cu = cu_seqlens([2, 4])
    for impl in ("te", "sdpa", "flex", "cpattn", "magi"):
        with pytest.raises(ValueError, match="packed documents are said by"):
            preprocess_args_and_kwargs_for_attn(q, k, v, torch.ones(1, 6), impl, cu_seqlens=cu)
    with pytest.raises(ValueError, match="cu_seqlens beside cu_seqlens_q"):
        preprocess_args_and_kwargs_for_attn(q, k, v, None, "te", cu_seqlens=cu, cu_seqlens_q=cu)
    with pytest.raises(ValueError, match="documents need cu_seqlens"):
        preprocess_args_and_kwargs_for_attn(q, k, v, None, "sdpa", cu_seqlens_q=cu)
    with pytest.raises(ValueError, match="ends at row 9"):
        make_layer("sdpa")(*inputs(6), cu_seqlens=cu_seqlens([9]))
    with pytest.raises(ValueError, match="values down to -1"):
        make_layer("cpattn")(q, k, v, -torch.ones(1, 6))
    with pytest.raises(ValueError, match="mask and cu_seqlens are 2 masks"):
        make_layer("cpattn")(q, k, v, mask=AttnMaskSpec.causal(6), cu_seqlens=cu)


@pytest.mark.parametrize("impl", ["sdpa", "flex", "magi", "cpattn"])
def test_document_numbers_in_a_2d_mask(impl: str) -> None:
    """Neat packing numbers documents in the mask. Cast to bool, as the original did, they see each other."""
    q, k, v = inputs(2, 10)
    ids = torch.tensor([[1, 1, 1, 2, 2, 2, 2, 3, 0, 0], [1] * 10])
    got = make_layer(impl)(q, k, v, ids)
    visible = (ids[:, :, None] == ids[:, None]) & (ids > 0)[:, None] & band(10, 10)
    want = dense_batch(q, k, v, visible, scale=SCALE)
    real = ids > 0
    assert rel_error(got[real], want[real]) < 1e-6
    merged = original_sdpa(q, k, v, attn_mask=((ids > 0)[:, None] & band(10, 10))[:, None])
    assert rel_error(merged[real], want[real]) > 1e-2
    with pytest.raises(ValueError, match="document numbers above 1"):
        preprocess_args_and_kwargs_for_attn(q, k, v, ids, "te")


# ----------------------------------------------------------------------------------------------------
# What the original's callers rely on.


def test_te_arguments() -> None:
    q, k, v = inputs(2, 8)

    def te(mask: Tensor | None = None, **batch: Any) -> dict[str, Any]:
        out = preprocess_args_and_kwargs_for_attn(q, k, v, mask, "te", **batch)
        assert out[0] is q
        assert out[1] is k
        assert out[2] is v
        return out[3]

    assert te() == {"window_size": (-1, 0)}
    assert te(window_size=(512, 0)) == {"window_size": (512, 0)}
    assert te(cp_size=2, qkv_format="thd", seq_lens=None) == {"window_size": (-1, 0)}
    padded = te(torch.tensor([[1.0] * 8, [1.0] * 4 + [0.0] * 4]))
    assert set(padded) == {"attn_mask_type", "window_size", "attention_mask"}
    assert padded["attn_mask_type"] == "padding_causal"
    assert padded["attention_mask"].shape == (2, 1, 1, 8)
    assert padded["attention_mask"][1, 0, 0].tolist() == [False] * 4 + [True] * 4
    cu, starts = cu_seqlens([3, 13]), cu_seqlens([4, 12])
    packed = te(cu_seqlens=cu, cu_seqlens_padded=starts, max_seqlen=13)
    assert packed == {
        "window_size": (-1, 0),
        "qkv_format": "thd",
        "attn_mask_type": "padding_causal",
        "cu_seqlens_q": cu,
        "cu_seqlens_kv": cu,
        "cu_seqlens_q_padded": starts,
        "cu_seqlens_kv_padded": starts,
        "pad_between_seqs": True,
        "max_seqlen_q": 13,
        "max_seqlen_kv": 13,
    }
    both = te(cu_seqlens_q=cu, cu_seqlens_kv=starts, max_seqlen_q=13, cu_seqlens_q_padded=starts)
    assert both["cu_seqlens_kv"] is starts
    assert both["pad_between_seqs"] is True
    assert "max_seqlen_kv" not in both


def test_te_is_made_from_transformer_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    made: dict[str, Any] = {}

    class DotProductAttention(torch.nn.Module):
        def __init__(self, **kwargs: Any) -> None:
            super().__init__()
            made.update(kwargs)

    package = types.ModuleType("transformer_engine.pytorch.attention")
    package.DotProductAttention = DotProductAttention  # type: ignore[attr-defined]
    for name in ("transformer_engine", "transformer_engine.pytorch"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, package.__name__, package)
    module, func = initialize_attn_module_and_func(
        "te", 8, 24, 16, 0.2, num_gqa_groups=2, softmax_type="learnable", attention_dropout=0.1
    )
    assert isinstance(module, DotProductAttention)
    assert func == module.__call__
    assert made == {
        "num_attention_heads": 8,
        "kv_channels": (24, 16),
        "attn_mask_type": "causal",
        "qkv_format": "bshd",
        "softmax_scale": 0.2,
        "num_gqa_groups": 2,
        "softmax_type": "learnable",
        "attention_dropout": 0.1,
    }


def test_te_absent_is_an_error_not_another_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformer_engine", None)
    with pytest.raises(ImportError, match="portable=True"):
        initialize_attn_module_and_func("te", 4, 8, 8, 0.3)


def test_portable_te_has_sinks_and_other_value_dims() -> None:
    module, func = initialize_attn_module_and_func(
        "te", HEADS, DIM, 6, SCALE, num_gqa_groups=GROUPS, portable=True, softmax_type="learnable"
    )
    assert module is not None
    q, k, _ = inputs(2, 7)
    v = torch.randn(2, 7, GROUPS, 6)
    with torch.no_grad():
        module.softmax_offset.copy_(torch.randn(HEADS))  # type: ignore[operator,union-attr]
    out = func(q, k, v)
    assert out.shape == (2, 7, HEADS * 6)
    want = dense_batch(q, k, v, band(7, 7), scale=SCALE, sink=module.softmax_offset)  # type: ignore[arg-type]
    assert rel_error(out, want.flatten(2)) < 1e-6
    out.sum().backward()
    assert module.softmax_offset.grad.abs().sum() > 0  # type: ignore[union-attr,operator]


def test_sdpa_is_looked_up_at_each_call() -> None:
    """Context parallelism puts its own function in the place of torch's."""
    _, func = initialize_attn_module_and_func("sdpa", 4, 8, 8, 0.125, num_gqa_groups=2)
    q, k, v = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 3, 8), torch.randn(1, 2, 3, 8)
    result, mask = object(), torch.ones(1, 1, 3, 3, dtype=torch.bool)
    with mock.patch.object(F, "scaled_dot_product_attention", return_value=result) as sdpa:
        assert func(q, k, v) is result
        assert sdpa.call_args.args == (q, k, v)
        assert sdpa.call_args.kwargs == {
            "attn_mask": None,
            "dropout_p": 0.0,
            "is_causal": True,
            "scale": 0.125,
            "enable_gqa": True,
        }
        assert func(q, k, v, attn_mask=mask) is result
        args, kwargs = sdpa.call_args
    assert torch.equal(args[1], k.repeat_interleave(2, dim=-3))
    assert torch.equal(args[2], v.repeat_interleave(2, dim=-3))
    assert kwargs["enable_gqa"] is False
    assert kwargs["attn_mask"] is mask


def test_sdpa_arguments() -> None:
    q, k, v = torch.randn(2, 16, 8, 4), torch.randn(2, 16, 8, 4), torch.randn(2, 16, 8, 4)

    def sdpa(mask: Tensor | None = None, **batch: Any) -> dict[str, Any]:
        out = preprocess_args_and_kwargs_for_attn(q, k, v, mask, "sdpa", **batch)
        assert torch.equal(out[0], q.transpose(1, 2))
        assert out[0].is_contiguous()
        return out[3]

    assert sdpa() == {"is_causal": True}
    for dtype in (torch.bool, torch.long, torch.float32):
        assert sdpa(torch.ones(2, 16, dtype=dtype)) == {"is_causal": True}
    matrix = torch.randn(2, 1, 16, 16)
    assert sdpa(matrix) == {"attn_mask": matrix, "is_causal": False}
    assert sdpa(dropout_p=0.5) == {"is_causal": True, "dropout_p": 0.5}
    mask = torch.tensor([[True, True, False, True]])
    x = torch.randn(1, 4, 1, 8)
    extra = preprocess_args_and_kwargs_for_attn(x, x, x, mask, "sdpa")[3]
    assert extra["attn_mask"].shape == (1, 1, 4, 4)
    assert extra["attn_mask"][0, 0].tolist() == [
        [True, False, False, False],
        [True, True, False, False],
        [True, True, False, False],
        [True, True, False, True],
    ]
    assert extra["is_causal"] is False
    windowed = preprocess_args_and_kwargs_for_attn(x, x, x, None, "sdpa", sliding_window=2)[3]
    assert torch.equal(windowed["attn_mask"], band(4, 4, 1)[0])


def test_flex_and_magi_arguments_pass_through() -> None:
    q, k, v = inputs(2, 8)
    sinks = torch.zeros(HEADS)
    call = {"scale": 0.5, "sink_weights": sinks, "sliding_window": 128, "enable_gqa": True}
    q_, _, _, extra = preprocess_args_and_kwargs_for_attn(q, k, v, None, "flex", **call)
    assert torch.equal(q_, q.transpose(1, 2))
    assert extra == call
    spec, cu = AttnMaskSpec.causal(16), cu_seqlens([7, 9])
    q_, _, _, extra = preprocess_args_and_kwargs_for_attn(
        q, k, v, None, "magi", magi_attn_spec=spec, cu_seqlens=cu, max_seqlen=9, window_size=(-1, 0), cp_size=1
    )
    assert q_ is q
    assert extra == {"magi_attn_spec": spec, "cu_seqlens": cu, "window_size": (-1, 0)}


@pytest.mark.parametrize("impl", ["sdpa", "flex"])
def test_postprocess_turns_heads_back(impl: str) -> None:
    batch, packed = torch.randn(2, 3, 5, 4), torch.randn(3, 5, 4)
    assert torch.equal(postprocess_output_for_attn(batch, impl), batch.transpose(1, 2))
    assert torch.equal(postprocess_output_for_attn(packed, impl), packed.transpose(0, 1))
    assert postprocess_output_for_attn(batch, impl).is_contiguous()


@pytest.mark.parametrize("impl", ["te", "magi", "cpattn", "other"])
def test_postprocess_leaves_the_rest_alone(impl: str) -> None:
    x = torch.randn(2, 3, 5, 4)
    assert postprocess_output_for_attn(x, impl) is x


@pytest.mark.parametrize("impl", ["flex", "magi", "cpattn"])
def test_sinks_and_softcap_at_the_call(impl: str) -> None:
    q, k, v = inputs(2, 13)
    sink = torch.randn(HEADS, requires_grad=True)
    want = dense_batch(q, k, v, band(13, 13, 4), scale=SCALE, sink=sink, softcap=2.0)
    got = make_layer(impl)(q, k, v, sink_weights=sink, softcap=2.0, sliding_window=5)
    assert rel_error(got, want) < 1e-6
    mine, theirs = (torch.autograd.grad(out.sum(), sink)[0] for out in (got, want))
    assert rel_error(mine, theirs) < 1e-5


def test_flex_blocks_and_documents() -> None:
    q, k, v = inputs(1, 12)
    got = make_layer("flex", fixed_block_size=5)(q, k, v)
    want = dense_batch(q, k, v, same_document([5, 5, 2]) & band(12, 12), scale=SCALE)
    assert rel_error(got, want) < 1e-6
    with pytest.raises(ValueError, match="no documents are known"):
        make_layer("flex", attn_mask_type="block_causal")(q, k, v)
    with pytest.raises(ValueError, match="fixed_block_size with padding"):
        make_layer("flex", fixed_block_size=5)(q, k, v, cu_seqlens=cu_seqlens([12]))


def test_cpattn_with_a_key_and_a_layers_window() -> None:
    """The key is the mask of the dispatched batch; a layer's window limits it."""
    lengths = [9, 6]
    q, k, v = inputs(1, 15)
    key = make_key(AttnMaskSpec.varlen(lengths), num_heads_q=HEADS, num_heads_kv=GROUPS, head_dim=DIM)
    layer = make_layer("cpattn")
    visible = same_document(lengths) & band(15, 15)
    assert rel_error(layer(q, k, v, key=key), dense_batch(q, k, v, visible, scale=SCALE)) < 1e-6
    near = dense_batch(q, k, v, visible & band(15, 15, 3), scale=SCALE)
    assert rel_error(layer(q, k, v, key=key, window_size=(3, 0)), near) < 1e-6
    assert rel_error(layer(q, k, v, mask=AttnMaskSpec.varlen(lengths), sliding_window=4), near) < 1e-6
    with pytest.raises(ValueError, match="key and attention_mask are 2 masks"):
        layer(q, k, v, torch.ones(1, 15), key=key)


def check_layers_over_ranks() -> None:
    """Two layers of one model, one with a window, over the ranks' shards of two documents."""
    lengths, sink = [13, 24], torch.randn(HEADS)
    spec = AttnMaskSpec.varlen(lengths)
    q, k, v = inputs(37)
    key = make_key(
        spec, num_heads_q=HEADS, num_heads_kv=GROUPS, head_dim=DIM, cp_group=torch.distributed.group.WORLD, chunk_size=4
    )
    layer = make_layer("cpattn")
    local = [dispatch(x, key).requires_grad_() for x in (q, k, v)]
    whole = [x.requires_grad_() for x in (q, k, v)]
    dout = torch.randn(37, HEADS, DIM)
    for left in (None, 5):
        window = {} if left is None else {"window_size": (left, 0)}
        got = layer(local[0][None], local[1][None], local[2][None], key=key, sinks=sink, **window)
        assert got.shape == (1, key.num_tokens, HEADS, DIM)
        visible = same_document(lengths) & band(37, 37, left)
        want = dense_batch(q[None], k[None], v[None], visible, scale=SCALE, sink=sink)[0]
        assert rel_error(undispatch(got[0], key), want) < 1e-6
        mine = torch.autograd.grad(got[0], local, dispatch(dout, key))
        theirs = torch.autograd.grad(want, whole, dout.double())
        for a, b in zip(mine, theirs, strict=True):
            assert rel_error(undispatch(a, key), b) < 1e-5


@pytest.mark.parametrize("cp_size", [2, 3])
def test_cpattn_layers_over_ranks(cp_size: int) -> None:
    run_on_ranks(cp_size, check_layers_over_ranks)


@pytest.mark.parametrize("impl", ["sdpa", "cpattn", "flex"])
def test_layers_compile(impl: str) -> None:
    q, k, v = inputs(2, 12)
    layer = make_layer(impl)
    compiled = torch.compile(layer, backend="eager")
    for batch in ({}, {"sliding_window": 4}):
        assert rel_error(compiled(q, k, v, **batch), layer(q, k, v, **batch)) < 1e-6
    padding = torch.ones(2, 12, dtype=torch.long)
    padding[0, 9:] = 0
    got, want = compiled(q, k, v, padding), layer(q, k, v, padding)
    assert rel_error(got[padding.bool()], want[padding.bool()]) < 1e-6


def test_masks_built_in_inference_mode_serve_training() -> None:
    q, k, v = inputs(1, 8)
    padding = torch.tensor([[1, 1, 1, 1, 1, 1, 0, 0]])
    layer = make_layer("sdpa")
    with torch.inference_mode():
        layer(q, k, v, sliding_window=3)
        layer(q, k, v, padding)
    leaf = q.clone().requires_grad_()
    for args in ((None,), (padding,)):
        layer(leaf, k, v, *args, sliding_window=3).sum().backward()
        layer(leaf, k, v, *args).sum().backward()
    assert leaf.grad is not None


@pytest.mark.parametrize("section", ["attention_utils", "flex_attention", "te_attention"])
def test_the_pages_examples_run(section: str) -> None:
    if section == "te_attention":
        pytest.importorskip("transformers")
    page = (Path(__file__).parents[3] / "docs" / "automodel.md").read_text()
    text = page.split(f"## `{section}`")[1].split("\n## ")[0]
    for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(code, {})
