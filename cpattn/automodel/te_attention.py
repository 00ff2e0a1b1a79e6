"""TransformerEngine attention inside Hugging Face models, layer by layer, with the model's own code.

`inject_te_attention(model)` gives every `self_attn` with separate q, k and v projections a
`DotProductAttention`, to which torch's SDPA is diverted while that layer's forward runs. What cannot
be said to TransformerEngine without changing the numbers (a mask that is not surely causal, dropout,
another scale) goes to SDPA as it came, and is counted.

The diversion is a torch function mode: it belongs to the calling thread, replaces nothing in torch,
reaches functions that were imported by name, and compiles. A function that someone has put in place
of `F.scaled_dot_product_attention` is called as ever, and what it calls of torch is diverted.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import math
import os
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode

from .local_masks import causal_left
from .portable_te import PortableDotProductAttention

logger = logging.getLogger(__name__)

_TE_MODULE_ATTR = "attn_module"
_TE_MODEL_FLAG = "_te_attention_injected"
_TE_STATS: dict[str, int] = {
    "te_hits": 0,
    "fallback_mask": 0,
    "fallback_scale_mismatch": 0,
    "fallback_dropout": 0,
    "fallback_unsupported": 0,
}
# Calls between two log lines; 0 or less for none.
_STATS_LOG_EVERY = int(os.environ.get("AUTOMODEL_TE_STATS_EVERY") or "500")
_SCALE_MISMATCH_WARNED = False

_stats_lock = threading.Lock()
_TORCH_SDPA = torch._C._nn.scaled_dot_product_attention


# ----------------------------------------------------------------------------------------------------
# Counters.


def get_te_attention_stats() -> dict[str, int]:
    """How attention calls of injected layers were served, process-wide; a copy.

    te_hits: by the TE module. fallback_mask: by SDPA, the mask not being surely causal.
    fallback_scale_mismatch: by SDPA, the call's scale being another than the module's.
    fallback_dropout: by SDPA, for its dropout. fallback_unsupported: by SDPA, for shapes or tensor
    types that the module does not take. Calls inside compiled graphs are not counted.
    """
    with _stats_lock:
        return dict(_TE_STATS)


def reset_te_attention_stats() -> None:
    """Set all counters to 0."""
    with _stats_lock:
        for name in _TE_STATS:
            _TE_STATS[name] = 0


def _count(name: str) -> None:
    if torch.compiler.is_compiling():
        return
    with _stats_lock:
        _TE_STATS[name] = _TE_STATS.get(name, 0) + 1
    _maybe_log_stats()


def _maybe_log_stats() -> None:
    """Log the counters at INFO, every `_STATS_LOG_EVERY` calls."""
    stats = get_te_attention_stats()
    total = sum(stats.values())
    if _STATS_LOG_EVERY > 0 and total > 0 and total % _STATS_LOG_EVERY == 0:
        logger.info("TE attention after %d calls: %s", total, ", ".join(f"{k}={v}" for k, v in stats.items()))


# ----------------------------------------------------------------------------------------------------
# What a layer looks like.


def _proj_out_features(proj: nn.Module | None) -> int | None:
    """Output features of a projection: its `out_features`, its weight's rows, or those of its `linear`."""
    if proj is None:
        return None
    features = getattr(proj, "out_features", None)
    if features is not None:
        return int(features)
    weight = getattr(proj, "weight", None)
    if weight is not None:
        return int(weight.shape[0])
    return _proj_out_features(getattr(proj, "linear", None))


