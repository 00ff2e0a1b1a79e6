"""Rows in 8-bit floats on the wire: error of each mask beside bf16's own, bytes, and the loss of a training run.

    python -m cpattn.launch.benchmarks.fp8_wire --ranks 4 [--steps 60] [--output FILE.md]

Errors are norms of the difference to fp64 over the norm of the fp64 result, over all ranks. Bytes are counted where the
all-to-all is called. Training is the demo's model and data, attention in bf16, under "zigzag", which splits every long
document over all ranks and so sends the most rows through the wire.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

import cpattn
from cpattn import AttnMaskSpec
from cpattn.collectives import Fp8Rows
from cpattn.launch.demo.data import batches
from cpattn.launch.demo.model import Transformer, loss_sum
from cpattn.launch.demo.recipe import Recipe, make_optimizer, optimizer_step
from cpattn.launch.torchrun import run_on_ranks

TOKENS, HEADS, HEAD_DIM = 1536, (4, 2), 64
MASKS = {
    "causal": AttnMaskSpec.causal(TOKENS),
    "packed documents": AttnMaskSpec.varlen([700, 90, 400, 346]),
    "full": AttnMaskSpec.varlen([TOKENS], causal=False),
    "sliding window 256": AttnMaskSpec.sliding_window(TOKENS, 256),
    "block causal 128": AttnMaskSpec.block_causal(TOKENS, 128),
    "prefix LM": AttnMaskSpec.prefix_lm([300, 100], [900, 636]),
}
WIRES = (None, "e4m3", "e5m2")
NAMES = ("out", "dq", "dk", "dv")


def dense(spec: AttnMaskSpec, q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> tuple[Tensor, ...]:
    """out, dq, dk, dv in fp64 by the definition."""
    leaves = [t.double().requires_grad_() for t in (q, k, v)]
    groups = q.shape[1] // k.shape[1]
    keys, values = (t.repeat_interleave(groups, 1) for t in leaves[1:])
    scores = torch.einsum("qnd,knd->nqk", leaves[0], keys) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~torch.from_numpy(spec.to_dense()), -torch.inf)
    out = torch.einsum("nqk,kne->qne", torch.softmax(scores, -1), values)
    return (out.detach(), *torch.autograd.grad(out, leaves, dout.double()))


class CountedBytes:
    """Bytes that all-to-alls bring to this rank while it is entered."""

    def __enter__(self) -> CountedBytes:
        self.total, self._original = 0, dist.all_to_all_single

        def counted(output: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.total += output.numel() * output.element_size()
            return self._original(output, *args, **kwargs)

        dist.all_to_all_single = counted
        return self

    def __exit__(self, *error: Any) -> None:
        dist.all_to_all_single = self._original


def mask_errors(name: str, schedule: Literal["keys", "tiles"]) -> dict[str, Any]:
    """Errors and forward bytes of one mask, for every wire format."""
    spec = MASKS[name]
    g = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(TOKENS, h, HEAD_DIM, generator=g).bfloat16() for h in (HEADS[0], HEADS[1], HEADS[1], HEADS[0])
    ]
    truth = dense(spec, *inputs)
    result: dict[str, Any] = {}
    for wire in WIRES:
        key = cpattn.make_key(
            spec, num_heads_q=HEADS[0], num_heads_kv=HEADS[1], head_dim=HEAD_DIM, cp_group=dist.group.WORLD,
            chunk_size=64, layout="balanced" if schedule == "tiles" else "zigzag", schedule=schedule, wire=wire,
        )  # fmt: skip
        q, k, v, dout = (cpattn.dispatch(t, key) for t in inputs)
        leaves = [t.requires_grad_() for t in (q, k, v)]
        with CountedBytes() as counted:
            out = cpattn.attention(leaves[0], leaves[1], leaves[2], key)
        assert isinstance(out, Tensor)
        parts = (out.detach(), *torch.autograd.grad(out, leaves, dout))
        wholes = [cpattn.undispatch(t, key) for t in parts]
        errors = [((m.double() - t).norm() / t.norm()).item() for m, t in zip(wholes, truth, strict=True)]
        total = torch.tensor(counted.total)
        dist.all_reduce(total)
        result[str(wire)] = {"errors": errors, "bytes": total.item()}
    return result


def train(dtype: torch.dtype, wire: str | None, steps: int, learning_rate: float) -> dict[str, Any]:
    """Losses of the demo's training with attention in `dtype`."""
    recipe = Recipe(num_tokens=2048, num_steps=steps, learning_rate=learning_rate)
    model, group = Transformer(recipe.model, seed=recipe.seed), dist.group.WORLD
    optimizer, stream, losses, moved = make_optimizer(model), batches(None, num_tokens=2048, seed=0), [], 0
    config = recipe.model
    for step in range(steps):
        batch = next(stream)
        key = cpattn.make_key(
            AttnMaskSpec.varlen(batch.seqlens), num_heads_q=config.num_heads_q, num_heads_kv=config.num_heads_kv,
            head_dim=config.head_dim, cp_group=group, layout="zigzag", chunk_size=64, wire=wire,
        )  # fmt: skip

        def attend(q: Tensor, k: Tensor, v: Tensor, key: cpattn.AttnKey = key) -> Tensor:
            return cpattn.attention(q.to(dtype), k.to(dtype), v.to(dtype), key).float()  # type: ignore[union-attr]

        tokens = cpattn.dispatch(batch.tokens, key)
        labels = cpattn.roll(tokens, key, shift=-1)
        loss = loss_sum(model(tokens, cpattn.position_ids(key), attend), labels) / batch.num_labels
        loss.backward()
        flat = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        dist.all_reduce(flat)
        for p, part in zip(model.parameters(), flat.split([p.numel() for p in model.parameters()]), strict=True):
            assert p.grad is not None
            p.grad.copy_(part.view_as(p))
        optimizer_step(optimizer, recipe.learning_rate_at(step))
        total = loss.detach().double()
        dist.all_reduce(total)
        losses.append(total.item())
        moved += int(key.plan.kv_routes.rows_received(key.cp_size).sum())
    return {"losses": losses, "rows": moved / steps}


