"""What generation runs: a model over rows, and a Hugging Face model as one.

Shape legend: T rows, N query heads, G key heads, D and E head dims of q/k and of v.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

# attention(q_TND, k_TGD, v_TGE, **options) -> out_TNE; options: softmax_scale, softcap, sink
RowAttention = Callable[..., Tensor]


class RowModel(Protocol):
    """A model over rows: the tokens of all sequences one after the other, mixed by `attention` alone."""

    def __call__(self, tokens_T: Tensor, positions_T: Tensor, attention: RowAttention) -> Tensor:
        """Logits [T, vocab] of the rows."""
        ...


class ModelShape(NamedTuple):
    """What the cache has to know of a model. head_dim_v: None is head_dim."""

    num_layers: int
    num_heads_q: int
    num_heads_kv: int
    head_dim: int
    windows: tuple[int | None, ...]
    head_dim_v: int | None = None


class LayerShape(NamedTuple):
    """What the cache has to know of a layer. window: keys that a query sees, its own included; None: all."""

    num_heads_q: int
    num_heads_kv: int
    head_dim: int
    head_dim_v: int
    window: int | None


class Rows:
    """A `RowModel` with its layers' shapes, as `generate` calls it."""

    def __init__(self, model: RowModel, shape: ModelShape | None) -> None:
        self.model, self.shape = model, shape

    def layers(self, longest: int) -> list[LayerShape]:
        """The shape of every layer."""
        n, q, kv, dim, windows, dim_v = self.shape or model_shape(self.model)
        if len(windows) != n:
            raise ValueError(f"shape has {n} layers and {len(windows)} windows: one for each is needed, or None")
        return [LayerShape(q, kv, dim, dim_v or dim, window) for window in windows]

    def check_tokens(self, name: str, ids: Tensor) -> None:
        """Raise ValueError where a model that knows its vocabulary has no such tokens."""

    def run(
        self, tokens: Tensor, positions: Tensor, attention: RowAttention, last_position: int, keep: Tensor | None = None
    ) -> Tensor:
        """Logits [T, vocab], or with keep int64 [n] of those rows."""
        logits = self.model(tokens, positions, attention)
        return logits if keep is None else logits[keep]

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Without dropout; modules are put back into the modes that they had."""
        modules = self.model.modules() if isinstance(self.model, nn.Module) else ()
        modes = [(module, module.training) for module in modules]
        for module, _ in modes:
            module.training = False
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training


class HuggingFaceRows(Rows):
    """A Hugging Face causal language model, wrapped or not: one row of a batch holds all rows.

    Raises:
        ValueError: it has another attention, layers that a cache of keys does not serve, or depends on where a token
            lies in the local tensor (it is tried once, as by `ContextParallel`).
    """

    def __init__(self, model: Any, shape: ModelShape | None, cp_group: Any, check: bool) -> None:
        from cpattn.integrations.hf_model import unwrapped
        from cpattn.integrations.transformers import ContextParallel, language_model, refuse_other_mixers

        config = unwrapped(model).config
        implementation = config._attn_implementation
        if implementation != "cpattn":
            raise ValueError(
                f"the model's attention is {implementation!r}: load it with attn_implementation='cpattn', or call "
                f"model.set_attn_implementation('cpattn')"
            )
        parallel = model if isinstance(model, ContextParallel) else None
        refuse_other_mixers(language_model(model), config.get_text_config(decoder=True))
        parallel = parallel or ContextParallel(model, cp_group, check=check)
        self.root, self.name = parallel.root, type(parallel.root).__name__
        if parallel.head != "causal":
            raise ValueError(f"{self.name} has no logits of next tokens: generate runs causal language models")
        if parallel.cut == "layers":
            raise ValueError(
                f"{self.name} numbers its tokens itself: generate runs the tokens of all sequences side by side, at "
                f"positions that it passes, and this model counts otherwise"
            )
        super().__init__(parallel.model, shape)

    def layers(self, longest: int) -> list[LayerShape]:
        """As each layer attends to a first token, with what its mask says; compared with a shape that was given."""
        found: list[LayerShape] = []

        def note(call: Any) -> Tensor:
            (q, k, v), window = (call.query, call.key, call.value), self._window(call.terms, longest)
            found.append(LayerShape(q.shape[1], k.shape[1], q.shape[2], v.shape[2], window))
            return q.new_zeros(1, q.shape[1], v.shape[2])

        device = next(self.model.parameters()).device  # type: ignore[attr-defined]
        zero = torch.zeros(1, dtype=torch.int64, device=device)
        self._run(zero, zero, note, 0, zero)
        given = super().layers(longest) if self.shape else found
        if given != found:
            number = next((n for n, (a, b) in enumerate(zip(given, found, strict=False)) if a != b), len(found))
            theirs = found[number] if number < len(found) else f"{len(found)} layers in all"
            raise ValueError(f"shape does not fit layer {number} of {self.name}, which has {theirs}: leave it out")
        return found

    def _window(self, terms: Sequence[Any], longest: int) -> int | None:
        """Raises ValueError where a mask is not causal, with or without a window."""
        term = terms[0]
        chunked = bool(term.chunk) and term.chunk < longest
        if len(terms) > 1 or not term.causal or chunked or term.blocks is not None:
            kind = "chunked_attention" if chunked else "bidirectional attention" if not term.causal else "another mask"
            raise ValueError(
                f"{self.name} has layers of {kind}: generate serves full_attention, sliding_attention, and chunks that "
                f"hold the longest sequence whole ({longest} tokens here)"
            )
        return None if term.left is None else int(term.left) + 1

    def check_tokens(self, name: str, ids: Tensor) -> None:
        """Raise where the model has no such tokens."""
        vocab = getattr(self.root.get_input_embeddings(), "num_embeddings", None)
        least, most = int(ids.min()), int(ids.max())
        if vocab is not None and (least < 0 or most >= vocab):
            raise ValueError(f"{name} has token ids from {least} to {most}: the model has {vocab} tokens")

    def run(
        self, tokens: Tensor, positions: Tensor, attention: RowAttention, last_position: int, keep: Tensor | None = None
    ) -> Tensor:
        def attend(call: Any) -> Tensor:
            numbers = {"softmax_scale": call.softmax_scale, "softcap": call.softcap, "sink": call.sink}
            return attention(call.query, call.key, call.value, **numbers)

        return self._run(tokens, positions, attend, last_position, keep)

    def _run(self, tokens: Tensor, positions: Tensor, function: Any, last: int, keep: Tensor | None) -> Tensor:
        from cpattn.integrations.rows import run_rows

        model: Any = self.model
        return run_rows(model, tokens, positions, function, last_position=last, keep=keep)


def rows_of(model: Any, shape: ModelShape | None, cp_group: Any, check: bool) -> Rows:
    """The model as generation calls it."""
    inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    if hasattr(getattr(inner, "config", None), "_attn_implementation"):
        return HuggingFaceRows(model, shape, cp_group, check)
    return Rows(model, shape)


def device_and_dtype(model: Any) -> tuple[torch.device, torch.dtype]:
    """Those of a model's first floating-point parameter; CPU and fp32 of one that has none."""
    if isinstance(model, nn.Module):
        for parameter in model.parameters():
            if parameter.is_floating_point():
                return parameter.device, parameter.dtype
    return torch.device("cpu"), torch.float32


