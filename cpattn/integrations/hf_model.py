"""What is read off a transformers model and its config before it runs: its decoder, its layers, what it cannot do."""

from __future__ import annotations

import inspect
from collections.abc import Collection
from typing import Any

from torch import nn

from cpattn.planning.options import LayerKind

from .batch_layout import BatchLayout, MaskTerm

_INDEXERS = ("index_topk", "index_topk_blocks", "indexer_budget", "indexer_head_dim")
# Types whose layers compute softmax attention themselves and are served all the same (`hf_own_attention`).
OWN_ATTENTION = frozenset({"bloom", "megatron-bert", "mvp", "rembert", "roformer", "trocr", "xglm"})
# Kinds of layers that mix tokens in another way than by attention; "hybrid" ones have both.
_TOKEN_MIXERS = {"linear_attention", "conv", "mamba", "recurrent", "hybrid", "hybrid_sliding", "ssm"}
_WITH_ATTENTION = {"hybrid": "full_attention", "hybrid_sliding": "sliding_attention"}
# Kinds that mix no tokens.
_PER_TOKEN = {"mlp", "moe"}


def language_model(model: nn.Module) -> nn.Module:
    """The stack of decoder layers, without head and without vision tower."""
    root = unwrapped(model)
    return root.get_decoder() if hasattr(root, "get_decoder") else root  # type: ignore[no-any-return]


def refuse_other_mixers(decoder: nn.Module, config: Any, served: Collection[str] = ()) -> None:
    """Raise if tokens meet outside attention in layers that are not served: they would run over a shuffled shard.

    served: names of those of the decoder's modules that are (`serve_mixers`).
    """
    kinds = [kind for kind in getattr(config, "layer_types", None) or () if kind in _TOKEN_MIXERS]
    convolutions = [
        name
        for name, m in decoder.named_modules()
        if isinstance(m, nn.Conv1d) and not any(name.startswith(layer + ".") for layer in served)
    ]
    if len(kinds) > len(served) or convolutions:
        raise ValueError(
            f"{type(decoder).__name__} mixes tokens outside attention "
            f"({', '.join(sorted(set(kinds)) + convolutions[:3])}): a shard holds tokens out of order, so such layers "
            f"cannot run on it"
        )
    pooled = [name for name, m in decoder.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if pooled:
        raise ValueError(
            f"{type(decoder).__name__} normalises over all tokens that it is given ({', '.join(pooled[:3])}): under "
            f"context parallelism those are one rank's. Use a norm of each token (LayerNorm, RMSNorm)"
        )


def refuse_encoders(root: Any) -> None:
    """Raise where a decoder attends to the states of an encoder beside it."""
    if getattr(root.config, "is_encoder_decoder", False):
        raise ValueError(
            f"{type(root).__name__} is an encoder-decoder model, whose decoder attends to an encoder's states: not "
            f"supported. Load its decoder alone where it has such a form (...ForCausalLM), or use it without cpattn"
        )


def attention_kinds(config: Any) -> list[str]:
    """The kind of attention of each layer that has any, by transformers' names."""
    names = getattr(config, "layer_types", None)
    if not names:
        return [_kind_of_all_layers(config)] * int(getattr(config, "num_hidden_layers", 1))
    names = [_WITH_ATTENTION.get(name, name) for name in names]
    return [name for name in names if name not in _TOKEN_MIXERS | _PER_TOKEN]


def layers_that_mix(decoder: nn.Module) -> int:
    """Layers that mix tokens: those of attention, and those that `serve_mixers` found."""
    config = getattr(decoder, "config", None)
    served = sum(hasattr(layer, "_cpattn_served") for layer in decoder.modules())
    return (1 if config is None else len(attention_kinds(config))) + served


def attends_by_itself(config: Any) -> bool:
    """Whether a config is of a type in `OWN_ATTENTION`: outside a shard its layers add the mask to their scores."""
    return getattr(config, "model_type", None) in OWN_ATTENTION


def indexers(config: Any) -> list[str]:
    """The fields of a config by which layers choose keys."""
    return [name for name in _INDEXERS if read(config, name)]


def refuse_indexers(decoder: nn.Module, config: Any) -> None:
    """Raise if layers choose keys by an indexer: it would choose among this rank's tokens only.

    A short sequence does not show it (all keys are chosen), so the placement probe cannot.
    """
    fields = indexers(config)
    if fields:
        raise ValueError(
            f"{type(decoder).__name__} has sparse layers that choose keys by an indexer over the tokens they are given "
            f"({', '.join(fields)} in its config): a shard holds some of the tokens, so such layers cannot run on it"
        )


def unwrapped(model: nn.Module) -> Any:
    """The model with a config inside wrappers such as DDP."""
    while not hasattr(model, "config") and isinstance(getattr(model, "module", None), nn.Module):
        model = model.module  # type: ignore[assignment]
    return model


def base_model(model: nn.Module) -> Any:
    """The transformers model inside wrappers and adapters (PEFT)."""
    root = unwrapped(model)
    return root.get_base_model() if hasattr(root, "get_base_model") else root


def takes(model: nn.Module, argument: str) -> bool:
    """Whether a model's forward names an argument; one that it would swallow in **kwargs does not count."""
    return argument in inspect.signature(model.forward).parameters


def read(config: Any, name: str, default: Any = None) -> Any:
    """A field of a config; the default where there is none, it is None, or it differs by layer (Gemma 4's head_dim)."""
    try:
        value = getattr(config, name, None)
    except RuntimeError:  # transformers' AmbiguousGlobalPerLayerAttributeError
        value = None
    return default if value is None else value


def layer_kinds(config: Any, layout: BatchLayout) -> list[LayerKind]:
    """The masks of a model's kinds of layers, with how many layers have each, as far as its config tells.

    Tokens are placed by them. What a layer really sees is up to the mask that transformers asks for (image
    blocks, for example, are not in the config): where that is another one, it is planned over this placement.
    """
    counts: dict[MaskTerm, int] = {}
    for name in attention_kinds(config) or ["full_attention"]:
        term = _term_of(name, config, layout)
        counts[term] = counts.get(term, 0) + 1
    return [LayerKind(*layout.plan_of([term]), num_layers=count) for term, count in counts.items()]


def _kind_of_all_layers(config: Any) -> str:
    sliding = bool(read(config, "sliding_window")) and getattr(config, "use_sliding_window", True)
    return "sliding_attention" if sliding else "full_attention"


def _term_of(kind: str, config: Any, layout: BatchLayout) -> MaskTerm:
    """The mask of one of transformers' kinds of layers; a limit that is wider than all texts is left out."""
    window, chunk = (read(config, name) for name in ("sliding_window", "attention_chunk_size"))
    if getattr(config, "is_causal", True) is False:
        return MaskTerm(causal=layout.explicit)
    if kind == "sliding_attention" and isinstance(window, int) and 0 < window < layout.longest_text:
        return MaskTerm(causal=True, left=window - 1)
    if kind == "chunked_attention" and isinstance(chunk, int) and chunk < layout.longest_text and not layout.explicit:
        return MaskTerm(causal=True, chunk=chunk)
    return MaskTerm(causal=True)
