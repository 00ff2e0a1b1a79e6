"""TE attention injected into models: one process, CPU. Letters in names are those of the original's list of limits.

Tiny models of transformers run with the portable module and are compared with their own eager attention.
Where a test says what the original did, a few lines here stand for it, so that the test shows the difference.
"""

from __future__ import annotations

import copy
import logging
import sys
import threading
import types
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as imported_by_name
from torch.utils._python_dispatch import TorchDispatchMode

from cpattn.automodel import te_attention
from cpattn.automodel.portable_te import PortableDotProductAttention
from cpattn.automodel.te_attention import (
    _create_te_dot_product_attention,
    _detect_causal_mask,
    _infer_attn_params,
    _make_te_sdpa,
    _maybe_log_stats,
    _patch_module_forward,
    _proj_out_features,
    get_te_attention_stats,
    get_te_extra_state,
    inject_te_attention,
    inject_te_attention_into_module,
    reset_te_attention_stats,
    set_te_extra_state,
)
from tests_dist.compat.automodel.dense import additive, band, cu_seqlens, dense_batch, rel_error, same_document


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test starts with counters at 0 and warnings unsaid."""
    monkeypatch.setattr(te_attention, "_SCALE_MISMATCH_WARNED", False)
    monkeypatch.setattr(te_attention, "_unused_warned", set())
    reset_te_attention_stats()
    yield
    assert F.scaled_dot_product_attention is torch._C._nn.scaled_dot_product_attention


def hits(**others: int) -> dict[str, int]:
    """Counters, 0 where not named."""
    names = ("te_hits", "fallback_mask", "fallback_scale_mismatch", "fallback_dropout", "fallback_unsupported")
    return dict.fromkeys(names, 0) | others


# ----------------------------------------------------------------------------------------------------
# Models.

MODELS = ("llama", "mistral", "gemma", "gemma3", "qwen2")


def make_model(name: str) -> Any:
    """A tiny randomly initialised model; windows of 8 where it has windows."""
    transformers = pytest.importorskip("transformers")
    sizes: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
    }
    kinds = ["sliding_attention", "full_attention"]
    extra: dict[str, dict[str, Any]] = {
        "llama": {},
        "mistral": {"head_dim": 8, "sliding_window": 8},
        "gemma": {"head_dim": 8},
        "gemma3": {"head_dim": 8, "sliding_window": 8, "layer_types": kinds, "query_pre_attn_scalar": 16},
        "qwen2": {"sliding_window": 8, "use_sliding_window": True, "layer_types": kinds},
    }
    title = {"gemma3": "Gemma3Text"}.get(name, name.capitalize())
    config = getattr(transformers, f"{title}Config")(**sizes, **extra[name])
    torch.manual_seed(0)
    model = getattr(transformers, f"{title.removesuffix('Text')}ForCausalLM")(config).eval()
    assert model.config._attn_implementation == "sdpa"
    return model


def make_pair(name: str) -> tuple[Any, Any]:
    """An injected model, and its like with eager attention."""
    model = make_model(name)
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    inject_te_attention(model, portable=True)
    return model, eager


def tokens(batch_size: int, seqlen: int) -> Tensor:
    return torch.randint(0, 64, (batch_size, seqlen), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", MODELS)
def test_models_train_as_eager(name: str) -> None:
    """Unpadded batches, longer than the windows, run on the module in every layer."""
    model, eager = make_pair(name)
    assert model._te_attention_injected is True
    ids = tokens(2, 24)
    got, want = model(ids, labels=ids, use_cache=False), eager(ids, labels=ids, use_cache=False)
    assert get_te_attention_stats() == hits(te_hits=2)
    assert rel_error(got.logits, want.logits) < 1e-5
    got.loss.backward()
    want.loss.backward()
    for mine, theirs in zip(model.parameters(), eager.parameters(), strict=True):
        assert rel_error(mine.grad, theirs.grad) < 1e-5
    assert list(model.state_dict()) == list(eager.state_dict())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batches_go_to_sdpa_with_their_mask(name: str, side: str) -> None:
    model, eager = make_pair(name)
    ids, mask = tokens(3, 20), torch.ones(3, 20, dtype=torch.long)
    for row, pad in enumerate((0, 5, 13)):
        mask[row, slice(0, pad) if side == "left" else slice(20 - pad, 20)] = 0
    with torch.no_grad():
        got, want = (m(ids, attention_mask=mask, use_cache=False).logits for m in (model, eager))
    assert rel_error(got[mask.bool()], want[mask.bool()]) < 1e-5
    assert get_te_attention_stats() == hits(fallback_mask=2)


@pytest.mark.parametrize("name", MODELS)
def test_packed_batches(name: str) -> None:
    """Documents told by position ids: each gives what it gives alone, also on sliding layers."""
    model, eager = make_pair(name)
    lengths = [5, 11, 14]
    ids = tokens(1, sum(lengths))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    with torch.no_grad():
        packed = model(ids, position_ids=positions, use_cache=False).logits
        alone = [eager(part, use_cache=False).logits for part in ids.split(lengths, dim=1)]
    assert rel_error(packed, torch.cat(alone, dim=1)) < 1e-5
    assert get_te_attention_stats() == hits(fallback_mask=2)


@pytest.mark.parametrize("name", MODELS)
def test_generation(name: str) -> None:
    model, eager = make_pair(name)
    options = {"max_new_tokens": 14, "do_sample": False, "pad_token_id": 0}
    ids = tokens(1, 6)
    assert torch.equal(model.generate(ids, **options), eager.generate(ids, **options))
    assert get_te_attention_stats()["te_hits"] > 0


# ----------------------------------------------------------------------------------------------------
# a. The mask detection.


def original_detection(mask: Tensor, window: tuple[int, int]) -> tuple[str, tuple[int, int]] | None:
    """What the original looked at: head 0's corner, first row and last row."""
    seqlen = mask.shape[-1]
    seen = mask if mask.dtype == torch.bool else mask > -1e4
    first, last = seen[:, 0, 0].sum(-1), seen[:, 0, -1].sum(-1)
    want = seqlen if window[0] < 0 else min(seqlen, window[0] + 1)
    if seqlen == 1 or seen[0, 0, 0, -1] or not seen[0, 0, 0, 0] or (first != 1).any() or (last != want).any():
        return None
    return "causal", (-1, 0) if window[0] < 0 else window


