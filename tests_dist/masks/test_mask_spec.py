"""Mask spec, one process: masks drawn by hand, random masks against the definition, every message."""

from __future__ import annotations

import re
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cpattn import AttnMaskSpec
from cpattn.masks import rectangles
from cpattn.masks.reading import read_window
from cpattn.masks.spec import RECT_TYPES, Document, lower_mask
from tests_dist.support.masks import MASKS
from tests_dist.support.strategies import specs


def drawn(picture: str) -> np.ndarray:
    """A boolean matrix from rows of 0 and 1."""
    return np.array([[digit == "1" for digit in row] for row in picture.split()])


def lowered(spec: AttnMaskSpec, window=None) -> np.ndarray:
    """The mask of the lowered slices, which must be disjoint."""
    table = lower_mask(spec, window)
    dense = table.to_dense(spec.total_seqlen, spec.seqlen_k)
    assert table.area() == dense.sum(), "the slices overlap"
    return dense


DRAWN_BY_HAND = {
    "causal": (AttnMaskSpec.causal(3), "100 110 111"),
    "varlen": (AttnMaskSpec.varlen([2, 0, 1, 2]), "10000 11000 00100 00010 00011"),
    "varlen full": (AttnMaskSpec.varlen([2, 1], causal=False), "110 110 001"),
    "cu_seqlens": (AttnMaskSpec.from_cu_seqlens([0, 1, 3]), "100 010 011"),
    "position_ids": (AttnMaskSpec.from_position_ids([0, 1, 0, 1, 2]), "10000 11000 00100 00110 00111"),
    "position_ids with a gap": (AttnMaskSpec.from_position_ids([0, 1, 5, 6, 6]), "10000 11000 00100 00110 00001"),
    "position_ids of a batch": (
        # The second row goes on where the first stops, and is another document all the same.
        AttnMaskSpec.from_position_ids([[5, 6], [7, 8]]),
        "1000 1100 0010 0011",
    ),
    "sliding window": (AttnMaskSpec.sliding_window(5, 2), "10000 11000 01100 00110 00011"),
    "sliding window of one": (AttnMaskSpec.sliding_window([2, 1], 1), "100 010 001"),
    "sliding window, packed": (AttnMaskSpec.sliding_window([3, 2], 2), "10000 11000 01100 00010 00011"),
    "window wider than the text": (AttnMaskSpec.sliding_window(3, 9), "100 110 111"),
    "two-sided window": (AttnMaskSpec.sliding_window(5, (1, 2)), "11100 11110 01111 00111 00011"),
    "two-sided window, short": (AttnMaskSpec.sliding_window([3, 1], (1, 2)), "1110 1110 0110 0001"),
    "window to the right": (AttnMaskSpec.sliding_window(4, (0, 1)), "1100 0110 0011 0001"),
    "block causal": (AttnMaskSpec.block_causal(5, 2), "11000 11000 11110 11110 11111"),
    "block causal, packed": (AttnMaskSpec.block_causal([3, 2], 2), "11000 11000 11100 00011 00011"),
    "prefix LM": (AttnMaskSpec.prefix_lm([2, 0], [4, 2]), "110000 110000 111000 111100 000010 000011"),
    "cross": (AttnMaskSpec.cross([1, 2], [2, 1]), "110 001 001"),
    "cross causal": (AttnMaskSpec.cross([2, 3], [3, 2], causal=True), "11000 11100 00000 00010 00011"),
    "prefix tree": (
        AttnMaskSpec.prefix_tree([2, 1, 2, 1], [[0, 1], [0, 2, 3]])[0],
        "100000 110000 111000 110100 110110 110111",
    ),
    "rectangle, full": (AttnMaskSpec([[1, 3]], [[0, 2]], ["full"], 3), "000 110 110"),
    "causal, more keys": (AttnMaskSpec([[0, 2]], [[0, 4]], ["causal"], 4), "1110 1111 0000 0000"),
    "causal, more queries": (AttnMaskSpec([[0, 4]], [[1, 3]], ["causal"], 4), "0000 0000 0100 0110"),
    "inv_causal, more keys": (AttnMaskSpec([[0, 2]], [[0, 4]], ["inv_causal"], 4), "1111 0111 0000 0000"),
    "inv_causal, more queries": (AttnMaskSpec([[0, 4]], [[1, 3]], ["inv_causal"], 4), "0110 0010 0000 0000"),
    "bi_causal": (AttnMaskSpec([[0, 2]], [[0, 4]], ["bi_causal"], 4), "1110 0111 0000 0000"),
    "bi_causal, square": (AttnMaskSpec([[0, 3]], [[0, 3]], ["bi_causal"], 3), "100 010 001"),
    "bi_causal, more queries": (AttnMaskSpec([[0, 3]], [[0, 2]], ["bi_causal"], 3), "000 000 000"),
    "overlap is a union": (
        AttnMaskSpec([[0, 3], [1, 3]], [[0, 3], [1, 3]], ["causal", "full"], 3),
        "100 111 111",
    ),
    "union": (AttnMaskSpec.causal(3) | AttnMaskSpec.sliding_window(3, (0, 1)), "110 111 111"),
    "no rectangle": (AttnMaskSpec([], [], [], 2), "00 00"),
}


