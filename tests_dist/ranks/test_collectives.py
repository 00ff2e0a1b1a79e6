"""Collectives layer: GroupCast and GroupReduce on gloo ranks, over random routes that all ranks know.

Small integers in floats: sums are exact, so equality is exact.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cpattn.collectives import RowRoutes, exchange, group_cast, group_reduce, merge_partials
from cpattn.collectives.heads import HeadExchange, heads_to_rows
from tests_dist.support.harness import fresh_group, run_on_ranks


class World(NamedTuple):
    """What all ranks know: rows per rank, and which rows each rank sends to each other, in order."""

    counts: list[int]
    sends: list[list[list[int]]]  # [sender][receiver]

    def routes(self, rank: int) -> RowRoutes:
        """One rank's part."""
        mine = self.sends[rank]
        return RowRoutes(
            torch.tensor([row for rows in mine for row in rows], dtype=torch.int64),
            tuple(len(rows) for rows in mine),
            tuple(len(self.sends[sender][rank]) for sender in range(len(mine))),
            active=any(rows for to in self.sends for rows in to),
        )

    def received(self, values: list[Tensor], rank: int) -> Tensor:
        """What `rank` must get when rank r holds values[r]."""
        parts = [values[sender][rows[rank]] for sender, rows in enumerate(self.sends)]
        return torch.cat(parts)


def make_world(seed: int, size: int, most: int = 9) -> World:
    """Random routes; rank 0 has no rows if the seed is even, and the last rank sends nothing."""
    generator = torch.Generator().manual_seed(seed)

    def chosen(count: int) -> list[int]:
        order = torch.randperm(count, generator=generator).tolist()
        return order[: int(torch.randint(0, count + 1, (), generator=generator))]

    counts = torch.randint(1, most, (size,), generator=generator).tolist()
    if seed % 2 == 0:
        counts[0] = 0
    sends = [
        [chosen(counts[a]) if a != b and a < max(size - 1, 1) else [] for b in range(size)]
        for a in range(size)
    ]
    return World(counts, sends)


