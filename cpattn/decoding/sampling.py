"""Next tokens from logits: chosen on one rank, the same on all, and the same for any number of ranks.

Each step draws one number for every sequence of the batch, in the batch's order, and a sequence's token is where that
number falls in its distribution. So draws are independent for every sequence, whatever rank its prompt ends on.
"""

from __future__ import annotations

import math
import warnings
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from cpattn.keys.key import AttnKey
from cpattn.masks.reading import read_int


class Sampling(NamedTuple):
    """How tokens are chosen. temperature 0: the likeliest, the first of equals. top_k, top_p: None for all tokens."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def checked(self) -> Sampling:
        """Itself.

        Raises:
            ValueError: a number is out of range.
        """
        if not (_is_finite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature is {self.temperature!r}: it must be a finite number of at least 0")
        if self.top_k is not None:
            read_int("top_k", self.top_k)
        if self.top_p is not None and not (_is_finite(self.top_p) and 0 < self.top_p <= 1):
            raise ValueError(f"top_p is {self.top_p!r}: it must be above 0 and at most 1")
        return self


def _is_finite(number: Any) -> bool:
    try:
        return math.isfinite(number)
    except TypeError:
        return False


def choose(logits_BV: Tensor, draws_B: Tensor, how: Sampling) -> Tensor:
    """The token of each row, int64 [B]; -1 - token where the row's logits are not finite numbers (or -inf).

    Args:
        draws_B: fp64, uniform in [0, 1).
    """
    highest = logits_BV.double().amax(-1)
    likeliest = logits_BV.argmax(-1)
    if how.temperature:
        # Differences first: a small temperature overflows to -inf at most, and the likeliest token stays at 0.
        scores = (logits_BV.double() - highest[:, None]) / how.temperature
        likeliest = _inverse(_restricted(scores, how), draws_B)
    return torch.where(highest.isfinite(), likeliest, -1 - logits_BV.argmax(-1))


def _restricted(scores_BV: Tensor, how: Sampling) -> Tensor:
    """Weights of the tokens that top_k and then top_p leave, in the vocabulary's order; not normalised."""
    if how.top_k is not None and how.top_k < scores_BV.shape[-1]:
        least = scores_BV.topk(how.top_k, -1).values[:, -1:]
        scores_BV = scores_BV.masked_fill(scores_BV < least, -math.inf)
    weights = scores_BV.softmax(-1)
    if how.top_p is None or how.top_p == 1:
        return weights
    descending, order = weights.sort(dim=-1, descending=True, stable=True)
    before = descending.cumsum(-1) - descending
    return weights.masked_fill(torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before >= how.top_p), 0.0)


def _inverse(weights_BV: Tensor, draws_B: Tensor) -> Tensor:
    """The first token whose cumulative weight is above the draw: none without weight."""
    sums = weights_BV.cumsum(-1)
    found = torch.searchsorted(sums, draws_B[:, None] * sums[:, -1:], right=True).squeeze(-1)
    last = weights_BV.shape[-1] - 1 - (weights_BV > 0).flip(-1).int().argmax(-1)
    return torch.minimum(found, last)  # a product may round up to the whole sum


class Sampler:
    """Chooses the tokens of a batch of sequences, step by step; all ranks get the same.

    Args:
        key: of the prompts; its group's ranks tell each other of every step.
        generator: for the draws; rank 0's count, and all ranks draw alike.
    """

    def __init__(self, how: Sampling, batch: int, *, key: AttnKey, generator: torch.Generator | None) -> None:
        self.how, self.batch, self.key, self.generator = how, batch, key, generator
        self.group, self._step = key.cp_group, 0
        self.unclear: Tensor | None = None  # sequences whose logits were not finite, bool [B]

    def spread(self, logits: Tensor, sequences: Tensor) -> Tensor:
        """int64 [B], from logits [n, V] of the sequences (int64 [n]) at hand: each is on exactly one rank."""
        draws = self._draws(logits.device)
        with self._calling(logits.device, rows="each on one rank"):
            if self.group is not None and self.how.temperature:
                dist.broadcast(draws, dist.get_global_rank(self.group, 0), group=self.group)
            tokens = torch.zeros(self.batch, dtype=torch.int64, device=logits.device)
            if len(sequences):
                tokens[sequences] = choose(logits, draws[sequences], self.how)
            if self.group is not None:
                dist.all_reduce(tokens, group=self.group)
        return self._noted(tokens, torch.arange(self.batch, device=tokens.device))

    def replicated(self, logits: Tensor, sequences: Tensor) -> Tensor:
        """int64 [n], from logits [n, V] of the sequences that all ranks have; rank 0's choice counts."""
        tokens = choose(logits, self._draws(logits.device)[sequences], self.how)
        with self._calling(logits.device, rows=len(sequences)):
            if self.group is not None:
                dist.broadcast(tokens, dist.get_global_rank(self.group, 0), group=self.group)
        return self._noted(tokens, sequences)

    def check(self) -> None:
        """Say which sequences met logits that are no numbers; waits for the device. On all ranks alike.

        Raises:
            ValueError: tokens were to be drawn from them. The likeliest one is taken with a warning.
        """
        if self.unclear is None or not bool(self.unclear.any()):
            return
        named = self.unclear.nonzero().flatten().tolist()
        what = f"the model's logits of sequence {', '.join(map(str, named))} hold NaN or inf"
        if self.how.temperature:
            raise ValueError(f"generate: {what}: there is nothing to draw from; look at its prompt and the weights")
        warnings.warn(f"generate: {what}: its tokens mean nothing (other sequences are not touched)", stacklevel=3)
        self.unclear = None

    def _calling(self, device: torch.device, **said: Any) -> AbstractContextManager[int]:
        """Tell the other ranks which step this is, and for how many rows."""
        self._step += 1
        return self.key.calling("generate, next tokens", device, step=self._step, how=tuple(self.how), **said)

    def _draws(self, device: torch.device) -> Tensor:
        if not self.how.temperature:
            return torch.zeros(self.batch, dtype=torch.float64, device=device)
        source = device if self.generator is None else self.generator.device
        return torch.rand(self.batch, dtype=torch.float64, device=source, generator=self.generator).to(device)

    def _noted(self, tokens: Tensor, sequences: Tensor) -> Tensor:
        if self.unclear is None:
            self.unclear = torch.zeros(self.batch, dtype=torch.bool, device=tokens.device)
        self.unclear[sequences] |= tokens < 0
        return torch.where(tokens < 0, -1 - tokens, tokens)
