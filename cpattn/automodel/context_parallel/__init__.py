"""Modules with the names of Automodel 0.7's `components.distributed.context_parallel`."""
