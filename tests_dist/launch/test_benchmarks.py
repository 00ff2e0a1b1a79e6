"""Benchmarks that reckon: what they share out is all there, and what they run is what they say."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from cpattn.launch.benchmarks.charts import PUBLISHED, compare_with_charts, draw_pack
from cpattn.launch.benchmarks.groups import corpus, draw, fixed_groups, measure, power_groups
from tests_dist.support.namespaces import skip_without_namespaces


@pytest.mark.parametrize("share", [fixed_groups, power_groups])
@pytest.mark.parametrize("name", ["lognormal", "pareto", "two sizes"])
def test_groups_have_all_tokens_and_room_for_them(name, share):
    lengths, ranks, tokens = corpus(name, 60 * 8192, seed=0), 64, 8192
    groups = share(lengths, ranks, tokens)
    assert sum(group.ranks for group in groups) == ranks
    assert sum(sum(group.lengths) for group in groups) == sum(lengths)
    assert all(sum(group.lengths) + group.room[0] == group.ranks * tokens for group in groups)
    assert all(group.room[0] >= 0 for group in groups)


def test_no_way_to_group_is_faster_than_the_ideal(tmp_path):
    outcomes = measure("two sizes", 16, 8192, seed=0)
    for one in outcomes:
        assert 0 < one.of_ideal <= 1
        assert one.imbalance >= 1
    pytest.importorskip("matplotlib")
    draw(outcomes, tmp_path / "groups.png")
    assert (tmp_path / "groups.png").stat().st_size > 10_000


def test_packs_are_full_and_no_document_is_longer_than_a_quarter():
    for seed in range(20):
        lengths = draw_pack(65536, seed)
        assert sum(lengths) == 65536
        assert min(lengths) > 0
        assert max(lengths) <= 65536 // 4


def test_the_cost_model_is_near_published_charts():
    """Of a mask that is the same for all: within a tenth; of documents drawn as theirs were: within a factor of two."""
    rows = compare_with_charts(packs=1)
    assert len(rows) == len(PUBLISHED) + 4
    for row in rows:
        for model, chart in zip(row["model"], row["published"] or row["model"], strict=True):
            limit = 1.1 if row["mask"] == "causal" else 2
            assert 1 / limit < model / chart < limit, row


@pytest.mark.nightly
def test_the_cost_model_is_held_against_real_exchanges(tmp_path):
    skip_without_namespaces()
    command = [sys.executable, "-m", "cpattn.launch.benchmarks.model_check", "--ranks", "2", "--masks", "window"]
    subprocess.run([*command, "--repeats", "1", "--out", tmp_path], check=True, timeout=300)
    (result,) = tmp_path.glob("*.json")
    ways = {step["way"] for step in json.loads(result.read_text())["steps"]}
    assert ways >= {"auto", "keys, 1 stage", "keys, 4 stages", "contiguous", "zigzag", "head_degree 2"}
