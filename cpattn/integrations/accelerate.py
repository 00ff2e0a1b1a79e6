"""accelerate: a context-parallel group of ranks counts as one process.

    accelerator = context_parallel(Accelerator(), cp_size=2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for batch in loader:                       # the same on the ranks of a group
        accelerator.backward(model(**batch).loss)

Prepared models with attn_implementation="cpattn" take whole batches (`whole_batches`), prepared loaders give a group
one batch, `gather`, `gather_for_metrics` and `reduce` count it once, and `num_processes` and `process_index` number
the groups. DDP or FSDP, over all ranks, are accelerate's own.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from accelerate import Accelerator
from accelerate.scheduler import AcceleratedScheduler
from accelerate.utils import gather_object, recursively_apply
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from .hf_model import base_model
from .whole_batches import refuse_learned_prompts, serve_whole_batches


def context_parallel(accelerator: Accelerator, cp_size: int | None = None, **options: Any) -> Accelerator:
    """Make context-parallel groups of neighbouring ranks, and let the accelerator count each as one process.

    Args:
        accelerator: changed in place. Of a ParallelismConfig, cp_size is taken over, and its dimension joins dp_shard:
            FSDP shards over it as it would.
        cp_size: ranks of a group; None: the ParallelismConfig's, or without one all ranks.
        options: as for `ContextParallel`, for every model that is prepared.

    Returns:
        The accelerator.

    Raises:
        ValueError: the ranks cannot be divided so, or accelerate runs them in a way that is not supported.
    """
    config = accelerator.parallelism_config
    asked = config.cp_size if config is not None and config.cp_size > 1 else None
    if cp_size is not None and asked is not None and cp_size != asked:
        raise ValueError(f"cp_size is {cp_size} and the ParallelismConfig says {asked}: give one of them")
    world = accelerator.state.num_processes
    size = cp_size or asked or world
    if size < 1 or world % size:
        raise ValueError(f"cp_size is {size} and there are {world} ranks: it must divide them")
    _refuse(accelerator)
    if asked is not None:
        _join_cp_and_shards(accelerator)
    accelerator.dataloader_config.dispatch_batches = False  # accelerate's default for iterable data cuts by rank
    if world > 1:
        mesh = init_device_mesh(accelerator.device.type, (world // size, size), mesh_dim_names=("dp", "cp"))
        accelerator.__class__ = type("GroupedAccelerator", (GroupedAccelerator, type(accelerator)), {})
        accelerator._cpattn = (mesh, options)
    return accelerator


def _refuse(accelerator: Accelerator) -> None:
    config = accelerator.parallelism_config
    kind = str(accelerator.distributed_type.value)
    if kind in ("DEEPSPEED", "MEGATRON_LM", "XLA"):
        raise ValueError(f"accelerate's {kind} lays out batches and gradients itself: use DDP or FSDP with cpattn")
    for name in ("tp_size", "sp_size"):
        if config is not None and getattr(config, name, 1) > 1:
            raise ValueError(f"ParallelismConfig({name}={getattr(config, name)}): not supported together with cpattn")
    if accelerator.split_batches or accelerator.dispatch_batches:
        raise ValueError("split_batches and dispatch_batches cut batches by rank: leave them off")


def _join_cp_and_shards(accelerator: Accelerator) -> None:
    """Turn accelerate's own context parallelism off, which would cut batches; its ranks go on sharding weights."""
    from accelerate import ParallelismConfig

    config: Any = accelerator.parallelism_config
    joined = ParallelismConfig(
        dp_replicate_size=config.dp_replicate_size, dp_shard_size=config.dp_shard_size * config.cp_size, cp_size=1
    )
    accelerator.state.parallelism_config = joined
    accelerator.state.device_mesh = joined.get_device_mesh(accelerator.device.type)


class GroupedAccelerator(Accelerator):
    """What `context_parallel` makes of an accelerator."""

    _cpattn: tuple[DeviceMesh, dict[str, Any]]

    @property
    def cp_group(self) -> dist.ProcessGroup:
        """The ranks that share each batch."""
        return self._cpattn[0].get_group("cp")

    @property
    def cp_size(self) -> int:
        """How many they are."""
        return self._cpattn[0].size(1)

    @property
    def num_processes(self) -> int:
        """Groups, the replicas of data parallelism."""
        return self._cpattn[0].size(0)

    @property
    def process_index(self) -> int:
        """This rank's group."""
        return self._cpattn[0].get_local_rank("dp")

    def prepare(self, *args: Any, **kwargs: Any) -> Any:
        """As of accelerate; models with attn_implementation="cpattn" are served before they are wrapped."""
        for arg in args:
            self._serve(arg)
        return super().prepare(*args, **kwargs)

    def prepare_model(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """As `prepare`."""
        self._serve(model)
        return super().prepare_model(model, *args, **kwargs)

    def prepare_scheduler(self, scheduler: Any) -> Any:
        """As of accelerate; one step of the optimizer is a step for each group, not for each rank."""
        prepared = super().prepare_scheduler(scheduler)
        prepared.__class__ = type("GroupedScheduler", (_GroupedScheduler,), {"num_groups": self.num_processes})
        return prepared

    def _prepare_device_mesh(self) -> None:
        return None  # loaders go by num_processes and process_index

    def _serve(self, model: Any) -> None:
        if not isinstance(model, nn.Module):
            return
        refuse_learned_prompts(model)
        config = getattr(base_model(model), "config", None)
        if getattr(config, "_attn_implementation", None) == "cpattn":
            mesh, options = self._cpattn
            serve_whole_batches(model, mesh["cp"], **options)

    def gather(self, tensor: Any) -> Any:
        """As of accelerate, of one rank of each group."""
        return recursively_apply(self._once, super().gather(tensor), error_on_other_type=True)

    def _once(self, gathered: Tensor) -> Tensor:
        each = len(gathered) // (self.num_processes * self.cp_size)
        return gathered.unflatten(0, (self.num_processes, self.cp_size, each))[:, 0].flatten(0, 1)

    def gather_for_metrics(self, input_data: Any, use_gather_object: bool = False) -> Any:
        """As of accelerate, of one rank of each group."""
        try:
            recursively_apply(lambda x: x, input_data, error_on_other_type=True)
        except TypeError:
            use_gather_object = True
        if not use_gather_object:
            return super().gather_for_metrics(input_data)
        data = [item for given in gather_object([input_data])[:: self.cp_size] for item in given]
        last = self.gradient_state.remainder if self.gradient_state.end_of_dataloader else 0
        return data[:last] if last > 0 else data

    def reduce(self, tensor: Any, reduction: str = "sum", scale: float = 1.0) -> Any:
        """As of accelerate, of one rank of each group."""
        reduced = super().reduce(tensor, reduction, scale)
        return recursively_apply(self._share, reduced) if reduction == "sum" else reduced

    def _share(self, total: Tensor) -> Tensor:
        return total / self.cp_size if total.is_floating_point() else total // self.cp_size


class _GroupedScheduler(AcceleratedScheduler):
    """Steps once for each group."""

    num_groups = 1
    split_batches: bool

    def step(self, *args: Any, **kwargs: Any) -> None:
        if not self.step_with_optimizer or self.split_batches:
            super().step(*args, **kwargs)
            return
        self.split_batches = True  # one step a call
        try:
            for _ in range(self.num_groups):
                if getattr(self.scheduler, "total_steps", None) is None or (
                    self.scheduler._step_count <= self.scheduler.total_steps
                ):
                    super().step(*args, **kwargs)
        finally:
            self.split_batches = False
