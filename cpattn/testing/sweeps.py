"""Checks of many random cases on the ranks of the default group; a failure names the seed that repeats it.

Each function runs on every rank. All compute every case, and each compares a share of them with the oracle.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

import cpattn
from cpattn import AttnKey, AttnMaskSpec

from .dense import assert_exact, make_inputs, oracle
from .masks import within_window
from .random_cases import random_case, random_plan_options, random_spec
from .rank_cases import run_with_key


def check_random_masks(seeds: Iterable[int]) -> int:
    """Random masks in random plans: out, lse, all gradients, roll and positions; returns how many this rank compared.

    Raises:
        AssertionError: a result is not the oracle's, in fp64.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    compared = 0
    for seed in seeds:
        rng = np.random.default_rng(seed)
        spec = random_spec(rng)
        options = random_plan_options(rng, spec, size)
        spec.documents = _random_documents(rng, spec.total_seqlen)
        inputs = make_inputs(spec, heads=(2, 1), head_dim=8, dtype=torch.float64, seed=seed)
        heads = {"num_heads_q": 2, "num_heads_kv": 1, "head_dim": 8, "cp_group": dist.group.WORLD}
        key = cpattn.make_key(spec, **heads, **options)  # type: ignore[arg-type]
        what = f"seed {seed}, {options}, {spec}:"
        got = run_with_key(key, inputs)
        _check_layout(key, spec, int(rng.integers(-9, 10)), what)
        if seed % size == rank:
            assert_exact(got, oracle(spec, inputs), what)
            compared += 1
    return compared


def check_random_options(seeds: Iterable[int]) -> int:
    """Any option of keys and of calls with any other, and every mask of a key that is planned for several.

    Raises:
        AssertionError: a result is not the oracle's, in fp64.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    compared = 0
    for seed in seeds:
        case = random_case(np.random.default_rng(seed), size)
        spec, heads, (head_dim, head_dim_v), options, scale, call = case
        inputs = make_inputs(
            spec, heads=heads, head_dim=head_dim, head_dim_v=head_dim_v, dtype=torch.float64, seed=seed
        )
        key = cpattn.make_key(
            spec,
            num_heads_q=heads[0],
            num_heads_kv=heads[1],
            head_dim=head_dim,
            head_dim_v=head_dim_v,
            cp_group=dist.group.WORLD,
            **options,
        )
        masks = [(spec, options["window"])] + [(kind.spec or spec, kind.window) for kind in options.get("also", [])]
        for number, (mask, window) in enumerate(masks):
            used = key.with_mask(mask, window=window) if number else key
            got = run_with_key(used, inputs, softmax_scale=scale, **call)
            if seed % size == rank:
                truth = oracle(within_window(mask, window), inputs, scale=scale, **call)
                assert_exact(got, truth, f"seed {seed}, mask {number}, {heads}, {options}, {call}, {spec}:")
        compared += seed % size == rank
    return compared


def _random_documents(rng: np.random.Generator, total: int) -> list[Any]:
    """(start, end, first position) of a few documents, some of them empty."""
    cuts = np.sort(rng.integers(0, total + 1, rng.integers(0, 4)))
    ends = [*cuts.tolist(), total]
    return [(a, b, int(rng.integers(0, 5))) for a, b in zip([0, *ends[:-1]], ends, strict=True)]


def _check_layout(key: AttnKey, spec: AttnMaskSpec, shift: int, what: str) -> None:
    """Positions, and labels rolled within documents, on every rank."""
    documents = spec.documents or []
    positions = [torch.arange(end - start) + first for start, end, first in documents]
    got = cpattn.undispatch(cpattn.position_ids(key), key)
    assert torch.equal(got, torch.cat([torch.zeros(0, dtype=torch.int64), *positions])), f"{what} positions {got}"
    labels = torch.arange(spec.total_seqlen)
    got = cpattn.undispatch(cpattn.roll(cpattn.dispatch(labels, key), key, shift), key)
    assert torch.equal(got, rolled(labels, spec, shift, -100)), f"{what} roll by {shift} {got}"


def rolled(x: Tensor, spec: AttnMaskSpec, shift: int, fill: float) -> Tensor:
    """`cpattn.roll` of a whole tensor [T, ...], document by document."""
    out = torch.full_like(x, fill)
    for start, end, _ in spec.documents or []:
        first, last = max(start, start + shift), min(end, end + shift)
        if first < last:
            out[first:last] = x[first - shift : last - shift]
    return out
