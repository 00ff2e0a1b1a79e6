"""Does a model depend on where a token lies in the local tensor? Tried before it is trusted, on one rank.

A small batch (a full row, one padded left, one padded right) runs through the whole model in its natural order, with
one row more in its company; and without that row as a shard that a single rank has whole, in a shuffled order: what a
shard of several ranks does to a model, without a collective of ours. Where logits, loss, the gradient of the
embeddings, or the queries, keys and values of any layer differ, the model reads something off the local tensor: its
places, its length, its neighbours, the whole of its tokens. It is then tried with its embeddings over the whole batch
and the cut at its layers; where that differs too, it is refused.

What a few tokens cannot show is looked for by name elsewhere: sparse layers that choose all keys of a short text
(`refuse_indexers`), RoPE that changes with the longest position (`cuts`), Llama 4's temperature (`hf_attention`).
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import traceback
import weakref
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .batch_layout import IGNORE_INDEX, layout_of_batch, shifted_labels
from .hf_attention import observe_attention
from .hf_heads import last_tokens, logits_of
from .hf_model import attends_by_itself, read, takes
from .shard import Cut, Shard

# The object being made; its class stands above this file.
ContextParallel = Any

COLUMNS, PADDING = 12, (0, 4, -5, 0)  # of each row: none, left, right; the last is the company of the others
_NUM_PROJECTIONS = 4
LabelsOf = Literal["next", "own", "unknown"]


class Verdict(NamedTuple):
    """What trying a model showed.

    cut: where its batches are cut: at the inputs or, if results differ there, at the layers.
    labels_of: whether its loss compares a token's logits with the label of the next token or with its own (Bart).
    """

    cut: Cut
    labels_of: LabelsOf


_verdicts: dict[str, Verdict | str] = {}


def try_placement(parallel: ContextParallel) -> Verdict:
    """What is found when the model is tried; remembered.

    Raises:
        ValueError: results depend on the placement under every cut; names the first layer that differs.
    """
    signature, functions = _signature(parallel)
    if signature not in _verdicts:
        _verdicts[signature] = _try_cuts(parallel)
        for function in functions:  # it is told by its identity, which another one may get
            with contextlib.suppress(TypeError):
                weakref.finalize(function, _verdicts.pop, signature, None).atexit = False
    verdict = _verdicts[signature]
    if isinstance(verdict, str):
        raise ValueError(verdict)
    return verdict


def _try_cuts(parallel: ContextParallel) -> Verdict | str:
    """The first cut under which the model does not see the placement, or why there is none."""
    cuts: tuple[Cut, ...] = ("decoder",) if parallel.has_other_modalities else ("inputs", "layers")
    with _quiet(parallel.model) as model:
        batch = _probe_batch(parallel)
        try:
            natural = _observe(parallel, model, batch, None)
        except Exception as error:
            if _is_ours(error):
                return str(error)
            return (
                f"{type(parallel.root).__name__} could not be tried on a small batch of text, where it raised "
                f"{type(error).__name__}: {str(error)[:300]}. Pass check=False to ContextParallel to trust it untried"
            )
        faults = []
        for cut in cuts:
            fault = _fault(parallel, model, batch, natural, cut)
            if fault is None:
                return Verdict(cut, _labels_of(parallel, model, batch))
            faults.append(fault)
    name = type(parallel.root).__name__
    return (
        f"{name} cannot be sharded: a small batch in another order of its tokens gives other results. {faults[0]}. "
        f"Pass check=False to ContextParallel if you know better"
    )


def _fault(parallel: ContextParallel, model: Any, batch: dict[str, Tensor], natural: Seen, cut: Cut) -> str | None:
    trail: list[str] = []
    try:
        shuffled = _observe(parallel, model, batch, cut, trail)
    except Exception as error:
        if _is_ours(error):
            return f"{error}"
        where = f" in {trail[-1]}" if trail else ""
        return (
            f"It fails on a shard{where} with {type(error).__name__} ({' '.join(str(error).split())[:200]}): the mask "
            f"or the shape of the local tensor is used outside the attention interface"
        )
    return natural.difference(shuffled, parallel)


def _is_ours(error: Exception) -> bool:
    raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
    return isinstance(error, (ValueError, RuntimeError)) and "cpattn" in raised_in.replace("\\", "/").split("/")[-4:-1]


# ----------------------------------------------------------------------------------------------------
# The batch, and the model to run on it.


def _probe_batch(parallel: ContextParallel) -> dict[str, Tensor]:
    config = parallel.text_config
    special = _special_ids(parallel.root.config) | _special_ids(config)
    vocab = min(int(_embedding(parallel).num_embeddings), int(read(config, "vocab_size", 1 << 60)))
    usable = np.array([n for n in range(min(vocab, 4096)) if n not in special] or [0])
    ids = usable[np.random.default_rng(7).integers(0, len(usable), (len(PADDING), COLUMNS))]
    mask = np.ones_like(ids)
    for row, padding in enumerate(PADDING):
        mask[row, : max(padding, 0)] = 0
        mask[row, COLUMNS + min(padding, 0) :] = 0
    pad = getattr(config, "pad_token_id", None)
    ids[mask == 0] = pad if isinstance(pad, int) and 0 <= pad < vocab else 0
    device = next(parallel.model.parameters()).device
    return {
        "input_ids": torch.from_numpy(ids).to(device),
        "attention_mask": torch.from_numpy(mask).to(device),
    }


def _embedding(parallel: ContextParallel) -> Any:
    model: Any = parallel.model
    return (model if hasattr(model, "get_input_embeddings") else parallel.root).get_input_embeddings()


def _special_ids(config: Any) -> set[int]:
    """Tokens that stand for something else (padding, images): not for a probe."""
    fields = vars(config).items()
    return {v for name, v in fields if name.endswith(("_token_id", "_token_index")) and isinstance(v, int)}


@contextlib.contextmanager
def _quiet(model: nn.Module) -> Iterator[Any]:
    """The model without dropout, compilation and the wrapper of DDP, whose backward would talk; put back afterwards."""
    modes = {module: module.training for module in model.modules()}
    inner: Any = model
    while isinstance(inner, nn.parallel.DistributedDataParallel) or hasattr(inner, "_orig_mod"):
        inner = inner._orig_mod if hasattr(inner, "_orig_mod") else inner.module
    state = torch.get_rng_state()
    model.eval()
    try:
        with torch.compiler.set_stance("force_eager"), torch.enable_grad():
            yield inner
    finally:
        torch.set_rng_state(state)
        for module, training in modes.items():
            module.training = training


def _signature(parallel: ContextParallel) -> tuple[str, list[Any]]:
    """All that a verdict depends on: the config, dtype and device, and of every module its class, its patches and what
    it was made with; and the functions among it.
    """
    parameter = next(parallel.model.parameters())
    parts: list[Any] = [str(parallel.root.config.to_dict()), parallel.has_other_modalities]
    parts += [parallel.root.config._attn_implementation, parameter.dtype, parameter.device.type]
    functions: dict[int, Any] = {}
    for name, module in parallel.model.named_modules():
        kind = type(module)
        functions |= {id(kind): kind, id(kind.forward): kind.forward}
        parts.append((name, kind.__qualname__, id(kind), id(kind.forward), len(module._forward_pre_hooks)))
        for field, value in vars(module).items():
            if callable(value) and not isinstance(value, nn.Module):
                functions[id(value)] = value
                parts.append((field, id(value)))
            elif isinstance(value, (bool, int, float, str)) and field != "training" and "_cpattn" not in field:
                parts.append((field, value))
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest(), list(functions.values())


# ----------------------------------------------------------------------------------------------------
# What is seen of a run.


class Rows(NamedTuple):
    """A tensor's rows, one for each real token in the order of the batch: random projections, and their norms."""

    projections: Tensor
    norms: Tensor

    def error(self, other: Rows, exact: bool) -> float:
        """The largest relative difference of a token; in low precision that of half of the tokens.

        There a router's choice may flip by rounding, for a few of them; a fault of placement meets most.
        """
        if self.projections.shape != other.projections.shape:
            return float("inf")
        scale = self.norms.clamp_min(1e-3 * self.norms.mean()).clamp_min(1e-12)
        difference = (self.projections - other.projections).norm(dim=-1) / _NUM_PROJECTIONS**0.5
        errors = (difference / scale).nan_to_num(nan=float("inf"))
        return float(errors.max() if exact else errors.median())


