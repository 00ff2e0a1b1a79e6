"""Convolutions and recurrences on any placement, against token-by-token recurrences in fp64."""
