"""torchtitan's context parallelism on this project: `use_cpattn()` before the trainer is made.

It takes the place of torchtitan's two functions: the one that cuts a batch (`prepare_context_parallel_input`) and the
one that wraps inner attention (`apply_cp_to_forward`). Masks that torchtitan's models make (causal, packed documents,
sliding windows: flex, varlen and SDPA backends) become keys over one balanced placement.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torchtitan.distributed.context_parallel as theirs
import torchtitan.distributed.context_parallel.api as api
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask
from torchtitan.models.common.attention import VarlenAttention, VarlenMetadata

from cpattn.keys.make import make_key
from cpattn.ops.attention import attention

from .batch_layout import IGNORE_INDEX, BatchLayout, MaskTerm, layout_of_batch
from .shard import LayerMask, Shard, local_tokens

_NAMES = ("prepare_context_parallel_input", "apply_cp_to_forward")
# Those of a call are read off its tensors.
_HEADS: dict[str, Any] = {"num_heads_q": 1, "num_heads_kv": 1, "head_dim": 64}


def use_cpattn() -> None:
    """Put this module's functions in the place of torchtitan's, wherever they have been imported. Idempotent."""
    replaced = {name: getattr(api, name) for name in _NAMES}
    for name, original in replaced.items():
        ours = globals()[name]
        for module in list(sys.modules.values()):
            if getattr(module, "__name__", "").startswith("torchtitan") and getattr(module, name, None) is original:
                setattr(module, name, ours)
        setattr(theirs, name, ours)


def prepare_context_parallel_input(
    inputs: Tensor,
    labels: Tensor,
    extra_kwargs: dict[str, Any],
    cp_mesh: Any,
    device: Any = None,
    load_balancer_type: str | None = "headtail",
    ptrr_mask_key: str | None = None,
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """This rank's part of a batch, as one row [1, L]; ranks may have different L.

    Args:
        inputs, labels: [B, S]. extra_kwargs: has "positions" [B, S], and "attention_masks" where the model makes masks.
        cp_mesh: the ranks that share the batch.
        load_balancer_type, ptrr_mask_key: without effect: the placement is balanced for the mask.

    Returns:
        inputs, labels and extra_kwargs with positions of this rank's tokens, and masks for `apply_cp_to_forward`.

    Raises:
        ValueError: a mask is made of functions that are not known here; names them.
    """
    positions, masks = extra_kwargs["positions"].expand(inputs.shape), extra_kwargs.get("attention_masks")
    named = dict(masks) if isinstance(masks, Mapping) else {"": masks}
    terms = {name: _term(mask) for name, mask in named.items() if mask is not None}
    terms = terms or {"": (MaskTerm(causal=True), False)}
    by_document = {packed for _, packed in terms.values()}
    if len(by_document) > 1:
        raise ValueError(f"masks {sorted(terms)}: some keep packed documents apart and some do not")
    layout = layout_of_batch(*inputs.shape, positions=positions if by_document.pop() else None)
    shard = _shard(layout, cp_mesh, inputs.device)
    cut = {name: shard.mask((term,)) for name, (term, _) in terms.items()}
    kept = labels if labels.shape == inputs.shape else labels.view(inputs.shape)
    extra = {**extra_kwargs, "positions": shard.take(positions)}
    extra["attention_masks"] = cut if isinstance(masks, Mapping) else cut[""]
    targets = shard.take(kept)
    targets[:, shard.key.num_tokens :] = IGNORE_INDEX
    return shard.take(inputs), targets, extra


def _shard(layout: BatchLayout, cp_mesh: Any, device: torch.device) -> Shard:
    grain = max(1, min(512, layout.num_tokens // (16 * cp_mesh.size())))
    key = make_key(layout.spec, **_HEADS, cp_group=cp_mesh.get_group(), chunk_size=grain)
    local = layout.index_on(device)[local_tokens(key, device)]
    return Shard(key, layout, local if len(local) else local.new_zeros(1))


def _term(mask: Any) -> tuple[MaskTerm, bool]:
    """A mask's term within a text, and whether texts are packed documents (else rows)."""
    if isinstance(mask, VarlenMetadata):
        return MaskTerm(causal=True), True
    if not isinstance(mask, BlockMask):
        raise ValueError(f"attention_masks has a {type(mask).__name__}: BlockMask and VarlenMetadata are known")
    names = [getattr(mod, "__name__", str(mod)) for mod in _mods(mask.mask_mod)]
    found = [re.fullmatch(r"sliding_window_mod_window_size_(\d+)", name) for name in names]
    windows = [int(match[1]) for match in found if match]
    known = {"_causal_mask", "document_mask", "packed_document_mask"}
    unknown = [name for name, match in zip(names, found, strict=True) if name not in known and not match]
    causal = bool(windows) or "_causal_mask" in names
    if unknown or not causal:
        why = f"is made of {', '.join(unknown)}" if unknown else "is not causal"
        raise ValueError(f"a mask of torchtitan's {why}: causal, document and sliding window masks are served")
    left = min(windows) - 1 if windows else None
    return MaskTerm(causal=True, left=left), any("document" in name for name in names)