def values_of(world: World, seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Every rank's rows: small integers."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(-9, 10, (n, *shape), generator=generator).to(dtype) for n in world.counts]


def sums_of(world: World, parts: list[Tensor], into: list[Tensor]) -> list[Tensor]:
    """What the rows become when rank r reduces parts[r] (in its received order) into the senders' rows."""
    totals = [t.double() for t in into]
    for receiver, part in enumerate(parts):
        start = 0
        for sender, rows in enumerate(world.sends):
            for row in rows[receiver]:
                totals[sender][row] += part[start].double()
                start += 1
    return totals


def cast_and_reduce(seed: int) -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    world = make_world(seed, size)
    routes = world.routes(rank)
    dtypes = (
        torch.float32,
        torch.bfloat16,
        torch.int64,
        torch.bool,
        torch.uint8,
        torch.float16,
        torch.float64,
    )
    shapes = ((2, 3), (5,), (), (1, 1), (3,), (7, 1), (2, 2))
    everyone = [
        values_of(world, seed + i, *s, dtype=d) for i, (s, d) in enumerate(zip(shapes, dtypes, strict=True))
    ]
    expected = [world.received(values, rank) for values in everyone]
    mine = [values[rank] for values in everyone]
    group = dist.group.WORLD
    got = group_cast(mine, routes, group).wait()  # all at once, side by side
    for value, truth in zip(got, expected, strict=True):
        assert value.dtype == truth.dtype
        assert torch.equal(value, truth)
    for value, truth in zip(mine, expected, strict=True):  # and each alone
        (alone,) = group_cast((value,), routes, group).wait()
        assert torch.equal(alone, truth)

    received = [len(world.received(everyone[0], r)) for r in range(size)]
    parts = values_of(World(received, []), seed + 50, 2, 3)
    into = mine[0].clone()
    group_reduce((parts[rank],), (into,), routes, group)
    assert torch.equal(into.double(), sums_of(world, parts, everyone[0])[rank])

    halves = [part.bfloat16() for part in parts]  # sums in the dtype of the rows they go to
    two = (mine[0].clone(), values_of(world, 7, 4, dtype=torch.float64)[rank])
    extra = [torch.full((len(part), 4), 2.0) for part in parts]
    pending = group_reduce((halves[rank], extra[rank]), two, routes, group, async_op=True)
    assert torch.equal(two[0], mine[0]), "into is untouched until wait()"
    pending.wait()
    assert torch.equal(two[0].double(), sums_of(world, parts, everyone[0])[rank])
    assert torch.equal(two[1], sums_of(world, extra, values_of(world, 7, 4, dtype=torch.float64))[rank])


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_rows_arrive_once_and_sums_go_home(size):
    """Seven dtypes in one exchange, scalars per row, ranks without rows, a rank that sends nothing."""
    for seed in range(4):
        run_on_ranks(size, cast_and_reduce, seed=seed)


def calls_of_a_cast() -> int:
    """Exchanges of one cast among the first two ranks."""
    world = World([1, 1, 1], [[[], [0], []], [[0], [], []], [[], [], []]])
    with mock.patch.object(dist, "all_to_all_single", wraps=dist.all_to_all_single) as exchange:
        group_cast((torch.ones(1, 2),), world.routes(dist.get_rank()), dist.group.WORLD).wait()
    return exchange.call_count


def test_ranks_without_rows_take_part():
    """gloo would let them stay away; NCCL waits for them."""
    assert run_on_ranks(3, calls_of_a_cast) == [1, 1, 1]


def reduce_by_lse(seed: int) -> None:
    """Each rank attends to its own keys, for its own rows and those it received; home they are merged."""
    rank, size = dist.get_rank(), dist.get_world_size()
    world = make_world(seed, size)
    routes = world.routes(rank)
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randn(n, 2, 5, generator=generator, dtype=torch.float64) for n in world.counts]
    keys = [torch.randn(4, 5, generator=generator, dtype=torch.float64) for _ in range(size)]
    keys[-1] = keys[-1][:0]  # the last rank has no keys: its partials are 0 and -inf

    def attend(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        scores = q @ k.T
        lse = torch.logsumexp(scores, -1)
        return torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0)[..., None]) @ k, lse

    out, lse = attend(rows[rank], keys[rank])
    guests = attend(world.received(rows, rank), keys[rank])
    group_reduce(guests, (out, lse), routes, dist.group.WORLD, op="lse")
    for row in range(world.counts[rank]):
        helpers = [rank, *(r for r in range(size) if row in world.sends[rank][r])]
        exact_out, exact_lse = attend(rows[rank][row], torch.cat([keys[r] for r in helpers]))
        torch.testing.assert_close(out[row], exact_out, rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(lse[row], exact_lse, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_lse_reduce_is_attention_over_all_keys(size):
    for seed in range(4):
        run_on_ranks(size, reduce_by_lse, seed=seed)


def two_level_cast_and_reduce(seed: int) -> None:
    """Two nodes of two ranks: a row crosses once, to the rank in its owner's place, which passes it on."""
    rank, size, per_node = dist.get_rank(), dist.get_world_size(), 2
    direct = make_world(seed, size)
    landing = [[[] for _ in range(size)] for _ in range(size)]
    for sender in range(size):
        for node in range(size // per_node):
            needed = {
                row
                for to in range(node * per_node, (node + 1) * per_node)
                for row in direct.sends[sender][to]
            }
            if node != sender // per_node:
                landing[sender][node * per_node + sender % per_node] = sorted(needed)
    across = World(direct.counts, landing)
    # Rows of the second hop: the local rows, then what landed, sender by sender.
    where = [
        {(sender, row): direct.counts[at] + i for i, (sender, row) in enumerate(
            (sender, row) for sender in range(size) for row in landing[sender][at])}
        for at in range(size)
    ]  # fmt: skip
    origin = [[[] for _ in range(size)] for _ in range(size)]
    within = [[[] for _ in range(size)] for _ in range(size)]
    for sender in range(size):
        for to in range(size):
            near = sender // per_node == to // per_node
            via = sender if near else to // per_node * per_node + sender % per_node
            for row in direct.sends[sender][to]:
                within[via][to].append(row if near else where[via][sender, row])
                origin[via][to].append((sender, row))
    landed = [sum(len(landing[s][at]) for s in range(size)) for at in range(size)]
    second = World([n + m for n, m in zip(direct.counts, landed, strict=True)], within)
    hops = (across.routes(rank), second.routes(rank).relaying(direct.counts[rank]))
    everyone = values_of(direct, seed, 3)
    sources = [pair for via in range(size) for pair in origin[via][rank]]
    expected = torch.stack([everyone[s][r] for s, r in sources]) if sources else torch.zeros(0, 3)
    for eager in (False, True):
        pending = group_cast((everyone[rank], everyone[rank].long()), hops, dist.group.WORLD)
        if eager:
            pending.advance()
        got, _ = pending.wait()
        assert torch.equal(got, expected)
    total = everyone[rank].clone()
    for to in range(size):
        for row in direct.sends[rank][to]:
            total[row] += 100 * to + row
    came = 100.0 * rank + torch.tensor([[float(row)] * 3 for _, row in sources]).reshape(-1, 3)
    for queued in (False, True):
        into, entered = everyone[rank].clone(), []
        with _queued(entered) if queued else nullcontext([]) as gone:
            assert torch.equal(group_cast((everyone[rank],), hops, dist.group.WORLD).wait()[0], expected)
            gone.clear()
            pending = group_reduce((came,), (into,), hops, dist.group.WORLD, async_op=True)
            assert pending.more_hops != queued
            pending.advance()
            assert torch.equal(into, everyone[rank]), "work that is added meanwhile must not meet it"
            assert gone == [], "what later hops use must live until the exchange is waited for"
            pending.wait()
        assert not queued or gone
        assert torch.equal(into, total)
        assert len(entered) == 2 * queued


@contextmanager
def _queued(entered: list[torch.device]) -> Iterator[list[str]]:
    """Later hops begin at once, as on CUDA; gives what exchanges have let go since.

    Of a stream there is nothing here but when it is entered: not yet run on hardware.
    """

    @contextmanager
    def beside(device: torch.device) -> Iterator[None]:
        entered.append(device)
        yield

    gone: list[str] = []
    step = exchange.PendingRows._step

    def watched(self: exchange.PendingRows) -> None:
        for used in (self._sending, self._then):
            if used is not None:
                weakref.finalize(used, gone.append, used.__class__.__name__)
        step(self)

    with (
        mock.patch.object(exchange, "_queues", return_value=True),
        mock.patch.object(exchange, "_beside", beside),
        mock.patch.object(exchange.PendingRows, "_step", watched),
    ):
        yield gone


def test_two_hops_deliver_what_one_does():
    for seed in range(4):
        run_on_ranks(4, two_level_cast_and_reduce, seed=seed)


def relay_few_of_many_rows() -> None:
    """Two nodes of two ranks, 1000 rows each: five of every rank cross, and are passed on with three of the next."""
    rank, size, local = dist.get_rank(), dist.get_world_size(), 1000
    opposite, neighbour = (rank + 2) % size, rank ^ 1
    generator = torch.Generator().manual_seed(5)
    chosen = [torch.randperm(local, generator=generator)[:5] for _ in range(size)]
    own = [torch.randperm(local, generator=generator)[:3] for _ in range(size)]
    to_opposite, to_neighbour = ([0] * size for _ in range(2))
    to_opposite[opposite], to_neighbour[neighbour] = 5, 8
    # The rows of either kind take turns.
    mixed = torch.cat([own[rank], local + torch.arange(5)])[torch.tensor([3, 0, 4, 5, 1, 6, 7, 2])]
    first = RowRoutes(chosen[rank], tuple(to_opposite), tuple(to_opposite), active=True)
    second = RowRoutes(mixed, tuple(to_neighbour), tuple(to_neighbour), active=True)
    values = [torch.randn(local, 2, 8, generator=generator) for _ in range(size)]
    via = neighbour
    passed_on = values[(via + 2) % size][chosen[(via + 2) % size]]
    both = torch.cat([values[via][own[via]], passed_on])[torch.tensor([3, 0, 4, 5, 1, 6, 7, 2])]
    mine = values[rank]
    with _Made() as made:
        got, wide = group_cast((mine, mine[..., 0]), (first, second.relaying(local)), dist.group.WORLD).wait()
    assert torch.equal(got, both)
    assert torch.equal(wide, both[..., 0])
    assert 0 < max(made.rows) < 20
    into = torch.zeros_like(mine)
    with _Made() as made:
        group_reduce((got,), (into,), (first, second.relaying(local)), dist.group.WORLD)
    assert 0 < max(made.rows) < 20
    expected = torch.zeros_like(mine)
    expected[own[rank]] += mine[own[rank]]
    expected[chosen[rank]] += mine[chosen[rank]]
    assert torch.equal(into, expected)
    with pytest.raises(ValueError, match=r"make them with relaying\(num_local\)"):
        group_cast((mine,), (replace(first, active=False), replace(second, active=False)), dist.group.WORLD).wait()


class _Made(TorchDispatchMode):
    """Rows of the tensors that are made while it is on, but for views."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        made = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        self.rows += [t.shape[0] for t in made if t.dim() and t.untyped_storage().data_ptr() not in known]
        return result


def test_a_hop_makes_nothing_as_long_as_the_local_rows():
    run_on_ranks(4, relay_few_of_many_rows)


def exchanges_in_flight() -> None:
    """Several exchanges at once, waited for in another order; the senders' tensors change meanwhile."""
    rank, size = dist.get_rank(), dist.get_world_size()
    worlds = [make_world(seed, size) for seed in (1, 3, 5)]
    values = [values_of(world, 2, 3) for world in worlds]
    casts = []
    for world, everyone in zip(worlds, values, strict=True):
        mine = everyone[rank].clone()
        casts.append(group_cast((mine, mine), world.routes(rank), dist.group.WORLD))
        mine.fill_(99)
    for world, everyone, cast in reversed(list(zip(worlds, values, casts, strict=True))):
        for received in cast.wait():
            assert torch.equal(received, world.received(everyone, rank))


def test_several_exchanges_in_flight():
    run_on_ranks(3, exchanges_in_flight)


def takes_any_strides() -> None:
    world = make_world(1, dist.get_world_size())
    rank = dist.get_rank()
    everyone = values_of(world, 1, 4, 3)
    layouts = {
        "transposed": [t.transpose(1, 2).contiguous().transpose(1, 2) for t in everyone],
        "slices of wider rows": [torch.cat([t, t], -1)[..., :3] for t in everyone],
        "expanded": [t[:, :1].expand(-1, 4, -1) for t in everyone],
    }
    for name, tensors in layouts.items():
        got = group_cast((tensors[rank], everyone[rank]), world.routes(rank), dist.group.WORLD).wait()
        assert torch.equal(got[0], world.received(tensors, rank)), name
        assert torch.equal(got[1], world.received(everyone, rank)), name
        received = world.received(tensors, rank)
        backwards = received.transpose(1, 2).contiguous().transpose(1, 2)
        into = torch.zeros_like(everyone[rank])
        group_reduce((backwards,), (into,), world.routes(rank), dist.group.WORLD)
        parts = [world.received(tensors, r) for r in range(dist.get_world_size())]
        assert torch.equal(
            into.double(), sums_of(world, parts, [torch.zeros_like(t) for t in everyone])[rank]
        ), name


def test_any_strides():
    run_on_ranks(3, takes_any_strides)


def runs_no_collective() -> None:
    """Routes without rows: the group is not touched, so rank 1 may stay away."""
    size = dist.get_world_size()
    routes = RowRoutes(torch.zeros(0, dtype=torch.int64), (0,) * size, (0,) * size, active=False)
    if dist.get_rank() == 0:
        (got,) = group_cast((torch.ones(3, 2),), routes, dist.group.WORLD).wait()
        assert got.shape == (0, 2)
        into = torch.ones(3, 2)
        group_reduce((got,), (into,), routes, dist.group.WORLD)
        assert torch.equal(into, torch.ones(3, 2))


def test_routes_without_rows_run_no_collective():
    run_on_ranks(2, runs_no_collective, timeout=20)


def in_a_subgroup() -> None:
    """Ranks 1 and 3 of four: splits are by rank of the group."""
    group = fresh_group([3, 1])
    if dist.get_rank() in (1, 3):
        rank = dist.get_rank(group)
        world = make_world(3, 2)
        everyone = values_of(world, 1, 2)
        got = group_cast((everyone[rank],), world.routes(rank), group).wait()
        assert torch.equal(got[0], world.received(everyone, rank))


def test_in_a_subgroup():
    run_on_ranks(4, in_a_subgroup)


def repeats_bit_for_bit() -> Tensor:
    """Sums of numbers of very different sizes: another order gives other bits."""
    rank, size = dist.get_rank(), dist.get_world_size()
    sends = [[list(range(50)) if a != b else [] for b in range(size)] for a in range(size)]
    world = World([50] * size, sends)
    generator = torch.Generator().manual_seed(rank)
    parts = torch.randn(50 * (size - 1), 8, generator=generator) * 10.0 ** (4 * rank)
    into = torch.zeros(50, 8)
    group_reduce((parts,), (into,), world.routes(rank), dist.group.WORLD)
    return into


def test_the_order_of_reduction_is_fixed():
    first = run_on_ranks(4, repeats_bit_for_bit)
    for _ in range(3):
        assert all(
            torch.equal(a, b) for a, b in zip(first, run_on_ranks(4, repeats_bit_for_bit), strict=True)
        )


def sums_of_shared_heads() -> Tensor:
    """Three parts of one block, each with the heads (0, 1): 256, 1 and 1 for a row and head of each part."""
    heads = ((0, 1),) * 3
    exchange = HeadExchange((0, 1, 2), dist.get_rank(), (2, 0, 1), heads, num_heads=2, active=True)
    x = torch.full((3, 2, 4), 256.0 if dist.get_rank() == 0 else 1.0, dtype=torch.bfloat16)
    (total,) = heads_to_rows(x, exchange, dist.group.WORLD).wait()
    assert total.dtype == torch.bfloat16
    return total


def test_shared_heads_are_summed_in_fp32():
    """In bf16 numbers from 256 on are even: 256 + 1 + 1 would stay 256."""
    for rows, total in zip((2, 0, 1), run_on_ranks(3, sums_of_shared_heads), strict=True):
        assert torch.equal(total.float(), torch.full((rows, 2, 4), 258.0))


def test_merge_of_partials():
    """Against attention over both key sets; also where one side, the other, or both saw nothing."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(4, 2, 6, generator=generator, dtype=torch.float64) * 8
    scores[0, 0, :3] = scores[1, 0, 3:] = scores[2, 1] = -torch.inf
    values = torch.randn(6, 5, generator=generator, dtype=torch.float64)

    def attend(keys: slice) -> tuple[Tensor, Tensor]:
        lse = torch.logsumexp(scores[..., keys], -1)
        finite = lse.masked_fill(lse == -torch.inf, 0)
        return torch.exp(scores[..., keys] - finite[..., None]) @ values[keys], lse

    out, lse = attend(slice(0, 3))
    merge_partials(out, lse, *attend(slice(3, 6)))
    exact_out, exact_lse = attend(slice(0, 6))
    torch.testing.assert_close(out, exact_out, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(lse, exact_lse, rtol=1e-14, atol=1e-14)


def test_merge_keeps_a_nan_visible():
    """A NaN that entered one partial must come out, not become a zero that trains on in silence."""
    bad = (torch.full((1, 1, 2), torch.nan), torch.full((1, 1), torch.nan))
    for flip in (False, True):
        good = (torch.ones(1, 1, 2), torch.zeros(1, 1))
        blind = (torch.zeros(1, 1, 2), torch.full((1, 1), -torch.inf))
        for other in (good, blind):
            into, more = (other, bad) if flip else ([t.clone() for t in bad], other)
            merge_partials(*into, *more)
            assert into[0].isnan().all()
            assert into[1].isnan().all()


def test_merge_refuses_other_shapes():
    out, lse = torch.zeros(3, 2, 4), torch.zeros(3, 2)
    with pytest.raises(
        ValueError, match=r"partials of shapes \(3, 2, 4\), \(3, 2\) and \(2, 2, 4\), \(2, 2\): both"
    ):
        merge_partials(out, lse, out[:2], lse[:2])
