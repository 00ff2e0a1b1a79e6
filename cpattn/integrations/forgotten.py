"""A Trainer on several ranks whose model attends by cpattn, and none shares its batches: an error, no quiet DDP run."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from .hf_model import base_model, language_model


class NotForgotten(TrainerCallback):  # type: ignore[misc]
    """Added to every Trainer by `register_attention`."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Raise ValueError where several ranks train a cpattn model that no `ContextParallel` holds."""
        model = kwargs.get("model")
        if model is None or int(getattr(args, "world_size", 1)) < 2:
            return
        config = getattr(base_model(model), "config", None)
        held = hasattr(language_model(model), "_cpattn_weights_agree")
        if getattr(config, "_attn_implementation", None) == "cpattn" and not held:
            raise ValueError(
                f"{args.world_size} ranks train a model with attn_implementation='cpattn' and none of them shares a "
                f"batch: each would see whole batches of its own, as under DDP. Make the trainer by "
                f"cpattn.integrations.trainer.context_parallel(Trainer, cp_size=...), or load the model with another "
                f"attention"
            )


def watch_trainers() -> None:
    """Put `NotForgotten` among the callbacks that every Trainer begins with. Idempotent."""
    from transformers import trainer

    if NotForgotten not in trainer.DEFAULT_CALLBACKS:
        trainer.DEFAULT_CALLBACKS.append(NotForgotten)  # type: ignore[arg-type]  # a list of another callback's type