class Frame(NamedTuple):
    """Where the real tokens are in tensors of [rows, columns] tokens: at `places`, in the order of the batch."""

    rows: int
    columns: int
    places: Tensor


class Seen:
    """What a run showed: tensors by name, in the order in which they were made."""

    def __init__(self, frames: list[Frame]) -> None:
        self.frames = frames
        self.modules: dict[str, Rows] = {}
        self.attention: dict[str, Rows] = {}
        self.results: dict[str, Rows] = {}
        self.low_precision = False

    def rows_of(self, x: Any) -> Rows | None:
        """The real tokens' rows of a tensor [B, S, ...], [1, S, ...] or [B * S, ...]; None of another shape."""
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim < 2:
            return None
        x = x.detach()
        x = x.to_local() if hasattr(x, "to_local") else x
        for rows, columns, places in self.frames:
            if tuple(x.shape[:2]) in ((rows, columns), (1, columns)):
                return _projected(x.expand(rows, *x.shape[1:]).flatten(0, 1)[places])
            if x.shape[0] == rows * columns:
                return _projected(x[places])
        return None

    def difference(self, other: Seen, parallel: ContextParallel) -> str | None:
        """Where and why the other run differs; None where it does not."""
        exact = not self.low_precision and self.frames[0].places.device.type == "cpu"
        tolerance = 1e-3 if exact else 0.1

        def first(mine: dict[str, Rows], theirs: dict[str, Rows]) -> str | None:
            both = [name for name in mine if name in theirs]
            return next((n for n in both if not mine[n].error(theirs[n], exact) < tolerance), None)

        alone = not self.attention and attends_by_itself(parallel.text_config)
        if len(self.attention) != len(other.attention) and not alone:
            return f"{len(other.attention) // 4} attention layers ran on a shard, {len(self.attention) // 4} without"
        result = first(self.results, other.results)
        seen = first(self.attention, other.attention)
        if result is None and seen is None:
            return None
        where = first(self.modules, other.modules)
        if seen is not None and seen.endswith(" query"):
            keys = seen.replace(" query", " key")
            seen = seen if self.attention[keys].error(other.attention[keys], exact) < tolerance else keys
        kind = "" if where is None else f" ({type(_module(parallel, where)).__name__})"
        return f"First to differ is {where or seen or 'its head'}{kind}: {_cause(parallel, where, seen)}"


