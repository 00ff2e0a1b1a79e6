"""`backend="fastest"`: kernels are tried on each rank's own slices, and those that are right everywhere race.

Every rank runs the candidates that accept, checks them against `reference` (`cpattn.backends.trial`) and tells the
others. Of those that agree on all ranks the fastest on the first rank that has work is taken, so all ranks take the
same. A choice is remembered for the group, device, dtype and heads, whatever the mask.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

from cpattn.backends import Backend, Problem, serving_backends
from cpattn.backends.trial import Sample, Trial, kernel_name, reference_rows, try_kernel
from cpattn.collectives import control_device, gather_headers
from cpattn.solver import RankPlan, SliceTable

from .identity import Saying, calls_of

_TOLD_BYTES = 8192
_FAULT_CHARS = 120


class Work(NamedTuple):
    """Slices over buffers of so many rows."""

    table: SliceTable
    num_queries: int
    num_keys: int


class Choice(NamedTuple):
    """The kernel that was taken, and what became of each on the rank whose times decided; wrong ones say where."""

    backend: Backend
    trials: tuple[Trial, ...]

    def in_words(self) -> str:
        """The kernel, and why."""
        ran = sorted((t for t in self.trials if not t.fault), key=lambda t: t.seconds)
        times = ", ".join(f"{t.kernel} {t.seconds * 1e3:.3g} ms" for t in ran if math.isfinite(t.seconds))
        wrong = "".join(f"; not {t.kernel}: {t.fault}" for t in self.trials if t.fault)
        raced = f"fastest of those that agree with reference ({times})" if times else "there was no work to try it on"
        return f"{kernel_name(self.backend)}, {raced}{wrong}"


# By (device type, what the key is of): the same on all ranks of a group, so they find or miss together.
_remembered: WeakKeyDictionary[dist.ProcessGroup, dict[Any, Choice]] = WeakKeyDictionary()
_alone: dict[Any, Choice] = {}


def remembered_choice(problem: Problem, shared: Any, group: dist.ProcessGroup | None) -> Choice | None:
    """What was chosen for this in the group; None if nothing was."""
    return _memory_of(group).get(_of(problem, shared))


def forget_choices() -> None:
    """Try again at the next key; on all ranks, or on none."""
    _remembered.clear()
    _alone.clear()


def choose_fastest(
    problem: Problem, shared: Any, plan: RankPlan, device: torch.device, group: dist.ProcessGroup | None
) -> Choice:
    """The choice for a key, made on its rank's heaviest slices if none is remembered; then all ranks call it together.

    shared: what the key is of, hashable and equal on all ranks (`problem` is this rank's, whose heads may be its own).

    Raises:
        ValueError: no kernel that serves agrees with `reference` on all ranks; says what each did.
        LostRankError: a rank did not come.
    """
    known = _memory_of(group)
    if _of(problem, shared) not in known:
        known[_of(problem, shared)] = decide(problem, heaviest_work(plan), device, group)
    return known[_of(problem, shared)]


def decide(problem: Problem, work: Work, device: torch.device, group: dist.ProcessGroup | None) -> Choice:
    """Try, tell, choose.

    Raises:
        As `choose_fastest`.
    """
    candidates = {kernel_name(backend): backend for backend in serving_backends(problem)}
    told = _tell(try_all(list(candidates.values()), problem, work, device), problem, group)
    trials = _summed_up(told)
    right = [t for t in trials if not t.fault and t.kernel in candidates]
    if not right:
        said = "; ".join(f"{t.kernel}: {t.fault}" for t in trials) or "none serves it"
        raise ValueError(f"no backend that serves {problem} agrees with reference on all ranks: {said}")
    return Choice(candidates[min(right, key=lambda t: t.seconds).kernel], trials)


def try_all(candidates: Sequence[Backend], problem: Problem, work: Work, device: torch.device) -> list[Trial]:
    """What becomes of each on some slices; without slices there is nothing to say against any, and no time."""
    if not len(work.table):
        return [Trial(kernel_name(backend), math.inf) for backend in candidates]
    with torch.no_grad():
        sample = Sample.of(problem, *work, device).thinned()
        expected = reference_rows(sample)
        return [try_kernel(backend, sample, expected) for backend in candidates]


def heaviest_work(plan: RankPlan) -> Work:
    """The call of a rank's plan that has most pairs."""
    guests = plan.queries[-1].num_received
    calls = [Work(stage.own, plan.num_queries, stage.num_keys) for stage in plan.stages]
    calls += [Work(stage.guest, guests, stage.num_keys) for stage in plan.stages]
    return max(calls, key=lambda work: work.table.area())


def _memory_of(group: dist.ProcessGroup | None) -> dict[Any, Choice]:
    return _alone if group is None else _remembered.setdefault(group, {})


def _of(problem: Problem, shared: Any) -> Any:
    return problem.device_type, problem.dtype, problem.softcap, shared


def _tell(mine: list[Trial], problem: Problem, group: dist.ProcessGroup | None) -> list[list[Trial]]:
    """The trials of every rank."""
    if group is None:
        return [mine]
    cut = [t._replace(fault=t.fault[:_FAULT_CHARS]) for t in mine]
    data = json.dumps(cut).encode().ljust(_TOLD_BYTES)
    assert len(data) == _TOLD_BYTES, "more kernels than fit"
    told = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(control_device(group))
    saying = Saying.of("choosing a backend", {"dtype": problem.dtype, "softcap": problem.softcap})
    with calls_of(group).passing(saying):
        everyone = gather_headers(told, group).cpu()
    return [[Trial(*t) for t in json.loads(rank.numpy().tobytes())] for rank in everyone]


def _summed_up(told: list[list[Trial]]) -> tuple[Trial, ...]:
    """Of each kernel that any rank tried: the times of the first rank that has any, and a fault of any rank."""
    timed = next((trials for trials in told if any(math.isfinite(t.seconds) for t in trials)), told[0])
    seconds = {t.kernel: t.seconds for t in timed}
    names = dict.fromkeys(t.kernel for trials in told for t in trials)
    found = []
    for name in names:
        faults = [_fault_on(rank, trials, name, len(told)) for rank, trials in enumerate(told)]
        found.append(Trial(name, seconds.get(name, math.inf), next((f for f in faults if f), "")))
    return tuple(found)


def _fault_on(rank: int, trials: list[Trial], name: str, num_ranks: int) -> str:
    """What a rank has against a kernel, in words; "" for nothing."""
    where = "" if num_ranks == 1 else f" (rank {rank})"
    found = next((t for t in trials if t.kernel == name), None)
    if found is None:
        return f"does not serve{where}"
    return found.fault and f"{found.fault}{where}"
