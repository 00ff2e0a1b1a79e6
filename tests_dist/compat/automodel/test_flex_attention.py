"""`FlexAttention`: one process, CPU, gradients included.

Where a test says what the original did, a few lines here stand for it, so that the test shows the difference.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_mask, flex_attention

from cpattn import AttnMaskSpec
from cpattn.automodel import flex_attention as flex_module
from cpattn.automodel.flex_attention import FlexAttention
from tests_dist.compat.automodel.dense import band, dense_batch, rel_error, same_document

HEADS, GROUPS, DIM = 4, 2, 8


@pytest.fixture(autouse=True)
def own_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test starts without cached masks."""
    monkeypatch.setattr(FlexAttention, "block_masks", OrderedDict())


def inputs(
    batch_size: int, num_q: int, num_k: int | None = None, *, dim_v: int = DIM, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [B, heads, S, dim]."""
    generator = torch.Generator().manual_seed(0)
    num_k = num_q if num_k is None else num_k
    shapes = ((HEADS, num_q, DIM), (GROUPS, num_k, DIM), (GROUPS, num_k, dim_v))
    return tuple(  # type: ignore[return-value]
        torch.randn(batch_size, *shape, generator=generator).to(dtype).requires_grad_() for shape in shapes
    )


def dense(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, **options: Any) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return dense_batch(q, k, v, visible, **options).transpose(1, 2)


def assert_same(got: Tensor, want: Tensor, leaves: tuple[Tensor, ...], tol: float = 1e-6) -> None:
    assert got.shape == want.shape
    assert rel_error(got, want) < tol
    dout = torch.randn(got.shape, generator=torch.Generator().manual_seed(9))
    mine = torch.autograd.grad(got, leaves, dout.to(got.dtype))
    theirs = torch.autograd.grad(want, leaves, dout.to(want.dtype))
    for a, b in zip(mine, theirs, strict=True):
        # A gradient that is 0 (softmax over one key) is off by rounding only.
        assert (a.double() - b.double()).norm() < 2 * tol * (b.double().norm() + 4)


# ----------------------------------------------------------------------------------------------------
# Numbers.


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("window", [0, 1, 5, 100])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_window_sinks_scale_and_gqa_train(sinks: bool, window: int, scale: float | None) -> None:
    q, k, v = inputs(2, 21, dim_v=6)
    sink = torch.randn(HEADS, requires_grad=True) if sinks else None
    got = FlexAttention()(q, k, v, scale=scale, sink_weights=sink, sliding_window=window, enable_gqa=True)
    visible = band(21, 21, window - 1 if window else None)
    want = dense(q, k, v, visible, scale=scale, sink=sink)
    assert_same(got, want, (q, k, v, sink) if sink is not None else (q, k, v))


def test_sinks_and_scale_together() -> None:
    """The original called its kernel without the scale where there were sinks."""
    q, k, v = inputs(1, 16)
    sink = torch.randn(HEADS)
    got = FlexAttention()(q, k, v, scale=0.9, sink_weights=sink, enable_gqa=True)
    assert rel_error(got, dense(q, k, v, band(16, 16), scale=0.9, sink=sink)) < 1e-6
    original = dense(q, k, v, band(16, 16), scale=None, sink=sink)
    assert rel_error(original, got) > 1e-2


def test_call_without_sinks() -> None:
    """The original of the documented version looked for an attribute that nothing set."""

    class Original(torch.nn.Module):
        block_masks: dict[Any, Any] = {}  # noqa: RUF012

        def forward(self) -> Any:
            return self.block_masks[self.mask_key]

    with pytest.raises(AttributeError):
        Original()()
    q, k, v = inputs(1, 9)
    assert rel_error(FlexAttention()(q, k, v, enable_gqa=True), dense(q, k, v, band(9, 9))) < 1e-6


def test_more_keys_than_queries() -> None:
    """The last query stands at the last key; the original put the first at the first."""
    q, k, v = inputs(2, 5, 12)
    for window, left in ((0, None), (4, 3)):
        got = FlexAttention()(q, k, v, sliding_window=window, enable_gqa=True)
        assert_same(got, dense(q, k, v, band(5, 12, left, shift=7)), (q, k, v))
    assert rel_error(dense(q, k, v, band(5, 12)), FlexAttention()(q, k, v, enable_gqa=True)) > 1e-2


def test_low_precision_and_softcap() -> None:
    q, k, v = inputs(1, 33, dtype=torch.bfloat16)
    got = FlexAttention()(q, k, v, sliding_window=9, enable_gqa=True)
    assert got.dtype == torch.bfloat16
    assert rel_error(got, dense(q, k, v, band(33, 33, 8))) < 1e-2
    capped = FlexAttention()(q.float(), k.float(), v.float(), enable_gqa=True, softcap=1.5)
    assert rel_error(capped, dense(q, k, v, band(33, 33), softcap=1.5)) < 1e-6


def test_block_causal_and_fixed_block_size() -> None:
    """Both were in the original's docstring only: its constructor took no argument."""
    q, k, v = inputs(2, 12)
    eos = 7
    tokens = torch.randint(0, 7, (2, 12), generator=torch.Generator().manual_seed(2))
    tokens[0, [3, 8]] = eos
    tokens[1, 11] = eos
    before = tokens.clone()
    module = FlexAttention("block_causal")
    module.set_documents(tokens, eos)
    assert torch.equal(tokens, before)
    documents = torch.cat([same_document([4, 5, 3]), same_document([12])])
    assert_same(module(q, k, v, enable_gqa=True), dense(q, k, v, documents & band(12, 12)), (q, k, v))

    blocks = same_document([5, 5, 2])
    assert_same(
        FlexAttention(fixed_block_size=5)(q, k, v, enable_gqa=True),
        dense(q, k, v, blocks & band(12, 12)),
        (q, k, v),
    )
    both = FlexAttention("block_causal", fixed_block_size=5)
    both.set_documents(tokens, eos)
    got = both(q, k, v, sliding_window=3, enable_gqa=True)
    assert_same(got, dense(q, k, v, blocks & documents & band(12, 12, 2)), (q, k, v))
    assert both.mask_key == ("block_causal", 5)

    full = FlexAttention("no_mask", fixed_block_size=5)(q, k, v, enable_gqa=True)
    assert rel_error(full, dense(q, k, v, blocks)) < 1e-6


def test_a_mask_of_the_callers() -> None:
    """The original took no mask at all."""
    q, k, v = inputs(2, 10)
    spec = AttnMaskSpec.prefix_lm([3, 5], [10, 10])
    visible = torch.from_numpy(spec.to_dense())
    rows = torch.stack([visible[:10, :10], visible[10:, 10:]])
    module = FlexAttention()
    assert_same(module(q, k, v, enable_gqa=True, mask=spec), dense(q, k, v, rows), (q, k, v))
    near = rows & band(10, 10, 3, right=None)
    got = module(q, k, v, sliding_window=4, enable_gqa=True, mask=spec)
    assert rel_error(got, dense(q, k, v, near)) < 1e-6


# ----------------------------------------------------------------------------------------------------
# Masks that are kept.


def test_masks_are_kept_by_all_that_they_depend_on() -> None:
    """The original's key was (window, S_q, S_k): a second batch size or device got the first one's mask."""
    first, second = inputs(3, 16), inputs(2, 16)
    original_key = {(8, q.shape[2], k.shape[2]) for q, k, _ in (first, second)}
    assert len(original_key) == 1
    module = FlexAttention()
    for q, k, v in (first, first, second, second):
        got = module(q, k, v, sliding_window=8, enable_gqa=True)
        assert rel_error(got, dense(q, k, v, band(16, 16, 7))) < 1e-6
    assert len(FlexAttention.block_masks) == 2


def test_few_masks_are_kept() -> None:
    """The original's dictionary grew with every new length."""
    module = FlexAttention()
    for seqlen in range(1, 60):
        module(*inputs(1, seqlen), enable_gqa=True)
    assert len(FlexAttention.block_masks) == flex_module.MAX_CACHED_MASKS


def test_new_lengths_compile_nothing() -> None:
    stats = torch._dynamo.utils.counters["stats"]
    before = stats.get("unique_graphs", 0)
    module = FlexAttention()
    for seqlen in (5, 9, 12):
        module(*inputs(2, seqlen), sliding_window=3, enable_gqa=True)
    assert stats.get("unique_graphs", 0) == before


# ----------------------------------------------------------------------------------------------------
# A kernel put in by hand.


def test_a_replaced_flex_attn_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the original's users replace the compiled kernel by the eager one."""
    calls: list[Any] = []

    def eager(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs["block_mask"])
        return flex_attention(*args, **kwargs)

    tokens = torch.zeros(2, 130, dtype=torch.long)
    tokens[0, 50] = tokens[1, 100] = 1
    with torch.no_grad():
        q, k, v = (x.detach() for x in inputs(2, 130))
        sink = torch.randn(HEADS)
        modules = [FlexAttention(), FlexAttention("block_causal", 70), FlexAttention("no_mask")]
        modules[1].set_documents(tokens, 1)
        options = [{}, {"sliding_window": 20}, {"scale": 0.4, "sink_weights": sink}]
        want = [m(q, k, v, enable_gqa=True, **o) for m in modules for o in options]
        monkeypatch.setattr(FlexAttention, "flex_attn", eager)
        got = [m(q, k, v, enable_gqa=True, **o) for m in modules for o in options]
    assert len(calls) == 9
    assert max(map(rel_error, got, want)) < 1e-5
    assert calls[0].shape[:2] == (1, 1)  # not repeated over rows and heads that it does not depend on
    with pytest.raises(ValueError, match="knows BlockMask only"):
        modules[0](q, k, v, enable_gqa=True, mask=AttnMaskSpec.causal(260))


def test_flex_attn_is_torchs() -> None:
    """Code that borrows the class attribute gets torch's function."""
    q = torch.randn(1, 2, 16, 8)
    assert torch.equal(FlexAttention.flex_attn(q, q, q), flex_attention(q, q, q))


# ----------------------------------------------------------------------------------------------------
# Mask mods.


def drawn(mask_mod: Any, batch_size: int | None, seqlen: int) -> Tensor:
    return create_mask(mask_mod, batch_size, None, seqlen, seqlen, device="cpu")[:, 0]


def test_mask_mods() -> None:
    assert torch.equal(drawn(FlexAttention._get_causal_mask_mod(), None, 6), band(6, 6))
    # window keys, the query's own included, as the original's code has it (its docstring says one more).
    assert torch.equal(drawn(FlexAttention._get_sliding_window_mask_mod(3), None, 8), band(8, 8, 2))
    tokens = torch.tensor([[5, 1, 5, 5, 1, 5], [1, 5, 5, 5, 5, 5]])
    documents = torch.cat([same_document([2, 3, 1]), same_document([1, 5])])
    assert torch.equal(drawn(FlexAttention._get_block_causal_mask_mod(tokens, 1), 2, 6), documents & band(6, 6))
    assert (tokens[:, -1] == 5).all()


def test_fixed_blocks_over_documents() -> None:
    """The original's inner mod saw indices modulo the block: it looked up the documents of block 0."""
    tokens = torch.tensor([[5, 5, 5, 5, 5, 1, 5, 5]])
    inner = FlexAttention._get_block_causal_mask_mod(tokens, 1)
    mod = FlexAttention._fixed_block_mask_mod(inner, 4)
    want = same_document([4, 4]) & same_document([6, 2]) & band(8, 8)
    assert torch.equal(drawn(mod, 1, 8), want)
    assert mod.__name__ == "blocked_mask_mod_block_causal_mask_fixed_block_size_4"

    def original(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return (q_idx // 4 == kv_idx // 4) & inner(b, h, q_idx % 4, kv_idx % 4)

    assert not torch.equal(drawn(original, 1, 8), want)


# ----------------------------------------------------------------------------------------------------
# Refusals.


def test_refusals() -> None:
    q, k, v = inputs(2, 6)
    with pytest.raises(ValueError, match="attn_mask_type is 'tree'"):
        FlexAttention("tree")
    with pytest.raises(ValueError, match="fixed_block_size is 0"):
        FlexAttention(fixed_block_size=0)
    with pytest.raises(ValueError, match="pass enable_gqa=True"):
        FlexAttention()(q, k, v)
    with pytest.raises(ValueError, match="expected \\[B, N, Q, D\\]"):
        FlexAttention()(q[0], k, v)
    with pytest.raises(ValueError, match="same batch size"):
        FlexAttention()(q[:1], k, v, enable_gqa=True)
    with pytest.raises(ValueError, match="sink has shape"):
        FlexAttention()(q, k, v, sink_weights=torch.zeros(3), enable_gqa=True)
    module = FlexAttention("block_causal")
    with pytest.raises(ValueError, match="call set_documents"):
        module(q, k, v, enable_gqa=True)
    module.set_documents(torch.zeros(2, 5, dtype=torch.long), 1)
    with pytest.raises(ValueError, match="set the documents of each batch"):
        module(q, k, v, enable_gqa=True)
    module.set_documents(None)
    with pytest.raises(ValueError, match="call set_documents"):
        module(q, k, v, enable_gqa=True)
    with pytest.raises(ValueError, match="set_documents: batch has shape"):
        module.set_documents(torch.zeros(5), 1)
    with pytest.raises(ValueError, match="blocks need as many keys"):
        FlexAttention(fixed_block_size=2)(*inputs(1, 4, 6), enable_gqa=True)
