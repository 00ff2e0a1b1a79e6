"""Every causal language model of the installed transformers, sharded over ranks, against eager in one process.

    python -m cpattn.launch.benchmarks.hf_sweep                      # all types, 2 gloo ranks on CPU
    python -m cpattn.launch.benchmarks.hf_sweep llama bart --json out.json --verbose

Each type is a tiny random model (`tiny_models`), fp32. Four batches: one text, rows padded right, rows padded left, and
packed documents (what each document is alone). Compared by norm: logits at real tokens, the loss, every parameter's
gradient, and the model outside a shard. One of:

    exact      all within 1e-5, or within 4 times eager's own rounding (its fp32 against its fp64), where that is more
    refused    cpattn raised ValueError by a name of its own, and says why
    wrong      anything else that came back
    crash      an error that is not cpattn's, a dead process or one that hangs
    not built  transformers itself cannot build or run the tiny model
"""

from __future__ import annotations

import argparse
import datetime
import inspect
import json
import os
import platform
import socket
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn import functional as F

from .tiny_models import is_composite, make_lively, tiny_config

TOLERANCE, IGNORE = 1e-5, -100
KINDS = ("exact", "refused", "wrong", "crash", "not built")


@dataclass
class Outcome:
    """What came of one type: a kind of `KINDS`, why, and the largest relative error of each batch."""

    model_type: str
    kind: str
    reason: str = ""
    errors: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0


def causal_lm_types() -> list[str]:
    """Every text type of the installed transformers' causal language models; towers of other modalities left out."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return [name for name in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) if not is_composite(name)]


def batches() -> dict[str, dict[str, Tensor]]:
    """One text, rows padded right and left, three packed documents; labels on every real token but a row's first."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(4, 97, (2, 24), generator=generator)
    right = torch.ones(2, 24, dtype=torch.long)
    right[1, 15:] = 0
    packed = torch.cat([torch.arange(n) for n in (9, 1, 14)])[None]
    found = {
        "plain": {"input_ids": ids[:1]},
        "right": {"input_ids": ids * right, "attention_mask": right},
        "left": {"input_ids": ids * right.flip(1), "attention_mask": right.flip(1)},
        "packed": {"input_ids": ids[:1], "position_ids": packed},
    }
    for batch in found.values():
        real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        starts = batch["position_ids"] == 0 if "position_ids" in batch else real & (real.cumsum(1) == 1)
        batch["labels"] = batch["input_ids"].masked_fill(~real | starts, IGNORE)
    return found


@dataclass
class Step:
    """Logits [N, V] of the real tokens in the batch's order, the loss, and the gradients by name."""

    logits: Tensor
    loss: Tensor
    grads: dict[str, Tensor]

    def error(self, other: Step) -> tuple[float, str]:
        """Largest relative error against another step, and of what.

        A gradient that is zero but for rounding (that of a bias of keys, say) is measured by the largest one.
        """
        pairs = {"logits": (self.logits, other.logits), "loss": (self.loss, other.loss)}
        largest = max((g.norm() for g in other.grads.values()), default=torch.zeros(()))
        errors = {what: relative(a, b) for what, (a, b) in pairs.items()}
        for name, want in other.grads.items():
            got = self.grads.get(name, torch.zeros_like(want))
            size = want.norm() if want.norm() > 1e-5 * largest else largest
            errors[f"gradient of {name}"] = float((got - want).norm() / size.clamp_min(1e-30))
        worst = max(errors, key=lambda what: errors[what])
        return errors[worst], worst


def relative(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm().clamp_min(1e-30)) if bool(got.isfinite().all()) else float("inf")


def eager_step(model: nn.Module, batch: dict[str, Tensor]) -> Step:
    """One process, eager; packed documents one by one, at the positions that the batch has for them."""
    model.zero_grad(set_to_none=True)
    parts = list(_documents(batch, "position_ids" in inspect.signature(model.forward).parameters))
    count = sum(int((part["labels"][:, 1:] != IGNORE).sum()) for part in parts)
    logits, losses = [], []
    for part in parts:
        out = model(**{k: v for k, v in part.items() if k != "labels"}, use_cache=False).logits
        targets = F.pad(part["labels"][:, 1:], (0, 1), value=IGNORE)
        losses.append(F.cross_entropy(out.flatten(0, 1), targets.flatten(), reduction="sum", ignore_index=IGNORE))
        real = part.get("attention_mask", torch.ones_like(part["input_ids"])).bool()
        logits.append(out.detach()[real])
    loss = torch.stack(losses).sum() / count
    loss.backward()
    return Step(torch.cat(logits), loss.detach(), _grads(model))


