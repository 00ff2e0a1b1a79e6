"""The local part of mixers by fused kernels: fla's and mamba_ssm's recurrences, causal_conv1d's convolution. CUDA only.

Written against the sources named below; not yet run on hardware. Every kernel starts from a state of zero and gives the
state at the end, so that no kernel waits for other ranks: what a fragment reads of its true initial state is added to
its rows when that has come. The map of the state of a gated recurrence is its decay. That of the delta rule comes from
the same call: beside v it gets K columns of zeros, whose initial state is the identity, so these end as the matrix A of
S -> A S + B, and what rows read of them is what rows read of any initial state.

Sources: github.com/fla-org/flash-linear-attention at bc3b101 (0.5.2), fla/ops/*/chunk.py; github.com/state-spaces/mamba
at e9594ce (2.3.2), mamba_ssm/ops/triton/ssd_combined.py; github.com/Dao-AILab/causal-conv1d at 0d2252d (1.6.1),
causal_conv1d_interface.py and csrc/causal_conv1d.cpp.

Shape legend: T local tokens, F fragments, G key heads, H value heads, K head dim of q and k, V of v, C channels.
"""

from __future__ import annotations

import importlib
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from cpattn.backends import installed

from .chunks import AffineMaps

Kernel = Literal["auto", "torch", "fused"]
# Where the kernels run; tests add the CPU for their fakes.
DEVICES = ["cuda"]
# fla/ops/common/chunk_delta_h.py: `assert K <= 256`.
MAX_DIM_K = 256
# csrc/causal_conv1d.cpp: `width >= 2 && width <= 4`.
CONV_WIDTHS = (2, 3, 4)
_PACKAGES = {
    "fla.ops": "flash-linear-attention",
    "mamba_ssm.ops.triton.ssd_combined": "mamba_ssm",
    "causal_conv1d": "causal_conv1d",
}


def takes_fused(kernel: Kernel, call: str, refusal: str | None) -> bool:
    """Whether the fused kernel is taken: with "auto" where nothing speaks against it.

    Raises:
        ValueError: kernel is "fused" and there is a refusal, or is no kernel.
    """
    if kernel not in ("auto", "torch", "fused"):
        raise ValueError(f"{call}: kernel is {kernel!r}: use 'auto', 'torch' or 'fused'")
    if kernel == "fused" and refusal is not None:
        raise ValueError(f"{call}: kernel is 'fused', and {refusal}: use kernel='auto' or 'torch'")
    return kernel != "torch" and refusal is None


def _refuse_place(x: Tensor, module: str) -> str | None:
    if x.device.type not in DEVICES:
        return f"tensors are on {x.device.type}, where its kernels do not run"
    return installed.missing_package(module, _PACKAGES[module]) or installed.failing_import(module, _PACKAGES[module])


def refuse_recurrence(q: Tensor, v: Tensor) -> str | None:
    """Why fla does not serve a recurrence, in words; None if it does."""
    if v.dtype not in (torch.bfloat16, torch.float16):
        return f"v is {v.dtype}: fla multiplies in TF32 at best, so it serves 16-bit numbers alone"
    if q.shape[-1] > MAX_DIM_K:
        return f"q and k have head dim {q.shape[-1]}: fla takes at most {MAX_DIM_K}"
    return _refuse_place(v, "fla.ops")


def refuse_mamba2(x: Tensor) -> str | None:
    """Why mamba_ssm does not serve a scan, in words; None if it does."""
    if x.dtype not in (torch.bfloat16, torch.float16):
        return f"x is {x.dtype}: mamba_ssm multiplies in TF32 at best, so it serves 16-bit numbers alone"
    return _refuse_place(x, "mamba_ssm.ops.triton.ssd_combined")


def refuse_convolution(x: Tensor, width: int) -> str | None:
    """Why causal_conv1d does not serve a convolution, in words; None if it does."""
    if width not in CONV_WIDTHS:
        return f"the width is {width}: causal_conv1d takes 2 to 4"
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"x is {x.dtype}: causal_conv1d takes fp32, fp16 and bf16"
    return _refuse_place(x, "causal_conv1d")


class FragmentWork(NamedTuple):
    """Fragments without their states. maps: of each, in fp32. out: from a state of zero, [T, H, V]. read: [T, H, K]."""

    maps: AffineMaps
    out: Tensor
    read: Tensor


