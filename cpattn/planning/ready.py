"""Plans that are made before a key is: for one mask, or for several over one placement. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from cpattn.masks.reading import Window, read_flag, read_int
from cpattn.masks.spec import AttnMaskSpec, lower_mask
from cpattn.solver import (
    DEFAULT_HARDWARE,
    Hardware,
    Heads,
    Layout,
    Plan,
    ScheduleKind,
    make_dispatch_plan,
    make_joint_plans,
)

from .hardware import find_hardware
from .options import LayerKind, PlanOptions, check_spec, read_heads, read_relays, window_on_mask


class PlannedMask(NamedTuple):
    """A mask by what tells it from others: the fingerprint of its spec, and a window; and its layers."""

    mask: tuple[Any, ...]
    window: Window
    num_layers: float

    def is_of(self, spec: AttnMaskSpec, window: Window) -> bool:
        return self.window == window and self.mask == spec.fingerprint()


class LayerPlan(NamedTuple):
    """The plan of the layers that have a mask."""

    layers: PlannedMask
    plan: Plan


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class ReadyPlan:
    """Plans with what they were made for, so that `make_key` can tell whether they fit.

    layer_plans: of the key's own mask, then of those in `also`. heads, options, wire: the arguments of `make_plan`.
    """

    layer_plans: tuple[LayerPlan, ...]
    heads: Heads
    options: PlanOptions
    wire: str | None

    def __repr__(self) -> str:
        q, k = self.plan.q_placement.total_seqlen, self.plan.k_placement.total_seqlen
        masks = f", {len(self.layer_plans)} masks" if len(self.layer_plans) > 1 else ""
        return (
            f"<ReadyPlan of {q} x {k} tokens on {self.plan.cp_size} ranks{masks}, heads {self.heads.num_q}:"
            f"{self.heads.num_kv} of {self.heads.head_dim}>"
        )

    @property
    def plan(self) -> Plan:
        """The plan of the key's own mask."""
        return self.layer_plans[0].plan

    def require_fit(
        self,
        masks: Sequence[PlannedMask],
        heads: Heads,
        cp_size: int,
        wire: str | None,
        *,
        head_degree: int = 1,
    ) -> None:
        """Check that the plan is for these masks (or has more of them), these heads and a group of cp_size ranks.

        Raises:
            ValueError: names what differs.
        """
        own = self.layer_plans[0].layers
        self._require_masks(masks)
        for name, planned, asked in (
            ("heads and head dims", self.heads.numbers, heads.numbers),
            ("latent_dim", self.heads.latent_dim or None, heads.latent_dim or None),
            ("window", own.window, masks[0].window),
            ("wire", self.wire, wire),
        ):
            if planned != asked:
                raise ValueError(f"plan was made for {name} {planned} and make_key is called with {asked}")
        self._require_group(cp_size, head_degree)

    def _require_masks(self, masks: Sequence[PlannedMask]) -> None:
        if self.layer_plans[0].layers.mask != masks[0].mask:
            raise ValueError(
                "plan was made for another mask: make_key must get the spec that make_plan got; did batches and plans "
                "get out of step?"
            )
        missing = {mask[:2] for mask in masks[1:]} - {planned.layers[:2] for planned in self.layer_plans}
        if missing:
            raise ValueError(
                f"plan was made without {len(missing)} of the masks in also: give make_plan the same also as make_key"
            )

    def _require_group(self, cp_size: int, head_degree: int) -> None:
        if self.plan.cp_size * head_degree != cp_size:
            of = f", each of {head_degree} ranks (head_degree)" if head_degree > 1 else ""
            raise ValueError(
                f"plan was made for cp_size {self.plan.cp_size}{of} and the group has {cp_size} ranks: give make_plan "
                f"cp_size={cp_size // head_degree}"
            )


def with_layers(
    spec: AttnMaskSpec, window: Window, num_layers: float, also: Sequence[LayerKind]
) -> tuple[tuple[PlannedMask, AttnMaskSpec], ...]:
    """The masks that one placement is to serve, the key's own first, each with its spec.

    Raises:
        ValueError: a mask is over another sequence or cross-attention, or a number is not a finite one above 0.
    """
    num_layers = _read_layers(num_layers)
    if not also:
        return ((PlannedMask(spec.fingerprint(), window, 1.0), spec),)
    own = (PlannedMask(spec.fingerprint(), window, num_layers), spec)
    return (own, *(_other_mask(kind, spec) for kind in also))


def _read_layers(num_layers: Any) -> float:
    try:
        number = float(num_layers)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number) or number <= 0:
        raise ValueError(f"num_layers is {num_layers!r}: it must be a finite number above 0")
    return number


