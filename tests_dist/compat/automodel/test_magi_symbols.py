"""The names, parameters and defaults of the page nemo_automodel.components.distributed.magi_attn_utils."""

from __future__ import annotations

import inspect
import logging
from dataclasses import fields

import pytest

from cpattn.automodel import magi_attn_utils as magi

PARAMETERS = {
    "_build_self_key": "cp_group seqlen num_heads_q num_heads_kv head_dim device",
    "_flex_key_for": "cp_group spec num_heads_q num_heads_kv head_dim",
    "_get_head_config": "model",
    "_iter_language_model_attention": "model",
    "_packed_cp_doc_seqlens": "batch total_len",
    "_self_key_for": "cp_group seqlen num_heads_q num_heads_kv head_dim device",
    "_set_cp_group_on_attention": "model cp_group",
    "build_flex_key": "spec num_heads_q num_heads_kv head_dim cp_group",
    "get_active_attn_spec": "",
    "get_active_cp_group": "",
    "get_cp_group": "device_mesh",
    "is_magi_available": "",
    "magi_prepare_batch": "model batch cp_group chunk_size",
    "magi_prepare_packed_cp": "model batch cp_group",
    "magi_prepare_vlm": "model batch cp_group",
    "make_magi_attn_func": "softmax_scale",
    "register_magi_attention": "",
    "set_active_attn_spec": "spec",
    "set_active_cp_group": "cp_group",
    "setup_magi": "cfg device_mesh label",
    "AttnMaskSpec.causal": "seqlen",
    "AttnMaskSpec.fingerprint": "self",
    "AttnMaskSpec.prefix_tree": "node_lengths sample_paths",
    "AttnMaskSpec.varlen": "seqlens causal",
    "MagiState.prepare_llm_batch": "self model batch device_mesh is_thd pad_id num_chunks",
    "MagiState.prepare_vlm_batch": "self model batch",
}
DEFAULTS = {
    "magi_prepare_batch": {"chunk_size": 512},
    "make_magi_attn_func": {"softmax_scale": None},
    "setup_magi": {"label": ""},
    "AttnMaskSpec.varlen": {"causal": True},
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_signature(name):
    function = magi
    for part in name.split("."):
        function = getattr(function, part)
    parameters = inspect.signature(function).parameters
    assert list(parameters) == PARAMETERS[name].split()
    given = {n: p.default for n, p in parameters.items() if p.default is not inspect.Parameter.empty}
    assert given == DEFAULTS.get(name, {})


def test_classes():
    """AttnMaskSpec has the four documented fields first; more are optional."""
    state = [(f.name, f.default) for f in fields(magi.MagiState)]
    assert state == [("enabled", False), ("custom", False), ("cp_group", None), ("cp_size", 1)]
    spec = magi.AttnMaskSpec([[0, 4]], [[0, 4]], ["causal"], 4)
    assert [f.name for f in fields(spec)][:4] == ["q_ranges", "k_ranges", "mask_types", "total_seqlen"]
    assert not magi.MagiState().hf_dispatch
    assert magi.MagiState(True).hf_dispatch
    assert not magi.MagiState(True, True).hf_dispatch


def test_data():
    assert magi.DEFAULT_CHUNK_SIZE == 512
    assert magi._ACTIVE_ATTN_SPEC is None
    assert magi._ACTIVE_CP_GROUP is None
    assert isinstance(magi._FLEX_KEY_CACHE, dict)
    assert isinstance(magi._MAGI_SELF_KEY_LEN, dict)
    assert magi._MAGI_REGISTERED in (False, True)
    assert isinstance(magi.logger, logging.Logger)
    assert magi.logger.name == magi.__name__


def test_prefix_tree_golden_example():
    """The documented layout of rectangles and of each sample's token ranges."""
    spec, ranges = magi.AttnMaskSpec.prefix_tree([4, 2, 3], [[0, 1], [0, 2]])
    assert spec.q_ranges == [[0, 4], [4, 6], [4, 6], [6, 9], [6, 9]]
    assert spec.k_ranges == [[0, 4], [4, 6], [0, 4], [6, 9], [0, 4]]
    assert spec.mask_types == ["causal", "causal", "full", "causal", "full"]
    assert spec.total_seqlen == 9
    assert ranges == [[[0, 4], [4, 6]], [[0, 4], [6, 9]]]


class DottedConfig(dict):
    """As the recipes' configuration: `.get("a.b", default)`."""


def test_setup_is_off_unless_configured():
    assert magi.setup_magi(DottedConfig(), None) == magi.MagiState()


@pytest.mark.parametrize(("entry", "custom"), [("model.backend.attn", True), ("model.attn_implementation", False)])
def test_setup_enables_both_paths(entry, custom, monkeypatch, caplog):
    """Only custom models use the process-wide group."""
    registered, groups = [], []
    monkeypatch.setattr(magi, "register_magi_attention", lambda: registered.append(True))
    monkeypatch.setattr(magi, "set_active_cp_group", groups.append)
    with caplog.at_level(logging.INFO, logger=magi.__name__):
        state = magi.setup_magi(DottedConfig({entry: "magi"}), None, label="VLM language backbone")
    assert state == magi.MagiState(True, custom, None, 1)
    assert registered == [True]
    assert groups == ([None] if custom else [])
    assert "VLM language backbone" in caplog.text


def test_setup_without_the_engine(monkeypatch):
    monkeypatch.setattr(magi, "is_magi_available", lambda: False)
    with pytest.raises(RuntimeError, match="not importable"):
        magi.setup_magi(DottedConfig({"model.attn_implementation": "magi"}), None)


def test_head_config():
    class Text:
        num_attention_heads, num_key_value_heads, hidden_size = 8, 2, 64

    class Vision:
        text_config = Text()

    assert magi._get_head_config(Text()) == (8, 2, 8)
    assert magi._get_head_config(Vision()) == (8, 2, 8)
