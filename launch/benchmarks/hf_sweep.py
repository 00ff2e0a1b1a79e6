"""Every causal language model of the installed transformers, sharded over ranks, against eager in one process.

    python -m cpattn.launch.benchmarks.hf_sweep                    # all types, 2 gloo ranks on CPU
    python -m cpattn.launch.benchmarks.hf_sweep llama bart         # these
    python -m cpattn.launch.benchmarks.hf_sweep --json out.json    # goes on where out.json ends
    python -m cpattn.launch.benchmarks.hf_sweep --json out.json --only crash wrong    # tries those again

Each type is a tiny random model (`tiny_models`), fp32. Four batches: one text, rows padded right, rows padded left, and
packed documents (what each document is alone). Compared by norm: logits at real tokens, the loss, every parameter's
gradient, and the model outside a shard. One of:

    exact      all within 1e-5; a batch that is not in fp32, where rounding is amplified, within 1e-9 in fp64
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
import time
import traceback
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .tiny_models import is_composite, make_lively, tiny_config

TOLERANCE, IN_DOUBLE, IGNORE = 1e-5, 1e-9, -100
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
    """One process, eager, by the model's own loss; packed documents one by one, at the batch's positions."""
    model.zero_grad(set_to_none=True)
    parts = list(_documents(batch, "position_ids" in inspect.signature(model.forward).parameters))
    shift = 1 if shifts_labels(model) else 0
    counts = [int((part["labels"][:, shift:] != IGNORE).sum()) for part in parts]
    logits, losses = [], []
    for part, count in zip(parts, counts, strict=True):
        out = model(**part, use_cache=False)
        if count:  # the mean over no target is NaN
            losses.append(out.loss * count / sum(counts))
        real = part.get("attention_mask", torch.ones_like(part["input_ids"])).bool()
        logits.append(out.logits.detach()[real])
    loss = torch.stack(losses).sum()
    loss.backward()
    return Step(torch.cat(logits), loss.detach(), _grads(model))


def shifts_labels(model: nn.Module) -> bool:
    """Whether the model's own loss compares a token's logits with the label of the next one, or with its own (Bart).

    Raises:
        ArithmeticError: neither gives the loss.
    """
    ids = batches()["plain"]["input_ids"]
    with torch.no_grad():
        out = model(input_ids=ids, labels=ids, use_cache=False)
    for shift in (1, 0):
        targets = F.pad(ids[:, shift:], (0, shift), value=IGNORE)
        own = F.cross_entropy(out.logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE)
        if torch.allclose(own, out.loss.to(own), rtol=1e-4):
            return bool(shift)
    raise ArithmeticError(f"the model's loss {float(out.loss):.6g} is not the mean cross entropy of its logits")


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
    outcome, model = _load(model_type)
    if model is None:
        return outcome
    wanted: dict[str, Step] = {}
    if dist.get_rank() == 0:
        try:
            eager = _make(model_type, "eager")
            wanted = {name: eager_step(eager, batch) for name, batch in batches().items()}
            if not all(step.logits.isfinite().all() for step in wanted.values()):
                raise ArithmeticError("eager's own logits are not finite")
        except Exception as error:
            outcome = Outcome(model_type, "not built", _brief(error))
    if _first_rank_s(outcome.kind == "not built"):
        return outcome
    try:
        for name in ("right", "left") if wanted else ():
            with torch.no_grad():
                got = model(**{k: v for k, v in batches()[name].items() if k != "labels"}, use_cache=False).logits
            real = batches()[name]["attention_mask"].bool()
            _note(outcome, f"alone, {name}", relative(got[real], wanted[name].logits), "logits")
    except Exception as error:
        _fail(outcome, error)
    if not _first_rank_s(outcome.kind in ("refused", "crash")) and outcome.kind in ("exact", "wrong"):
        _try_sharded(outcome, model, wanted)
    return outcome


def _load(model_type: str) -> tuple[Outcome, nn.Module | None]:
    """The type under cpattn; no model where it is refused, or where transformers cannot build it under eager either."""
    try:
        return Outcome(model_type, "exact"), _make(model_type, "cpattn")
    except Exception as error:
        reason = _brief(error)
        kind = "refused" if _is_ours(error) else "crash"
    try:
        _make(model_type, "eager")
    except Exception:
        kind = "not built"
    return Outcome(model_type, kind, reason), None


def _try_sharded(outcome: Outcome, model: nn.Module, wanted: dict[str, Step]) -> None:
    from cpattn.integrations.transformers import ContextParallel

    try:
        parallel = ContextParallel(model, dist.group.WORLD)
        for name, batch in batches().items():
            step = sharded_step(model, parallel, batch)
            error, what = step.error(wanted[name]) if wanted else (0.0, "")
            if _first_rank_s(not error < TOLERANCE):
                outcome.reason = _joined(outcome.reason, f"{name}: {what} off by {error:.2g} in fp32")
                name, (error, what) = f"{name} in fp64", _double_error(outcome.model_type, model, parallel, batch)
            _note(outcome, name, error, what)
    except Exception as error:
        _fail(outcome, error)


class _Wide(TorchFunctionMode):
    """fp64 where a model asks for fp32 (in softmaxes, norms, routers): else its own rounding stays in a comparison."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def wide(x: Any) -> Any:
            return torch.float64 if x is torch.float32 else x

        func = Tensor.double if func is Tensor.float else func
        return func(*map(wide, args), **{name: wide(value) for name, value in (kwargs or {}).items()})


