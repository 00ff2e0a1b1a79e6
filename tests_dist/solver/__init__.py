"""Tests of the solver: plain Python and numpy, all ranks in one process."""
