"""Runtime layer: keys. Their cache, several in one process, subgroups and meshes, with_mask, windows."""

from __future__ import annotations

import contextlib
import copy
import gc
import os
import pickle
import timeit
import weakref
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import cpattn
from cpattn import AttnMaskSpec, LayerKind
from cpattn.collectives import Fp8Rows
from cpattn.keys import nodes
from cpattn.keys.cache import MAX_CACHED_KEYS, clear_key_cache
from cpattn.keys.nodes import Launch, group_ranks_per_node, read_launch
from cpattn.solver import Heads, make_joint_plans, place_zigzag, row_costs
from tests_dist.support.harness import fresh_group, run_on_ranks
from tests_dist.support.oracle import Inputs, Results, make_inputs, oracle
from tests_dist.support.rank_cases import run_with_key

SPEC = AttnMaskSpec.varlen([30, 1, 47])


def make_key(spec: AttnMaskSpec = SPEC, **options: Any) -> cpattn.AttnKey:
    defaults = {
        "num_heads_q": 2,
        "num_heads_kv": 1,
        "head_dim": 8,
        "cp_group": dist.group.WORLD,
        "chunk_size": 8,
    }
    return cpattn.make_key(spec, **{**defaults, **options})


def inputs_for(spec: AttnMaskSpec, seed: int = 0) -> Inputs:
    return make_inputs(spec, heads=(2, 1), head_dim=8, dtype=torch.float64, seed=seed)


