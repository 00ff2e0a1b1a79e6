"""Runtime layer: attention over ranks in fp64 against the dense oracle, for odd masks, plans and options.

fp64 leaves no room for "about right": a pair that is lost, doubled or masked wrongly is off by far more
than 1e-11. The grid over dtypes is in test_exactness.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import cpattn
from cpattn import AttnMaskSpec
from cpattn.masks.spec import lower_mask
from cpattn.solver import LAYOUTS, Placement, assemble_plan
from cpattn.testing.sweeps import check_random_masks
from tests_dist.support.harness import run_on_ranks
from tests_dist.support.masks import MASKS
from tests_dist.support.oracle import Inputs, Results, assert_exact, dense_attention, make_inputs, oracle
from tests_dist.support.profiles import each_once
from tests_dist.support.rank_cases import run_attention, run_with_key

SELF_ATTENTION = [name for name, spec in MASKS.items() if not spec.is_cross]


def key_for(spec: AttnMaskSpec, inputs: Inputs, **options: Any) -> cpattn.AttnKey:
    return cpattn.make_key(
        spec,
        num_heads_q=inputs.q.shape[1],
        num_heads_kv=inputs.k.shape[1],
        head_dim=inputs.q.shape[2],
        head_dim_v=inputs.v.shape[2],
        **{"cp_group": dist.group.WORLD, "chunk_size": 8, **options},
    )


# ----------------------------------------------------------------------------------------------------
# Random masks, and plans of every kind.


@pytest.mark.parametrize("cp_size", [1, 2, 3, 4])
def test_random_slice_sets(cp_size):
    """Overlaps, gaps, blind rows, rows that own nothing; 48 over the four group sizes."""
    assert sum(run_on_ranks(cp_size, check_random_masks, range(40 * cp_size, 40 * cp_size + 12))) == 12


@pytest.mark.nightly
@pytest.mark.parametrize("cp_size", [1, 2, 3, 4])
def test_random_slice_sets_500_each(cp_size):
    done = sum(run_on_ranks(cp_size, check_random_masks, range(1000, 1500), timeout=600))
    assert done == 500


def with_random_tasks(key: cpattn.AttnKey, seed: int, num_stages: int) -> cpattn.AttnKey:
    """The key with tasks cut anywhere, computed by anyone, over a placement of random runs."""
    rng = np.random.default_rng(seed)
    spec, size = key.spec, key.cp_size
    placements = []
    for total in (spec.total_seqlen, spec.seqlen_k):
        ends = np.unique(np.append(rng.integers(0, total + 1, 2 * size), total))
        placements.append(Placement.from_runs(ends, rng.integers(0, size, len(ends)), cp_size=size))
    q_placement, k_placement = placements if spec.is_cross else (placements[0], placements[0])
    tasks = lower_mask(spec).split_q(np.unique(rng.integers(0, spec.total_seqlen + 1, 3))).table
    tasks = tasks.split_k(np.unique(rng.integers(0, spec.seqlen_k + 1, 3))).table
    task_ranks = rng.integers(0, size, len(tasks))
    plan = assemble_plan(tasks, task_ranks, q_placement, k_placement, num_stages=num_stages)
    planned = key.planned._replace(plan=plan, layer_plans=())
    return cpattn.AttnKey(planned, plan.for_rank(key.cp_rank), key.ranks)


def random_tasks_on_rank(name: str) -> bool:
    spec = MASKS[name]
    inputs = make_inputs(spec, heads=(4, 2), head_dim=8, dtype=torch.float64)
    truth = oracle(spec, inputs)
    sink = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64)
    truth_sink = oracle(spec, inputs, sink=sink)
    moved = False
    for seed in range(3):
        key = with_random_tasks(key_for(spec, inputs), seed, num_stages=seed + 1)
        moved |= len(key.plan.q_routes) > 0
        assert_exact(run_with_key(key, inputs), truth, f"{name} seed {seed}:")
        assert_exact(run_with_key(key, inputs, sink=sink), truth_sink, f"{name} seed {seed} with sink:")
    return moved


@each_once(name=["causal", "prefix_tree", "cross", "holes", "two_sided_window", "one_token"], cp_size=[3, 2, 4])
def test_any_rank_may_compute_any_task(cp_size, name):
    """Queries travel, partial results merge at home, and ranks help with rows and keys of others."""
    assert all(run_on_ranks(cp_size, random_tasks_on_rank, name)) or name == "one_token"


def low_precision_tasks_on_rank(dtype: torch.dtype) -> None:
    """Partial results and gradients that travel: still within a few roundings of the fp64 truth."""
    spec = MASKS["causal"]
    inputs = make_inputs(spec, heads=(2, 1), head_dim=16, dtype=dtype)
    truth = oracle(spec, inputs)
    for seed in range(2):
        got = run_with_key(with_random_tasks(key_for(spec, inputs), seed, num_stages=2), inputs)
        for name, mine, exact in zip(Results._fields, got, truth, strict=True):
            error = (mine.double() - exact).norm() / exact.norm()
            assert error < 3 * torch.finfo(dtype).eps, f"{name}: relative error {error:.2e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_travelling_queries_in_low_precision(dtype):
    run_on_ranks(3, low_precision_tasks_on_rank, dtype)


def scaled_gradients_on_rank(schedule: str) -> None:
    """Backward is linear in dout, from 2**-80 to 2**80: nothing under- or overflows on the way."""
    spec = MASKS["varlen"]
    inputs = make_inputs(spec, heads=(2, 1), head_dim=8)
    plain = run_attention(spec, inputs, key_options={"chunk_size": 8, "schedule": schedule})
    for power in (-80, -40, 40, 80):
        scaled = inputs._replace(dout=inputs.dout * 2.0**power)
        got = run_attention(spec, scaled, key_options={"chunk_size": 8, "schedule": schedule})
        for mine, expected in zip(got[2:], plain[2:], strict=True):
            torch.testing.assert_close(mine * 2.0**-power, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("schedule", ["keys", "tiles"])
def test_gradients_scale(schedule):
    run_on_ranks(4, scaled_gradients_on_rank, schedule)


# ----------------------------------------------------------------------------------------------------
# What other implementations refuse or get wrong.

TREE_OF_DEPTH_4, _ = AttnMaskSpec.prefix_tree(
    [40, 7, 13, 3, 1, 29, 11, 5],
    [[0, 1, 3, 5], [0, 1, 3, 6], [0, 1, 4], [0, 2, 7]],
)
PEERS_FAIL = {
    "window over packed documents": (AttnMaskSpec.sliding_window([1, 7, 13, 1, 200, 3], 10), (2, 2)),
    "tree of depth 4": (TREE_OF_DEPTH_4, (2, 1)),
    "cross-attention": (AttnMaskSpec.cross([50, 1, 0, 31], [7, 90, 3, 64]), (2, 1)),
    "cross-attention without queries": (AttnMaskSpec.cross([0], [9]), (1, 1)),
    "cross-attention without keys": (AttnMaskSpec.cross([9], [0]), (1, 1)),
    "blocks that take turns": (
        AttnMaskSpec(
            [[0, 40], [80, 121], [40, 80], [121, 170]],
            [[0, 40], [0, 40], [40, 80], [40, 80]],
            ["causal", "full", "causal", "full"],
            170,
        ),
        (4, 2),
    ),
    "more ranks than key heads": (AttnMaskSpec.varlen([30, 1, 61]), (3, 1)),
    "three groups of heads": (AttnMaskSpec.varlen([30, 1, 61]), (9, 3)),
}


@pytest.mark.parametrize("name", PEERS_FAIL)
def test_what_peers_refuse(name):
    spec, heads = PEERS_FAIL[name]
    inputs = make_inputs(spec, heads=heads, head_dim=8, dtype=torch.float64)
    options = {"chunk_size": 4, "num_stages": 2}
    for got in run_on_ranks(4, run_attention, spec, inputs, key_options=options):
        assert_exact(got, oracle(spec, inputs), name)


@pytest.mark.parametrize("cp_size", [2, 4])
def test_cross_attention_dealt_out(cp_size):
    """Queries that see many keys are dealt out with those that see few, or none; an empty document."""
    spec = AttnMaskSpec.cross([131, 1, 0, 30], [61, 40, 3, 9], causal=True)
    inputs = make_inputs(spec, heads=(6, 2), head_dim=8, dtype=torch.float64)
    options = {"chunk_size": 4, "num_stages": 2, "schedule": "keys"}
    plan = cpattn.make_plan(spec, cp_size=cp_size, num_heads_q=6, num_heads_kv=2, head_dim=8, **options).plan
    assert len(plan.q_placement.ends) > cp_size
    for got in run_on_ranks(cp_size, run_attention, spec, inputs, key_options=options):
        assert_exact(got, oracle(spec, inputs), "cross-attention dealt out")


def first_rank_only(spec: AttnMaskSpec, inputs: Inputs, **options: Any) -> Results | None:
    got = run_attention(spec, inputs, **options)
    return got if dist.get_rank() == 0 else None


def test_packed_lengths_from_1_to_4096():
    """[1, 7, 13, 1, 4096, 3] at cp 4; the oracle takes one document at a time."""
    lengths = [1, 7, 13, 1, 4096, 3]
    spec = AttnMaskSpec.varlen(lengths)
    inputs = make_inputs(spec, heads=(1, 1), head_dim=8, dtype=torch.float64)
    got = run_on_ranks(4, first_rank_only, spec, inputs, key_options={"chunk_size": 64})[0]
    start = 0
    for length in lengths:
        rows = slice(start, start + length)
        alone = Inputs(*(t[rows] for t in inputs))
        truth = oracle(AttnMaskSpec.causal(length), alone)
        assert_exact(Results(*(t[rows] for t in got)), truth, f"document of {length}")
        start += length


def tiny_totals_on_rank() -> list[int]:
    owned = []
    for total in (17, 7, 1, 0):
        for layout in LAYOUTS:
            spec = AttnMaskSpec.causal(total)
            inputs = make_inputs(spec, heads=(2, 1), head_dim=8, dtype=torch.float64)
            key = key_for(spec, inputs, chunk_size=1, layout=layout)
            owned.append(key.num_tokens)
            assert_exact(run_with_key(key, inputs), oracle(spec, inputs), f"{total} tokens, {layout}:")
    return owned


def test_fewer_tokens_than_fit_the_ranks():
    """17 tokens on 8 ranks, and ranks that own no row at all."""
    owned = run_on_ranks(8, tiny_totals_on_rank)
    assert any(0 in mine for mine in owned)
    assert [sum(column) for column in zip(*owned, strict=True)] == [
        n for n in (17, 7, 1, 0) for _ in LAYOUTS
    ]


# ----------------------------------------------------------------------------------------------------
# Leaks.


def probe_on_rank(name: str, options: dict[str, Any]) -> None:
    """Perturb one token's k and v, or q: exactly the outputs that the mask allows change, by any bit."""
    spec = MASKS[name]
    visible = torch.from_numpy(spec.to_dense())
    inputs = make_inputs(spec, heads=(2, 1), head_dim=8)
    base = run_attention(spec, inputs, key_options=options)
    rng = np.random.default_rng(0)
    for token in rng.choice(spec.seqlen_k, 4, replace=False).tolist():
        k, v = inputs.k.clone(), inputs.v.clone()
        k[token] += 1
        v[token] -= 1
        got = run_attention(spec, inputs._replace(k=k, v=v), key_options=options)
        changed = (got.out != base.out).flatten(1).any(1) | (got.lse != base.lse).any(1)
        assert torch.equal(changed, visible[:, token]), f"key {token}"
        unchanged = ~(visible & visible[:, token : token + 1]).any(0)  # keys that share no query with it
        for mine, before in ((got.dk, base.dk), (got.dv, base.dv)):
            assert torch.equal(mine[unchanged], before[unchanged]), f"gradient of key {token}"
    for token in rng.choice(spec.total_seqlen, 4, replace=False).tolist():
        q = inputs.q.clone()
        q[token] += 1
        got = run_attention(spec, inputs._replace(q=q), key_options=options)
        changed = (got.out != base.out).flatten(1).any(1) | (got.lse != base.lse).any(1)
        expected = torch.zeros(spec.total_seqlen, dtype=torch.bool)
        expected[token] = visible[token].any()
        assert torch.equal(changed, expected), f"query {token}"
        # Gradient of one output row alone: values that it sees, and no other, get some.
        dout = torch.zeros_like(inputs.dout)
        dout[token] = 1
        got = run_attention(spec, inputs._replace(dout=dout), key_options=options)
        assert torch.equal(got.dv.flatten(1).any(1), visible[token]), f"row {token}"
        assert not got.dq[torch.arange(spec.total_seqlen) != token].any()
        assert not got.dk[~visible[token]].any()


