"""Runtime layer: all options of keys and of calls at once, drawn at random, in fp64 against the dense oracle.

Other tests hold one option against many masks; here any option meets any other: moving queries with sharded heads, a
window over documents in nodes, kept keys of masks planned together, and so on.
"""

from __future__ import annotations

import pytest

from cpattn.testing.sweeps import check_random_options
from tests_dist.support.harness import run_on_ranks


@pytest.mark.shows("sinks")
@pytest.mark.parametrize("cp_size", [2, 3, 4])
def test_any_option_with_any_other(cp_size):
    seeds = range(100 * cp_size, 100 * cp_size + 6)
    assert sum(run_on_ranks(cp_size, check_random_options, seeds)) == len(seeds)


@pytest.mark.nightly
@pytest.mark.parametrize("cp_size", [2, 3, 4, 6])
def test_any_option_with_any_other_200_times(cp_size):
    seeds = range(1000 * cp_size, 1000 * cp_size + 200)
    assert sum(run_on_ranks(cp_size, check_random_options, seeds, timeout=1500)) == len(seeds)
