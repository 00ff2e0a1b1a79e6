"""Benchmarks: the schedules that ours is measured against compute the same attention, on odd numbers of rows too."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from cpattn.launch.benchmarks import schedules, step
from tests_dist.support.harness import run_on_ranks
from tests_dist.support.profiles import each_once

CASES = ["causal:515", "packed:700", "window:2311"]


def errors_on_rank(name: str) -> dict[str, float]:
    """Relative error of every schedule against the whole layer on one rank."""
    case = step.make_case(name)
    generator = torch.Generator().manual_seed(0)
    shape = (case.spec.total_seqlen, step.HEADS, step.HEAD_DIM)
    whole = [torch.randn(shape, generator=generator) for _ in range(4)]
    truth = schedules.LocalKernel(case.spec).run(*whole)
    found, _ = step.make_schedules(name, case, "float32")
    # torch's own ring takes lengths that 2 * ranks divides, para-attn such that ranks divide.
    mine = [s for s in found if isinstance(s, (schedules.Ours, schedules.AllGather, schedules.Ulysses, schedules.Ring))]
    assert {"ours", "all-gather", "Ulysses", "ring"} <= {s.name for s in mine}
    return {s.name: step.relative_error(s.run(*(t[torch.from_numpy(s.rows)] for t in whole)), truth, s) for s in mine}


@each_once(name=CASES, cp_size=[4, 2])
def test_references_are_exact(name, cp_size):
    for errors in run_on_ranks(cp_size, errors_on_rank, name):
        assert max(errors.values()) < 2e-6, errors


def dry_step() -> bool:
    """Whether results of a dry step differ from the real ones: nothing arrived."""
    case = step.make_case("causal:256")
    ours = schedules.Ours("ours", case.spec, (step.HEADS, step.HEAD_DIM))
    local = [torch.randn(len(ours.rows), step.HEADS, step.HEAD_DIM) for _ in range(4)]
    real = ours.run(*local)
    with step.without_transfers():
        dry = ours.run(*local)
    again = ours.run(*local)
    dist.barrier()
    return torch.equal(real.out, again.out) and not torch.equal(real.dk, dry.dk)


def test_a_dry_step_moves_nothing():
    assert any(run_on_ranks(2, dry_step))


def test_a_wrong_case_is_named():
    with pytest.raises(SystemExit, match="give a kind"):
        step.make_case("spiral:12")