@pytest.mark.parametrize(
    "name",
    ["varlen", "prefix_tree", "cross", "holes"]
    + [pytest.param(name, marks=pytest.mark.nightly) for name in ("sliding_window", "prefix_lm")],
)
def test_a_token_reaches_exactly_the_outputs_that_see_it(name):
    run_on_ranks(4, probe_on_rank, name, {"chunk_size": 8, "num_stages": 2})


@pytest.mark.parametrize("name", ["varlen", "prefix_tree"])
def test_no_leak_where_queries_travel(name):
    run_on_ranks(3, probe_on_rank, name, {"chunk_size": 8, "schedule": "tiles"})


def nan_on_rank() -> None:
    """A NaN in one document stays there, and does not turn into a number."""
    spec = AttnMaskSpec.varlen([20, 33, 11])
    inputs = make_inputs(spec, heads=(2, 1), head_dim=8)
    base = run_attention(spec, inputs, key_options={"chunk_size": 4})
    for field in ("q", "k", "v"):
        tensor = getattr(inputs, field).clone()
        tensor[30] = torch.nan
        got = run_attention(spec, inputs._replace(**{field: tensor}), key_options={"chunk_size": 4})
        for name, mine, before in zip(Results._fields, got, base, strict=True):
            assert torch.equal(mine[:20], before[:20]), f"{field}: {name} of document 0"
            assert torch.equal(mine[53:], before[53:]), f"{field}: {name} of document 2"
        assert got.out[30].isnan().all(), f"NaN in {field} is gone"