def _projected(x: Tensor) -> Rows:
    x = x.flatten(1).float()
    generator = torch.Generator().manual_seed(x.shape[1])
    signs = torch.randint(0, 2, (x.shape[1], _NUM_PROJECTIONS), generator=generator).to(x) * 2 - 1
    return Rows(x @ signs, x.norm(dim=-1))


def _module(parallel: ContextParallel, name: str | None) -> nn.Module | None:
    return None if name is None else parallel.model.get_submodule(name.split("[")[0])


def _cause(parallel: ContextParallel, where: str | None, seen: str | None) -> str:
    """What such a difference usually comes from."""
    module = _module(parallel, where)
    children = [] if module is None else [type(m).__name__ for m in module.modules()]
    if any(word in name.lower() for name in children for word in ("conv", "mamba", "rnn", "lstm", "gru", "recurrent")):
        return "it mixes neighbouring tokens outside attention (a recurrent layer or a convolution)"
    source = "" if module is None else _source(type(module))
    if seen is None:
        return "after the last layer: a head that pools tokens, or a layer that mixes them outside attention"
    if seen.endswith(" query"):
        return "queries change and keys do not: a temperature by place, counted in the local tensor"
    if not takes(parallel.root, "position_ids"):
        return "the model takes no position_ids (positions that are passed are swallowed) and numbers the local tokens"
    if "arange(" in source or "cumsum(" in source or where is None or "embed" in where:
        return "positions are counted locally, from the shape or the mask at hand"
    if seen.endswith(" out"):
        return "the mask, or another order of tokens, is used outside the attention interface"
    return "it depends on places or on the length of the local tensor, or mixes tokens outside attention"


def _source(kind: Any) -> str:
    try:
        return inspect.getsource(kind.forward)
    except (OSError, TypeError, AttributeError):
        return ""


def _observe(
    parallel: ContextParallel, model: Any, batch: dict[str, Tensor], cut: Cut | None, trail: list[str] | None = None
) -> Seen:
    """Run the model and keep what it showed of all rows but the last.

    Plainly, with that row, for a cut of None; else as a shard in a shuffled order, without it.
    """
    real = batch["attention_mask"][:-1].flatten().nonzero().flatten()
    if cut is not None:
        batch = {name: value[:-1] for name, value in batch.items()}
    rows, columns = batch["input_ids"].shape
    whole = Frame(rows, columns, real)
    ends = last_tokens(parallel.root, batch) if parallel.head == "sequence" else None
    if cut is None:
        seen, shard = Seen([whole]), None
    else:
        order = torch.from_numpy(np.random.default_rng(3).permutation(len(real))).to(real.device)
        shard = parallel._shard(batch, None, None, cut, order)
        seen = Seen([Frame(1, len(real), torch.argsort(order)), whole])
    leaves: list[Tensor] = []
    with _watched(parallel, seen, leaves, trail):
        if shard is None:
            logits = logits_of(parallel.root, model(**batch, use_cache=False))
        else:
            logits = parallel._run(model, shard, ends, {})[1]
    _note_results(parallel, seen, logits, leaves, batch, shard)
    return seen


