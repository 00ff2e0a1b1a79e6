"""Calls into TransformerEngine where it is installed. Adapts to its version by signatures, not version strings."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch

from .layouts import parse_layout


def te_installed() -> bool:
    """Whether `import transformer_engine.pytorch` works here."""
    try:
        import_module("transformer_engine.pytorch")
    except Exception:  # a broken installation raises OSError and the like, not only ImportError
        return False
    return True


def call_te(ours: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """Call the function of `transformer_engine.pytorch.cpp_extensions.fused_attn` that ours is named after.

    ours: takes the arguments; what is at its default need not be known to the installed version.

    Fills in what versions want beyond them: 2.20's o_format, do_format and dqkv_layout (whose defaults are wrong for
    most layouts), 2.12's dqkv_dtype, the kernel choice, and the padded offsets that thd needs.

    Raises:
        RuntimeError: TransformerEngine is not installed.
        ValueError: the installed version does not have an argument that the call sets, or tensors are on the CPU.
    """
    _require_cuda(arguments["q"])
    module = _import("transformer_engine.pytorch.cpp_extensions.fused_attn")
    function = getattr(module, ours.__name__)
    parameters = inspect.signature(function).parameters
    given = dict(arguments)
    layout = parse_layout(given["qkv_layout"])
    if given.get("fused_attention_backend") is None:
        given["fused_attention_backend"] = module.FusedAttnBackend["F16_arbitrary_seqlen"]
    if given.get("fake_dtype") is None:
        given["fake_dtype"] = given["q"].dtype
    for side, fmt in (("q", layout.q_format), ("kv", layout.kv_format)):
        if fmt == "thd" and given[f"cu_seqlens_{side}_padded"] is None:
            given[f"cu_seqlens_{side}_padded"] = given[f"cu_seqlens_{side}"]
    if given.get("bottom_right_diagonal") is None:
        given["bottom_right_diagonal"] = given["attn_mask_type"].endswith("bottom_right")
        if "bottom_right_diagonal" not in parameters:
            del given["bottom_right_diagonal"]  # that version takes it from the mask type
    if "causal" in given["attn_mask_type"]:
        given["window_size"] = (given["window_size"][0], 0)
    formats = {"o_format": layout.q_format, "do_format": layout.q_format, "dqkv_layout": given["qkv_layout"]}
    for name, default in formats.items():
        if given.get(name) in (None, default):
            given[name] = default if name in parameters else None
    if "dqkv_dtype" in parameters and given.get("dqkv_dtype") is None:
        constants = _import("transformer_engine.pytorch.constants")
        given["dqkv_dtype"] = constants.TE_DType[given["fake_dtype"]]
    for missing in given.keys() - parameters.keys():
        default = inspect.signature(ours).parameters.get(missing)
        if default is not None and given[missing] is not None and given[missing] != default.default:
            raise ValueError(f"the installed TransformerEngine's {ours.__name__} has no argument {missing}")
    return function(**{n: value for n, value in given.items() if n in parameters})


def call_extension(name: str, *arguments: Any) -> Any:
    """Call a function of the compiled module `transformer_engine_torch`, positionally.

    Raises:
        RuntimeError: TransformerEngine is not installed.
        ValueError: tensors are on the CPU.
    """
    for argument in arguments:
        _require_cuda(argument)
    _import("transformer_engine.pytorch")  # the extension needs the package's tensor classes
    return getattr(_import("transformer_engine_torch"), name)(*arguments)


def qkv_format_enum(name: str) -> Any:
    """TransformerEngine's enum value of a format."""
    return getattr(_import("transformer_engine_torch").NVTE_QKV_Format, f"NVTE_{name.upper()}")


def _import(name: str) -> Any:
    try:
        return import_module(name)
    except Exception as error:
        raise RuntimeError(
            f"impl='te' needs TransformerEngine, and importing {name} failed: {error}; the default, impl='portable', "
            f"needs nothing"
        ) from error


def _require_cuda(x: Any) -> None:
    # TransformerEngine hands pointers to kernels without looking where they point.
    if isinstance(x, torch.Tensor) and not x.is_cuda:
        raise ValueError(f"impl='te' needs CUDA tensors, this one is on {x.device}: use impl='portable'")
