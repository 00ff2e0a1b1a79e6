"""Tiny randomly initialised transformers models, batches for them, and the single-process eager reference."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

VOCAB = 97
IGNORE = -100
IMAGE_TOKEN = 90  # Gemma 3: 4 tokens an image, bidirectional among themselves
QWEN_IMAGE, QWEN_START, QWEN_END = 91, 92, 93

_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attention_dropout": 0.0,
}
_HYBRID = ["sliding_attention", "full_attention"]

MODELS = ("llama", "qwen2", "mistral", "gemma2", "gemma3", "gpt_oss")
VISION_MODELS = ("gemma3_vl", "qwen2_vl")


def make_model(name: str, attention: str = "eager", seed: int = 0, **changes: Any) -> nn.Module:
    """A tiny model in fp32 and training mode, the same weights wherever it is made."""
    import transformers as hf

    torch.manual_seed(seed)
    sizes = {**_SIZES, **changes}
    if name == "llama":
        model = hf.LlamaForCausalLM._from_config(hf.LlamaConfig(**sizes), attn_implementation=attention)
    elif name == "qwen2":
        config = hf.Qwen2Config(**sizes, use_sliding_window=True, sliding_window=9, layer_types=_HYBRID[::-1])
        model = hf.Qwen2ForCausalLM._from_config(config, attn_implementation=attention)
    elif name == "mistral":
        config = hf.MistralConfig(**sizes, sliding_window=7)
        model = hf.MistralForCausalLM._from_config(config, attn_implementation=attention)
    elif name == "gemma2":
        config = hf.Gemma2Config(**_gemma(sizes), attn_logit_softcapping=1.5, final_logit_softcapping=3.0)
        model = hf.Gemma2ForCausalLM._from_config(config, attn_implementation=attention)
    elif name == "gemma3":
        config = hf.Gemma3TextConfig(**_gemma(sizes))
        model = hf.Gemma3ForCausalLM._from_config(config, attn_implementation=attention)
    elif name == "gpt_oss":
        config = hf.GptOssConfig(
            **sizes, head_dim=8, sliding_window=6, layer_types=_HYBRID, num_local_experts=4, num_experts_per_tok=2
        )
        model = hf.GptOssForCausalLM._from_config(config, attn_implementation=attention)
        _lively_sinks(model)
    elif name == "gemma3_vl":
        model = hf.Gemma3ForConditionalGeneration._from_config(_gemma3_vl(sizes), attn_implementation=attention)
        with torch.no_grad():  # initialised to zero, which would hide the vision tower
            model.model.multi_modal_projector.mm_input_projection_weight.normal_(std=0.3)
    elif name == "qwen2_vl":
        model = hf.Qwen2VLForConditionalGeneration._from_config(_qwen2_vl(sizes), attn_implementation=attention)
    else:
        raise ValueError(name)
    return model.float().train()


def _gemma(sizes: dict[str, Any]) -> dict[str, Any]:
    return {**sizes, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8, "layer_types": _HYBRID}


def _gemma3_vl(sizes: dict[str, Any]) -> Any:
    import transformers as hf

    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 4,
        "vision_use_head": False,
    }
    return hf.Gemma3Config(
        text_config=_gemma(sizes), vision_config=vision, mm_tokens_per_image=4, image_token_index=IMAGE_TOKEN
    )


def _qwen2_vl(sizes: dict[str, Any]) -> Any:
    import transformers as hf

    text = {**sizes, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}}
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4}
    return hf.Qwen2VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=QWEN_IMAGE,
        video_token_id=95,
        vision_start_token_id=QWEN_START,
        vision_end_token_id=QWEN_END,
    )


def _lively_sinks(model: nn.Module) -> None:
    """Sinks are initialised near zero: make them matter."""
    for name, parameter in model.named_parameters():
        if name.endswith("sinks"):
            with torch.no_grad():
                parameter.copy_(torch.linspace(-1.0, 1.5, parameter.numel()))


def text_batch(layout: str, rows: int = 1, columns: int = 40, seed: int = 0) -> dict[str, Tensor]:
    """A batch; layout is "plain", "packed", "right" or "left" (padded).

    The first token of a text has no label: nothing in its text predicts it.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 90, (rows, columns), generator=generator)
    labels = ids.clone()
    labels[torch.rand(rows, columns, generator=generator) < 0.2] = IGNORE
    labels[:, 0] = IGNORE
    batch = {"input_ids": ids, "labels": labels}
    if layout == "packed":
        cuts = [[0, 7 + 3 * row, 19 + row, columns - 1] for row in range(rows)]
        positions = [torch.cat([torch.arange(b - a) for a, b in zip(c, [*c[1:], columns], strict=True)]) for c in cuts]
        batch["position_ids"] = torch.stack(positions)
        labels[batch["position_ids"] == 0] = IGNORE
    if layout in ("right", "left"):
        mask = torch.ones(rows, columns, dtype=torch.long)
        for row in range(rows):
            pad = 5 + 6 * row
            where = slice(columns - pad, None) if layout == "right" else slice(0, pad)
            mask[row, where] = 0
            ids[row, where] = 0
            labels[row, where] = IGNORE
            if layout == "left":
                labels[row, pad] = IGNORE
        batch["attention_mask"] = mask
    return batch


