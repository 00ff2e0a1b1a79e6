"""How far tiny hybrids in fp32 are from the same transformers model in fp64: under cpattn, and by themselves.

    python -m tests_dist.support.hybrid_errors [MODEL ...]

Prints the table of docs/mixers.md.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from cpattn.integrations.transformers import ContextParallel, register_attention

from .hf_hybrids import HYBRIDS, make_hybrid, packed_texts, step_by_text, texts_of
from .hf_models import StepResult, gradients, text_batch


def one_rank(name: str, batch: dict[str, Tensor]) -> StepResult:
    """The step of the model under cpattn."""
    register_attention()
    model = make_hybrid(name, "cpattn")
    out = ContextParallel(model)(batch)
    assert out.loss is not None
    out.loss.backward()
    return StepResult(out.shard.gather(out.logits).detach(), out.loss.detach(), gradients(model))


def largest_error(got: StepResult, truth: StepResult, real: Tensor) -> float:
    """Of logits at real tokens, loss and gradients, each relative to its largest number."""
    pairs = [(got.logits[real], truth.logits[real]), (got.loss, truth.loss)]
    pairs += [(got.grads[name], grad) for name, grad in truth.grads.items() if grad.norm() > 1e-7]
    return max(float((x.double() - y).abs().max() / y.abs().max()) for x, y in pairs)


def main() -> None:
    for name in sys.argv[1:] or HYBRIDS:
        worst = [0.0, 0.0]
        for batch in (packed_texts((1, 7, 300, 12)), text_batch("left", rows=2)):
            truth = step_by_text(name, batch)
            real = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
            for row, a, b in texts_of(batch):
                real[row, a:b] = True
            steps = one_rank(name, batch), step_by_text(name, batch, torch.float32)
            worst = [max(w, largest_error(step, truth, real)) for w, step in zip(worst, steps, strict=True)]
        print(f"| {name} | {worst[0]:.1e} | {worst[1]:.1e} |", flush=True)


if __name__ == "__main__":
    main()
