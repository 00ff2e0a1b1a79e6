"""Plans of random masks, replayed: every pair once, no row for nothing, the same plan a second time."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import numpy as np

from cpattn import AttnMaskSpec
from cpattn.planning.ready import make_plan
from cpattn.solver import HARDWARE
from cpattn.testing.masks import within_window
from cpattn.testing.plans import require_exact_plan
from cpattn.testing.random_cases import random_mask, random_plan_options, random_window

from .report import Batch

# Of one case, before it counts as hung. Most take milliseconds.
LIMIT_S = 60
BATCH = 100
# Of so many cases one is planned a second time.
AGAIN = 10


def check_case(seed: int) -> None:
    """Plan one random mask and replay the plan.

    Raises:
        AssertionError: a pair is lost or computed twice, rows move for nothing, or the plan differs from call to call.
    """
    rng = np.random.default_rng(seed)
    spec = random_mask(rng)
    cp_size = int(rng.integers(1, 9))
    window = random_window(rng, spec)
    options = random_plan_options(rng, spec, cp_size)
    num_kv = int(rng.integers(1, 4))
    heads = {"num_heads_q": num_kv * int(rng.integers(1, 9)), "num_heads_kv": num_kv, "head_dim": 64}
    options |= {"hardware": str(rng.choice(list(HARDWARE))), "window": window, "cp_size": cp_size, **heads}
    plan = make_plan(spec, **options).plan
    require_exact_plan(plan, within_window(spec, window))
    if seed % AGAIN == 0:
        copy = AttnMaskSpec(**{name: getattr(spec, name) for name in AttnMaskSpec.__dataclass_fields__})
        assert make_plan(copy, **options).plan.fingerprint == plan.fingerprint, "another plan of the same mask"


def check_cases(seeds: range) -> tuple[int, list[tuple[int, str]]]:
    """Check several cases in this process, each within a time limit."""
    failures: list[tuple[int, str]] = []
    before = signal.signal(signal.SIGALRM, _hung)
    try:
        for seed in seeds:
            signal.alarm(LIMIT_S)
            try:
                check_case(seed)
            except Exception as error:
                failures.append((seed, f"{type(error).__name__}: {str(error).strip()[:500]}"))
            finally:
                signal.alarm(0)
    finally:
        signal.signal(signal.SIGALRM, before)
    return len(seeds), failures


def batches(cases: int, seed: int, jobs: int) -> Iterator[Batch]:
    """Calls that check all cases, from seed on, in that many processes."""
    ranges = [range(at, min(at + BATCH, seed + cases)) for at in range(seed, seed + cases, BATCH)]
    if jobs == 1:
        for seeds in ranges:
            yield lambda seeds=seeds: check_cases(seeds)  # type: ignore[misc]
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("forkserver")) as pool:
        for future in [pool.submit(check_cases, seeds) for seeds in ranges]:
            yield future.result


def _hung(signum: int, frame: Any) -> None:
    raise TimeoutError(f"no plan within {LIMIT_S} s")