def fooling_masks() -> dict[str, tuple[Tensor, tuple[int, int]]]:
    """Masks that are not causal and that the original took for causal, with the layer's window."""
    causal = band(16, 16)[0].expand(2, 2, 16, 16).clone()
    interior = causal.clone()
    interior[1, 0, 9, 4] = False
    image = causal.clone()
    image[:, :, 4:8, 4:8] = True
    one_head = causal.clone()
    one_head[:, 1] = True
    lower = torch.zeros(16, 16).masked_fill_(~band(16, 16)[0], -torch.inf)
    alibi = lower - 0.1 * (torch.arange(16)[:, None] - torch.arange(16)).clamp_min(0)
    tiny = additive(band(16, 16)).clone()
    tiny[0, 0, 12, 3] = 1e-3
    soft = additive(band(16, 16)).clone()
    soft[0, 0, 12, 3] = -50.0
    packed = same_document([6, 10]) & band(16, 16, 7)
    return {
        "hole": (interior, (-1, 0)),
        "bidirectional image": (image, (-1, 0)),
        "second head": (one_head, (-1, 0)),
        "alibi": (alibi[None, None], (-1, 0)),
        "tiny bias": (tiny, (-1, 0)),
        "soft mask": (soft, (-1, 0)),
        "packed documents on a sliding layer": (packed[:, None], (7, 0)),
    }


@pytest.mark.parametrize("name", fooling_masks())
def test_a_detection_is_not_fooled(name: str) -> None:
    mask, window = fooling_masks()[name]
    assert original_detection(mask, window) is not None
    assert _detect_causal_mask(mask, window) is None


def test_a_no_mask_one_element_off_passes() -> None:
    """Every element counts, in every row, head and batch item."""
    for left in (15, 4):
        window = (-1, 0) if left == 15 else (left, 0)
        exact = band(16, 16, left)[None].expand(2, 2, 16, 16).clone()
        assert _detect_causal_mask(exact, window) == ("causal", window)
        flat = exact.view(-1)
        for index in range(0, flat.numel(), 7):
            flat[index] = ~flat[index]
            assert _detect_causal_mask(exact, window) is None, index
            flat[index] = ~flat[index]
        assert _detect_causal_mask(exact, window) == ("causal", window)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("seqlen", [1, 2, 16])
def test_a_causal_and_windowed_masks_are_found(dtype: torch.dtype, seqlen: int) -> None:
    for left, window in ((None, (-1, 0)), (3, (3, 0)), (40, (40, 0))):
        visible = band(seqlen, seqlen, left)
        mask = visible[:, None] if dtype == torch.bool else additive(visible, dtype)
        assert _detect_causal_mask(mask.expand(3, 1, seqlen, seqlen), window) == ("causal", window)
        infinite = torch.zeros(seqlen, seqlen).masked_fill_(~visible[0], -torch.inf)[None, None]
        assert _detect_causal_mask(infinite, window) == ("causal", window)
    assert _detect_causal_mask(band(16, 16)[None], (3, 0)) is None  # the mask has no such window
    assert _detect_causal_mask(band(16, 16, 5)[None], (3, 0)) is None
    assert _detect_causal_mask(band(16, 16, 3)[None], (-1, 0)) is None


