"""`generate`: text from a model whose context is spread over the ranks of a context-parallel group.

The prompt runs once through the distributed attention and its keys stay where they were computed. Each further token
runs through the model on every rank, and attention over the sharded cache is the only thing that communicates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cpattn.keys.key import AttnKey
from cpattn.keys.make import make_key
from cpattn.masks.reading import read_int
from cpattn.masks.spec import AttnMaskSpec
from cpattn.ops.attention import attention
from cpattn.ops.layout import dispatch, position_ids
from cpattn.runtime.agreement import require_agreement, tensor_digest

from .kv_cache import PagedKVCache

# attention(q_TND, k_TGD, v_TGE, **options) -> out_TNE; options: softmax_scale, softcap, sink
RowAttention = Callable[..., Tensor]


class RowModel(Protocol):
    """A model over rows: the tokens of all sequences one after the other, mixed by `attention` alone."""

    def __call__(self, tokens_T: Tensor, positions_T: Tensor, attention: RowAttention) -> Tensor:
        """Logits [T, vocab] of the rows."""
        ...


class ModelShape(NamedTuple):
    """What the cache has to know of a model."""

    num_layers: int
    num_heads_q: int
    num_heads_kv: int
    head_dim: int
    windows: tuple[int | None, ...]


@torch.no_grad()
def generate(
    model: Any,
    prompts: Sequence[Tensor | Sequence[int]],
    *,
    max_new_tokens: int,
    cp_group: Any = None,
    eos_token_id: int | Sequence[int] | Tensor | None = None,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
    shape: ModelShape | None = None,
    page_size: int = 64,
    cache_dtype: torch.dtype | None = None,
    check_eos_every: int = 16,
    key_options: dict[str, Any] | None = None,
) -> list[Tensor]:
    """Continue prompts of any lengths, token by token.

    Call it on all ranks of the group with the same arguments.

    Args:
        model: a Hugging Face causal language model with attn_implementation="cpattn", or any `RowModel`, which calls
            its `attention` argument once per layer, in the order of the layers. The same weights on all ranks.
        prompts: token ids of each sequence, at least one each; the same on all ranks.
        max_new_tokens: tokens to add to each sequence.
        cp_group: as in `make_key`; None is one rank.
        eos_token_id: a sequence that produces it ends; its further tokens are the same id.
        temperature: 0 takes the likeliest token (the first of equals); else samples.
        generator: for sampling, seeded alike on all ranks (rank 0's draws count).
        shape: of the model; None reads `model.config` (of Hugging Face, or with num_layers, num_heads_q,
            num_heads_kv and head_dim).
        page_size: tokens of a cache page.
        cache_dtype: None is the model's.
        check_eos_every: steps between looks at whether all sequences have ended: the only host syncs.
        key_options: further options of `make_key` for the prompt; what a layer sees is up to the model and `shape`.

    Returns:
        For each prompt its new tokens, int64 [<= max_new_tokens] on the CPU, up to and with the first eos.

    Raises:
        ValueError: a prompt is empty, a number is out of range, ranks differ, the model's shape is not known, or it is
            a Hugging Face model with another attention or with layers that a cache of keys does not serve.
    """
    device, dtype = _device_and_dtype(model)
    ids = _checked_prompts(prompts)
    max_new_tokens = read_int("max_new_tokens", max_new_tokens, least=0)
    check_eos_every = read_int("check_eos_every", check_eos_every)
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ValueError(f"temperature is {temperature}: it must be a finite number of at least 0")
    eos = _eos_ids(eos_token_id, device)
    rows = _as_row_model(model)
    if isinstance(rows, _HuggingFaceRows):
        rows.check(ids, max_new_tokens)
    shape = shape or model_shape(model)
    key = _prompt_key(ids, shape, cp_group, key_options or {})
    fields = {
        "prompts": [tensor_digest(p) for p in ids],
        "max_new_tokens": max_new_tokens,
        "check_eos_every": check_eos_every,
        "temperature": float(temperature),
        "eos_token_id": None if eos is None else eos.tolist(),
    }
    require_agreement("generate", fields, key.cp_group)
    if max_new_tokens < 1:
        return [torch.zeros(0, dtype=torch.int64) for _ in ids]
    cache = PagedKVCache(
        key,
        windows=shape.windows,
        max_new_tokens=max_new_tokens,
        page_size=page_size,
        dtype=cache_dtype or dtype,
        device=device,
    )
    sampler = _Sampler(key, temperature, generator, eos)
    tokens = sampler.first(_prefill(rows, key, cache, torch.cat(ids).to(device), device))
    steps = [tokens]
    for step in range(1, max_new_tokens):
        if sampler.eos is not None and step % check_eos_every == 0 and bool(sampler.ended.all()):
            break
        logits = rows(tokens, cache.advance(), _DecodeAttention(cache))
        tokens = sampler.next(logits)
        steps.append(tokens)
    return _trim(torch.stack(steps, dim=1).cpu(), sampler.eos)


def _prompt_key(ids: Sequence[Tensor], shape: ModelShape, cp_group: Any, options: dict[str, Any]) -> AttnKey:
    """The key of the prompts as documents.

    Raises:
        ValueError: options say what the shape says, or are none of `make_key`.
    """
    reserved = sorted({"window", "also", "num_layers"} & set(options))
    if reserved:
        raise ValueError(f"key_options has {', '.join(reserved)}: windows of layers go into shape=ModelShape(...)")
    spec = AttnMaskSpec.varlen([len(p) for p in ids])
    return make_key(
        spec,
        num_heads_q=shape.num_heads_q,
        num_heads_kv=shape.num_heads_kv,
        head_dim=shape.head_dim,
        cp_group=cp_group,
        **{"chunk_size": max(1, min(512, spec.total_seqlen // 64)), **options},
    )


def model_shape(model: Any) -> ModelShape:
    """Layers, heads and windows of a model, from its `config`.

    Raises:
        ValueError: there is no config that tells.
    """
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "get_text_config"):
        config = config.get_text_config(decoder=True)

    def first(*names: str) -> Any:
        return next((v for v in (getattr(config, n, None) for n in names) if v is not None), None)

    layers, heads = first("num_layers", "num_hidden_layers"), first("num_heads_q", "num_attention_heads")
    if layers is None or heads is None:
        raise ValueError("the model's config tells no layers and heads: pass shape=ModelShape(...)")
    hidden = first("hidden_size", "dim")
    head_dim = first("head_dim") or (hidden // heads if hidden else None)
    if head_dim is None:
        raise ValueError("the model's config tells no head_dim: pass shape=ModelShape(...)")
    return ModelShape(
        layers, heads, first("num_heads_kv", "num_key_value_heads") or heads, head_dim, _windows(config, layers)
    )


def _windows(config: Any, layers: int) -> tuple[int | None, ...]:
    """The window of each layer, in Hugging Face's terms: `sliding_window` keys, query included."""
    window = getattr(config, "sliding_window", None)
    if window is None or getattr(config, "use_sliding_window", True) is False:
        return (None,) * layers
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return (int(window),) * layers
    return tuple(int(window) if kind == "sliding_attention" else None for kind in kinds)


class _PrefillAttention:
    """Attention of the prompt, layer by layer, which also fills the cache."""

    def __init__(self, key: AttnKey, cache: PagedKVCache) -> None:
        self._cache, self._layer = cache, 0
        self._keys = {w: key if w is None else key.with_mask(key.spec, window=w) for w in dict.fromkeys(cache.windows)}

    def __call__(self, q_TND: Tensor, k_TGD: Tensor, v_TGE: Tensor, **options: Any) -> Tensor:
        layer, self._layer = self._layer, self._layer + 1
        self._cache.prefill(layer, k_TGD, v_TGE)
        out = attention(q_TND, k_TGD, v_TGE, self._keys[self._cache.windows[layer]], **options)
        assert isinstance(out, Tensor)
        return out


class _DecodeAttention:
    """Attention of one new token per sequence over the cache."""

    def __init__(self, cache: PagedKVCache) -> None:
        self._cache, self._layer = cache, 0

    def __call__(self, q_BND: Tensor, k_BGD: Tensor, v_BGE: Tensor, **options: Any) -> Tensor:
        layer, self._layer = self._layer, self._layer + 1
        return self._cache.decode(layer, q_BND, k_BGD, v_BGE, **options)


def _prefill(
    rows: RowModel, key: AttnKey, cache: PagedKVCache, tokens: Tensor, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Logits of the last tokens of the sequences that end on this rank, and which sequences those are."""
    local = dispatch(tokens, key)
    ends = torch.tensor([d.end - 1 for d in key.spec.documents or []])
    mine = torch.from_numpy(key.q_placement.tokens_of(key.cp_rank))
    # Tokens are ascending on a rank, so a binary search finds each sequence's last one, if it is here.
    at = torch.searchsorted(mine, ends).clamp(max=max(len(mine) - 1, 0))
    here = mine[at] == ends if len(mine) else torch.zeros_like(ends, dtype=torch.bool)
    wanted = at[here].to(device)
    prefill_attention = _PrefillAttention(key, cache)
    positions = position_ids(key, device=device)
    if isinstance(rows, _HuggingFaceRows):
        logits = rows(local, positions, prefill_attention, keep=wanted)
    else:
        logits = rows(local, positions, prefill_attention)[wanted]
    return logits, here.nonzero().flatten().to(device)


class _Sampler:
    """Next tokens from logits, agreed on by all ranks."""

    def __init__(self, key: AttnKey, temperature: float, generator: torch.Generator | None, eos: Tensor | None) -> None:
        self.group, self.batch = key.cp_group, len(key.spec.documents or [])
        self.temperature, self.generator, self.eos = temperature, generator, eos
        self.ended = torch.zeros(self.batch, dtype=torch.bool)

    def first(self, last: tuple[Tensor, Tensor]) -> Tensor:
        """From the prompt's last logits, which lie on different ranks."""
        logits, sequences = last
        tokens = torch.zeros(self.batch, dtype=torch.int64, device=logits.device)
        tokens[sequences] = self._pick(logits)
        if self.group is not None:
            dist.all_reduce(tokens, group=self.group)  # every sequence ends on exactly one rank
        self.ended = self.ended.to(logits.device)
        return self._after_end(tokens)

    def next(self, logits: Tensor) -> Tensor:
        """From logits that all ranks have computed; rank 0's choice counts, so that ranks cannot part ways."""
        tokens = self._pick(logits)
        if self.group is not None:
            dist.broadcast(tokens, dist.get_global_rank(self.group, 0), group=self.group)
        return self._after_end(tokens)

    def _pick(self, logits: Tensor) -> Tensor:
        if self.temperature == 0 or not len(logits):
            return logits.argmax(-1)
        p = torch.softmax(logits.float() / self.temperature, dim=-1)
        return torch.multinomial(p, 1, generator=self.generator).squeeze(-1)

    def _after_end(self, tokens: Tensor) -> Tensor:
        if self.eos is None:
            return tokens
        tokens = torch.where(self.ended, self.eos[0], tokens)
        self.ended = self.ended | torch.isin(tokens, self.eos)
        return tokens


def _trim(tokens: Tensor, eos: Tensor | None) -> list[Tensor]:
    """Each row up to and with its first eos."""
    if eos is None:
        return list(tokens)
    ends = torch.isin(tokens, eos.cpu())
    return [row[: int(end.int().argmax()) + 1] if end.any() else row for row, end in zip(tokens, ends, strict=True)]


def _checked_prompts(prompts: Sequence[Tensor | Sequence[int]]) -> list[Tensor]:
    found = []
    for number, prompt in enumerate(prompts):
        ids = torch.as_tensor(prompt)
        if ids.ndim != 1 or not len(ids):
            raise ValueError(
                f"generate needs prompts of at least one token each: prompt {number} has shape {tuple(ids.shape)}, "
                f"expected [tokens]"
            )
        found.append(_integers(f"prompt {number}", ids))
    if not found:
        raise ValueError("generate needs prompts of at least one token each: there are none")
    return found


def _integers(name: str, values: Tensor) -> Tensor:
    if values.dtype.is_floating_point or values.dtype.is_complex or values.dtype == torch.bool:
        raise ValueError(f"{name} is {values.dtype}: token ids are integers")
    return values.to(torch.int64)


def _eos_ids(eos_token_id: int | Sequence[int] | Tensor | None, device: torch.device) -> Tensor | None:
    if eos_token_id is None:
        return None
    ids = torch.as_tensor(eos_token_id).flatten()
    if not len(ids):
        raise ValueError("eos_token_id is empty: give ids, or None for no end")
    return _integers("eos_token_id", ids).to(device)


def _device_and_dtype(model: Any) -> tuple[torch.device, torch.dtype]:
    if isinstance(model, nn.Module):
        for parameter in model.parameters():
            if parameter.is_floating_point():
                return parameter.device, parameter.dtype
    return torch.device("cpu"), torch.float32


def _as_row_model(model: Any) -> RowModel:
    return _HuggingFaceRows(model) if _is_hugging_face(model) else model  # type: ignore[no-any-return]


def _is_hugging_face(model: Any) -> bool:
    return hasattr(model, "config") and hasattr(model.config, "_attn_implementation")


class _HuggingFaceRows:
    """A Hugging Face causal language model as a RowModel: one row of a batch holds all rows.

    For the time of a call, transformers' function for attn_implementation="cpattn" is ours, which hands each layer's
    q, k and v to the attention of the call, and makes no mask.
    """

    def __init__(self, model: Any) -> None:
        implementation = model.config._attn_implementation
        if implementation != "cpattn":
            raise ValueError(
                f"the model's attention is {implementation!r}: load it with attn_implementation='cpattn', or call "
                f"model.set_attn_implementation('cpattn')"
            )
        self.model = model

    def check(self, prompts: Sequence[Tensor], max_new_tokens: int) -> None:
        """Check that all that a layer sees is in the cache, and that the prompts are of the model's tokens.

        Raises:
            ValueError: layers mix tokens in another way than by causal attention, with or without a window; or a
                prompt has an id that the model does not know.
        """
        from cpattn.integrations.transformers import language_model, refuse_other_mixers

        config = self.model.config.get_text_config(decoder=True)
        refuse_other_mixers(language_model(self.model), config)
        longest = max(len(ids) for ids in prompts) + max_new_tokens
        served = {"full_attention", "sliding_attention"}
        if (getattr(config, "attention_chunk_size", None) or 0) >= longest:
            served.add("chunked_attention")
        others = sorted(set(getattr(config, "layer_types", None) or ()) - served)
        if others or getattr(config, "is_causal", True) is False:
            raise ValueError(
                f"{type(self.model).__name__} has layers of {', '.join(others) or 'bidirectional attention'}: "
                f"generate serves full_attention, sliding_attention, and chunks that hold the longest sequence whole "
                f"({longest} tokens here)"
            )
        embedding = self.model.get_input_embeddings()
        vocab = getattr(embedding, "num_embeddings", None)
        for number, ids in enumerate(prompts):
            least, most = int(ids.min()), int(ids.max())
            if vocab is not None and (least < 0 or most >= vocab):
                raise ValueError(f"prompt {number} has token ids from {least} to {most}: the model has {vocab} tokens")

    def __call__(
        self, tokens_T: Tensor, positions_T: Tensor, attention: RowAttention, *, keep: Tensor | None = None
    ) -> Tensor:
        """Logits [T, vocab]; with keep int64 [n] only of those rows."""
        from transformers import AttentionInterface
        from transformers.masking_utils import AttentionMaskInterface

        from cpattn.integrations.transformers import refuse_what_would_be_ignored

        def attend(
            module: Any,
            query: Tensor,
            key: Tensor,
            value: Tensor,
            attention_mask: Any,
            dropout: float = 0.0,
            scaling: float | None = None,
            softcap: float | None = None,
            s_aux: Tensor | None = None,
            **extra: Any,
        ) -> tuple[Tensor, None]:
            refuse_what_would_be_ignored(module, dropout, softcap, s_aux, extra)
            q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
            out = attention(q, k, v, softmax_scale=scaling, softcap=softcap, sink=s_aux)
            return out.unsqueeze(0), None

        functions, masks = AttentionInterface._global_mapping, AttentionMaskInterface._global_mapping
        before = functions.get("cpattn"), masks.get("cpattn")
        functions["cpattn"], masks["cpattn"] = attend, lambda *_, **__: None
        try:
            extra = {} if keep is None else {"logits_to_keep": keep}
            result = self.model(input_ids=tokens_T[None], position_ids=positions_T[None], use_cache=False, **extra)
        finally:
            for mapping, old in zip((functions, masks), before, strict=True):
                if old is None:
                    del mapping["cpattn"]
                else:
                    mapping["cpattn"] = old
        return result.logits[0]  # type: ignore[no-any-return]