def _other_mask(kind: LayerKind, spec: AttnMaskSpec) -> tuple[PlannedMask, AttnMaskSpec]:
    """A mask of `also`, beside the key's own spec."""
    if not isinstance(kind, LayerKind):
        raise ValueError(f"also has {kind!r}: expected cpattn.LayerKind(spec, window, num_layers)")
    other = spec if kind.spec is None else kind.spec
    check_spec("a mask in also", other)
    if other.is_cross or spec.is_cross or other.total_seqlen != spec.total_seqlen:
        raise ValueError(
            f"also has a mask over {other.total_seqlen} x {other.seqlen_k} tokens and the key's is over "
            f"{spec.total_seqlen} x {spec.seqlen_k}: masks that are planned together are of self-attention over "
            f"the same sequence"
        )
    return PlannedMask(other.fingerprint(), window_on_mask(kind.window, other), _read_layers(kind.num_layers)), other


def plan_layers(
    masks: Sequence[tuple[PlannedMask, AttnMaskSpec]], heads: Heads, options: PlanOptions, *, cp_size: int
) -> tuple[LayerPlan, ...]:
    """A plan for each mask; several are planned jointly, over one placement.

    Args:
        heads: of a rank (of the part with the most, with head sharding); they say what a row weighs.
        options, cp_size: for the ranks that are planned for (context ranks, with head sharding).

    Raises:
        ValueError: as `make_dispatch_plan` does, or schedule "tiles" with several masks.
    """
    kinds, specs = zip(*masks, strict=True)
    spec = specs[0]
    common: dict[str, Any] = {field.name: getattr(options, field.name) for field in fields(options)}
    common |= {"total_seqlen": spec.total_seqlen, "cp_size": cp_size, "costs": heads.row_costs()}
    tables = [lower_mask(other, layers.window) for layers, other in masks]
    if len(masks) == 1:
        plan = make_dispatch_plan(tables[0], total_seqlen_k=spec.total_seqlen_k, **common)
        return (LayerPlan(kinds[0], plan),)
    if options.schedule == "tiles":
        raise ValueError(
            "schedule 'tiles' with several masks (also): tiles place tokens for one mask; use 'auto', with which the "
            "queries of one mask move where that is faster, or 'keys'"
        )
    joint = make_joint_plans(tables, [layers.num_layers for layers in kinds], **common)
    return tuple(map(LayerPlan, kinds, joint.plans))


def make_plan(
    spec: AttnMaskSpec,
    *,
    cp_size: int,
    num_heads_q: int,
    num_heads_kv: int,
    head_dim: int,
    head_dim_v: int | None = None,
    chunk_size: int = 512,
    layout: Layout = "balanced",
    schedule: ScheduleKind = "auto",
    num_stages: int | None = None,
    ranks_per_node: int | None = None,
    window: int | Sequence[int | None] | None = None,
    search_effort: int = 0,
    wire: str | None = None,
    latent_dim: int | None = None,
    num_layers: float = 1.0,
    also: Sequence[LayerKind] = (),
    hardware: Hardware | str | Path | None = None,
    equal_shards: bool = False,
    relays: bool | None = None,
) -> ReadyPlan:
    """Plan a mask for a group of `cp_size` ranks; for all of them at once, without torch.

    The other arguments are those of `make_key`, which takes the result as `plan=`. It knows no launcher and no
    group: `ranks_per_node` None is one level, `hardware` None is "h100" ("cpu" gives the plan that `make_key` makes
    for a group of gloo).

    >>> ready = make_plan(AttnMaskSpec.causal(1000), cp_size=4, num_heads_q=8, num_heads_kv=2, head_dim=64)
    >>> ready.plan.cp_size
    4
    """
    if isinstance(ranks_per_node, str):
        raise ValueError(f"ranks_per_node is {ranks_per_node!r}: a plan is made without a launcher; give an int")
    check_spec("spec", spec)
    cp_size = read_int("cp_size", cp_size)
    heads = read_heads(num_heads_q, num_heads_kv, head_dim, head_dim_v, wire, latent_dim)
    machine = DEFAULT_HARDWARE if hardware is None else find_hardware(hardware)
    options = PlanOptions(
        chunk_size, layout, schedule, num_stages, ranks_per_node, search_effort, machine,
        read_flag("equal_shards", equal_shards), read_relays(relays),
    )  # fmt: skip
    masks = with_layers(spec, window_on_mask(window, spec), num_layers, also)
    return ReadyPlan(plan_layers(masks, heads, options, cp_size=cp_size), heads, options, wire)
