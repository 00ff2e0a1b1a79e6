"""MagiAttention wiring of NeMo Automodel 0.7, on this runtime: its `components.distributed.context_parallel.magi`.

What `cpattn.automodel.magi_attn_utils` has, with the state that 0.7's dispatch calls. Its sharder tells where a rank's
tokens are by an index map and supposes that all ranks have equally many: so a rank with fewer tokens is filled up, with
the batch's padding and, past its end, with places that no token has. They are masked, have no label, and take no part
in attention.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import cpattn.automodel.magi_attn_utils as _before
from cpattn.automodel.magi_attn_utils import (
    _ACTIVE_ATTN_SPEC,
    _ACTIVE_CP_GROUP,
    _FLEX_KEY_CACHE,
    _MAGI_REGISTERED,
    _MAGI_SELF_KEY_LEN,
    DEFAULT_CHUNK_SIZE,
    AttnMaskSpec,
    _build_self_key,
    _flex_key_for,
    _get_head_config,
    _iter_language_model_attention,
    _packed_cp_doc_seqlens,
    _self_key_for,
    _set_cp_group_on_attention,
    build_flex_key,
    get_active_attn_spec,
    get_active_cp_group,
    get_cp_group,
    is_magi_available,
    logger,
    magi_prepare_batch,
    magi_prepare_packed_cp,
    magi_prepare_vlm,
    make_magi_attn_func,
    register_magi_attention,
    set_active_attn_spec,
    set_active_cp_group,
)
from cpattn.integrations.batch_layout import IGNORE_INDEX
from cpattn.integrations.shard import Shard

__all__ = [
    "DEFAULT_CHUNK_SIZE",
    "_ACTIVE_ATTN_SPEC",
    "_ACTIVE_CP_GROUP",
    "_FLEX_KEY_CACHE",
    "_MAGI_REGISTERED",
    "_MAGI_SELF_KEY_LEN",
    "AttnMaskSpec",
    "MagiState",
    "_build_self_key",
    "_flex_key_for",
    "_get_head_config",
    "_iter_language_model_attention",
    "_packed_cp_doc_seqlens",
    "_self_key_for",
    "_set_cp_group_on_attention",
    "build_flex_key",
    "get_active_attn_spec",
    "get_active_cp_group",
    "get_cp_group",
    "is_magi_available",
    "logger",
    "magi_prepare_batch",
    "magi_prepare_packed_cp",
    "magi_prepare_vlm",
    "make_magi_attn_func",
    "register_magi_attention",
    "set_active_attn_spec",
    "set_active_cp_group",
    "setup_magi",
]


@dataclass
class MagiState(_before.MagiState):
    """What `setup_magi` resolved; Automodel's dispatch makes one for each step.

    enabled, custom, cp_group, cp_size: as of `magi_attn_utils.MagiState`. domain: "llm" or "vlm". device_mesh: kept for
    callers; not used.
    """

    domain: str = "llm"
    device_mesh: Any = None

    def prepare_llm_batch(  # type: ignore[override]
        self, model: nn.Module | None, batch: dict, *, device_mesh: Any, is_thd: bool, pad_id: int, num_chunks: int
    ) -> tuple[Any, dict, Tensor | None]:
        """(context class, batch, local_indices) of a step; assumes `enabled`. Arguments as there.

        Returns:
            local_indices: int64 [L], for each local token its place among the batch's, row * columns + column, or past
            their end; None where the batch was not shared out. All ranks have the same L.

        Raises:
            ValueError: several chunks; or a batch is to be shared out and there is no model to ask for its heads.
        """
        shared_out = self.hf_dispatch or (self.custom and self.cp_size > 1)
        if shared_out and model is None:
            raise ValueError("model is None: a batch is shared out by the model's heads; pass the model")
        total = 0 if batch.get("input_ids") is None else batch["input_ids"].numel()
        # None where nothing is shared out, and the model is not looked at.
        whose: Any = model
        context, prepared = super().prepare_llm_batch(whose, batch, device_mesh, is_thd, pad_id, num_chunks)
        if not shared_out:
            return context, prepared, None
        assert model is not None
        step = _before._LAST_STEP[model]
        return context, prepared, _fill(prepared, _own_places(step, total), step, total, pad_id)

    def make_cp_batch(
        self,
        cp_mesh: Any,
        batch: dict,
        *,
        padding_token_id: int = 0,
        num_chunks: int = 1,
        is_thd: bool = False,
        model: nn.Module | None = None,
        return_local_indices: bool = False,
    ) -> dict | tuple[dict, Tensor | None]:
        """A step's batch, sharded where ranks share it; with return_local_indices also where its tokens are.

        Args:
            cp_mesh: not needed: the group is the state's.
            batch: whole.
            padding_token_id: what fills shards up to the same length.
            num_chunks: pipeline chunks; only 1 is served.
            is_thd: packed for a flat layout.
            model: whose attention gets the batch.
            return_local_indices: as `prepare_llm_batch` says; None in the domain "vlm".
        """
        places = None
        if self.domain == "vlm":
            _, prepared = self.prepare_vlm_batch(model, batch)  # type: ignore[arg-type]
        else:
            _, prepared, places = self.prepare_llm_batch(
                model,
                batch,
                device_mesh=self.device_mesh,
                is_thd=is_thd,
                pad_id=padding_token_id,
                num_chunks=num_chunks,
            )
        return (prepared, places) if return_local_indices else prepared


def setup_magi(cfg: Any, device_mesh: Any, *, domain: str = "llm", label: str = "") -> MagiState:
    """As `magi_attn_utils.setup_magi`, for a domain: "llm" or "vlm".

    Raises:
        ValueError: another domain.
    """
    if domain not in ("llm", "vlm"):
        raise ValueError(f"domain is {domain!r}: 'llm' or 'vlm'")
    custom = str(cfg.get("model.backend.attn", "")) == "magi"
    if not custom and str(cfg.get("model.attn_implementation", "")) != "magi":
        return MagiState(domain=domain)
    if not is_magi_available():
        raise RuntimeError("attention 'magi' is configured and cpattn is not importable")
    register_magi_attention()
    group = get_cp_group(device_mesh)
    size = 1 if group is None else group.size()
    if custom:
        set_active_cp_group(group)
    path = "custom" if custom else "HF"
    logger.info("magi attention%s: %s path, %d ranks", f" ({label})" if label else "", path, size)
    return MagiState(True, custom, group, size, domain, device_mesh)


def _own_places(step: Any, total: int) -> np.ndarray:
    """The place of each real token of the step just prepared, in the key's order; [0, total) where all are."""
    layout = getattr(step, "layout", None)
    return np.arange(total) if layout is None else layout.index