def _double_error(model_type: str, model: Any, parallel: Any, batch: dict[str, Tensor]) -> tuple[float, str]:
    """A batch again, both sides in fp64 from the same weights; on all ranks, and what rank 0 found on each."""
    eager: Any = _make(model_type, "eager") if dist.get_rank() == 0 else None
    experts = getattr(model.config, "_experts_implementation", None)
    for each in (model, eager):
        if each is not None and experts is not None:
            each.set_experts_implementation("eager")  # the grouped product has no fp64
    found = (0.0, "")
    with _Wide():
        step = sharded_step(model.double(), parallel, batch)
        if eager is not None:
            found = step.error(eager_step(eager.double(), batch))
    model.float()
    if experts is not None:
        model.set_experts_implementation(experts)
    return _first_rank_s(found)  # type: ignore[no-any-return]


def _first_rank_s(value: Any) -> Any:
    """Rank 0's value, on every rank."""
    values: list[Any] = [value]
    dist.broadcast_object_list(values, 0)
    return values[0]


def _fail(outcome: Outcome, error: Exception) -> None:
    if outcome.kind != "wrong":
        outcome.kind = "refused" if _is_ours(error) else "crash"
    outcome.reason = _joined(outcome.reason, _brief(error))


def _make(model_type: str, attention: str) -> nn.Module:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = tiny_config(model_type)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32).eval()
    make_lively(model)
    return model


def _note(outcome: Outcome, name: str, error: float, what: str) -> None:
    outcome.errors[name] = error
    if not error < (IN_DOUBLE if name.endswith("fp64") else TOLERANCE):
        outcome.kind = "wrong"
        outcome.reason = _joined(outcome.reason, f"{name}: {what} off by {error:.2g}")
    elif name.endswith("fp64"):
        outcome.reason = _joined(outcome.reason, f"{name}: by {error:.2g}")


def _joined(*reasons: str) -> str:
    return "; ".join(filter(None, reasons))


def _is_ours(error: BaseException) -> bool:
    """A refusal: a ValueError raised by cpattn's own code, not one that went through it from below."""
    import cpattn

    raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    return isinstance(error, ValueError) and raised_in.is_relative_to(Path(cpattn.__file__).parent)


def _brief(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]


