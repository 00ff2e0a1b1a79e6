"""Balanced placement: layer 1, all ranks in one process, no torch."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cpattn.solver import UNBOUNDED, Placement, SliceTable, disjoint_union, place_zigzag
from cpattn.solver.place.balance import AREA_LIMIT, place_balanced
from cpattn.solver.place.components import TokenPool, find_components, join_small
from cpattn.solver.place.density import DensityProfile, last_within
from cpattn.solver.place.even import even_out
from cpattn.solver.place.measure import kv_rows_received, rank_areas
from cpattn.solver.place.peel import place_peeled
from cpattn.solver.place.queues import place_by_density, place_in_levels


def documents(lengths, *, causal=True):
    """Documents on the diagonal; zero lengths are empty documents."""
    ends = np.cumsum(lengths)
    return SliceTable.from_columns(
        ends - lengths, ends, ends - lengths, ends, -UNBOUNDED, 0 if causal else UNBOUNDED
    )


def lognormal_lengths(seqlen, seed, mean=4096, sigma=1.2):
    rng = np.random.default_rng(seed)
    lengths, total = [], 0
    while total < seqlen:
        n = min(max(1, int(rng.lognormal(np.log(mean) - sigma**2 / 2, sigma))), seqlen - total)
        lengths.append(n)
        total += n
    return np.array(lengths)


def window(seqlen, keys):
    return SliceTable.from_columns([0], [seqlen], [0], [seqlen], 1 - keys, 0)


def prefix_tree(root, node, branches, leaves):
    """A root, branches, leaves below each branch; nodes see ancestors fully and themselves causally."""
    rows, at = [(0, root, 0, root, -UNBOUNDED, 0)], root
    for _ in range(branches):
        branch = at
        for child in range(leaves + 1):
            rows.append((at, at + node, 0, root, -UNBOUNDED, UNBOUNDED))
            if child:
                rows.append((at, at + node, branch, branch + node, -UNBOUNDED, UNBOUNDED))
            rows.append((at, at + node, at, at + node, -UNBOUNDED, 0))
            at += node
    return SliceTable.from_columns(*np.array(rows).T), at


def test_even_out_finds_an_exchange_where_whole_runs_would_move_nothing() -> None:
    """Of two runs alike, dense ends against sparse ends: the area moved rises with the tokens, and falls again."""
    table = documents(np.array([1000] * 3))
    profile = DensityProfile.from_table(table, 3000)
    uneven = Placement.from_runs(np.array([2000, 3000]), np.array([0, 1]), cp_size=2)
    even = even_out(uneven, profile, limit=758_000, max_exchanges=4)
    assert even.num_tokens.tolist() == [2000, 1000]
    assert rank_areas(table, even).max() <= 758_000


@given(steps=st.lists(st.sampled_from([0, 0, 1, 5, 1000]), max_size=300), offset=st.integers(0, 50_000))
def test_last_count_within_a_limit(steps: list[int], offset: int) -> None:
    """Flat stretches, steps and jumps; few looks for either, and never past the limit."""
    values = np.concatenate([[0], np.cumsum(steps)]) - offset + 1000
    looked: list[int] = []

    def value(count: int) -> float:
        looked.append(count)
        return float(values[count - 7])

    found = last_within(value, 7, 7 + len(steps)) - 7
    last = int(np.searchsorted(values, 0, side="right")) - 1
    assert found == last
    assert len(looked) <= 2 + 3 * max(len(steps), 1).bit_length()


@st.composite
def random_masks(draw, max_tokens=48, max_slices=5):
    """Disjoint banded rectangles over a short sequence; tokens without any slice occur."""
    seqlen = draw(st.integers(1, max_tokens))
    index = st.integers(0, seqlen)
    rows = []
    for _ in range(draw(st.integers(0, max_slices))):
        q0, q1 = sorted((draw(index), draw(index)))
        k0, k1 = sorted((draw(index), draw(index)))
        lo = draw(st.one_of(st.just(-UNBOUNDED), st.integers(-seqlen, seqlen)))
        hi = draw(st.one_of(st.just(UNBOUNDED), st.integers(-seqlen, seqlen)))
        rows.append((q0, q1, k0, k1, lo, hi))
    columns = np.array(rows, dtype=np.int64).reshape(-1, 6).T
    return disjoint_union(SliceTable.from_columns(*columns)), seqlen


def owners_of(placement, seqlen):
    return placement.owner_of(np.arange(seqlen))


def dense_rows_received(dense, owners, cp_size):
    """The definition: key rows seen by a rank's queries and owned by another rank."""
    return np.array([int((dense[owners == r].any(axis=0) & (owners != r)).sum()) for r in range(cp_size)])