def vision_batch(name: str, layout: str = "plain", rows: int = 1, seed: int = 0) -> dict[str, Tensor]:
    """A batch with one image in each row (two in the first)."""
    batch = text_batch(layout, rows=rows, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    ids, labels = batch["input_ids"], batch["labels"]
    at = [(row, 18) for row in range(rows)] + [(0, 26)]
    if name == "gemma3_vl":
        for row, start in at:
            ids[row, start : start + 4] = IMAGE_TOKEN
            labels[row, start : start + 4] = IGNORE
        batch["pixel_values"] = torch.randn(len(at), 3, 16, 16, generator=generator)
        batch["token_type_ids"] = (ids == IMAGE_TOKEN).long()
        return batch
    for row, start in at:  # a grid of 4 x 4 patches merges into 4 tokens
        ids[row, start : start + 6] = torch.tensor([QWEN_START, *[QWEN_IMAGE] * 4, QWEN_END])
        labels[row, start : start + 6] = IGNORE
    batch["pixel_values"] = torch.randn(len(at) * 16, 3 * 2 * 4 * 4, generator=generator)
    batch["image_grid_thw"] = torch.tensor([[1, 4, 4]] * len(at))
    batch["mm_token_type_ids"] = (ids == QWEN_IMAGE).long()
    return batch


class StepResult(NamedTuple):
    """logits [B, S, V], the loss, and the gradient of every parameter by name."""

    logits: Tensor
    loss: Tensor
    grads: dict[str, Tensor]


def real_tokens(batch: dict[str, Tensor]) -> Tensor:
    """bool [B, S]."""
    mask = batch.get("attention_mask")
    return torch.ones_like(batch["input_ids"], dtype=torch.bool) if mask is None else mask.bool()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Of every parameter; zeros where there is none."""
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.detach().clone()
        for name, p in model.named_parameters()
    }


def eager_step(name: str, batch: dict[str, Tensor], by_document: bool = False, **changes: Any) -> StepResult:
    """One forward and backward of the eager model, in one process.

    by_document runs each packed document alone and puts the results together: for models whose eager
    path loses document boundaries (GPT-OSS builds its masks without positions).
    """
    model = make_model(name, **changes)
    if not by_document:
        out = model(**batch, use_cache=False)
        out.loss.backward()
        return StepResult(out.logits.detach(), out.loss.detach(), gradients(model))
    ids, labels, positions = batch["input_ids"], batch["labels"], batch["position_ids"]
    logits = torch.zeros(*ids.shape, VOCAB)
    total, count = torch.zeros(()), int((labels[:, 1:] != IGNORE).sum())
    for row in range(len(ids)):
        starts = [*(positions[row] == 0).nonzero().flatten().tolist(), ids.shape[1]]
        for a, b in itertools.pairwise(starts):
            out = model(input_ids=ids[row : row + 1, a:b], use_cache=False)
            logits[row, a:b] = out.logits[0].detach()
            loss = torch.nn.functional.cross_entropy(
                out.logits[0, :-1], labels[row, a + 1 : b], ignore_index=IGNORE, reduction="sum"
            )
            (loss / count).backward()
            total += loss.detach() / count
    return StepResult(logits, total, gradients(model))


def relative_error(got: Tensor, truth: Tensor) -> float:
    """Norm of the difference over the norm of the truth (or 1e-6, for gradients that are all but zero)."""
    return ((got.double() - truth.double()).norm() / truth.double().norm().clamp(min=1e-6)).item()


def assert_same_step(got: StepResult, truth: StepResult, real: Tensor, what: str, limit: float = 1e-5) -> float:
    """Logits at real tokens, loss and every gradient within `limit` by norm; returns the largest error."""
    errors = {
        "logits": relative_error(got.logits[real], truth.logits[real]),
        "loss": relative_error(got.loss, truth.loss),
    }
    assert got.grads.keys() == truth.grads.keys()
    for name, grad in truth.grads.items():
        if grad.norm() < 1e-7:  # a bias that softmax cancels: what is left is rounding
            assert got.grads[name].norm() < 1e-6, f"{what}: gradient of {name} should vanish"
            continue
        errors[name] = relative_error(got.grads[name], grad)
    worst = max(errors, key=lambda name: errors[name])
    assert errors[worst] < limit, f"{what}: {worst} is off by {errors[worst]:.3g} (limit {limit:g})"
    return errors[worst]
