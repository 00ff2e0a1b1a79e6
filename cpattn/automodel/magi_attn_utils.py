"""MagiAttention wiring of NeMo Automodel, on this runtime: replace the import and keep the recipe.

"magi" names the engine of this package here. Names, signatures and defaults are those of Automodel's
`components.distributed.magi_attn_utils`, before 0.7; `context_parallel.magi` has those of 0.7. The numbers are right
where the original's were not (any batch size, padding, packed documents, windows, sinks, softcap, prefix trees and
vision models at any number of ranks, fp16 and fp32), and what cannot be served is refused by name.

Two paths, as in the original:

- `attn_implementation="magi"` (transformers models): `magi_prepare_batch` or `magi_prepare_vlm` shards a
  batch; the mask travels through the model in the place of `attention_mask`.
- `backend.attn="magi"` (custom models): `magi_prepare_packed_cp` shards a batch, and the function of
  `make_magi_attn_func` finds its key in the argument `magi_attn_spec` that the new batch carries, or, in
  a model that does not pass that on, takes the key of the group's last prepared step.

Labels are taken as they are (Automodel shifts them in its datasets) and sharded like the tokens; the
loss of a rank is its share, and the recipe's reduction over the ranks adds the shares up.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from cpattn.integrations.batch_layout import IGNORE_INDEX, BatchLayout
from cpattn.keys.key import AttnKey
from cpattn.keys.make import make_key
from cpattn.masks.spec import AttnMaskSpec
from cpattn.ops.attention import attention
from cpattn.ops.layout import dispatch, position_ids

from .kept_masks import keep_masks
from .local_masks import NO_WINDOW, document_segments, normal_window, spec_of_segments

if TYPE_CHECKING:
    from cpattn.integrations.transformers import ContextParallel, Shard

__all__ = [
    "DEFAULT_CHUNK_SIZE",
    "AttnMaskSpec",
    "MagiState",
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

logger = logging.getLogger(__name__)

DEFAULT_CHUNK_SIZE = 512

_MAGI_REGISTERED = False
_ACTIVE_CP_GROUP: dist.ProcessGroup | None = None
_ACTIVE_ATTN_SPEC: AttnMaskSpec | None = None
# (id of group, fingerprint, heads) -> (group, key). The group is kept, so that its id cannot come to
# mean another one; keys differ by mask, heads and dims, and alternating masks do not evict each other.
_FLEX_KEY_CACHE: dict = {}
# id of group -> length of the last causal key. A record only: keys are found by what they are made of.
_MAGI_SELF_KEY_LEN: dict = {}

_MAX_FLEX_KEYS = 64
_PADDING_ENTRY = -1000  # fill of seq_lens
_BOOKKEEPING = {"max_seqlen", "max_seqlen_q", "max_seqlen_kv", "qkv_format", "cp_size", "cp_rank", "seq_lens"}
_DOCUMENTS = ("cu_seqlens_q", "cu_seqlens_kv", "cu_seqlens_q_padded", "cu_seqlens_kv_padded")
_PACKING = ("cu_seqlens", "cu_seqlens_padded", "seq_lens", "seq_lens_padded", "max_seqlen", "qkv_format")


class StepSpec(AttnMaskSpec):
    """The mask of a prepared step, together with the key that the step was sharded with."""

    key: AttnKey | None = None


class _Step:
    """A prepared step of the custom path: its group (kept alive), its key, and whether a layer used it.

    layout: of a batch of rows, which tokens are real. length: rows that this rank's tensors are filled up to, behind
    the key's own (`context_parallel.magi`); they attend to nothing.
    """

    def __init__(self, group: Any, key: AttnKey, layout: BatchLayout | None = None) -> None:
        self.group, self.key, self.layout, self.used = group, key, layout, False
        self.length = key.num_tokens


_STEPS_BY_GROUP: dict[int, _Step] = {}
_LAST_STEP: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()


# ----------------------------------------------------------------------------------------------------
# Registration, group and mask.


def is_magi_available() -> bool:
    """Whether the engine can be imported. It needs no package besides torch and numpy."""
    try:
        import cpattn.ops.attention  # noqa: F401
    except Exception as error:
        logger.debug("cpattn is not importable: %s", error)
        return False
    return True


def register_magi_attention() -> None:
    """Register "magi" in transformers, for attention and for masks. Idempotent."""
    global _MAGI_REGISTERED
    if _MAGI_REGISTERED:
        return
    from cpattn.integrations.transformers import register_attention

    register_attention("magi")
    _MAGI_REGISTERED = True


def set_active_cp_group(cp_group: dist.ProcessGroup | None) -> None:
    """Set the group that attention functions of custom models use."""
    global _ACTIVE_CP_GROUP
    _ACTIVE_CP_GROUP = cp_group


def get_active_cp_group() -> dist.ProcessGroup | None:
    """The group set by `set_active_cp_group`; None is this rank alone."""
    return _ACTIVE_CP_GROUP


def set_active_attn_spec(spec: AttnMaskSpec | None) -> None:
    """Set the mask of the next step, on both paths; None for causal."""
    global _ACTIVE_ATTN_SPEC
    _ACTIVE_ATTN_SPEC = spec


def get_active_attn_spec() -> AttnMaskSpec | None:
    """The mask set by `set_active_attn_spec`."""
    return _ACTIVE_ATTN_SPEC


def get_cp_group(device_mesh: Any) -> dist.ProcessGroup | None:
    """The group of the mesh's axis "cp"; None without a mesh or without that axis."""
    if device_mesh is None or "cp" not in (device_mesh.mesh_dim_names or ()):
        return None
    return device_mesh["cp"].get_group()  # type: ignore[no-any-return]


