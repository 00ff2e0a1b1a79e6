"""Runtime layer: rows that travel on, over real ranks: exact, the same bits each time, faults by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

import cpattn
from cpattn import AttnMaskSpec
from cpattn.collectives import RowRoutes, group_cast, group_reduce
from cpattn.solver import relays
from tests_dist.ranks.test_fp8_wire import relative_error
from tests_dist.support.harness import run_on_ranks
from tests_dist.support.masks import MASKS
from tests_dist.support.oracle import Results, assert_as_exact_as_sdpa, make_inputs, oracle
from tests_dist.support.rank_cases import run_with_key

# A root of 61 tokens that all see, and two levels of branches; a rank owns it all, or nearly.
TREE = AttnMaskSpec.prefix_tree([61, 30, 17, 25, 40, 1, 33, 22], [[0, 1, 2], [0, 1, 3], [0, 4, 5], [0, 6], [0, 7]])[0]
Way = tuple[AttnMaskSpec, torch.dtype, tuple[int, int], dict[str, Any]]
WAYS: dict[str, Way] = {
    "keys": (TREE, torch.float32, (6, 2), {"layout": "contiguous", "num_stages": 3}),
    "balanced": (MASKS["varlen"], torch.bfloat16, (3, 1), {"schedule": "keys", "num_stages": 2}),
    "cross": (MASKS["cross"], torch.float64, (2, 2), {"num_stages": 2}),
    "tiles": (TREE, torch.float32, (4, 2), {"schedule": "tiles", "num_stages": 2}),
    "kept": (TREE, torch.bfloat16, (4, 1), {"layout": "contiguous", "keep_kv": True, "num_stages": 4}),
    "messages": (TREE, torch.float64, (2, 1), {"layout": "zigzag", "transport": "p2p", "num_stages": 1}),
}


def key_for(spec: AttnMaskSpec, heads: tuple[int, int], options: dict[str, Any]) -> cpattn.AttnKey:
    relays._LEAST_PART = 1  # rows are few
    shape = {"num_heads_q": heads[0], "num_heads_kv": heads[1], "head_dim": 16}
    return cpattn.make_key(spec, **shape, cp_group=dist.group.WORLD, **{"chunk_size": 8, "relays": True, **options})


def rows_passed_on(key: cpattn.AttnKey) -> int:
    """Rows of the hop to those that pass them on; the plan must have it."""
    assert key.plan.relays
    return sum(key.plan.hops(routes)[0].num_rows() for routes in (key.plan.kv_routes, key.plan.q_routes))


def on_rank(per_node: int | None) -> tuple[dict[str, int], dict[str, Results]]:
    """Rows passed on and the results of each way; a second time they are the same bits."""
    passed_on, results = {}, {}
    for name, (spec, dtype, heads, options) in WAYS.items():
        key = key_for(spec, heads, {**options, "ranks_per_node": per_node})
        inputs = make_inputs(spec, heads=heads, head_dim=16, dtype=dtype)
        first, again = (run_with_key(key, inputs) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)), name
        passed_on[name], results[name] = rows_passed_on(key), first
    return passed_on, results if dist.get_rank() == 0 else {}


@pytest.mark.parametrize(("cp_size", "per_node"), [(2, None), (4, None), (8, None), (8, 2)])
def test_exact_and_the_same_bits(cp_size: int, per_node: int | None) -> None:
    """With nodes of two ranks, rows take three hops: to a node, from it to other nodes, inside each of them."""
    passed_on, results = run_on_ranks(cp_size, on_rank, per_node)[0]
    assert cp_size == 2 or all(passed_on[name] for name in ("keys", "kept", "messages")), passed_on
    assert cp_size < 8 or per_node or passed_on["tiles"]
    for name, got in results.items():
        spec, dtype, heads, _ = WAYS[name]
        inputs = make_inputs(spec, heads=heads, head_dim=16, dtype=dtype)
        assert_as_exact_as_sdpa(got, spec, inputs, f"{name} cp {cp_size} {heads} {dtype}")


def wires_on_rank(per_node: int | None) -> list[Results]:
    """At once and passed on: as fp8, and with gradients in bf16."""
    results = []
    inputs = make_inputs(TREE, heads=(4, 2), head_dim=16, dtype=torch.float32)
    for wires in ({"wire": "e4m3"}, {"grad_wire": "bf16"}, {}):
        for on in (False, True):
            options = {"layout": "contiguous", "num_stages": 2, "ranks_per_node": per_node, "relays": on, **wires}
            results.append(run_with_key(key_for(TREE, (4, 2), options), inputs))
    return results


@pytest.mark.parametrize("per_node", [None, 2])
def test_what_is_encoded_once_is_passed_on_as_it_is(per_node: int | None) -> None:
    """fp8: out, lse and dq are those of rows that go at once. bf16: sums are rounded at each hop, and no oftener."""
    results = run_on_ranks(8, wires_on_rank, per_node)[0]
    for plain, relayed in zip(results[::2], results[1::2], strict=True):
        for a, b in zip(plain[:3], relayed[:3], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)  # rows lie in another order
    truth = oracle(TREE, make_inputs(TREE, heads=(4, 2), head_dim=16, dtype=torch.float32))
    hops = 2 if per_node is None else 3
    for name in ("dk", "dv"):
        at_once, narrow, wide = (relative_error(getattr(results[n], name), getattr(truth, name)) for n in (2, 3, 5))
        assert at_once < 2**-8 * (hops - 1)
        assert narrow < hops * 2**-9, f"{name}: {narrow} at {hops} hops, {at_once} at once"
        assert wide < 1e-6


def chain_on_rank() -> None:
    """Four hops from rank 0 through 1, 2 and 3 to 3 and back: each keeps what it got, and adds what comes home."""
    rank, rows = dist.get_rank(), 5
    mine = torch.arange(rows, dtype=torch.float64).add(100 * rank)[:, None].repeat(1, 2)
    hops = []
    for number in range(4):
        # In hop n rank n sends to rank n + 1, and those who have the rows keep them by sending to themselves.
        index, sent, received = torch.empty(0, dtype=torch.int64), [0] * 4, [0] * 4
        held = torch.arange(rows) if rank == 0 else torch.arange(rows, 2 * rows)
        to_next, to_self = rank == number and number < 3, 0 < rank <= number
        if to_self:
            sent[rank] = received[rank] = rows
        if to_next:
            sent[rank + 1] = rows
        if rank == number + 1:
            received[number] = rows
        index = torch.cat([held] * (to_self + to_next)) if to_self or to_next else index
        route = RowRoutes(index, tuple(sent), tuple(received), active=True)
        hops.append(route.relaying(rows) if number else route)
    (came,) = group_cast((mine,), hops, dist.group.WORLD).wait()
    assert came[:, 1].tolist() == ([] if rank == 0 else list(range(rows)))
    into = torch.zeros_like(mine)
    group_reduce((came + 10**rank,), (into,), hops, dist.group.WORLD)
    expected = torch.arange(rows) * 3 + 10 + 100 + 1000 if rank == 0 else torch.zeros(rows)
    assert torch.equal(into[:, 1], expected.double())


def test_a_chain_of_four_hops_and_back() -> None:
    run_on_ranks(4, chain_on_rank)


def disagree_on_rank() -> str:
    """Ranks that want different things are told so before anything travels."""
    with pytest.raises(ValueError, match=r"differs between ranks") as caught:
        key_for(TREE, (4, 2), {"relays": dist.get_rank() != 1})
    return str(caught.value)


def test_ranks_that_disagree_are_told() -> None:
    for message in run_on_ranks(3, disagree_on_rank):
        assert "relays" in message
        assert "ranks [1]" in message
