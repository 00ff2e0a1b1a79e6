"""Runtime layer: rows between the global sequence and the ranks, their gradients, roll and positions.

Everything is checked on whole tensors of small integers, so equality is exact.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import cpattn
from cpattn import AttnMaskSpec
from cpattn.testing.sweeps import rolled
from tests_dist.support.harness import run_on_ranks
from tests_dist.support.masks import MASKS

WITH_DOCUMENTS = [name for name, spec in MASKS.items() if spec.documents is not None]


def key_of(spec: AttnMaskSpec, **options: Any) -> cpattn.AttnKey:
    options = {"chunk_size": 8, "cp_group": dist.group.WORLD, **options}
    return cpattn.make_key(spec, num_heads_q=2, num_heads_kv=1, head_dim=8, **options)


def integers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-50, 50, shape, generator=generator).to(dtype)


def round_trip(layout: str) -> None:
    """dispatch is a choice of rows, undispatch its inverse: any dim, any dtype, both sides."""
    dtypes = (torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.uint8, torch.int16)
    for turn, (name, spec) in enumerate(MASKS.items()):
        key = key_of(spec, layout=layout)
        for side, total, local in (
            ("q", spec.total_seqlen, key.num_tokens),
            ("k", spec.seqlen_k, key.num_keys),
        ):
            for nth, (dim, shape) in enumerate(
                ((0, (total,)), (0, (total, 3)), (1, (2, total, 3)), (-1, (2, 3, total)))
            ):
                dtype = dtypes[(turn + nth) % len(dtypes)]  # over the masks each with each shape
                x = integers(*shape, dtype=dtype)
                x_local = cpattn.dispatch(x, key, dim=dim, side=side)
                assert x_local.shape[dim] == local
                assert x_local.dtype == dtype
                back = cpattn.undispatch(x_local, key, dim=dim, side=side)
                assert torch.equal(back, x), f"{name} {side} {dim} {dtype}"


@pytest.mark.parametrize("layout", ["balanced", "contiguous", "zigzag"])
@pytest.mark.parametrize("cp_size", [1, 3])
def test_undispatch_is_the_inverse_of_dispatch(cp_size, layout):
    run_on_ranks(cp_size, round_trip, layout)


def rows_by_rank(name: str) -> tuple[Tensor, Tensor]:
    key = key_of(MASKS[name])
    tokens = torch.arange(MASKS[name].total_seqlen)
    return cpattn.dispatch(tokens, key), cpattn.position_ids(key, stream=True)


def test_every_token_lies_on_one_rank_in_order():
    for name, spec in MASKS.items():
        results = run_on_ranks(4, rows_by_rank, name)
        for rows, stream in results:
            assert torch.equal(rows, stream)
            assert rows.tolist() == sorted(rows.tolist())
        assert sorted(torch.cat([rows for rows, _ in results]).tolist()) == list(range(spec.total_seqlen))


def gradients(name: str, dim: int) -> None:
    """The objective is the sum of the ranks' losses: compare with one process that adds them up."""
    spec, rank, size = MASKS[name], dist.get_rank(), dist.get_world_size()
    key = key_of(spec)
    for side, total in (("q", spec.total_seqlen), ("k", spec.seqlen_k)):
        shape = (3, total, 2) if dim else (total, 2, 3)

        # dispatch: a rank's gradient is that of its rows, in place; the ranks' sum is the whole.
        x = integers(*shape).requires_grad_()
        weight = integers(*shape, seed=1)
        x_local = cpattn.dispatch(x, key, dim=dim, side=side)
        (x_local * cpattn.dispatch(weight, key, dim=dim, side=side)).sum().backward()
        mine = torch.zeros(total, dtype=torch.bool)
        mine[cpattn.dispatch(torch.arange(total), key, side=side)] = True
        mask = mine.view([-1 if d == dim else 1 for d in range(3)])
        assert torch.equal(x.grad, weight * mask)
        dist.all_reduce(x.grad)
        assert torch.equal(x.grad, weight)

        # undispatch: a rank's rows get the sum over the ranks' losses.
        leaf = integers(*x_local.shape, seed=2).requires_grad_()
        weights = [integers(*shape, seed=10 + r) for r in range(size)]
        (cpattn.undispatch(leaf, key, dim=dim, side=side) * weights[rank]).sum().backward()
        assert torch.equal(leaf.grad, cpattn.dispatch(sum(weights), key, dim=dim, side=side))


@pytest.mark.parametrize("cp_size", [1, 2, 4])
@pytest.mark.parametrize("name", ["varlen", "cross", "one_token", "holes"])
def test_gradients_are_of_the_sum_of_losses(cp_size, name):
    for dim in (0, 1):
        run_on_ranks(cp_size, gradients, name, dim)


def roll_on_rank(name: str, shifts: tuple[int, ...]) -> None:
    spec = MASKS[name]
    key = key_of(spec)
    for shift in shifts:
        labels = integers(spec.total_seqlen, dtype=torch.int64)
        got = cpattn.undispatch(cpattn.roll(cpattn.dispatch(labels, key), key, shift), key)
        assert torch.equal(got, rolled(labels, spec, shift, -100)), f"{name} by {shift}"
        hidden = integers(2, spec.total_seqlen, 3)
        for fill in (None, 7.0):
            local = cpattn.roll(cpattn.dispatch(hidden, key, dim=1), key, shift, dim=1, fill_value=fill)
            expected = rolled(hidden.movedim(1, 0), spec, shift, fill or 0).movedim(0, 1)
            assert torch.equal(cpattn.undispatch(local, key, dim=1), expected), f"{name} by {shift}"

        x = integers(spec.total_seqlen, 2).requires_grad_()
        weight = integers(spec.total_seqlen, 2, seed=3)
        y = cpattn.roll(cpattn.dispatch(x, key), key, shift)
        (y * cpattn.dispatch(weight, key)).sum().backward()
        dist.all_reduce(x.grad)
        assert torch.equal(x.grad, rolled(weight, spec, -shift, 0)), f"{name} by {shift}: gradient"