@given(random_masks())
def test_profile_is_the_row_sum_of_the_mask(mask):
    table, seqlen = mask
    density = table.to_dense(seqlen, seqlen).sum(axis=1)
    profile = DensityProfile.from_table(table, seqlen).cut_at_density(density.mean())
    pieces = zip(profile.starts, profile.ends, profile.first, profile.slopes, strict=True)
    drawn = np.concatenate([first + slope * np.arange(end - start) for start, end, first, slope in pieces])
    np.testing.assert_array_equal(drawn, density)
    ramp = profile.ramp
    assert [ramp.below(i) for i in range(seqlen + 1)] == np.concatenate([[0], np.cumsum(density)]).tolist()


@given(random_masks(), st.integers(1, 6), st.integers(0, 10**6))
def test_metric_counts_what_the_definition_counts(mask, cp_size, seed):
    table, seqlen = mask
    owners = np.random.default_rng(seed).integers(0, cp_size, seqlen)
    placement = Placement.from_runs(np.arange(1, seqlen + 1), owners, cp_size=cp_size)
    dense = table.to_dense(seqlen, seqlen)
    np.testing.assert_array_equal(
        kv_rows_received(table, placement), dense_rows_received(dense, owners, cp_size)
    )
    areas = [int(dense[owners == r].sum()) for r in range(cp_size)]
    assert rank_areas(table, placement).tolist() == areas


@given(random_masks(), st.sampled_from([1, 2, 3, 5, 8, 60]), st.integers(1, 9))
@example((SliceTable.from_columns(0, 2, 3, 4, 2, 3), 8), 8, 2)  # most senders end up without any token
def test_every_token_has_one_owner_and_counts_are_even(mask, cp_size, chunk_size):
    """Any mask, more ranks than tokens, tokens in no slice: still a placement, and an even one."""
    table, seqlen = mask
    placement = place_balanced(table, total_seqlen=seqlen, cp_size=cp_size, chunk_size=chunk_size)
    assert placement.total_seqlen == seqlen
    assert placement.num_tokens.sum() == seqlen
    assert np.ptp(placement.num_tokens) <= chunk_size
    lengths = placement.ends - placement.starts
    assert (lengths > 0).all()
    np.testing.assert_array_equal(placement.starts[1:], placement.ends[:-1])


@given(random_masks(max_tokens=400, max_slices=8), st.sampled_from([2, 3, 5]))
def test_density_queues_balance_any_mask(mask, cp_size):
    """Each rank's area is off by a few tokens' density at most, whatever the mask."""
    table, seqlen = mask
    profile = DensityProfile.from_table(table, seqlen)
    placement = place_by_density(profile, total_seqlen=seqlen, cp_size=cp_size)
    areas = rank_areas(table, placement)
    density = table.to_dense(seqlen, seqlen).sum(axis=1)
    # Uneven token counts (by one) and the rounding of each cut: two tokens on either side.
    assert areas.max() - areas.mean() <= 4 * density.max()


