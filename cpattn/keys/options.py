"""How a key is planned and run, and what it is the key of: all that ranks must agree on."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch

from cpattn.backends import CHOICES, backend_names
from cpattn.collectives import Fp8Rows, RowCodec
from cpattn.masks.reading import Window
from cpattn.masks.spec import AttnMaskSpec
from cpattn.planning.options import PlanOptions
from cpattn.planning.ready import LayerPlan
from cpattn.solver import Heads, Plan

from .transports import TransportChoice


@dataclass(frozen=True, slots=True)
class RunOptions:
    """How a plan is run.

    backend: name of the local kernel, "auto" or "fastest".
    wire: 8-bit format in which rows travel; None: as they are.
    grad_wire: "bf16": gradients of k and v go to their owners in bf16; None: in the dtype that they are summed in.
    keep_kv: whether forward keeps the keys and values that it fetched for backward.
    transport: by which calls rows travel; "auto": by the measurements of the hardware.
    identify: whether ranks tell each other before each pass what they call.

    Raises:
        ValueError: a name is unknown.
    """

    backend: str = "auto"
    wire: str | None = None
    keep_kv: bool = False
    transport: TransportChoice = "auto"
    identify: bool = True
    grad_wire: str | None = None

    def __post_init__(self) -> None:
        known = (*CHOICES, *backend_names())
        if self.backend not in known:
            raise ValueError(f"backend {self.backend!r} is unknown: use {', '.join(known)}")
        if self.grad_wire not in (None, "bf16"):
            raise ValueError(f"grad_wire is {self.grad_wire!r}: use 'bf16' or None")
        if self.transport not in ("auto", "all_to_all", "p2p"):
            raise ValueError(f"transport is {self.transport!r}: use 'auto', 'all_to_all' or 'p2p'")

    @property
    def codec(self) -> RowCodec | None:
        """How rows travel between ranks, if not as they are."""
        return None if self.wire is None else Fp8Rows(self.wire)

    @property
    def grad_dtype(self) -> torch.dtype | None:
        """In which gradients of k and v travel, if not in that of their sums."""
        return None if self.grad_wire is None else torch.bfloat16


@dataclass(frozen=True, slots=True)
class KeyOptions:
    """How a key is planned and run; part of the key's identity.

    planning: of the whole group. window: (left, right) limit on the distance in positions; None on a side is no limit.
    head_degree: ranks that share a context rank's rows, each with some of the heads; 1: no head sharding.
    """

    planning: PlanOptions
    running: RunOptions
    window: Window = None
    head_degree: int = 1

    def named(self) -> dict[str, Any]:
        """Every option by the name that `make_key` has for it."""
        parts = (self.planning, self.running)
        flat = {field.name: getattr(part, field.name) for part in parts for field in fields(part)}
        return {**flat, "window": self.window, "head_degree": self.head_degree}


class PlannedKey(NamedTuple):
    """A mask with its plan: what ranks agree on when they make a key.

    heads: of the rank, as they travel. plan: of context ranks. layer_plans: of all masks that were planned with this
    one. degree_seconds: (head degree, predicted seconds) where the degree was chosen.
    """

    spec: AttnMaskSpec
    options: KeyOptions
    heads: Heads
    plan: Plan
    layer_plans: tuple[LayerPlan, ...] = ()
    degree_seconds: tuple[tuple[int, float], ...] = ()

    def identity(self) -> str:
        """Short words with a digest of all that ranks agree on."""
        plans = (self.plan.fingerprint, *(other.fingerprint for _, other in self.layer_plans))
        said = repr((self.heads.numbers, self.options.named(), plans))
        number = hashlib.blake2b(said.encode(), digest_size=4).hexdigest()
        heads = f"{self.heads.num_q}:{self.heads.num_kv} heads"
        return f"{number} of {self.spec.total_seqlen} x {self.spec.seqlen_k} tokens, {heads}"

    def shared(self) -> dict[str, Any]:
        """What must be the same on all ranks, by name."""
        return {
            "mask": self.spec,
            "heads and head dims": self.heads.numbers,
            "latent_dim": self.heads.latent_dim,
            **self.options.named(),
            "layers": [(kind.num_layers, kind.window, kind.mask) for kind, _ in self.layer_plans],
            "plan": (self.plan.fingerprint, *(other.fingerprint for _, other in self.layer_plans)),
        }
