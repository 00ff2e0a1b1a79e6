"""Layer 1: the suite itself. Which cases run by default, and that faults planted in the code are found."""

from __future__ import annotations

import ast
import itertools
import os
from pathlib import Path

import pytest

from tests_dist.support.mutations import MUTATIONS, ROOT, try_all
from tests_dist.support.profiles import covering, each_once, few_of, grid, is_nightly, pairs

TESTS = Path(__file__).parent


def often(params: list) -> list[tuple]:
    """The cases that the default run has."""
    return [param.values for param in params if not param.marks]


def test_few_cases_show_every_pair_of_values():
    axes = {"a": range(7), "b": range(5), "c": range(3), "d": "xy"}
    cases = list(itertools.product(*axes.values()))
    params = grid(**axes).args[1]
    few = often(params)
    assert [param.values for param in params] == cases
    assert set().union(*map(pairs, few)) == set().union(*map(pairs, cases))
    assert len(few) <= 7 * 5 + 4, "the product of the two longest axes is the least"


def test_few_cases_of_a_list_with_features_of_its_own():
    params = few_of(["ab", "bc", "abc", "d"], shows=set)
    assert often(params) == [("abc",), ("d",)]
    assert covering([frozenset(), frozenset({1}), frozenset({1, 2})]) == {2}
    assert covering([]) == set()


def test_each_value_once():
    few = often(each_once(a=range(5), b="xy").args[1])
    assert sorted(few) == [(0, "x"), (1, "y"), (2, "x"), (3, "y"), (4, "x")]


@pytest.mark.parametrize(
    ("markexpr", "nightly"),
    [("", False), ("not gpu and not nightly", False), ("nightly", True), ("(nightly or hypothesis) and not gpu", True)],
)
def test_which_runs_are_nightly(markexpr, nightly):
    assert is_nightly(markexpr) == nightly


def test_property_tests_leave_their_size_to_the_profiles():
    """A number of examples in a test file would be the same in the nightly run."""
    imports = [
        (str(path.relative_to(TESTS)), {alias.name for alias in node.names})
        for path in TESTS.rglob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and node.module == "hypothesis"
    ]
    assert len(imports) > 5
    assert [path for path, names in imports if "settings" in names] == []


@pytest.mark.parametrize("name", MUTATIONS)
def test_the_text_that_a_mutation_changes_is_there_once(name):
    """Who moves the code moves the mutation: tests_dist/support/mutations.py."""
    assert MUTATIONS[name].old != MUTATIONS[name].new
    MUTATIONS[name].file(ROOT)


@pytest.mark.nightly
@pytest.mark.timeout(6 * 3600)
def test_every_mutation_is_caught():
    assert [outcome for outcome in try_all(MUTATIONS, jobs=os.cpu_count() or 1) if outcome.wrong] == []
