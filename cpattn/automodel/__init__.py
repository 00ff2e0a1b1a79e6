"""Attention modules with the module names that automodel-style training recipes load."""

from __future__ import annotations

import importlib
import sys

_MAGI = {
    "nemo_automodel.components.distributed.context_parallel.magi": "cpattn.automodel.context_parallel.magi",
    "nemo_automodel.components.distributed.magi_attn_utils": "cpattn.automodel.magi_attn_utils",
}
_ATTENTION = {
    "nemo_automodel.components.attention.utils": "cpattn.automodel.attention_utils",
    "nemo_automodel.components.attention.flex_attention": "cpattn.automodel.flex_attention",
    "nemo_automodel._transformers.te_attention": "cpattn.automodel.te_attention",
}


def install(*, attention: bool = False) -> None:
    """Let NeMo Automodel find this project's modules under its own names: "magi" then is this project.

    Call it before a recipe is imported. Idempotent.

    Args:
        attention: besides the wiring of "magi", the modules of `components.attention` and TE's injection.

    Raises:
        RuntimeError: Automodel's own module of one of these names is imported already.
    """
    wanted = {**_MAGI, **(_ATTENTION if attention else {})}
    for theirs, ours in wanted.items():
        module = importlib.import_module(ours)
        if sys.modules.get(theirs, module) is not module:
            raise RuntimeError(f"{theirs} is imported already: call cpattn.automodel.install() before a recipe is")
    for theirs, ours in wanted.items():
        sys.modules[theirs] = sys.modules[ours]
