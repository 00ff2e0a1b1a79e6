"""The documented path of `ModelShape` and `generate`, which live in `cpattn.decoding`."""

from cpattn.decoding.generation import ModelShape, generate

__all__ = ["ModelShape", "generate"]
