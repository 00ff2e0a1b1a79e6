"""Every name that the four documentation pages give exists here, with the parameters and defaults they give.

The pages describe nemo_automodel's `components.attention.utils`, `components.attention.flex_attention`,
`_transformers.te_attention` and `components.distributed.magi_attn_utils`. Our functions may take more,
as long as no caller has to give it.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import logging
import subprocess
import sys
from typing import Any

import pytest
from torch import nn

# Page -> name -> what it is and, for what is called, its parameters as documented.
PAGES: dict[str, dict[str, tuple[str, str]]] = {
    "attention_utils": {
        "initialize_attn_module_and_func": (
            "function",
            "attn_impl, num_attention_heads, num_qk_channels, num_v_channels, softmax_scale, "
            "attn_mask_type='causal', qkv_format='bshd', num_gqa_groups=None, **kwargs",
        ),
        "postprocess_output_for_attn": ("function", "x, attn_impl"),
        "preprocess_args_and_kwargs_for_attn": ("function", "q, k, v, attention_mask, attn_impl, **kwargs"),
    },
    "flex_attention": {
        "FlexAttention": ("class", ""),
        "FlexAttention._fixed_block_mask_mod": ("staticmethod", "mask_mod, fixed_block_size"),
        "FlexAttention._get_block_causal_mask_mod": ("staticmethod", "batch, eos_id"),
        "FlexAttention._get_causal_mask_mod": ("staticmethod", ""),
        "FlexAttention._get_sliding_window_mask_mod": ("staticmethod", "window"),
        "FlexAttention.forward": (
            "method",
            "q, k, v, scale=None, sink_weights=None, sliding_window=0, enable_gqa=False",
        ),
        "FLEX_ATTN_MASK_T": ("data", ""),
    },
    "te_attention": {
        "get_te_attention_stats": ("function", ""),
        "reset_te_attention_stats": ("function", ""),
        "_proj_out_features": ("function", "proj"),
        "_infer_attn_params": ("function", "module"),
        "_create_te_dot_product_attention": (
            "function",
            "num_heads, num_kv_heads, head_dim, window_size=(-1, 0), softmax_scale=None",
        ),
        "_detect_causal_mask": ("function", "attn_mask, window_size"),
        "_maybe_log_stats": ("function", ""),
        "_make_te_sdpa": (
            "function",
            "te_module, num_heads, num_kv_heads, original_sdpa, window_size=(-1, 0), softmax_scale=None",
        ),
        "_patch_module_forward": ("function", "module, te_sdpa"),
        "inject_te_attention_into_module": ("function", "module"),
        "inject_te_attention": ("function", "model"),
        "logger": ("data", ""),
        "_TE_MODULE_ATTR": ("data", ""),
        "_TE_MODEL_FLAG": ("data", ""),
        "_TE_STATS": ("data", ""),
        "_STATS_LOG_EVERY": ("data", ""),
        "_SCALE_MISMATCH_WARNED": ("data", ""),
    },
    "magi_attn_utils": {
        "AttnMaskSpec": ("dataclass", "q_ranges, k_ranges, mask_types, total_seqlen"),
        "AttnMaskSpec.causal": ("classmethod", "seqlen"),
        "AttnMaskSpec.fingerprint": ("method", ""),
        "AttnMaskSpec.prefix_tree": ("classmethod", "node_lengths, sample_paths"),
        "AttnMaskSpec.varlen": ("classmethod", "seqlens, causal=True"),
        "MagiState": ("dataclass", "enabled=False, custom=False, cp_group=None, cp_size=1"),
        "MagiState.hf_dispatch": ("property", ""),
        "MagiState.prepare_llm_batch": ("method", "model, batch, device_mesh, is_thd, pad_id, num_chunks"),
        "MagiState.prepare_vlm_batch": ("method", "model, batch"),
        "_build_self_key": ("function", "cp_group, seqlen, num_heads_q, num_heads_kv, head_dim, device"),
        "_flex_key_for": ("function", "cp_group, spec, num_heads_q, num_heads_kv, head_dim"),
        "_get_head_config": ("function", "model"),
        "_iter_language_model_attention": ("function", "model"),
        "_packed_cp_doc_seqlens": ("function", "batch, total_len"),
        "_self_key_for": ("function", "cp_group, seqlen, num_heads_q, num_heads_kv, head_dim, device"),
        "_set_cp_group_on_attention": ("function", "model, cp_group"),
        "build_flex_key": ("function", "spec, num_heads_q, num_heads_kv, head_dim, cp_group"),
        "get_active_attn_spec": ("function", ""),
        "get_active_cp_group": ("function", ""),
        "get_cp_group": ("function", "device_mesh"),
        "is_magi_available": ("function", ""),
        "magi_prepare_batch": ("function", "model, batch, cp_group, chunk_size=512"),
        "magi_prepare_packed_cp": ("function", "model, batch, cp_group"),
        "magi_prepare_vlm": ("function", "model, batch, cp_group"),
        "make_magi_attn_func": ("function", "softmax_scale=None"),
        "register_magi_attention": ("function", ""),
        "set_active_attn_spec": ("function", "spec"),
        "set_active_cp_group": ("function", "cp_group"),
        "setup_magi": ("function", "cfg, device_mesh, label=''"),
        "DEFAULT_CHUNK_SIZE": ("data", ""),
        "_ACTIVE_ATTN_SPEC": ("data", ""),
        "_ACTIVE_CP_GROUP": ("data", ""),
        "_FLEX_KEY_CACHE": ("data", ""),
        "_MAGI_REGISTERED": ("data", ""),
        "_MAGI_SELF_KEY_LEN": ("data", ""),
        "logger": ("data", ""),
    },
}

# Values of module data when the module has just been imported.
FRESH_DATA: dict[str, dict[str, Any]] = {
    "te_attention": {
        "_TE_MODULE_ATTR": "attn_module",
        "_TE_MODEL_FLAG": "_te_attention_injected",
        "_STATS_LOG_EVERY": 500,
        "_SCALE_MISMATCH_WARNED": False,
    },
    "magi_attn_utils": {
        "DEFAULT_CHUNK_SIZE": 512,
        "_ACTIVE_ATTN_SPEC": None,
        "_ACTIVE_CP_GROUP": None,
        "_FLEX_KEY_CACHE": {},
        "_MAGI_REGISTERED": False,
        "_MAGI_SELF_KEY_LEN": {},
    },
}

SYMBOLS = [(page, name) for page, names in PAGES.items() for name in names]


def load(page: str) -> Any:
    return importlib.import_module(f"cpattn.automodel.{page}")


def documented(parameters: str) -> dict[str, Any]:
    """Name -> default of a documented parameter list; `inspect.Parameter.empty` where there is none."""
    function = ast.parse(f"def documented({parameters}): pass").body[0]
    assert isinstance(function, ast.FunctionDef)
    arguments = function.args
    names = [a.arg for a in arguments.args]
    defaults = [ast.literal_eval(d) for d in arguments.defaults]
    missing = [inspect.Parameter.empty] * (len(names) - len(defaults))
    found = dict(zip(names, [*missing, *defaults], strict=True))
    if arguments.kwarg is not None:
        found[f"**{arguments.kwarg.arg}"] = inspect.Parameter.empty
    return found


@pytest.mark.parametrize(("page", "name"), SYMBOLS, ids=[f"{page}.{name}" for page, name in SYMBOLS])
def test_symbol(page: str, name: str) -> None:
    kind, parameters = PAGES[page][name]
    owner, symbol = None, load(page)
    for part in name.split("."):
        assert hasattr(symbol, part), f"cpattn.automodel.{page} has no {name}"
        owner, symbol = symbol, getattr(symbol, part)
    if inspect.isclass(owner):
        wrapper = inspect.getattr_static(owner, name.split(".")[-1])
        wanted = {"staticmethod": staticmethod, "classmethod": classmethod, "property": property}.get(kind)
        assert isinstance(wrapper, wanted) if wanted else inspect.isfunction(wrapper)
    if kind == "dataclass":
        assert dataclasses.is_dataclass(symbol)
    if kind in ("data", "property"):
        return
    assert callable(symbol)
    assert_takes(symbol, parameters, skip_self=kind == "method")


def assert_takes(symbol: Any, parameters: str, *, skip_self: bool) -> None:
    """The documented parameters come first, in order and with their defaults; others need not be given."""
    own = list(inspect.signature(symbol).parameters.values())[skip_self:]
    for name, default in documented(parameters).items():
        if name.startswith("**"):
            assert any(p.kind is p.VAR_KEYWORD for p in own), f"takes no {name}"
            continue
        parameter = own.pop(0)
        assert parameter.name == name
        assert parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        assert parameter.default == default, f"{name} defaults to {parameter.default!r}"
    for parameter in own:
        optional = parameter.default is not parameter.empty or parameter.kind in (
            parameter.VAR_KEYWORD,
            parameter.VAR_POSITIONAL,
        )
        assert optional, f"{parameter.name} is not documented and has no default"


def test_fresh_data() -> None:
    """In a process of its own: other tests set some of it."""
    names = {page: list(data) for page, data in FRESH_DATA.items()}
    code = (
        "import importlib\n"
        "def data(page, names):\n"
        "    module = importlib.import_module(f'cpattn.automodel.{page}')\n"
        "    return {name: getattr(module, name) for name in names}\n"
        f"print({{page: data(page, names) for page, names in {names!r}.items()}})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert ast.literal_eval(done.stdout.splitlines()[-1]) == FRESH_DATA


@pytest.mark.parametrize("page", ["te_attention", "magi_attn_utils"])
def test_loggers(page: str) -> None:
    assert isinstance(load(page).logger, logging.Logger)


def test_flex_attention_types() -> None:
    module = load("flex_attention")
    assert issubclass(module.FlexAttention, nn.Module)
    assert tuple[str, int | None] | tuple[int, int, int] == module.FLEX_ATTN_MASK_T


def test_counters_have_the_documented_names() -> None:
    assert {"te_hits", "fallback_mask", "fallback_scale_mismatch"} <= set(load("te_attention").get_te_attention_stats())
