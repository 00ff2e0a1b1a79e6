"""Layer 2: recurrences and convolutions on 1 to 4 ranks against their definitions in fp64, out and all gradients."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import cpattn
from cpattn import AttnMaskSpec, dispatch, make_key, undispatch
from cpattn.keys.key import AttnKey, bind_key
from cpattn.masks.spec import lower_mask
from cpattn.mixers import (
    Convolution,
    causal_conv1d,
    convolution_traffic,
    linear_attention,
    map_bytes,
    recurrence_traffic,
)
from cpattn.mixers import Recurrence as Recurrence_
from cpattn.solver import Placement, assemble_plan, keys_schedule
from tests_dist.mixers import references
from tests_dist.support.harness import run_on_ranks
from tests_dist.support.profiles import each_once, is_nightly

# Longer than a rank, empty, of one token, ending a rank: what is cut where changes with layout and number of ranks.
PACKED = (1, 7, 0, 130, 300, 1, 1, 45)
HEADS = {"num_heads_q": 2, "num_heads_kv": 2, "head_dim": 8}


class Recurrence(NamedTuple):
    """decay: None, "head" or "channel". depth: the decay's log is about minus this."""

    decay: str | None
    delta: bool
    depth: float = 0.3


RECURRENCES = {
    "linear": Recurrence(None, False),
    "lightning": Recurrence("head", False),
    "gated": Recurrence("channel", False),
    "delta": Recurrence(None, True),
    "gdn": Recurrence("head", True),
    "kda": Recurrence("channel", True),
    "forgetful": Recurrence("head", True, depth=1e4),
    "forgetful_channels": Recurrence("channel", False, depth=1e4),
}


def make_inputs(case: Recurrence, tokens: int, seed: int = 0) -> dict[str, Tensor]:
    """q, k of two heads, v of four, decay and beta over all tokens, in fp64; half of a deep decay is none at all."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(tokens, *shape, generator=generator, dtype=torch.float64)

    inputs = {"q": normal(2, 6), "k": torch.nn.functional.normalize(normal(2, 6), dim=-1), "v": normal(4, 5)}
    if case.decay is not None:
        shape = (4, 6) if case.decay == "channel" else (4,)
        inputs["decay"] = -case.depth * (normal(*shape).abs() if case.depth < 1 else (normal(*shape) > 1).double())
    if case.delta:
        inputs["beta"] = normal(4).sigmoid()
    return inputs


def with_gradients(run: Any, inputs: dict[str, Tensor], dout: Tensor) -> dict[str, Tensor]:
    """The result of run(**inputs) as "out", and the gradients of all inputs."""
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    out = run(**leaves)
    grads = torch.autograd.grad(out, list(leaves.values()), dout)
    return {"out": out.detach(), **dict(zip(leaves, grads, strict=True))}


def on_shards(run: Any, inputs: dict[str, Tensor], dout: Tensor, key: AttnKey) -> dict[str, Tensor]:
    """The same on this rank's rows of what has tokens first (all but weights and biases), gathered."""
    whole = {"weight", "bias"} & set(inputs)
    mine = {name: x if name in whole else dispatch(x, key) for name, x in inputs.items()}
    got = with_gradients(functools.partial(run, key=key), mine, dispatch(dout, key))
    for name, x in got.items():
        if name not in whole:
            got[name] = undispatch(x, key)
        elif key.cp_group is not None:
            got[name] = x.contiguous()
            dist.all_reduce(got[name], group=key.cp_group)
    return got