def codec_seconds() -> dict[str, float]:
    """Median CPU time to encode and to decode 16 MiB of bf16."""
    x, codec = torch.randn(8192, 8, 128).bfloat16(), Fp8Rows()
    times: dict[str, list[float]] = {"encode": [], "decode": []}
    for _ in range(5):
        began = time.process_time()
        travelling = codec.encode((x,))
        middle = time.process_time()
        codec.decode(travelling, torch.bfloat16)
        times["encode"].append(middle - began)
        times["decode"].append(time.process_time() - middle)
    return {name: sorted(values)[2] for name, values in times.items()}


def worker(path: Path, steps: int, learning_rate: float) -> None:
    dist.init_process_group("gloo")
    record: dict[str, Any] = {"masks": {}, "train": {}}
    for name in MASKS:
        record["masks"][f"{name}, keys"] = mask_errors(name, "keys")
        record["masks"][f"{name}, tiles"] = mask_errors(name, "tiles")
    for name, dtype, wire in (
        ("fp32", torch.float32, None),
        ("bf16", torch.bfloat16, None),
        ("e4m3", torch.bfloat16, "e4m3"),
    ):
        record["train"][name] = train(dtype, wire, steps, learning_rate)
    if dist.get_rank() == 0:
        record["codec"] = codec_seconds()
        path.write_text(json.dumps(record))
    dist.barrier()
    dist.destroy_process_group()


def report(options: argparse.Namespace, record: dict[str, Any]) -> str:
    """The figures as Markdown."""
    load = "/".join(f"{x:.1f}" for x in os.getloadavg())
    lines = [
        f"""# 8-bit floats on the wire

`python -m cpattn.launch.benchmarks.fp8_wire --ranks {options.ranks} --steps {options.steps}`,
{datetime.date.today()}, torch {torch.__version__}, {platform.machine()}, {os.cpu_count()} cores, gloo, load {load}.
{TOKENS} tokens, {HEADS[0]} query and {HEADS[1]} key heads of {HEAD_DIM}, bf16, normal random inputs. Error: norm of the
difference to fp64 over the norm of the fp64 result. In rows of `keys` only keys and values travel (layout zigzag); in
rows of `tiles` queries and the gradient of out may travel too (layout balanced), and partial results go home in bf16.

| mask, schedule | wire | {" | ".join(NAMES)} | forward bytes, all ranks |
|---|---|{"---|" * len(NAMES)}---|"""
    ]
    for name, by_wire in record["masks"].items():
        base = by_wire["None"]["bytes"]
        for wire, figures in by_wire.items():
            errors = " | ".join(f"{100 * e:.2f} %" for e in figures["errors"])
            share = f" ({figures['bytes'] / base:.3f})" if wire != "None" and base else ""
            label = "bf16" if wire == "None" else wire
            lines.append(f"| {name} | {label} | {errors} | {figures['bytes']:,}{share} |")
    exact, plain, coded = (record["train"][name]["losses"] for name in ("fp32", "bf16", "e4m3"))
    differences = [100 * abs(a / b - 1) for a, b in zip(coded, plain, strict=True)]
    of_bf16 = max(100 * abs(a / b - 1) for a, b in zip(plain, exact, strict=True))
    means = 100 * abs(sum(coded[-10:]) / sum(plain[-10:]) - 1)
    rows = record["train"]["e4m3"]["rows"]
    encode, decode = (1e3 * record["codec"][name] for name in ("encode", "decode"))
    lines.append(
        f"""
Training, {len(plain)} steps of 2048 tokens, learning rate {options.learning_rate}, {rows:,.0f} rows of keys and values
through the wire per layer and step: loss {plain[0]:.4f} to {plain[-1]:.4f} in bf16, {coded[0]:.4f} to {coded[-1]:.4f}
with the e4m3 wire. Largest relative difference of any step {max(differences):.3f} %, of the last
{differences[-1]:.3f} %, of the means of the last ten {means:.3f} %. bf16 itself differs from fp32 by
{of_bf16:.3f} % at most.

CPU time of the codec on one core: 16 MiB of bf16 encoded in {encode:.0f} ms and decoded in {decode:.0f} ms, to
save 8 MiB. On CPU that pays on links below about {8 * 1.048576 / (encode + decode):.2f} GB/s; gloo's loopback is
faster, so here the codec saves bytes and costs time. On a GPU it has not been measured.
"""
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options.worker, options.steps, options.learning_rate)
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "record.json"
        arguments = ["--worker", str(path), "--steps", str(options.steps)]
        arguments += ["--learning-rate", str(options.learning_rate)]
        run_on_ranks("cpattn.launch.benchmarks.fp8_wire", arguments, num_ranks=options.ranks)
        record = json.loads(path.read_text())
    text = report(options, record)
    print(text)
    if options.output:
        options.output.write_text(text)
    losses = [record["train"][name]["losses"] for name in ("e4m3", "bf16")]
    if any(abs(a / b - 1) > 0.005 for a, b in zip(*losses, strict=True)):
        sys.exit("the loss differs by more than 0.5 %")


if __name__ == "__main__":
    main()