def test_a_what_cannot_be_looked_into_is_none() -> None:
    mask = additive(band(8, 8))
    assert _detect_causal_mask(mask.to(torch.int32), (-1, 0)) is None
    assert _detect_causal_mask(mask.double(), (-1, 0)) is None
    assert _detect_causal_mask(mask[0], (-1, 0)) is None
    assert _detect_causal_mask(mask[:, :, :4], (-1, 0)) is None
    assert _detect_causal_mask(torch.zeros(1, 1, 0, 0), (-1, 0)) is None
    assert _detect_causal_mask(mask.clone().requires_grad_(), (-1, 0)) is None
    assert _detect_causal_mask(torch.full((1, 1, 8, 8), torch.nan), (-1, 0)) is None
    assert _detect_causal_mask(torch.zeros(1, 1, 8, 8, dtype=torch.bool), (-1, 0)) is None
    padded = mask.expand(2, 1, 8, 8).clone()
    padded[0, 0, :, 6:] = torch.finfo(mask.dtype).min
    assert _detect_causal_mask(padded, (-1, 0)) is None


def test_a_a_mask_written_to_is_looked_at_again() -> None:
    mask = band(8, 8)[None].clone()
    assert _detect_causal_mask(mask, (-1, 0)) is not None
    mask[0, 0, 5, 2] = False
    assert _detect_causal_mask(mask, (-1, 0)) is None


def test_a_large_masks_are_compared_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    from cpattn.automodel import local_masks

    monkeypatch.setattr(local_masks, "_BLOCK_PAIRS", 40)
    for row in range(16):
        mask = band(16, 16)[None].clone()
        assert _detect_causal_mask(mask, (-1, 0)) is not None
        mask[0, 0, row, 0] = False
        assert _detect_causal_mask(mask, (-1, 0)) is None


def test_a_packed_documents_on_a_sliding_layer_end_to_end() -> None:
    """The last document is longer than the window: the original ran these documents as one."""
    te_sdpa, _ = portable_sdpa(window=3)
    q, k, v = inputs(1, 14)
    visible = same_document([5, 9]) & band(14, 14, 3)
    got = te_sdpa(q, k, v, attn_mask=visible[:, None], enable_gqa=True)
    want = dense(q, k, v, visible)
    assert rel_error(got, want) < 1e-6
    assert rel_error(dense(q, k, v, band(14, 14, 3)), want) > 1e-2
    assert get_te_attention_stats() == hits(fallback_mask=1)


# ----------------------------------------------------------------------------------------------------
# The replacement of SDPA.

HEADS, GROUPS, DIM = 4, 2, 8


