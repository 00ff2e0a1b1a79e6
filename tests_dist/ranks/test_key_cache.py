"""Layer 1: the cache of keys, in any order of calls (one process): what is asked for is what comes back."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

import cpattn
from cpattn import AttnKey, AttnMaskSpec
from cpattn.keys import cache
from tests_dist.support.oracle import assert_exact, make_inputs, oracle
from tests_dist.support.profiles import a_part
from tests_dist.support.rank_cases import run_with_key

TOTAL = 12
SPECS = (
    AttnMaskSpec.causal(TOTAL),
    AttnMaskSpec.varlen([5, 0, 7]),
    AttnMaskSpec.varlen([5, 7], causal=False),
    AttnMaskSpec([[2, 9]], [[0, 12]], ["bi_causal"], TOTAL),
)
HEADS = ((2, 1, 4), (4, 2, 8))
OPTIONS: tuple[dict[str, Any], ...] = ({}, {"window": 3}, {"backend": "reference"}, {"keep_kv": True})

specs = st.sampled_from(range(len(SPECS)))
heads = st.sampled_from(HEADS)
options = st.sampled_from(range(len(OPTIONS)))


@pytest.fixture(scope="module", autouse=True)
def _only_what_is_made_here() -> Iterator[None]:
    """What other tests left need not be looked through each time."""
    gc.freeze()
    yield
    gc.unfreeze()


class Keys(RuleBasedStateMachine):
    """Keys by what they were asked for. One of the cache's may be dropped when there are more than it holds."""

    def __init__(self) -> None:
        super().__init__()
        cache.clear_key_cache()
        self.made: dict[tuple[Any, ...], AttnKey] = {}
        self.entries: set[Any] = set()  # what the cache has been asked for since it was cleared

    def teardown(self) -> None:
        cache.clear_key_cache()

    @rule(number=specs, shape=heads, chosen=options)
    def make(self, number: int, shape: tuple[int, int, int], chosen: int) -> None:
        asked = (number, shape, chosen)
        self.look_up(asked, copy.deepcopy(SPECS[number]))

    @rule(number=specs, shape=heads, chosen=options)
    def make_and_change_the_spec(self, number: int, shape: tuple[int, int, int], chosen: int) -> None:
        """The user's list is his own: what he does to it afterwards changes no key."""
        spec = copy.deepcopy(SPECS[number])
        self.look_up((number, shape, chosen), spec)
        spec.q_ranges.append([0, TOTAL])
        spec.k_ranges.append([0, TOTAL])
        spec.mask_types.append("full")

    def look_up(self, asked: tuple[Any, ...], spec: AttnMaskSpec) -> None:
        _, (num_q, num_kv, head_dim), chosen = asked
        key = cpattn.make_key(spec, num_heads_q=num_q, num_heads_kv=num_kv, head_dim=head_dim, **OPTIONS[chosen])
        if asked in self.entries and asked in self.made and len(self.entries) <= cache.MAX_CACHED_KEYS:
            assert key is self.made[asked], "made again"
        assert all(key is not other for known, other in self.made.items() if known != asked), "another's key"
        self.made[asked] = key
        self.entries.add(asked)

    @precondition(lambda self: self.made)
    @rule(data=st.data(), number=specs)
    def ask_a_key_for_another_mask(self, data: st.DataObject, number: int) -> None:
        asked = data.draw(st.sampled_from(sorted(self.made)))
        key = self.made[asked]
        other = key.with_mask(copy.deepcopy(SPECS[number]))
        assert other.spec.fingerprint() == SPECS[number].fingerprint()
        assert other.heads == key.heads
        assert other.q_placement.owners.tolist() == key.q_placement.owners.tolist()
        assert key.with_mask(SPECS[number]) is other
        self.entries.add((int(key.handle), number))

    @precondition(lambda self: self.made)
    @rule(data=st.data(), shape=heads)
    def ask_a_key_for_other_heads(self, data: st.DataObject, shape: tuple[int, int, int]) -> None:
        asked = data.draw(st.sampled_from(sorted(self.made)))
        other = self.made[asked].with_heads(*shape)
        assert (other.num_heads_q, other.num_heads_kv, other.head_dim) == shape
        assert other.plan is self.made[asked].plan
        assert (other is self.made[asked]) == (shape == asked[1])

    @precondition(lambda self: self.made)
    @rule(data=st.data())
    def attend(self, data: st.DataObject) -> None:
        """Under the mask that was asked for, whatever has happened since."""
        number, shape, chosen = asked = data.draw(st.sampled_from(sorted(self.made)))
        if "window" not in OPTIONS[chosen]:
            inputs = make_inputs(SPECS[number], heads=shape[:2], head_dim=shape[2], dtype=torch.float64)
            assert_exact(run_with_key(self.made[asked], inputs), oracle(SPECS[number], inputs), str(asked))

    @precondition(lambda self: self.made)
    @rule(data=st.data())
    def forget_one(self, data: st.DataObject) -> None:
        """Its user lets a key go; the cache may hold it on."""
        del self.made[data.draw(st.sampled_from(sorted(self.made)))]

    @rule()
    def clear(self) -> None:
        cache.clear_key_cache()
        self.entries.clear()
        gc.collect()

    @invariant()
    def every_key_is_what_it_was_asked_to_be(self) -> None:
        for (number, shape, chosen), key in self.made.items():
            assert key.spec.fingerprint() == SPECS[number].fingerprint()
            assert (key.num_heads_q, key.num_heads_kv, key.head_dim) == shape
            assert key.options.window == ((2, None) if "window" in OPTIONS[chosen] else None)
            assert key.options.running.keep_kv == OPTIONS[chosen].get("keep_kv", False)
            assert cache.find_by_handle(key.handle) is key


TestKeys = Keys.TestCase
TestKeys.settings = a_part(0.025)  # each example is up to fifteen steps
