"""Runtime layer: `generate` and `Session`: draws, faults of one sequence, shared beginnings, turns, architectures."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import cpattn
from cpattn.decoding.sampling import Sampling, choose
from cpattn.generation import ModelShape, Session
from cpattn.launch.demo.model import ModelConfig, Transformer
from tests_dist.support.harness import run_on_ranks

CONFIG = ModelConfig(num_layers=2, dim=32, num_heads_q=4, num_heads_kv=2, head_dim=8, ffn_dim=64)
PROMPT = [5, 6, 7, 8, 9, 10, 11, 12]


def world() -> Any:
    return dist.group.WORLD if dist.is_initialized() else None


def model_with_nan_token(token: int | None = None) -> Transformer:
    model = Transformer(CONFIG, seed=0)
    if token is not None:
        with torch.no_grad():
            next(p for p in model.parameters() if p.shape[0] == 256)[token] = float("nan")
    return model


def sample_on_rank(seeds: int) -> list[list[Tensor]]:
    model = Transformer(CONFIG, seed=0)
    prompts = [PROMPT] * 7 + [[1, 2, 3]]
    options = {"temperature": 3.0, "top_k": 200, "top_p": 0.99, "max_new_tokens": 5, "cp_group": world()}
    generators = [torch.Generator().manual_seed(seed) for seed in range(seeds)]
    return [cpattn.generate(model, prompts, generator=generator, **options) for generator in generators]


def test_draws_are_each_sequence_s_own_and_the_same_for_any_number_of_ranks():
    """Seven prompts alike and one other: what one process draws, on two and on four ranks, wherever prompts end."""
    alone = run_on_ranks(1, sample_on_rank, 3)[0]
    for tokens in alone:
        assert len({int(t[0]) for t in tokens[:7]}) > 3
    for size in (2, 4):
        for rank in run_on_ranks(size, sample_on_rank, 3):
            assert all(torch.equal(a, b) for x, y in zip(rank, alone, strict=True) for a, b in zip(x, y, strict=True))


WAYS = [Sampling(0.7), Sampling(1.3, top_k=3), Sampling(0.9, top_p=0.6), Sampling(2.0, 6, 0.8)]


@pytest.mark.parametrize("how", WAYS)
def test_a_draw_falls_where_transformers_distribution_has_it(how):
    """Even draws from 0 to 1 count each token's probability, after transformers' own warpers."""
    warpers = pytest.importorskip("transformers").generation.logits_process
    logits, n = torch.randn(4, 9, generator=torch.Generator().manual_seed(0)), 4000
    scores = warpers.TemperatureLogitsWarper(how.temperature)(None, logits)
    scores = warpers.TopKLogitsWarper(how.top_k)(None, scores) if how.top_k else scores
    scores = warpers.TopPLogitsWarper(how.top_p)(None, scores) if how.top_p else scores
    draws = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    for row, want in zip(logits, scores.softmax(-1), strict=True):
        counts = torch.bincount(choose(row.expand(n, -1), draws, how), minlength=9) / n
        torch.testing.assert_close(counts.float(), want, atol=2 / n, rtol=0)
        assert not counts[want == 0].any()


def test_extremes_of_sampling():
    """A temperature that overflows takes the likeliest; the largest draw stays among tokens with weight."""
    logits = torch.tensor([[0.0, 3.0, -float("inf"), 1.0, -float("inf")]])
    assert choose(logits, torch.tensor([0.999], dtype=torch.float64), Sampling(1e-40)).tolist() == [1]
    largest = torch.tensor([1 - 2.0**-53], dtype=torch.float64)
    assert choose(logits, largest, Sampling(1.0)).tolist() == [3]
    assert choose(logits, largest, Sampling(1.0, top_k=1)).tolist() == [1]
    assert choose(torch.full((1, 3), float("nan")), largest, Sampling(1.0)).tolist() == [-1]


@pytest.mark.parametrize(
    ("options", "message"),
    [({"top_k": 0}, "top_k is 0"), ({"top_p": 0.0}, "top_p is 0.0"), ({"top_p": 1.5}, "top_p is 1.5")],
)
def test_bad_numbers_of_sampling(options, message):
    with pytest.raises(ValueError, match=message):
        cpattn.generate(Transformer(CONFIG, seed=0), [[1]], max_new_tokens=1, **options)


def nan_on_rank() -> list[Tensor]:
    """Token 99 is NaN: its sequence means nothing, the others are as alone; nothing can be drawn, on any rank."""
    model, prompts = model_with_nan_token(99), [PROMPT, [3, 99, 4, 5, 6], [7]]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tokens = cpattn.generate(model, prompts, max_new_tokens=6, page_size=2, cp_group=world())
    assert any("logits of sequence 1 hold NaN" in str(w.message) for w in caught)
    with pytest.raises(ValueError, match="logits of sequence 1 hold NaN or inf: there is nothing to draw from"):
        cpattn.generate(model, prompts, max_new_tokens=6, temperature=1.0, cp_group=world())
    return [tokens[0], tokens[2]]


def test_nan_of_one_sequence_stays_there_and_drawing_from_it_fails_on_all_ranks():
    model = model_with_nan_token()
    alone = [cpattn.generate(model, [p], max_new_tokens=6)[0] for p in (PROMPT, [7])]
    for tokens in run_on_ranks(2, nan_on_rank, timeout=60):
        assert all(torch.equal(a, b) for a, b in zip(tokens, alone, strict=True))


def nan_in_cache_on_rank() -> None:
    """A value of inf in one sequence, and pages of a NaN sequence taken by another."""
    key = cpattn.make_key(
        cpattn.AttnMaskSpec.varlen([9, 9]), num_heads_q=2, num_heads_kv=2, head_dim=4, cp_group=world(), chunk_size=1
    )
    cache = cpattn.PagedKVCache(key, windows=[None], max_new_tokens=30, page_size=4, dtype=torch.float32)
    v = torch.randn(18, 2, 4, generator=torch.Generator().manual_seed(0))
    v[:9] = float("nan")
    cache.prefill(0, torch.randn(key.num_keys, 2, 4), cpattn.dispatch(v, key))
    for step in range(20):
        cache.advance()
        new = torch.randn(2, 2, 4)
        new[0] = float("inf")
        assert cache.decode(0, torch.randn(2, 2, 4), torch.randn(2, 2, 4), new)[1].isfinite().all(), step
        if step == 2:
            cache.release(0)


def test_nan_in_pages_reaches_no_other_sequence():
    run_on_ranks(2, nan_in_cache_on_rank)


# ----------------------------------------------------------------------------------------------------
# Shared beginnings and further turns.

TURNS = [[3] * 21, [], [200, 5, 6]]


def session_on_rank(windows: tuple | None) -> tuple[list, list, int]:
    prompts = [[*range(20), 4, 7], [*range(20), 9], [50, 51]]
    shape = None if windows is None else ModelShape(2, 4, 2, 8, windows)
    session = Session(Transformer(CONFIG, seed=0), prompts, max_tokens=60, cp_group=world(), page_size=4, shape=shape)
    pages = session._caches.all[0].pages_in_use(0)
    first = session.generate(max_new_tokens=7, eos_token_id=186)
    with pytest.raises(ValueError, match="append: sequence 0 may grow by"):
        session.append([[1] * 60, [], []])
    session.append(TURNS)
    second = session.generate(max_new_tokens=5)
    return first, second, pages


@pytest.mark.parametrize("windows", [None, (None, 6)])
@pytest.mark.parametrize("cp_size", [1, 3])
def test_a_session_goes_on_as_if_it_had_been_prompted_with_all_of_it(cp_size, windows):
    """One sequence meets its end in the first turn; a turn of 21 tokens goes in by parts."""
    prompts = [[*range(20), 4, 7], [*range(20), 9], [50, 51]]
    shape = None if windows is None else ModelShape(2, 4, 2, 8, windows)
    model = Transformer(CONFIG, seed=0)

    def alone(ids: list[int], new: int, **options: Any) -> Tensor:
        return cpattn.generate(model, [ids], max_new_tokens=new, shape=shape, check_eos_every=1, **options)[0]

    for first, second, _ in run_on_ranks(cp_size, session_on_rank, windows):
        for prompt, one, turn, two in zip(prompts, first, TURNS, second, strict=True):
            assert torch.equal(one, alone(prompt, 7, eos_token_id=186))
            assert torch.equal(two, alone([*prompt, *one.tolist(), *turn], 5))


def test_prompts_that_begin_alike_share_pages():
    model, alike = Transformer(CONFIG, seed=0), [[*range(32)], [*range(32)], [*range(32), 40]]
    session = Session(model, alike, max_tokens=8, page_size=4)
    assert session._caches.all[0].pages_in_use(0) == 9
    tokens = session.generate(max_new_tokens=4)
    for prompt, mine in zip(alike, tokens, strict=True):
        assert torch.equal(mine, cpattn.generate(model, [prompt], max_new_tokens=4)[0])


def test_turns_that_do_not_fit_are_refused():
    session = Session(Transformer(CONFIG, seed=0), [[1], [2]], max_tokens=4)
    with pytest.raises(ValueError, match="append before generate"):
        session.append([[1], [2]])
    session.generate(max_new_tokens=2)
    with pytest.raises(ValueError, match="append: 1 turns for 2 sequences"):
        session.append([[1]])
    with pytest.raises(ValueError, match="generate: sequence 0 may grow by 2 more tokens"):
        session.generate(max_new_tokens=3)


# ----------------------------------------------------------------------------------------------------
# Hugging Face models.


def hugging_face(model_type: str, attention: str) -> Any:
    transformers = pytest.importorskip("transformers")
    from cpattn.launch.benchmarks.tiny_models import make_lively, tiny_config

    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(tiny_config(model_type), attn_implementation=attention)
    make_lively(model)
    return model.eval()


class Wrapped(nn.Module):
    """As adapters wrap a model: its forward, its config, and the model within."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.inner, self.config = model, model.config

    def get_base_model(self) -> Any:
        return self.inner

    def forward(self, **kwargs: Any) -> Any:
        return self.inner(**kwargs)


