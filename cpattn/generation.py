"""The documented path of `generate`, `Session`, `ModelShape` and `trl_rollout`, which live in `cpattn.decoding`."""

from cpattn.decoding.generation import ModelShape, Session, generate
from cpattn.decoding.rollout import trl_rollout

__all__ = ["ModelShape", "Session", "generate", "trl_rollout"]