def inputs(batch_size: int, num_q: int, num_k: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    num_k = num_q if num_k is None else num_k
    shapes = ((HEADS, num_q, DIM), (GROUPS, num_k, DIM), (GROUPS, num_k, DIM))
    return tuple(torch.randn(batch_size, *shape, generator=generator) for shape in shapes)  # type: ignore[return-value]


def dense(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, **options: Any) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return dense_batch(q, k, v, visible, **options).transpose(1, 2)


def portable_sdpa(
    window: int | None = None, scale: float | None = None, **options: Any
) -> tuple[Any, PortableDotProductAttention]:
    size = (-1, 0) if window is None else (window, 0)
    module = _create_te_dot_product_attention(HEADS, GROUPS, DIM, size, scale, portable=True)
    assert isinstance(module, PortableDotProductAttention)
    original = F.scaled_dot_product_attention
    return _make_te_sdpa(module, HEADS, GROUPS, original, size, scale, **options), module


def mock_sdpa(num_heads: int = 8, num_kv_heads: int = 4, **options: Any) -> tuple[Any, Any, Any]:
    """te_sdpa over stand-ins for TE and for SDPA."""
    te_module = mock.MagicMock(side_effect=lambda q, k, v, **_: torch.zeros(q.shape))
    original = mock.MagicMock(side_effect=lambda q, k, v, **_: torch.zeros(q.shape))
    return _make_te_sdpa(te_module, num_heads, num_kv_heads, original, **options), te_module, original


def test_layouts_and_mask_types() -> None:
    te_sdpa, te_module, original = mock_sdpa()
    q, k, v = torch.randn(2, 8, 10, 16), torch.randn(2, 4, 10, 16), torch.randn(2, 4, 10, 16)
    assert te_sdpa(q, k, v, is_causal=True, enable_gqa=True).shape == q.shape
    assert [tuple(x.shape) for x in te_module.call_args.args] == [(2, 10, 8, 16), (2, 10, 4, 16), (2, 10, 4, 16)]
    assert te_module.call_args.kwargs == {"attn_mask_type": "causal", "window_size": (-1, 0)}
    te_sdpa(q, k, v, enable_gqa=True)
    assert te_module.call_args.kwargs == {"attn_mask_type": "no_mask", "window_size": (-1, -1)}
    repeated = (x.repeat_interleave(2, 1) for x in (k, v))
    te_sdpa(q, *repeated, is_causal=True)
    assert torch.equal(te_module.call_args.args[1], k.transpose(1, 2))
    assert torch.equal(te_module.call_args.args[2], v.transpose(1, 2))
    original.assert_not_called()
    mask = torch.zeros(2, 1, 10, 10)
    te_sdpa(q, k, v, attn_mask=mask, enable_gqa=True)
    assert original.call_args.kwargs["attn_mask"] is mask
    assert te_module.call_count == 3


def test_output_with_heads_joined_is_taken_apart() -> None:
    """TE gives [B, S, heads * dim]; the original turned that as if it were [B, S, heads, dim]."""
    te_sdpa, _ = portable_sdpa()
    q, k, v = inputs(2, 9)
    joined = portable_sdpa()[1](*(x.transpose(1, 2) for x in (q, k, v)))
    assert joined.shape == (2, 9, HEADS * DIM)
    got = te_sdpa(q, k, v, is_causal=True, enable_gqa=True)
    assert rel_error(got, dense(q, k, v, band(9, 9))) < 1e-6


def test_scale_of_the_call(caplog: pytest.LogCaptureFixture) -> None:
    """Also a call without a scale: SDPA's is dim ** -0.5, and the module's may be another."""
    te_sdpa, _ = portable_sdpa(scale=0.2)
    q, k, v = inputs(1, 7)
    for scale in (0.2, 0.3, None):
        got = te_sdpa(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
        assert rel_error(got, dense(q, k, v, band(7, 7), scale=scale)) < 1e-6
    assert get_te_attention_stats() == hits(te_hits=1, fallback_scale_mismatch=2)
    assert len(caplog.records) == 1


def test_b_dropout_is_not_dropped() -> None:
    """The original ran TE without the dropout that it was called with."""
    te_sdpa, te_module, original = mock_sdpa()
    q, k, v = torch.randn(2, 8, 10, 16), torch.randn(2, 4, 10, 16), torch.randn(2, 4, 10, 16)
    te_sdpa(q, k, v, dropout_p=0.1, is_causal=True, enable_gqa=True)
    te_module.assert_not_called()
    assert original.call_args.kwargs["dropout_p"] == 0.1
    assert get_te_attention_stats() == hits(fallback_dropout=1)


def test_b_dropout_of_a_model_in_training() -> None:
    model, _ = make_pair("llama")
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    ids = tokens(1, 12)
    model.train()
    with torch.no_grad():
        a, b = model(ids, use_cache=False).logits, model(ids, use_cache=False).logits
        assert not torch.equal(a, b)
        assert get_te_attention_stats() == hits(fallback_dropout=4)
        model.eval()
        assert torch.equal(model(ids, use_cache=False).logits, model(ids, use_cache=False).logits)
    assert get_te_attention_stats()["te_hits"] == 4


@pytest.mark.parametrize(
    ("num_q", "num_k", "visible"),
    [
        (12, 12, band(12, 12, 3, right=None)),  # sees ahead, as the call says, and 3 back
        (1, 12, band(1, 12, 3, shift=11)),  # a decoding step
        (4, 12, band(4, 12, 3, right=None, shift=8)),
        (3, 4, band(3, 4, None, right=None)),  # shorter than the window
    ],
)
def test_c_a_sliding_layer_without_mask_keeps_its_window(num_q: int, num_k: int, visible: Tensor) -> None:
    """The original called TE with no_mask and no window."""
    te_sdpa, _ = portable_sdpa(window=3)
    q, k, v = inputs(2, num_q, num_k)
    got = te_sdpa(q, k, v, enable_gqa=True)
    assert rel_error(got, dense(q, k, v, visible)) < 1e-6
    if num_k > 4:
        assert rel_error(dense(q, k, v, torch.ones_like(visible)), got) > 1e-2


def test_c_query_heads_laid_out_as_queries() -> None:
    """transformers hands a decoding step over as [B, key heads, heads per key head, dim]."""
    te_sdpa, _ = portable_sdpa(window=3, make_module=make_portable)
    q, k, v = inputs(2, 1, 12)
    packed = q.reshape(2, GROUPS, HEADS // GROUPS, DIM)
    got = te_sdpa(packed, k, v).reshape(q.shape)
    assert rel_error(got, dense(q, k, v, band(1, 12, 3, shift=11))) < 1e-6
    assert get_te_attention_stats() == hits(te_hits=1)


def test_c_a_windowed_causal_call_keeps_its_window_in_a_fallback() -> None:
    te_sdpa, _ = portable_sdpa(window=3)
    q, k, v = inputs(1, 12)
    torch.manual_seed(0)
    got = te_sdpa(q, k, v, is_causal=True, enable_gqa=True)
    assert rel_error(got, dense(q, k, v, band(12, 12, 3))) < 1e-6
    rescaled = te_sdpa(q, k, v, is_causal=True, enable_gqa=True, scale=0.9)
    assert rel_error(rescaled, dense(q, k, v, band(12, 12, 3), scale=0.9)) < 1e-6


def make_portable(num_heads: int, num_kv_heads: int) -> nn.Module:
    return _create_te_dot_product_attention(num_heads, num_kv_heads, DIM, portable=True)


# ----------------------------------------------------------------------------------------------------
# d, e, f. The forward.


class TinyAttention(nn.Module):
    """The least that injection asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(16, 16, bias=False) for _ in range(3))
        self.num_heads = self.num_key_value_heads = 2
        self.head_dim = 8

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        projected = (proj(x).unflatten(-1, (2, 8)).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k, v = projected
        return q, k, v

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return F.scaled_dot_product_attention(*self.heads(x), attn_mask=mask, is_causal=mask is None)


def injected(kind: type[TinyAttention] = TinyAttention) -> TinyAttention:
    torch.manual_seed(0)
    module = kind()
    assert inject_te_attention_into_module(module, portable=True)
    return module


def test_d_a_later_replacement_of_sdpa_is_called() -> None:
    """The original kept the SDPA of the day of injection: context parallelism set up later was bypassed."""
    captured = F.scaled_dot_product_attention
    module, x = injected(), torch.randn(1, 6, 16)
    wrapped = mock.MagicMock(side_effect=captured)
    with mock.patch.object(F, "scaled_dot_product_attention", wrapped):
        module(x, torch.rand(1, 1, 6, 6) < 0.5)
    wrapped.assert_called_once()
    assert get_te_attention_stats() == hits(fallback_mask=1)


@pytest.mark.parametrize("when", ["before", "after"])
def test_d_forwards_of_the_instance_are_kept(when: str) -> None:
    """The original called the class's forward: a wrapper on the instance was lost."""
    torch.manual_seed(0)
    module = TinyAttention()
    calls: list[int] = []

    def wrap() -> None:
        inner = module.forward

        def counted(*args: Any, **kwargs: Any) -> Tensor:
            calls.append(1)
            return inner(*args, **kwargs)

        module.forward = counted  # type: ignore[method-assign]

    if when == "before":
        wrap()
    inject_te_attention_into_module(module, portable=True)
    if when == "after":
        wrap()
    out = module(torch.randn(1, 6, 16))
    assert calls == [1]
    assert out.shape == (1, 2, 6, 8)
    assert get_te_attention_stats() == hits(te_hits=1)


def test_d_a_deep_copy_runs_its_own_weights() -> None:
    """A closure over the module, as the original's, makes copies run the original's weights."""
    module, x = injected(), torch.randn(1, 6, 16)
    twin = copy.deepcopy(module)
    with torch.no_grad():
        twin.v_proj.weight.zero_()
    assert (twin(x) == 0).all()
    assert (module(x) != 0).any()
    assert twin.__dict__["attn_module"] is not module.__dict__["attn_module"]
    assert get_te_attention_stats() == hits(te_hits=2)


def test_e_threads_do_not_see_each_other() -> None:
    """The original put its replacement into torch.nn.functional while a forward ran."""
    inside, leave = threading.Event(), threading.Event()

    class Slow(TinyAttention):
        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            inside.set()
            assert leave.wait(30)
            return super().forward(x, mask)

    def original_forward(module: nn.Module, x: Tensor) -> Any:
        with mock.patch.object(F, "scaled_dot_product_attention", mock.MagicMock(name="te_sdpa")):
            return type(module).forward(module, x)

    plain = TinyAttention()
    x = torch.randn(1, 6, 16)
    want = plain(x)
    for run, disturbed in ((lambda m, x: m(x), False), (original_forward, True)):
        inside.clear()
        leave.clear()
        module = injected(Slow)
        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(run, module, x)
            assert inside.wait(30)
            got = plain(x)
            assert isinstance(got, mock.MagicMock) == disturbed
            leave.set()
            future.result()
        if not disturbed:
            assert torch.equal(got, want)
    assert get_te_attention_stats() == hits(te_hits=1)


def test_e_many_threads_count_right() -> None:
    modules = [injected() for _ in range(4)]
    x = torch.randn(1, 4, 16)
    want = modules[0](x)
    with ThreadPoolExecutor(8) as pool:
        outs = list(pool.map(lambda i: modules[i % 4](x), range(80)))
    assert all(torch.equal(out, want) for out in outs)
    assert get_te_attention_stats() == hits(te_hits=81)


def test_e_injected_layers_compile() -> None:
    module, x = injected(), torch.randn(2, 6, 16)
    compiled = torch.compile(module, backend="eager")
    assert rel_error(compiled(x), module(x)) < 1e-6
    mask = band(6, 6)[None]
    assert rel_error(compiled(x, mask), module(x, mask)) < 1e-6


def test_e_an_exception_leaves_nothing_behind() -> None:
    class Raises(TinyAttention):
        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            super().forward(x, mask)
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        injected(Raises)(torch.randn(1, 4, 16))
    x = torch.randn(1, 2, 4, 8)
    F.scaled_dot_product_attention(x, x, x)
    assert get_te_attention_stats() == hits(te_hits=1)


def test_f_functions_imported_by_name_are_reached() -> None:
    """The original marked such layers as injected, and they never ran TE."""

    class ByName(TinyAttention):
        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            return imported_by_name(*self.heads(x), is_causal=True)

    module, x = injected(ByName), torch.randn(1, 6, 16)
    with mock.patch.object(F, "scaled_dot_product_attention") as original_way:
        type(module).forward(module, x)
    original_way.assert_not_called()
    module(x)
    assert get_te_attention_stats() == hits(te_hits=1)


def test_f_layers_that_call_no_sdpa_are_told_of(caplog: pytest.LogCaptureFixture) -> None:
    model = make_model("llama")
    model.set_attn_implementation("eager")
    inject_te_attention(model, portable=True)
    for _ in range(2):
        model(tokens(1, 5))
    assert get_te_attention_stats() == hits()
    assert [r.message for r in caplog.records if "did not call torch's SDPA" in r.message] == [
        "LlamaAttention has TE attention injected and its forward did not call torch's SDPA, so TE was not used: "
        "is the model loaded with attn_implementation='sdpa'?"
    ]


def test_checkpointed_layers_train() -> None:
    model, eager = make_pair("llama")
    model.train().gradient_checkpointing_enable()
    ids = tokens(1, 9)
    for each in (model, eager):
        each(ids, labels=ids, use_cache=False).loss.backward()
    for mine, theirs in zip(model.parameters(), eager.parameters(), strict=True):
        assert rel_error(mine.grad, theirs.grad) < 1e-5


# ----------------------------------------------------------------------------------------------------
# g. Heads of a rank, devices, modes, checkpoints.


def test_g_heads_of_a_tensor_parallel_rank() -> None:
    """The original's module had the heads of the whole layer."""
    te_sdpa, _ = portable_sdpa(make_module=make_portable)
    q, k, v = inputs(1, 7)
    got = te_sdpa(q[:, :2], k[:, :1], v[:, :1], is_causal=True, enable_gqa=True)
    assert rel_error(got, dense(q, k, v, band(7, 7))[:, :2]) < 1e-6
    repeated = te_sdpa(q[:, :2], *(x[:, :1].expand(-1, 2, -1, -1) for x in (k, v)), is_causal=True)
    assert rel_error(repeated, got) < 1e-6
    assert get_te_attention_stats() == hits(te_hits=2)
    unable, _ = portable_sdpa()
    assert rel_error(unable(q[:, :2], k[:, :1], v[:, :1], is_causal=True, enable_gqa=True), got) < 1e-6
    assert get_te_attention_stats()["fallback_unsupported"] == 1


def test_g_the_module_follows_mode_and_device() -> None:
    module = injected()
    te_module = module.__dict__["attn_module"]
    assert isinstance(te_module, PortableDotProductAttention)
    for mode in (False, True):
        module.train(mode)
        module(torch.randn(1, 4, 16))
        assert te_module.training is mode
    te_module.register_buffer("state", torch.zeros(1, device="meta"))
    with mock.patch.object(te_module, "to") as moved:
        module(torch.randn(1, 4, 16))
    moved.assert_called_once_with(torch.device("cpu"))


def test_g_fp8_state_can_be_saved() -> None:
    """TE keeps it in the module that no state_dict sees."""

    class WithState(PortableDotProductAttention):
        state: Any = None

        def get_extra_state(self) -> Any:
            return {"amax": 3.0}

        def set_extra_state(self, state: Any) -> None:
            self.state = state

    module = injected()
    assert get_te_extra_state(module) == {}
    te_module = WithState(2, 8)
    object.__setattr__(module, "attn_module", te_module)
    assert not any("extra_state" in name for name in module.state_dict())
    model = nn.Sequential(module)
    state = get_te_extra_state(model)
    assert state == {"0": {"amax": 3.0}}
    set_te_extra_state(model, state)
    assert te_module.state == {"amax": 3.0}
    with pytest.raises(ValueError, match="inject first"):
        set_te_extra_state(model, {"7": None})


# ----------------------------------------------------------------------------------------------------
# h, i. Counters and syncs.


def test_h_counters() -> None:
    stats = get_te_attention_stats()
    assert stats == hits()
    stats["te_hits"] = 99
    assert get_te_attention_stats() == hits()
    injected()(torch.randn(1, 4, 16))
    assert get_te_attention_stats() == hits(te_hits=1)
    reset_te_attention_stats()
    assert hits() == te_attention._TE_STATS


def test_h_log_line(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = injected(), torch.randn(1, 4, 16)
    with caplog.at_level(logging.INFO, logger=te_attention.logger.name):
        _maybe_log_stats()
        monkeypatch.setattr(te_attention, "_STATS_LOG_EVERY", 3)
        for _ in range(7):
            module(x)
        monkeypatch.setattr(te_attention, "_STATS_LOG_EVERY", 0)
        module(x)
    lines = [r.message for r in caplog.records]
    assert [line.split(":")[0] for line in lines] == [f"TE attention after {n} calls" for n in (3, 6)]


def test_i_one_sync_for_a_mask_not_one_for_a_layer() -> None:
    class CountSyncs(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += func is torch.ops.aten._local_scalar_dense.default
            return func(*args, **(kwargs or {}))

    layers, mask = [injected() for _ in range(6)], band(8, 8)[None].clone()
    with CountSyncs() as syncs:
        for layer in layers:
            layer(torch.randn(1, 8, 16), mask)
    assert get_te_attention_stats() == hits(te_hits=6)
    assert syncs.count <= 2


# ----------------------------------------------------------------------------------------------------
# What the original's callers rely on.


def self_attn(**attributes: Any) -> nn.Module:
    module = nn.Module()
    module.q_proj, module.k_proj, module.v_proj = nn.Linear(64, 64), nn.Linear(64, 32), nn.Linear(64, 32)
    for name, value in {"head_dim": 8, **attributes}.items():
        setattr(module, name, value)
    return module


def test_parameters_of_a_layer() -> None:
    found = {"num_heads": 8, "num_kv_heads": 4, "head_dim": 8, "window_size": (-1, 0), "softmax_scale": 8**-0.5}
    assert _infer_attn_params(self_attn()) == found
    assert _infer_attn_params(self_attn(num_heads=8, num_key_value_heads=4)) == found
    assert _infer_attn_params(self_attn(num_attention_heads=8)) == found
    assert _infer_attn_params(self_attn(sliding_window=512, scaling=0.25)) == {
        **found,
        "window_size": (511, 0),
        "softmax_scale": 0.25,
    }
    assert _infer_attn_params(self_attn(sliding_window=None)) == found
    assert _infer_attn_params(self_attn(head_dim=None)) is None
    assert _infer_attn_params(self_attn(v_proj=None)) is None
    assert _infer_attn_params(nn.Linear(4, 4)) is None
    assert _infer_attn_params(self_attn(num_heads=6)) is None
    assert _infer_attn_params(self_attn(v_proj=nn.Linear(64, 64))) is None  # values of another head dim
    opaque = self_attn(q_proj=nn.Identity(), k_proj=nn.Identity(), v_proj=nn.Identity())
    assert _infer_attn_params(opaque) is None
    opaque.num_heads = 4
    assert _infer_attn_params(opaque)["num_kv_heads"] == 4  # type: ignore[index]


def test_output_features_of_projections() -> None:
    weight_only, wrapped = nn.Module(), nn.Module()
    weight_only.weight = nn.Parameter(torch.empty(64, 32, device="meta"))
    wrapped.linear = nn.Linear(16, 48)
    projections = (None, nn.Linear(16, 32), weight_only, wrapped, nn.Module())
    assert [_proj_out_features(p) for p in projections] == [None, 32, 64, 48, None]


def test_injection_into_a_module() -> None:
    with mock.patch.object(te_attention, "_create_te_dot_product_attention") as create:
        module = self_attn(num_heads=8)
        assert inject_te_attention_into_module(module) is True
        assert inject_te_attention_into_module(nn.Linear(4, 4)) is False
    assert module.attn_module is create.return_value
    assert "attn_module" not in dict(module.named_modules())
    assert "forward" in module.__dict__
    create.assert_called_once_with(
        num_heads=8, num_kv_heads=4, head_dim=8, window_size=(-1, 0), softmax_scale=8**-0.5
    )


def test_injection_into_a_model(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.ModuleList([nn.Module() for _ in range(3)])
    for layer in model:
        layer.self_attn = self_attn()
        layer.cross_attn = self_attn()
    taken = mock.MagicMock()
    model[0].self_attn.attn_module = taken
    with mock.patch.object(te_attention, "_create_te_dot_product_attention") as create:
        inject_te_attention(model)
    assert [layer.self_attn.attn_module for layer in model] == [taken, *[create.return_value] * 2]
    assert not hasattr(model[1].cross_attn, "attn_module")
    assert model._te_attention_injected is True
    plain = nn.Linear(4, 4)
    inject_te_attention(plain)
    assert not getattr(plain, "_te_attention_injected", False)
    assert "nothing was injected" in caplog.text


def test_te_absent_is_an_error_not_another_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformer_engine", None)
    model = make_model("llama")
    with pytest.raises(ImportError, match="portable=True"):
        inject_te_attention(model)
    assert not hasattr(model, "_te_attention_injected")
    assert "forward" not in model.model.layers[0].self_attn.__dict__


def test_te_is_made_from_transformer_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    package = types.ModuleType("transformer_engine.pytorch.attention")
    package.DotProductAttention = mock.MagicMock()  # type: ignore[attr-defined]
    for name in ("transformer_engine", "transformer_engine.pytorch"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, package.__name__, package)
    made = _create_te_dot_product_attention(8, 2, 16, (3, 0))
    assert made is package.DotProductAttention.return_value
    package.DotProductAttention.assert_called_once_with(
        num_attention_heads=8,
        kv_channels=(16, 16),
        num_gqa_groups=2,
        attn_mask_type="causal",
        qkv_format="bshd",
        window_size=(3, 0),
        softmax_scale=16**-0.5,
    )


def test_patch_takes_any_function() -> None:
    module, seen = TinyAttention(), []

    def te_sdpa(*args: Any, **kwargs: Any) -> Tensor:
        seen.append(kwargs)
        return torch.ones(1)

    _patch_module_forward(module, te_sdpa)
    assert module(torch.randn(1, 4, 16)) == 1
    assert seen == [{"attn_mask": None, "is_causal": True}]


# ----------------------------------------------------------------------------------------------------
# The portable module.


@pytest.mark.parametrize("qkv_format", ["bshd", "sbhd"])
@pytest.mark.parametrize(
    ("mask_type", "window", "visible"),
    [
        ("causal", None, band(5, 9)),
        ("causal_bottom_right", None, band(5, 9, shift=4)),
        ("causal_bottom_right", (2, 0), band(5, 9, 2, shift=4)),
        ("no_mask", None, band(5, 9, right=None)),
        ("no_mask", (2, 1), band(5, 9, 2, right=1)),
    ],
)
def test_portable_mask_types(
    qkv_format: str, mask_type: str, window: tuple[int, int] | None, visible: Tensor
) -> None:
    q, k, v = (x.transpose(1, 2) for x in inputs(2, 5, 9))
    module = PortableDotProductAttention(HEADS, DIM, GROUPS, qkv_format=qkv_format, attn_mask_type=mask_type)
    want = dense_batch(q, k, v, visible).flatten(2)
    if qkv_format == "sbhd":
        q, k, v, want = (x.transpose(0, 1) for x in (q, k, v, want))
    assert rel_error(module(q, k, v, window_size=window), want) < 1e-6


def test_portable_documents_and_softmax_types() -> None:
    q, k, v = (x[0].transpose(0, 1) for x in inputs(1, 14))
    module = PortableDotProductAttention(
        HEADS, DIM, GROUPS, qkv_format="thd", attn_mask_type="padding_causal", softmax_type="off-by-one"
    )
    sums = cu_seqlens([5, 9])
    got = module(q, k, v, cu_seqlens_q=sums, cu_seqlens_kv=sums, max_seqlen_q=9, max_seqlen_kv=9)
    visible = same_document([5, 9]) & band(14, 14)
    want = dense_batch(q[None], k[None], v[None], visible, sink=torch.zeros(HEADS))[0]
    assert rel_error(got, want.flatten(1)) < 1e-6
    assert list(module.state_dict()) == []


def test_portable_refusals() -> None:
    q, k, v = (x.transpose(1, 2) for x in inputs(2, 5))
    module = PortableDotProductAttention(HEADS, DIM, GROUPS, attention_dropout=0.1, qkv_format="bshd")
    with pytest.raises(ValueError, match="has no dropout"):
        module(q, k, v)
    module.eval()
    padding = torch.zeros(2, 1, 1, 5, dtype=torch.bool)
    for message, call in {
        "the others do not look at one": {"attention_mask": padding},
        "attention_mask is None": {"attn_mask_type": "padding"},
        "expected bool": {"attn_mask_type": "padding", "attention_mask": padding.float()},
        "expects \\(2, 1, 1, 5\\)": {"attn_mask_type": "padding", "attention_mask": padding[:1]},
        "attn_mask_type is 'tree'": {"attn_mask_type": "tree"},
        "cu_seqlens_q is None": {"qkv_format": "thd"},
        "give packed tokens": {"cu_seqlens_q": cu_seqlens([5, 5])},
    }.items():
        with pytest.raises(ValueError, match=message):
            module(q, k, v, **call)
    with pytest.raises(ValueError, match="this module was made for"):
        module(q[:, :, :2], k, v)
    with pytest.raises(ValueError, match="must divide"):
        PortableDotProductAttention(4, 8, 2, tp_size=4)
    with pytest.raises(ValueError, match="must be a multiple"):
        PortableDotProductAttention(4, 8, 3)
    with pytest.raises(ValueError, match="softmax_type is"):
        PortableDotProductAttention(4, 8, softmax_type="soft")
