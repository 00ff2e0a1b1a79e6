"""What recurrent layers and latents put on the wire: bytes by model and placement, and bytes counted on real ranks.

    python -m cpattn.launch.benchmarks.mixers [--ranks 4] [--out FILE.json]

The first table states the map of one fragment in the models' own sizes, and what the busiest of 8 ranks receives of
them for one sequence and for packed documents, at several lengths. The second counts what one attention layer of
DeepSeek-V3 (128 heads of 192 and 128, latents of 576) hands to the collectives on CPU ranks, with keys and values and
with latents.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

import cpattn
from cpattn.launch.benchmarks.decode import count_bytes
from cpattn.launch.benchmarks.workloads import document_lengths
from cpattn.launch.torchrun import die_with_parent, run_on_ranks
from cpattn.masks.spec import AttnMaskSpec
from cpattn.mixers.traffic import map_bytes
from cpattn.planning.ready import make_plan
from cpattn.solver import FragmentTable, make_routes


class Recurrence(NamedTuple):
    """A recurrent layer in its model's sizes, as their configurations give them."""

    model: str
    layer: str
    num_heads: int
    dim_k: int
    dim_v: int
    delta: bool


MODELS = (
    Recurrence("Qwen3-Next 80B-A3B", "gated delta rule", 32, 128, 128, True),
    Recurrence("Kimi-Linear 48B-A3B", "delta rule, decay by channel", 32, 128, 128, True),
    Recurrence("Bamba 9B", "Mamba-2", 128, 128, 64, False),
    Recurrence("Nemotron-H 8B", "Mamba-2", 128, 128, 64, False),
    Recurrence("Granite 4 H-Small", "Mamba-2", 128, 128, 64, False),
    Recurrence("Falcon-H1 7B", "Mamba-2", 24, 256, 128, False),
    Recurrence("MiniMax-01", "lightning attention", 64, 128, 128, False),
)
LENGTHS, LAYOUTS = (65_536, 262_144, 1_048_576), ("contiguous", "zigzag", "balanced")
_DEEPSEEK: dict[str, Any] = {"num_heads_q": 128, "num_heads_kv": 128, "head_dim": 192, "head_dim_v": 128}


def maps_received(spec: AttnMaskSpec, layout: Any, cp_size: int) -> int:
    """Maps of fragments that the busiest rank receives."""
    plan = make_plan(spec, cp_size=cp_size, num_heads_q=32, num_heads_kv=8, head_dim=128, layout=layout).plan
    assert spec.documents is not None
    ends = torch.tensor([d.end for d in spec.documents]).numpy()
    starts = torch.tensor([d.start for d in spec.documents]).numpy()
    needed, placement, _ = FragmentTable.of(plan.q_placement, starts, ends).maps_needed()
    return int(make_routes(needed, placement).rows_received(cp_size).max())


def stated(cp_size: int = 8) -> dict[str, Any]:
    """Map sizes, and maps on the busiest rank by mask, length and layout."""
    maps = {m.model: map_bytes(m.num_heads, m.dim_k, m.dim_v, delta=m.delta) for m in MODELS}
    masks = {"one sequence": AttnMaskSpec.causal, "documents": lambda n: AttnMaskSpec.varlen(document_lengths(n))}
    busiest = {
        f"{name} {tokens // 1024}K {layout}": maps_received(mask(tokens), layout, cp_size)
        for name, mask in masks.items()
        for tokens in LENGTHS
        for layout in LAYOUTS
    }
    return {"cp_size": cp_size, "map_bytes": maps, "maps_on_busiest_rank": busiest}


def worker(path: Path, tokens: int) -> None:
    """One rank: forward and backward of one layer, both ways, with the bytes that the collectives bring here."""
    die_with_parent()
    dist.init_process_group("gloo")
    group = dist.group.WORLD
    received: Counter[str] = Counter()
    count_bytes(received)
    spec, counted = AttnMaskSpec.causal(tokens), {}
    for name, latent_dim in (("keys and values", None), ("latents", 576)):
        key = cpattn.make_key(spec, cp_group=group, **_DEEPSEEK, schedule="keys", latent_dim=latent_dim)
        torch.manual_seed(dist.get_rank())
        q = torch.randn(key.num_tokens, 128, 192)
        latent = torch.randn(key.num_keys, 576, requires_grad=True)
        expand = torch.randn(576, 128 * 320) / 24
        for turn in range(2):  # ranks compare what they do in the first call
            received.clear()
            if latent_dim is None:
                out: Any = cpattn.attention(q, *_expanded(latent, expand), key)
            else:
                out = cpattn.local_attention(q, *_expanded(cpattn.fetch(latent, key), expand), key)
            out.sum().backward()
            counted[name] = sum(received.values()) if turn else 0
    mine = torch.tensor(list(counted.values()))
    dist.all_reduce(mine)
    if dist.get_rank() == 0:
        path.write_text(json.dumps(dict(zip(counted, mine.tolist(), strict=True))))
    dist.destroy_process_group()


def _expanded(latent: torch.Tensor, expand: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    k, v = (latent @ expand).unflatten(1, (128, 320)).split([192, 128], dim=-1)
    return k, v


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=4, help="CPU ranks on which bytes are counted")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker is not None:
        worker(options.worker, options.tokens)
        return
    result: dict[str, Any] = {"stated": stated()}
    for model in MODELS:
        mebibytes = result["stated"]["map_bytes"][model.model] / 2**20
        print(f"{model.model:22s} {model.layer:30s} {mebibytes:6.2f} MiB a map")
    for what, count in result["stated"]["maps_on_busiest_rank"].items():
        print(f"busiest of {result['stated']['cp_size']} ranks, {what:38s} {count:4d} maps")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bytes.json"
        args = ["--worker", str(path), "--tokens", str(options.tokens)]
        run_on_ranks("cpattn.launch.benchmarks.mixers", args, num_ranks=options.ranks)
        counted = json.loads(path.read_text())
    ratio = counted["keys and values"] / counted["latents"]
    what = f"DeepSeek-V3 layer, {options.tokens} tokens on {options.ranks} ranks, both passes, fp32"
    print(f"{what}: {counted}, {ratio:.1f}x")
    machine = f"{platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}"
    result |= {"counted": {**counted, "ratio": ratio}, "command": " ".join(sys.argv[1:]), "machine": machine}
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
