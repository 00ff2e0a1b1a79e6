"""Samples with common beginnings as one sequence, each beginning stored and computed once.

For reinforcement learning with groups: one prompt and many completions are the prompt once and the
completions behind it, under a mask in which each completion sees the prompt and itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cpattn.masks.reading import read_int
from cpattn.masks.spec import AttnMaskSpec


@dataclass(frozen=True, eq=False)
class PrefixTree:
    """Samples folded into a tree. Made by `fold_samples`.

    Attributes:
        input_ids: int64 [1, T], the tokens of the tree; the ancestors of a node lie before it.
        spec: the mask, for `ContextParallel(...)(tree.batch(), spec=tree.spec)`. Its documents give
            each token the position that it has in its samples.
        places: for each sample int64 [n], where its tokens lie in the T of the tree.
        num_sample_tokens: tokens of all samples, each counted by itself.
    """

    input_ids: Tensor
    spec: AttnMaskSpec
    places: tuple[Tensor, ...]
    num_sample_tokens: int

    @property
    def num_saved_tokens(self) -> int:
        """Tokens that need not be computed."""
        return self.num_sample_tokens - self.input_ids.shape[1]

    def batch(self) -> dict[str, Tensor]:
        """What to call the model with, next to the spec."""
        return {"input_ids": self.input_ids}

    def targets(self, first: Sequence[int] | int = 1) -> tuple[Tensor, Tensor, Tensor]:
        """What each sample's tokens are predicted from.

        Args:
            first: for each sample (or all) the first token that counts: the length of the prompt
                leaves out the prompt's own tokens. At least 1: nothing predicts a first token.

        Returns:
            (places, tokens, samples), int64 [N], sample by sample in order: the logits at places[n] of the
            tree predict tokens[n] of sample samples[n]. A shared place predicts several tokens.

        Raises:
            ValueError: first is not an int, nor one for each sample.
        """
        given = [first] * len(self.places) if np.ndim(first) == 0 else list(first)  # type: ignore[arg-type]
        if len(given) != len(self.places):
            raise ValueError(f"targets: first has {len(given)} numbers for {len(self.places)} samples: one for each")
        firsts = [read_int(f"first of sample {sample}", n, least=0) for sample, n in enumerate(given)]
        flat = self.input_ids[0]
        where = [p[max(n, 1) - 1 : -1] for p, n in zip(self.places, firsts, strict=True)]
        tokens = [flat[p[max(n, 1) :]] for p, n in zip(self.places, firsts, strict=True)]
        counts = torch.tensor([len(t) for t in tokens])
        samples = torch.repeat_interleave(torch.arange(len(tokens)), counts)
        return torch.cat(where), torch.cat(tokens), samples


def fold_samples(samples: Sequence[Any]) -> PrefixTree:
    """Fold token sequences (lists or 1-D tensors of ints) into a tree by their common beginnings.

    Every common beginning is shared, also those within completions.

    Raises:
        ValueError: there is no sample, or one is empty or has other than integers.
    """
    given = [np.asarray(s.cpu() if isinstance(s, Tensor) else s) for s in samples]
    if not given or any(t.ndim != 1 or not len(t) for t in given):
        raise ValueError("fold_samples needs at least one sample, each a sequence of at least one token")
    odd = next((n for n, t in enumerate(given) if not np.issubdtype(t.dtype, np.integer)), None)
    if odd is not None:
        raise ValueError(f"fold_samples: sample {odd} is of {given[odd].dtype}: token ids are integers")
    tokens = [t.astype(np.int64) for t in given]
    nodes: list[NDArray[np.int64]] = []
    paths: list[list[int]] = [[] for _ in tokens]
    # Samples that agree up to a token and on it; depth first, so that a node's children lie behind it.
    branches = [(group, 0) for group in _by_next_token(tokens, list(range(len(tokens))), 0)[::-1]]
    while branches:
        group, start = branches.pop()
        end = _common_end(tokens, group, start)
        for member in group:
            paths[member].append(len(nodes))
        nodes.append(tokens[group[0]][start:end])
        longer = [member for member in group if len(tokens[member]) > end]
        branches += [(branch, end) for branch in _by_next_token(tokens, longer, end)[::-1]]
    spec, ranges = AttnMaskSpec.prefix_tree([len(n) for n in nodes], paths)
    places = tuple(torch.cat([torch.arange(a, b) for a, b in sample]) for sample in ranges)
    ids = torch.from_numpy(np.concatenate(nodes))[None]
    return PrefixTree(ids, spec, places, sum(map(len, tokens)))


def _by_next_token(tokens: list[NDArray[np.int64]], group: list[int], start: int) -> list[list[int]]:
    found: dict[int, list[int]] = {}
    for member in group:
        found.setdefault(int(tokens[member][start]), []).append(member)
    return list(found.values())


def _common_end(tokens: list[NDArray[np.int64]], group: list[int], start: int) -> int:
    """Up to where all samples of a group agree."""
    first = tokens[group[0]]
    end = min(len(tokens[m]) for m in group)
    for member in group[1:]:
        differs = np.flatnonzero(tokens[member][start:end] != first[start:end])
        end = start + int(differs[0]) if len(differs) else end
    return end
