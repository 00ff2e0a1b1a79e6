"""The same training on one rank with plain torch: attention document by document, nothing of cpattn in it.

Run it as:

    python -m cpattn.launch.demo.baseline RECIPE.json STEPS.json
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from .data import batches
from .model import NO_LABEL, Attention, Transformer, loss_sum
from .recipe import Recipe, make_optimizer, optimizer_step, progress_bar, save_steps


def attention_by_document(seqlens: list[int]) -> Attention:
    """Causal attention within each document, one call of torch's own attention for each."""

    def attention(q_THD: Tensor, k_THD: Tensor, v_THD: Tensor) -> Tensor:
        documents = zip(q_THD.split(seqlens), k_THD.split(seqlens), v_THD.split(seqlens), strict=True)
        return torch.cat([causal_attention(q, k, v) for q, k, v in documents])

    return attention


def causal_attention(q_THD: Tensor, k_THD: Tensor, v_THD: Tensor) -> Tensor:
    q, k, v = (x.transpose(0, 1)[None] for x in (q_THD, k_THD, v_THD))
    out = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out[0].transpose(0, 1)


def next_tokens(tokens_T: Tensor, seqlens: list[int]) -> Tensor:
    """The token after each; NO_LABEL for the last of a document."""
    ends = torch.tensor(seqlens).cumsum(0) - 1
    return tokens_T.roll(-1).index_fill(0, ends, NO_LABEL)


def main(recipe_path: str, steps_path: str) -> None:
    recipe = Recipe.load(Path(recipe_path))
    device = torch.device("cuda" if torch.cuda.device_count() > 1 else "cpu")
    model = Transformer(recipe.model, seed=recipe.seed).to(device)
    optimizer = make_optimizer(model)
    stream = batches(recipe.folder, num_tokens=recipe.num_tokens, seed=recipe.seed)
    steps = []
    with progress_bar("one rank, plain torch", recipe.num_steps) as advance:
        for step in range(recipe.num_steps):
            began = time.perf_counter()
            batch = next(stream)
            positions_T = torch.cat([torch.arange(length) for length in batch.seqlens]).to(device)
            labels_T = next_tokens(batch.tokens, batch.seqlens).to(device)
            logits = model(batch.tokens.to(device), positions_T, attention_by_document(batch.seqlens))
            loss = loss_sum(logits, labels_T) / batch.num_labels
            loss.backward()
            optimizer_step(optimizer, recipe.learning_rate_at(step))
            steps.append({"loss": loss.item(), "seconds": time.perf_counter() - began})
            advance(steps[-1]["loss"])
    runtime = {"cpattn.ops.attention", "cpattn.keys.key", "cpattn.solver", "cpattn.collectives"}
    assert not runtime & set(sys.modules), "the baseline must not use cpattn"
    save_steps(Path(steps_path), steps)


if __name__ == "__main__":
    main(*sys.argv[1:])
