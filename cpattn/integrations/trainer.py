"""transformers' Trainer, and trainers made of it: `context_parallel(Trainer, cp_size=2)(model=..., args=...)`.

Every rank of a context-parallel group gets the same batches; to the Trainer a group is one process (`accelerate`), and
its model takes whole batches (`whole_batches`). So losses, gradient norms, clipping, accumulation, evaluation,
prediction, checkpoints and resuming are the Trainer's own, over as many replicas as there are groups.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from . import accelerate as groups
from .hf_model import base_model
from .whole_batches import WholeBatches, refuse_learned_prompts, served_by

TrainerType = TypeVar("TrainerType")


def context_parallel(trainer: type[TrainerType], cp_size: int | None = None, **options: Any) -> type[TrainerType]:
    """A Trainer class whose batches are shared by context-parallel groups of neighbouring ranks.

    Args:
        trainer: transformers.Trainer or a subclass: TRL's SFTTrainer, DPOTrainer, GRPOTrainer, one of your own.
        cp_size: ranks of a group; None: of TrainingArguments' parallelism_config, or without one all ranks.
        options: as for `ContextParallel`.

    Returns:
        A subclass of the same name.

    Raises:
        ValueError: when an object of it is made: a setting of the arguments cannot be kept under context parallelism.
    """
    mixins: tuple[type, ...] = (ContextParallelTrainer,)
    if any(kind.__name__ == "GRPOTrainer" for kind in trainer.__mro__):
        from .trl import GroupedGeneration

        mixins = (GroupedGeneration, ContextParallelTrainer)
    fields = {"cp_size": cp_size, "cp_options": options, "__module__": trainer.__module__, "__doc__": trainer.__doc__}
    return type(trainer.__name__, (*mixins, trainer), fields)  # type: ignore[return-value]


class ContextParallelTrainer:
    """What `context_parallel` puts before a Trainer.

    Attributes:
        cp_size: ranks of a context-parallel group.
        cp_options: passed on to `ContextParallel`.
    """

    cp_size: int | None = None
    cp_options: dict[str, Any]

    accelerator: Any
    args: Any
    model: Any
    gather_function: Callable[..., Any]

    def create_accelerator_and_postprocess(self) -> None:
        """As of Trainer; then groups of ranks count as one process."""
        _refuse_arguments(self.args)
        super().create_accelerator_and_postprocess()  # type: ignore[misc]
        groups.context_parallel(self.accelerator, self.cp_size, **self.cp_options)
        self.cp_size = getattr(self.accelerator, "cp_size", 1)
        self.gather_function = functools.partial(
            self.accelerator.gather_for_metrics, use_gather_object=self.args.eval_use_gather_object
        )
        if self.cp_size > 1:
            refuse_learned_prompts(self.model)
            _attend_by_cpattn(self.model)

    def get_cp_size(self) -> int:
        """Ranks of a group: the Trainer divides the total batch size by it."""
        return self.cp_size or 1

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        """As of Trainer, of what the model is trained on; of all groups, each counted once."""
        parallel = served_by(self.model)
        if parallel is not None and parallel.head == "causal":
            batch_samples = [_with_targets(batch, parallel) for batch in batch_samples]
        count = super()._get_num_items_in_batch(batch_samples, device)  # type: ignore[misc]
        # The Trainer divides by get_cp_size, as if gather had counted each rank; it counts a group once.
        return count * self.get_cp_size() if isinstance(count, Tensor) else count

    def _prepare_context_parallel_inputs(self, model: nn.Module, inputs: Any) -> Any:
        return contextlib.nullcontext, inputs

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, *args: Any, **kwargs: Any
    ) -> Any:
        """As of Trainer; logits are brought together only where they are wanted."""
        parallel = served_by(model)
        if parallel is None:
            return super().prediction_step(model, inputs, prediction_loss_only, *args, **kwargs)  # type: ignore[misc]
        before, parallel.keep_logits = parallel.keep_logits, not prediction_loss_only
        try:
            return super().prediction_step(model, inputs, prediction_loss_only, *args, **kwargs)  # type: ignore[misc]
        finally:
            parallel.keep_logits = before

    def floating_point_ops(self, inputs: Any) -> float:
        """This rank's share of the batch's."""
        return super().floating_point_ops(inputs) / self.get_cp_size()  # type: ignore[misc,no-any-return]


def _with_targets(batch: Any, parallel: WholeBatches) -> Any:
    # GRPO's batches are lists of prompts.
    if not isinstance(batch, Mapping) or not isinstance(batch.get("labels"), Tensor) or "shift_labels" in batch:
        return batch
    return {**batch, "shift_labels": parallel.next_token_targets(batch)}


def _attend_by_cpattn(model: nn.Module) -> None:
    root = base_model(model)
    if getattr(root.config, "_attn_implementation", None) != "cpattn":
        root.set_attn_implementation("cpattn")


def _refuse_arguments(args: Any) -> None:
    if getattr(args, "train_sampling_strategy", None) == "batch_rebalance":
        raise ValueError(
            "train_sampling_strategy='batch_rebalance' gives each rank its own samples, and ranks of a "
            "context-parallel group need the same: use another (cpattn balances the tokens of a group itself)"
        )
    if getattr(args, "use_liger_kernel", False) and (getattr(args, "liger_kernel_config", None) or {}).get(
        "fused_linear_cross_entropy", True
    ):
        raise ValueError(
            "use_liger_kernel replaces the model's forward by one with a loss of its own, of this rank's tokens only: "
            'set liger_kernel_config={"fused_linear_cross_entropy": False, "cross_entropy": False}'
        )