@torch.no_grad()
def _labels_of(parallel: ContextParallel, model: Any, batch: dict[str, Tensor]) -> LabelsOf:
    """By which pairs of logits and labels the mean cross entropy is the model's own loss."""
    if parallel.head != "causal" or not takes(parallel.root, "labels"):
        return "next"
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORE_INDEX)
    try:
        with observe_attention(lambda *seen: None):  # not outside a shard by an oversight
            outputs = model(**batch, labels=labels, use_cache=False)
    except Exception:  # it runs without labels
        return "unknown"
    loss, logits = getattr(outputs, "loss", None), outputs.logits
    if loss is None or hasattr(logits, "to_local"):
        return "next"
    pairs: dict[LabelsOf, Any] = {"next": (logits[:, :-1], labels[:, 1:]), "own": (logits, labels)}
    for name, (rows, targets) in pairs.items():
        mean = F.cross_entropy(rows.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORE_INDEX)
        if torch.allclose(mean, loss.to(mean), rtol=1e-2):
            return name
    return "unknown"


@contextlib.contextmanager
def _watched(parallel: ContextParallel, seen: Seen, leaves: list[Tensor], trail: list[str] | None) -> Iterator[None]:
    hooks = []

    def note(name: str, output: Any) -> None:
        for number, part in enumerate(output if isinstance(output, (tuple, list)) else [output]):
            found = seen.rows_of(part)
            if found is not None:
                seen.modules.setdefault(name if number == 0 else f"{name}[{number}]", found)
        if trail is not None and trail and trail[-1] == name:
            trail.pop()

    for name, module in parallel.model.named_modules():
        if name and not isinstance(module, nn.ModuleList):
            hooks.append(module.register_forward_hook(lambda m, a, o, name=name: note(name, o)))
            if trail is not None:
                hooks.append(module.register_forward_pre_hook(lambda m, a, name=name: trail.append(name)))

    def embedded(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        leaf = output.detach().requires_grad_()
        leaves.append(leaf)
        return leaf.clone()  # some models go on in place

    hooks.append(_embedding(parallel).register_forward_hook(embedded))

    def attended(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, out: Tensor) -> None:
        number = len(seen.attention) // 4
        seen.low_precision |= query.dtype in (torch.float16, torch.bfloat16)
        for what, x in {"query": query, "key": key, "value": value}.items():
            found = seen.rows_of(x.transpose(1, 2))
            seen.attention[f"attention {number} {what}"] = found or Rows(torch.zeros(0, 1), torch.zeros(0))
        seen.attention[f"attention {number} out"] = seen.rows_of(out) or Rows(torch.zeros(0, 1), torch.zeros(0))

    try:
        with observe_attention(attended):
            yield
    finally:
        for hook in hooks:
            hook.remove()


def _note_results(
    parallel: ContextParallel,
    seen: Seen,
    logits: Tensor,
    leaves: list[Tensor],
    batch: dict[str, Tensor],
    shard: Shard | None,
) -> None:
    """Logits, the loss and the gradient of the embeddings, into the results."""
    whole = parallel.head == "sequence"
    if whole:
        logits = logits[: len(PADDING) - 1]
    found = _projected(logits.detach()) if whole else seen.rows_of(logits)
    if found is None:
        raise ValueError(
            f"{type(parallel.root).__name__} gives logits of shape {tuple(logits.shape)}, not a row for each token: a "
            f"head that pools tokens"
        )
    seen.results["logits"] = found
    local = logits.to_local() if hasattr(logits, "to_local") else logits
    if whole:
        loss = local.float().square().sum()
    else:
        targets = _targets(batch, shard).to(local.device)
        chosen = targets.flatten().remainder(local.shape[-1])  # a share of the vocabulary, or fewer classes than tokens
        losses = F.cross_entropy(local.flatten(0, 1).float(), chosen, reduction="none")
        loss = (losses * (targets.flatten() != IGNORE_INDEX)).sum()
    seen.results["loss"] = Rows(loss.detach().reshape(1, 1), loss.detach().abs().reshape(1))
    if leaves and loss.requires_grad:
        (grad,) = torch.autograd.grad(loss, leaves[:1], allow_unused=True)
        gradient = seen.rows_of(grad)
        if gradient is not None:
            seen.results["gradient"] = gradient


def _targets(batch: dict[str, Tensor], shard: Shard | None) -> Tensor:
    layout = layout_of_batch(*batch["input_ids"].shape, attention_mask=batch["attention_mask"])
    targets = shifted_labels(batch["input_ids"], layout)
    targets[len(PADDING) - 1 :] = IGNORE_INDEX
    return targets if shard is None else shard.take(targets)
