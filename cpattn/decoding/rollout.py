"""The rollout of TRL's GRPOTrainer over the ranks of a context-parallel group.

    trainer = context_parallel(GRPOTrainer, cp_size=2)(model, rewards, args, ..., rollout_func=trl_rollout)
"""

from __future__ import annotations

from typing import Any

import torch

from .generation import generate


def trl_rollout(prompts: list[Any], trainer: Any) -> dict[str, Any]:
    """Completions of a GRPOTrainer's prompts, by `generate` over the group: keys are spread, and a prompt's kept once.

    Draws are those of `generate`, the same for any number of ranks: other ones than transformers' under the same seed.

    Args:
        prompts: as TRL hands them to a `rollout_func`: texts or conversations of one group's batch.
        trainer: a GRPOTrainer, of `context_parallel` or on one rank, whose model attends by "cpattn". Lengths, ends,
            temperature, top_k and top_p are its arguments'.

    Returns:
        prompt_ids and completion_ids, lists of ids for each prompt; logprobs None (TRL computes them).

    Raises:
        ValueError: images, tools, or arguments that `generate` does not know.
    """
    from cpattn.integrations.whole_batches import served_by

    _refuse(trainer)
    prompt_ids, images, fields = trainer._tokenize_prompts(prompts)
    if images or fields:
        raise ValueError("trl_rollout generates from text alone, and these prompts have images: leave rollout_func off")
    args, model = trainer.args, trainer.accelerator.unwrap_model(trainer.model)
    completions = generate(
        served_by(model) or model,
        prompt_ids,
        max_new_tokens=args.max_completion_length,
        eos_token_id=trainer.eos_token_ids or None,
        temperature=args.temperature,
        top_k=args.top_k or None,
        top_p=args.top_p,
        # What it takes from the trainer's own generator is one number, whatever the ranks are.
        generator=torch.Generator().manual_seed(int(torch.randint(2**62, ()))),
    )
    return {"prompt_ids": prompt_ids, "completion_ids": [ids.tolist() for ids in completions], "logprobs": None}


def _refuse(trainer: Any) -> None:
    args = trainer.args
    asked = {
        "use_vllm": args.use_vllm,
        "use_transformers_continuous_batching": args.use_transformers_continuous_batching,
        "min_p": args.min_p is not None,
        "repetition_penalty": args.repetition_penalty != 1.0,
        "generation_kwargs": bool(args.generation_kwargs),
        "tools": bool(trainer.tools),
    }
    given = [name for name, is_given in asked.items() if is_given]
    if given:
        raise ValueError(
            f"trl_rollout generates by cpattn.generate, which knows temperature, top_k and top_p and one turn, and the "
            f"trainer has {', '.join(given)}: leave that off, or rollout_func"
        )
    if trainer.accelerator.num_processes > 1 and getattr(trainer, "is_fsdp_enabled", False):
        raise ValueError(
            f"trl_rollout with FSDP over {trainer.accelerator.num_processes} context-parallel groups: they would "
            f"gather weights for different numbers of tokens. Use DDP, or one group"
        )
