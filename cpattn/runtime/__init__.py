"""Execution of a bound plan: exchanges, kernels and merges; traces and memory of it."""
