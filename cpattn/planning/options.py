"""What steers planning: options, heads, and masks with the layers that have them. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from cpattn.masks.reading import Window, read_int, read_window
from cpattn.masks.spec import AttnMaskSpec
from cpattn.solver import DEFAULT_HARDWARE, Hardware, Heads, Layout, ScheduleKind, context_ranks_per_node


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """How a mask is planned, whatever the mask, the heads and the number of ranks.

    chunk_size: tokens by which ranks' token counts may differ, and the grain of placement.
    layout: "balanced", "contiguous" or "zigzag".
    schedule: "auto", "keys" or "tiles".
    num_stages: parts in which remote keys are fetched; None chooses.
    ranks_per_node: ranks that share a node in a two-level network; None: one level.
    search_effort: placement search in units of about 100 ms; 0: as long as a step may gain by it.
    hardware: speeds that the plan is made for.
    equal_shards: every rank owns as many tokens.
    relays: whether ranks pass on rows that others need as well; None: where that is estimated to be faster.

    Raises:
        ValueError: a number is out of range. The solver knows upper limits and names.
    """

    chunk_size: int = 512
    layout: Layout = "balanced"
    schedule: ScheduleKind = "auto"
    num_stages: int | None = None
    ranks_per_node: int | None = None
    search_effort: int = 0
    hardware: Hardware = DEFAULT_HARDWARE
    equal_shards: bool = False
    relays: bool | None = None

    def __post_init__(self) -> None:
        for name, least in (("chunk_size", 1), ("num_stages", 1), ("search_effort", 0)):
            value = getattr(self, name)
            if name != "num_stages" or value is not None:  # as Python's int: ranks compare by repr
                object.__setattr__(self, name, read_int(name, value, least=least))

    def for_contexts(self, head_degree: int) -> PlanOptions:
        """The options for a plan of context ranks, of which each is so many ranks."""
        return replace(self, ranks_per_node=context_ranks_per_node(self.ranks_per_node, head_degree))

    def for_ranks(self, head_degree: int) -> PlanOptions:
        """The options for the ranks, of those for a plan of context ranks."""
        per_node = None if self.ranks_per_node is None else self.ranks_per_node * head_degree
        return replace(self, ranks_per_node=per_node)


class LayerKind(NamedTuple):
    """A mask that some layers of a model have, beside the one that a key is made for.

    spec: None is the key's own. window: as in `make_key`. num_layers: layers that have it, or any number
    in proportion.
    """

    spec: AttnMaskSpec | None = None
    window: int | Sequence[int | None] | None = None
    num_layers: float = 1.0


def window_on_mask(window: int | Sequence[int | None] | None, spec: AttnMaskSpec) -> Window:
    """A window as (left, right), None on a side for no limit; None for no window.

    Raises:
        ValueError: it is not an int or a pair, a number is negative, or the mask is one of cross-attention.
    """
    if window is None:
        return None
    if spec.is_cross:
        raise ValueError(
            f"window is {window!r} and the mask is cross-attention: queries and keys share no positions; "
            f"pass window=None"
        )
    return read_window(window, ahead=None)


def read_heads(
    num_heads_q: Any,
    num_heads_kv: Any,
    head_dim: Any,
    head_dim_v: Any = None,
    wire: Any = None,
    latent_dim: Any = None,
) -> Heads:
    """Heads and head dims of a call.

    Args:
        head_dim_v: None is head_dim.
        wire: the 8-bit format in which rows travel; None: as they are.
        latent_dim: elements of what is fetched in the place of a row of k and v; None: these.

    Raises:
        ValueError: one is not an int of at least 1, query heads are no multiple of key heads, the format is
            unknown, or is one for latents.
    """
    head_dim_v = head_dim if head_dim_v is None else head_dim_v
    named = {"num_heads_q": num_heads_q, "num_heads_kv": num_heads_kv, "head_dim": head_dim, "head_dim_v": head_dim_v}
    num_q, num_kv, dim, dim_v = (read_int(name, value) for name, value in named.items())
    if num_heads_q % num_heads_kv:
        raise ValueError(
            f"num_heads_q is {num_heads_q} and num_heads_kv is {num_heads_kv}: query heads must be a "
            f"multiple of key heads; did they swap places?"
        )
    if wire not in (None, "e4m3", "e5m2"):
        raise ValueError(f"wire is {wire!r}: use 'e4m3', 'e5m2' or None")
    heads = Heads(num_q, num_kv, dim, dim_v, wire_8bit=wire is not None)
    if latent_dim is None:
        return heads
    if wire is not None:
        raise ValueError(f"latent_dim is {latent_dim} and wire is {wire!r}: latents travel as they are; pass wire=None")
    return replace(heads, latent_dim=read_int("latent_dim", latent_dim))


def read_relays(relays: Any) -> bool | None:
    """The `relays` of `make_key`.

    Raises:
        ValueError: not True, False or None.
    """
    if relays is not None and not isinstance(relays, bool):
        raise ValueError(f"relays is {relays!r}: True or False, or None to go by the estimated time")
    return relays


def check_spec(name: str, spec: Any) -> None:
    """Check that something is a mask.

    Raises:
        ValueError: it is not an `AttnMaskSpec`.
    """
    if not isinstance(spec, AttnMaskSpec):
        raise ValueError(f"{name} is {spec!r}: expected an AttnMaskSpec, for example AttnMaskSpec.varlen(seqlens)")