def sharded_by_layer(model: Any) -> Any:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.get_decoder().layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def hugging_face_on_rank(model_type: str, wrap: str | None) -> list[list[int]]:
    from cpattn.nn import ContextParallel

    model: Any = hugging_face(model_type, "cpattn").train()
    modes = [m.training for m in model.modules()]
    called = {None: lambda m: m, "adapter": Wrapped, "DDP": DistributedDataParallel, "FSDP2": sharded_by_layer}.get(
        wrap, lambda m: ContextParallel(m, world())
    )(model)
    group = None if wrap == "ContextParallel" else world()
    tokens = cpattn.generate(called, [[5], [6, 7, 8, 9, 6, 7, 8, 11, 12]], max_new_tokens=4, cp_group=group)
    assert [m.training for m in model.modules()] == modes
    return [t.tolist() for t in tokens]


@pytest.mark.parametrize(
    ("model_type", "wrap"),
    [
        ("llama", "ContextParallel"),
        ("llama", "FSDP2"),
        ("qwen3", "DDP"),
        ("mistral", "adapter"),
        ("deepseek_v3", None),
        ("gemma4_text", None),
        ("bloom", None),
    ],
)
def test_architectures_generate_as_eager_does(model_type, wrap):
    """Latent attention, heads that differ by layer, windows, wrappers; dropout off in a model that trains."""
    eager, want = hugging_face(model_type, "eager"), []
    for ids in (torch.tensor([5]), torch.tensor([6, 7, 8, 9, 6, 7, 8, 11, 12])):
        start = len(ids)
        for _ in range(4):
            with torch.no_grad():
                ids = torch.cat([ids, eager(input_ids=ids[None], use_cache=False).logits[0, -1:].argmax(-1)])
        want.append(ids[start:].tolist())
    for tokens in run_on_ranks(3, hugging_face_on_rank, model_type, wrap):
        assert tokens == want


def one_token_on_rank() -> list[int]:
    return cpattn.generate(hugging_face("llama", "cpattn"), [[5]], max_new_tokens=3, cp_group=world())[0].tolist()


def test_fewer_tokens_than_ranks():
    want = cpattn.generate(hugging_face("llama", "cpattn"), [[5]], max_new_tokens=3)[0].tolist()
    assert all(tokens == want for tokens in run_on_ranks(3, one_token_on_rank))


@pytest.mark.parametrize(
    ("model_type", "options", "message"),
    [
        ("bart", {}, "BartForCausalLM numbers its tokens itself"),
        ("deepseek_v3", {"shape": ModelShape(2, 4, 4, 24, (None, None))}, "shape does not fit layer 0 .*head_dim_v=16"),
    ],
)
def test_what_cannot_be_generated_is_refused_by_name(model_type, options, message):
    with pytest.raises(ValueError, match=message):
        cpattn.generate(hugging_face(model_type, "cpattn"), [[5, 6]], max_new_tokens=2, **options)
