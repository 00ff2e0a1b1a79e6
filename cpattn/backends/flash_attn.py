"""`flash_attn`: the flash-attn package, in whichever of its generations is installed.

| generation | import | where | notes |
|---|---|---|---|
| 2 | `flash_attn.flash_attn_interface` | sm80 and later | softcap; values as wide as keys |
| 3 | `flash_attn_interface` | sm90 | softcap; wants its gradients allocated by the caller |
| 4 | `flash_attn.cute.interface` | sm90, sm100 | compiles at first use; None is its unbounded window |

All take packed rows with `cu_seqlens`, a bottom-right aligned window, and give lse [N, T] in natural
log; their backward takes out and lse, so those of the whole attention go in. Arguments are passed by
name, and those that a version lacks are left out: names came and went between releases.
Source: github.com/Dao-AILab/flash-attention, `flash_attn/`, `hopper/` and the wheel flash-attn-4.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cpattn.solver import SliceTable

from .base import HALF_DTYPES, Attending, KeyRows, Problem, Returning, Scoring, Turn, refuse_dtype
from .installed import call_known, device_capability, failing_import, known_parameters, missing_package
from .varlen import (
    PlacingVarlen,
    VarlenCall,
    VarlenKernel,
    VarlenWork,
    plan_varlen,
    run_varlen_backward,
    run_varlen_forward,
)
from .varlen import writes_once as varlen_writes_once


def _packed(call: VarlenCall) -> dict[str, Any]:
    return {
        "cu_seqlens_q": call.cu_seqlens_q,
        "cu_seqlens_k": call.cu_seqlens_k,
        "max_seqlen_q": call.max_seqlen_q,
        "max_seqlen_k": call.max_seqlen_k,
    }


def _packed2(call: VarlenCall) -> dict[str, Any]:
    return {**_packed(call), "max_seqlen_k": call.max_seqlen_k_for_fa2}


@dataclass(frozen=True, slots=True)
class FlashAttn2Kernel:
    """FlashAttention 2; see `VarlenKernel`."""

    module: Any

    def forward(
        self, q_TND: Tensor, k_SGD: Tensor, v_SGE: Tensor, call: VarlenCall, scoring: Scoring
    ) -> tuple[Tensor, Tensor]:
        result = call_known(
            self.module._flash_attn_varlen_forward,
            {"q": q_TND, "k": k_SGD, "v": v_SGE, **_packed2(call), **_numbers2(call, scoring)},
            {"return_softmax": False},
        )
        # Releases before 2.7 return the padded inputs too, with lse in sixth place.
        return result[0], result[1] if len(result) == 4 else result[5]

    def backward(
        self,
        dout_TNE: Tensor,
        q_TND: Tensor,
        k_SGD: Tensor,
        v_SGE: Tensor,
        out_TNE: Tensor,
        lse_NT: Tensor,
        call: VarlenCall,
        scoring: Scoring,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = (t.new_empty(t.shape) for t in (q_TND, k_SGD, v_SGE))
        call_known(
            self.module._flash_attn_varlen_backward,
            {
                "dout": dout_TNE.contiguous(),
                "q": q_TND,
                "k": k_SGD,
                "v": v_SGE,
                "out": out_TNE.contiguous(),
                "softmax_lse": lse_NT,
                "dq": dq,
                "dk": dk,
                "dv": dv,
                **_packed2(call),
                **_numbers2(call, scoring),
                "deterministic": torch.are_deterministic_algorithms_enabled(),
            },
            {"rng_state": None},
        )
        return dq, dk, dv


def _numbers2(call: VarlenCall, scoring: Scoring) -> dict[str, Any]:
    return {
        "dropout_p": 0.0,
        "softmax_scale": scoring.scale,
        "causal": False,  # the window says it
        "window_size_left": call.left,
        "window_size_right": call.right,
        "softcap": scoring.softcap or 0.0,
        "alibi_slopes": None,
    }


# Arguments of FA3's forward that we have no use for, and that older releases give no default.
_ABSENT3 = dict.fromkeys(
    (
        "k_new",
        "v_new",
        "qv",
        "out",
        "out_",
        "cu_seqlens_k_new",
        "seqused_q",
        "seqused_k",
        "page_table",
        "kv_batch_idx",
        "leftpad_k",
        "rotary_cos",
        "rotary_sin",
        "seqlens_rotary",
        "q_descale",
        "k_descale",
        "v_descale",
    )
)


@dataclass(frozen=True, slots=True)
class FlashAttn3Kernel:
    """FlashAttention 3 for Hopper; see `VarlenKernel`."""

    module: Any

    def forward(
        self, q_TND: Tensor, k_SGD: Tensor, v_SGE: Tensor, call: VarlenCall, scoring: Scoring
    ) -> tuple[Tensor, Tensor]:
        function = self.module._flash_attn_forward
        known = known_parameters(function)
        result = call_known(
            function,
            {"q": q_TND, "k": k_SGD, "v": v_SGE, **_packed(call), **_numbers3(call, scoring, known)},
            {**_ABSENT3, "causal": False},
        )
        return result[0], result[1]

    def backward(
        self,
        dout_TNE: Tensor,
        q_TND: Tensor,
        k_SGD: Tensor,
        v_SGE: Tensor,
        out_TNE: Tensor,
        lse_NT: Tensor,
        call: VarlenCall,
        scoring: Scoring,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = (t.new_empty(t.shape) for t in (q_TND, k_SGD, v_SGE))
        function = self.module._flash_attn_backward
        known = known_parameters(function)
        call_known(
            function,
            {
                "dout": dout_TNE.contiguous(),
                "q": q_TND,
                "k": k_SGD,
                "v": v_SGE,
                "out": out_TNE.contiguous(),
                "softmax_lse": lse_NT,
                "dq": dq,
                "dk": dk,
                "dv": dv,
                **_packed(call),
                **_numbers3(call, scoring, known),
            },
            {
                "sequed_q": None,  # so spelt there
                "sequed_k": None,
                "causal": False,
                "is_causal": False,
                "deterministic": torch.are_deterministic_algorithms_enabled(),
            },
        )
        return dq, dk, dv


def _numbers3(call: VarlenCall, scoring: Scoring, known: frozenset[str] | None) -> dict[str, Any]:
    window: dict[str, Any] = {"window_size_left": call.left, "window_size_right": call.right}
    if known is not None and "window_size" in known:
        window = {"window_size": (call.left, call.right)}
    return {"softmax_scale": scoring.scale, "softcap": scoring.softcap or 0.0, **window}


@dataclass(frozen=True, slots=True)
class FlashAttn4Kernel:
    """FlashAttention 4 (CuTe); see `VarlenKernel`."""

    module: Any

    def forward(
        self, q_TND: Tensor, k_SGD: Tensor, v_SGE: Tensor, call: VarlenCall, scoring: Scoring
    ) -> tuple[Tensor, Tensor]:
        result = call_known(
            self.module._flash_attn_fwd,
            {"q": q_TND, "k": k_SGD, "v": v_SGE, **_numbers4(call, scoring.scale), "return_lse": True},
            _lengths4(call),
        )
        return result[0], result[1]

    def backward(
        self,
        dout_TNE: Tensor,
        q_TND: Tensor,
        k_SGD: Tensor,
        v_SGE: Tensor,
        out_TNE: Tensor,
        lse_NT: Tensor,
        call: VarlenCall,
        scoring: Scoring,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv, *_ = call_known(
            self.module._flash_attn_bwd,
            {
                "q": q_TND,
                "k": k_SGD,
                "v": v_SGE,
                "out": out_TNE.contiguous(),
                "dout": dout_TNE.contiguous(),
                "lse": lse_NT,
                **_numbers4(call, scoring.scale),
            },
            {**_lengths4(call), "deterministic": torch.are_deterministic_algorithms_enabled()},
        )
        return dq, dk, dv


def _numbers4(call: VarlenCall, scale: float) -> dict[str, Any]:
    return {
        "cu_seqlens_q": call.cu_seqlens_q,
        "cu_seqlens_k": call.cu_seqlens_k,
        "softmax_scale": scale,
        "causal": False,
        "window_size_left": None if call.left < 0 else call.left,
        "window_size_right": None if call.right < 0 else call.right,
    }


def _lengths4(call: VarlenCall) -> dict[str, Any]:
    return {"max_seqlen_q": call.max_seqlen_q, "max_seqlen_k": call.max_seqlen_k}


@dataclass(frozen=True, slots=True)
class _Generation:
    module: str
    package: str
    kernel: Callable[[Any], VarlenKernel]
    capability: tuple[int, int]
    softcap: bool


_GENERATIONS = {
    2: _Generation("flash_attn.flash_attn_interface", "flash-attn", FlashAttn2Kernel, (8, 0), True),
    3: _Generation("flash_attn_interface", "flash-attn-3", FlashAttn3Kernel, (9, 0), True),
    4: _Generation("flash_attn.cute.interface", "flash-attn-4", FlashAttn4Kernel, (9, 0), False),
}


@dataclass(frozen=True, slots=True)
class FlashAttnBackend(PlacingVarlen):
    """One generation of flash-attn: 2, 3 or 4."""

    generation: int
    device_type: str = "cuda"
    name: str = "flash_attn"
    stores_first: bool = True

    @property
    def kernel(self) -> str:
        return f"FlashAttention {self.generation} ({_GENERATIONS[self.generation].package})"

    def refusal(self, problem: Problem) -> str | None:
        what = _GENERATIONS[self.generation]
        how = "built from flash-attention's folder hopper/" if self.generation == 3 else ""
        if missing := missing_package(what.module, what.package, how):
            return missing
        if problem.device_type != self.device_type:
            return f"this kernel runs on {self.device_type}, the tensors are on {problem.device_type}"
        capability = device_capability(self.device_type)
        exact = self.generation == 3  # Hopper's instructions
        if capability is not None and (capability < what.capability or (exact and capability[0] != 9)):
            return f"the GPU is sm{capability[0]}{capability[1]}: it needs {'' if exact else 'at least '}sm" + (
                f"{what.capability[0]}{what.capability[1]}"
            )
        if problem.softcap and not what.softcap:
            return "softcap is not tried with this generation"
        # FlashAttention 4 takes 256 on Hopper; on Blackwell that is a kernel of its own, which is not tried.
        # Source: flash_attn/cute/interface.py, _validate_head_dims.
        widest, limit = max(problem.head_dim, problem.head_dim_v), 256
        if self.generation == 4 and capability is not None and capability[0] != 9:
            limit = 128
        if widest > limit:
            return f"head_dim {widest} is more than it takes here ({limit})"
        return refuse_dtype(problem, HALF_DTYPES) or failing_import(what.module, what.package)

    def prepare(
        self, slices: SliceTable, num_queries: int, num_keys: int, device: torch.device, turn: Turn | None = None
    ) -> VarlenWork:
        return plan_varlen(slices, device, num_queries, num_keys, turn)

    def writes_once(self, work: VarlenWork) -> bool:
        return varlen_writes_once(work)

    def forward(
        self, queries: Attending, keys: KeyRows, work: VarlenWork, scoring: Scoring, *, fresh: bool = False
    ) -> None:
        run_varlen_forward(self.packed_kernel(), queries, keys, work, scoring, fresh=fresh)

    def backward(
        self,
        queries: Returning,
        keys: KeyRows,
        work: VarlenWork,
        scoring: Scoring,
        dkeys: KeyRows,
        *,
        fresh_dq: bool = False,
        fresh_dkv: bool = False,
    ) -> None:
        run_varlen_backward(self.packed_kernel(), queries, keys, work, scoring, dkeys, fresh=(fresh_dq, fresh_dkv))

    def packed_work(self, work: VarlenWork) -> VarlenWork:
        return work

    def packed_kernel(self) -> VarlenKernel:
        what = _GENERATIONS[self.generation]
        return what.kernel(importlib.import_module(what.module))