def assert_close(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    for name, truth in expected.items():
        torch.testing.assert_close(got[name], truth, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def run_linear_attention(q: Tensor, k: Tensor, v: Tensor, key: AttnKey, **options: Tensor) -> Tensor:
    return linear_attention(q, k, v, key, decay=options.get("decay"), beta_TH=options.get("beta"))


def run_reference(seqlens: tuple[int, ...], q: Tensor, k: Tensor, v: Tensor, **options: Tensor) -> Tensor:
    return references.recurrence(q, k, v, options.get("decay"), options.get("beta"), seqlens)


def key_of(seqlens: tuple[int, ...], layout: str, chunk_size: int = 16) -> AttnKey:
    group = dist.group.WORLD if dist.get_world_size() > 1 else None
    spec = AttnMaskSpec.varlen(list(seqlens))
    return make_key(spec, cp_group=group, **HEADS, layout=layout, chunk_size=chunk_size)


def check_recurrences(names: list[str], layout: str, expected: list[dict[str, Tensor]]) -> None:
    key = key_of(PACKED, layout)
    for name, truth in zip(names, expected, strict=True):
        inputs = make_inputs(RECURRENCES[name], sum(PACKED))
        assert_close(on_shards(run_linear_attention, inputs, dout_of(inputs), key), truth)


def dout_of(inputs: dict[str, Tensor]) -> Tensor:
    return torch.randn(inputs["v"].shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


@functools.cache
def truth_of(name: str) -> dict[str, Tensor]:
    inputs = make_inputs(RECURRENCES[name], sum(PACKED))
    return with_gradients(functools.partial(run_reference, PACKED), inputs, dout_of(inputs))


@pytest.mark.shows("hybrid models on the same shards")
@each_once(cp_size=[1, 2, 3, 4], layout=["balanced", "contiguous", "zigzag"])
def test_recurrences_equal_their_definitions(cp_size: int, layout: str) -> None:
    names = list(RECURRENCES)
    run_on_ranks(cp_size, check_recurrences, names, layout, [truth_of(name) for name in names])


class _Scattered(NamedTuple):
    """A placement that no planner would make: every few tokens another rank's. seed: of it, and of the documents."""

    seed: int
    documents: tuple[int, ...]
    depth: float


def scattered_of(seed: int) -> _Scattered:
    random = np.random.default_rng(seed)
    documents = random.integers(0, 40, size=random.integers(2, 7)) * random.choice([1, 1, 3])
    return _Scattered(seed, (*(int(n) for n in documents), 5), float(random.choice([0.3, 30.0, 1e4])))


def key_with_owners(seqlens: tuple[int, ...], owners: np.ndarray) -> AttnKey:
    """A key whose placement gives token t to rank owners[t]."""
    key = key_of(seqlens, "contiguous")
    placement = Placement.from_runs(np.arange(1, len(owners) + 1), owners, cp_size=key.cp_size)
    options, costs = key.options.planning, key.heads.row_costs()
    schedule = keys_schedule(lower_mask(key.spec), placement)
    plan = assemble_plan(
        *schedule, placement, placement, num_stages=1, hardware=options.hardware, ranks_per_node=1, costs=costs
    )
    return bind_key(key.planned._replace(plan=plan), key.ranks)


def check_scattered(case: _Scattered, expected: dict[str, dict[str, Tensor]]) -> None:
    tokens, cp_size = sum(case.documents), dist.get_world_size()
    random = np.random.default_rng(case.seed)
    owners = np.repeat(random.integers(0, cp_size, size=tokens), random.integers(1, 9, size=tokens))[:tokens]
    key = key_with_owners(case.documents, owners)
    for name, truth in expected.items():
        inputs = make_inputs(RECURRENCES[name]._replace(depth=case.depth), tokens, case.seed)
        assert_close(on_shards(run_linear_attention, inputs, dout_of(inputs), key), truth)
    check_convolution_on(key, case.documents, width=4)


@pytest.mark.parametrize("cp_size", [8, *(pytest.param(n, marks=pytest.mark.nightly) for n in range(1, 8))])
def test_random_fragments_with_extreme_decays(cp_size: int, request: pytest.FixtureRequest) -> None:
    nightly = is_nightly(request.config.option.markexpr)
    for seed in range(12 if nightly else 1):
        case = scattered_of(100 * cp_size + seed)
        truths = {}
        for name in ("lightning", "gated", "gdn", "kda") if nightly else ("gated", "gdn"):
            inputs = make_inputs(RECURRENCES[name]._replace(depth=case.depth), sum(case.documents), case.seed)
            run = functools.partial(run_reference, case.documents)
            truths[name] = with_gradients(run, inputs, dout_of(inputs))
        run_on_ranks(cp_size, check_scattered, case, truths)


def check_few_tokens(seqlens: tuple[int, ...]) -> None:
    key = key_of(seqlens, "balanced", chunk_size=1)
    inputs = make_inputs(RECURRENCES["gdn"], sum(seqlens))
    dout = dout_of(inputs)
    truth = with_gradients(functools.partial(run_reference, seqlens), inputs, dout)
    assert_close(on_shards(run_linear_attention, inputs, dout, key), truth)
    check_convolution(seqlens, "contiguous")


@pytest.mark.parametrize("seqlens", [(1,), (2, 1), (0, 3)])
def test_ranks_without_rows_take_part(seqlens: tuple[int, ...]) -> None:
    run_on_ranks(4, check_few_tokens, seqlens)


def run_convolution(x: Tensor, weight: Tensor, bias: Tensor, key: AttnKey) -> Tensor:
    return causal_conv1d(x, weight, key, bias_C=bias)


def check_convolution(seqlens: tuple[int, ...], layout: str, width: int = 4) -> None:
    check_convolution_on(key_of(seqlens, layout), seqlens, width)


def check_convolution_on(key: AttnKey, seqlens: tuple[int, ...], width: int) -> None:
    tokens = sum(seqlens)
    generator = torch.Generator().manual_seed(width)
    shapes = {"x": (tokens, 6), "weight": (6, width), "bias": (6,)}
    inputs = {n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in shapes.items()}
    dout = torch.randn(tokens, 6, generator=generator, dtype=torch.float64)
    truth = with_gradients(
        lambda x, weight, bias: references.convolution(x, weight, bias, seqlens), inputs, dout
    )
    assert_close(on_shards(run_convolution, inputs, dout, key), truth)


@pytest.mark.shows("hybrid models on the same shards")
@each_once(cp_size=[3, 4, 1], layout=["contiguous", "zigzag", "balanced"])
def test_convolutions_equal_their_definition(cp_size: int, layout: str) -> None:
    for width in (1, 4, 200):  # of nothing, of what models have, over several ranks
        run_on_ranks(cp_size, check_convolution, PACKED, layout, width)


def rows_that_change(run: Any, x: Tensor, token: int, key: AttnKey) -> list[int]:
    """Rows of run(x), from all ranks, that change when one token of x does."""
    changed = x.clone()
    changed[token] += 1.0
    difference = undispatch(run(dispatch(changed, key)) - run(dispatch(x, key)), key)
    return difference.flatten(1).abs().amax(1).nonzero().flatten().tolist()  # type: ignore[no-any-return]


def check_perturbed_token(token: int) -> dict[str, list[int]]:
    """Rows that change when one token does, by kind of layer."""
    key = key_of(PACKED, "zigzag")
    windowed = key.with_mask(key.spec, window=(40, 0))
    latents = make_key(key.spec, cp_group=key.cp_group, **HEADS, layout="zigzag", chunk_size=16, schedule="keys")
    weight = torch.ones(20, 4, dtype=torch.float64)
    x = make_inputs(RECURRENCES["linear"], sum(PACKED))["v"]

    def recurrence(v: Tensor, case: Recurrence) -> Tensor:
        inputs = {n: dispatch(t, key) for n, t in make_inputs(case, sum(PACKED)).items()}
        return run_linear_attention(**{**inputs, "v": v}, key=key)

    def softmax(v: Tensor, key: AttnKey) -> Tensor:
        heads = v.flatten(1)[:, :16].unflatten(1, (2, 8))
        return cpattn.attention(heads, heads, heads, key)  # type: ignore[return-value]

    def latent(v: Tensor) -> Tensor:
        heads = [rows.flatten(1)[:, :16].unflatten(1, (2, 8)) for rows in (v, cpattn.fetch(v, latents))]
        return cpattn.local_attention(heads[0], heads[1], heads[1], latents)  # type: ignore[return-value]

    runs: dict[str, Any] = {
        **{name: functools.partial(recurrence, case=case) for name, case in RECURRENCES.items() if case.depth < 1},
        "convolution": lambda v: causal_conv1d(v.flatten(1), weight, key),
        "softmax": functools.partial(softmax, key=key),
        "window": functools.partial(softmax, key=windowed),
        "latents": latent,
    }
    return {name: rows_that_change(run, x, token, key) for name, run in runs.items()}


@pytest.mark.parametrize("token", [0, 8, 200, 137])
def test_a_token_changes_the_later_ones_of_its_document_alone(token: int) -> None:
    ends = np.cumsum(PACKED)
    end = int(ends[np.searchsorted(ends, token, side="right")])
    reach = {"convolution": 4, "window": 41}
    for changed in run_on_ranks(3, check_perturbed_token, token):
        for name, rows in changed.items():
            expected = range(token, min(token + reach.get(name, end), end))
            assert rows[0] == token, name
            assert set(rows) <= set(expected), name
            # What a deep decay has made of a change is lost in rounding before the document's end.
            assert rows == list(expected) or (name not in reach and len(rows) > len(expected) // 3), name


def test_gradients_equal_finite_differences() -> None:
    key = make_key(AttnMaskSpec.varlen([3, 19]), **HEADS)
    for case in (RECURRENCES["gdn"], RECURRENCES["kda"], RECURRENCES["gated"]):
        inputs = {name: x.requires_grad_() for name, x in make_inputs(case, 22).items()}
        names = list(inputs)

        def run(*tensors: Tensor, names: list[str] = names) -> Tensor:
            return run_linear_attention(**dict(zip(names, tensors, strict=True)), key=key)

        assert torch.autograd.gradcheck(run, tuple(inputs.values()), fast_mode=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(5, 2, 6)}, "q has shape"),
        ({"k": torch.zeros(22, 2, 5)}, "must have one shape"),
        ({"v": torch.zeros(22, 3, 5)}, "multiple"),
        ({"decay": torch.zeros(22, 4, 5)}, "decay has shape"),
        ({"beta": torch.zeros(22, 2)}, "beta has shape"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(change: dict[str, Tensor], message: str) -> None:
    key = make_key(AttnMaskSpec.varlen([3, 19]), **HEADS)
    with pytest.raises(ValueError, match=message):
        run_linear_attention(**{**make_inputs(RECURRENCES["gdn"], 22), **change}, key=key)


def test_masks_without_whole_documents_are_refused() -> None:
    raw = AttnMaskSpec([[0, 8]], [[0, 8]], ["causal"], 8)
    tree, _ = AttnMaskSpec.prefix_tree([4, 4, 4], [[0, 1], [0, 2]])
    for spec, message in ((raw, "does not say which tokens follow"), (tree, "token 4 sees tokens of other documents")):
        key = make_key(spec, **HEADS)
        with pytest.raises(ValueError, match=message):
            causal_conv1d(torch.zeros(spec.total_seqlen, 3), torch.zeros(3, 4), key)


def check_described() -> None:
    key = key_of(PACKED, "zigzag")
    layers = [Recurrence_(32, 128, 128, delta=True), Recurrence_(4, 8, 16, by_channel=True), Convolution(4, 96)]
    lines = key.describe(torch.bfloat16, "cpu", mixers=layers).splitlines()
    assert lines[3:] == key.describe(torch.bfloat16, "cpu").splitlines()
    sizes = [map_bytes(32, 128, 128, delta=True), map_bytes(4, 8, 16, delta=False, by_channel=True)]
    assert sizes == [4 * 32 * 2 * 128 * 128, 4 * 4 * (8 + 8 * 16)]
    for line, size in zip(lines, sizes, strict=False):
        moved = recurrence_traffic(key, size)
        assert f"{moved.rows.sum()} maps of {size:,} bytes" in line
        assert f" {moved.busiest_bytes:,} bytes on the busiest; 1 stage" in line
    moved = convolution_traffic(key, 4, 96)
    assert f"{moved.rows.sum()} rows received, forward, {moved.busiest_bytes:,} bytes on the busiest" in lines[2]


def test_a_key_describes_mixers() -> None:
    run_on_ranks(3, check_described)
    with pytest.raises(ValueError, match="describe: the mask does not say"):
        make_key(AttnMaskSpec([[0, 8]], [[0, 8]], ["causal"], 8), **HEADS).describe(mixers=[Convolution(4, 8)])
