"""Layer 2: ranks whose attention calls do not match are refused by name on all of them, whatever they agreed on."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

import cpattn
from cpattn import AttnMaskSpec
from cpattn.mixers import causal_conv1d, linear_attention
from cpattn.runtime.identity import LostRankError
from tests_dist.support.harness import run_on_ranks

HEADS = {"num_heads_q": 2, "num_heads_kv": 1, "head_dim": 16}


def key_of(length: int = 64, **options) -> cpattn.AttnKey:
    return cpattn.make_key(AttnMaskSpec.causal(length), **HEADS, cp_group=dist.group.WORLD, **options)


def rows(key: cpattn.AttnKey, dtype=torch.float32) -> tuple[torch.Tensor, ...]:
    heads = (key.num_heads_q, key.num_heads_kv, key.num_heads_kv)
    return tuple(torch.randn(key.num_tokens, h, key.head_dim).to(dtype).requires_grad_() for h in heads)


def attend(key: cpattn.AttnKey, dtype=torch.float32, **options) -> torch.Tensor:
    return cpattn.attention(*rows(key, dtype), key, **options)


def odd() -> bool:
    """Whether this is the rank that is out of step."""
    return dist.get_rank() == dist.get_world_size() - 1


def scales():
    attend(key_of(), softmax_scale=0.3 if odd() else 0.2)


def softcaps():
    attend(key_of(), softcap=3.0 if odd() else 2.0)


def dtypes():
    attend(key_of(), torch.bfloat16 if odd() else torch.float16)


def dtypes_of_other_size():
    attend(key_of(), torch.bfloat16 if odd() else torch.float32)


def another_mask():
    attend(key_of(96 if odd() else 64))


def another_window():
    attend(key_of(window=9) if odd() else key_of())


def kept_rows():
    attend(key_of(keep_kv=odd()))


def wires():
    attend(key_of(wire="e4m3" if odd() else None))


def heads():
    attend(key_of().with_heads(4, 4, 32) if odd() else key_of())


def layers_in_another_order():
    for layer in (1, 0) if odd() else (0, 1):
        attend(key_of(), layer=layer)


def another_layer_skipped():
    for layer in (0, 2) if odd() else (1, 2):
        attend(key_of(), layer=layer)


def a_layer_skipped():
    key = key_of()
    if not odd():
        attend(key, layer=0)
    attend(key, layer=1)


def backward_in_another_order():
    first, second = attend(key_of(), layer=0), attend(key_of(), layer=1)
    for out in (first, second) if odd() else (second, first):
        out.sum().backward()


def backward_against_forward():
    out = attend(key_of())
    if odd():
        out.sum().backward()
    else:
        attend(key_of())


def a_hit_here_and_a_new_key_there():
    attend(key_of() if not odd() else key_of(77))


def a_new_mask_there():
    key = key_of()
    attend(key if not odd() else key.with_mask(AttnMaskSpec.causal(64), window=11))


def gathered_columns():
    key = key_of()
    cpattn.undispatch(torch.ones(key.num_tokens, 3 if odd() else 2), key)


def gathered_gradients():
    key = key_of()
    x = torch.ones(key.num_tokens, 2, requires_grad=True)
    whole = cpattn.undispatch(x, key)
    (cpattn.undispatch(x, key) if odd() else whole.sum()).sum().backward()


def shifts():
    key = key_of()
    cpattn.roll(torch.ones(key.num_tokens), key, -2 if odd() else -1)


def a_roll_against_attention():
    key = key_of()
    if odd():
        cpattn.roll(torch.ones(key.num_tokens), key)
    else:
        attend(key)


def mixer_rows(key: cpattn.AttnKey, *shape: int) -> torch.Tensor:
    return torch.randn(key.num_tokens, *shape).requires_grad_()


def convolutions():
    key = key_of()
    causal_conv1d(mixer_rows(key, 6), torch.ones(6, 3 if odd() else 4), key)


def scan(key: cpattn.AttnKey, dim: int = 4, **options) -> torch.Tensor:
    q, v = mixer_rows(key, 2, dim), mixer_rows(key, 2, 3)
    return linear_attention(q, q, v, key, **options)


def states():
    scan(key_of(), 8 if odd() else 4)


def scales_of_states():
    scan(key_of(), scale=0.3 if odd() else 0.2)


def a_recurrence_against_a_convolution():
    key = key_of()
    if odd():
        scan(key)
    else:
        causal_conv1d(mixer_rows(key, 6), torch.ones(6, 4), key)


def recurrences_backward_in_another_order():
    key = key_of()
    first, second = scan(key), scan(key)
    for out in (first, second) if odd() else (second, first):
        out.sum().backward()


def cache_of(growing: int = 0) -> cpattn.PagedKVCache:
    """Of two sequences, in the step after the prompts; the first grows by some tokens more."""
    key = cpattn.make_key(AttnMaskSpec.varlen([40, 24]), **HEADS, cp_group=dist.group.WORLD)
    cache = cpattn.PagedKVCache(key, windows=[None, None], max_new_tokens=9, dtype=torch.float32)
    for layer in range(2):
        cache.prefill(layer, *(rows.detach() for rows in rows(key)[1:]))
    cache.advance([1 + growing, 2 - growing] if growing else None)
    return cache


def decode(cache: cpattn.PagedKVCache, layer: int = 0, dtype=torch.float32, **options) -> torch.Tensor:
    num = len(cache.positions)
    return cache.decode(layer, *(torch.ones(num, n, 16, dtype=dtype) for n in (2, 1, 1)), **options)


def layers_of_a_cache():
    decode(cache_of(), 1 if odd() else 0)


def scales_of_decoding():
    decode(cache_of(), softmax_scale=0.3 if odd() else 0.2)


def dtypes_of_decoding():
    decode(cache_of(), dtype=torch.bfloat16 if odd() else torch.float32)


def merges():
    decode(cache_of(), merge="scatter" if odd() else "gather")


def sequences_that_grew():
    cache = cache_of(1)
    if odd():
        cache.advance([1, 1])
    decode(cache)


def decoding_against_attention():
    if odd():
        attend(key_of())
    else:
        decode(cache_of())


@functools.cache
def compiled() -> Callable[..., torch.Tensor]:
    """Labels and the whole, in a graph."""

    def moved(x, key, shift):
        return cpattn.undispatch(cpattn.roll(x, key, shift), key)

    return torch.compile(moved, backend="aot_eager", fullgraph=True)


def shifts_in_a_graph():
    key = key_of()
    compiled()(torch.ones(key.num_tokens), key, -2 if odd() else -1)


def columns_in_a_graph():
    key = key_of()
    compiled()(torch.ones(key.num_tokens, 3 if odd() else 2), key, -1)


def a_graph_backward_in_another_order():
    key = key_of()
    xs = [torch.ones(key.num_tokens, 2, requires_grad=True) for _ in range(2)]
    first, second = (compiled()(x, key, -1 - n) for n, x in enumerate(xs))
    for out in (first, second) if odd() else (second, first):
        out.sum().backward()


ROWS: dict[Callable[[], None], str] = {
    gathered_columns: r"undispatch: row differs between ranks: .* rank \d has \(2,\), rank \d has \(3,\)",
    gathered_gradients: r"out of step: .* rank \d is in undispatch backward \(key .* rank \d in undispatch \(key",
    shifts: r"roll: shift differs between ranks: .* rank \d has -1, rank \d has -2",
    a_roll_against_attention: r"out of step: .* rank \d is in attention \(key .* rank \d in roll \(key",
    convolutions: r"causal_conv1d: width differs between ranks: .* rank \d has 4, rank \d has 3",
    states: r"linear_attention: row differs between ranks: .* rank \d has \(\d+,\), rank \d has .* other maps",
    scales_of_states: r"linear_attention: scale differs .* rank \d has 0.2, rank \d has 0.3",
    a_recurrence_against_a_convolution: r"out of step: .* rank \d is in causal_conv1d .* rank \d in linear_attention",
    recurrences_backward_in_another_order: r"linear_attention backward: of call differs between ranks",
    layers_of_a_cache: r"decode: layer differs between ranks: .* rank \d has 0, rank \d has 1",
    scales_of_decoding: r"decode: scale differs .* rank \d has 0.2, rank \d has 0.3",
    dtypes_of_decoding: r"decode: q differs .* rank \d has .*torch.float32\), rank \d has .*torch.bfloat16\)",
    merges: r"decode: merge differs .* rank \d has 'gather', rank \d has 'scatter'",
    sequences_that_grew: r"decode: lengths differs .* rank \d has \[42, 25\], rank \d has \[43, 26\]",
    decoding_against_attention: r"out of step: .* rank \d is in decode \(key .* rank \d in attention \(key",
    shifts_in_a_graph: r"roll: shift differs between ranks: .* rank \d has -1, rank \d has -2",
    columns_in_a_graph: r"roll: row differs between ranks: .* rank \d has \(2,\), rank \d has \(3,\)",
    a_graph_backward_in_another_order: r"roll backward: shift differs between ranks",
    scales: r"attention: scale differs between ranks: .* rank \d has 0.2, rank \d has 0.3",
    softcaps: r"attention: softcap differs .* rank \d has 2.0, rank \d has 3.0",
    dtypes: r"attention: dtype differs .* rank \d has torch.float16, rank \d has torch.bfloat16",
    dtypes_of_other_size: r"attention: dtype differs .* rank \d has torch.float32, rank \d has torch.bfloat16",
    another_mask: r"attention: key differs .* rank \d has '\w+ of 64 x 64 tokens, 2:1 heads', rank \d has '\w+ of 96",
    another_window: r"attention: key differs between ranks",
    kept_rows: r"attention: key differs between ranks",
    wires: r"attention: key differs between ranks",
    heads: r"attention: key differs .* rank \d has .* 2:1 heads', rank \d has .* 4:4 heads'",
    layers_in_another_order: r"attention: layer differs .* rank \d has '0', rank \d has '1'",
    another_layer_skipped: r"attention: layer differs .* rank \d has '1', rank \d has '0'",
    a_layer_skipped: r"attention: layer differs .* rank \d has '0', rank \d has '1'",
    backward_in_another_order: r"attention backward: of call differs between ranks",
    backward_against_forward: r"out of step: .* rank \d is in attention \(key .* rank \d in attention backward \(key",
    a_hit_here_and_a_new_key_there: r"out of step: .* rank \d is in attention \(key .* rank \d in make_key \(",
    a_new_mask_there: r"out of step: .* rank \d is in attention \(key .* rank \d in make_key \(",
}


def agree_on_everything():
    """All that the rows mix has been agreed on before, so that nothing is compared for the first time."""
    for length in (64, 96):
        attend(key_of(length))
    for options in ({"window": 9}, {"keep_kv": True}, {"wire": "e4m3"}):
        attend(key_of(**options))
    attend(key_of().with_heads(4, 4, 32))
    for options in ({"softmax_scale": 0.2}, {"softmax_scale": 0.3}, {"softcap": 2.0}, {"softcap": 3.0}):
        attend(key_of(), **options)
    for dtype in (torch.float16, torch.bfloat16):
        attend(key_of(), dtype)


def check_all_rows():
    agree_on_everything()
    for call, message in ROWS.items():
        with pytest.raises(ValueError, match=message):
            call()
        attend(key_of()).sum().backward()  # in step again


@pytest.mark.parametrize("cp_size", [2, pytest.param(4, marks=pytest.mark.nightly)])
def test_every_row_is_refused_by_name_on_all_ranks(cp_size):
    run_on_ranks(cp_size, check_all_rows)


def check_one_rank_refuses_its_input():
    """The others hear of it in place of the exchange, and all go on together."""
    key = key_of()
    q, k, v = rows(key)
    if odd():
        with pytest.raises(ValueError, match="q has shape"):
            cpattn.attention(q[:-1], k, v, key)
        with pytest.raises(ValueError, match="q, k and v must agree"):
            cpattn.attention(q, k.double(), v, key)
    else:
        for words in ("q has shape", "q, k and v must agree"):
            with pytest.raises(LostRankError, match=rf"rank 1 of .* raised in attention: ValueError: .*{words}"):
                cpattn.attention(q, k, v, key)
    cpattn.attention(q, k, v, key).sum().backward()


def test_one_rank_that_refuses_its_input_is_named_by_the_others():
    run_on_ranks(2, check_one_rank_refuses_its_input)


class Tiring(torch.nn.Module):
    """A model of rows whose last rank fails on its way through the second token, between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.runs, self.tired = torch.nn.Embedding(9, 32), 0, True

    def forward(self, tokens, positions, attention):
        self.runs += 1
        x = self.embedding(tokens).unflatten(-1, (2, 16))
        for layer in range(2):
            if odd() and self.tired and (self.runs, layer) == (2, 1):
                raise OSError("no more")
            x = x + attention(x, x[:, :1], x[:, 1:])
        return x.flatten(1) @ self.embedding.weight.T