@pytest.mark.parametrize("cp_size", [1, 2, 4])
@pytest.mark.parametrize("name", WITH_DOCUMENTS)
def test_roll_stays_in_documents(cp_size, name):
    run_on_ranks(cp_size, roll_on_rank, name, shifts=(-1, 1, -3, 40, 0, -1000))


def roll_dtypes() -> None:
    key = key_of(AttnMaskSpec.varlen([3, 2]))
    fills = {torch.int32: -100, torch.int64: -100, torch.float16: 0, torch.complex64: 0, torch.bool: False}
    for dtype, fill in fills.items():
        x = torch.ones(5).to(dtype)
        whole = cpattn.undispatch(cpattn.roll(cpattn.dispatch(x, key), key), key)
        assert whole.dtype == dtype
        assert whole.tolist() == [1, 1, fill, 1, fill]
    x = cpattn.dispatch(torch.ones(5, dtype=torch.uint8), key)
    with pytest.raises(ValueError, match=r"fill_value is -100, which torch\.uint8 cannot hold: pass another"):
        cpattn.roll(x, key)
    assert cpattn.undispatch(cpattn.roll(x, key, fill_value=9), key).tolist() == [1, 1, 9, 1, 9]


def test_roll_fills_with_a_value_of_the_dtype():
    run_on_ranks(2, roll_dtypes)


def positions_on_rank(name: str) -> None:
    spec = MASKS[name]
    key = key_of(spec)
    spans = [np.arange(end - start) + first for start, end, first in spec.documents]
    expected = torch.from_numpy(np.concatenate([np.zeros(0, dtype=np.int64), *spans]))
    position = cpattn.position_ids(key)
    assert position.dtype == torch.int64
    assert torch.equal(cpattn.undispatch(position, key), expected)
    stream = cpattn.undispatch(cpattn.position_ids(key, stream=True), key)
    assert torch.equal(stream, torch.arange(spec.total_seqlen))
    position += 1  # the caller's own
    assert torch.equal(cpattn.undispatch(cpattn.position_ids(key), key), expected)


@pytest.mark.parametrize("name", WITH_DOCUMENTS)
def test_positions_restart_in_each_document(name):
    """In a tree they go on from the parent's; from position_ids they are those given."""
    run_on_ranks(3, positions_on_rank, name)


def positions_by_hand() -> None:
    tree, _ = AttnMaskSpec.prefix_tree([2, 2, 1], [[0, 1], [0, 2]])
    packed = AttnMaskSpec.from_position_ids([[4, 5, 0], [0, 1, 2]])
    for spec, expected in ((tree, [0, 1, 2, 3, 2]), (packed, [4, 5, 0, 0, 1, 2])):
        key = key_of(spec, chunk_size=1)
        assert cpattn.undispatch(cpattn.position_ids(key), key).tolist() == expected


def test_positions_by_hand():
    run_on_ranks(2, positions_by_hand)


def works_after_inference_mode() -> None:
    """An evaluation step before the first training step must not poison what the key keeps."""
    spec = AttnMaskSpec.varlen([9, 5])
    x = integers(14, 2, 8)

    def step(x: Tensor) -> Tensor:
        key = key_of(spec, chunk_size=4)
        local = cpattn.dispatch(x, key)
        rotated = cpattn.roll(local, key) * cpattn.position_ids(key)[:, None, None]
        out = cpattn.attention(rotated, local[:, :1], local[:, :1], key)
        return cpattn.undispatch(out, key)

    with torch.inference_mode():
        evaluated = step(x)
    leaf = x.clone().requires_grad_()
    trained = step(leaf)
    assert torch.equal(trained, evaluated)
    trained.sum().backward()
    assert leaf.grad.abs().sum() > 0


def test_evaluation_before_training():
    run_on_ranks(2, works_after_inference_mode)


def sums_in_fp32() -> None:
    """Eight ranks' bf16 gradients of one row: 256 and seven ones are 264 (263 rounded), not 256."""
    key = key_of(AttnMaskSpec.causal(8), chunk_size=1)
    leaf = torch.zeros(key.num_tokens, 1, dtype=torch.bfloat16, requires_grad=True)
    weight = 256.0 if dist.get_rank() == 0 else 1.0
    (cpattn.undispatch(leaf, key) * weight).sum().backward()
    assert leaf.grad.flatten().tolist() == [264.0] * key.num_tokens


def test_gradients_of_undispatch_sum_in_fp32():
    run_on_ranks(8, sums_in_fp32)


def moves_nothing_between_ranks() -> None:
    """No communication in dispatch, its backward and position_ids: rank 1 stays away."""
    key = key_of(AttnMaskSpec.varlen([9, 5]))
    if dist.get_rank() == 0:
        x = integers(14, 2).requires_grad_()
        cpattn.dispatch(x, key).sum().backward()
        cpattn.position_ids(key)


def test_dispatch_is_local():
    run_on_ranks(2, moves_nothing_between_ranks, timeout=20)