@pytest.mark.parametrize("name", DRAWN_BY_HAND)
def test_constructors_draw_the_mask_drawn_by_hand(name):
    spec, picture = DRAWN_BY_HAND[name]
    np.testing.assert_array_equal(spec.to_dense(), drawn(picture))
    np.testing.assert_array_equal(lowered(spec), drawn(picture))


def test_prefix_tree_golden_example():
    """The example that other implementations of this spec are tested with, rectangle by rectangle."""
    spec, ranges = AttnMaskSpec.prefix_tree([4, 2, 3], [[0, 1], [0, 2]])
    assert spec.q_ranges == [[0, 4], [4, 6], [4, 6], [6, 9], [6, 9]]
    assert spec.k_ranges == [[0, 4], [4, 6], [0, 4], [6, 9], [0, 4]]
    assert spec.mask_types == ["causal", "causal", "full", "causal", "full"]
    assert spec.total_seqlen == 9
    assert ranges == [[[0, 4], [4, 6]], [[0, 4], [6, 9]]]
    assert spec.documents == [Document(0, 4, 0), Document(4, 6, 4), Document(6, 9, 4)]


def test_large_trees_take_two_rectangles_for_each_node_or_fewer():
    """A path is one causal triangle; depth first, what sees a node is one run; else there is a limit."""
    path, _ = AttnMaskSpec.prefix_tree([2] * 600, [list(range(600))])
    assert (path.q_ranges, path.k_ranges, path.mask_types) == ([[0, 1200]], [[0, 1200]], ["causal"])
    assert len(path.documents) == 600
    # A path with a leaf behind every node of it.
    comb = [[*range(0, 2 * turn + 1, 2), 2 * turn + 1] for turn in range(300)]
    spec, _ = AttnMaskSpec.prefix_tree([1] * 600, comb)
    assert len(lower_mask(spec)) == len(spec.q_ranges) <= 2 * 600
    # The same tree with all leaves behind the path, in an order in which no two neighbours are siblings.
    behind = [[*range(turn + 1), 300 + turn * 7 % 300] for turn in range(300)]
    with (
        mock.patch.object(rectangles, "_MOST_OF_TREE", 10_000),
        pytest.raises(ValueError, match=r"the 600 nodes of the tree lie in an order .* store them depth first"),
    ):
        AttnMaskSpec.prefix_tree([1] * 600, behind)


def test_blocks_of_one_token_are_causal():
    assert AttnMaskSpec.block_causal([3, 2], 1).fingerprint() == AttnMaskSpec.varlen([3, 2]).fingerprint()


