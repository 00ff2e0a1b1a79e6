"""Mask specs: what a query may see, and their lowering to slices."""
