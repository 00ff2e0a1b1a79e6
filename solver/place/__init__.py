"""Placement: which rank owns which tokens, so that area and tokens are even and few rows travel."""
