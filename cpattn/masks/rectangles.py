"""The rectangles of masks that are drawn by rule: windows, prefix trees, dense matrices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Rect = tuple[int, int, int, int, str]


def window_rects(start: int, end: int, left: int, right: int) -> list[Rect]:
    """The rectangles of one document under a (left, right) window.

    Rows near the start have no left edge and rows near the end no right edge, so there are up to
    four kinds of rows; each kind is one rectangle of one of the mask types.
    """
    rects: list[Rect] = []
    has_left = min(start + left, end)  # rows from here on have keys too far to the left
    no_right = max(end - right, start)  # rows from here on see to the end
    a, b = min(has_left, no_right), max(has_left, no_right)
    if a > start:
        rects.append((start, a, start, min(a + right, end), "causal"))
    if b > a and has_left < no_right:
        rects.append((a, b, a - left, b + right, "bi_causal"))
    elif b > a:
        rects.append((a, b, start, end, "full"))
    if end > b:
        rects.append((b, end, b - left, end, "inv_causal"))
    return rects


def rects_of_dense(dense: NDArray[np.bool_]) -> list[Rect]:
    """Rectangles that cover exactly the visible pairs of a matrix.

    Follows each run of visible keys down the rows while both of its ends move by a constant 0 or 1.
    """
    kinds = {(0, 0): "full", (0, 1): "causal", (1, 0): "inv_causal", (1, 1): "bi_causal"}
    rects: list[Rect] = []
    open_runs: list[list[Any]] = []  # [first row, first k0, k0, k1, step or None]

    def close(run: list[Any], row: int) -> None:
        first, k_first, _, k_end, step = run
        rects.append((first, row, k_first, k_end, kinds[step or (0, 0)]))

    for row in range(dense.shape[0]):
        edges = np.flatnonzero(np.diff(dense[row].astype(np.int8), prepend=0, append=0))
        runs = [(int(a), int(b)) for a, b in edges.reshape(-1, 2)]
        still_open = []
        for run in open_runs:
            _, _, k0, k1, step = run
            for new in runs:
                moved = (new[0] - k0, new[1] - k1)
                if moved in kinds and (step is None or moved == step):
                    runs.remove(new)
                    # An inv_causal rectangle keeps its last key; the others take the newest.
                    run[2], run[3], run[4] = new[0], new[1], moved
                    still_open.append(run)
                    break
            else:
                close(run, row)
        open_runs = still_open + [[row, a, a, b, None] for a, b in runs]
    for run in open_runs:
        close(run, dense.shape[0])
    return sorted(rects)


TokenSpan = tuple[int, int]
Parents = dict[int, int | None]

# Rectangles up to which a tree is drawn node by node; and the most that a larger tree may take.
_DRAWN_BY_NODE, _MOST_OF_TREE = 1 << 10, 1 << 20


def tree_parents(sample_paths: Sequence[Sequence[int]], num_nodes: int) -> Parents:
    """The parent of every node on a path, by node, parents before children."""
    parents: Parents = {}
    for path in sample_paths:
        if not isinstance(path, Sequence):
            raise ValueError(f"sample_paths has {path!r}: a path is a list of nodes, root first")
        if not path:
            raise ValueError("a sample path is empty: a sample has at least one node")
        if len(set(path)) != len(path):
            raise ValueError(f"path {list(path)} repeats a node: a node is on a path once")
        for parent, node in zip([None, *path], path, strict=False):
            if not isinstance(node, (int, np.integer)) or not 0 <= node < num_nodes:
                raise ValueError(f"path {list(path)} names node {node}: nodes are 0 to {num_nodes - 1}")
            if parents.setdefault(node, parent) != parent:
                raise ValueError(
                    f"node {node} has parents {parents[node]} and {parent}: in a tree a node has one "
                    f"parent; store the node once under each"
                )
    return parents




def tree_depths(spans: Sequence[TokenSpan], parents: Parents) -> dict[int, int]:
    """Tokens of the ancestors of every node."""
    depths: dict[int, int] = {}
    for node, parent in parents.items():
        depths[node] = 0 if parent is None else depths[parent] + spans[parent][1] - spans[parent][0]
    return depths


def tree_rects(spans: Sequence[TokenSpan], parents: Parents) -> list[Rect]:
    """What the nodes of a tree see: themselves causally, their ancestors fully."""
    levels: dict[int, int] = {}
    for node, parent in parents.items():
        levels[node] = 1 if parent is None else levels[parent] + 1
    if sum(levels.values()) > _DRAWN_BY_NODE:
        return _rects_by_ancestor(*_joined_chains(spans, parents))
    rects: list[Rect] = []
    for node, parent in parents.items():
        rects.append((*spans[node], *spans[node], "causal"))
        ancestors = []
        while parent is not None:
            ancestors.append(parent)
            parent = parents[parent]
        rects += [(*spans[node], *spans[ancestor], "full") for ancestor in reversed(ancestors)]
    return rects


def _joined_chains(spans: Sequence[TokenSpan], parents: Parents) -> tuple[list[TokenSpan], list[int]]:
    """Nodes in the order of the sequence, only children right after their parents joined to these; parents, or -1."""
    num_children = [0] * len(spans)
    for parent in parents.values():
        if parent is not None:
            num_children[parent] += 1
    joined: list[TokenSpan] = []
    name: dict[int, int] = {}
    for node in sorted(parents):
        parent = parents[node]
        last = len(joined) - 1
        if parent is not None and num_children[parent] == 1 and name.get(parent) == last:
            name[node] = last
            joined[last] = (joined[last][0], spans[node][1])
        else:
            name[node] = len(joined)
            joined.append(spans[node])
    parent_of = [-1] * len(joined)
    for node, parent in parents.items():
        if parent is not None and name[parent] != name[node]:
            parent_of[name[node]] = name[parent]
    return joined, parent_of


def _rects_by_ancestor(spans: Sequence[TokenSpan], parents: Sequence[int]) -> list[Rect]:
    """One rectangle for each node itself, and one for each run of nodes that see it: one if its subtree is one run."""
    level = _levels(parents)
    rects: list[Rect] = [(start, end, start, end, "causal") for start, end in spans]
    since: dict[int, int] = {}
    above = -1  # the parent of the node before: what is open is this node and its ancestors
    for (start, _), parent in zip([*spans, (spans[-1][1], 0)], [*parents, -1], strict=True):
        closing, opening = above, parent
        while closing != opening:
            if level[closing] >= level[opening]:
                rects.append((since.pop(closing), start, *spans[closing], "full"))
                closing = parents[closing]
            else:
                since[opening] = start
                opening = parents[opening]
        above = parent
        if len(rects) > _MOST_OF_TREE:
            raise ValueError(
                f"the {len(spans)} nodes of the tree lie in an order in which they take more than {_MOST_OF_TREE} "
                f"rectangles: store them depth first, every node before its children and these before its next sibling"
            )
    return rects


def _levels(parents: Sequence[int]) -> list[int]:
    """Distance of every node from a root, and of the place above all roots, which is the last and comes first: -1."""
    level = [-2] * len(parents) + [-1]
    for node in range(len(parents)):
        path = []
        while level[node] == -2:
            path.append(node)
            node = parents[node]
        for distance, below in enumerate(reversed(path), level[node] + 1):
            level[below] = distance
    return level
