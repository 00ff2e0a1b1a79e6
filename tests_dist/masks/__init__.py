"""Mask specs and their lowering: one process, against masks written out as matrices."""
