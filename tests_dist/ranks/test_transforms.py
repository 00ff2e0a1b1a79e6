"""Compiled and transformed graphs: order of calls, handles, what is refused. One process, and 2 ranks."""

from __future__ import annotations

import io
import itertools
import operator
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition

import cpattn
from cpattn import AttnMaskSpec
from cpattn.keys.cache import find_by_handle
from cpattn.runtime.execute import _out_of_delta
from tests_dist.support.harness import run_on_ranks
from tests_dist.support.oracle import dense_attention


def _key(**options: Any) -> cpattn.AttnKey:
    return cpattn.make_key(AttnMaskSpec.causal(6), num_heads_q=2, num_heads_kv=1, head_dim=8, **options)


def _inputs() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(6, heads, 8, generator=generator).requires_grad_() for heads in (2, 1, 1)]


def _chain(graph: torch.fx.Graph) -> list[str]:
    """The operations that exchange rows, each of which must take the empty tensor of the one before."""
    ops = [n for n in graph.nodes if n.op == "call_function" and "cpattn." in str(n.target)]
    for before, after in itertools.pairwise(ops):
        token = after.args[0]
        results = len(before.target._schema.returns)
        assert token.target is operator.getitem, f"{after} does not wait for {before}"
        assert token.args == (before, results - 1), f"{after} does not wait for {before}"
    return [str(n.target).split(".")[1] for n in ops]


@pytest.mark.parametrize("head_degree", [1, 2])
def test_independent_calls_of_a_graph_wait_for_each_other(head_degree: int) -> None:
    """What a compiler is given, forward and backward; two towers in one graph."""
    run_on_ranks(head_degree, check_order, head_degree=head_degree)


def check_order(head_degree: int) -> None:
    heads: dict[str, Any] = {"num_heads_q": 2, "num_heads_kv": 2, "head_dim": 8}
    heads |= {"head_degree": head_degree, "cp_group": torch.distributed.group.WORLD}
    keys = [cpattn.make_key(spec, **heads) for spec in (AttnMaskSpec.causal(20), AttnMaskSpec.varlen([7, 13]))]
    chains: dict[str, list[str]] = {}

    def look(name: str) -> Any:
        def compiler(module: torch.fx.GraphModule, _: Any) -> Any:
            chains[name] = _chain(module.graph)
            return _boxed(module)

        return compiler

    def towers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = [cpattn.attention(q * (1 + i), k, v, key) for i, key in enumerate(keys)]
        return out[0].sum() + out[1].sin().sum()

    rows = [key.num_tokens for key in keys]
    assert rows[0] == rows[1]
    q, k, v = (torch.randn(rows[0], 2, 8).requires_grad_() for _ in range(3))
    eager = torch.autograd.grad(towers(q, k, v), (q, k, v))
    torch._dynamo.reset()
    backend = aot_autograd(
        fw_compiler=look("forward"),
        bw_compiler=look("backward"),
        partition_fn=min_cut_rematerialization_partition,  # inductor's
    )
    compiled = torch.autograd.grad(torch.compile(towers, backend=backend, fullgraph=True)(q, k, v), (q, k, v))
    for ours, expected in zip(compiled, eager, strict=True):
        torch.testing.assert_close(ours, expected)
    a_call = ["shard_heads", "attention_forward", "gather_rows"] if head_degree > 1 else ["attention_forward"]
    assert chains["forward"] == [f"{name}_in_order" for name in a_call * 2]
    names = {"attention_forward": "attention_backward"}
    assert chains["backward"] == [f"{names.get(n, f'{n}_backward')}_in_order" for n in reversed(a_call * 2)]


def _boxed(module: torch.fx.GraphModule) -> Any:
    def run(args: list[Any]) -> Any:
        return module.forward(*args)

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


def test_a_number_of_another_process_finds_no_key() -> None:
    """As of an exported program: keys' numbers are random, so that it never finds the key of another mask."""
    key, other = _key(), _key(chunk_size=2)
    assert abs(int(key.handle) - int(other.handle)) > 1
    with pytest.raises(RuntimeError, match="does not exist here: keep a reference to the key"):
        find_by_handle(torch.tensor(int(key.handle) ^ 1))


def test_saved_tensors_may_go_through_files() -> None:
    key, inputs = _key(), _inputs()

    def pack(x: Tensor) -> io.BytesIO:
        file = io.BytesIO()
        torch.save(x, file)
        return file

    def unpack(file: io.BytesIO) -> Tensor:
        file.seek(0)
        loaded: Tensor = torch.load(file)
        return loaded

    plain = torch.autograd.grad(cpattn.attention(*inputs, key).square().sum(), inputs)
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        loss = cpattn.attention(*inputs, key).square().sum()
    for ours, expected in zip(torch.autograd.grad(loss, inputs), plain, strict=True):
        assert torch.equal(ours, expected)


