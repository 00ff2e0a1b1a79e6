"""Dividing anew what two ranks hold: layer 1, all ranks in one process, no torch."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given

from cpattn.solver import (
    UNBOUNDED,
    Placement,
    SliceTable,
    place_contiguous,
    place_zigzag,
)
from cpattn.solver.place.balance import place_balanced
from cpattn.solver.place.components import find_components
from cpattn.solver.place.density import DensityProfile
from cpattn.solver.place.divide import Allowed, Pool, best_divisions
from cpattn.solver.place.improve import Holdings, relieve_heaviest, repack
from cpattn.solver.place.measure import kv_rows_received, rank_areas
from tests_dist.solver.test_balance import documents, lognormal_lengths, random_masks


def allowed_by(table: SliceTable, placement: Placement, chunk_size: int = 0) -> Allowed:
    """Bounds that the placement keeps, with token counts at most a chunk apart."""
    tokens = placement.num_tokens
    most = max(int(tokens.max()), int(tokens.min()) + chunk_size)
    return Allowed(int(tokens.min()), most, float(rank_areas(table, placement).max()))


def parts(table: SliceTable, placement: Placement) -> tuple[DensityProfile, np.ndarray]:
    total = placement.total_seqlen
    return DensityProfile.from_table(table, total), find_components(table, total)[0]


def check_allowed(table: SliceTable, placement: Placement, allowed: Allowed) -> None:
    assert placement.num_tokens.min() >= allowed.least
    assert placement.num_tokens.max() <= allowed.most
    assert rank_areas(table, placement).max() <= allowed.area


@pytest.mark.parametrize("causal", [True, False])
def test_needless_cuts_are_mended(causal: bool) -> None:
    """Two documents, each half on either rank: one document for each rank moves nothing."""
    table = documents([100, 100], causal=causal)
    halves = Placement.from_runs(np.array([50, 100, 150, 200]), np.array([0, 1, 1, 0]), cp_size=2)
    allowed = allowed_by(table, halves)
    mended = repack(Holdings([halves], *parts(table, halves), allowed), num_rounds=4)
    assert kv_rows_received(table, halves).sum() > 0
    assert kv_rows_received(table, mended).sum() == 0
    check_allowed(table, mended, allowed)


@pytest.mark.parametrize("rounds", [1, 60])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_fewer_rows_and_no_less_balance(seed: int, causal: bool, rounds: int) -> None:
    table = documents(lognormal_lengths(1 << 16, seed), causal=causal)
    before = place_balanced(table, total_seqlen=1 << 16, cp_size=8, chunk_size=512)
    allowed = allowed_by(table, before, 512)
    after = repack(Holdings([before], *parts(table, before), allowed), num_rounds=rounds)
    assert after.total_seqlen == 1 << 16
    assert kv_rows_received(table, after).sum() <= kv_rows_received(table, before).sum()
    check_allowed(table, after, allowed)


def test_drafts_are_divided_side_by_side() -> None:
    """Each stays a placement of its own, within the bounds of all, and the cheapest is taken."""
    total = 1 << 15
    table = documents(lognormal_lengths(total, 3, mean=1500))
    zigzag, contiguous = place_zigzag(total, 8), place_contiguous(total, 8)
    areas = np.concatenate([rank_areas(table, draft) for draft in (zigzag, contiguous)])
    allowed = Allowed(total // 8 - 128, total // 8 + 128, float(areas.max()))
    state = Holdings([zigzag, contiguous, zigzag], *parts(table, zigzag), allowed)
    found = repack(state, num_rounds=12)
    drafts = [state.placement(i) for i in range(3)]
    rows = [int(kv_rows_received(table, draft).sum()) for draft in (found, *drafts)]
    assert rows[0] == min(rows)
    assert max(rows) < kv_rows_received(table, zigzag).sum()
    for draft in drafts:
        assert draft.total_seqlen == total
        check_allowed(table, draft, allowed)


def test_heavy_ranks_share_what_they_have_too_much_of() -> None:
    """Long documents on the last ranks: no other rank alone has room for what one of these has too much of."""
    lengths = np.array([512] * 24 + [4096] * 3)
    table, total = documents(lengths), int(lengths.sum())
    before = place_contiguous(total, 6)
    limit = 1.05 * float(rank_areas(table, before).mean())
    allowed = Allowed(total // 6 - 64, total // 6 + 64, limit)
    after = relieve_heaviest(Holdings([before], *parts(table, before), allowed), num_rounds=24)
    assert rank_areas(table, before).max() > 1.5 * limit
    check_allowed(table, after, allowed)


@given(random_masks())
def test_any_mask_stays_balanced(case: tuple[SliceTable, int]) -> None:
    """Where densities are no straight lines, a division that would break a limit is not taken."""
    table, seqlen = case
    owners = np.arange(seqlen) % 3
    scattered = Placement.from_runs(np.arange(1, seqlen + 1), owners, cp_size=3)
    allowed = allowed_by(table, scattered)
    after = repack(Holdings([scattered], *parts(table, scattered), allowed), num_rounds=6)
    assert after.total_seqlen == seqlen
    check_allowed(table, after, allowed)


@pytest.mark.parametrize("seed", range(12))
def test_the_division_is_the_best_there_is(seed: int) -> None:
    """Two ranks, a few short causal documents: against every subset and every cut of one document."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 14, 4)
    table, total = documents(lengths), int(lengths.sum())
    start = Placement.from_runs(np.array([total // 2, total]), np.array([0, 1]), cp_size=2)
    if not kv_rows_received(table, start).any():
        pytest.skip("nothing to mend")
    allowed = allowed_by(table, start, 2)
    divided = repack(Holdings([start], *parts(table, start), allowed), num_rounds=20)
    starts = np.cumsum(lengths) - lengths
    best = int(kv_rows_received(table, start).sum())
    for cut in range(4):
        for count in range(int(lengths[cut]) + 1):
            for subset in range(16):
                # The low `count` tokens of document `cut` on rank 0, the others whole.
                owner = np.repeat([subset >> i & 1 for i in range(4)], lengths)
                owner[starts[cut] : starts[cut] + lengths[cut]] = 1
                owner[starts[cut] : starts[cut] + count] = 0
                for owners in (owner, 1 - owner):
                    placement = Placement.from_runs(np.arange(1, total + 1), owners, cp_size=2)
                    tokens, areas = placement.num_tokens, rank_areas(table, placement)
                    if tokens.min() >= allowed.least and tokens.max() <= allowed.most and areas.max() <= allowed.area:
                        best = min(best, int(kv_rows_received(table, placement).sum()))
    assert kv_rows_received(table, divided).sum() == best


def random_pool(rng: np.random.Generator, num_pairs: int, num_free: int) -> Pool:
    """Pieces of random lengths at random places of a few causal documents, and some that are kept."""
    tokens = rng.integers(0, 40, (num_pairs, num_free)).astype(np.float64)
    sparse = rng.integers(1, 60, tokens.shape) * (tokens > 0)
    rise = np.maximum(tokens - 1, 0)
    kept_tokens = rng.integers(0, 60, (num_pairs, 2)).astype(np.float64)
    return Pool(
        np.where(tokens > 0, rng.integers(0, 3, tokens.shape), -1),
        tokens,
        tokens * (2 * sparse + rise) / 2,
        sparse + rise,
        sparse,
        rise,
        rng.integers(0, 50, (num_pairs, 2, num_free)) * rng.integers(0, 2, (num_pairs, 2, num_free)).astype(np.float64),
        kept_tokens,
        kept_tokens * 30,
    )


def rows_of(pool: Pool, pair: int, held: list[dict[int, float]]) -> float:
    """Keys that both ranks need; held: for either rank, what its pieces of each component need."""
    total = 0.0
    for side, needs in enumerate(held):
        for component in {c for c in pool.component[pair].tolist() if c >= 0}:
            at = pool.component[pair].tolist().index(component)
            total += max(needs.get(component, 0.0), float(pool.kept_need[pair, side, at]))
    return total


@pytest.mark.parametrize("seed", range(6))
def test_many_pairs_are_divided_as_each_alone_would_be(seed: int) -> None:
    """No subset of whole pieces that is allowed needs fewer keys, and pairs do not mix."""
    rng = np.random.default_rng(seed)
    pool = random_pool(rng, 40, 4)
    # Whatever is kept of a component is so for all its pieces.
    for pair in range(40):
        for i, component in enumerate(pool.component[pair]):
            pool.kept_need[pair, :, i] = pool.kept_need[pair, :, pool.component[pair].tolist().index(component)]
    allowed = Allowed(60, 120, 5000.0)
    together = best_divisions(pool, allowed)
    for pair in range(40):
        alone = best_divisions(Pool(*(column[pair : pair + 1] for column in pool)), allowed)
        assert [column[0] for column in alone] == [column[pair] for column in together]
        best = np.inf
        for subset in range(16):
            took = np.array([subset >> i & 1 for i in range(4)], dtype=bool)
            sides = [took, ~took]
            tokens = [pool.tokens[pair][side].sum() + pool.kept_tokens[pair, i] for i, side in enumerate(sides)]
            areas = [pool.area[pair][side].sum() + pool.kept_area[pair, i] for i, side in enumerate(sides)]
            if min(tokens) < allowed.least or max(tokens) > allowed.most or max(areas) > allowed.area:
                continue
            held: list[dict[int, float]] = [{}, {}]
            for i, component in enumerate(pool.component[pair].tolist()):
                needs = held[0 if took[i] else 1]
                needs[component] = max(needs.get(component, 0.0), float(pool.need[pair, i]))
            best = min(best, rows_of(pool, pair, held))
        assert together.found[pair] or best == np.inf
        if together.found[pair] and together.cut[pair] < 0:
            held = [{}, {}]
            for i, component in enumerate(pool.component[pair].tolist()):
                needs = held[0 if together.subset[pair] >> i & 1 else 1]
                needs[component] = max(needs.get(component, 0.0), float(pool.need[pair, i]))
            assert rows_of(pool, pair, held) == best


def test_a_flipped_document_is_cut_at_its_sparse_end() -> None:
    """Inverse causal documents see the keys after them: their last tokens are the sparse ones."""
    lengths = np.array([60, 20, 20])
    ends = np.cumsum(lengths)
    table = SliceTable.from_columns(ends - lengths, ends, ends - lengths, ends, 0, UNBOUNDED)
    before = Placement.from_runs(np.array([30, 60, 80, 100]), np.array([0, 1, 0, 1]), cp_size=2)
    allowed = allowed_by(table, before, 20)
    after = repack(Holdings([before], *parts(table, before), allowed), num_rounds=4)
    assert kv_rows_received(table, after).sum() <= kv_rows_received(table, before).sum()
    check_allowed(table, after, allowed)
