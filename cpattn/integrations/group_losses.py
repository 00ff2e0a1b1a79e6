"""Losses of a batch that ranks share: one value on all of them, and the gradient of each rank's part."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from cpattn.runtime.agreement import require_agreement, tensor_digest

from .batch_layout import IGNORE_INDEX
from .hf_heads import classification_loss, router_coefficient, router_loss_share
from .pass_through import PassThrough
from .shard import ParallelOutput, Shard, ShareRows, sum_over


class GroupLosses(PassThrough):
    """The losses of `ContextParallel`."""

    cp_group: dist.ProcessGroup | None
    loss_group: dist.ProcessGroup | None
    grad_reduction: Literal["sum", "mean"]
    check_batch: bool
    root: Any

    @property
    def _share_weight(self) -> int:
        """What multiplies the gradient of a value that all ranks have alike, for the sum or mean that follows."""
        return 1 if self.loss_group is None or self.grad_reduction == "sum" else dist.get_world_size(self.loss_group)

    @property
    def _replicas(self) -> float:
        """Data-parallel replicas within loss_group."""
        sizes = [1 if g is None else dist.get_world_size(g) for g in (self.loss_group, self.cp_group)]
        return max(sizes[0] / sizes[1], 1.0)

    def mean_loss(
        self, logits: Tensor, targets: Tensor, num_targets: int | Tensor | None = None
    ) -> Tensor:
        """Cross entropy of this rank's tokens, as its share of the mean over loss_group.

        Args:
            logits: [1, L, V]; computed on in fp32 (fp64 for fp64).
            targets: [1, L], -100 where there is none.
            num_targets: what to divide by; None counts the targets of all ranks. None anywhere: loss 0.
        """
        dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        flat = logits.flatten(0, 1).to(dtype), targets.flatten().to(logits.device)
        total = F.cross_entropy(*flat, ignore_index=IGNORE_INDEX, reduction="sum")
        if num_targets is None:
            num_targets = sum_over((targets != IGNORE_INDEX).sum().to(logits.device), self.loss_group)
        divisor = torch.as_tensor(num_targets, device=logits.device).clamp(min=1)
        return self.replicate(total / divisor)

    def token_logprobs(self, out: ParallelOutput, places: Tensor, tokens: Tensor) -> Tensor:
        """Log-probabilities of tokens, on every rank: what policy-gradient losses are made from.

        Args:
            out: of a call of this object.
            places: int64 [N], where in the batch (row * columns + column) the logits are that predict; the same on
                all ranks of cp_group, as tokens are.
            tokens: int64 [N], the tokens whose log-probabilities are wanted.

        Returns:
            [N], fp32 (fp64 for fp64 logits), the same on all ranks of cp_group. Gradient: for a loss
            that every rank computes alike from it; it need not be divided by the number of ranks.

        Raises:
            ValueError: the ranks pass different ones, there is no such place or token, or a place is padding.
        """
        self._check_wanted(out, places, tokens)
        which, rows = out.shard.local_rows(places.to(out.logits.device))
        logits = out.logits[0].index_select(0, rows)
        logprobs = torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), -1)
        local = logprobs.gather(1, tokens.to(logits.device)[which, None]).squeeze(1)
        return ShareRows.apply(local, which, len(places), self.cp_group, self._share_weight)  # type: ignore[no-any-return]

    def _check_wanted(self, out: ParallelOutput, places: Tensor, tokens: Tensor) -> None:
        layout, vocab = out.shard.layout, out.logits.shape[-1]
        if out.logits.shape[:2] != (1, out.shard.num_tokens):
            raise ValueError("token_logprobs reads the logits of all tokens: leave out logits_to_keep")
        if places.ndim != 1 or places.shape != tokens.shape or {places.dtype, tokens.dtype} != {torch.int64}:
            raise ValueError(
                f"token_logprobs: places is {places.dtype} {tuple(places.shape)} and tokens {tokens.dtype} "
                f"{tuple(tokens.shape)}: both are int64 [N]"
            )
        if self.check_batch:
            fields = {"places": tensor_digest(places), "tokens": tensor_digest(tokens)}
            require_agreement("token_logprobs", fields, self.cp_group)
        wanted = places.cpu().numpy()
        wrong = wanted[~np.isin(wanted, layout.index)]
        if len(wrong):
            raise ValueError(
                f"token_logprobs: place {wrong[0]} holds no token of the batch: it has {layout.rows} x "
                f"{layout.columns} places (row * columns + column), and those of padding have no logits"
            )
        outside = tokens[(tokens < 0) | (tokens >= vocab)]
        if len(outside):
            raise ValueError(f"token_logprobs: token {int(outside[0])} is not among the model's {vocab}")

    def replicate(self, local: Tensor) -> Tensor:
        """A local loss as the sum over loss_group: that value on all ranks, the local gradient on each.

        For losses of your own: pass this rank's share (already divided as it should be).
        """
        size = 1 if self.loss_group is None else dist.get_world_size(self.loss_group)
        own = local * (size if self.grad_reduction == "mean" else 1)
        return own + (sum_over(local.detach().clone(), self.loss_group) - own.detach())

    def reduce_gradients(self) -> None:
        """Sum the gradients of all parameters over loss_group, where no wrapper does (grad_reduction "sum").

        Parameters that got no gradient on this rank take part with zeros.
        """
        if self.grad_reduction != "sum":
            raise ValueError("reduce_gradients with grad_reduction='mean': the wrapper of the model reduces them")
        for parameter in self.model.parameters():
            if parameter.requires_grad and self.loss_group is not None:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                grad: Any = parameter.grad
                # The share of a tensor-parallel rank: its peers in loss_group have the same share.
                dist.all_reduce(grad.to_local() if hasattr(grad, "to_local") else grad, group=self.loss_group)

    def _row_loss(self, pooled: Tensor, labels: Tensor, num_targets: Any) -> Tensor:
        """The loss of a sequence classification head, a mean over the replicas' own."""
        if num_targets is not None:
            raise ValueError("num_targets counts tokens: a sequence classification head's loss is a mean over rows")
        loss = classification_loss(pooled, labels.to(pooled.device), self.root.config)
        size = 1 if self.loss_group is None else dist.get_world_size(self.loss_group)
        mean = sum_over(loss.detach().clone(), self.loss_group) / size
        own = loss / self._replicas
        return own + (mean - own.detach())

    def _add_router_loss(self, loss: Tensor | None, outputs: Any, shard: Shard) -> Tensor | None:
        """The loss with the balance loss of the whole batch, as the model would add it; put into the outputs too."""
        share = router_loss_share(self.root, outputs, shard)
        if share is None:
            return loss
        whole = self.replicate(share / self._replicas)
        outputs.aux_loss = whole
        return None if loss is None else loss + router_coefficient(self.root) * whole