def test_what_has_no_rule_is_refused() -> None:
    key = _key()
    q, k, v = (t.detach() for t in _inputs())

    def attend(v: Tensor) -> Tensor:
        return cpattn.attention(q, k, v, key)

    def dual(v: Tensor) -> None:
        with forward_ad.dual_level():
            attend(forward_ad.make_dual(v, v))  # type: ignore[no-untyped-call]

    calls = {
        "torch.func": (
            lambda v: torch.func.grad(lambda v: attend(v).sum())(v),
            lambda v: torch.func.vjp(attend, v),
            lambda v: torch.func.jvp(attend, (v,), (v,)),
            lambda v: torch.func.jacrev(attend)(v),
            lambda v: torch.func.jacfwd(attend)(v),
            lambda v: torch.func.vmap(attend)(v[None]),
            torch.compile(lambda v: torch.func.jvp(attend, (v,), (v,)), backend="aot_eager"),
        ),
        "forward-mode": (dual,),
    }
    for words, some in calls.items():
        for call in some:
            with pytest.raises(NotImplementedError, match=words):
                call(v)  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("call", ["roll", "undispatch", "fetch"])
def test_rows_that_move_have_no_rule_either(call: str) -> None:
    """torch would give its own operations' tangent of zero."""
    key, rows, move = _key(schedule="keys"), torch.ones(6, 2), getattr(cpattn, call)
    with pytest.raises(NotImplementedError, match=f"cpattn.{call} has no rule for torch.func"):
        torch.func.jvp(lambda x: move(x, key), (rows,), (rows,))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=f"cpattn.{call} has no forward-mode"):
        move(forward_ad.make_dual(rows, rows), key)  # type: ignore[no-untyped-call]


def test_a_dtensor_is_refused() -> None:
    run_on_ranks(2, check_dtensor)


def check_dtensor() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh, (q, k, v) = init_device_mesh("cpu", (2,)), (t.detach() for t in _inputs())
    with pytest.raises(ValueError, match=r"an input is a DTensor: pass x.to_local\(\)"):
        cpattn.attention(distribute_tensor(q, mesh, [Shard(0)]), k, v, _key())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_delta_keeps_its_digits_in_the_place_of_out(dtype: torch.dtype) -> None:
    """As kernels compute it from out, in fp32; also where dout has few elements, or very small ones."""
    generator = torch.Generator().manual_seed(0)
    dout, out = (torch.randn(400, 2, 32, generator=generator).to(dtype) for _ in range(2))
    dout[:50, :, 1:] = 0
    dout[50:100, :, 2:] = 0
    dout[100:110] = 0
    dout[110:200] *= 1e-3
    dout[200:300, :, 1:] *= 2e-4
    delta = (dout.float() * out.float()).sum(-1)
    ours = (dout.float() * _out_of_delta(dout, delta).float()).sum(-1)
    room = torch.full_like(delta, 3e-7)
    room[50:100] = torch.finfo(dtype).eps ** 2  # two elements hold no more
    assert ((ours - delta).abs() <= room * (dout.float() * out.float()).abs().sum(-1) + 1e-9).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_a_saturated_softmax_where_queries_travel(dtype: torch.dtype) -> None:
    """As good as where keys travel: what is left of numbers that all but cancel is the rounding of fp32 sums in both.

    At head dim 16 it is nothing where keys travel: a kernel on this CPU then adds up dout . v and delta in one order.
    """
    run_on_ranks(4, check_saturated, dtype=dtype)


def check_saturated(dtype: torch.dtype) -> None:
    spec, group = AttnMaskSpec.causal(256), torch.distributed.group.WORLD
    for factor in (1, 100, 10000):
        generator = torch.Generator().manual_seed(0)
        whole = [torch.randn(256, heads, 64, generator=generator).to(dtype) for heads in (4, 2, 2, 4)]
        whole[0], whole[1] = whole[0] * factor, whole[1] * factor
        leaves = [t.double().requires_grad_() for t in whole[:3]]
        out, _ = dense_attention(*leaves, spec.to_dense(), scale=0.125)
        truth = torch.autograd.grad(out, leaves, whole[3].double())
        errors = {}
        for schedule in ("keys", "tiles"):
            key = cpattn.make_key(
                spec, num_heads_q=4, num_heads_kv=2, head_dim=64, schedule=schedule, cp_group=group, chunk_size=16
            )
            moved = int(sum(hop.num_received for hop in key.rank_plan.queries))
            assert (moved > 0) <= (schedule == "tiles")
            local = [cpattn.dispatch(t, key).requires_grad_() for t in whole[:3]]
            result = cpattn.attention(*local, key)
            grads = torch.autograd.grad(result, local, cpattn.dispatch(whole[3], key))
            pairs = zip(grads, truth, strict=True)
            errors[schedule] = [float((cpattn.undispatch(g, key).double() - t).norm()) for g, t in pairs]
        for tiles, keys, right in zip(errors["tiles"], errors["keys"], truth, strict=True):
            assert tiles <= 1.5 * keys + torch.finfo(dtype).eps * float(right.norm()), (factor, errors)
