"""Runtime layer: head sharding on a 2-D split of one group, against dense fp64, and what it refuses."""

from __future__ import annotations

import dataclasses
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import cpattn
from cpattn import AttnMaskSpec
from cpattn.decoding.kv_cache import PagedKVCache
from cpattn.launch.benchmarks.step import allocated_at_peak
from cpattn.planning import head_degree
from cpattn.planning.head_degree import DegreeChoice, choose_head_degree
from cpattn.planning.options import PlanOptions
from cpattn.planning.ready import with_layers
from cpattn.solver import (
    DEFAULT_HARDWARE,
    Hardware,
    Heads,
    Link,
    context_ranks_per_node,
    head_exchange_bytes,
    head_exchange_seconds,
    place_zigzag,
    split_heads,
    split_rows,
)
from tests_dist.support.compile_cases import (
    COMPILERS,
    checkpoint_counts,
    compile_many_masks,
    compile_where_ranks_have_no_rows,
)
from tests_dist.support.harness import run_on_ranks
from tests_dist.support.masks import MASKS
from tests_dist.support.oracle import Inputs, Results, assert_as_exact_as_sdpa, dense_attention, make_inputs, oracle
from tests_dist.support.profiles import each_once
from tests_dist.support.rank_cases import run_attention, run_with_key

# ----------------------------------------------------------------------------------------------------
# The pure part.