def check_one_rank_fails_in_its_part():
    """In a convolution's arguments; between layers of a model that generates. The others hear of it at once."""
    key = key_of()
    x = mixer_rows(key, 6)
    torch.manual_seed(0)
    model, shape = Tiring(), cpattn.ModelShape(2, **HEADS, windows=[None, None])

    def generate():
        return cpattn.generate(model, [[1, 2, 3], [4]], max_new_tokens=4, shape=shape, cp_group=dist.group.WORLD)

    if odd():
        with pytest.raises(ValueError, match="weight has shape"):
            causal_conv1d(x, torch.ones(5, 4), key)
        with pytest.raises(OSError, match="no more"):
            generate()
    else:
        with pytest.raises(LostRankError, match=r"rank 1 of .* raised in causal_conv1d: .*weight has shape"):
            causal_conv1d(x, torch.ones(6, 4), key)
        with pytest.raises(LostRankError, match=r"rank 0 is in decode .* rank 1 .* in generate: OSError: no more"):
            generate()
    model.tired = False
    causal_conv1d(x, torch.ones(6, 4), key).sum().backward()
    return [tokens.tolist() for tokens in generate()]


def test_one_rank_that_fails_in_a_mixer_or_a_model_is_named_by_the_others():
    first, second = run_on_ranks(2, check_one_rank_fails_in_its_part)
    assert first == second