def _documents(batch: dict[str, Tensor], takes_positions: bool) -> Iterable[dict[str, Tensor]]:
    positions = batch.get("position_ids")
    if positions is None:
        yield batch
        return
    starts = (positions[0] == 0).nonzero().flatten().tolist()
    names = ["input_ids", "labels", *(["position_ids"] if takes_positions else [])]
    for a, b in zip(starts, [*starts[1:], positions.shape[1]], strict=True):
        yield {name: batch[name][:, a:b] for name in names}


def sharded_step(model: nn.Module, parallel: Any, batch: dict[str, Tensor]) -> Step:
    """All ranks; the gathered figures on each."""
    model.zero_grad(set_to_none=True)
    out = parallel(batch)
    out.loss.backward()
    parallel.reduce_gradients()
    real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    return Step(out.shard.gather(out.logits.detach())[real], out.loss.detach(), _grads(model))


def _grads(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def try_type(model_type: str) -> Outcome:
    """Every batch of one type; on all ranks of the default group. Rank 0 has the references and compares."""
    outcome, wanted = Outcome(model_type, "exact"), {}
    if dist.get_rank() == 0:
        try:
            eager = _make(model_type, "eager")
            wanted = {name: eager_step(eager, batch) for name, batch in batches().items()}
            if not all(step.logits.isfinite().all() for step in wanted.values()):
                raise ArithmeticError("eager's own logits are not finite")
        except Exception as error:
            outcome = Outcome(model_type, "not built", _brief(error))
    if _first_rank_has(outcome.kind == "not built"):
        return outcome
    try:
        model = _make(model_type, "cpattn")
        for name in ("right", "left") if wanted else ():
            with torch.no_grad():
                got = model(**{k: v for k, v in batches()[name].items() if k != "labels"}, use_cache=False).logits
            real = batches()[name]["attention_mask"].bool()
            _note(outcome, f"alone, {name}", relative(got[real], wanted[name].logits), "logits")
    except Exception as error:
        _fail(outcome, error)
    if not _first_rank_has(outcome.kind in ("refused", "crash")) and outcome.kind in ("exact", "wrong"):
        _try_sharded(outcome, model, wanted)
    return outcome


def _try_sharded(outcome: Outcome, model: nn.Module, wanted: dict[str, Step]) -> None:
    from cpattn.integrations.transformers import ContextParallel

    try:
        parallel = ContextParallel(model, dist.group.WORLD)
        for name, batch in batches().items():
            step = sharded_step(model, parallel, batch)
            if wanted:
                error, what = step.error(wanted[name])
                limit = TOLERANCE if error < TOLERANCE else 4 * _rounding(outcome.model_type, batch, wanted[name])
                _note(outcome, name, error, what, limit)
    except Exception as error:
        _fail(outcome, error)


def _first_rank_has(value: bool) -> bool:
    """Rank 0's value, on every rank."""
    values: list[Any] = [value]
    dist.broadcast_object_list(values, 0)
    return bool(values[0])


def _fail(outcome: Outcome, error: Exception) -> None:
    if outcome.kind != "wrong":
        outcome.kind = "refused" if _is_ours(error) else "crash"
    outcome.reason = "; ".join(filter(None, [outcome.reason, _brief(error)]))


def _make(model_type: str, attention: str) -> nn.Module:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = tiny_config(model_type)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32).eval()
    make_lively(model)
    return model


def _rounding(model_type: str, batch: dict[str, Tensor], want: Step) -> float:
    """Eager's own error in fp32: some tiny random models amplify rounding (gradients through loops of layers)."""
    precise = eager_step(_make(model_type, "eager").double(), batch)
    return max(TOLERANCE / 4, want.error(precise)[0])


def _note(outcome: Outcome, name: str, error: float, what: str, limit: float = TOLERANCE) -> None:
    outcome.errors[name] = error
    if not error < limit:
        outcome.kind = "wrong"
        outcome.reason = "; ".join(filter(None, [outcome.reason, f"{name}: {what} off by {error:.2g}"]))


def _is_ours(error: BaseException) -> bool:
    """A refusal: a ValueError raised by cpattn's own code, not one that went through it from below."""
    import cpattn

    raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    return isinstance(error, ValueError) and raised_in.is_relative_to(Path(cpattn.__file__).parent)


def _brief(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]


