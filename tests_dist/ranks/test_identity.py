"""Layer 2: ranks that are out of step find out by name, all of them, and can go on; nothing is computed meanwhile."""

from __future__ import annotations

import threading
import time
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist

from cpattn.runtime.identity import LostRankError, Saying, calls_of
from tests_dist.support.harness import fresh_group, run_on_ranks


def said(what: str, group=None, **fields) -> str | None:
    """What a call of that name raises, if anything."""
    try:
        with calls_of(group or dist.group.WORLD).passing(Saying.of(what, fields)):
            return None
    except (ValueError, LostRankError) as error:
        return f"{type(error).__name__}: {error}"


def check_what_differs():
    rank, last = dist.get_rank(), dist.get_world_size() - 1
    assert said("attention", scale=0.5, dtype="bf16") is None
    text = said("attention", scale=0.25 if rank == last else 0.5, dtype="bf16")
    who = f"ranks [{last}] of the group do not have what rank 0 has; rank {0 if rank == last else rank}"
    scale = f"attention: scale differs between ranks: {who} has 0.5, rank {last} has 0.25"
    assert text.startswith(f"ValueError: {scale}"), text
    text = said("attention" if rank else "make_key", scale=1.0)
    assert text.startswith("ValueError: ranks are out of step: "), text
    assert f"rank 0 is in make_key (scale 1.0), rank {rank or 1} in attention (scale 1.0)" in text, text
    # Larger than a header: digests still tell, values are cut.
    many = {f"field {n}": "x" * 300 for n in range(60)}
    text = said("make_key", **many, **({"one": 1} if rank else {"one": 2}))
    assert "make_key: one differs" in text, text
    assert said("attention", scale=1.0) is None, "the ranks are in step again"


@pytest.mark.parametrize("cp_size", [2, 3])
def test_what_differs_is_named_with_both_sides_on_all_ranks(cp_size):
    run_on_ranks(cp_size, check_what_differs)


def check_failure_is_told():
    rank = dist.get_rank()
    calls = calls_of(dist.group.WORLD)
    began = time.monotonic()
    if rank == 1:
        calls.fail("attention", MemoryError("no room"))
    else:
        text = said("attention", scale=1.0)
        assert text.startswith(f"LostRankError: rank {rank} is in attention (scale 1.0), and rank 1 of "), text
        assert "raised in attention: MemoryError: no room" in text, text
    assert said("attention", scale=2.0) is None, "the ranks are in step again"
    assert time.monotonic() - began < 30, "nobody waits for the group's timeout, which is far longer"


def test_a_rank_that_fails_before_a_call_makes_the_others_fail_at_once():
    run_on_ranks(3, check_failure_is_told)


def check_who_does_not_come():
    group = fresh_group(timeout=1.0)
    if dist.get_rank() == 1:
        return time.sleep(4)
    text = said("attention", group, scale=1.0)
    assert f"rank {dist.get_rank()} waits in attention (scale 1.0), and ranks [1] " in text, text
    assert "Timed out" in text, text
    return None


def test_a_rank_that_does_not_come_is_named():
    run_on_ranks(3, check_who_does_not_come)


def check_an_exchange_that_fails():
    """Rank 1 says that it takes part, and then does not."""
    group = fresh_group(timeout=1.0)
    rank = dist.get_rank()
    takes_part = nullcontext() if rank == 1 else pytest.raises(LostRankError, match=r"ranks \[1\] .* do not answer")
    with takes_part, calls_of(group).passing(Saying.of("attention", {"scale": 1.0})):
        if rank == 1:
            time.sleep(15)
        else:
            dist.all_to_all_single(torch.ones(3), torch.ones(3), group=group)


@pytest.mark.nightly  # it waits for timeouts
def test_ranks_that_leave_in_the_middle_are_named():
    run_on_ranks(3, check_an_exchange_that_fails)


def check_threads():
    """The second thread does not disturb the first."""
    errors: list[BaseException] = []

    def second():
        try:
            said("attention")
        except RuntimeError as error:
            errors.append(error)

    with calls_of(dist.group.WORLD).passing(Saying.of("attention", {})):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
    assert ["two threads are in calls of one process group" in str(error) for error in errors] == [True]
    assert said("attention") is None


def test_two_threads_on_one_group_are_refused():
    run_on_ranks(2, check_threads)
