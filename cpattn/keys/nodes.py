"""Which ranks of a group share a node, from what the launcher told each process."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, Literal, NamedTuple

import torch.distributed as dist

RanksPerNode = int | Literal["auto"] | None


class Launch(NamedTuple):
    """What torchrun sets for a process: RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE and GROUP_WORLD_SIZE.

    num_nodes: None where the launcher does not say.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    num_nodes: int | None

    @property
    def nodes_are_equal(self) -> bool:
        """Whether this process' numbers are those of equal nodes of consecutive ranks."""
        size = self.local_world_size
        return (
            size > 0
            and self.world_size % size == 0
            and self.rank % size == self.local_rank
            and self.num_nodes in (None, self.world_size // size)
        )


def read_launch(environment: Mapping[str, str]) -> Launch | None:
    """What the launcher says; None where it does not say it, or not in numbers."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    texts = [environment.get(name, "") for name in names]
    if not all(text.isdecimal() for text in texts):
        return None
    rank, world_size, local_rank, local_world_size = map(int, texts)
    num_nodes = environment.get("GROUP_WORLD_SIZE", "")
    return Launch(rank, world_size, local_rank, local_world_size, int(num_nodes) if num_nodes.isdecimal() else None)


def group_ranks_per_node(ranks: Sequence[int], launch: Launch) -> int | None:
    """Consecutive ranks of a group that share a node; None where that is not the same number throughout.

    None also where all share one node, or no two share one: there is one kind of link then.

    >>> group_ranks_per_node([0, 2, 4, 6], Launch(0, 8, 0, 4, 2))
    2

    Args:
        ranks: of the group, as ranks of the world.
    """
    if not launch.nodes_are_equal:
        return None
    nodes = [rank // launch.local_world_size for rank in ranks]
    size = nodes.count(nodes[0])
    runs = [nodes[at : at + size] for at in range(0, len(nodes), size)]
    equal = all(len(set(run)) == 1 and len(run) == size for run in runs) and len(set(nodes)) == len(runs)
    return size if equal and 1 < size < len(nodes) else None


def resolve_ranks_per_node(asked: Any, group: dist.ProcessGroup | None, cp_size: int) -> int | None:
    """The `ranks_per_node` of `make_key` as a number, or None for a network of one level.

    "auto" believes the launcher only where it speaks of the world that torch.distributed has.

    Raises:
        ValueError: not a positive int that divides the group, "auto" or None.
    """
    if asked is None:
        return None
    if asked == "auto":
        launch = _launch()
        if group is None or launch is None:
            return None
        if (launch.rank, launch.world_size) != (dist.get_rank(), dist.get_world_size()):
            return None
        return group_ranks_per_node(dist.get_process_group_ranks(group), launch)
    if not hasattr(asked, "__index__") or isinstance(asked, bool) or asked < 1 or cp_size % asked:
        raise ValueError(
            f"ranks_per_node is {asked!r} and cp_size is {cp_size}: nodes must be of equal size; pass an int that "
            f"divides the group, 'auto' to go by the launcher, or None for a network of one level"
        )
    return int(asked)


@cache
def _launch() -> Launch | None:
    return read_launch(os.environ)