@pytest.mark.parametrize("cp_size", [2, 3, 5, 8, 16])
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("causal", [True, False])
def test_packed_documents_are_balanced_and_local(cp_size, seed, causal):
    """Far fewer rows than the even spreading of chunks that balances by area alone."""
    seqlen = 8192 * cp_size
    table = documents(lognormal_lengths(seqlen, seed, mean=2048, sigma=0.8), causal=causal)
    placement = place_balanced(table, total_seqlen=seqlen, cp_size=cp_size, chunk_size=512)
    areas, rows = rank_areas(table, placement), kv_rows_received(table, placement)
    assert np.ptp(placement.num_tokens) <= 512
    assert areas.max() <= AREA_LIMIT * areas.mean()
    spread = Placement.from_runs(
        np.arange(512, seqlen + 1, 512), np.arange(seqlen // 512) % cp_size, cp_size=cp_size
    )
    assert rows.sum() <= 0.65 * kv_rows_received(table, spread).sum()


@pytest.mark.parametrize("cp_size", [2, 4, 8])
def test_one_causal_sequence_is_no_worse_than_zigzag(cp_size):
    """Zigzag moves 3/4 of the sequence per rank, the least for even tokens and area."""
    seqlen = 4096 * cp_size
    table = documents([seqlen])
    placement = place_balanced(table, total_seqlen=seqlen, cp_size=cp_size, chunk_size=256)
    zigzag = kv_rows_received(table, place_zigzag(seqlen, cp_size)).sum()
    areas = rank_areas(table, placement)
    assert kv_rows_received(table, placement).sum() <= zigzag
    assert areas.max() <= 1.01 * areas.mean()


def test_windows_stay_contiguous_and_move_only_halos():
    seqlen, cp_size, keys = 1 << 18, 16, 512
    table = window(seqlen, keys)
    placement = place_balanced(table, total_seqlen=seqlen, cp_size=cp_size, chunk_size=1024)
    assert len(placement.owners) == cp_size
    assert kv_rows_received(table, placement).sum() == (cp_size - 1) * (keys - 1)


def test_tree_leaves_meet_their_branch():
    """16 families of four leaves on 64 ranks: the root and one branch are all that a rank fetches."""
    table, seqlen = prefix_tree(root=8192, node=716, branches=16, leaves=4)
    placement = place_balanced(table, total_seqlen=seqlen, cp_size=64, chunk_size=seqlen // 1024)
    areas, rows = rank_areas(table, placement), kv_rows_received(table, placement)
    assert areas.max() <= 1.01 * areas.mean()
    own = seqlen // 64 - 716
    assert rows.max() <= 8192 + 716 - own + 16


def test_levels_with_one_level_are_the_zigzag():
    seqlen, cp_size = 6000, 5
    table = documents([seqlen])
    profile = DensityProfile.from_table(table, seqlen)
    placement = place_in_levels(profile, total_seqlen=seqlen, cp_size=cp_size, chunk_size=64)
    np.testing.assert_array_equal(
        kv_rows_received(table, placement)[::-1],
        sorted(kv_rows_received(table, place_zigzag(seqlen, cp_size))),
    )


def test_the_same_plan_every_time():
    table = documents(lognormal_lengths(1 << 16, 3))
    plans = [
        place_balanced(table, total_seqlen=1 << 16, cp_size=8, chunk_size=512, search_effort=effort)
        for effort in (0, 0, 3, 3)
    ]
    for a, b in (plans[:2], plans[2:]):
        np.testing.assert_array_equal(a.ends, b.ends)
        np.testing.assert_array_equal(a.owners, b.owners)


def test_search_is_never_worse_than_none():
    table = documents(lognormal_lengths(1 << 17, 1))
    rows = [
        kv_rows_received(
            table,
            place_balanced(table, total_seqlen=1 << 17, cp_size=16, chunk_size=512, search_effort=effort),
        ).sum()
        for effort in (0, 1, 4)
    ]
    assert rows[0] >= rows[1]
    assert rows[0] > rows[2]


def test_moving_a_document_moves_no_more_rows():
    """Metamorphic: rows depend on the documents, hardly on their order."""
    lengths = lognormal_lengths(1 << 16, 5)
    rows = [
        kv_rows_received(
            documents(order),
            place_balanced(documents(order), total_seqlen=1 << 16, cp_size=8, chunk_size=512),
        ).sum()
        for order in (lengths, lengths[::-1])
    ]
    assert max(rows) <= 1.25 * min(rows)


@pytest.mark.parametrize(
    ("lengths", "total"),
    [([], 0), ([], 7), ([1], 1), ([0, 5, 0, 0, 3, 0], 8), ([3, 4], 40), ([1] * 30, 30)],
)
@pytest.mark.parametrize("cp_size", [1, 2, 3, 5, 64])
def test_odd_sequences(lengths, total, cp_size):
    """Empty sequences and documents, tails that no slice touches, fewer tokens than ranks."""
    table = documents(np.array(lengths, dtype=np.int64)) if lengths else SliceTable.empty()
    placement = place_balanced(table, total_seqlen=total, cp_size=cp_size, chunk_size=1)
    assert placement.num_tokens.sum() == total
    assert placement.num_tokens.max() - placement.num_tokens.min() <= 1


def test_components_cover_the_sequence():
    table = SliceTable.from_columns([4, 6, 20], [8, 9, 22], [2, 6, 18], [5, 9, 19], -UNBOUNDED, UNBOUNDED)
    starts, ends = find_components(table, 30)
    assert list(zip(starts.tolist(), ends.tolist(), strict=True)) == [
        (0, 2),
        (2, 9),
        (9, 18),
        (18, 22),
        (22, 30),
    ]


@given(random_masks(), st.lists(st.tuples(st.booleans(), st.integers(1, 9)), max_size=12))
def test_pool_gives_each_token_once_and_keeps_its_sums(mask, moves):
    table, seqlen = mask
    density = table.to_dense(seqlen, seqlen).sum(axis=1)
    pool = TokenPool(DensityProfile.from_table(table, seqlen), *find_components(table, seqlen))
    given_out = []
    for from_top, count in moves:
        if not pool.by_need:
            break
        i = pool.by_need[-1][1]
        count = min(count, pool.size(i))
        expected = pool.top_area(i, count) if from_top else pool.bottom_area(i, count)
        start, end, area = (pool.take_top if from_top else pool.take_bottom)(i, count)
        assert area == expected == density[start:end].sum()
        given_out += range(start, end)
    while pool.by_size:
        start, end, area = pool.take_all(pool.by_size[0][1])
        assert area == density[start:end].sum()
        given_out += range(start, end)
    assert sorted(given_out) == list(range(seqlen))


@given(st.lists(st.integers(1, 30), min_size=1, max_size=40), st.integers(0, 20))
def test_small_components_are_joined_to_neighbours_of_their_kind(lengths, size):
    """Cuts only where components meet; large ones stay as they are, and joined ones have fewer than 2 * size tokens."""
    ends = np.cumsum(lengths)
    starts = ends - lengths
    new_starts, new_ends = join_small(starts, ends, size)
    assert set(new_starts) <= set(starts)
    np.testing.assert_array_equal(new_ends, [*new_starts[1:], ends[-1]])
    kept = set(zip(new_starts.tolist(), new_ends.tolist(), strict=True))
    assert kept >= {(a, b) for a, b in zip(starts.tolist(), ends.tolist(), strict=True) if b - a >= size}
    assert all(b - a < 2 * size for a, b in kept - set(zip(starts.tolist(), ends.tolist(), strict=True)))
    num_large = int((np.array(lengths) >= size).sum())
    assert len(new_starts) <= ends[-1] / max(size, 1) + 2 * num_large + 1


def test_thousands_of_tiny_documents_stay_whole_and_even():
    """Bundled: balance as ever, and at most about one cut document for each rank."""
    seqlen, cp_size = 1 << 18, 8
    table = documents(lognormal_lengths(seqlen, 0, mean=60, sigma=1.0))
    placement = place_balanced(table, total_seqlen=seqlen, cp_size=cp_size, chunk_size=2048)
    areas = rank_areas(table, placement)
    assert np.ptp(placement.num_tokens) <= 2048
    assert areas.max() <= AREA_LIMIT * areas.mean()
    assert kv_rows_received(table, placement).sum() <= 0.02 * seqlen


@pytest.mark.parametrize("causal", [True, False])
def test_peeling_alone_is_even_and_saves_rows(causal):
    """Long documents on many ranks, before anything is divided anew: even tokens, far fewer rows than in order."""
    table, seqlen, cp_size = documents(lognormal_lengths(1 << 18, 2), causal=causal), 1 << 18, 64
    pool = TokenPool(DensityProfile.from_table(table, seqlen), *find_components(table, seqlen))
    most_area = AREA_LIMIT * table.area() / cp_size
    placement = place_peeled(pool, cp_size=cp_size, chunk_size=256, most_area=most_area, lean=0.8)
    assert np.ptp(placement.num_tokens) <= 256
    areas = rank_areas(table, placement)
    assert np.sort(areas)[-4] <= AREA_LIMIT * areas.mean()  # the last ranks take what nobody wanted
    chunks = np.arange(256, seqlen + 1, 256)
    spread = Placement.from_runs(chunks, np.arange(len(chunks)) % cp_size, cp_size=cp_size)
    assert kv_rows_received(table, placement).sum() < 0.5 * kv_rows_received(table, spread).sum()


def test_search_takes_what_it_may_save():
    """A row that costs nothing is not searched for, and a long search finds fewer than none."""
    table = documents(lognormal_lengths(1 << 17, 1))
    size = {"total_seqlen": 1 << 17, "cp_size": 16, "chunk_size": 512}
    rows = [
        kv_rows_received(table, place_balanced(table, **size, **how)).sum()
        for how in ({"row_ms": 0.0}, {"row_ms": 1.0}, {"search_effort": 1})
    ]
    assert rows[0] > rows[1] == rows[2]


def test_a_rank_does_not_take_all_leftovers():
    """One and a half documents for each rank: none of them is to gather the pieces that nobody wanted."""
    lengths = np.full(48, 1024)
    table = documents(lengths)
    placement = place_balanced(table, total_seqlen=48 * 1024, cp_size=32, chunk_size=96)
    rows, areas = kv_rows_received(table, placement), rank_areas(table, placement)
    assert areas.max() <= AREA_LIMIT * areas.mean()
    assert rows.max() <= 2048


def fewest_rows(dense, cp_size, limit):
    """Exhaustive: the fewest rows over all placements of single tokens with even counts and areas."""
    seqlen = len(dense)
    per_token = dense.sum(axis=1)
    most = -(-seqlen // cp_size)
    best = None
    for owners in itertools.product(range(cp_size), repeat=seqlen):
        owners = np.array(owners)
        counts = np.bincount(owners, minlength=cp_size)
        if counts.max() > most or counts.min() < seqlen // cp_size:
            continue
        if np.bincount(owners, per_token, cp_size).max() > limit:
            continue
        rows = dense_rows_received(dense, owners, cp_size).sum()
        best = rows if best is None else min(best, rows)
    return best


@pytest.mark.parametrize("seed", range(12))
def test_close_to_the_best_of_all_placements(seed):
    """Eight tokens on two ranks, every placement tried, at the balance that ours reached."""
    rng = np.random.default_rng(seed)
    lengths = rng.multinomial(8, [0.4, 0.35, 0.25])
    table = documents(lengths[lengths > 0], causal=bool(seed % 2))
    placement = place_balanced(table, total_seqlen=8, cp_size=2, chunk_size=1)
    ours = kv_rows_received(table, placement).sum()
    best = fewest_rows(table.to_dense(8, 8), 2, rank_areas(table, placement).max())
    assert best is not None
    assert best <= ours <= best + 4