@pytest.mark.parametrize("num_kv", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("degree", [1, 2, 3, 4, 5, 6, 7, 8, 16])
def test_heads_are_shared_out_once_with_the_key_heads_they_need(num_kv, group, degree):
    num_q = num_kv * group
    if degree > num_q:
        with pytest.raises(ValueError, match=rf"head_degree is {degree} and num_heads_q is {num_q}: a rank would be"):
            split_heads(num_q, num_kv, degree)
        return
    parts = split_heads(num_q, num_kv, degree)
    assert [head for part in parts for head in range(part.first, part.last)] == list(range(num_q))
    for part in parts:
        serves = part.num_q // len(part.kv)
        assert serves * len(part.kv) == part.num_q > 0
        kv = [part.kv[nth // serves] for nth in range(part.num_q)]
        assert kv == [head // group for head in range(part.first, part.last)]
    assert max(part.num_q for part in parts) <= 1.125 * -(-num_q // degree)


def test_groups_stay_whole_where_that_costs_little():
    """40:8 on three ranks: 15, 10 and 15 heads of whole groups instead of 13 or 14 heads of 13 or 14 groups."""
    assert sorted(part.num_q for part in split_heads(40, 8, 3)) == [10, 15, 15]
    assert sorted(len(part.kv) for part in split_heads(40, 8, 3)) == [2, 3, 3]


@pytest.mark.parametrize("total", [0, 1, 7, 64, 101])
@pytest.mark.parametrize("degree", [1, 2, 3, 5])
def test_rows_of_a_rank_are_cut_into_even_pieces_in_order(total, degree):
    placement = place_zigzag(total, 3)
    fine = split_rows(placement, degree)
    assert fine.cp_size == 3 * degree
    for rank in range(3):
        pieces = [fine.tokens_of(rank * degree + part) for part in range(degree)]
        assert np.array_equal(np.concatenate(pieces), placement.tokens_of(rank))
        assert max(map(len, pieces)) - min(map(len, pieces)) <= 1


def test_blocks_lie_alike_in_the_nodes():
    assert [context_ranks_per_node(n, 4) for n in (None, 8, 4, 2, 1)] == [None, 2, 1, 1, 1]
    with pytest.raises(ValueError, match="head_degree is 4 and ranks_per_node is 6: one must divide the other"):
        context_ranks_per_node(6, 4)


@pytest.mark.parametrize(("num_q", "num_kv", "degree"), [(8, 8, 4), (8, 2, 4), (5, 1, 2), (6, 3, 2)])
def test_bytes_of_the_head_exchange_are_those_that_are_sent(num_q, num_kv, degree):
    """Counted row by row, head by head."""
    heads, parts = Heads(num_q, num_kv, 4, 6, 2), split_heads(num_q, num_kv, degree)
    placement = place_zigzag(3 * degree * 4, 3)
    fine = split_rows(placement, degree).num_tokens
    most = 0
    for me, mine in enumerate(parts):
        out = back = 0
        for other, theirs in enumerate(parts):
            if other != me:
                out += fine[me] * (theirs.num_q * 4 + len(theirs.kv) * 10) + fine[other] * mine.num_q * 6
                back += fine[other] * (mine.num_q * 4 + len(mine.kv) * 10) + fine[me] * theirs.num_q * 6
        most = max(most, out, back)
    assert head_exchange_bytes((placement, placement), parts, heads) == most * 2


# ----------------------------------------------------------------------------------------------------
# Exactness.

# Groups that divide by the degree, groups that are cut, one key head, and too few heads for four parts.
HEADS = [(8, 8), (8, 2), (6, 3), (5, 1), (3, 3)]


Combination = tuple[tuple[int, int], torch.dtype]


def grid_on_rank(
    spec: AttnMaskSpec, degree: int, options: dict[str, Any], combinations: list[Combination]
) -> dict[Combination, Results]:
    """Head counts and dtypes for one mask; on all ranks alike."""
    results = {}
    for heads, dtype in combinations:
        inputs = make_inputs(spec, heads=heads, dtype=dtype)
        results[heads, dtype] = run_attention(spec, inputs, key_options={"head_degree": degree, **options})
    return results if dist.get_rank() == 0 else {}


def check(cp_size: int, degree: int, mask: str, counts: str, **options: Any) -> None:
    """counts: "each" mask with one of the head counts that have a head for each part, which take turns, or with "all";
    in fp32, and with one of them in bf16."""
    spec, turn = MASKS[mask], list(MASKS).index(mask)
    fits = [heads for heads in HEADS if heads[0] >= degree]
    chosen = fits if counts == "all" else [fits[turn % len(fits)]]
    combinations: list[Combination] = [*((heads, torch.float32) for heads in chosen), ((6, 3), torch.bfloat16)]
    options = {"chunk_size": 8, "num_stages": 2, "ranks_per_node": None, **options}
    results = run_on_ranks(cp_size, grid_on_rank, spec, degree, options, combinations)[0]
    assert len(results) == len(combinations)
    for (heads, dtype), got in results.items():
        inputs = make_inputs(spec, heads=heads, dtype=dtype)
        assert_as_exact_as_sdpa(got, spec, inputs, f"{mask} {cp_size} ranks, degree {degree}, {heads} {dtype}")


each_and_all = pytest.mark.parametrize("counts", ["each", pytest.param("all", marks=pytest.mark.nightly)])


@each_and_all
@pytest.mark.parametrize("mask", MASKS)
def test_as_exact_as_one_process_sdpa(mask, counts):
    check(4, 2, mask, counts)


@pytest.mark.shows("heads")
@each_and_all
@each_once(
    mask=["causal", "varlen", "prefix_tree", "cross", "holes", "empty", "one_token"],
    ranks=[(2, 2), (8, 2), (4, 4), (8, 4)],
)
def test_as_exact_on_other_grids(mask, ranks, counts):
    """ranks: of the group, and the degree."""
    check(*ranks, mask, counts)


@each_and_all
@each_once(inside=[("tiles", None), ("tiles", 4), ("keys", 4), ("keys", 2)], mask=["causal", "varlen", "prefix_tree"])
def test_as_exact_with_the_schedules_inside(inside, mask, counts):
    """Four context ranks of two: queries that move, two nodes of two context ranks, one node for each."""
    schedule, ranks_per_node = inside
    check(8, 2, mask, counts, schedule=schedule, ranks_per_node=ranks_per_node)


def key_for(spec: AttnMaskSpec, heads: tuple[int, int], *, degree: Any = 2, **options: Any) -> cpattn.AttnKey:
    options = {"head_dim": 16, "chunk_size": 8, "ranks_per_node": None, **options}
    return cpattn.make_key(
        spec, num_heads_q=heads[0], num_heads_kv=heads[1], cp_group=dist.group.WORLD, head_degree=degree, **options
    )


def options_of_attention() -> None:
    """softcap, sink with its gradient, another value dim, another mask, other heads, 8-bit wire, keys kept."""
    spec, heads = MASKS["varlen"], (6, 3)
    for head_dim_v, softcap in ((16, None), (24, 2.0)):
        inputs = make_inputs(spec, heads=heads, head_dim_v=head_dim_v, dtype=torch.float64)
        sink = torch.linspace(-1, 2, 6, dtype=torch.float64, requires_grad=True)
        key = key_for(spec, heads, head_dim_v=head_dim_v, num_stages=2)
        exact = oracle(spec, inputs, softcap=softcap, sink=sink.detach())
        got = run_with_key(key, inputs, softcap=softcap, sink=sink.detach())
        for mine, truth in zip(got, exact, strict=True):
            torch.testing.assert_close(mine, truth, rtol=1e-11, atol=1e-11)
        q, dout = (cpattn.dispatch(t, key) for t in (inputs.q, inputs.dout))
        k, v = (cpattn.dispatch(t, key, side="k") for t in (inputs.k, inputs.v))
        out = cpattn.attention(q, k, v, key, sink=sink, softcap=softcap)
        (mine,) = torch.autograd.grad(out, sink, dout)
        dist.all_reduce(mine)
        leaf = sink.detach().requires_grad_()
        (whole,) = torch.autograd.grad(dense_out(spec, inputs, softcap, leaf), leaf, inputs.dout)
        torch.testing.assert_close(mine, whole, rtol=1e-10, atol=1e-10)

    key = key_for(spec, heads, num_stages=2)
    other = AttnMaskSpec.sliding_window([5, 0, 190, 1, 77], 30)
    for asked, mask in ((key.with_mask(other), other), (key.with_heads(4, 1, 8), spec)):
        shape = (asked.num_heads_q, asked.num_heads_kv)
        inputs = make_inputs(mask, heads=shape, head_dim=asked.head_dim, dtype=torch.float64)
        for mine, truth in zip(run_with_key(asked, inputs), oracle(mask, inputs), strict=True):
            torch.testing.assert_close(mine, truth, rtol=1e-11, atol=1e-11)
    with pytest.raises(ValueError, match="head_degree is 2 and num_heads_q is 1"):
        key.with_heads(1, 1, 8)

    inputs = make_inputs(spec, heads=heads)
    plain = run_with_key(key, inputs)
    for options, tolerance in (({"wire": "e4m3"}, 0.3), ({"keep_kv": True}, 0.0)):
        got = run_with_key(key_for(spec, heads, num_stages=2, **options), inputs)
        for mine, truth in zip(got, plain, strict=True):
            torch.testing.assert_close(mine, truth, rtol=0, atol=tolerance)
        assert torch.equal(got.out, plain.out) == (tolerance == 0), "8 bits round, and are used"


def dense_out(spec: AttnMaskSpec, inputs: Inputs, softcap: float | None, sink: Tensor) -> Tensor:
    return dense_attention(*inputs[:3], spec.to_dense(), scale=16**-0.5, softcap=softcap, sink=sink)[0]


def test_everything_that_attention_takes():
    run_on_ranks(4, options_of_attention)


def rows_outside() -> None:
    """dispatch, undispatch, roll and position_ids go by the rows that each rank owns."""
    spec = MASKS["varlen"]
    key, plain = key_for(spec, (4, 2)), key_for(spec, (4, 2), degree=1)
    assert key.cp_size == 4
    assert sum(key.q_placement.num_tokens) == spec.total_seqlen
    x = torch.arange(spec.total_seqlen * 3).view(-1, 3)
    local = cpattn.dispatch(x, key)
    assert len(local) == key.num_tokens == key.num_keys
    assert torch.equal(cpattn.undispatch(local, key), x)
    assert torch.equal(
        cpattn.undispatch(cpattn.roll(local, key), key),
        cpattn.undispatch(cpattn.roll(cpattn.dispatch(x, plain), plain), plain),
    )
    positions = cpattn.position_ids(key)
    assert torch.equal(
        cpattn.undispatch(positions, key), cpattn.undispatch(cpattn.position_ids(plain), plain)
    )
    assert "head sharding: 2 " in key.describe()


def test_rows_outside_attention():
    run_on_ranks(4, rows_outside)


def decode_after_prefill() -> None:
    """The cache holds the rows that a rank owns, with all heads; a new token sees them all."""
    lengths, inputs = [19, 1, 30], make_inputs(AttnMaskSpec.causal(53), heads=(4, 2), dtype=torch.float64)
    spec = AttnMaskSpec.varlen([n - 1 for n in lengths])
    key = key_for(spec, (4, 2))
    cache = PagedKVCache(key, windows=[None], max_new_tokens=1, page_size=4, dtype=torch.float64)
    ends = np.cumsum(lengths)
    prompt = torch.from_numpy(np.delete(np.arange(50), ends - 1))
    k, v = (cpattn.dispatch(t[prompt], key) for t in (inputs.k, inputs.v))
    cache.prefill(0, k, v)
    cache.advance()
    got = cache.decode(0, *(t[ends - 1] for t in inputs[:3]))
    whole = AttnMaskSpec.varlen([*lengths, 3])
    torch.testing.assert_close(got, oracle(whole, inputs).out[ends - 1], rtol=1e-11, atol=1e-11)


def test_a_cache_after_a_head_sharded_prefill():
    run_on_ranks(4, decode_after_prefill)


# ----------------------------------------------------------------------------------------------------
# Autograd, compile, checkpointing.


def repeats(degree: int) -> list[Results]:
    spec = MASKS["prefix_tree"]
    inputs = make_inputs(spec, heads=(6, 3), dtype=torch.bfloat16)
    return [run_attention(spec, inputs, key_options={"head_degree": degree, "chunk_size": 8}) for _ in range(5)]


@pytest.mark.parametrize("degree", [2, 4])
def test_bitwise_repeatable(degree):
    first, *others = run_on_ranks(4, repeats, degree)[0]
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


class Block(nn.Module):
    """One attention layer of 6 query heads and 3 key heads, with sinks."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv = nn.Linear(32, 6 * 16), nn.Linear(32, 2 * 3 * 16)
        self.sink = nn.Parameter(torch.zeros(6))

    def forward(self, x: Tensor, key: cpattn.AttnKey) -> Tensor:
        q = self.q(x).view(-1, 6, 16)
        k, v = self.kv(x).view(-1, 2, 3, 16).unbind(1)
        return cpattn.attention(q, k, v, key, sink=self.sink).flatten(1)


def local_rows(spec: AttnMaskSpec, degree: int = 2) -> tuple[cpattn.AttnKey, Tensor]:
    key = key_for(spec, (6, 3), degree=degree)
    x = torch.randn(spec.total_seqlen, 32, generator=torch.Generator().manual_seed(0))
    return key, cpattn.dispatch(x, key).requires_grad_()


def compilations_on_rank(compiler: str) -> int:
    return compile_many_masks(Block(), local_rows, 5, compiler)


@pytest.mark.nightly
@pytest.mark.parametrize("compiler", COMPILERS)
def test_fullgraph_compile_serves_many_masks(compiler: str) -> None:
    """No graph break (fullgraph raises on one), and a new mask is not a new compilation."""
    assert max(run_on_ranks(4, compilations_on_rank, compiler, timeout=400)) <= 3


def few_tokens_on_rank() -> list[tuple[int, int]]:
    return compile_where_ranks_have_no_rows(Block(), local_rows)


@pytest.mark.nightly
def test_compiled_ranks_without_rows_take_part():
    """Nothing is made of what the ops return there, and the other ranks wait in them all the same."""
    counts = run_on_ranks(4, few_tokens_on_rank)
    assert counts == [[counts[0][0]] * 2] * 4
    assert min(counts[0][0]) > 0


def exchanges_on_rank(context: Any) -> tuple[int, int]:
    key, x = local_rows(AttnMaskSpec.causal(120))
    return checkpoint_counts(Block(), key, x, context)


def test_selective_checkpoint_adds_no_exchange():
    forward, backward = run_on_ranks(4, exchanges_on_rank, cpattn.attention_checkpoint_contexts)[0]
    plain_forward, plain_backward = run_on_ranks(4, exchanges_on_rank, None)[0]
    assert forward == plain_forward > 0
    assert plain_backward == backward + forward


def memory_on_rank(degree: int, dtype: torch.dtype) -> list[tuple[int, int]]:
    """Stated and measured peaks of forward, of backward, and of both."""
    spec = AttnMaskSpec.causal(2048)
    key = key_for(spec, (6, 3), degree=degree, head_dim=64, num_stages=2)
    q, k, v, dout = (cpattn.dispatch(t, key) for t in make_inputs(spec, heads=(6, 3), head_dim=64, dtype=dtype))
    leaves = [t.requires_grad_() for t in (q, k, v)]
    out = cpattn.attention(*leaves, key)
    stated = key.memory(dtype, "cpu")
    measured = (
        allocated_at_peak(lambda: cpattn.attention(*leaves, key)),
        allocated_at_peak(lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True)),
        allocated_at_peak(lambda: torch.autograd.grad(cpattn.attention(*leaves, key), leaves, dout), repeats=3),
    )
    return list(zip((stated.forward, stated.backward, stated.step), measured, strict=True))


@each_once(degree=[2, 4, 1], dtype=[torch.float32, torch.bfloat16])
def test_stated_memory_is_the_measured_one(degree, dtype):
    tolerance = 0.005 if dtype == torch.float32 else 0.1  # as in test_memory.py
    for rank, passes in enumerate(run_on_ranks(4, memory_on_rank, degree, dtype)):
        for pass_, (stated, measured) in zip(("forward", "backward", "step"), passes, strict=True):
            assert stated == pytest.approx(measured, rel=tolerance), f"rank {rank}, {pass_}"


# ----------------------------------------------------------------------------------------------------
# Refusals.


def bad_inputs() -> None:
    spec = MASKS["varlen"]
    for message, heads, options in (
        ("head_degree is 3 and the group has 4 ranks: it must divide them", (4, 2), {"degree": 3}),
        ("head_degree is 4 and num_heads_q is 3: a rank would be left without a head", (3, 3), {"degree": 4}),
        ("head_degree is 0: it must be an int of at least 1", (4, 2), {"degree": 0}),
        ("head_degree is 'all': give an int of at least 1, or 'auto'", (4, 2), {"degree": "all"}),
    ):
        with pytest.raises(ValueError, match=message):
            key_for(spec, heads, **options)
    ready = cpattn.make_plan(spec, cp_size=4, num_heads_q=4, num_heads_kv=2, head_dim=16)
    with pytest.raises(ValueError, match=r"made for cp_size 4, each of 2 ranks \(head_degree\).* 4 ranks: .*cp_size=2"):
        key_for(spec, (4, 2), plan=ready)
    ready = cpattn.make_plan(spec, cp_size=2, num_heads_q=4, num_heads_kv=2, head_dim=16)
    key = key_for(spec, (4, 2), plan=ready)
    assert key.sharding is not None
    q, k, v = torch.randn(key.num_tokens, 4, 16), *torch.randn(2, key.num_tokens, 2, 16)
    with mock.patch.object(dist, "all_to_all_single", side_effect=AssertionError("an exchange ran")):
        with pytest.raises(ValueError, match="q has shape"):
            cpattn.attention(torch.cat([q, q]), k, v, key)
        with pytest.raises(ValueError, match="k has shape"):
            cpattn.attention(q, q, v, key)
        with pytest.raises(ValueError, match=r"sink has shape \(1,\): expected \(4,\)"):
            cpattn.attention(q, k, v, key, sink=torch.zeros(1))
        with pytest.raises(ValueError, match=r"softcap is -1\.0: it must be"):
            cpattn.attention(q, k, v, key, softcap=-1)
    with pytest.raises(ValueError, match="head_degree differs between ranks"):
        key_for(spec, (4, 2), degree=2 if dist.get_rank() else 4, chunk_size=16)
    dtype = torch.float32 if dist.get_rank() else torch.bfloat16
    with pytest.raises(ValueError, match="attention: dtype differs between ranks"):
        cpattn.attention(q.to(dtype), k.to(dtype), v.to(dtype), key)


def test_refusals():
    run_on_ranks(4, bad_inputs)


# ----------------------------------------------------------------------------------------------------
# The choice of the degree.


def seconds_of(spec: AttnMaskSpec, heads: tuple[int, int], hardware: Hardware, cp_size: int = 8) -> DegreeChoice:
    return choose_head_degree(
        with_layers(spec, None, 1, ()),
        Heads(*heads, 64, 64),
        PlanOptions(chunk_size=64, schedule="keys", hardware=hardware),
        cp_size=cp_size,
    )


def with_links(rate: float) -> Hardware:
    """Links of a rate, and no costs besides them and the kernel's work."""
    link, free = Link(1e-6, rate), {"launch_s": 0.0, "slice_s": 0.0, "copy_bytes_per_s": 1e30}
    return dataclasses.replace(DEFAULT_HARDWARE, within=link, across=link, **free)


def test_heads_are_shared_out_where_keys_are_dear():
    """Causal, as many key heads as query heads, a slow link: keys cost O(S) per rank, heads O(S / P)."""
    spec = AttnMaskSpec.causal(1 << 15)
    choice = seconds_of(spec, (16, 16), with_links(1e9))
    assert [degree for degree, _ in choice.seconds] == [1, 2, 4, 8]
    assert choice.head_degree == min(choice.seconds, key=lambda one: one[1])[0] > 1
    assert choice.plans[0].plan.cp_size == 8 // choice.head_degree
    # A rank of a packed batch needs few keys of others; and behind much work, keys travel unseen.
    assert seconds_of(AttnMaskSpec.varlen([512] * 64), (16, 16), with_links(1e9)).head_degree == 1
    assert seconds_of(AttnMaskSpec.causal(1 << 20), (16, 16), with_links(1e12)).head_degree == 1
    # Only as many parts as there are heads, and only divisors.
    assert [degree for degree, _ in seconds_of(spec, (3, 3), with_links(1e9)).seconds] == [1, 2]
    assert [degree for degree, _ in seconds_of(spec, (5, 1), with_links(1e9), cp_size=6).seconds] == [1, 2, 3]


@pytest.mark.parametrize("rate", [1e8, 1e10, 1e12])
@pytest.mark.parametrize(
    "spec",
    [AttnMaskSpec.causal(9999), AttnMaskSpec.varlen([512] * 40 + [9000, 3]), AttnMaskSpec.sliding_window(9999, 64)],
    ids=["causal", "packed", "window"],
)
def test_degrees_that_are_not_planned_are_no_faster(spec, rate, monkeypatch):
    """By what head exchanges and work take at least; without that bound all are planned, and the choice is the same."""
    choice = seconds_of(spec, (16, 4), with_links(rate))
    bound = head_degree._least_seconds
    bounds = []
    monkeypatch.setattr(head_degree, "_least_seconds", lambda *of: bounds.append(bound(*of)) or 0.0)
    every = seconds_of(spec, (16, 4), with_links(rate))
    assert [degree for degree, _ in every.seconds] == [1, 2, 4, 8]
    assert every.head_degree == choice.head_degree
    assert set(choice.seconds) <= set(every.seconds)
    for least, (_, seconds) in zip(bounds, every.seconds, strict=True):
        assert least <= seconds


def test_degrees_that_only_cost_are_not_planned():
    choice = seconds_of(AttnMaskSpec.varlen([512] * 64), (16, 4), with_links(1e9))
    assert [degree for degree, _ in choice.seconds] == [1]


def test_predicted_seconds_of_the_head_exchange():
    """By hand: 2 parts of 4 heads, 8 rows each, 16 + 16 dims, on links of 1 kB/s without latency; both passes alike."""
    placement, parts, heads = place_zigzag(16, 1), split_heads(8, 8, 2), Heads(8, 8, 16, 16, 2)
    hardware = dataclasses.replace(with_links(1e3), within=Link(0.5, 1e3))
    num_bytes = 8 * 4 * (16 + 16 + 16 + 16) * 2
    assert head_exchange_bytes((placement, placement), parts, heads) == num_bytes
    assert head_exchange_seconds((placement, placement), parts, heads, hardware) == 2 * (2 * 0.5 + num_bytes / 1e3)
    one_per_node = dataclasses.replace(hardware, ranks_per_node=1, across=Link(0.0, 1e2))
    assert head_exchange_seconds((placement, placement), parts, heads, one_per_node) == 2 * num_bytes / 1e2
    assert head_exchange_seconds((placement, placement), split_heads(8, 8, 1), heads, hardware) == 0


def chosen_on_rank() -> None:
    spec = AttnMaskSpec.causal(1 << 13)
    key = key_for(spec, (4, 4), degree="auto", hardware=with_links(1e8))
    assert key.options.head_degree > 1
    assert key.sharding is not None
    assert key is key_for(spec, (4, 4), degree="auto", hardware=with_links(1e8))
    line, *others = key.describe().splitlines()
    assert line.startswith(f"head_degree {key.options.head_degree}, chosen by the predicted step on h100: 1: ")
    assert "4: " in line
    assert others[0].startswith(f"head sharding: {key.options.head_degree} ranks share")
    packed = key_for(AttnMaskSpec.varlen([64] * 64), (4, 4), degree="auto", hardware=with_links(1e8))
    assert packed.sharding is None
    assert packed.describe().startswith("head_degree 1, chosen by the predicted step on h100: 1: ")
    ready = cpattn.make_plan(spec, cp_size=2, num_heads_q=4, num_heads_kv=4, head_dim=16)
    assert key_for(spec, (4, 4), degree="auto", plan=ready).options.head_degree == 2
    small = MASKS["varlen"]
    inputs = make_inputs(small, heads=(4, 4), dtype=torch.float64)
    got = run_with_key(key_for(small, (4, 4), degree="auto"), inputs)
    for mine, truth in zip(got, oracle(small, inputs), strict=True):
        torch.testing.assert_close(mine, truth, rtol=1e-11, atol=1e-11)


def test_a_key_says_what_was_chosen_and_why():
    run_on_ranks(4, chosen_on_rank)


def test_a_plan_of_one_rank_takes_no_head_sharding():
    with pytest.raises(ValueError, match="head_degree is 2 and the group has 1 ranks"):
        cpattn.make_key(AttnMaskSpec.causal(9), num_heads_q=2, num_heads_kv=2, head_dim=8, head_degree=2)
