"""Relief of the busiest senders: a step waits for the busiest link, in either direction.

The keys near the start of a long document go to all its ranks, and a rank that holds many of them sends
several times what any rank receives. Such a rank is divided anew with one that has area left or sees the
same keys, rows against sending (`SendPrice`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from .balance_profile import DensityProfile
from .balance_repack import Allowed, Holdings, Piece, SendPrice
from .placement import Placement
from .slices import IntArray

# Ranks of either kind tried for taking from the busiest sender.
_NUM_TAKERS = 4


class _Shared(NamedTuple):
    """A component on several ranks: these, the keys of it that each needs, and the rows of it that each sends."""

    ranks: IntArray
    needs: IntArray
    sent: IntArray


def relieve_senders(
    placement: Placement,
    profile: DensityProfile,
    components: IntArray,
    allowed: Allowed,
    *,
    sent: IntArray,
    num_pairs: int,
) -> Placement:
    """The placement with about num_pairs pairs divided so that no rank sends more than the busiest receives.

    Keys of a component are taken to be seen from its sparse end on, as in causal and full documents; for
    other masks the caller has to check what is gained.

    Args:
        components: first token of each component, ascending; no token sees one of another component.
        allowed: bounds that the placement keeps, and so does the result.
        sent: rows that each rank sends, [cp_size].
    """
    holdings = Holdings(placement, profile, components, allowed)
    _Relief(holdings, components.tolist(), placement.total_seqlen, sent).run(num_pairs)
    return holdings.placement()


class _Relief:
    """Rows that every rank sends, kept up to date while pairs are divided."""

    def __init__(self, holdings: Holdings, components: list[int], total_seqlen: int, sent: IntArray) -> None:
        self.holdings = holdings
        self.starts, self.ends = components, [*components[1:], total_seqlen]
        self.sent = sent.copy()
        self.shared: dict[int, _Shared] = {}  # as far as looked at

    def run(self, num_pairs: int) -> None:
        """Divide the busiest sender, again and again, as long as it sends too much and somebody can help."""
        holdings = self.holdings
        # Where queries see fewer keys than their component has, `received` may count less than nothing.
        most = max(0, *(holdings.received(rank) for rank in range(holdings.cp_size)))
        areas = np.array([sum(piece.area for piece in mine) for mine in holdings.pieces])
        settled = np.zeros(holdings.cp_size, dtype=np.int64)  # what a rank sends that nobody can help
        while num_pairs > 0 and (self.sent - settled).max() > most:
            busiest = int((self.sent - settled).argmax())
            settled[busiest] = self.sent[busiest]
            for other in self._takers(busiest, areas):
                num_pairs -= 1
                if holdings.divide(busiest, other, price=SendPrice(self._sends_beside(busiest, other), most)) > 0:
                    for rank in (busiest, other):
                        areas[rank] = sum(piece.area for piece in holdings.pieces[rank])
                    for component in {piece.component for r in (busiest, other) for piece in holdings.pieces[r]}:
                        old = self.shared.pop(component, None)
                        if old is not None:
                            self.sent[old.ranks] -= old.sent
                        new = self._look(component)
                        self.sent[new.ranks] += new.sent
                    settled[:] = 0
                    break

    def _takers(self, busiest: int, areas: IntArray) -> list[int]:
        """Ranks that send little and have the most area left, or see the keys that the busiest sends most of."""
        if not self.holdings.pieces[busiest]:
            return []  # of a mask whose keys are not seen from the sparse end on: its rows are counted wrongly
        dearest = max(self.holdings.pieces[busiest], key=self._sends_beside(busiest, busiest))
        light = 2 * self.sent < self.sent[busiest]
        others = np.flatnonzero(light)
        roomy = others[np.argsort(areas[others], kind="stable")]
        seeing = self._look(dearest.component).ranks
        near = seeing[light[seeing]]
        near = near[np.argsort(self.sent[near], kind="stable")]
        return list(dict.fromkeys([*roomy[:_NUM_TAKERS].tolist(), *near[:_NUM_TAKERS].tolist()]))

    def _keys_before(self, piece: Piece) -> int:
        """Keys of its component that are nearer to the sparse end, where all queries begin to see."""
        if piece.first <= piece.last:
            return piece.start - self.starts[piece.component]
        return self.ends[piece.component] - piece.end

    def _sends_beside(self, a: int, b: int) -> Callable[[Piece], int]:
        """Rows of a piece that go to other ranks than a and b."""

        def sends(piece: Piece) -> int:
            if len(self.holdings.holders[piece.component]) == 1:
                return 0
            shared = self._look(piece.component)
            seen = np.clip(shared.needs - self._keys_before(piece), 0, piece.tokens)
            return int(seen[(shared.ranks != a) & (shared.ranks != b)].sum())

        return sends

    def _look(self, component: int) -> _Shared:
        """Who holds and sends what of a component."""
        if component not in self.shared:
            ranks = sorted(self.holdings.holders[component])
            held = [[p for p in self.holdings.pieces[rank] if p.component == component] for rank in ranks]
            needs = np.array([max(piece.need for piece in mine) for mine in held])
            holder = np.repeat(np.arange(len(ranks)), [len(mine) for mine in held])
            before = np.array([self._keys_before(piece) for mine in held for piece in mine])
            tokens = np.array([piece.tokens for mine in held for piece in mine])
            seen = np.clip(needs - before[:, None], 0, tokens[:, None])
            seen[np.arange(len(holder)), holder] = 0
            sent = np.bincount(holder, seen.sum(axis=1), len(ranks)).astype(np.int64)
            self.shared[component] = _Shared(np.array(ranks), needs, sent)
        return self.shared[component]
