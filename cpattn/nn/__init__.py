"""Modules: `ContextParallel`, a transformers model whose batches are spread over ranks."""

from cpattn.integrations.transformers import ContextParallel

__all__ = ["ContextParallel"]
