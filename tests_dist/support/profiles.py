"""How much the suite tries: examples of property tests, and which cases of a grid run by default.

Two sizes. The default run is small and the same every time. The nightly run (`-m nightly`, launch/nightly.sh) tries
many more examples, other ones each time, and every case of every grid.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import pytest
from hypothesis import settings

settings.register_profile(
    "default", max_examples=60, stateful_step_count=15, deadline=None, derandomize=True, database=None
)
settings.register_profile("nightly", max_examples=1500, deadline=None, print_blob=True)


def a_part(share: float) -> settings:
    """Settings of a test whose examples cost more than others': that share of the profile's number of them."""
    return settings(max_examples=max(1, round(settings().max_examples * share)))


def is_nightly(markexpr: str) -> bool:
    """Whether pytest's -m asks for the tests marked nightly ("not nightly" does not)."""
    return re.search(r"(?<!not )\bnightly\b", markexpr) is not None


def load_profile(config: pytest.Config) -> None:
    """Hypothesis' settings for this run; --hypothesis-profile goes before."""
    if not config.getoption("--hypothesis-profile", None):
        settings.load_profile("nightly" if is_nightly(config.option.markexpr) else "default")


def grid(**axes: Iterable[Any]) -> pytest.MarkDecorator:
    """`pytest.mark.parametrize` over all combinations; by default few, in which every pair of values occurs."""
    return pytest.mark.parametrize(tuple(axes), few_of(list(itertools.product(*axes.values()))))


def each_once(**axes: Iterable[Any]) -> pytest.MarkDecorator:
    """The same; by default each value of the longest axis once, while those of the others take turns."""
    columns = [list(values) for values in axes.values()]
    cases = list(itertools.product(*columns))
    turns = {tuple(column[turn % len(column)] for column in columns) for turn in range(max(map(len, columns)))}
    return pytest.mark.parametrize(tuple(axes), _params(cases, {n for n, case in enumerate(cases) if case in turns}))


def few_of(cases: Sequence[Any], shows: Callable[[Any], Iterable[Hashable]] | None = None) -> list[Any]:
    """All cases as parameters of a test, those marked nightly that show nothing which the others do not.

    Args:
        cases: tuples of the test's arguments; or anything else, for a test of one argument.
        shows: what a case shows; None: each pair of its values.
    """
    return _params(cases, covering([frozenset((shows or pairs)(case)) for case in cases]))


def pairs(values: Iterable[Hashable]) -> Iterable[Hashable]:
    """Each pair of values with their axes: the default of `few_of`, and for features of other cases than tuples."""
    return itertools.combinations(enumerate(values), 2)


def covering(sets: Sequence[frozenset[Hashable]]) -> set[int]:
    """Numbers of a few of the sets that have every element that any of them has; greedily, the largest gain first."""
    waiting = frozenset().union(*sets)
    left = dict(enumerate(sets))
    chosen = set()
    while waiting:
        # What a set would still bring only shrinks: one that brings nothing is out for good.
        left = {number: new for number, old in left.items() if (new := old & waiting)}
        best = max(left, key=lambda number: (len(left[number]), -number))
        chosen.add(best)
        waiting -= sets[best]
    return chosen


def _params(cases: Sequence[Any], often: set[int]) -> list[Any]:
    params = []
    for number, case in enumerate(cases):
        values = case if isinstance(case, tuple) else (case,)
        name = "-".join(map(str, values)) if isinstance(case, tuple) else None
        marks = [] if number in often else [pytest.mark.nightly]
        params.append(pytest.param(*values, marks=marks, id=name))
    return params
