"""Calls keep the program's order in a compiled graph, on all ranks.

Calls of attention that do not depend on each other (two towers, an encoder and a decoder) may be run in any order, and
a compiler chooses by memory, thus by each rank's own numbers of rows; ranks that choose differently exchange rows of
different calls. So where a graph is traced, each operation that exchanges rows is put down as its `_in_order` form,
which takes an empty tensor from the one before and gives one to the next: a dependency that no compiler may break.
Eager calls run in the program's order, and their backward in autograd's, which is that order turned round.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.fx import traceback
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode
from torch.fx.node import has_side_effect
from torch.utils.checkpoint import CheckpointPolicy

# The empty tensor of the last operation, by graph that is being traced.
_last: WeakKeyDictionary[Any, Tensor] = WeakKeyDictionary()


def exchanging_op(name: str, run: Callable[..., Any], fake: Callable[..., Any]) -> torch.library.CustomOpDef:
    """An operation of `torch.library` that keeps its place among those made here, in every graph that is traced.

    Args:
        name: with its namespace.
        run, fake: what it computes, from annotated arguments to one tensor or a tuple of them; and its results without
            data.
    """
    op = torch.library.custom_op(name, run, mutates_args=())
    op.register_fake(fake)
    arguments, results = _signature(op)
    schema = f"(Tensor? after, {arguments}) -> ({', '.join(['Tensor'] * (results + 1))})"
    ordered = torch.library.custom_op(f"{name}_in_order", _with_token(run), mutates_args=(), schema=schema)
    ordered.register_fake(_with_token(fake))
    plain, in_order = _overload(name), _overload(f"{name}_in_order")
    # Other ranks wait in these: a compiler must keep them even where nothing is made of what they return, as on a rank
    # that has no rows.
    has_side_effect(plain)
    has_side_effect(in_order)

    def traced(mode: ProxyTorchDispatchMode, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with mode, _kept_by_checkpoints():
            *outs, token = in_order(_last.get(mode.tracer), *args, **(kwargs or {}))
        _last[mode.tracer] = token
        return outs[0] if results == 1 else tuple(outs)

    op.register_torch_dispatch(ProxyTorchDispatchMode, traced)
    return op


def _signature(op: torch.library.CustomOpDef) -> tuple[str, int]:
    """Arguments as a schema writes them, and the number of results."""
    schema = op._opoverload._schema
    return str(schema).split("(", 1)[1].rsplit(") -> ", 1)[0], len(schema.returns)


def _overload(name: str) -> Any:
    namespace, bare = name.split("::")
    return getattr(getattr(torch.ops, namespace), bare).default


def _with_token(inner: Callable[..., Any]) -> Callable[..., tuple[Tensor, ...]]:
    def call(after: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
        outs = inner(*args)
        outs = (outs,) if isinstance(outs, Tensor) else tuple(outs)
        return (*outs, outs[0].new_empty(0))

    return call


@contextmanager
def _kept_by_checkpoints() -> Iterator[None]:
    """What is traced here is saved by a checkpoint around it, not computed again.

    A compiler that repeats it in backward may put it before or behind the backward of another call, rank by rank.
    """
    meta = traceback.current_meta
    said = meta.get("recompute")
    if said is not None:
        meta["recompute"] = CheckpointPolicy.MUST_SAVE
    try:
        yield
    finally:
        if said is not None:
            meta["recompute"] = said