def _infer_attn_params(module: nn.Module) -> dict[str, Any] | None:
    """Heads, head dim, window and scale of a Hugging Face attention module; None if it is none we know.

    Returns:
        num_heads, num_kv_heads, head_dim, window_size ((W - 1, 0) where `sliding_window` is W, else
        (-1, 0)) and softmax_scale. None without q_proj, k_proj, v_proj and head_dim, with heads that
        do not divide, or with values of another head dim than the keys.
    """
    projections = [getattr(module, name, None) for name in ("q_proj", "k_proj", "v_proj")]
    head_dim = getattr(module, "head_dim", None)
    if None in projections or head_dim is None:
        return None
    q_features, k_features, v_features = map(_proj_out_features, projections)
    num_heads = getattr(module, "num_heads", None) or getattr(module, "num_attention_heads", None)
    if num_heads is None and q_features is not None:
        num_heads = q_features // head_dim
    if not num_heads:
        return None
    num_kv_heads = getattr(module, "num_key_value_heads", None)
    if num_kv_heads is None:
        num_kv_heads = num_heads if k_features is None else k_features // head_dim
    if not num_kv_heads or num_heads % num_kv_heads:
        return None
    if v_features is not None and v_features != num_kv_heads * head_dim:
        return None
    window = getattr(module, "sliding_window", None)
    scaling = getattr(module, "scaling", None)
    return {
        "num_heads": int(num_heads),
        "num_kv_heads": int(num_kv_heads),
        "head_dim": int(head_dim),
        "window_size": (int(window) - 1, 0) if window and window > 0 else (-1, 0),
        "softmax_scale": head_dim**-0.5 if scaling is None else float(scaling),
    }


def _create_te_dot_product_attention(
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    window_size: tuple[int, int] = (-1, 0),
    softmax_scale: float | None = None,
    *,
    portable: bool = False,
) -> nn.Module:
    """A causal [B, S, heads, dim] `DotProductAttention` for these heads.

    Args:
        portable: make a `PortableDotProductAttention`, which needs no TransformerEngine, instead.

    Raises:
        ImportError: TransformerEngine is not here and portable is False.
    """
    module_class: Callable[..., nn.Module] = PortableDotProductAttention
    if not portable:
        try:
            from transformer_engine.pytorch.attention import DotProductAttention
        except ImportError as error:
            raise ImportError(
                "TE attention needs TransformerEngine, which cannot be imported here: install it, or pass "
                "portable=True for a module of the same face on cpattn's kernels"
            ) from error
        module_class = DotProductAttention
    return module_class(
        num_attention_heads=num_heads,
        kv_channels=(head_dim, head_dim),
        num_gqa_groups=num_kv_heads,
        attn_mask_type="causal",
        qkv_format="bshd",
        window_size=window_size,
        softmax_scale=head_dim**-0.5 if softmax_scale is None else softmax_scale,
    )


def _detect_causal_mask(
    attn_mask: Tensor, window_size: tuple[int, int]
) -> tuple[str, tuple[int, int]] | None:
    """("causal", window) if a matrix is that mask at every element; None if it is not, or may not be.

    Args:
        attn_mask: [B, H, S, S], bool (True for visible) or additive fp32, bf16 or fp16, in which 0 is
            visible and below -1e4 is masked; any other value is a bias and gives None.
        window_size: the layer's (left, 0), -1 for no window. It must be the mask's.

    The values are compared once per mask tensor (one or two host syncs): layers that share a mask
    share the answer.
    """
    left = causal_left(attn_mask)
    if left is None:
        return None
    if left == attn_mask.shape[-1] - 1:
        if window_size[0] < 0:
            return "causal", (-1, 0)
        return ("causal", window_size) if window_size[0] >= left else None
    return ("causal", window_size) if window_size[0] == left else None


# ----------------------------------------------------------------------------------------------------
# The replacement of SDPA.