@given(st.data())
def test_prefix_tree_shows_each_sample_what_it_would_see_alone(data):
    """Random trees, nodes in any order in the sequence: gathered by its ranges, a sample is causal."""
    num_nodes = data.draw(st.integers(1, 7))
    lengths = data.draw(st.lists(st.integers(0, 3), min_size=num_nodes, max_size=num_nodes))
    parent = [None] + [data.draw(st.integers(0, node - 1)) for node in range(1, num_nodes)]
    renamed = data.draw(st.permutations(range(num_nodes)))
    leaves = [node for node in range(num_nodes) if node not in parent]
    paths = []
    for leaf in leaves:
        path = []
        node = leaf
        while node is not None:
            path.append(renamed[node])
            node = parent[node]
        paths.append(path[::-1])
    # Drawn node by node, and as larger trees are.
    with mock.patch.object(rectangles, "_DRAWN_BY_NODE", data.draw(st.sampled_from([0, 1024]))):
        spec, ranges = AttnMaskSpec.prefix_tree(lengths, paths)
    dense = spec.to_dense()
    seen = np.zeros_like(dense)
    for path_ranges in ranges:
        tokens = np.concatenate([np.arange(start, end) for start, end in path_ranges])
        alone = np.tril(np.ones((len(tokens),) * 2, dtype=bool))
        np.testing.assert_array_equal(dense[np.ix_(tokens, tokens)], alone)
        seen[np.ix_(tokens, tokens)] = alone
        first = {d.start: d.first_position for d in spec.documents if d.end > d.start}
        position = 0
        for start, end in path_ranges:
            assert end == start or first[start] == position
            position += end - start
    np.testing.assert_array_equal(dense, seen)


@given(specs())
def test_lowering_is_exact(spec):
    """Overlaps, gaps and empty rectangles: disjoint slices hold exactly the pairs of the definition."""
    np.testing.assert_array_equal(lowered(spec), spec.to_dense())


@pytest.mark.parametrize("mask", MASKS)
def test_lowering_the_masks_that_the_ranks_run(mask):
    np.testing.assert_array_equal(lowered(MASKS[mask]), MASKS[mask].to_dense())


@given(specs(length=9), specs(length=9))
def test_union_is_the_union(a, b):
    if a.total_seqlen != b.total_seqlen:
        with pytest.raises(ValueError, match="same sequences"):
            a | b
        return
    np.testing.assert_array_equal((a | b).to_dense(), a.to_dense() | b.to_dense())
    np.testing.assert_array_equal(lowered(a | b), a.to_dense() | b.to_dense())


def test_union_keeps_documents_that_do_not_contradict():
    documents = AttnMaskSpec.varlen([2, 1])
    raw = AttnMaskSpec([[0, 3]], [[0, 3]], ["full"], 3)
    assert (documents | raw).documents == documents.documents
    assert (raw | documents).documents == documents.documents
    assert (documents | AttnMaskSpec.varlen([1, 2])).documents is None


@given(st.data())
def test_from_dense_is_exact(data):
    rows, keys = data.draw(st.integers(0, 7)), data.draw(st.integers(0, 7))
    cells = data.draw(st.lists(st.booleans(), min_size=rows * keys, max_size=rows * keys))
    mask = np.array(cells, dtype=bool).reshape(rows, keys)
    spec = AttnMaskSpec.from_dense(mask)
    np.testing.assert_array_equal(spec.to_dense(), mask)
    np.testing.assert_array_equal(lowered(spec), mask)
    assert spec.is_cross == (rows != keys)


def test_from_dense_takes_tensors_and_finds_the_large_rectangles():
    spec = AttnMaskSpec.from_dense(torch.ones(40, 40, dtype=torch.bool).tril())
    assert (spec.q_ranges, spec.k_ranges, spec.mask_types) == ([[0, 40]], [[0, 40]], ["causal"])


def positions_of(spec: AttnMaskSpec) -> np.ndarray:
    return np.concatenate([np.arange(e - s) + p for s, e, p in spec.documents or [(0, spec.total_seqlen, 0)]])


@pytest.mark.parametrize("window", [(3, None), (0, 0), (None, 2), (5, 1), (None, None), (1000, 1000)])
@pytest.mark.parametrize("mask", [name for name in MASKS if not name.startswith("cross")])
def test_window_counts_in_positions_of_the_documents(mask, window):
    """In a tree the distance is that within the sample, not that in the packed sequence."""
    spec = MASKS[mask]
    positions = positions_of(spec) if spec.total_seqlen else np.zeros(0, dtype=int)
    ahead = positions[None, :] - positions[:, None]
    expected = spec.to_dense()
    left, right = window
    if left is not None:
        expected &= ahead >= -left
    if right is not None:
        expected &= ahead <= right
    np.testing.assert_array_equal(lowered(spec, window), expected)