def _rank_main(rank: int, model_type: str, world: int, port: int, path: str) -> None:
    torch.set_num_threads(1)
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=world, timeout=timedelta(seconds=300))
    outcome = try_type(model_type)
    outcomes: list[Any] = [None] * world
    dist.all_gather_object(outcomes, outcome)
    if rank == 0:
        worst = max(outcomes, key=lambda o: KINDS.index(o.kind) if o.kind != "not built" else -1)
        Path(path).write_text(json.dumps(asdict(worst)))
    dist.destroy_process_group()


def run_type(model_type: str, world: int, timeout: float, folder: Path) -> Outcome:
    """A type in processes of its own, so that its crash or hang is its own."""
    start, path = time.monotonic(), folder / f"{model_type}.json"
    path.unlink(missing_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # Forked: what takes longest, importing transformers, has been done once.
    context = mp.start_processes(
        _rank_main, (model_type, world, port, str(path)), nprocs=world, join=False, start_method="fork"
    )
    outcome = Outcome(model_type, "crash", f"no answer within {timeout:g} s")
    try:
        while time.monotonic() - start < timeout:
            if context.join(timeout=1):
                break
    except Exception as error:
        outcome.reason = _brief(error)
    for process in context.processes:
        process.kill()
    if path.exists():
        outcome = Outcome(**json.loads(path.read_text()))
    outcome.seconds = round(time.monotonic() - start, 1)
    return outcome


def report(outcomes: list[Outcome], world: int) -> str:
    """The outcomes as a page: counts, then a row for each type, what is not exact first."""
    import transformers

    counts = Counter(outcome.kind for outcome in outcomes)
    head = [
        f"# Causal language models of transformers at cp {world}, against eager ({datetime.date.today()})",
        "",
        f"Command: `python -m cpattn.launch.benchmarks.hf_sweep --ranks {world}`. transformers "
        f"{transformers.__version__}, torch {torch.__version__}, {platform.machine()}, gloo, fp32, tiny random models;",
        f"exact: every relative error below {TOLERANCE:g} (logits, loss, all gradients; one text, padded right, padded",
        "left, packed; and logits outside a shard).",
        "",
        "| " + " | ".join(f"{kind}" for kind in KINDS) + " | all |",
        "|" + "---|" * (len(KINDS) + 1),
        "| " + " | ".join(str(counts[kind]) for kind in KINDS) + f" | {len(outcomes)} |",
        "",
        "| type | outcome | largest error | why |",
        "|---|---|---|---|",
    ]
    order = ["wrong", "crash", "not built", "refused", "exact"]
    rows = sorted(outcomes, key=lambda o: (order.index(o.kind), o.model_type))
    for o in rows:
        worst = f"{max(o.errors.values()):.1e}" if o.errors else ""
        head.append(f"| {o.model_type} | {o.kind} | {worst} | {o.reason.replace('|', '/')} |")
    return "\n".join(head) + "\n"


def sweep(types: list[str], world: int, timeout: float) -> list[Outcome]:
    """Each type in turn; prints as it goes."""
    _import_before_forking()
    outcomes = []
    with tempfile.TemporaryDirectory() as folder:
        for model_type in types:
            outcome = run_type(model_type, world, timeout, Path(folder))
            print(f"{outcome.kind:9} {model_type:24} {outcome.seconds:5.1f} s  {outcome.reason[:300]}", flush=True)
            outcomes.append(outcome)
    return outcomes


def _import_before_forking() -> None:
    """Imports take longer than a type. No backward here: its threads would not survive the fork."""
    from transformers import AutoModelForCausalLM

    import cpattn.integrations.transformers  # noqa: F401

    with torch.no_grad():
        AutoModelForCausalLM.from_config(tiny_config("llama"))(input_ids=torch.arange(4, 8)[None])


def main(arguments: list[str] | None = None) -> int:
    """Exit status 1 where a type is wrong or crashes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", help="model types; none: all")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=240, help="seconds a type may take")
    parser.add_argument("--json", type=Path, help="write the outcomes here")
    parser.add_argument("--output", type=Path, help="write the table here, as a page")
    options = parser.parse_args(arguments)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    outcomes = sweep(options.types or causal_lm_types(), options.ranks, options.timeout)
    if options.json:
        options.json.write_text(json.dumps([asdict(o) for o in outcomes], indent=1))
    if options.output:
        options.output.write_text(report(outcomes, options.ranks))
    counts = Counter(outcome.kind for outcome in outcomes)
    print(", ".join(f"{counts[kind]} {kind}" for kind in KINDS), f"of {len(outcomes)} types")
    return 1 if counts["wrong"] or counts["crash"] else 0


if __name__ == "__main__":
    sys.exit(main())
