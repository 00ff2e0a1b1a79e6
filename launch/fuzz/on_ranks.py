"""Random masks and random options on real gloo ranks, against dense fp64."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from cpattn.testing.harness import RankError, run_on_ranks
from cpattn.testing.sweeps import check_random_masks, check_random_options

from .report import Batch

BATCH = 25
# Of one batch, before its ranks count as hung.
LIMIT_S = 600.0
SIZES = {"ranks": (1, 2, 3, 4), "options": (2, 3, 4, 6)}
CHECKS = {"ranks": check_random_masks, "options": check_random_options}


def batches(name: str, cases: int, seed: int, ranks: int | None = None) -> Iterator[Batch]:
    """Calls that check all cases, on groups of several sizes in turn (ranks: of one size).

    A seed is a case of the size that its batch has: batches begin at seed, seed + BATCH, and so on.
    """
    sizes = SIZES[name] if ranks is None else (ranks,)
    for number, at in enumerate(range(seed, seed + cases, BATCH)):
        seeds = range(at, min(at + BATCH, seed + cases))
        yield partial(check_batch, name, sizes[number % len(sizes)], seeds)


def check_batch(name: str, size: int, seeds: range) -> tuple[int, list[tuple[int, str]]]:
    """Check cases on that many ranks; where some fail, one after the other, to tell which."""
    try:
        compared = sum(run_on_ranks(size, CHECKS[name], seeds, timeout=LIMIT_S))
    except RankError as error:
        what = f"on {size} ranks: {str(error).strip()[:2000]}"
    else:
        assert compared == len(seeds), f"{compared} of {len(seeds)} cases were compared"
        return len(seeds), []
    alone = [seeds[i : i + 1] for i in range(len(seeds))] if len(seeds) > 1 else []
    failures = [failure for one in alone for failure in check_batch(name, size, one)[1]]
    return len(seeds), failures or [(seeds[0], what)]