def work_fragments(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, beta: Tensor | None, *, scale: float, bounds: Tensor
) -> FragmentWork:
    """Local work of all fragments in one call of fla; differentiable.

    Args:
        q, k: [T, G, K]. v: [T, H, V]. decay: log, [T, H] or [T, H, K], or None. beta: [T, H], or None.
        bounds: int64 [F + 1], first rows of the fragments, and T.
    """
    ops = importlib.import_module("fla.ops")
    q, k = (x.to(v.dtype) for x in (q, k))
    decay = None if decay is None else decay.float()
    if beta is not None:
        return _delta_rule(ops, (q, k, v), decay, beta, scale, bounds)
    q, k = (x.repeat_interleave(v.shape[1] // x.shape[1], 1) for x in (q, k))  # neither call groups heads
    by_channel = decay is not None and decay.dim() == 3
    call: Any = ops.chunk_gla if by_channel else ops.chunk_simple_gla
    gate = None if decay is None else decay[None]
    out, final = call(
        q[None], k[None], v[None], g=gate, scale=scale, output_final_state=True, cu_seqlens=bounds
    )
    until, last = _decay_so_far(decay, v, bounds)
    return FragmentWork(AffineMaps(last.unsqueeze(-1), final), out[0], q.float() * scale * until)


def _delta_rule(
    ops: Any, rows: tuple[Tensor, Tensor, Tensor], decay: Tensor | None, beta: Tensor, scale: float, bounds: Tensor
) -> FragmentWork:
    q, k, v = rows
    heads, dim_k, dim_v = v.shape[1], k.shape[2], v.shape[2]
    decay = beta.new_zeros(beta.shape, dtype=torch.float32) if decay is None else decay
    identity = torch.eye(dim_k, device=v.device).expand(len(bounds) - 1, heads, -1, -1)
    initial = torch.cat([identity.new_zeros(*identity.shape[:-1], dim_v), identity], dim=-1)
    beside = torch.cat([v, v.new_zeros(*v.shape[:2], dim_k)], dim=-1)
    call: Any = ops.chunk_kda if decay.dim() == 3 else ops.chunk_gated_delta_rule
    out, final = call(
        q[None],
        k[None],
        beside[None],
        g=decay[None],
        beta=beta[None].to(v.dtype),
        scale=scale,
        initial_state=initial,
        output_final_state=True,
        cu_seqlens=bounds,
    )
    of_zero, read = out[0].split([dim_v, dim_k], dim=-1)
    b, a = final.split([dim_v, dim_k], dim=-1)
    return FragmentWork(AffineMaps(a, b), of_zero, read.float())


def _decay_so_far(decay: Tensor | None, v: Tensor, bounds: Tensor) -> tuple[Tensor, Tensor]:
    """Decay from before its fragment to each row, [T, H, K or 1], and to the end of each fragment, [F, H, K or 1]."""
    if decay is None:
        one = torch.ones((), device=v.device)
        return one.expand(*v.shape[:2], 1), one.expand(len(bounds) - 1, v.shape[1], 1)
    decay = decay if decay.dim() == 3 else decay.unsqueeze(-1)
    # Sums over a whole rank, whose differences must keep the digits of one fragment: hence fp64.
    sums = torch.cat([decay.new_zeros(1, *decay.shape[1:], dtype=torch.float64), decay.double().cumsum(0)])
    begins = sums.index_select(0, bounds[:-1])
    until = sums[1:] - begins.repeat_interleave(bounds.diff(), 0)
    return until.exp().float(), (sums.index_select(0, bounds[1:]) - begins).exp().float()


def scan_chunks(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """Mamba-2 over chunks, each from a state of zero, by mamba_ssm; differentiable.

    Chunks are the kernel's batch: with cu_seqlens it has no backward for states, and no initial states with seq_idx.

    Args:
        x: [N, rows, H, V]. dt: [N, rows, H], 0 in rows that stand for nothing. A: [H]. B, C: [N, rows, G, K].

    Returns:
        (out [N, rows, H, V], the states at the end [N, H, K, V] in fp32).
    """
    scan: Any = importlib.import_module("mamba_ssm.ops.triton.ssd_combined")
    out, final = scan.mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size=x.shape[1], return_final_states=True)
    return out, final.transpose(-1, -2)


def convolve(rows: Tensor, weight_CW: Tensor, bias_C: Tensor | None, activation: str | None) -> Tensor:
    """Causal convolution along all rows [R, C] as one sequence, and the activation, by causal_conv1d: [R, C].

    Rows lie channel by channel last, which the kernel takes where C is a multiple of 8; else they are copied.
    """
    conv: Any = importlib.import_module("causal_conv1d")
    by_channel = rows.T[None]
    if rows.shape[1] % 8:
        by_channel = by_channel.contiguous()
    bias = None if bias_C is None else bias_C.to(rows.dtype)
    return conv.causal_conv1d_fn(by_channel, weight_CW.to(rows.dtype), bias, activation=activation)[0].T  # type: ignore[no-any-return]
