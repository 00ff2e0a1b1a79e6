"""`cpattn check`: does attention compute what it should on this machine, with this group and mask?

    cpattn check --seqlen 8K                                                # one rank
    cpattn check --mask window --window 1024 --seqlen 1M --ranks 4          # four
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from .options import (
    BackendOption,
    Dtypes,
    JsonOption,
    LayerOptions,
    MaskOptions,
    RanksOption,
    RunHeadOptions,
    takes_options,
)
from .session import answering, launched_ranks, num_ranks, start_ranks, telling

if TYPE_CHECKING:
    import torch

    from cpattn import AttnKey, Verification


@takes_options
def check_command(
    mask: MaskOptions,
    ranks: RanksOption = None,
    *,
    heads: RunHeadOptions,
    layer: LayerOptions,
    backend: BackendOption = "auto",
    samples: Annotated[int, typer.Option(help="Query rows that are compared with dense attention.", min=1)] = 16,
    seed: Annotated[int, typer.Option(help="Of what is drawn.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Check attention against dense rows, for leaks and for repeatability; exit code 1 if a check fails.

    --backend takes several, comma-separated, or all: each is checked.
    """
    with answering():
        spec, shape = mask.spec(), heads.read()
        layer.require(shape, num_ranks(ranks))
        if start_ranks(ranks):
            return
    with answering(), launched_ranks() as (device, group), telling("checking", quiet=as_json):
        key = layer.key(spec, shape, group)
        named = None if backend == "auto" else "all" if backend == "all" else backend.split(",")
        report = _check(key, heads.dtype, device, named, samples, seed)
    if key.cp_rank == 0:
        print(report.to_json() if as_json else report)
    if not report.ok:
        raise typer.Exit(1)


def _check(
    key: AttnKey, dtype: Dtypes, device: torch.device, backends: list[str] | str | None, samples: int, seed: int
) -> Verification:
    """On random rows, each rank's its own."""
    import torch

    import cpattn

    random = torch.Generator().manual_seed(seed * 1_000_003 + key.cp_rank)

    def rows(count: int, num_heads: int, head_dim: int) -> torch.Tensor:
        return torch.randn(count, num_heads, head_dim, generator=random).to(getattr(torch, dtype.torch_name)).to(device)

    q = rows(key.num_tokens, key.num_heads_q, key.head_dim)
    k = rows(key.num_keys, key.num_heads_kv, key.head_dim)
    v = rows(key.num_keys, key.num_heads_kv, key.head_dim_v)
    return cpattn.verify(key, q, k, v, backends=backends, num_samples=samples, seed=seed)  # type: ignore[arg-type]
