"""`cpattn check`: does attention compute what it should on this machine, with this group and mask?

    cpattn check --seqlen 8K                                                                          # one rank
    torchrun --nproc-per-node 4 -m cpattn.launch.cli check --mask window --window 1024 --seqlen 1M    # several
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from .bench_command import Dtypes
from .calibrate import launched_ranks
from .options import (
    TORCH_NAMES,
    BlockOption,
    FileOption,
    HeadDimOption,
    HeadsOption,
    LayoutOption,
    Layouts,
    LengthsOption,
    MaskName,
    MaskOption,
    ScheduleOption,
    Schedules,
    SeqlenOption,
    WindowOption,
    heads_of_option,
    refused,
    spec_of_options,
)

if TYPE_CHECKING:
    import torch

    from cpattn import AttnKey, Verification


def check_command(
    mask: MaskOption = MaskName.causal,
    seqlen: SeqlenOption = "",
    lengths: LengthsOption = "",
    file: FileOption = None,
    window: WindowOption = None,
    block: BlockOption = None,
    heads: HeadsOption = "4:2",
    head_dim: HeadDimOption = 64,
    dtype: Annotated[Dtypes, typer.Option(help="Of q, k and v.")] = Dtypes.bf16,
    chunk_size: Annotated[int, typer.Option(help="Tokens by which ranks may differ.")] = 512,
    layout: LayoutOption = Layouts.balanced,
    schedule: ScheduleOption = Schedules.auto,
    head_degree: Annotated[int, typer.Option(help="Ranks that share rows, each with some of the heads.")] = 1,
    wire: Annotated[str | None, typer.Option(help="8-bit rows on the wire: e4m3 or e5m2.")] = None,
    backends: Annotated[str, typer.Option(help="Local kernels, comma-separated, or all.")] = "auto",
    samples: Annotated[int, typer.Option(help="Query rows that are compared with dense attention.", min=1)] = 16,
    seed: Annotated[int, typer.Option(help="Of what is drawn.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Check attention against dense rows, for leaks and for repeatability; exit code 1 if a check fails."""
    with launched_ranks() as (device, group):
        try:
            from cpattn import make_key

            spec = spec_of_options(mask, seqlen, lengths, file, window, block)
            shape = heads_of_option(heads, head_dim)
            key = make_key(
                spec,
                num_heads_q=shape.num_q,
                num_heads_kv=shape.num_kv,
                head_dim=shape.head_dim,
                cp_group=group,
                chunk_size=chunk_size,
                layout=layout.value,
                schedule=schedule.value,
                head_degree=head_degree,
                wire=wire,
            )
            named = None if backends == "auto" else "all" if backends == "all" else backends.split(",")
            report = _check(key, TORCH_NAMES[dtype.value], device, named, samples, seed)
        except ValueError as error:
            raise refused(error) from None
        if key.cp_rank == 0:
            print(report.to_json() if as_json else report)
    if not report.ok:
        raise typer.Exit(1)


def _check(
    key: AttnKey, dtype: str, device: torch.device, backends: list[str] | str | None, samples: int, seed: int
) -> Verification:
    """On random rows, each rank's its own."""
    import torch

    import cpattn

    random = torch.Generator().manual_seed(seed * 1_000_003 + key.cp_rank)

    def rows(count: int, num_heads: int, head_dim: int) -> torch.Tensor:
        return torch.randn(count, num_heads, head_dim, generator=random).to(getattr(torch, dtype)).to(device)

    q = rows(key.num_tokens, key.num_heads_q, key.head_dim)
    k = rows(key.num_keys, key.num_heads_kv, key.head_dim)
    v = rows(key.num_keys, key.num_heads_kv, key.head_dim_v)
    return cpattn.verify(key, q, k, v, backends=backends, num_samples=samples, seed=seed)  # type: ignore[arg-type]
