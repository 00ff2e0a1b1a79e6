"""fla.ops, mamba_ssm and causal_conv1d with their signatures and rules, token by token on the CPU.

Each rule stands beside its source: fla at bc3b101 (0.5.2), mamba at e9594ce (2.3.2), causal-conv1d at 0d2252d (1.6.1).
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .dense import ContractError


def _require(holds: bool, rule: str) -> None:
    if not holds:
        raise ContractError(rule)


def _scan(
    rows: tuple[Tensor, Tensor, Tensor], decay: Tensor | None, beta: Tensor | None, state: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """One sequence [T, H, ...] in fp64 from a state [H, K, V]: (out [T, H, V], the state at its end)."""
    q, k, v = rows
    outs = []
    for t in range(len(q)):
        if decay is not None:
            state = state * decay[t].double().exp().reshape(*decay.shape[1:], *[1] * (4 - decay.dim()))
        written = v[t]
        if beta is not None:
            written = beta[t].double()[:, None] * (written - torch.einsum("hk,hkv->hv", k[t], state))
        state = state + torch.einsum("hk,hv->hkv", k[t], written)
        outs.append(scale * torch.einsum("hk,hkv->hv", q[t], state))
    return torch.stack(outs), state


def _fla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    scale: float | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """What the calls below have in common, cu_seqlens given."""
    assert cu_seqlens is not None
    # */chunk.py: "The batch size is expected to be 1 rather than ... when using `cu_seqlens`."
    _require(q.shape[0] == 1, "batch size 1 with cu_seqlens")
    if initial_state is not None:
        # */chunk.py: "The number of initial states is expected to be equal to the number of input sequences"
        _require(initial_state.shape[0] == len(cu_seqlens) - 1, "as many initial states as sequences")
    # common/chunk_delta_h.py, kda/chunk.py: `assert K <= 256`
    _require(k.shape[-1] <= 256, "head dim of at most 256")
    # ops/utils/index.py: chunk indices are made of cu_seqlens' differences, so sequences tile the rows.
    _require(cu_seqlens.dtype in (torch.int64, torch.int32), "integer cu_seqlens")
    _require(int(cu_seqlens[0]) == 0 and int(cu_seqlens[-1]) == q.shape[1], "cu_seqlens from 0 to T")
    groups = v.shape[2] // q.shape[2]
    wide = [x[0].double() for x in (q.repeat_interleave(groups, 2), k.repeat_interleave(groups, 2), v)]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    outs, states = [], []
    for number, (a, b) in enumerate(zip(cu_seqlens.tolist()[:-1], cu_seqlens.tolist()[1:], strict=True)):
        begin = wide[2].new_zeros(v.shape[2], k.shape[-1], v.shape[-1])
        begin = begin if initial_state is None else initial_state[number].double()
        part = tuple(x[a:b] for x in wide)
        gate, strength = (None if x is None else x[0, a:b] for x in (g, beta))
        out, state = _scan(part, gate, strength, begin, scale)  # type: ignore[arg-type]
        outs.append(out)
        states.append(state)
    # `final_state = k.new_empty(..., dtype=torch.float32)`, `o.to(q.dtype)`
    return torch.cat(outs)[None].to(q.dtype), torch.stack(states).float()


def fla_ops() -> ModuleType:
    """The calls of fla.ops that are used."""
    module = ModuleType("fla.ops")

    def chunk_simple_gla(
        q: Tensor, k: Tensor, v: Tensor, g: Any = None, g_gamma: Any = None, scale: Any = None,
        initial_state: Any = None, output_final_state: bool = False, state_v_first: bool = False,
        cu_seqlens: Any = None, cu_seqlens_cpu: Any = None, **kwargs: Any,
    ) -> Any:  # fmt: skip
        _require(q.shape[2] == v.shape[2], "simple_gla: as many heads of q and k as of v")  # docstring: [B, T, H, *]
        _require(g is None or g.shape == v.shape[:3], "simple_gla: g of [B, T, H]")
        out, final = _fla(q, k, v, g, None, scale, initial_state, cu_seqlens)
        return out, final if output_final_state else None

    def chunk_gla(
        q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: Any = None, initial_state: Any = None,
        output_final_state: bool = False, state_v_first: bool = False, cu_seqlens: Any = None,
        cu_seqlens_cpu: Any = None,
    ) -> Any:  # fmt: skip
        _require(q.shape == k.shape == g.shape, "q, k, g must have the same shape.")
        _require(v.shape[:3] == q.shape[:3], "v must be of shape (batch size, seq len, num of head, head dim).")
        out, final = _fla(q, k, v, g, None, scale, initial_state, cu_seqlens)
        return out, final if output_final_state else None

    def chunk_gated_delta_rule(
        q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: Any = None, initial_state: Any = None,
        output_final_state: bool = False, use_qk_l2norm_in_kernel: bool = False,
        use_beta_sigmoid_in_kernel: bool = False, allow_neg_eigval: bool = False, state_v_first: bool = False,
        cu_seqlens: Any = None, cu_seqlens_cpu: Any = None, chunk_indices: Any = None, cp_context: Any = None,
        **kwargs: Any,
    ) -> Any:  # fmt: skip
        _require(q.shape[2] == k.shape[2] and not v.shape[2] % q.shape[2], "HV must be divisible by H")
        _require(g is not None and g.shape == beta.shape == v.shape[:3], "g and beta of [B, T, HV]")
        out, final = _fla(q, k, v, g, beta, scale, initial_state, cu_seqlens)
        return out, final if output_final_state else None

    def chunk_kda(
        q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: Any = None, initial_state: Any = None,
        output_final_state: bool = False, use_qk_l2norm_in_kernel: bool = False, use_gate_in_kernel: bool = False,
        use_beta_sigmoid_in_kernel: bool = False, allow_neg_eigval: bool = False, safe_gate: bool = False,
        lower_bound: Any = None, disable_recompute: bool = False, return_intermediate_states: bool = False,
        state_v_first: bool = False, cu_seqlens: Any = None, cu_seqlens_cpu: Any = None, cp_context: Any = None,
        **kwargs: Any,
    ) -> Any:  # fmt: skip
        _require(q.shape == k.shape, "q and k must have the same shape")
        _require(g.shape == (*v.shape[:3], q.shape[3]), "g must have shape [B, T, HV, K]")
        _require(beta.shape == v.shape[:3], "beta must have shape [B, T, HV]")
        _require(initial_state is None or initial_state.dtype == torch.float32, "initial_state must be in float32.")
        out, final = _fla(q, k, v, g, beta, scale, initial_state, cu_seqlens)
        return out, final if output_final_state else None

    for call in (chunk_simple_gla, chunk_gla, chunk_gated_delta_rule, chunk_kda):
        setattr(module, call.__name__, call)
    return module


def mamba_ssd() -> ModuleType:
    """mamba_ssm.ops.triton.ssd_combined."""
    module = ModuleType("mamba_ssm.ops.triton.ssd_combined")

    def mamba_chunk_scan_combined(
        x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int, D: Any = None, z: Any = None,
        dt_bias: Any = None, initial_states: Any = None, seq_idx: Any = None, cu_seqlens: Any = None,
        dt_softplus: bool = False, dt_limit: Any = (0.0, float("inf")), return_final_states: bool = False,
        return_varlen_states: bool = False, state_dtype: Any = None,
    ) -> Any:  # fmt: skip
        batch, _, heads, _ = x.shape
        # _mamba_chunk_scan_combined_fwd's assertions, in its order
        _require(heads % B.shape[2] == 0, "nheads % ngroups == 0")
        _require(B.shape[:2] == x.shape[:2] and C.shape == B.shape, "B and C of (batch, seqlen, ngroups, dstate)")
        _require(dt.shape == x.shape[:3], "dt of (batch, seqlen, nheads)")
        _require(A.shape == (heads,), "A of (nheads,)")
        # MambaChunkScanCombinedFn.backward: "return_varlen_states is not supported in backward"
        _require(not return_varlen_states, "no varlen states where gradients are wanted")
        groups = heads // B.shape[2]
        outs, states = [], []
        for n in range(batch):
            step = dt[n].double()
            q, k = (t[n].double().repeat_interleave(groups, 1) for t in (C, B))
            start = x.new_zeros(heads, B.shape[3], x.shape[3], dtype=torch.float64)
            out, state = _scan((q, k, x[n].double() * step[..., None]), step * A.double(), None, start, 1.0)
            outs.append(out)
            states.append(state.transpose(-1, -2))  # (batch, nheads, headdim, dstate)
        # ssd_state_passing.py: `final_states = torch.empty(..., dtype=torch.float32)`
        out = torch.stack(outs).to(x.dtype)
        return (out, torch.stack(states).float()) if return_final_states else out

    module.mamba_chunk_scan_combined = mamba_chunk_scan_combined  # type: ignore[attr-defined]
    return module


def causal_conv1d() -> ModuleType:
    """causal_conv1d."""
    module = ModuleType("causal_conv1d")

    def causal_conv1d_fn(
        x: Tensor, weight: Tensor, bias: Any = None, seq_idx: Any = None, initial_states: Any = None,
        return_final_states: bool = False, final_states_out: Any = None, activation: Any = None,
    ) -> Tensor:  # fmt: skip
        if activation not in (None, "silu", "swish"):
            raise NotImplementedError("activation must be None, silu, or swish")
        channels, width = weight.shape
        _require(x.shape[1] == channels, "x of (batch, dim, seqlen)")
        _require(x.stride(2) == 1 or x.stride(1) == 1, "x.stride(2) == 1 || x.stride(1) == 1")  # made so, else
        if x.stride(1) == 1 and x.stride(2) > 1:  # csrc: is_channel_last
            _require(channels % 8 == 0, "causal_conv1d only supports channel dimension divisible by 8 for now")
            _require(x.stride(2) % 8 == 0 and x.stride(0) % 8 == 0, "channel last strides must be multiples of 8")
        _require(2 <= width <= 4, "causal_conv1d only supports width between 2 and 4")
        _require(bias is None or bias.dtype == weight.dtype, "bias.scalar_type() == weight_type")
        padded = torch.nn.functional.pad(x.double(), (width - 1, 0))
        bias = None if bias is None else bias.double()
        out = torch.nn.functional.conv1d(padded, weight.double()[:, None], bias, groups=channels)
        return (out if activation is None else torch.nn.functional.silu(out)).to(x.dtype)

    module.causal_conv1d_fn = causal_conv1d_fn  # type: ignore[attr-defined]
    return module