def _mods(mod: Callable[..., Any]) -> list[Callable[..., Any]]:
    """The functions that `and_masks` joined."""
    cells = [cell.cell_contents for cell in getattr(mod, "__closure__", None) or ()]
    parts = next((c for c in cells if isinstance(c, (tuple, list)) and c and all(callable(f) for f in c)), None)
    if getattr(mod, "__name__", "") != "and_mask" or parts is None:
        return [mod]
    return [inner for part in parts for inner in _mods(part)]


def apply_cp_to_forward(attention_modules: Sequence[nn.Module], cp_mesh: Any) -> None:
    """Let inner attention modules attend over all ranks' tokens, by the masks of `prepare_context_parallel_input`."""
    for module in attention_modules:
        module.forward = _forward(module, module.forward)  # type: ignore[method-assign]


def _forward(module: nn.Module, original: Callable[..., Any]) -> Callable[..., Any]:
    def forward(q: Tensor, k: Tensor, v: Tensor, *, attention_masks: Any = None, **kwargs: Any) -> Any:
        if not isinstance(attention_masks, LayerMask):
            return original(q, k, v, attention_masks=attention_masks, **kwargs)
        return _attend(module, q, k, v, attention_masks, **kwargs)

    return forward


def _attend(
    module: nn.Module,
    q_BLNH: Tensor,
    k_BLNH: Tensor,
    v_BLNH: Tensor,
    mask: LayerMask,
    *,
    scale: float | None = None,
    score_mod: Any = None,
    out_transform: Any = None,
    is_causal: bool = True,
    enable_gqa: bool = False,
    **other: Any,
) -> Tensor:
    name = type(module).__name__
    asked = [n for n, value in {"score_mod": score_mod, **other}.items() if value is not None]
    if asked or not is_causal:
        raise ValueError(f"{name}: {', '.join(asked) or 'is_causal=False'} is not served under context parallelism")
    if isinstance(module, VarlenAttention):
        mask = _windowed(module, mask)
    rows = mask.key.num_tokens
    q, k, v = (t[0, :rows] for t in (q_BLNH, k_BLNH, v_BLNH))
    key = mask.key.with_heads(q.shape[1], k.shape[1], q.shape[2], v.shape[2])
    out = attention(q, k, v, key, softmax_scale=scale, sink=_sink(name, out_transform))
    assert isinstance(out, Tensor)
    return F.pad(out, (0, 0, 0, 0, 0, q_BLNH.shape[1] - rows)).unsqueeze(0)


def _windowed(module: Any, mask: LayerMask) -> LayerMask:
    left, right = module.window_size
    if right != 0:
        raise ValueError(f"VarlenAttention with window_size {module.window_size}: causal ones, (W, 0), are served")
    return mask if left < 0 else mask.shard.mask((MaskTerm(causal=True, left=left),))


def _sink(name: str, out_transform: Any) -> Tensor | None:
    """GPT-OSS's sinks, which it applies to the output by the log-sum-exp: here a logit in the softmax, the same."""
    if out_transform is None:
        return None
    sinks = getattr(getattr(out_transform, "__self__", None), "sinks", None)
    if getattr(out_transform, "__name__", "") != "_apply_sinks" or not isinstance(sinks, Tensor):
        raise ValueError(f"{name}: out_transform {out_transform!r} is not known (GPT-OSS's sinks are): not served")
    return sinks.to_local() if hasattr(sinks, "to_local") else sinks
