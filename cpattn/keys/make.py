"""`make_key`: plan a mask for a group of ranks and bind this rank's share to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from cpattn.masks.reading import read_flag, read_int
from cpattn.masks.spec import AttnMaskSpec
from cpattn.planning.head_degree import choose_head_degree, most_heads
from cpattn.planning.options import LayerKind, PlanOptions, check_spec, read_heads, read_relays, window_on_mask
from cpattn.planning.ready import PlannedMask, ReadyPlan, plan_layers, with_layers
from cpattn.solver import Hardware, Heads, Layout, ScheduleKind, require_divisible, split_heads

from .cache import cached
from .group import CpRanks, find_ranks
from .key import AttnKey, bind_key
from .nodes import RanksPerNode, resolve_ranks_per_node
from .options import KeyOptions, PlannedKey, RunOptions
from .transports import TransportChoice, read_hardware


def make_key(
    spec: AttnMaskSpec,
    *,
    num_heads_q: int,
    num_heads_kv: int,
    head_dim: int,
    head_dim_v: int | None = None,
    cp_group: Any = None,
    chunk_size: int = 512,
    layout: Layout = "balanced",
    schedule: ScheduleKind = "auto",
    backend: str = "auto",
    num_stages: int | None = None,
    ranks_per_node: RanksPerNode = "auto",
    window: int | Sequence[int | None] | None = None,
    num_layers: float = 1.0,
    also: Sequence[LayerKind] = (),
    search_effort: int = 0,
    wire: str | None = None,
    grad_wire: str | None = None,
    latent_dim: int | None = None,
    keep_kv: bool = False,
    head_degree: int | Literal["auto"] = 1,
    hardware: Hardware | str | Path | None = None,
    transport: TransportChoice = "auto",
    plan: ReadyPlan | None = None,
    identify: bool = True,
    equal_shards: bool = False,
    relays: bool | None = None,
) -> AttnKey:
    """Plan attention under a mask for a context-parallel group.

    On the first call for a mask the ranks compare what they planned, with one small all-gather;
    call it on all ranks of the group. The same arguments give the same key from a bounded cache.

    Args:
        spec: the mask. It is read now; changing it later does not change the key.
        num_heads_q, num_heads_kv: heads of q and of k and v; the first a multiple of the second.
        head_dim, head_dim_v: dims of q and k, and of v (None: the same).
        cp_group: ProcessGroup, DeviceMesh (1-D, or with an axis named "cp"), or None or "self" for one rank. None is
            refused where torchrun has started several ranks that have not met: dist.group.WORLD is None then.
        chunk_size: tokens by which ranks' token counts may differ, and the grain of placement.
        layout: "balanced" (even work and tokens, least traffic), "contiguous" or "zigzag".
        schedule: "keys": only keys and values travel. "tiles": each rank computes a tile of queries
            x keys, and queries travel too. "auto": tiles where they are predicted to be faster.
        backend: local kernel by name; "auto": by a table of preferences; "fastest": what accepts is run on this key's
            slices and checked, and the fastest that is right on all ranks is taken, at the first call or in
            `key.prepare` (docs/backends.md).
        num_stages: parts in which remote keys are fetched, to overlap with compute; None chooses.
        ranks_per_node: consecutive ranks of the group that share a node, if links between nodes are
            slower than within: a row then crosses between nodes once per node. "auto": what torchrun (or
            whatever sets its variables) says, where every node has as many of the group's ranks. None: one level.
        window: limit on top of the mask, in positions of the documents: an int W lets a query see
            keys fewer than W positions back (what lies ahead stays as the mask has it); a pair
            (left, right) limits both sides, None on a side not at all.
        num_layers: layers that have this mask, or any number in proportion to those in `also`.
        also: masks of the model's other layers, `LayerKind(spec, window, num_layers)` each: tokens are placed
            for all layers together, and `key.with_mask` gives the key of each mask. With schedule "auto" the
            queries of one of the masks may travel; "tiles" is refused. Six full layers and 26 with a window:
            num_layers=6, also=[LayerKind(None, 1024, 26)].
        search_effort: placement search in units of about 100 ms; 0: as long as a step may gain by it, one at most.
        wire: "e4m3" or "e5m2": k and v, and q and the gradient of out where they move, travel as
            8-bit floats with a scale for each row and head; half the bytes of bf16, and its error
            (docs/te_ops.md has figures; prefer e4m3). None: as they are.
        grad_wire: "bf16": the gradients of k and v that a rank computes for another go there in bf16, half the bytes of
            fp32, and are summed in fp32 there; each is rounded once (docs/gradients.md has figures). Planning goes by
            fp32 all the same. None: in fp32 (fp64 for fp64).
        latent_dim: for `cpattn.fetch`: elements of the row that you will fetch in the place of a row of k and v (MLA's
            latent); the plan then counts its bytes. None: k and v travel.
        keep_kv: keep the keys and values that forward fetched until backward, which then fetches none: fewer
            exchanges for the memory of `key.memory().kept`. Gradients are the same bits. Queries that move
            (schedule "tiles") travel again, with the gradient of out.
        head_degree: U, a divisor of the group's size and at most num_heads_q. Blocks of U consecutive
            ranks exchange rows for heads before attention and back after it, so that each computes some of
            the heads over the block's rows, and the plan is one for size / U context ranks
            (docs/planning.md). Any head counts; 1: no head sharding. "auto": the divisor with the shortest
            predicted step (`key.describe()` lists them), at the cost of a plan for each that may be it; with
            `plan`, what it was made for.
        hardware: speeds by which schedule, num_stages, head_degree and transport are chosen: a preset's name
            ("h100"), the file that `cpattn calibrate --out` wrote, or a `cpattn.solver.Hardware`; the same on
            all ranks. None: "cpu" for a group of gloo, else "h100".
        transport: "all_to_all": one collective for each exchange. "p2p": sends and receives between the ranks
            that have rows for each other. The same results bit for bit. "auto": the faster by the measurements
            of `hardware`, all_to_all where it has none.
        plan: what `make_plan` or `plan_ahead` made for this mask, these heads and this number of ranks;
            nothing is planned then, and the plan's own chunk_size, layout, schedule, num_stages, num_layers,
            ranks_per_node, search_effort and relays hold, whatever is given here. `also` need not be repeated. All
            ranks pass theirs.
        identify: ranks tell each other before each pass of attention what they call, and raise if they are out of
            step; False saves that message, and ranks out of step then compute wrong numbers, hang or die.
        equal_shards: every rank owns as many tokens, under every mask of a length: for pipelines whose stages stack
            microbatches, and for frameworks that take shards to be equal. A length that the ranks do not divide is
            refused; areas stay even and traffic grows a little. A plan given as `plan` must have been made so.
        relays: True: ranks pass on rows that others need as well, so that no rank sends much more than the busiest one
            receives; gradients are summed on the way back (docs/decisions/0010-rows-travel-on.md). False: owners
            send rows to all who need them. None: the first where it is estimated to be faster.

    Raises:
        ValueError: a value is out of range, this rank is not in the group, the plan was damaged, the named backend
            cannot run in this process, or ranks differ.
        LostRankError: a rank of the group did not come.
    """
    check_spec("spec", spec)
    heads = read_heads(num_heads_q, num_heads_kv, head_dim, head_dim_v, wire, latent_dim)
    running = RunOptions(
        backend, wire, read_flag("keep_kv", keep_kv), transport, read_flag("identify", identify), grad_wire
    )
    ranks = find_ranks(cp_group)
    degree = _read_degree(head_degree, plan, ranks.size, heads)
    machine, per_node = read_hardware(hardware, ranks.group), _read_nodes(ranks_per_node, ranks, degree)
    planning = PlanOptions(
        chunk_size, layout, schedule, num_stages, per_node, search_effort, machine,
        read_flag("equal_shards", equal_shards), read_relays(relays),
    )  # fmt: skip
    options = KeyOptions(planning, running, window_on_mask(window, spec), degree)
    masks = with_layers(spec, options.window, num_layers, also)
    order = _Order(masks, heads, options, ranks, plan, head_degree == "auto").checked()
    return cached(ranks.group, order.identity(), lambda: bind_key(order.planned(), ranks))


class _Order(NamedTuple):
    """A key as it was asked for, all of it read.

    ready: a plan to take. auto_degree: the head degree is yet to be chosen, unless there is a plan.
    """

    masks: tuple[tuple[PlannedMask, AttnMaskSpec], ...]
    heads: Heads
    options: KeyOptions
    ranks: CpRanks
    ready: ReadyPlan | None
    auto_degree: bool

    def checked(self) -> _Order:
        """The order, with the options of the plan that it takes, if it takes one.

        Raises:
            ValueError: the plan is for something else.
        """
        equal = self.options.planning.equal_shards
        for total in (self.masks[0][1].total_seqlen, self.masks[0][1].seqlen_k) if equal else ():
            require_divisible(total, self.ranks.size)
        if self.ready is None:
            return self
        if equal and not self.ready.options.equal_shards:
            raise ValueError("equal_shards is set and plan was made without it: give make_plan equal_shards=True")
        degree, wire = self.options.head_degree, self.options.running.wire
        self.ready.require_fit(
            [layers for layers, _ in self.masks], self.heads, self.ranks.size, wire, head_degree=degree
        )
        for _, planned in self.ready.layer_plans:
            planned.require_whole()
        planning = replace(self.ready.options.for_ranks(degree), hardware=self.options.planning.hardware)
        return self._replace(options=replace(self.options, planning=planning))

    def identity(self) -> Any:
        """Hashable: equal orders get the same key."""
        kinds = self.masks if self.ready is None else self.ready.layer_plans
        return tuple(kind for kind, _ in kinds), self.heads, self.options, self.auto_degree

    def planned(self) -> PlannedKey:
        """The plan of the order; nothing is communicated."""
        options = self.options
        seconds: tuple[tuple[int, float], ...] = ()
        if self.ready is not None:
            plans = self.ready.layer_plans
        elif self.auto_degree:
            degree, plans, seconds = choose_head_degree(
                self.masks, self.heads, options.planning, cp_size=self.ranks.size
            )
            options = replace(options, head_degree=degree)
        else:
            degree = options.head_degree
            inner, contexts = most_heads(self.heads, degree), self.ranks.size // degree
            plans = plan_layers(self.masks, inner, options.planning.for_contexts(degree), cp_size=contexts)
        return PlannedKey(self.masks[0][1], options, self.heads, plans[0].plan, plans, seconds)


def _read_nodes(asked: RanksPerNode, ranks: CpRanks, degree: int) -> int | None:
    """Ranks that share a node, where blocks of `degree` ranks do not lie in one node here and in two there."""
    per_node = resolve_ranks_per_node(asked, ranks.group, ranks.size)
    astray = asked == "auto" and per_node and per_node % degree and degree % per_node
    return None if astray else per_node


def _read_degree(
    asked: int | Literal["auto"], plan: ReadyPlan | None, cp_size: int, heads: Heads
) -> int:
    """head_degree as a number; 1 for an "auto" that is yet to be chosen."""
    if plan is not None and not isinstance(plan, ReadyPlan):
        raise ValueError(f"plan is {plan!r}: give what make_plan or plan_ahead returned")
    if isinstance(asked, str):
        if asked != "auto":
            raise ValueError(f"head_degree is {asked!r}: give an int of at least 1, or 'auto'")
        degree = 1 if plan is None else max(cp_size // plan.plan.cp_size, 1)
    else:
        degree = asked
    degree = read_int("head_degree", degree)
    if cp_size % degree:
        raise ValueError(f"head_degree is {degree} and the group has {cp_size} ranks: it must divide them")
    if degree > 1:
        split_heads(heads.num_q, heads.num_kv, degree)  # or it says why not
    return degree
