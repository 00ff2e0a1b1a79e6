"""TRL's trainers: what they need beyond the Trainer's adapter. `trainer.context_parallel(GRPOTrainer)` puts it in."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist


class GroupedGeneration:
    """GRPO on context-parallel groups: a group samples its completions once, and rewards are counted once.

    Every rank of a group generates, and takes the completions of the group's first rank; what is drawn after that is
    drawn alike. Rewards are those that first ranks computed.
    """

    accelerator: Any
    args: Any
    rollout_func: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if getattr(self, "rollout_func", None) is not None:
            self.rollout_func = self._of_first_rank(self.rollout_func)
        if self._group is not None:
            # TRL seeds by rank; a group draws as one process.
            torch.manual_seed(self.args.seed + self.accelerator.process_index)

    @property
    def _group(self) -> dist.ProcessGroup | None:
        return getattr(self.accelerator, "cp_group", None)

    def create_accelerator_and_postprocess(self) -> None:
        """As of the Trainer; then a generation batch is that of the groups, which the arguments counted by rank.

        Raises:
            ValueError: the groups' batch does not hold whole groups of generations.
        """
        super().create_accelerator_and_postprocess()  # type: ignore[misc]
        if self._group is None:
            return
        args = self.args
        each, size = args.per_device_train_batch_size * args.steps_per_generation, self.accelerator.num_processes
        if each * size % args.num_generations:
            raise ValueError(
                f"{size} context-parallel groups with {each} samples each generate {each * size} completions at once: "
                f"not a multiple of num_generations={args.num_generations}. Raise per_device_train_batch_size (a group "
                f"counts as one device) or steps_per_generation"
            )
        args.generation_batch_size = each * size

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        return self._of_first_rank(super()._generate_single_turn)(*args, **kwargs)  # type: ignore[misc]

    def _generate_and_score_completions(self, *args: Any, **kwargs: Any) -> Any:
        with self._gathered_once():
            scored = super()._generate_and_score_completions(*args, **kwargs)  # type: ignore[misc]
        self._draw_alike()
        return scored

    def _of_first_rank(self, generate: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, with the results of the group's first rank on all of them."""

        @functools.wraps(generate)
        def shared(*args: Any, **kwargs: Any) -> Any:
            results = [generate(*args, **kwargs)]
            if self._group is not None:
                dist.broadcast_object_list(results, dist.get_global_rank(self._group, 0), group=self._group)
            return results[0]

        return shared

    def _draw_alike(self) -> None:
        """Give the group its first rank's random state: the ranks may have drawn differently while generating."""
        if self._group is not None:
            state = torch.get_rng_state()
            where = "cuda" if "nccl" in dist.get_backend(self._group) else "cpu"
            sent = state.to(where)
            dist.broadcast(sent, dist.get_global_rank(self._group, 0), group=self._group)
            torch.set_rng_state(sent.cpu())

    @contextlib.contextmanager
    def _gathered_once(self) -> Iterator[None]:
        """Gather rewards, prompts and completions of first ranks only; TRL does it by functions, over all ranks."""
        module = next(sys.modules[kind.__module__] for kind in type(self).__mro__ if kind.__module__.startswith("trl."))
        if self._group is None:
            yield
            return
        gathered = {"gather": self.accelerator.gather, "gather_object": self._gather_object}
        with mock.patch.multiple(module, **{name: f for name, f in gathered.items() if hasattr(module, name)}):
            yield

    def _gather_object(self, items: list[Any]) -> list[Any]:
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, items)
        return [item for given in everyone[:: self.accelerator.cp_size] for item in given]