def setup_magi(cfg: Any, device_mesh: Any, label: str = "") -> MagiState:
    """Resolve the recipe's configuration: register the attention and find the group.

    Args:
        cfg: has `.get("dotted.key", default)`; "magi" under model.backend.attn (custom models) or
            model.attn_implementation (transformers models) enables.
        device_mesh: its axis "cp" is the group; without one each rank attends alone, on this engine.
        label: for the log line.
    """
    custom = str(cfg.get("model.backend.attn", "")) == "magi"
    if not custom and cfg.get("model.attn_implementation", None) != "magi":
        return MagiState()
    if not is_magi_available():
        raise RuntimeError("attention 'magi' is configured and cpattn is not importable")
    register_magi_attention()
    group = get_cp_group(device_mesh)
    size = 1 if group is None else dist.get_world_size(group)
    if custom:
        set_active_cp_group(group)
    path = "custom" if custom else "HF"
    logger.info("magi attention%s: %s path, %d ranks", f" ({label})" if label else "", path, size)
    return MagiState(True, custom, group, size)


# ----------------------------------------------------------------------------------------------------
# Keys.


def build_flex_key(
    spec: AttnMaskSpec,
    num_heads_q: int,
    num_heads_kv: int,
    head_dim: int,
    cp_group: Any,
) -> AttnKey:
    """A key for any mask; nothing is padded."""
    return _make_key(spec, (num_heads_q, num_heads_kv, head_dim), cp_group, DEFAULT_CHUNK_SIZE)


def _flex_key_for(cp_group: Any, spec: AttnMaskSpec, num_heads_q: int, num_heads_kv: int, head_dim: int) -> AttnKey:
    """The key of a mask, heads and group; made once for each."""
    name = (id(cp_group), spec.fingerprint(), num_heads_q, num_heads_kv, head_dim)
    entry = _FLEX_KEY_CACHE.pop(name, None)
    if entry is None:
        entry = (cp_group, build_flex_key(spec, num_heads_q, num_heads_kv, head_dim, cp_group))
    _FLEX_KEY_CACHE[name] = entry  # the last used is the last to go
    while len(_FLEX_KEY_CACHE) > _MAX_FLEX_KEYS:
        del _FLEX_KEY_CACHE[next(iter(_FLEX_KEY_CACHE))]
    return entry[1]  # type: ignore[no-any-return]


def _build_self_key(
    cp_group: Any, seqlen: int, num_heads_q: int, num_heads_kv: int, head_dim: int, device: Any
) -> AttnKey:
    """A key for one causal sequence. device is not needed: a key serves all."""
    return build_flex_key(AttnMaskSpec.causal(seqlen), num_heads_q, num_heads_kv, head_dim, cp_group)


