"""The ranks of a context-parallel group, and this one among them."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch.distributed as dist

from cpattn.runtime.identity import require_own_process


class CpRanks(NamedTuple):
    """A group from the view of a rank. group: None is one rank alone.

    With head sharding size and rank may be those of context ranks.
    """

    group: dist.ProcessGroup | None
    size: int
    rank: int


def find_ranks(cp_group: Any) -> CpRanks:
    """The ranks of a process group or mesh; those of a group of one have no group.

    Raises:
        ValueError: this rank is not among them, a mesh does not say which of its axes is meant, or a launcher has
            started several ranks and no group has been made yet.
        RuntimeError: the process was forked from the one that made the group.
    """
    if isinstance(cp_group, str) and cp_group == "self":
        return CpRanks(None, 1, 0)
    group = _resolve_group(cp_group)
    return CpRanks(None, 1, 0) if group is None else CpRanks(group, dist.get_world_size(group), dist.get_rank(group))


def _context_axis(mesh: Any) -> Any:
    names = mesh.mesh_dim_names or ()
    if "cp" in names:
        return mesh["cp"]
    if mesh.ndim != 1:
        raise ValueError(
            f"cp_group is a mesh with axes {names}: pass a 1-D mesh, or name the context-parallel axis 'cp'"
        )
    return mesh


def _resolve_group(cp_group: Any) -> dist.ProcessGroup | None:
    """A process group of two ranks or more, or None."""
    if cp_group is None:
        started = os.environ.get("WORLD_SIZE", "1")
        if started.isdecimal() and int(started) > 1 and not (dist.is_available() and dist.is_initialized()):
            raise ValueError(
                f"cp_group is None and WORLD_SIZE is {started}: dist.group.WORLD is None until the ranks have met; "
                f"call torch.distributed.init_process_group first, or say that each rank is alone with cp_group='self'"
            )
        return None
    if hasattr(cp_group, "mesh_dim_names"):  # DeviceMesh
        cp_group = _context_axis(cp_group)
        # A mesh without this rank is refused below, as it is.
        cp_group = cp_group if cp_group.get_coordinate() is None else cp_group.get_group()
    if not isinstance(cp_group, dist.ProcessGroup) or dist.get_rank(cp_group) < 0:
        raise ValueError(
            f"cp_group is {cp_group!r}: this rank ({dist.get_rank() if dist.is_initialized() else 0}) is "
            f"not in it; pass a ProcessGroup or DeviceMesh that contains this rank, or None for one rank"
        )
    require_own_process(os.getpid(), cp_group)
    return cp_group if dist.get_world_size(cp_group) > 1 else None