def assert_serves(key: cpattn.AttnKey, spec: AttnMaskSpec, seed: int = 0) -> None:
    """The key computes this mask, and no other."""
    inputs = inputs_for(spec, seed)
    for name, mine, exact in zip(
        Results._fields, run_with_key(key, inputs), oracle(spec, inputs), strict=True
    ):
        torch.testing.assert_close(mine, exact, rtol=1e-11, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


def equal_arguments_give_the_same_key() -> None:
    key = make_key()
    assert make_key(AttnMaskSpec.varlen([30, 1, 47])) is key
    assert make_key(head_dim_v=8) is key
    assert make_key(window=5) is make_key(window=[4, None])
    others = [
        make_key(AttnMaskSpec.varlen([30, 1, 47], causal=False)),
        make_key(AttnMaskSpec.varlen([31, 47])),
        make_key(
            AttnMaskSpec(SPEC.q_ranges, SPEC.k_ranges, SPEC.mask_types, 78)
        ),  # the same, without documents
        make_key(num_heads_q=4),
        make_key(num_heads_q=4, num_heads_kv=2),
        make_key(head_dim=16),
        make_key(head_dim_v=4),
        make_key(chunk_size=16),
        make_key(layout="zigzag"),
        make_key(schedule="tiles"),
        make_key(backend="reference"),
        make_key(num_stages=3),
        make_key(window=5),
        make_key(window=(5, None)),
        make_key(search_effort=1),
        make_key(cp_group=None),
        make_key(ranks_per_node=1),
        make_key(cp_group=fresh_group()),
    ]
    assert len({id(k) for k in (key, *others)}) == len(others) + 1
    assert make_key() is key


def test_the_cache_holds_whatever_changes_the_plan():
    run_on_ranks(2, equal_arguments_give_the_same_key)


def cache_is_bounded() -> None:
    clear_key_cache()
    first = make_key(AttnMaskSpec.causal(5))
    kept = make_key(AttnMaskSpec.causal(6))
    for total in range(7, 6 + MAX_CACHED_KEYS):
        make_key(AttnMaskSpec.causal(total))
        assert make_key(AttnMaskSpec.causal(6)) is kept  # used, hence kept
    assert make_key(AttnMaskSpec.causal(5)) is not first  # least recently used, hence dropped
    assert_serves(first, AttnMaskSpec.causal(5))  # and good as long as someone holds it
    gone = weakref.ref(make_key(AttnMaskSpec.causal(400)))
    clear_key_cache()
    gc.collect()
    assert gone() is None, "a key that nobody holds stays in memory"


def test_the_cache_is_bounded():
    run_on_ranks(2, cache_is_bounded)


def evictions_agree() -> None:
    """Keys of a second group, which only rank 0 is in, push none of the first group's out of its cache."""
    clear_key_cache()
    pair = fresh_group([0, 1])
    lone = fresh_group([0, 2])
    if dist.get_rank() in (0, 1):
        key = make_key(cp_group=pair)
    if dist.get_rank() in (0, 2):
        for total in range(5, 5 + MAX_CACHED_KEYS):
            make_key(AttnMaskSpec.causal(total), cp_group=lone)
    if dist.get_rank() in (0, 1):
        assert make_key(cp_group=pair) is key  # were it gone on rank 0 alone, that rank would wait for ever


def test_ranks_of_a_group_cache_alike():
    run_on_ranks(3, evictions_agree, timeout=60)


def hit_time() -> float:
    key = make_key()
    assert make_key() is key
    return min(timeit.repeat(make_key, number=100, repeat=5)) / 100


def test_a_hit_costs_microseconds():
    """Less than a tenth of a millisecond, on a machine that is busy with other things."""
    assert min(run_on_ranks(1, hit_time)) < 100e-6


def changed_after() -> None:
    """A key is of the spec as it was; the changed spec gets a key of its own."""
    spec = AttnMaskSpec.varlen([30, 1, 47])
    key = make_key(spec)
    spec.q_ranges[0][1] = 10
    spec.mask_types[2] = "full"
    spec.documents[:] = AttnMaskSpec.causal(78).documents
    assert_serves(key, SPEC)
    assert key.spec.fingerprint() == SPEC.fingerprint()
    assert cpattn.undispatch(cpattn.position_ids(key), key).max() == 46
    assert make_key() is key
    assert make_key(spec) is not key
    assert_serves(make_key(spec), spec)
    assert cpattn.undispatch(cpattn.position_ids(make_key(spec)), make_key(spec)).max() == 77
    sums = torch.tensor([0, 30, 31, 78], dtype=torch.int32)
    assert make_key(AttnMaskSpec.from_cu_seqlens(sums)) is key
    sums[1] = 20  # the next batch in the same tensor
    again = make_key(AttnMaskSpec.from_cu_seqlens(sums))
    assert again is not key
    assert_serves(again, AttnMaskSpec.varlen([20, 11, 47]))


def test_a_key_does_not_follow_what_it_was_made_of():
    run_on_ranks(2, changed_after)


IN_PLACE: list[Callable[[AttnMaskSpec], Any]] = [
    lambda spec: spec.q_ranges[1].__setitem__(0, 29),
    lambda spec: spec.k_ranges[2].__setitem__(slice(None), [0, 78]),
    lambda spec: spec.mask_types.reverse(),
    lambda spec: spec.documents.pop(),
    lambda spec: spec.q_ranges.append([0, 5]),
    lambda spec: setattr(spec, "total_seqlen", 80),
    lambda spec: setattr(spec, "documents", None),
    lambda spec: list.sort(spec.k_ranges, reverse=True),
]


@pytest.mark.parametrize("change", range(len(IN_PLACE)))
def test_a_fingerprint_is_of_the_lists_as_they_are(change):
    spec, same = (AttnMaskSpec([[0, 30], [30, 31]], [[0, 9], [1, 31]], ["full", "causal"], 78) for _ in range(2))
    for made in (spec, same):
        made.q_ranges.append([31, 78])
        made.k_ranges.append([31, 78])
        made.mask_types.append("causal")
        made.documents = AttnMaskSpec.causal(78).documents
    before = spec.fingerprint()
    assert spec.fingerprint() is before
    IN_PLACE[change](spec)
    assert spec.fingerprint() != before
    assert same.fingerprint() == before
    IN_PLACE[change](same)
    assert same.fingerprint() == spec.fingerprint()


def interleaved() -> None:
    """Two models of different heads, two masks: forward of both, then backward of both."""
    specs = (AttnMaskSpec.causal(50), AttnMaskSpec.sliding_window([20, 30], 7))
    graphs = []
    for number, (spec, heads) in enumerate((s, h) for s in specs for h in ((2, 1), (4, 4))):
        inputs = make_inputs(spec, heads=heads, head_dim=8, dtype=torch.float64, seed=number)
        key = make_key(spec, num_heads_q=heads[0], num_heads_kv=heads[1])
        *leaves, dout = (cpattn.dispatch(t, key) for t in inputs)
        leaves = [t.requires_grad_() for t in leaves]
        graphs.append((key, inputs, leaves, dout, cpattn.attention(*leaves, key)))
    assert len({id(graph[0]) for graph in graphs}) == 4
    for key, inputs, leaves, dout, out in graphs:
        grads = torch.autograd.grad(out, leaves, dout)
        truth = oracle(key.spec, inputs)
        for mine, exact in zip((out, *grads), (truth.out, *truth[2:]), strict=True):
            torch.testing.assert_close(cpattn.undispatch(mine, key), exact, rtol=1e-11, atol=1e-11)


def test_two_models_and_two_masks_in_one_process():
    run_on_ranks(3, interleaved)


def subgroups() -> None:
    """The same mask in groups of 2 and 3 at the same time, and in groups of the same size."""
    rank = dist.get_rank()
    groups = [fresh_group(ranks) for ranks in ([0, 1], [2, 3, 4], [5, 6], [0, 3], [7])]
    mine = [
        g for g, ranks in zip(groups, ([0, 1], [2, 3, 4], [5, 6], [0, 3], [7]), strict=True) if rank in ranks
    ]
    keys = [make_key(cp_group=group) for group in mine]
    for key, group in zip(keys, mine, strict=True):
        assert key.cp_size == dist.get_world_size(group)
        assert key.cp_rank == (dist.get_rank(group) if key.cp_size > 1 else 0)
        assert_serves(key, SPEC, seed=key.cp_size)
    assert len({id(key) for key in keys}) == len(keys)
    assert [make_key(cp_group=group) for group in mine] == keys


def test_each_group_has_its_own_plan():
    run_on_ranks(8, subgroups)


def meshes() -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp"))
    key = make_key(cp_group=mesh)
    assert (key.cp_size, key.cp_rank) == (2, dist.get_rank() % 2)
    assert make_key(cp_group=mesh["cp"]) is key
    assert make_key(cp_group=mesh.get_group("cp")) is key
    assert make_key(cp_group=mesh["dp"]) is not key  # a 1-D mesh needs no name
    assert make_key(cp_group=init_device_mesh("cpu", (4,))).cp_size == 4
    assert_serves(key, SPEC, seed=dist.get_rank() // 2)  # other data in each half


def test_device_mesh():
    run_on_ranks(4, meshes)


def one_rank() -> None:
    """cp_group None and groups of one run the same code without any collective."""
    key = make_key(cp_group=None)
    assert (key.cp_size, key.cp_rank, key.num_tokens) == (1, 0, 78)
    if dist.get_rank() == 0:  # rank 1 stays away
        assert_serves(key, SPEC)


def test_no_group_is_one_rank():
    run_on_ranks(2, one_rank, timeout=30)


def masks_of_one_placement() -> None:
    """Full, windowed and tree layers over one dispatch: equal rows, each with its own mask."""
    key = make_key(window=None, num_stages=2)
    others = {
        "window as a mask": (AttnMaskSpec.sliding_window([30, 1, 47], 9), {}),
        "window as an option": (SPEC, {"window": 9}),
        "full": (AttnMaskSpec.varlen([30, 1, 47], causal=False), {}),
        "nothing": (AttnMaskSpec([], [], [], 78), {}),
    }
    for name, (spec, options) in others.items():
        other = key.with_mask(spec, **options)
        assert torch.equal(cpattn.position_ids(other, stream=True), cpattn.position_ids(key, stream=True)), (
            name
        )
        assert key.with_mask(spec, **options) is other, name
        truth = AttnMaskSpec.sliding_window([30, 1, 47], 9) if options else spec
        assert_serves(other, truth)
    assert_serves(key, SPEC)
    tree, _ = AttnMaskSpec.prefix_tree([30, 1, 47], [[0, 1], [0, 2]])
    assert_serves(key.with_mask(tree), tree)
    assert cpattn.undispatch(cpattn.position_ids(key.with_mask(tree)), key)[31] == 30
    cross = make_key(AttnMaskSpec.cross([9, 4], [30, 2]))
    assert_serves(
        cross.with_mask(AttnMaskSpec.cross([13], [32], causal=True)),
        AttnMaskSpec.cross([13], [32], causal=True),
    )


def test_with_mask():
    run_on_ranks(3, masks_of_one_placement)


def masks_planned_together() -> None:
    """Two full layers to five with a window: one placement for both, found again by with_mask."""
    window = [LayerKind(window=9, num_layers=5)]
    key = make_key(num_layers=2, also=window, num_stages=2)
    local = key.with_mask(SPEC, window=9)
    tables = [cpattn.masks.spec.lower_mask(SPEC, w) for w in (None, (8, None))]
    options = {"total_seqlen": 78, "cp_size": 3, "chunk_size": 8, "num_stages": 2, "schedule": "auto"}
    joint = make_joint_plans(tables, [2, 5], costs=row_costs(2, 1, 8, 8), **options)
    assert [key.plan.fingerprint, local.plan.fingerprint] == [p.fingerprint for p in joint.plans]
    assert_serves(key, SPEC)
    assert_serves(local, AttnMaskSpec.sliding_window([30, 1, 47], 9))
    assert local.with_mask(SPEC).plan is key.plan
    assert key.with_heads(4, 2, 8).with_mask(SPEC, window=9).plan is local.plan
    assert key.with_mask(SPEC) is key
    assert key.with_mask(AttnMaskSpec.varlen([30, 1, 47]), window=(8, None)) is local
    assert_serves(key.with_mask(SPEC, window=5), AttnMaskSpec.sliding_window([30, 1, 47], 5))  # planned afterwards
    again = {"num_layers": 2, "num_stages": 2}
    assert make_key(also=[LayerKind(AttnMaskSpec.varlen([30, 1, 47]), (8, None), 5)], **again) is key
    text = key.describe(torch.float32, "cpu")
    assert f"proportion 2:5; work max/mean over all layers {joint.imbalance:.3f}" in text
    others = [
        make_key(num_stages=2),
        make_key(num_layers=3, also=window, num_stages=2),
        make_key(also=[LayerKind(window=10, num_layers=5)], **again),
        make_key(also=[LayerKind(AttnMaskSpec.causal(78), 9, 5)], **again),
    ]
    assert len({id(k) for k in (key, *others)}) == len(others) + 1
    assert make_key(num_layers=7, num_stages=2) is others[0]  # of one mask, their number says nothing
    named = make_key(layout="zigzag", also=window)
    assert named.q_placement.owners.tolist() == place_zigzag(78, 3).owners.tolist()
    assert_serves(named.with_mask(SPEC, window=9), AttnMaskSpec.sliding_window([30, 1, 47], 9))


def test_masks_planned_together():
    run_on_ranks(3, masks_planned_together)


def ready_made_for_layers() -> None:
    """A plan made elsewhere holds the masks of all layers; make_key need not name them again."""
    shape = {"num_heads_q": 2, "num_heads_kv": 1, "head_dim": 8, "chunk_size": 8}
    also = [LayerKind(window=9, num_layers=5)]
    ready = cpattn.make_plan(SPEC, cp_size=2, num_layers=2, also=also, **shape)
    direct = make_key(num_layers=2, also=also)
    clear_key_cache()
    for key in (make_key(plan=ready), make_key(plan=ready, num_layers=2, also=also)):
        assert key.plan is ready.plan
        local = key.with_mask(SPEC, window=9)
        assert local.plan is ready.layer_plans[1].plan
        assert local.plan.fingerprint == direct.with_mask(SPEC, window=9).plan.fingerprint
        assert_serves(local, AttnMaskSpec.sliding_window([30, 1, 47], 9))
    with pytest.raises(ValueError, match="plan was made without 1 of the masks in also"):
        make_key(plan=ready, also=[LayerKind(window=7)])
    with pytest.raises(ValueError, match="ranks_per_node is 'auto': a plan is made without a launcher"):
        cpattn.make_plan(SPEC, cp_size=2, ranks_per_node="auto", **shape)
    with pytest.raises(ValueError, match="plan was made for wire None and make_key is called with e4m3"):
        make_key(plan=ready, wire="e4m3")
    [(_, ahead)] = cpattn.plan_ahead(["a"], lambda _: SPEC, workers="thread", cp_size=2, also=also, **shape)
    assert make_key(plan=ahead).with_mask(SPEC, window=9).plan is ahead.layer_plans[1].plan


def test_a_plan_for_several_layers_is_handed_over():
    run_on_ranks(2, ready_made_for_layers)


def bound_ahead():
    shape = {"num_heads_q": 2, "num_heads_kv": 1, "head_dim": 8}
    plans = cpattn.plan_ahead([30, 41, 52], AttnMaskSpec.causal, workers="thread", cp_size=2, **shape)
    made: list[int] = []

    def make(total, ready):
        made.append(total)
        return cpattn.make_key(AttnMaskSpec.causal(total), cp_group=dist.group.WORLD, plan=ready, **shape)

    seen = []
    for total, key in cpattn.keys_ahead(plans, make, device="cpu", dtype=torch.float32):
        assert key.spec.total_seqlen == total
        assert list(key._bound) == [(torch.device("cpu"), torch.float32, False)]
        seen.append((total, tuple(made)))
    return seen


def test_keys_are_bound_before_their_turn():
    """One ahead by default; all of them, in order, on all ranks."""
    expected = [(30, (30, 41)), (41, (30, 41, 52)), (52, (30, 41, 52))]
    assert run_on_ranks(2, bound_ahead) == [expected, expected]
    with pytest.raises(ValueError, match="depth is 0"):
        cpattn.keys_ahead([], lambda item, ready: None, device="cpu", dtype=torch.float32, depth=0)


BAD_LAYERS: dict[str, dict[str, Any]] = {
    "also has 1024: expected cpattn.LayerKind": {"also": [1024]},
    "also has a mask over 77 x 77 tokens and the key's is over 78 x 78": {"also": [LayerKind(AttnMaskSpec.causal(77))]},
    "planned together are of self-attention": {"spec": AttnMaskSpec.cross([78], [9]), "also": [LayerKind()]},
    "num_layers is 0: it must be a finite number above 0": {"also": [LayerKind(num_layers=0)]},
    "num_layers is nan": {"num_layers": float("nan"), "also": [LayerKind()]},
    "window is 0: give an int of at least 1": {"also": [LayerKind(window=0)]},
    "schedule 'tiles' with several masks": {"schedule": "tiles", "also": [LayerKind(window=9)]},
}


@pytest.mark.parametrize("message", BAD_LAYERS)
def test_bad_layers_are_refused(message):
    with pytest.raises(ValueError, match=message):
        make_key(cp_group=None, **BAD_LAYERS[message])


def differing_layers() -> None:
    layers = 5 if dist.get_rank() else 4
    with pytest.raises(ValueError, match=r"make_key: layers differs between ranks: ranks \[1, 2\] of the group"):
        make_key(also=[LayerKind(window=9, num_layers=layers)])


def test_layers_that_differ_between_ranks():
    run_on_ranks(3, differing_layers, timeout=60)


@contextlib.contextmanager
def launched(**variables: int) -> Iterator[None]:
    """As if a launcher had set these variables and no others of its kind."""
    nodes._launch.cache_clear()
    clean = dict.fromkeys(("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE"), "")
    try:
        with mock.patch.dict(os.environ, {**clean, **{name: str(value) for name, value in variables.items()}}):
            yield
    finally:
        nodes._launch.cache_clear()


def nodes_of(local_world_size: int, world_size: int | None = None) -> contextlib.AbstractContextManager[None]:
    """As torchrun would launch this world on equal nodes."""
    rank, world_size = dist.get_rank(), dist.get_world_size() if world_size is None else world_size
    return launched(
        RANK=rank,
        WORLD_SIZE=world_size,
        LOCAL_RANK=rank % local_world_size,
        LOCAL_WORLD_SIZE=local_world_size,
        GROUP_WORLD_SIZE=world_size // local_world_size,
    )


def derived_nodes() -> None:
    tree, _ = AttnMaskSpec.prefix_tree([30, 1, 47], [[0, 1], [0, 2]])
    mesh = init_device_mesh("cpu", (4, 2), mesh_dim_names=("cp", "tp"))
    pairs = [fresh_group([0, 1]), fresh_group([0, 4]), fresh_group([0, 1, 4])]
    with nodes_of(4):
        key = make_key(tree)
        assert (key.plan.ranks_per_node, len(key.rank_plan.queries)) == (4, 2)
        assert make_key(tree, ranks_per_node=4) is key
        assert make_key(tree, ranks_per_node=None).plan.ranks_per_node == 8
        assert make_key(tree, ranks_per_node=1).plan.ranks_per_node == 1
        assert_serves(key, tree)
        assert make_key(tree, cp_group=mesh).plan.ranks_per_node == 2  # ranks 0, 2, 4, 6 and 1, 3, 5, 7
        if dist.get_rank() == 0:  # in one node; one in each; two and one
            kept = [nodes.resolve_ranks_per_node("auto", g, dist.get_world_size(g)) for g in pairs]
            assert kept == [None] * 3
    with nodes_of(4, world_size=16):  # the launcher speaks of another world
        assert make_key(tree).plan.ranks_per_node == 8
    with launched():
        assert make_key(tree).plan.ranks_per_node == 8
    local = 4 if dist.get_rank() < 4 else 2
    with nodes_of(local), pytest.raises(ValueError, match="make_key: ranks_per_node differs between ranks"):
        make_key(tree, num_stages=3)


def test_nodes_are_derived_from_the_launcher():
    run_on_ranks(8, derived_nodes, timeout=120)


@pytest.mark.parametrize(
    ("ranks", "local_world_size", "expected"),
    [
        (range(8), 4, 4),
        (range(4, 12), 4, 4),
        (range(2, 6), 4, 2),
        ([0, 1, 2, 3], 4, None),
        ([0, 4], 4, None),
        ([0, 1, 4], 4, None),
        ([0, 4, 5, 6], 4, None),
        ([0, 4, 1, 5], 4, None),
        ([0, 1, 4, 5, 2, 3], 4, None),
        ([0, 1, 4, 5, 8, 9], 4, 2),
    ],
)
def test_ranks_of_a_group_on_nodes(ranks, local_world_size, expected):
    launch = Launch(0, 16, 0, local_world_size, 16 // local_world_size)
    assert group_ranks_per_node(list(ranks), launch) == expected


def test_launchers_that_say_nothing_useful():
    """Missing or odd variables, and nodes of different size: no node is guessed."""
    whole = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "GROUP_WORLD_SIZE": "2"}
    launch = read_launch(whole)
    assert launch is not None
    assert launch.nodes_are_equal
    assert read_launch({**whole, "GROUP_WORLD_SIZE": ""}) == launch._replace(num_nodes=None)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        assert read_launch({k: v for k, v in whole.items() if k != name}) is None
        assert read_launch({**whole, name: "many"}) is None
    for change in ({"num_nodes": 3}, {"local_rank": 2}, {"world_size": 9}, {"local_world_size": 0}):
        odd = launch._replace(**change)
        assert not odd.nodes_are_equal
        assert group_ranks_per_node(range(8), odd) is None


@pytest.mark.parametrize("value", [3, 0, -2, 2.0, "two", True])
def test_bad_ranks_per_node(value):
    with pytest.raises(ValueError, match=f"ranks_per_node is {value!r} and cp_size is 4: nodes must be of equal size"):
        nodes.resolve_ranks_per_node(value, None, 4)


def window_option() -> None:
    """In positions of the documents: on a tree, a branch's window reaches into its ancestors."""
    assert_serves(make_key(window=9), AttnMaskSpec.sliding_window([30, 1, 47], 9))
    both = make_key(AttnMaskSpec.varlen([30, 48], causal=False), window=(5, 2))
    assert_serves(both, AttnMaskSpec.sliding_window([30, 48], (5, 2)))
    tree, _ = AttnMaskSpec.prefix_tree([10, 5, 7], [[0, 1], [0, 2]])
    visible = tree.to_dense()
    positions = torch.tensor([*range(10), *range(10, 15), *range(10, 17)])
    visible &= (positions[:, None] - positions[None, :] < 4).numpy()
    assert_serves(make_key(tree, window=4), AttnMaskSpec.from_dense(visible))


def test_window_option():
    run_on_ranks(3, window_option)


def other_heads() -> None:
    """with_heads: the same rows for a layer of other heads."""
    key = make_key()
    other = key.with_heads(4, 2, 16, 8)
    assert key.with_heads(4, 2, 16, 8) is other
    assert key.with_heads(2, 1, 8) is key
    inputs = make_inputs(SPEC, heads=(4, 2), head_dim=16, head_dim_v=8, dtype=torch.float64)
    for mine, exact in zip(run_with_key(other, inputs), oracle(SPEC, inputs), strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-11, atol=1e-11)


def test_with_heads():
    run_on_ranks(2, other_heads)


def backward_without_the_key() -> None:
    """The graph keeps the key alive, though the caller and the cache have let it go."""
    inputs = inputs_for(SPEC)
    key = make_key()
    local = [cpattn.dispatch(t, key).requires_grad_() for t in inputs]
    expected = torch.autograd.grad(cpattn.attention(*local[:3], key), local[:3], local[3])
    out = cpattn.attention(*local[:3], key)
    reference = weakref.ref(key)
    del key
    clear_key_cache()
    gc.collect()
    for mine, truth in zip(torch.autograd.grad(out, local[:3], local[3]), expected, strict=True):
        assert torch.equal(mine, truth)
    del out
    gc.collect()
    assert reference() is None, "the key outlives its graph"


def test_a_copied_model_keeps_its_key_and_a_key_is_not_pickled():
    key = cpattn.make_key(AttnMaskSpec.causal(8), num_heads_q=1, num_heads_kv=1, head_dim=8)
    assert copy.deepcopy({"key": key})["key"] is copy.copy(key) is key
    with pytest.raises(TypeError, match=r"cannot be pickled.*Send what make_plan returns"):
        pickle.dumps(key)


def test_backward_needs_no_reference_to_the_key():
    run_on_ranks(2, backward_without_the_key)


def description() -> str:
    return make_key(AttnMaskSpec.varlen([300, 20, 500]), num_stages=2).describe(torch.float32, "cpu")


@pytest.mark.parametrize("cp_size", [1, 4])
def test_describe(cp_size):
    """Balance, bytes, stages and backend, the same on every rank; memory is each rank's own."""
    texts = run_on_ranks(cp_size, description)
    common = {tuple(line for line in text.splitlines() if not line.startswith("memory")) for text in texts}
    assert len(common) == 1
    for words in (
        "820 x 820 tokens",
        f"ranks: {cp_size}",
        "max/mean",
        "bytes",
        "stages: ",
        "sdpa",
        "float32",
    ):
        assert words in texts[0]


def described_wires() -> list[str]:
    return [make_key(AttnMaskSpec.causal(400), wire=wire).describe(torch.bfloat16, "cpu") for wire in (None, "e4m3")]


def test_describe_knows_the_wire():
    """A row of 8-bit keys and values: a byte for each element and one for the scale, as the codec has it."""
    texts = run_on_ranks(2, described_wires)[0]

    def numbers(beginning: str) -> list[int]:
        lines = [next(line for line in text.splitlines() if line.startswith(beginning)) for text in texts]
        return [int(line.removeprefix(beginning).split()[0].replace(",", "")) for line in lines]

    forward, both = numbers("keys and values received, forward: "), numbers("received, forward and backward: ")
    rows = forward[0] // (2 * 16)
    encoded = Fp8Rows("e4m3").encode([torch.zeros(rows, 1, 8)] * 2)
    assert forward[1] == sum(t.nbytes for t in encoded) == rows * 18
    # Twice over both passes; gradients come home in fp32 either way.
    assert both == [rows * (2 * 32 + 4 * 16), rows * (2 * 18 + 4 * 16)]
    heads = Heads(4, 2, 16, 8, wire_8bit=True)
    q, dout = Fp8Rows("e4m3").encode([torch.zeros(1, 4, 16), torch.zeros(1, 4, 8)])
    row = heads.row_bytes()
    assert (row.q, row.q_again) == (q.nbytes, q.nbytes + dout.nbytes + 2 * 4 * 4)
    plain = Heads(4, 2, 16, 8).row_bytes()
    assert (row.partial, row.dq, row.dkv) == (plain.partial, plain.dq, plain.dkv)


def default_device() -> None:
    """Under a default device (torch.device as a context) the key's own tensors stay where they belong."""
    clear_key_cache()
    with torch.device("meta"):
        key = make_key()
    assert_serves(key, SPEC)


def test_default_device():
    run_on_ranks(2, default_device)
