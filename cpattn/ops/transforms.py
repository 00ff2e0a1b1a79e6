"""What our operations have no rule for, refused: torch would give a tangent of zero, or speak of its own functions."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad


def refuse_transforms(call: str, *inputs: Tensor | None) -> None:
    """Raise where `call` would be transformed by something other than autograd's backward.

    Raises:
        NotImplementedError: a transform of torch.func is active, or an input carries a tangent (in a compiled graph:
            forward-mode differentiation is on).
        ValueError: an input is a DTensor.
    """
    for x in inputs:
        if x is not None and hasattr(x, "device_mesh"):
            raise ValueError(
                f"cpattn.{call} takes each rank's own rows, and an input is a DTensor: pass x.to_local() (and give "
                "the group of its mesh to make_key)"
            )
    if torch.compiler.is_compiling():
        forward, transformed = _active()
    else:
        transformed = torch._C._functorch.peek_interpreter_stack() is not None
        forward = not transformed and any(_has_tangent(x) for x in inputs)
    if transformed:
        raise NotImplementedError(
            f"cpattn.{call} has no rule for torch.func (grad, vjp, jacrev, jvp, vmap): its exchanges take part in "
            "autograd only; use torch.autograd.grad or backward()"
        )
    if forward:
        raise NotImplementedError(
            f"cpattn.{call} has no forward-mode derivative (jvp, jacfwd, forward_ad): use torch.autograd.grad"
        )


def _has_tangent(x: Tensor | None) -> bool:
    return x is not None and forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _active() -> tuple[bool, bool]:
    """Whether forward-mode differentiation, and whether a transform of torch.func, is on where a graph is traced."""
    return forward_ad._current_level >= 0, torch._C._functorch.peek_interpreter_stack() is not None
