"""Runtime layer: the caller's mistakes. Each gets a ValueError with the value, the rule and the way out.

A mistake that all ranks share, or that one rank can see alone, is raised before any collective:
`no_collectives` makes any collective an error. One that only shows between ranks is raised on all of
them, naming field and ranks, and the group goes on working.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import cpattn
from cpattn import AttnMaskSpec
from cpattn.backends import FlexBackend
from cpattn.mixers import causal_conv1d, linear_attention
from cpattn.solver import assemble_plan
from tests_dist.support.harness import fresh_group, run_on_ranks

SPEC = AttnMaskSpec.varlen([40, 24])
COLLECTIVES = (
    "all_gather",
    "all_gather_into_tensor",
    "all_to_all_single",
    "all_reduce",
    "broadcast",
    "barrier",
)


@contextlib.contextmanager
def no_collectives() -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for name in COLLECTIVES:
            error = AssertionError(f"{name} ran before the mistake was found")
            stack.enter_context(mock.patch.object(dist, name, side_effect=error))
        yield


@contextlib.contextmanager
def refused(message: str) -> Iterator[None]:
    with no_collectives(), pytest.raises(ValueError, match=re.escape(message)):
        yield


def make_key(spec: AttnMaskSpec = SPEC, **options: Any) -> cpattn.AttnKey:
    defaults = {
        "num_heads_q": 4,
        "num_heads_kv": 2,
        "head_dim": 8,
        "cp_group": dist.group.WORLD,
        "chunk_size": 8,
    }
    return cpattn.make_key(spec, **{**defaults, **options})


def local_inputs(key: cpattn.AttnKey) -> tuple[Tensor, Tensor, Tensor]:
    q = torch.randn(key.num_tokens, 4, 8)
    return q, torch.randn(key.num_keys, 2, 8), torch.randn(key.num_keys, 2, 8)


# ----------------------------------------------------------------------------------------------------
# make_key.

BAD_KEYS: dict[str, dict[str, Any]] = {
    "num_heads_q is 0: it must be an int of at least 1": {"num_heads_q": 0},
    "num_heads_kv is -2: it must be an int of at least 1": {"num_heads_kv": -2},
    "num_heads_q is 4.0: it must be an int": {"num_heads_q": 4.0},
    "head_dim is 0: it must be an int of at least 1": {"head_dim": 0},
    "head_dim_v is 0: it must be an int of at least 1": {"head_dim_v": 0},
    "num_heads_q is 2 and num_heads_kv is 4: query heads must be a multiple of key heads; did they swap": {
        "num_heads_q": 2,
        "num_heads_kv": 4,
    },
    "num_heads_q is 3 and num_heads_kv is 2": {"num_heads_q": 3},
    "chunk_size is 0: it must be an int of at least 1": {"chunk_size": 0},
    "num_stages is 0: it must be an int of at least 1": {"num_stages": 0},
    "num_stages is True: it must be an int": {"num_stages": True},
    "num_stages is 99: at most": {"num_stages": 99},
    "layout 'spiral' is unknown: use one of balanced, contiguous, zigzag": {"layout": "spiral"},
    "schedule 'queries'": {"schedule": "queries"},
    "backend 'magic' is unknown: use auto, fastest, sdpa": {"backend": "magic"},
    "ranks_per_node is 3 and cp_size is 2: nodes must be of equal size": {"ranks_per_node": 3},
    "window is 0: give an int of at least 1, or (left, right) of at least 0 each": {"window": 0},
    "window is (3, -1): give an int of at least 1": {"window": (3, -1)},
    "window is (1, 2, 3): give an int of at least 1": {"window": (1, 2, 3)},
    "window is 2.5: give an int of at least 1": {"window": 2.5},
    "window is 8 and the mask is cross-attention: queries and keys share no positions; pass window=None": {
        "spec": AttnMaskSpec.cross([3], [4]),
        "window": 8,
    },
    "'tiles' needs layout 'balanced' and self-attention": {"schedule": "tiles", "layout": "zigzag"},
    "spec is [3, 4]: expected an AttnMaskSpec": {"spec": [3, 4]},
    "cp_group is 7: this rank (0) is not in it; pass a ProcessGroup or DeviceMesh": {"cp_group": 7},
}


def bad_keys() -> None:
    """On rank 0 alone: had a collective run, rank 1 would be missed."""
    if dist.get_rank() == 0:
        for message, options in BAD_KEYS.items():
            with refused(message):
                make_key(**options)
    make_key()


def test_make_key_refuses():
    run_on_ranks(2, bad_keys, timeout=30)


def groups_without_this_rank() -> None:
    """Groups and meshes that this rank is not in, and meshes without a context-parallel axis."""
    rank = dist.get_rank()
    other = fresh_group([2, 3])
    mesh = DeviceMesh("cpu", [2, 3])
    if rank < 2:
        for group in (other, mesh):
            with refused(f"this rank ({rank}) is not in it; pass a ProcessGroup or DeviceMesh that contains"):
                make_key(cp_group=group)
    else:
        assert make_key(cp_group=other).cp_size == 2
        assert make_key(cp_group=mesh).cp_rank == rank - 2
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    with refused(
        "cp_group is a mesh with axes ('dp', 'tp'): pass a 1-D mesh, or name the context-parallel axis"
    ):
        make_key(cp_group=square)


def test_groups_without_this_rank():
    run_on_ranks(4, groups_without_this_rank, timeout=60)


# ----------------------------------------------------------------------------------------------------
# Calls with a key.


def bad_calls() -> None:
    key = make_key()
    q, k, v = local_inputs(key)
    rows, rank = key.num_tokens, dist.get_rank()
    expects = f"(rows of rank {rank}, heads, head dim); did you dispatch with this key?"

    def attend(q: Any = q, k: Any = k, v: Any = v, **options: Any) -> Callable[[], Any]:
        return lambda: cpattn.attention(q, k, v, key, **options)

    cases: dict[str, Callable[[], Any]] = {
        f"q has shape ({rows + 1}, 4, 8): the key expects ({rows}, 4, 8) {expects}": attend(
            q=torch.randn(rows + 1, 4, 8)
        ),
        f"k has shape ({rows - 1}, 2, 8): the key expects ({rows}, 2, 8)": attend(k=k[1:]),
        f"v has shape ({rows}, 1, 8): the key expects ({rows}, 2, 8)": attend(v=v[:, :1]),
        f"q has shape ({rows}, 2, 8): the key expects ({rows}, 4, 8)": attend(q=k, k=q),
        f"q has shape ({rows}, 4, 16): the key expects": attend(q=torch.randn(rows, 4, 16)),
        f"v has shape ({rows}, 2, 4): the key expects": attend(v=v[..., :4]),
        f"q has shape (1, {rows}, 4, 8): the key expects": attend(q=q[None]),
        f"q has shape ({rows}, 32): the key expects": attend(q=q.flatten(1)),
        "k is torch.bfloat16 on cpu and q is torch.float32 on cpu: q, k and v must agree": attend(
            k=k.bfloat16()
        ),
        "v is torch.float64 on cpu and q is torch.float32 on cpu": attend(v=v.double()),
        "v is torch.float32 on meta and q is torch.float32 on cpu": attend(v=v.to("meta")),
        "dtype int64 is not one of float64, float32, bfloat16, float16": attend(q.long(), k.long(), v.long()),
        "dtype complex64 is not one of": attend(q.cfloat(), k.cfloat(), v.cfloat()),
        "sink has shape (2,): expected (4,), one logit per query head": attend(sink=torch.zeros(2)),
        "sink has shape (): expected (4,)": attend(sink=torch.zeros(())),
        "sink is on meta and q on cpu: move the sink to cpu": attend(sink=torch.zeros(4, device="meta")),
        "softmax_scale is nan: it must be a finite number": attend(softmax_scale=float("nan")),
        "softmax_scale is inf: it must be a finite number": attend(softmax_scale=float("-inf")),
        "softcap is 0.0: it must be a finite number above 0, or None": attend(softcap=0.0),
        "softcap is -3.0: it must be": attend(softcap=-3.0),
        "softcap is nan: it must be": attend(softcap=float("nan")),
        "dispatch: the tensor has 63 rows at dim 0 (shape (63, 2)), expected 64, the tokens of the key's": (
            lambda: cpattn.dispatch(torch.zeros(63, 2), key)
        ),
        "dispatch: dim is 2, the tensor has shape (64, 2)": lambda: cpattn.dispatch(
            torch.zeros(64, 2), key, dim=2
        ),
        "dispatch: dim is 0, the tensor has shape ()": lambda: cpattn.dispatch(torch.zeros(()), key),
        "side is 'v': 'q' for query tokens or 'k' for key tokens": (
            lambda: cpattn.dispatch(torch.zeros(64), key, side="v")
        ),
        f"undispatch: the tensor has 64 rows at dim 1 (shape (1, 64)), expected {rows}, the rows of": (
            lambda: cpattn.undispatch(torch.zeros(1, 64), key, dim=1)
        ),
        f"roll: the tensor has 64 rows at dim 0 (shape (64,)), expected {rows}": (
            lambda: cpattn.roll(torch.zeros(64), key)
        ),
    }
    assert rows not in (63, 64)
    for message, call in cases.items():
        with refused(message):
            call()
    cpattn.attention(q, k, v, key)  # the group is as it was


def test_calls_refuse():
    run_on_ranks(2, bad_calls, timeout=30)


def without_documents() -> None:
    key = make_key(AttnMaskSpec([[0, 64]], [[0, 64]], ["causal"], 64))
    way_out = "pass documents=[(start, end), ...] to AttnMaskSpec (position_ids also takes stream=True)"
    for call in ("position_ids", "roll"):
        with refused(f"{call}: the mask has no documents, so positions within them are unknown; {way_out}"):
            cpattn.position_ids(key) if call == "position_ids" else cpattn.roll(
                torch.zeros(key.num_tokens), key
            )
    assert len(cpattn.position_ids(key, stream=True)) == key.num_tokens
    documents = [(0, 30), (30, 64)]
    key = make_key(AttnMaskSpec([[0, 64]], [[0, 64]], ["causal"], 64, documents=documents))
    assert int(cpattn.undispatch(cpattn.position_ids(key), key).max()) == 33


def test_positions_need_documents():
    run_on_ranks(2, without_documents)


def other_sequences() -> None:
    key = make_key()
    for spec in (AttnMaskSpec.causal(65), AttnMaskSpec.cross([64], [64])):
        with refused("masks of one placement are over the same sequence"):
            key.with_mask(spec)
    with refused("num_heads_q is 2 and num_heads_kv is 4: query heads must be a multiple of key heads"):
        key.with_heads(2, 4, 8)
    with refused("head_dim is 0: it must be an int of at least 1"):
        key.with_heads(4, 2, 0)


def test_with_mask_is_over_the_same_sequence():
    run_on_ranks(2, other_sequences)


def empty_rows() -> None:
    """A query row that sees nothing: out 0, lse -inf, zero gradient, never NaN; with garbage upstream too."""
    spec = AttnMaskSpec([[0, 10], [20, 40]], [[0, 10], [5, 64]], ["full", "causal"], 64)
    key = make_key(spec, num_stages=2)
    blind = cpattn.dispatch(~torch.from_numpy(spec.to_dense().any(1)), key)
    unseen = cpattn.dispatch(~torch.from_numpy(spec.to_dense().any(0)), key)
    leaves = [t.requires_grad_() for t in local_inputs(key)]
    out, lse = cpattn.attention(*leaves, key, return_lse=True)
    assert not out[blind].any()
    assert (lse[blind] == -torch.inf).all()
    assert lse[~blind].isfinite().all()
    dq, dk, dv = torch.autograd.grad(out, leaves, torch.full_like(out, 1e30))
    assert not dq[blind].any()
    assert not dk[unseen].any()
    assert not dv[unseen].any()
    assert dq[~blind].isfinite().all()


def test_rows_that_see_nothing():
    run_on_ranks(3, empty_rows)


# ----------------------------------------------------------------------------------------------------
# Ranks that do not agree.


def differing_keys() -> None:
    """Ranks 1 and 2 pass something else; every rank says so, names field, ranks and its own value."""
    rank = dist.get_rank()
    odd = rank in (1, 2)
    cases: dict[str, dict[str, Any]] = {
        "mask": {"spec": AttnMaskSpec.varlen([24, 40]) if odd else SPEC},
        "heads and head dims": {"num_heads_q": 8 if odd else 4},
        "layout": {"layout": "zigzag" if odd else "contiguous"},
        "hardware": {"hardware": "h200" if odd else "h100"},
    }
    for field, options in cases.items():
        with pytest.raises(
            ValueError, match=f"make_key: {field} differs between ranks: ranks \\[1, 2\\]"
        ) as raised:
            make_key(**options)
        message = str(raised.value)
        assert f"rank {rank} has " in message
        assert f"must pass the same {field}" in message
        shown = message.split(f"rank {rank} has ")[1]
        own = {
            "mask": "[0, 24]" if odd else "[0, 40]",
            "heads and head dims": "(8, 2" if odd else "(4, 2",
            "layout": "'zigzag'" if odd else "'contiguous'",
            "hardware": "name='h200'" if odd else "name='h100'",
        }
        assert own[field] in shown
    more = {"documents": [(0, 64)]} if odd else {"documents": [(0, 10), (10, 64)]}
    with pytest.raises(ValueError, match="mask differs between ranks"):
        make_key(AttnMaskSpec([[0, 64]], [[0, 64]], ["full"], 64, **more))
    q, k, v = local_inputs(make_key())
    cpattn.attention(q, k, v, make_key())


def test_keys_that_differ_between_ranks():
    run_on_ranks(4, differing_keys, timeout=60)


def kernels_that_cannot_run() -> None:
    """Named with what they lack on every rank; a rank that alone lacks something is named on all."""
    for name in ("flash_attn", "cudnn", "te", "ffa"):
        with pytest.raises(ValueError, match=f"'{name}' cannot run in this process, which sees no GPU: {name} "):
            make_key(backend=name)
    with pytest.raises(ValueError, match="'te' cannot run"):
        make_key(backend="te", head_degree=2)
    lacking = FlexBackend.refusal if dist.get_rank() == 0 else (lambda self, problem: "too old here")
    with (
        mock.patch.object(FlexBackend, "refusal", lacking),
        pytest.raises(ValueError, match=r"what the kernel lacks differs between ranks: ranks \[1\](.|\n)*too old here"),
    ):
        make_key(backend="flex")
    q, k, v = local_inputs(make_key())
    cpattn.attention(q, k, v, make_key())


@pytest.mark.skipif(torch.cuda.is_available(), reason="where there is a GPU they may run")
def test_kernels_that_cannot_run_here_are_refused_when_the_key_is_made():
    run_on_ranks(2, kernels_that_cannot_run, timeout=60)


def differing_plans() -> None:
    """The same arguments and another plan (another version of the solver, say) is noticed too."""
    from cpattn.keys.cache import clear_key_cache
    from cpattn.planning import ready as planning

    clear_key_cache()
    planned = planning.make_dispatch_plan
    if dist.get_rank() == 1:
        planned = lambda *args, **options: assemble_plan(*other_plan(planning.lower_mask(SPEC)))  # noqa: E731
    with (
        mock.patch.object(planning, "make_dispatch_plan", planned),
        pytest.raises(ValueError, match=r"make_key: plan differs between ranks: ranks \[1\]"),
    ):
        make_key()


def other_plan(table: Any) -> tuple[Any, ...]:
    from cpattn.solver import place_zigzag

    placement = place_zigzag(64, 2)
    tasks = table.split_q(placement.starts[1:]).table
    return tasks, placement.owner_of(tasks.q0), placement, placement


def test_plans_that_differ_between_ranks():
    run_on_ranks(2, differing_plans, timeout=30)


def differing_calls() -> None:
    """At the first call with some dtype, scale, softcap or sink, ranks compare them."""
    key, odd = make_key(), dist.get_rank() == 2
    q, k, v = local_inputs(key)
    dtype = torch.bfloat16 if odd else torch.float32
    cases: dict[str, Callable[[], Any]] = {
        "dtype": lambda: cpattn.attention(q.to(dtype), k.to(dtype), v.to(dtype), key),
        "scale": lambda: cpattn.attention(q, k, v, key, softmax_scale=0.5 if odd else 0.25),
        "softcap": lambda: cpattn.attention(q, k, v, key, softcap=3.0 if odd else None),
        "sink": lambda: cpattn.attention(q, k, v, key, sink=torch.zeros(4) if odd else None),
    }
    for field, call in cases.items():
        with pytest.raises(
            ValueError, match=rf"attention: {field} differs between ranks: ranks \[2\] of the group"
        ):
            call()
    cpattn.attention(q, k, v, key)
    sharded = make_key(head_degree=3)
    with pytest.raises(ValueError, match=r"attention: return_lse differs between ranks: ranks \[2\] of the group"):
        cpattn.attention(*local_inputs(sharded), sharded, return_lse=odd)


def test_calls_that_differ_between_ranks():
    run_on_ranks(3, differing_calls, timeout=60)


def agreement_is_by_value() -> None:
    """Ints of Python and of numpy are the same number to it."""
    odd = dist.get_rank() == 1
    number = np.int64 if odd else int
    spec = AttnMaskSpec.varlen(np.array([40, 24]) if odd else [40, 24])
    options = {"num_heads_q": number(4), "chunk_size": number(16), "window": number(9), "head_dim": number(8)}
    make_key(spec, **options)


def test_agreement_is_by_value():
    run_on_ranks(2, agreement_is_by_value, timeout=30)


# ----------------------------------------------------------------------------------------------------
# What a newcomer does; on one rank.


@pytest.mark.parametrize(
    ("shape", "hint"),
    [
        ((1, 64, 4, 8), "rows are packed, so is a batch dimension to be flattened"),
        ((4, 64, 8), "do heads come first, so that transpose(0, 1) is missing?"),
        ((63, 4, 8), "did you dispatch with this key?"),
    ],
)
def test_shapes_of_other_packages_are_named(shape: tuple[int, ...], hint: str) -> None:
    key = make_key(cp_group="self")
    _, k, v = local_inputs(key)
    with refused(hint):
        cpattn.attention(torch.randn(shape), k, v, key)


def test_a_second_derivative_is_refused_by_name() -> None:
    key = make_key(cp_group="self")
    q, k, v = (x.requires_grad_() for x in local_inputs(key))
    (dq,) = torch.autograd.grad(cpattn.attention(q, k, v, key).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="attention has no second derivative"):
        dq.sum().backward()


def test_a_plan_says_what_it_is_of() -> None:
    ready = cpattn.make_plan(SPEC, cp_size=3, num_heads_q=4, num_heads_kv=2, head_dim=8)
    assert repr(ready) == "<ReadyPlan of 64 x 64 tokens on 3 ranks, heads 4:2 of 8>"


def test_a_group_that_is_none() -> None:
    pytest.importorskip("transformers")
    from cpattn.integrations.hf_batch import process_group

    with refused("the group is 'cp', which this rank is not in: pass a ProcessGroup"):
        process_group("cp")


def odd_kinds() -> dict[str, Callable[[], object]]:
    """What no type says: taken for something else, or an error of Python's, where nobody looks."""
    key = cpattn.make_key(AttnMaskSpec.varlen([6, 4]), num_heads_q=2, num_heads_kv=1, head_dim=8)
    x, q, k = torch.ones(10, 3), torch.ones(10, 2, 8), torch.ones(10, 1, 8)
    heads = {"num_heads_q": 2, "num_heads_kv": 1, "head_dim": 8}

    def make(**options):
        return cpattn.make_key(AttnMaskSpec.causal(8), **heads, **options)

    return {
        "roll: shift is 1.5: it must be an int": lambda: cpattn.roll(x, key, 1.5),
        "roll: shift is 1180591620717411303424: it must lie": lambda: cpattn.roll(x, key, 2**70),
        "roll: fill_value is 0.5, which torch.int64 cannot hold": lambda: cpattn.roll(x.long(), key, fill_value=0.5),
        "roll: fill_value is 300, which torch.int8 cannot": lambda: cpattn.roll(x.to(torch.int8), key, fill_value=300),
        "roll: fill_value is 1j, which torch.float32 cannot hold": lambda: cpattn.roll(x, key, fill_value=1j),
        "roll: dim is 'a', the tensor has shape (10, 3)": lambda: cpattn.roll(x, key, dim="a"),
        "roll: key is None: expected what make_key returned": lambda: cpattn.roll(x, None),
        "undispatch: key is 'k': expected what make_key": lambda: cpattn.undispatch(x, "k"),
        "undispatch: expected a tensor, and this is list": lambda: cpattn.undispatch([1] * 10, key),
        "dispatch: expected a tensor, and this is NoneType": lambda: cpattn.dispatch(None, key),
        "v is NoneType: expected a tensor": lambda: cpattn.attention(q, k, None, key),
        "sink is list: expected a tensor": lambda: cpattn.attention(q, k, k, key, sink=[1.0, 2.0]),
        "causal_conv1d: key is None": lambda: causal_conv1d(x, torch.ones(3, 2), None),
        "linear_attention: v is no tensor of floating-point": lambda: linear_attention(q, q, q.long(), key),
        "linear_attention: decay is no tensor of": lambda: linear_attention(q, q, q, key, decay=3),
        "num_layers is nan: it must be a finite number above 0": lambda: make(num_layers=float("nan")),
        "identify is 'no': it must be True or False": lambda: make(identify="no"),
        "equal_shards is 'no': it must be True or False": lambda: make(equal_shards="no"),
        "windows is None: give one entry": lambda: cpattn.PagedKVCache(key, windows=None, max_new_tokens=1),
        "prompts is int: give a list": lambda: cpattn.generate(None, 3, max_new_tokens=1),
        "temperature is 'a': it must": lambda: cpattn.generate(None, [[1]], max_new_tokens=1, temperature="a"),
        "eos_token_id is 'a': give": lambda: cpattn.generate(None, [[1]], max_new_tokens=1, eos_token_id="a"),
    }


def test_odd_kinds_of_input_are_named():
    for message, call in odd_kinds().items():
        with pytest.raises(ValueError, match=re.escape(message)):
            call()
