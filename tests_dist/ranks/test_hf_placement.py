"""Layer 2: the placement probe: models that depend on where a token lies are refused by layer, or cut elsewhere.

Faults are planted in a tiny Llama, which passes without them. The probe needs no group: one process.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

pytest.importorskip("transformers")

from cpattn.integrations.transformers import ContextParallel
from tests_dist.support.hf_models import make_model, text_batch


class Planted(nn.Module):
    """A module with a fault behind it."""

    def __init__(self, inner: nn.Module, fault) -> None:
        super().__init__()
        self.inner, self.fault = inner, fault

    def forward(self, *args, **kwargs):
        out = self.inner(*args, **kwargs)
        return (self.fault(out[0]), *out[1:]) if isinstance(out, tuple) else self.fault(out)


def places(x: Tensor) -> Tensor:
    return torch.arange(x.shape[1], dtype=x.dtype)[None, :, None]


def half_of_the_tokens(x: Tensor) -> Tensor:
    """A mixture of depths: the tokens with the largest sums only."""
    chosen = x.sum(-1).topk(x.shape[1] // 2, dim=1).indices
    return torch.zeros_like(x).scatter(1, chosen[..., None].expand(-1, -1, x.shape[-1]), 1.0) * x


def own_attention(x: Tensor) -> Tensor:
    return x + F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None], is_causal=True)[:, 0]


def over_capacity(x: Tensor) -> Tensor:
    """A router that drops what comes after each expert's capacity, which goes by the tokens at hand."""
    experts = 4
    chosen = F.one_hot(x.flatten(0, 1)[:, :experts].argmax(-1), experts)
    capacity = -(-len(chosen) // experts)
    kept = ((chosen.cumsum(0) * chosen).amax(-1) <= capacity).to(x.dtype)
    return x * kept.view(*x.shape[:2], 1)


def experts_choose(x: Tensor) -> Tensor:
    """Each expert takes its best tokens of all that there are, in whatever order they come."""
    rows = x.flatten(0, 1)
    least = rows.sum(-1).topk(len(rows) // 2).values[-1]
    return x * (x.sum(-1, keepdim=True) >= least)


def filtered(x: Tensor) -> Tensor:
    """Half of the frequencies, as a long convolution takes them."""
    spectrum = torch.fft.rfft(x, dim=1)
    return torch.fft.irfft(spectrum[:, : spectrum.shape[1] // 2], n=x.shape[1], dim=1)


def set_of_real_tokens(x: Tensor) -> Tensor:
    """Something of all tokens but padding, whatever their order: here their mean."""
    real = SEEN[-1]
    return x - (x * real[..., None]).sum((0, 1)) / real.sum()


SEEN: list[Tensor] = []
FAULTS = {
    "reads a local length": lambda x: x * torch.log(torch.tensor(float(x.shape[1]))),
    "learned positions by place": lambda x: x + torch.sin(places(x) + torch.arange(x.shape[-1])),
    "temperature by place": lambda x: x * (1 + 0.1 * torch.log1p(places(x))),
    "recurrent mixing": lambda x: x.cumsum(1) / (1 + places(x)),
    "convolution": lambda x: F.avg_pool1d(F.pad(x.transpose(1, 2), (2, 0)), 3, 1).transpose(1, 2),
    "token shift": lambda x: x + x.roll(1, 1),
    "normalises over tokens": lambda x: x - x.mean(1, keepdim=True),
    "a summary of all tokens": lambda x: x + x[:, -1:],
    "chooses tokens": half_of_the_tokens,
    "attention outside the interface": own_attention,
    "a router with local capacity": over_capacity,
    "experts that choose among local tokens": experts_choose,
    "a mean over real tokens": set_of_real_tokens,
    "a filter over time": filtered,
    "noise": lambda x: x + 0.1 * torch.rand_like(x),
    "a gradient that mixes": lambda x: x + (x.roll(1, 1) - x.roll(1, 1).detach()),
}


def note_real_tokens(model, args, kwargs):
    SEEN.append(kwargs["attention_mask"].as_subclass(Tensor))


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_refused_where_they_are(fault):
    model = make_model("llama", "cpattn")
    model.model.layers[0].mlp = Planted(model.model.layers[0].mlp, FAULTS[fault])
    model.model.register_forward_pre_hook(note_real_tokens, with_kwargs=True)
    with pytest.raises(ValueError, match="cannot be sharded: a small batch in another order") as refusal:
        ContextParallel(model)
    if fault != "a gradient that mixes":  # nothing forward differs
        assert "First to differ is model.layers.0.mlp" in str(refusal.value)


def test_a_temperature_of_queries_by_place_is_refused_in_its_layer():
    model = make_model("llama", "cpattn")
    attention = model.model.layers[1].self_attn
    attention.q_proj = Planted(attention.q_proj, FAULTS["temperature by place"])
    with pytest.raises(ValueError, match=r"model\.layers\.1\.self_attn\.q_proj .*queries change and keys do not"):
        ContextParallel(model)


def test_a_layer_that_scales_its_scores_by_the_local_length_is_refused():
    """Nothing but the attention's own output shows it."""
    model = make_model("llama", "cpattn")
    attention, forward = model.model.layers[1].self_attn, type(model.model.layers[1].self_attn).forward

    def scaled(hidden_states, *args, **kwargs):
        attention.scaling = 0.1 * hidden_states.shape[1] ** 0.5
        return forward(attention, hidden_states, *args, **kwargs)

    attention.forward = scaled
    with pytest.raises(ValueError, match=r"First to differ is model\.layers\.1\.self_attn"):
        ContextParallel(model)


def test_a_layer_that_adds_the_mask_is_refused():
    model = make_model("llama", "cpattn")
    layer, forward = model.model.layers[1], type(model.model.layers[1]).forward

    def adds_mask(hidden_states, attention_mask=None, **kwargs):
        seen = forward(layer, hidden_states, attention_mask=attention_mask, **kwargs)
        return seen + attention_mask.float().clamp(min=-1).mean(-1).mean(1)[..., None]

    layer.forward = adds_mask
    with pytest.raises(ValueError, match=r"fails on a shard in model\.layers\.1 .*AttributeError"):
        ContextParallel(model)


def test_a_norm_over_all_tokens_is_refused():
    """With its running figures it treats each token alone: it shows in training."""
    model = make_model("llama", "cpattn")
    model.model.layers[1].input_layernorm = nn.SyncBatchNorm(32)
    with pytest.raises(ValueError, match=r"normalises over all tokens .*layers\.1\.input_layernorm"):
        ContextParallel(model)


def test_a_loss_of_further_tokens_is_refused_with_labels():
    """As of heads that predict the token after the next, whose labels are shifted within the local tensor."""
    model = make_model("llama", "cpattn")
    forward = type(model).forward

    def two_ahead(*args, labels=None, **kwargs):
        out = forward(model, *args, labels=labels, **kwargs)
        if labels is not None:
            out.loss = out.loss + 0.3 * F.cross_entropy(out.logits[0, :-2], labels[0, 2:])
        return out

    model.forward = two_ahead
    parallel = ContextParallel(model)
    batch = text_batch("plain")
    with pytest.raises(ValueError, match="LlamaForCausalLM has a loss of its own"):
        parallel(batch)
    assert parallel({"input_ids": batch["input_ids"]}).loss is None


def test_a_head_that_pools_is_refused():
    model = make_model("llama", "cpattn")
    model.lm_head = Planted(model.lm_head, lambda logits: logits.mean(1))
    with pytest.raises(ValueError, match="a head that pools tokens"):
        ContextParallel(model)


def drop_positions(model):
    rope = model.model.rotary_emb
    forward = type(rope).forward
    rope.forward = lambda x, position_ids: forward(rope, x, torch.arange(x.shape[1])[None])


def count_positions(model):
    forward = type(model.model).forward

    def counted(input_ids=None, attention_mask=None, position_ids=None, **kwargs):
        numbers = (attention_mask.cumsum(-1) - 1).clamp(min=0)
        return forward(model.model, input_ids, attention_mask=attention_mask, position_ids=numbers, **kwargs)

    model.model.forward = counted


@pytest.mark.parametrize("plant", [drop_positions, count_positions])
def test_positions_that_the_model_makes_itself_are_served_by_a_later_cut(plant):
    """Its embeddings and RoPE over the whole batch, the cut at its layers: as the model alone."""
    model = make_model("llama", "cpattn")
    plant(model)
    parallel = ContextParallel(model)
    assert parallel.cut == "layers"
    batch = text_batch("left", 3)
    real = batch["attention_mask"].bool()
    want = model(**batch).logits[real]
    out = parallel(batch)
    torch.testing.assert_close(out.shard.gather(out.logits)[real], want, rtol=1e-4, atol=1e-5)


def test_the_verdict_is_remembered_and_check_false_trusts_the_model(monkeypatch):
    from cpattn.integrations import placement_probe

    model = make_model("llama", "cpattn")
    tried = []
    runs = placement_probe._try_cuts
    monkeypatch.setattr(placement_probe, "_try_cuts", lambda p: tried.append(1) or runs(p))
    monkeypatch.setattr(placement_probe, "_verdicts", {})
    ContextParallel(model)
    ContextParallel(model)
    assert len(tried) == 1
    model.model.layers[0].mlp = Planted(model.model.layers[0].mlp, FAULTS["token shift"])
    assert ContextParallel(model, check=False).cut == "inputs"
    for _ in range(2):
        with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp"):
            ContextParallel(model)
    assert len(tried) == 2


def test_the_probe_leaves_the_model_as_it_was(monkeypatch):
    from cpattn.integrations import placement_probe

    monkeypatch.setattr(placement_probe, "_verdicts", {})
    model = make_model("qwen2", "cpattn")
    model.model.layers[0].eval()
    modes = [m.training for m in model.modules()]
    state = torch.get_rng_state()
    ContextParallel(model)
    hooks = [len(m._forward_hooks) for m in model.modules()]
    ContextParallel(model)
    assert [m.training for m in model.modules()] == modes
    assert [len(m._forward_hooks) for m in model.modules()] == hooks
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_low_precision_models_are_tried_too(monkeypatch):
    from cpattn.integrations import placement_probe

    monkeypatch.setattr(placement_probe, "_verdicts", {})
    model = make_model("gpt_oss", "cpattn").bfloat16()
    assert ContextParallel(model).cut == "inputs"
    model.model.layers[0].mlp = Planted(model.model.layers[0].mlp, FAULTS["token shift"])
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp"):
        ContextParallel(model)


def test_sparse_layers_are_refused_by_their_config():
    """A short text shows nothing: its keys are all chosen."""
    model = make_model("llama", "cpattn")
    model.config.index_topk = 2048
    with pytest.raises(ValueError, match=r"choose keys by an indexer .*index_topk"):
        ContextParallel(model)
