"""Benchmarks; their results live in the folder results/."""