class _TeSdpa:
    """See `_make_te_sdpa`. An object, not a closure: copies of a model get their own."""

    def __init__(
        self,
        te_module: nn.Module,
        num_heads: int,
        num_kv_heads: int,
        original_sdpa: Callable[..., Tensor],
        window_size: tuple[int, int],
        softmax_scale: float | None,
        make_module: Callable[[int, int], nn.Module] | None,
    ) -> None:
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.original_sdpa = original_sdpa
        self.window_size = window_size
        self.softmax_scale = softmax_scale
        self.make_module = make_module
        self.modules = {(num_heads, num_kv_heads): te_module}

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        **unknown: Any,
    ) -> Tensor:
        if attn_mask is None:
            key, value = self._window_of_last_query(query, key, value, is_causal)
            if not (is_causal and query.shape[-2] == key.shape[-2]):
                attn_mask, is_causal = self._window_as_mask(query, key, is_causal)
        options = {
            "attn_mask": attn_mask,
            "dropout_p": dropout_p,
            "is_causal": is_causal,
            "scale": scale,
            "enable_gqa": enable_gqa,
            **unknown,
        }
        refusal, mask = self._refusal(query, key, value, options)
        if refusal is not None:
            _count(refusal)
            if attn_mask is None:
                options["attn_mask"], options["is_causal"] = self._window_as_mask(query, key, is_causal)
            return self.original_sdpa(query, key, value, **options)
        groups = key.shape[1]
        if query.shape[1] == self.num_heads == groups and self.num_kv_heads < self.num_heads:
            # repeat_kv: each key head stands here num_heads / num_kv_heads times.
            groups = self.num_kv_heads
            key, value = (x[:, :: self.num_heads // groups] for x in (key, value))
        te_module = self._module_for(query.shape[1], groups, query.device)
        assert te_module is not None
        q, k, v = (x.transpose(1, 2).contiguous() for x in (query, key, value))
        with torch.cuda.device(query.device) if query.is_cuda else contextlib.nullcontext():
            out: Tensor = te_module(q, k, v, attn_mask_type=mask[0], window_size=mask[1])
        _count("te_hits")
        if out.dim() == 3:  # TransformerEngine joins heads and dim
            out = out.unflatten(-1, (query.shape[1], -1))
        return out.transpose(1, 2).contiguous()

    def _refusal(
        self, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]
    ) -> tuple[str | None, tuple[str, tuple[int, int]]]:
        """The counter of the reason to leave the call to SDPA, if there is one; and the mask for TE."""
        mask = ("no_mask", (-1, -1))
        if self._unsupported(query, key, value, options):
            return "fallback_unsupported", mask
        if not self._same_scale(options["scale"], query.shape[-1]):
            return "fallback_scale_mismatch", mask
        if options["dropout_p"]:
            return "fallback_dropout", mask
        attn_mask = options["attn_mask"]
        if attn_mask is not None:
            found = self._causal_mask(attn_mask, query, key)
            return ("fallback_mask", mask) if found is None else (None, found)
        if options["is_causal"]:
            return None, ("causal", self.window_size)
        return None, mask

    def _causal_mask(
        self, attn_mask: Tensor, query: Tensor, key: Tensor
    ) -> tuple[str, tuple[int, int]] | None:
        if attn_mask.shape[-2:] != (query.shape[2], key.shape[2]):
            return None
        found = _detect_causal_mask(attn_mask, self.window_size)
        if found is None and (left := causal_left(attn_mask)) is not None:
            # The mask's window is what counts, whatever the layer's attributes say.
            found = "causal", ((-1 if left == attn_mask.shape[-1] - 1 else left), 0)
        return found

    def _unsupported(self, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> bool:
        tensors = (query, key, value)
        if any(x.dim() != 4 or isinstance(x, DTensor) for x in tensors):
            return True
        if len(options) > 5 or query.shape[0] != key.shape[0] or value.shape != key.shape:
            return True
        if query.shape[-1] != key.shape[-1] or query.shape[1] % key.shape[1]:
            return True
        if options["is_causal"] and query.shape[2] != key.shape[2]:
            return True  # SDPA puts the first query at the first key; TE's kernels differ
        heads = (query.shape[1], key.shape[1])
        known = (*self.modules, (self.num_heads, self.num_heads))
        return heads not in known and self.make_module is None

    def _same_scale(self, scale: float | None, head_dim: int) -> bool:
        global _SCALE_MISMATCH_WARNED
        default = head_dim**-0.5
        scale = default if scale is None else float(scale)
        own = default if self.softmax_scale is None else self.softmax_scale
        if math.isclose(scale, own, rel_tol=1e-6):
            return True
        if not _SCALE_MISMATCH_WARNED:
            _SCALE_MISMATCH_WARNED = True
            logger.warning(
                "attention is called with scale %g and its TE module was made with %g: such calls go to SDPA",
                scale,
                own,
            )
        return False

    def _module_for(self, num_heads: int, num_kv_heads: int, device: torch.device) -> nn.Module | None:
        """The TE module for the heads of a call: fewer than the layer's under tensor parallelism."""
        heads = (num_heads, num_kv_heads)
        if heads not in self.modules and self.make_module is not None:
            self.modules[heads] = self.make_module(*heads)
        module = self.modules.get(heads)
        if isinstance(module, nn.Module):  # it is no submodule, so nobody else moves it
            state = itertools.chain(module.parameters(), module.buffers())
            if any(x.device != device for x in state):
                module.to(device)
        return module

    def train(self, mode: bool) -> None:
        """Follow the layer's training mode."""
        for module in self.modules.values():
            if isinstance(module, nn.Module) and module.training != mode:
                module.train(mode)

    def _window_of_last_query(
        self, query: Tensor, key: Tensor, value: Tensor, is_causal: bool
    ) -> tuple[Tensor, Tensor]:
        """Keys and values of a decoding step, less those that the layer's window hides from it.

        One query stands at the last key. transformers lays the query heads of a key head out as
        queries ([B, key heads, heads per key head, dim]); they all stand there.
        """
        left = self.window_size[0]
        packed = query.shape[1] * query.shape[-2] == self.num_heads and query.shape[1] < self.num_heads
        if left < 0 or is_causal or key.shape[-2] <= left + 1 or not (query.shape[-2] == 1 or packed):
            return key, value
        return key[..., -(left + 1) :, :], value[..., -(left + 1) :, :]

    def _window_as_mask(self, query: Tensor, key: Tensor, is_causal: bool) -> tuple[Tensor | None, bool]:
        """The layer's window as a mask for SDPA, which knows no window; None where it hides nothing."""
        left, num_q, num_k = self.window_size[0], query.shape[-2], key.shape[-2]
        if left < 0 or num_k <= left + 1:
            return None, is_causal
        # As SDPA aligns: causal at the first key, and decoding chunks at the last.
        shift = 0 if is_causal else max(num_k - num_q, 0)
        ahead = torch.arange(num_k, device=query.device) - torch.arange(num_q, device=query.device)[:, None] - shift
        visible = ahead >= -left
        return (visible & (ahead <= 0) if is_causal else visible), False


def _make_te_sdpa(
    te_module: nn.Module,
    num_heads: int,
    num_kv_heads: int,
    original_sdpa: Callable[..., Tensor],
    window_size: tuple[int, int] = (-1, 0),
    softmax_scale: float | None = None,
    *,
    make_module: Callable[[int, int], nn.Module] | None = None,
) -> Callable[..., Tensor]:
    """A function with SDPA's arguments that computes with a TE module where that gives SDPA's numbers.

    It takes q, k, v [B, heads, S, dim], hands the module [B, S, heads, dim] with key heads that were
    repeated taken once, and gives [B, heads, S, dim]. To `original_sdpa` go, with all their arguments:
    masks that are not surely causal, another scale than the module's, dropout, and shapes that the
    module does not take.

    Args:
        te_module: made for num_heads, num_kv_heads and softmax_scale.
        window_size: the layer's window (left, 0), for calls without a mask; -1 for none. A query that
            is not causal sees `left` keys back and all ahead.
        softmax_scale: the module's; None: head dim ** -0.5.
        make_module: makes a module for other head counts (heads, key heads), met under tensor
            parallelism; None sends such calls to `original_sdpa`.
    """
    return _TeSdpa(
        te_module, num_heads, num_kv_heads, original_sdpa, window_size, softmax_scale, make_module
    )


class _DivertSdpa(TorchFunctionMode):
    """While it is entered, torch's SDPA in this thread is `te_sdpa`."""

    def __init__(self, te_sdpa: Callable[..., Tensor]) -> None:
        super().__init__()
        self.te_sdpa = te_sdpa
        self.calls = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is _TORCH_SDPA:
            self.calls += 1
            func = self.te_sdpa
        return func(*args, **(kwargs or {}))


def _patch_module_forward(module: nn.Module, te_sdpa: Callable[..., Tensor]) -> None:
    """Put a forward on the module (not its class) under which torch's SDPA is `te_sdpa`.

    A forward that the module already has of its own, as hooks put there, is what it runs; otherwise
    the class's, looked up at each call. The forward is a bound method: a deep copy of the module runs
    its own weights.
    """
    inner = module.__dict__.get("forward")

    @functools.wraps(type(module).forward if inner is None else inner)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        te_sdpa, own = self.__dict__["_te_sdpa"], self.__dict__["_te_inner_forward"]
        if isinstance(te_sdpa, _TeSdpa):
            te_sdpa.train(self.training)
        divert = _DivertSdpa(te_sdpa)
        with divert:  # not "as": dynamo's version of it gives None
            out = type(self).forward(self, *args, **kwargs) if own is None else own(*args, **kwargs)
        if not divert.calls:
            _warn_unused(self)
        return out

    object.__setattr__(module, "_te_sdpa", te_sdpa)
    object.__setattr__(module, "_te_inner_forward", inner)
    object.__setattr__(module, "forward", types.MethodType(forward, module))


_unused_warned: set[type] = set()


def _warn_unused(module: nn.Module) -> None:
    """Say once per class that its forward never came to SDPA."""
    if torch.compiler.is_compiling() or type(module) in _unused_warned:
        return
    _unused_warned.add(type(module))
    logger.warning(
        "%s has TE attention injected and its forward did not call torch's SDPA, so TE was not used: is the "
        "model loaded with attn_implementation='sdpa'?",
        type(module).__name__,
    )


def inject_te_attention_into_module(module: nn.Module, *, portable: bool = False) -> bool:
    """Give one attention module a TE module, kept as `module.attn_module`.

    The TE module is no registered submodule, so checkpoints keep their names.

    Args:
        module: with q_proj, k_proj, v_proj and head_dim, and a forward that calls torch's SDPA.
        portable: use `PortableDotProductAttention`, which needs no TransformerEngine.

    Returns:
        Whether the module has the layout.

    Raises:
        ImportError: TransformerEngine is not here and portable is False.
    """
    params = _infer_attn_params(module)
    if params is None:
        return False
    te_module = _create(portable, **params)
    make_module = functools.partial(_create_for_heads, portable, params)
    te_sdpa = _make_te_sdpa(
        te_module,
        params["num_heads"],
        params["num_kv_heads"],
        _TORCH_SDPA,
        params["window_size"],
        params["softmax_scale"],
        make_module=make_module,
    )
    _patch_module_forward(module, te_sdpa)
    object.__setattr__(module, _TE_MODULE_ATTR, te_module)
    return True


def _create(portable: bool, **params: Any) -> nn.Module:
    options: dict[str, Any] = {"portable": True} if portable else {}
    return _create_te_dot_product_attention(**params, **options)


def _create_for_heads(portable: bool, params: dict[str, Any], num_heads: int, num_kv_heads: int) -> nn.Module:
    return _create(portable, **{**params, "num_heads": num_heads, "num_kv_heads": num_kv_heads})


def inject_te_attention(model: nn.Module, *, portable: bool = False) -> None:
    """Give every compatible `self_attn` of a model a TE module; sets `model._te_attention_injected`.

    Call it after the weights are loaded and before FSDP wraps the model. Modules that have an
    `attn_module` are left alone. Nothing is injected and a warning is logged where no layer fits.

    Args, Raises: as `inject_te_attention_into_module`.
    """
    count = 0
    for name, module in model.named_modules():
        if name.endswith("self_attn") and not hasattr(module, _TE_MODULE_ATTR):
            count += inject_te_attention_into_module(module, portable=portable)
    if not count:
        logger.warning(
            "TE attention: no self_attn of %s has q_proj, k_proj, v_proj and head_dim; nothing was injected",
            type(model).__name__,
        )
        return
    setattr(model, _TE_MODEL_FLAG, True)
    logger.info("TE attention injected into %d layers of %s", count, type(model).__name__)


def _injected(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        te_module = module.__dict__.get(_TE_MODULE_ATTR)
        if isinstance(te_module, nn.Module):
            yield name, te_module


def get_te_extra_state(model: nn.Module) -> dict[str, Any]:
    """FP8 state of the injected TE modules by layer name, which the model's state_dict leaves out."""
    return {
        name: te_module.get_extra_state()
        for name, te_module in _injected(model)
        if type(te_module).get_extra_state is not nn.Module.get_extra_state
    }


def set_te_extra_state(model: nn.Module, state: dict[str, Any]) -> None:
    """Put back what `get_te_extra_state` gave.

    Raises:
        ValueError: the state names layers that have no TE module here.
    """
    modules = dict(_injected(model))
    unknown = sorted(set(state) - set(modules))
    if unknown:
        raise ValueError(f"the state has layers {unknown[:3]} and the model has no TE module there: inject first")
    for name, value in state.items():
        modules[name].set_extra_state(value)