def _fill(batch: dict, places: np.ndarray, step: Any, total: int, pad_id: int) -> Tensor:
    """Fill a shard up to the longest rank's length, in place; returns its index map."""
    key = step.key
    owned = [places[key.q_placement.tokens_of(rank)] for rank in range(key.cp_size)]
    length = max(*(len(own) for own in owned), -(-total // key.cp_size), 1)
    unused = np.setdiff1d(np.arange(total), places, assume_unique=True)
    spare = np.concatenate([unused, np.arange(total, length * key.cp_size)])
    begins = np.cumsum([0, *(length - len(own) for own in owned)])
    index = np.concatenate([owned[key.cp_rank], spare[begins[key.cp_rank] : begins[key.cp_rank + 1]]])
    present = batch["input_ids"].numel()
    for name, value in batch.items():
        if isinstance(value, Tensor):
            batch[name] = _filled(name, value, present, length, pad_id)
    local = torch.from_numpy(index).to(batch["input_ids"].device)
    if isinstance(step, Shard):
        step.index = local
    else:
        step.length = length
    return local


def _filled(name: str, value: Tensor, present: int, length: int, pad_id: int) -> Tensor:
    """A tensor [present, ...] or [1, present, ...] of the local tokens at the new length; others as they are."""
    dim = next((d for d in range(min(value.ndim, 2)) if value.shape[: d + 1] == (1,) * d + (present,)), None)
    if dim is None or present == length:
        return value
    fills = {"input_ids": pad_id, "labels": IGNORE_INDEX, "padding_mask": 1, "attention_mask": 1}
    return F.pad(value, [0, 0] * (value.ndim - dim - 1) + [0, length - present], value=fills.get(name, 0))