def test_a_nan_stays_in_its_document():
    run_on_ranks(3, nan_on_rank)


# ----------------------------------------------------------------------------------------------------
# Sinks, softcap, scales, head dims.


def sink_on_rank(name: str, softcap: float | None, options: dict[str, Any]) -> None:
    spec = MASKS[name]
    inputs = make_inputs(spec, heads=(4, 2), head_dim=8, dtype=torch.float64)
    leaves = [t.clone().requires_grad_() for t in (*inputs[:3], torch.tensor([0.3, -2.0, 5.0, 0.0]).double())]
    out, lse = dense_attention(*leaves[:3], spec.to_dense(), scale=8**-0.5, softcap=softcap, sink=leaves[3])
    *grads, dsink = torch.autograd.grad(out, leaves, inputs.dout)
    key = key_for(spec, inputs, **options)
    sink = leaves[3].detach().requires_grad_()
    got = run_with_key(key, inputs, sink=sink.detach(), softcap=softcap)
    assert_exact(got, Results(out.detach(), lse.detach(), *grads), name)
    local = [cpattn.dispatch(t, key, side=s) for t, s in zip(inputs, "qkkq", strict=True)]
    cpattn.attention(*local[:3], key, sink=sink, softcap=softcap).backward(local[3])
    dist.all_reduce(sink.grad)  # each rank has its share
    torch.testing.assert_close(sink.grad, dsink, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("name", ["varlen", "cross", "holes", "all_blind"])
def test_sink(name, softcap):
    """With blind rows too: they see the sink alone, so out 0, lse the sink, and no gradient."""
    run_on_ranks(3, sink_on_rank, name, softcap, {"num_stages": 2})


def test_sink_where_queries_travel():
    run_on_ranks(4, sink_on_rank, "varlen", None, {"schedule": "tiles"})


def odd_sinks_on_rank() -> None:
    """A sink of -inf is no sink, also for blind rows; a low-precision sink keeps its dtype."""
    spec = MASKS["holes"]
    inputs = make_inputs(spec, heads=(2, 1), head_dim=8)
    plain = run_attention(spec, inputs, key_options={"chunk_size": 8})
    key = key_for(spec, inputs)
    none = torch.full((2,), -torch.inf, requires_grad=True)
    local = [cpattn.dispatch(t, key).requires_grad_() for t in inputs]
    out, lse = cpattn.attention(*local[:3], key, sink=none, return_lse=True)
    grads = torch.autograd.grad(out, [*local[:3], none], local[3])
    assert not grads[-1].any(), "a sink of -inf takes no part"
    for mine, expected in zip((out, lse, *grads[:3]), plain, strict=True):
        torch.testing.assert_close(cpattn.undispatch(mine, key), expected)
    half = torch.zeros(2, dtype=torch.bfloat16, requires_grad=True)
    cpattn.attention(*local[:3], key, sink=half).sum().backward()
    assert half.grad.dtype == torch.bfloat16


def test_odd_sinks():
    run_on_ranks(2, odd_sinks_on_rank)


def number_on_rank(call: dict[str, Any], truth_options: dict[str, Any]) -> None:
    spec = MASKS["two_sided_window"]
    inputs = make_inputs(spec, heads=(2, 1), head_dim=8, dtype=torch.float64)
    got = run_attention(spec, inputs, key_options={"chunk_size": 8, "num_stages": 2}, **call)
    assert_exact(got, oracle(spec, inputs, **truth_options), str(call))


@pytest.mark.parametrize("scale", [0.0, 1.0, -0.7, 30.0])
def test_softmax_scale(scale):
    run_on_ranks(2, number_on_rank, {"softmax_scale": scale}, {"scale": scale})


@pytest.mark.parametrize("softcap", [0.5, 20.0])
def test_softcap(softcap):
    run_on_ranks(3, number_on_rank, {"softcap": softcap}, {"softcap": softcap})


def head_dims_on_rank(head_dim: int, head_dim_v: int, backend: str) -> None:
    for name in ("causal", "cross_causal"):
        spec = MASKS[name]
        inputs = make_inputs(
            spec, heads=(2, 1), head_dim=head_dim, head_dim_v=head_dim_v, dtype=torch.float64
        )
        got = run_attention(spec, inputs, key_options={"chunk_size": 8, "backend": backend})
        assert_exact(got, oracle(spec, inputs), f"{name} {head_dim} {head_dim_v}:")


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
@pytest.mark.parametrize(
    ("head_dim", "head_dim_v"), [(8, 8), (1, 3), (24, 100), (192, 128), (64, 256), (256, 256)]
)
def test_head_dims(head_dim, head_dim_v, backend):
    run_on_ranks(2, head_dims_on_rank, head_dim, head_dim_v, backend)


def gradcheck_on_rank() -> None:
    """Finite differences of the whole path on one rank: dispatch, attention, roll, undispatch."""
    spec, _ = AttnMaskSpec.prefix_tree([3, 2, 1], [[0, 1], [0, 2]])
    inputs = make_inputs(spec, heads=(2, 1), head_dim=3, dtype=torch.float64)
    key = key_for(spec, inputs, cp_group=None)
    sink = torch.tensor([0.1, -0.4], dtype=torch.float64, requires_grad=True)

    def whole(q: Tensor, k: Tensor, v: Tensor, sink: Tensor) -> Tensor:
        out = cpattn.attention(*(cpattn.dispatch(t, key) for t in (q, k, v)), key, sink=sink, softcap=2.0)
        return cpattn.undispatch(cpattn.roll(out, key), key)

    leaves = [t.requires_grad_() for t in inputs[:3]]
    assert torch.autograd.gradcheck(whole, (*leaves, sink))


def test_gradcheck():
    run_on_ranks(1, gradcheck_on_rank)


# ----------------------------------------------------------------------------------------------------
# Tensors as they come.


def layouts_on_rank() -> None:
    """Transposed, sliced out of a fused projection, expanded, flipped: the same bits as contiguous ones."""
    spec = MASKS["varlen"]
    inputs = make_inputs(spec, heads=(4, 2), head_dim=8)
    key = key_for(spec, inputs, num_stages=2)
    q, k, v, dout = (cpattn.dispatch(t, key) for t in inputs)
    v = v[:, :1].expand(-1, 2, -1)  # one value head for all

    def run(q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> tuple[Tensor, ...]:
        leaves = [t.detach().requires_grad_() for t in (q, k, v)]
        out = cpattn.attention(*leaves, key)
        return (out, *torch.autograd.grad(out, leaves, dout))

    expected = run(*(t.contiguous() for t in (q, k, v, dout)))
    fused = torch.cat([q, k, v.contiguous()], dim=1)
    variants = {
        "fused": (fused[:, :4], fused[:, 4:6], fused[:, 6:], dout),
        "heads first": tuple(t.transpose(0, 1).contiguous().transpose(0, 1) for t in (q, k, v, dout)),
        "dims first": tuple(t.permute(2, 0, 1).contiguous().permute(1, 2, 0) for t in (q, k, v, dout)),
        "expanded": (q, k, v, dout),
        "every other": tuple(torch.stack([t, -t], dim=-1).flatten(2)[..., ::2] for t in (q, k, v, dout)),
    }
    for name, tensors in variants.items():
        for mine, truth in zip(run(*tensors), expected, strict=True):
            assert torch.equal(mine, truth), name
    constant = torch.ones(()).expand(dout.shape)  # as out.sum().backward() makes it
    for mine, truth in zip(run(q, k, v, constant), run(q, k, v, constant.contiguous()), strict=True):
        assert torch.equal(mine, truth)


@pytest.mark.parametrize("cp_size", [1, 3])
def test_any_strides(cp_size):
    run_on_ranks(cp_size, layouts_on_rank)


def results_are_the_callers_own() -> None:
    """Writing into results or inputs after the call changes nothing that backward needs, or raises."""
    spec = MASKS["varlen"]
    inputs = make_inputs(spec, heads=(2, 1), head_dim=8)
    key = key_for(spec, inputs)
    q, k, v, dout = (cpattn.dispatch(t, key) for t in inputs)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    out, lse = cpattn.attention(*leaves, key, return_lse=True)
    expected = torch.autograd.grad(out, leaves, dout, retain_graph=True)
    assert not lse.requires_grad
    with torch.no_grad():
        out.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(out, leaves, dout)
    out, _ = cpattn.attention(*leaves, key, return_lse=True)
    for mine, truth in zip(torch.autograd.grad(out, leaves, dout), expected, strict=True):
        assert torch.equal(mine, truth)


def test_results_are_the_callers_own():
    run_on_ranks(1, results_are_the_callers_own)


def repeat_on_rank(options: dict[str, Any], dtype: torch.dtype) -> list[Results]:
    spec = MASKS["causal"]
    inputs = make_inputs(spec, heads=(4, 2), dtype=dtype)
    first, second = (run_attention(spec, inputs, key_options=options) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    return [first]


@pytest.mark.parametrize("schedule", ["keys", "tiles"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bitwise_repeatable(schedule, dtype):
    """Within a process, over the ranks, and in another set of processes' time order."""
    options = {"chunk_size": 8, "num_stages": 3, "schedule": schedule}
    runs = [r[0] for _ in range(2) for r in run_on_ranks(4, repeat_on_rank, options, dtype)]
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


def no_grad_on_rank() -> None:
    """Inputs of which only some want a gradient, and none under no_grad."""
    spec = MASKS["varlen"]
    inputs = make_inputs(spec, heads=(2, 1), head_dim=8, dtype=torch.float64)
    key = key_for(spec, inputs)
    truth = oracle(spec, inputs)
    for wanted in range(3):
        local = [cpattn.dispatch(t, key) for t in inputs]
        local[wanted].requires_grad_()
        cpattn.attention(*local[:3], key).backward(local[3])
        got = cpattn.undispatch(local[wanted].grad, key)
        torch.testing.assert_close(got, truth[2 + wanted], rtol=1e-11, atol=1e-11)
    with torch.no_grad():
        assert not cpattn.attention(*(t.requires_grad_() for t in local[:3]), key).requires_grad


def test_gradients_of_some_inputs_only():
    run_on_ranks(2, no_grad_on_rank)