def check_new_scales_remember_nothing():
    key = key_of()

    def remembered() -> int:
        return sum(len(value) for value in vars(key).values() if isinstance(value, (dict, set, list)))

    attend(key)
    before = remembered()
    for step in range(20):
        attend(key, softmax_scale=0.1 + step * 1e-3)
    return remembered() - before


def test_new_scales_are_not_remembered():
    assert run_on_ranks(2, check_new_scales_remember_nothing) == [0, 0]


def check_identity_off():
    key = key_of(identify=False)
    attend(key, softmax_scale=0.2).sum().backward()
    attend(key, softmax_scale=0.3 if odd() else 0.2)  # nobody is asked


def test_identity_may_be_switched_off():
    run_on_ranks(2, check_identity_off)


def check_replicated_tensors():
    group = dist.group.WORLD
    weights = {f"layers.{n}.weight": torch.full((3, n), float(n), dtype=torch.bfloat16) for n in range(40)}
    cpattn.require_replicated(weights, group)
    if odd():
        weights["layers.7.weight"][1, 2] += 1
    with pytest.raises(ValueError, match=r"require_replicated: layers.7.weight differs between ranks: ranks \[\d\]"):
        cpattn.require_replicated(weights, group)


def test_replicated_tensors_are_compared_when_asked():
    run_on_ranks(2, check_replicated_tensors)
