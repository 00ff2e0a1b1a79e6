"""Arguments by position, in the order of TransformerEngine 2.12 or of 2.20 and later, which put formats among them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])

FORMATS = ("sbhd", "bshd", "thd", "bhsd")


def either_order(
    *, after: str, added: Sequence[str], dropped: str | None, told_by: str
) -> Callable[[Function], Function]:
    """Let a function that has 2.12's order be called in 2.20's too.

    Args:
        after: the argument behind which 2.20 has new ones.
        added: these, in order; the function takes them by name.
        dropped: an argument that 2.20 does not have.
        told_by: the argument of 2.12's order in whose place a call in 2.20's has what cannot be it: a format's name
            or enum member, or a sequence of tensors.
    """

    def decorate(function: Function) -> Function:
        parameters = inspect.signature(function).parameters
        own = [name for name, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
        newer = [name for name in own if name != dropped]
        newer[newer.index(after) + 1 : newer.index(after) + 1] = added
        place = own.index(told_by)

        @functools.wraps(function)
        def called(*args: Any, **kwargs: Any) -> Any:
            if len(args) <= place or not _is_newer(args[place]):
                return function(*args, **kwargs)
            given = dict(zip(newer, args, strict=False))
            if len(args) > len(newer) or given.keys() & kwargs.keys():
                twice = sorted(given.keys() & kwargs.keys())
                given_of = f"{len(args)} arguments of {len(newer)} by position"
                raise TypeError(f"{function.__name__}: {given_of}; twice: {twice}")
            return function(**given, **kwargs)

        return called  # type: ignore[return-value]

    return decorate


def _is_newer(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return True
    name = value if isinstance(value, str) else getattr(value, "name", "")
    return str(name).rsplit(".", 1)[-1].removeprefix("NVTE_").lower() in FORMATS