def model_shape(model: Any) -> ModelShape:
    """Layers, heads and windows of a model, from its `config`.

    Raises:
        ValueError: there is no config that tells.
    """
    config = getattr(model, "config", None)

    def first(*names: str) -> Any:
        return next((v for v in (getattr(config, n, None) for n in names) if v is not None), None)

    layers, heads = first("num_layers", "num_hidden_layers"), first("num_heads_q", "num_attention_heads")
    if layers is None or heads is None:
        raise ValueError("the model's config tells no layers and heads: pass shape=ModelShape(...)")
    hidden = first("hidden_size", "dim")
    head_dim = first("head_dim") or (hidden // heads if hidden else None)
    if head_dim is None:
        raise ValueError("the model's config tells no head_dim: pass shape=ModelShape(...)")
    num_heads_kv = first("num_heads_kv", "num_key_value_heads") or heads
    return ModelShape(layers, heads, num_heads_kv, head_dim, _windows(config, layers), first("head_dim_v"))


def _windows(config: Any, layers: int) -> tuple[int | None, ...]:
    """The window of each layer, in Hugging Face's terms: `sliding_window` keys, query included."""
    window = getattr(config, "sliding_window", None)
    if window is None or getattr(config, "use_sliding_window", True) is False:
        return (None,) * layers
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return (int(window),) * layers
    return tuple(int(window) if kind == "sliding_attention" else None for kind in kinds)