def _self_key_for(
    cp_group: Any, seqlen: int, num_heads_q: int, num_heads_kv: int, head_dim: int, device: Any
) -> AttnKey:
    """The key of one causal sequence, from the cache. Which key was used last does not matter."""
    _MAGI_SELF_KEY_LEN[id(cp_group)] = seqlen
    return _flex_key_for(cp_group, AttnMaskSpec.causal(seqlen), num_heads_q, num_heads_kv, head_dim)


def _make_key(spec: AttnMaskSpec, heads: tuple[int, int, int], cp_group: Any, chunk_size: int) -> AttnKey:
    size = 1 if cp_group is None else dist.get_world_size(cp_group)
    return make_key(
        spec,
        num_heads_q=heads[0],
        num_heads_kv=heads[1],
        head_dim=heads[2],
        cp_group=cp_group,
        chunk_size=max(1, min(chunk_size, spec.total_seqlen // (16 * size))),
    )


# ----------------------------------------------------------------------------------------------------
# Models.


def _get_head_config(model: Any) -> tuple[int, int, int]:
    """(num_heads_q, num_heads_kv, head_dim) of a model or a configuration; of the text part, of a vision model.

    Layers with other heads, and tensor-parallel shares, are found at the call from the tensors.
    """
    config = getattr(model, "config", model)
    if not hasattr(config, "num_attention_heads") and getattr(config, "text_config", None) is not None:
        config = config.text_config
    heads = int(config.num_attention_heads)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return heads, int(getattr(config, "num_key_value_heads", None) or heads), int(head_dim)


def _set_cp_group_on_attention(model: nn.Module, cp_group: Any) -> None:
    """Note the group on every attention module; None takes the note away."""
    for module in getattr(model, "module", model).modules():
        if "Attention" in type(module).__name__:
            module.cp_group = cp_group


def _iter_language_model_attention(model: nn.Module) -> Iterator[nn.Module]:
    """Attention modules of the language model only.

    The language model is the one that a transformers model names as its decoder, or an attribute
    language_model. A plain language model is taken whole.

    Raises:
        ValueError: the model has a vision configuration and its language model cannot be found.
    """
    root: Any = getattr(model, "module", model)
    tower = getattr(root, "language_model", None) or getattr(getattr(root, "model", None), "language_model", None)
    if tower is None and callable(getattr(root, "get_decoder", None)):
        tower = root.get_decoder()
    if tower is None:
        if getattr(getattr(root, "config", None), "vision_config", None) is not None:
            raise ValueError(
                f"{type(root).__name__} has a vision_config and no language_model or get_decoder(): its vision "
                f"tower would get the language model's mask"
            )
        tower = root
    for module in tower.modules():
        if "Attention" in type(module).__name__:
            yield module


# ----------------------------------------------------------------------------------------------------
# Preparing a step.


def magi_prepare_batch(
    model: nn.Module,
    batch: dict,
    cp_group: dist.ProcessGroup | None,
    chunk_size: int = DEFAULT_CHUNK_SIZE,
) -> tuple[dict, AttnKey]:
    """Shard a batch for a transformers model.

    Args:
        model: the causal language model, possibly wrapped.
        batch: input_ids [B, S] (or [T] with cu_seqlens); where there are, attention_mask or padding_mask, position_ids,
            labels (shifted already), and documents as cu_seqlens, seq_lens or restarting positions. The
            active mask (`set_active_attn_spec`), if it is set, takes the place of the causal one.
        cp_group: the ranks that share the batch.
        chunk_size: grain of placement, at most.

    Returns:
        (new_batch, key). new_batch has input_ids, position_ids and labels [1, L] of this rank's tokens
        and an attention_mask that carries the mask: pass it to the model as it is. Other entries are
        sharded if they are [B, S, ...], and untouched otherwise.

    Raises:
        ValueError: input_ids are missing, or the batch and the active mask do not fit.
    """
    shard = _shard_text(model, batch, cp_group, chunk_size)
    new_batch = {**_other_entries(batch, shard), **shard.inputs}
    new_batch.pop("padding_mask", None)  # said by attention_mask; transformers' layers know no such argument
    shard.inputs = {}  # the shard lives on with the graph, the batch need not
    if shard.targets is not None:
        new_batch["labels"] = shard.targets
    _set_cp_group_on_attention(model, cp_group)
    _LAST_STEP[model] = shard
    return new_batch, shard.key


def magi_prepare_packed_cp(model: nn.Module, batch: dict, cp_group: Any) -> tuple[dict, AttnKey]:
    """Shard a packed batch for a custom model.

    Args:
        model: for its head counts.
        batch: flat input_ids [T] (or [1, T]) with cu_seqlens (and cu_seqlens_padded, where documents are
            padded); where there are, labels, position_ids and padding_mask, as long.
        cp_group: the ranks that share the batch.

    Returns:
        (new_batch, key): input_ids, position_ids, labels and padding_mask [L] of this rank's tokens,
        qkv_format, and magi_attn_spec, the mask with its key, for the attention function. Positions are
        those of the batch, or else count from 0 in each document.
    """
    ids = batch["input_ids"].flatten()
    total = ids.numel()
    spec = get_active_attn_spec()
    if spec is None:
        spec = AttnMaskSpec.varlen(_packed_cp_doc_seqlens(batch, total))
    elif spec.total_seqlen != total:
        raise ValueError(f"the active mask is over {spec.total_seqlen} tokens and the batch has {total}")
    key = build_flex_key(spec, *_get_head_config(model), cp_group)
    positions = batch.get("position_ids")
    if positions is not None and positions.numel() != total:
        raise ValueError(f"position_ids have {positions.numel()} entries and input_ids {total}: they must agree")
    new_batch = {
        "input_ids": dispatch(ids, key),
        "position_ids": _positions(key, ids.device) if positions is None else dispatch(positions.flatten(), key),
        "qkv_format": "thd",
        "magi_attn_spec": _step_spec(key),
    }
    for name in ("labels", "padding_mask"):
        if batch.get(name) is not None:
            new_batch[name] = dispatch(batch[name].flatten(), key)
    _begin_step(model, cp_group, key)
    return new_batch, key


def magi_prepare_vlm(
    model: nn.Module,
    batch: dict,
    cp_group: dist.ProcessGroup | None,
) -> tuple[dict, None]:
    """Prepare a batch for a transformers vision-language model, for any number of ranks.

    The model gets the whole batch, since image features are placed by token; its vision tower runs as
    it always does, on every rank, and the shard is taken where the language model begins. Image tokens
    see each other both ways where the model asks for that.

    Returns:
        (new_batch, None): the batch with an attention_mask that carries the shard, and with labels
        [1, L] of the tokens whose logits this rank's model returns.

    Raises:
        ValueError: input_ids are missing.
    """
    if batch.get("input_ids") is None or batch["input_ids"].ndim != 2:
        raise ValueError("a vision-language batch needs input_ids [B, S] (such as [1, S])")
    parallel = _parallel(model, cp_group, DEFAULT_CHUNK_SIZE)
    entries = dict(batch)
    shard = parallel.shard({**entries, "labels": None, "shift_labels": entries.pop("labels", None)})
    new_batch = {**entries, **shard.inputs}
    shard.inputs = {}
    if shard.targets is not None:
        new_batch["labels"] = shard.targets
    for module in _iter_language_model_attention(model):
        module.cp_group = cp_group  # type: ignore[assignment]
    _LAST_STEP[model] = shard
    return new_batch, None


def _packed_cp_doc_seqlens(batch: dict, total_len: int) -> list:
    """Lengths of the documents over the padded layout of `total_len` tokens.

    Padding behind a document counts as its end: causal masking hides it from the tokens before it.

    Raises:
        ValueError: the documents do not span total_len.
    """
    sums = batch["cu_seqlens_padded"] if batch.get("cu_seqlens_padded") is not None else batch["cu_seqlens"]
    sums = sums.flatten()
    lengths: list = torch.diff(sums[sums >= 0]).tolist()
    if sum(lengths) != total_len:
        raise ValueError(
            f"documents of cu_seqlens span {sum(lengths)} tokens != flat input length {total_len}: pass "
            f"cu_seqlens_padded where documents are padded"
        )
    return lengths


def _parallel(model: nn.Module, cp_group: Any, chunk_size: int, check: bool = True) -> ContextParallel:
    from cpattn.integrations.transformers import ContextParallel

    keep_masks(model)
    # The probe is for transformers' models; of a custom one the next step says if no layer used the mask.
    return ContextParallel(model, cp_group, max_chunk_size=chunk_size, check=check)


def _shard_text(model: nn.Module, batch: dict, cp_group: Any, chunk_size: int, check: bool = True) -> Shard:
    ids = batch.get("input_ids")
    if not isinstance(ids, Tensor):
        raise ValueError("the batch needs input_ids [B, S]; with local_batch_size=1 that is [1, S]")
    rows = {name: batch.get(name) for name in ("input_ids", "position_ids", "attention_mask", "labels")}
    if ids.ndim == 1:
        rows = {name: value if value is None else value.reshape(1, -1) for name, value in rows.items()}
    core = {name: value for name, value in rows.items() if value is not None}
    _mark_padding(core, batch.get("padding_mask"))
    core["shift_labels"] = core.pop("labels", None)
    spec = get_active_attn_spec()
    if spec is not None:
        mask = core.pop("attention_mask", None)
        if mask is not None and not bool(mask.all()):
            raise ValueError("the active mask is the whole mask and attention_mask has padding: pass one of them")
    else:
        _mark_documents(core, batch)
    parallel = _parallel(model, cp_group, chunk_size, check)
    parallel.has_other_modalities = False
    return parallel.shard(core, spec=spec)


def _mark_padding(core: dict, padding: Tensor | None) -> None:
    """What a padding_mask (True at padding: Automodel's collaters give it beside the attention_mask) masks."""
    if padding is not None:
        real = ~padding.reshape(core["input_ids"].shape).bool()
        given = core.get("attention_mask")
        if given is None or given.ndim == 2:
            core["attention_mask"] = real if given is None else real & given.bool()


def _mark_documents(core: dict, batch: dict) -> None:
    """Documents of cu_seqlens or seq_lens, over the rows laid end to end, and a mask of what pads them."""
    rows, columns = core["input_ids"].shape
    real, padded = batch.get("seq_lens"), batch.get("seq_lens_padded")
    if batch.get("cu_seqlens") is not None:
        sums = batch["cu_seqlens"].flatten()
        starts = batch["cu_seqlens_padded"].flatten() if batch.get("cu_seqlens_padded") is not None else sums
        lengths = torch.diff(sums[sums >= 0]).tolist()
        spans = [(start, start + n) for start, n in zip(starts[starts >= 0].tolist(), lengths, strict=False)]
        if spans and spans[-1][1] > rows * columns:
            raise ValueError(f"cu_seqlens ends at {spans[-1][1]} and the batch is {(rows, columns)}")
    elif real is not None:
        lengths = real.reshape(rows, -1).tolist()
        spans = list(_row_spans(lengths, lengths if padded is None else padded.reshape(rows, -1).tolist(), columns))
    else:
        return
    mask = torch.zeros(rows * columns, dtype=torch.bool)
    for start, end in spans:
        mask[start:end] = True
    mask = mask.view(rows, columns).to(core["input_ids"].device)
    given = core.get("attention_mask")
    core["attention_mask"] = mask if given is None else mask & given.bool()
    core["cu_seq_lens_q"] = torch.tensor([*(start for start, _ in spans), rows * columns])


def _row_spans(real: list[list[int]], padded: list[list[int]], columns: int) -> Iterator[tuple[int, int]]:
    """[start, end) of the real tokens of each document in the flattened rows."""
    for row, (lengths, steps) in enumerate(zip(real, padded, strict=True)):
        at = row * columns
        for length, step in zip(lengths, steps, strict=True):
            if length >= 0:
                yield at, at + length
                at += step


def _other_entries(batch: dict, shard: Shard) -> dict:
    shape = (shard.layout.rows, shard.layout.columns)
    handled = {"input_ids", "position_ids", "attention_mask", "labels", *_PACKING}
    return {
        name: shard.take(value) if isinstance(value, Tensor) and tuple(value.shape[:2]) == shape else value
        for name, value in batch.items()
        if name not in handled
    }


def _positions(key: AttnKey, device: torch.device) -> Tensor:
    return position_ids(key, stream=key.spec.documents is None, device=device)


def _step_spec(key: AttnKey) -> StepSpec:
    spec = key.spec
    step = StepSpec(spec.q_ranges, spec.k_ranges, spec.mask_types, spec.total_seqlen, None, spec.documents)
    step.key = key
    return step


def _begin_step(model: nn.Module, cp_group: Any, key: AttnKey, layout: BatchLayout | None = None) -> None:
    _STEPS_BY_GROUP[id(cp_group)] = _LAST_STEP[model] = _Step(cp_group, key, layout)


@dataclass
class MagiState:
    """What `setup_magi` resolved; recipes keep it and prepare each step with it.

    enabled: whether "magi" is configured. custom: a custom model rather than a transformers one.
    cp_group, cp_size: the ranks that share a batch.
    """

    enabled: bool = False
    custom: bool = False
    cp_group: dist.ProcessGroup | None = None
    cp_size: int = 1

    @property
    def hf_dispatch(self) -> bool:
        """Whether batches are sharded for a transformers model."""
        return self.enabled and not self.custom

    def prepare_llm_batch(
        self, model: nn.Module, batch: dict, device_mesh: Any, is_thd: bool, pad_id: int, num_chunks: int
    ) -> tuple[Callable[[], Any], dict]:
        """(context class, batch) of a step; assumes `enabled`.

        An entry prefix_tree of the batch, (node_lengths, sample_paths), is its mask, on both paths and
        for any number of ranks; without one the mask is that of the documents.

        Args:
            is_thd: the batch is packed for a flat layout: seq_lens tell its documents.
            pad_id: not needed: padding is known from the lengths.
            num_chunks: pipeline chunks; only 1 is served.

        Raises:
            ValueError: several chunks.
            RuntimeError: no attention layer used the mask of the step before: the model does not attend
                through this engine, and would have attended over its shard alone.
        """
        if num_chunks not in (None, 1):
            raise ValueError(f"num_chunks is {num_chunks}: split the batch first and prepare each chunk by itself")
        _require_used(model)
        entries = dict(batch)
        tree = entries.pop("prefix_tree", None)
        set_active_attn_spec(None if tree is None else AttnMaskSpec.prefix_tree(*tree)[0])
        if self.hf_dispatch:
            return nullcontext, magi_prepare_batch(model, entries, self.cp_group)[0]
        if is_thd:
            entries = _thd_batch(entries)
            if self.cp_size > 1:
                return nullcontext, magi_prepare_packed_cp(model, entries, self.cp_group)[0]
            return nullcontext, entries
        if self.cp_size > 1:
            return nullcontext, _prepare_rows_cp(model, entries, self.cp_group)
        return nullcontext, entries

    def prepare_vlm_batch(self, model: nn.Module, batch: dict) -> tuple[Callable[[], Any], dict]:
        """(context class, batch) of a step of a vision-language model; assumes `enabled`.

        Raises:
            ValueError: a custom model over several ranks: where its language model begins is not known.
        """
        _require_used(model)
        set_active_attn_spec(None)
        if not self.custom:
            return nullcontext, magi_prepare_vlm(model, batch, self.cp_group)[0]
        if self.cp_size > 1:
            raise ValueError(
                f"a custom vision-language model over {self.cp_size} ranks: use the transformers model "
                f"(attn_implementation='magi'), or dispatch its embeddings with cpattn.dispatch"
            )
        return nullcontext, batch


def _require_used(model: nn.Module | None) -> None:
    last = None if model is None else _LAST_STEP.get(model)
    used = True if last is None else last.used if isinstance(last, _Step) else last.num_layers_run > 0
    if not used:
        raise RuntimeError(
            f"no attention layer of {type(model).__name__} used the mask of the step before: it does not attend "
            f"through 'magi' (is backend.attn or attn_implementation honoured by this model class?)"
        )


def _prepare_rows_cp(model: nn.Module, batch: dict, cp_group: Any) -> dict:
    """Rows [B, S] of a custom model: its tokens, sharded, as one row [1, L]."""
    shard = _shard_text(model, batch, cp_group, DEFAULT_CHUNK_SIZE, check=False)
    local = {name: shard.inputs[name] for name in ("input_ids", "position_ids")}
    if shard.targets is not None:
        local["labels"] = shard.targets
    _begin_step(model, cp_group, shard.key, shard.layout)
    return {**_other_entries(batch, shard), **local, "magi_attn_spec": _step_spec(shard.key)}


def _thd_batch(batch: dict) -> dict:
    """Rows [B, S] with seq_lens as one flat sequence [B * S] with cu_seqlens; flat batches as they are.

    The mask goes along as magi_attn_spec: it knows of padding between documents, and of a batch of one
    document, which cu_seqlens alone do not tell.
    """
    flat = dict(batch)
    ids = batch["input_ids"]
    if batch.get("seq_lens") is not None:
        rows, columns = ids.shape
        real = flat.pop("seq_lens").reshape(rows, -1).tolist()
        padded = flat.pop("seq_lens_padded", None)
        spans = list(_row_spans(real, real if padded is None else padded.reshape(rows, -1).tolist(), columns))
        lengths = [end - start for start, end in spans]
        sums = torch.tensor([0, *lengths]).cumsum(0)
        flat["cu_seqlens"] = sums.to(ids.device, torch.int32)
        starts = [*(start for start, _ in spans), rows * columns]
        flat["cu_seqlens_padded"] = torch.tensor(starts, dtype=torch.int32, device=ids.device)
        flat["max_seqlen"] = max(lengths, default=0)
        is_padding = torch.ones(rows * columns, dtype=torch.bool, device=ids.device)
        for start, end in spans:
            is_padding[start:end] = False
        flat["padding_mask"] = is_padding
    for name in ("input_ids", "labels", "position_ids"):
        if flat.get(name) is not None:
            flat[name] = flat[name].flatten()
    if flat.get("labels") is not None and "padding_mask" in flat:
        flat["labels"] = flat["labels"].masked_fill(flat["padding_mask"], IGNORE_INDEX)
    flat["qkv_format"] = "thd"
    spec = get_active_attn_spec()
    if spec is None and flat.get("cu_seqlens") is not None:
        spec = AttnMaskSpec.varlen(_packed_cp_doc_seqlens(flat, flat["input_ids"].numel()))
    if spec is not None:
        flat["magi_attn_spec"] = spec
    return flat


# ----------------------------------------------------------------------------------------------------
# The attention function of custom models.


def make_magi_attn_func(softmax_scale: float | None = None) -> Callable[..., Tensor]:
    """The attention function of custom models.

    Args:
        softmax_scale: factor on the scores; None is head_dim ** -0.5.

    Returns:
        f(q, k, v, **kwargs) for tensors [T, heads, dim] or [B, S, heads, dim] of fp32, bf16 or fp16, with
        q's layout and dtype in the result. In a batch, rows do not see each other. Keyword arguments:

        magi_attn_spec: the mask; of a prepared batch it carries its key. At cp_size 1 over the T or
            B * S tokens at hand (or S: for every row alike), over several ranks over the whole sequence.
        cu_seqlens or cu_seqlens_q (and _kv, and their _padded): documents, causal.
        is_causal: False for full attention where no mask is given (a vision tower).
        window_size: (left, right) keys beside the query's own, -1 for all, or an int W: W keys, its own
            included.
        softcap; sinks (or sink_weights, s_aux) [heads].

        Without magi_attn_spec and documents the mask is the active one, else that of the group's
        prepared step, else causal.

    Raises (at the call):
        ValueError: a mask does not fit the tensors, an argument is not known, or several ranks share the
            sequence and no step was prepared.
    """

    def attn_func(q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> Tensor:
        q_, k_, v_ = (t.flatten(0, 1) if t.ndim == 4 else t for t in (q, k, v))
        numbers: dict[str, Any] = {"softmax_scale": softmax_scale, "softcap": kwargs.pop("softcap", None), "sink": None}
        for name in ("sinks", "sink_weights", "s_aux"):
            sink = kwargs.pop(name, None)
            numbers["sink"] = sink if numbers["sink"] is None else numbers["sink"]
        window = normal_window(kwargs.pop("window_size", None))
        rows = (q.shape[0], q.shape[1]) if q.ndim == 4 else (1, q.shape[0])
        key = _key_of_call(rows, (q_, k_, v_), kwargs)
        if window != NO_WINDOW:
            key = key.with_mask(key.spec, window=window)
        fill = _rows_of_fill(q_, key)
        q_, k_, v_ = (t[: len(t) - fill] for t in (q_, k_, v_))
        out = attention(q_, k_, v_, key, **numbers)
        assert isinstance(out, Tensor)
        out = F.pad(out, (0, 0, 0, 0, 0, fill)) if fill else out
        return out.unflatten(0, rows) if q.ndim == 4 else out

    return attn_func


def _rows_of_fill(q: Tensor, key: AttnKey) -> int:
    """Rows behind the key's own that a prepared step was filled up with."""
    step = _STEPS_BY_GROUP.get(id(get_active_cp_group()))
    filled = step is not None and step.length == len(q) and step.key.num_tokens == key.num_tokens
    return len(q) - key.num_tokens if filled else 0


def _key_of_call(rows: tuple[int, int], qkv: tuple[Tensor, Tensor, Tensor], kwargs: dict[str, Any]) -> AttnKey:
    q, k, v = qkv
    heads = (q.shape[1], k.shape[1], q.shape[2], v.shape[2])
    given = kwargs.pop("magi_attn_spec", None)
    causal = kwargs.pop("is_causal", True)
    common, common_padded = kwargs.pop("cu_seqlens", None), kwargs.pop("cu_seqlens_padded", None)
    documents = {name: kwargs.pop(name, None) for name in _DOCUMENTS}
    if common is not None:
        documents = {"cu_seqlens_q": common, "cu_seqlens_q_padded": common_padded}
    unknown = [name for name, value in kwargs.items() if value is not None and name not in _BOOKKEEPING]
    if unknown:
        raise ValueError(f"magi attention would ignore {', '.join(sorted(unknown))}: not supported")
    group = get_active_cp_group()
    if isinstance(given, StepSpec) and given.key is not None:
        step = _STEPS_BY_GROUP.get(id(group))
        if step is not None and step.key is given.key:
            step.used = True
        return given.key.with_heads(*heads)
    if group is not None and dist.get_world_size(group) > 1:
        step = _STEPS_BY_GROUP.get(id(group))
        if step is None:
            raise ValueError(
                "no step is prepared for the active group of several ranks: call magi_prepare_packed_cp (or "
                "MagiState.prepare_llm_batch) for each batch, and pass its magi_attn_spec on"
            )
        step.used = True
        total, key = (1, step.key.spec.total_seqlen), step.key.with_heads(*heads)
        spec = _spec_of_call(given, documents, total, causal=True) or get_active_attn_spec()
        if not causal:
            raise ValueError("is_causal=False over several ranks: give the mask when the step is prepared")
        return key if spec is None or spec.fingerprint() == key.spec.fingerprint() else key.with_mask(spec)
    spec = _spec_of_call(given, documents, rows, causal) or get_active_attn_spec()
    if spec is None:
        spec = AttnMaskSpec.varlen([rows[1]] * rows[0], causal=causal)
    if spec.total_seqlen != q.shape[0]:
        raise ValueError(f"the mask is over {spec.total_seqlen} tokens and q has {q.shape[0]} rows")
    # Head dims of v may differ, so the key is made for q and k and shared from there.
    return _flex_key_for(None, spec, *heads[:3]).with_heads(*heads)


def _spec_of_call(
    given: AttnMaskSpec | None, documents: dict[str, Any], rows: tuple[int, int], causal: bool
) -> AttnMaskSpec | None:
    if given is not None:
        return _for_every_row(given, rows[0]) if given.total_seqlen == rows[1] and rows[0] > 1 else given
    if documents.get("cu_seqlens_q") is None:
        return None
    total = rows[0] * rows[1]
    segments = document_segments(**documents, num_tokens_q=total, num_tokens_kv=total)
    covered = sum(s.q1 - s.q0 for s in segments)
    if documents.get("cu_seqlens_q_padded") is None and covered != total:
        raise ValueError(
            f"cu_seqlens covers {covered} tokens and there are {total}: pass cu_seqlens_padded (or the batch's "
            f"magi_attn_spec) where documents are padded"
        )
    return _segments_spec(segments, total, causal)


@lru_cache(maxsize=64)
def _segments_spec(segments: Any, total: int, causal: bool) -> AttnMaskSpec:
    return spec_of_segments(segments, total, total, causal, NO_WINDOW)


def _for_every_row(spec: AttnMaskSpec, rows: int) -> AttnMaskSpec:
    shifts = [row * spec.total_seqlen for row in range(rows)]
    return AttnMaskSpec(
        [[a + s, b + s] for s in shifts for a, b in spec.q_ranges],
        [[a + s, b + s] for s in shifts for a, b in spec.k_ranges],
        [kind for _ in shifts for kind in spec.mask_types],
        rows * spec.total_seqlen,
        documents=[(d.start + s, d.end + s, d.first_position) for s in shifts for d in spec.documents]  # type: ignore[misc]
        if spec.documents
        else None,
    )
