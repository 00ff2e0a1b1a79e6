"""Checkpoints of a training run: written whole or not at all, and read again on any number of ranks.

A checkpoint is a folder `step_000040` beside others: the state of model and optimizer as torch.distributed.checkpoint
writes it (all ranks take part, and each may hold a part), and what is no tensor in `run.json`. It is written under
another name and gets its own once all of it is on the disk, so a run that is killed, or a disk that is full, leaves
the ones before as they were.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from .model import Transformer

RUN = "run.json"
_PREFIX, _PART = "step_", ".part"
KEPT = 2  # the newest, and the one before it


class CheckpointError(RuntimeError):
    """A checkpoint could not be written; the message names the one that is still whole."""


@dataclass(frozen=True, slots=True)
class Checkpoints:
    """The checkpoints of one run.

    folder: where they lie; all ranks see it. every: steps from one to the next.
    """

    folder: Path
    every: int

    def due(self, step: int, num_steps: int) -> bool:
        """Whether to save after `step` steps: every so often, and at the end."""
        return step % self.every == 0 or step == num_steps

    def steps(self) -> list[int]:
        """The steps whose checkpoints are whole, in order."""
        names = (path.name for path in self.folder.glob(f"{_PREFIX}*") if (path / RUN).is_file())
        return sorted(int(name[len(_PREFIX) :]) for name in names if name[len(_PREFIX) :].isdecimal())

    def path(self, step: int) -> Path:
        return self.folder / f"{_PREFIX}{step:06d}"

    def save(self, step: int, run: dict[str, Any], model: Transformer, optimizer: torch.optim.Optimizer) -> None:
        """Write the state after `step` steps; called on all ranks.

        Args:
            run: what is no tensor, as JSON takes it.
        Raises:
            CheckpointError: on all ranks, if one of them could not write.
        """
        part = self.path(step).with_suffix(_PART)
        error = _first_error(lambda: _clear(part) if dist.get_rank() == 0 else None)
        error = error or _first_error(lambda: dcp.save(_state(model, optimizer), checkpoint_id=part))
        error = error or _first_error(lambda: self._finish(part, step, run) if dist.get_rank() == 0 else None)
        if error is None:
            return
        if dist.get_rank() == 0:
            shutil.rmtree(part, ignore_errors=True)
        whole = self.steps()
        left = f"the one in {self.path(whole[-1])} is whole" if whole else "there is none before it"
        raise CheckpointError(f"the checkpoint of step {step} was not written: {error}; {left}")

    def load(self, model: Transformer, optimizer: torch.optim.Optimizer) -> dict[str, Any] | None:
        """Read the newest checkpoint into model and optimizer, and return what `run` was; None if there is none.

        Called on all ranks, of which there may be another number than wrote it; rank 0 says which one it is.
        """
        newest = [self.steps()[-1:] if dist.get_rank() == 0 else []]
        dist.broadcast_object_list(newest)
        if not newest[0]:
            return None
        path = self.path(newest[0][0])
        state = _state(model, optimizer)
        dcp.load(state, checkpoint_id=path)
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        run: dict[str, Any] = json.loads((path / RUN).read_text())
        return run

    def _finish(self, part: Path, step: int, run: dict[str, Any]) -> None:
        with (part / RUN).open("w") as file:
            json.dump(run, file)
            file.flush()
            os.fsync(file.fileno())
        _sync(part)
        _clear(self.path(step))
        part.rename(self.path(step))
        _sync(self.folder)
        for old in self.steps()[:-KEPT]:
            shutil.rmtree(self.path(old), ignore_errors=True)


def _state(model: Transformer, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    of_model, of_optimizer = get_state_dict(model, optimizer)
    return {"model": of_model, "optimizer": of_optimizer}


def _clear(path: Path) -> None:
    """Remove what an earlier attempt left under a name, and see that its folder is there."""
    if path.exists():
        shutil.rmtree(path)
    path.parent.mkdir(parents=True, exist_ok=True)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _first_error(act: Callable[[], None]) -> str | None:
    """Run `act` on all ranks; what went wrong on the first rank that failed, for all of them alike."""
    try:
        act()
        mine = None
    except (Exception, CheckpointException) as error:  # torch's is no Exception
        mine = f"rank {dist.get_rank()}: {_cause(error)}"
    everyone: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return next((error for error in everyone if error is not None), None)


def _cause(error: BaseException) -> str:
    """The innermost words: dcp wraps what happened on each rank."""
    if isinstance(error, CheckpointException):
        return _cause(next(iter(error.failures.values()))[0])
    if isinstance(error.__cause__, OSError):
        return _cause(error.__cause__)
    return f"{type(error).__name__}: {error}"
