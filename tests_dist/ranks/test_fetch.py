"""Runtime layer: rows fetched, expanded where they are used, and attended over locally, as in MLA."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import cpattn
from cpattn import AttnMaskSpec
from tests_dist.support.harness import run_on_ranks
from tests_dist.support.oracle import dense_attention

LATENT, HEADS, DIM, DIM_V = 6, 4, 8, 5
MASKS = {
    "causal": AttnMaskSpec.causal(53),
    "documents": AttnMaskSpec.varlen([1, 20, 0, 33, 9]),
    "window": AttnMaskSpec.sliding_window(64, 9),
    "sees nothing": AttnMaskSpec([[4, 30]], [[0, 40]], ["full"], 48),
}


def make_rows(tokens: int) -> dict[str, Tensor]:
    """Latents and queries of all tokens, and what expands a latent into keys and values."""
    generator = torch.Generator().manual_seed(3)
    shapes = {"latent": (tokens, LATENT), "q": (tokens, HEADS, DIM), "expand": (LATENT, HEADS * (DIM + DIM_V))}
    shapes["dout"] = (tokens, HEADS, DIM_V)
    return {n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in shapes.items()}


def expanded(latent: Tensor, expand: Tensor) -> tuple[Tensor, Tensor]:
    return (latent @ expand).unflatten(1, (HEADS, DIM + DIM_V)).split([DIM, DIM_V], dim=-1)  # type: ignore[return-value]


def dense(spec: AttnMaskSpec) -> dict[str, Tensor]:
    rows = make_rows(spec.total_seqlen)
    leaves = {n: rows[n].requires_grad_() for n in ("latent", "q", "expand")}
    out, _ = dense_attention(leaves["q"], *expanded(leaves["latent"], leaves["expand"]), spec.to_dense(), scale=0.3)
    grads = torch.autograd.grad(out, list(leaves.values()), rows["dout"])
    return {"out": out.detach(), **dict(zip(leaves, grads, strict=True))}


def fetched(spec: AttnMaskSpec, options: dict[str, Any]) -> dict[str, Tensor]:
    group = dist.group.WORLD if dist.get_world_size() > 1 else None
    heads = {"num_heads_q": HEADS, "num_heads_kv": HEADS, "head_dim": DIM, "head_dim_v": DIM_V}
    key = cpattn.make_key(
        spec, cp_group=group, **heads, latent_dim=LATENT, schedule="keys", chunk_size=4, **options
    )
    rows = make_rows(spec.total_seqlen)
    latent, q = (cpattn.dispatch(rows[n], key).requires_grad_() for n in ("latent", "q"))
    expand = rows["expand"].requires_grad_()
    here = cpattn.fetch(latent, key)
    assert torch.equal(here[: key.num_keys], latent)
    out = cpattn.local_attention(q, *expanded(here, expand), key, softmax_scale=0.3)
    grads = torch.autograd.grad(out, (latent, q, expand), cpattn.dispatch(rows["dout"], key))
    share = grads[2].contiguous()
    dist.all_reduce(share)
    whole = [cpattn.undispatch(x.detach(), key) for x in (out, *grads[:2])]
    return {"out": whole[0], "latent": whole[1], "q": whole[2], "expand": share}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(
    ("cp_size", "options"),
    [(1, {}), (3, {"layout": "zigzag", "num_stages": 3}), (4, {}), (4, {"ranks_per_node": 2, "num_stages": 2})],
)
def test_latents_travel_and_are_expanded_where_they_are_used(cp_size: int, options: dict[str, Any], mask: str) -> None:
    truth = dense(MASKS[mask])
    for got in run_on_ranks(cp_size, fetched, MASKS[mask], options):
        for name, exact in truth.items():
            torch.testing.assert_close(got[name], exact, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


def describe_with(latent_dim: int | None) -> str:
    key = cpattn.make_key(
        AttnMaskSpec.causal(4096), cp_group=dist.group.WORLD, num_heads_q=128, num_heads_kv=128, head_dim=192,
        head_dim_v=128, latent_dim=latent_dim, schedule="keys",
    )  # fmt: skip
    return key.describe(torch.bfloat16)


def test_the_plan_counts_what_travels() -> None:
    """DeepSeek-V3: 512 + 64 numbers in the place of 128 heads of 192 and 128."""
    (plain, *_), (latent, *_) = (run_on_ranks(2, describe_with, dim) for dim in (None, 576))
    received = [
        int(line.split("forward: ")[1].split()[0].replace(",", ""))
        for text in (plain, latent)
        for line in text.splitlines()
        if line.startswith("keys and values received")
    ]
    assert received[0] * 576 == received[1] * 128 * 320


def refusals() -> list[str]:
    heads = {"num_heads_q": 4, "num_heads_kv": 4, "head_dim": 8, "cp_group": dist.group.WORLD}
    spec = AttnMaskSpec.causal(64)
    said = []
    for options, rows in (({"schedule": "tiles"}, None), ({"head_degree": 2}, None), ({}, 5)):
        key = cpattn.make_key(spec, **heads, **options)
        try:
            cpattn.fetch(torch.zeros(key.num_keys if rows is None else rows, 3), key)
        except ValueError as error:
            said.append(str(error))
    try:
        cpattn.make_key(spec, **heads, latent_dim=8, wire="e4m3")
    except ValueError as error:
        said.append(str(error))
    return said


def test_what_cannot_be_fetched_is_refused_on_all_ranks() -> None:
    for said in run_on_ranks(4, refusals):
        tiles, heads, rows, wire = said
        assert "queries travel" in tiles
        assert "head_degree 2" in heads
        assert "rows has shape (5, 3)" in rows
        assert "latents travel as they are" in wire