def test_window_on_a_tree_by_hand():
    """Nodes [2, 2, 2]; node 2 hangs on node 0, three places away, and sees its last token at window 2."""
    spec, _ = AttnMaskSpec.prefix_tree([2, 2, 2], [[0, 1], [0, 2]])
    expected = drawn("100000 110000 011000 001100 010010 000011")
    np.testing.assert_array_equal(lowered(spec, (1, None)), expected)


@given(specs(), st.one_of(st.none(), st.integers(0, 12)), st.one_of(st.none(), st.integers(0, 12)))
def test_window_of_random_rectangles(spec, left, right):
    """Without documents the sequence is one: positions are token indices."""
    ahead = np.arange(spec.total_seqlen)[None, :] - np.arange(spec.total_seqlen)[:, None]
    expected = spec.to_dense()
    expected &= (ahead >= (-99 if left is None else -left)) & (ahead <= (99 if right is None else right))
    np.testing.assert_array_equal(lowered(spec, (left, right)), expected)


@given(st.lists(st.integers(0, 6), max_size=4), st.integers(0, 7), st.integers(0, 7))
def test_sliding_window_equals_varlen_with_a_window(seqlens, left, right):
    windowed = lowered(AttnMaskSpec.varlen(seqlens, causal=False), (left, right))
    np.testing.assert_array_equal(AttnMaskSpec.sliding_window(seqlens, (left, right)).to_dense(), windowed)
    one_sided = lowered(AttnMaskSpec.varlen(seqlens), (left, None))
    np.testing.assert_array_equal(AttnMaskSpec.sliding_window(seqlens, left + 1).to_dense(), one_sided)


def test_inputs_of_any_container():
    expected = AttnMaskSpec.varlen([2, 3]).fingerprint()
    for sums in ([0, 2, 5], (0, 2, 5), np.array([0, 2, 5], dtype=np.int32), torch.tensor([0, 2, 5])):
        assert AttnMaskSpec.from_cu_seqlens(sums).fingerprint() == expected
    for lengths in ((2, 3), np.array([2, 3]), torch.tensor([2, 3], dtype=torch.int32)):
        assert AttnMaskSpec.varlen(lengths).fingerprint() == expected
    assert AttnMaskSpec.from_position_ids(torch.tensor([0, 1, 0, 1, 2])).fingerprint() == expected
    assert AttnMaskSpec.causal(np.int64(4)).fingerprint() == AttnMaskSpec.causal(4).fingerprint()
    assert (
        AttnMaskSpec.sliding_window(np.int64(4), np.int64(2)).fingerprint()
        == AttnMaskSpec.sliding_window(4, 2).fingerprint()
    )


def test_a_spec_does_not_follow_the_tensor_it_was_made_of():
    sums, positions, dense = torch.tensor([0, 2, 5]), torch.tensor([0, 1, 0]), torch.ones(3, 3).bool()
    made = [AttnMaskSpec.from_cu_seqlens(sums), AttnMaskSpec.from_position_ids(positions)]
    made.append(AttnMaskSpec.from_dense(dense))
    before = [spec.fingerprint() for spec in made]
    sums[1] = 4
    positions[2] = 2
    dense[0] = False
    assert [spec.fingerprint() for spec in made] == before


def test_a_spec_does_not_share_lists_with_its_maker():
    ranges, kinds = [[0, 2]], ["full"]
    spec = AttnMaskSpec(ranges, ranges, kinds, 3)
    ranges[0][1] = 3
    kinds[0] = "causal"
    assert spec.fingerprint() == AttnMaskSpec([[0, 2]], [[0, 2]], ["full"], 3).fingerprint()


def test_fingerprint_tells_every_field_apart():
    base = {"q_ranges": [[0, 2]], "k_ranges": [[0, 2]], "mask_types": ["full"], "total_seqlen": 4}
    variants = [
        base,
        {**base, "q_ranges": [[0, 3]]},
        {**base, "k_ranges": [[1, 2]]},
        {**base, "mask_types": ["causal"]},
        {**base, "total_seqlen": 5},
        {**base, "total_seqlen_k": 4},
        {**base, "documents": [(0, 4)]},
        {**base, "documents": [(0, 4, 1)]},
        {**base, "documents": [(0, 2), (2, 4)]},
    ]
    prints = [AttnMaskSpec(**fields).fingerprint() for fields in variants]
    assert len(set(prints)) == len(variants)
    assert AttnMaskSpec(**base).fingerprint() == prints[0]