class Ranks:
    """Processes that try one type after another, made anew after one in which they may have parted ways."""

    def __init__(self, world: int) -> None:
        self.world = world
        self._processes: list[Any] = []
        self._pipes: list[Any] = []

    def run(self, model_type: str, timeout: float) -> Outcome:
        """One type; a crash or a hang ends the processes, and the next type gets new ones."""
        start = time.monotonic()
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send(model_type)
        answers = [self._answer(pipe, start + timeout) for pipe in self._pipes]
        outcome = max(answers, key=lambda o: KINDS.index(o.kind))  # a type that rank 0 cannot build runs on no rank
        kinds = {o.kind for o in answers}
        if outcome.kind == "crash" or ("refused" in kinds and len(kinds) > 1):
            self.stop()
        return replace(outcome, model_type=model_type, seconds=round(time.monotonic() - start, 1))

    def stop(self) -> None:
        """Kill the processes."""
        for process in self._processes:
            process.kill()
            process.join()
        self._processes, self._pipes = [], []

    def _answer(self, pipe: Any, deadline: float) -> Outcome:
        if not pipe.poll(max(deadline - time.monotonic(), 0.1)):
            return Outcome("", "crash", "no answer in time")
        try:
            return pipe.recv()  # type: ignore[no-any-return]
        except EOFError:
            return Outcome("", "crash", "the process died")

    def _start(self) -> None:
        # Forked: what takes longest, importing transformers, has been done once.
        context = mp.get_context("fork")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        for rank in range(self.world):
            mine, theirs = context.Pipe()
            process = context.Process(target=_rank_main, args=(rank, self.world, port, theirs), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(mine)


def _rank_main(rank: int, world: int, port: int, pipe: Any) -> None:
    torch.set_num_threads(1)
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=world, timeout=timedelta(seconds=300))
    while True:
        pipe.send(try_type(pipe.recv()))


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
        "left, packed; and logits outside a shard). A batch that is off by more in fp32, where a tiny model amplifies",
        f"rounding, is run again with both sides in fp64 and must be within {IN_DOUBLE:g} there; the table says both.",
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


def sweep(types: list[str], world: int, timeout: float, path: Path | None, done: list[Outcome]) -> list[Outcome]:
    """Each type in turn; prints as it goes, and writes all outcomes so far to the path after each."""
    _import_before_forking()
    outcomes, ranks = {outcome.model_type: outcome for outcome in done}, Ranks(world)
    for model_type in types:
        outcome = outcomes[model_type] = ranks.run(model_type, timeout)
        print(f"{outcome.kind:9} {model_type:24} {outcome.seconds:5.1f} s  {outcome.reason[:300]}", flush=True)
        if path:
            path.write_text(json.dumps([asdict(o) for o in outcomes.values()], indent=1))
    ranks.stop()
    return list(outcomes.values())


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
    parser.add_argument("--timeout", type=float, default=120, help="seconds a type may take")
    parser.add_argument("--json", type=Path, help="outcomes: those that are there are kept, each new one is added")
    parser.add_argument("--output", type=Path, help="write the table here, as a page")
    parser.add_argument("--only", choices=KINDS, nargs="+", help="of the types in --json, those to try again")
    options = parser.parse_args(arguments)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    path = options.json
    done = [Outcome(**o) for o in json.loads(path.read_text())] if path and path.exists() else []
    again = {o.model_type for o in done if o.kind in (options.only or ())}
    known = {o.model_type for o in done} - again
    types = options.types or [t for t in causal_lm_types() if t not in known and (not options.only or t in again)]
    outcomes = sweep(types, options.ranks, options.timeout, path, done)
    if options.output:
        options.output.write_text(report(outcomes, options.ranks))
    counts = Counter(outcome.kind for outcome in outcomes)
    print(", ".join(f"{counts[kind]} {kind}" for kind in KINDS), f"of {len(outcomes)} types")
    return 1 if counts["wrong"] or counts["crash"] else 0


if __name__ == "__main__":
    sys.exit(main())
