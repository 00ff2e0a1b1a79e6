"""The documented path of `generate`, `Session` and `ModelShape`, which live in `cpattn.decoding`."""

from cpattn.decoding.generation import ModelShape, Session, generate

__all__ = ["ModelShape", "Session", "generate"]