RAW = {"q_ranges": [[0, 2]], "k_ranges": [[0, 2]], "mask_types": ["full"], "total_seqlen": 4}

BAD = {
    "negative start": (
        lambda: AttnMaskSpec(**{**RAW, "q_ranges": [[-1, 2]]}),
        "q_ranges has [-1, 2): a range needs",
    ),
    "reversed": (lambda: AttnMaskSpec(**{**RAW, "k_ranges": [[3, 2]]}), "k_ranges has [3, 2): a range needs"),
    "out of range": (
        lambda: AttnMaskSpec(**{**RAW, "q_ranges": [[0, 5]]}),
        "q_ranges has [0, 5): a range needs 0 <= start <= end <= 4",
    ),
    "keys out of range": (
        lambda: AttnMaskSpec(**RAW, total_seqlen_k=1),
        "k_ranges has [0, 2): a range needs 0 <= start <= end <= 1",
    ),
    "not a pair": (
        lambda: AttnMaskSpec(**{**RAW, "q_ranges": [[0, 1, 2]]}),
        "q_ranges must be a list of [start, end)",
    ),
    "not an int": (
        lambda: AttnMaskSpec(**{**RAW, "k_ranges": [[0, 1.5]]}),
        "k_ranges must be a list of [start, end)",
    ),
    "lists differ": (
        lambda: AttnMaskSpec(**{**RAW, "mask_types": []}),
        "1 q_ranges, 1 k_ranges and 0 mask_types: each rectangle needs one of each",
    ),
    "unknown type": (
        lambda: AttnMaskSpec(**{**RAW, "mask_types": ["diagonal"]}),
        f"mask type 'diagonal' is unknown: use one of {', '.join(RECT_TYPES)}",
    ),
    "negative total": (lambda: AttnMaskSpec([], [], [], -1), "total_seqlen is -1: it must be an int of at least 0"),
    "float total": (
        lambda: AttnMaskSpec([], [], [], 2.0),
        "total_seqlen is 2.0: it must be an int of at least 0",
    ),
    "bool total": (lambda: AttnMaskSpec([], [], [], True), "total_seqlen is True: it must be an int"),
    "negative key total": (
        lambda: AttnMaskSpec([], [], [], 1, -2),
        "total_seqlen_k is -2: it must be an int of at least 0",
    ),
    "document gap": (
        lambda: AttnMaskSpec(**RAW, documents=[(0, 1), (2, 4)]),
        "documents have (2, 4, 0) where token 1 is next",
    ),
    "document reversed": (lambda: AttnMaskSpec(**RAW, documents=[(0, -1)]), "documents have (0, -1, 0)"),
    "documents too short": (
        lambda: AttnMaskSpec(**RAW, documents=[(0, 3)]),
        "documents end at token 3: they must cover",
    ),
    "documents malformed": (
        lambda: AttnMaskSpec(**RAW, documents=[4]),
        "documents are (start, end[, first_position])",
    ),
    "documents of floats": (lambda: AttnMaskSpec(**RAW, documents=[(0, 4.0)]), "documents are (start, end"),
    "negative position": (lambda: AttnMaskSpec(**RAW, documents=[(0, 4, -1)]), "documents have (0, 4, -1)"),
    "negative length": (
        lambda: AttnMaskSpec.varlen([2, -1]),
        "seqlens has a length of -1: lengths are at least 0",
    ),
    "float lengths": (lambda: AttnMaskSpec.varlen([2.5]), "seqlens has dtype float64: expected integers"),
    "nested lengths": (
        lambda: AttnMaskSpec.varlen([[2]]),
        "seqlens has shape (1, 1): expected one dimension",
    ),
    "cu_seqlens start": (
        lambda: AttnMaskSpec.from_cu_seqlens([1, 2]),
        "cu_seqlens is [1, 2]: it must start at 0",
    ),
    "cu_seqlens empty": (lambda: AttnMaskSpec.from_cu_seqlens([]), "cu_seqlens is []: it must start at 0"),
    "cu_seqlens fall": (lambda: AttnMaskSpec.from_cu_seqlens([0, 3, 2]), "length of -1"),
    "position_ids shape": (
        lambda: AttnMaskSpec.from_position_ids(np.zeros((1, 2, 3), dtype=int)),
        "position_ids has shape (1, 2, 3): expected [S] or [B, S]",
    ),
    "position_ids dtype": (lambda: AttnMaskSpec.from_position_ids([0.5]), "position_ids has dtype float64"),
    "position_ids negative": (lambda: AttnMaskSpec.from_position_ids([-3, -2, 0]), "position_ids has -3"),
    "window of nothing": (lambda: AttnMaskSpec.sliding_window(4, 0), "window is 0: give an int of at least 1"),
    "window negative": (
        lambda: AttnMaskSpec.sliding_window(4, (1, -1)),
        "window is (1, -1): give an int of at least 1, or (left, right) of at least 0 each",
    ),
    "window of three": (
        lambda: AttnMaskSpec.sliding_window(4, (1, 1, 1)),
        "window is (1, 1, 1): give an int of at least 1, or (left, right)",
    ),
    "block of nothing": (lambda: AttnMaskSpec.block_causal(4, 0), "block_size is 0: it must be an int of at least 1"),
    "prefix too long": (
        lambda: AttnMaskSpec.prefix_lm([5], [4]),
        "prefix length 5 of a document of 4 tokens: a prefix has 0 to 4 tokens",
    ),
    "prefix counts": (lambda: AttnMaskSpec.prefix_lm([1], [4, 4]), "1 prefix_lengths and 2 seqlens"),
    "cross counts": (lambda: AttnMaskSpec.cross([1], [4, 4]), "1 seqlens_q and 2 seqlens_k"),
    "tree: empty path": (lambda: AttnMaskSpec.prefix_tree([1], [[]]), "a sample path is empty"),
    "tree: lost node": (lambda: AttnMaskSpec.prefix_tree([2, 2], [[0]]), "node 1 is on no path: its 2 tokens would"),
    "tree: no list": (lambda: AttnMaskSpec.prefix_tree([2, 2], [0, 1]), "sample_paths has 0: a path is a list"),
    "tree: repeat": (lambda: AttnMaskSpec.prefix_tree([1, 1], [[0, 1, 0]]), "path [0, 1, 0] repeats a node"),
    "tree: range": (lambda: AttnMaskSpec.prefix_tree([1, 1], [[0, 2]]), "names node 2: nodes are 0 to 1"),
    "tree: negative": (
        lambda: AttnMaskSpec.prefix_tree([1, 1], [[0, -1]]),
        "names node -1: nodes are 0 to 1",
    ),
    "tree: not an int": (lambda: AttnMaskSpec.prefix_tree([1, 1], [[0, 1.0]]), "names node 1.0"),
    "tree: two parents": (
        lambda: AttnMaskSpec.prefix_tree([1, 1, 1], [[0, 2], [1, 2]]),
        "node 2 has parents 0 and 1: in a tree a node has one parent",
    ),
    "tree: root with parent": (
        lambda: AttnMaskSpec.prefix_tree([1, 1], [[0, 1], [1]]),
        "node 1 has parents 0 and None",
    ),
    "dense shape": (
        lambda: AttnMaskSpec.from_dense(np.ones(3, dtype=bool)),
        "mask has shape (3,) and dtype bool",
    ),
    "dense dtype": (lambda: AttnMaskSpec.from_dense(np.ones((2, 2))), "expected a boolean matrix"),
    "union of lengths": (
        lambda: AttnMaskSpec.causal(2) | AttnMaskSpec.causal(3),
        "(2, None) and (3, None): both must describe the same sequences",
    ),
    "union of self and cross": (
        lambda: AttnMaskSpec.causal(2) | AttnMaskSpec.cross([2], [2]),
        "both must describe the same sequences",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_says_value_and_rule(case):
    make, message = BAD[case]
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


def test_union_with_something_else_is_a_type_error():
    with pytest.raises(TypeError):
        AttnMaskSpec.causal(2) | 3


def test_windows_beyond_64_bits_are_far():
    assert read_window((2**63, None), ahead=None) == (2**62, None)
    assert read_window(2**70, ahead=0) == (2**62 - 1, 0)
    assert AttnMaskSpec.sliding_window(np.array(5), 2).total_seqlen == 5
