"""`verify`: does attention under this key, on this group and machine, compute what it should?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from cpattn.backends import Problem, backend_names, choose_backend
from cpattn.backends.nonfinite import Sight
from cpattn.keys.key import AttnKey
from cpattn.masks.spec import lower_mask
from cpattn.ops.attention import attention
from cpattn.runtime.agreement import tensor_digest
from cpattn.solver import SliceTable

from .report import Check, Finding, Verification, summed_up
from .sampled import Rows, Sampled, dense_rows, visible_keys

# Largest error of a row's out, and of all gradients together, relative to their size.
_ALLOWED = {
    torch.float64: (1e-10, 1e-9),
    torch.float32: (1e-4, 1e-4),
    torch.float16: (1e-2, 1e-2),
    torch.bfloat16: (5e-2, 3e-2),
}
_ALLOWED_8BIT_WIRE = (0.3, 0.3)
# Values of probed tokens, beside normal ones: large enough to be seen as one key among a million in 16 bits.
_LOUD = 1e4


class _Numbers(NamedTuple):
    scale: float
    softcap: float | None
    sink: Tensor | None

    def options(self) -> dict[str, Any]:
        return {"softmax_scale": self.scale, "softcap": self.softcap, "sink": self.sink}


class _Samples(NamedTuple):
    """tokens [M]: query tokens, the same on all ranks. rows: local rows of those that are this rank's. mine: which."""

    tokens: np.ndarray
    rows: Tensor
    mine: Tensor


def verify(
    key: AttnKey,
    q_TND: Tensor,
    k_TGD: Tensor,
    v_TGE: Tensor,
    *,
    backends: Sequence[str] | Literal["all"] | None = None,
    softmax_scale: float | None = None,
    softcap: float | None = None,
    sink: Tensor | None = None,
    parameters: nn.Module | Mapping[str, Tensor] | Iterable[Tensor] = (),
    num_samples: int = 16,
    seed: int = 0,
) -> Verification:
    """Check attention under a key on all ranks of its group, with the rows given. Call it on all of them.

    - the leak probe: some tokens' keys and values are changed; rows that see none of them must stay bit for bit what
      they are, rows that see one must change;
    - parity of out and of all gradients with dense fp64 attention on `num_samples` query rows (over all keys, so that a
      million tokens cost no more than those rows); what these rows do not reach must have a gradient of 0;
    - repeatability: a second step gives the same bits (on CUDA kernels with atomics do not, unless
      torch.use_deterministic_algorithms is on);
    - parameters, and the sink, equal on all ranks.

    It takes two forwards and two steps of attention for each backend.

    Args:
        key: from `make_key`.
        q_TND, k_TGD, v_TGE: as `attention` takes them; not changed, no gradient is left in them.
        backends: kernels to check one after the other; None is the key's own, "all" every one that serves the tensors.
        softmax_scale, softcap, sink: as `attention` takes them.
        parameters: tensors that are to be equal on all ranks: a module, a mapping by name, or tensors.
        num_samples: query rows that are compared.
        seed: of what is drawn; equal on all ranks.

    Returns:
        the report, the same on every rank; true if all checks passed.

    Raises:
        ValueError: as `attention`; a backend is unknown or refuses.
    """
    inputs = tuple(t.detach() for t in (q_TND, k_TGD, v_TGE))
    scale = q_TND.shape[-1] ** -0.5 if softmax_scale is None else float(softmax_scale)
    numbers = _Numbers(scale, softcap, None if sink is None else sink.detach())
    named = {**_named(parameters), **({} if sink is None else {"sink": sink})}
    checks = [_equal_parameters(key, named)] if named else []
    for name in _chosen(key, inputs, backends, softcap):
        checks += _checks_of(_with_backend(key, name), inputs, numbers, num_samples, seed)
    return Verification(tuple(checks))


def _checks_of(
    key: AttnKey, inputs: tuple[Tensor, ...], numbers: _Numbers, num_samples: int, seed: int
) -> list[Check]:
    table = lower_mask(key.spec, key.options.window)
    backend = key.options.running.backend
    if backend == "auto":
        backend = choose_backend(_problem(key, inputs[0], numbers.softcap is not None)).name
    generator = np.random.default_rng(seed)
    found = {"leak probe": _leaks(key, table, inputs, numbers, generator)}
    samples = _samples(key, table, num_samples, generator, inputs[0].device)
    dout = torch.from_numpy(generator.standard_normal((len(samples.tokens), key.num_heads_q, key.head_dim_v)))
    dout = dout.to(inputs[0])
    first, second = (_step(key, inputs, numbers, samples, dout) for _ in range(2))
    found |= _parity(key, table, inputs, numbers, samples, dout, first)
    same = [torch.equal(a, b) for a, b in zip(first, second, strict=True)]
    said = "two steps gave the same bits" if all(same) else "two steps differ"
    found["repeatability"] = Finding(float(not all(same)), said=said)
    return [summed_up(name, backend, _of_all_ranks(key, finding)) for name, finding in found.items()]


def _leaks(
    key: AttnKey, table: SliceTable, inputs: tuple[Tensor, ...], numbers: _Numbers, generator: np.random.Generator
) -> Finding:
    """Rows whose out changed though they see no probed token, and the other way round."""
    probed = np.unique(_drawn(generator, key.spec.seqlen_k, 8))
    marked = torch.zeros(key.spec.seqlen_k, 1, dtype=torch.bool)
    marked[probed] = True
    sees = Sight.of(table, torch.device("cpu")).sees_any(marked, key.spec.total_seqlen)[:, 0]
    sees = sees[key.q_placement.tokens_of(key.cp_rank)]
    rows = torch.from_numpy(np.flatnonzero(np.isin(key.k_placement.tokens_of(key.cp_rank), probed)))
    rows = rows.to(inputs[0].device)
    random = torch.Generator().manual_seed(int(generator.integers(1 << 31)) + key.cp_rank)
    q, k, v = (torch.randn(t.shape, generator=random).to(t) for t in inputs)
    before = attention(q * 0.5, k, v, key, **numbers.options())
    k, v = k.clone(), v.clone()
    k[rows] = torch.randn(k[rows].shape, generator=random).to(k)
    v[rows] = _LOUD
    changed = (attention(q * 0.5, k, v, key, **numbers.options()) != before).flatten(1).any(1).cpu()
    leaked, missed = int((changed & ~sees).sum()), int((sees & ~changed).sum())
    said = f"{int(sees.sum())} rows see one of {len(probed)} probed tokens and changed, {int((~sees).sum())} did not"
    if leaked or missed:
        said = f"{leaked} rows changed that see none of the probed tokens, {missed} did not that see one"
    return Finding(float(leaked + missed), said=said)


def _step(
    key: AttnKey, inputs: tuple[Tensor, ...], numbers: _Numbers, samples: _Samples, dout_MNE: Tensor
) -> Sampled:
    """out, dq, dk and dv of this rank's rows, where the loss is that of the sampled rows."""
    leaves = [t.clone().requires_grad_() for t in inputs]
    with torch.enable_grad():
        q, k, v = leaves
        out = attention(q, k, v, key, **numbers.options())
        dout = torch.zeros_like(out)
        dout[samples.rows] = dout_MNE[samples.mine]
        grads = torch.autograd.grad(out, leaves, dout)
    return Sampled(out.detach(), *grads)


def _parity(
    key: AttnKey,
    table: SliceTable,
    inputs: tuple[Tensor, ...],
    numbers: _Numbers,
    samples: _Samples,
    dout_MNE: Tensor,
    got: Sampled,
) -> dict[str, Finding]:
    q, k, v = inputs
    visible = visible_keys(table, samples.tokens, key.k_placement.tokens_of(key.cp_rank))
    seen = torch.from_numpy(visible.any(0)).to(q.device)
    whole_q = torch.zeros(len(samples.tokens), *q.shape[1:], dtype=torch.float64, device=q.device)
    whole_q[samples.mine] = q[samples.rows].double()
    if key.cp_group is not None:
        dist.all_reduce(whole_q, group=key.cp_group)
    rows = Rows(whole_q, dout_MNE, k[seen], v[seen], torch.from_numpy(visible).to(q.device)[:, seen])
    scale, softcap, sink = numbers
    truth = dense_rows(rows, scale=scale, softcap=softcap, sink=sink, group=key.cp_group)
    for_out, for_grads = _ALLOWED_8BIT_WIRE if key.options.running.wire else _ALLOWED[q.dtype]
    pairs = {
        "dq": (got.dq[samples.rows], truth.dq[samples.mine]),
        "dk": (got.dk[seen], truth.dk),
        "dv": (got.dv[seen], truth.dv),
    }
    found = {"out": Finding(_row_error(got.out[samples.rows], truth.out[samples.mine], truth.out), for_out)}
    found |= {name: Finding(_error(*pair), for_grads) for name, pair in pairs.items()}
    others = torch.ones(len(q), dtype=torch.bool, device=q.device)
    others[samples.rows] = False
    strays = sum(int((t.flatten(1) != 0).any(1).sum()) for t in (got.dq[others], got.dk[~seen], got.dv[~seen]))
    said = "none where it must not be" if not strays else f"{strays} rows have one that the sampled rows do not reach"
    return {**found, "gradients elsewhere": Finding(float(strays), said=said)}


def _row_error(mine: Tensor, truth: Tensor, all_rows: Tensor) -> float:
    """Largest error of a row; rows much smaller than the others are measured by those."""
    if not mine.numel():
        return 0.0
    floor = 0.1 * all_rows.flatten(1).norm(dim=1).square().mean().sqrt()
    size = truth.flatten(1).norm(dim=1).clamp_min(floor).clamp_min(torch.finfo(torch.float64).tiny)
    return float(((mine.double() - truth).flatten(1).norm(dim=1) / size).amax())


def _error(mine: Tensor, truth: Tensor) -> float:
    size = float(truth.norm())
    return float((mine.double() - truth).norm()) / size if size else float(mine.double().norm())


def _samples(
    key: AttnKey, table: SliceTable, count: int, generator: np.random.Generator, device: torch.device
) -> _Samples:
    """Query tokens: the first and last rows of some rectangles of the mask, where faults hide, and others."""
    drawn = table.take(np.sort(_drawn(generator, len(table), max(count // 4, 1))))
    edges = np.concatenate([drawn.q0, drawn.q1 - 1])
    tokens = np.unique(np.concatenate([edges, _drawn(generator, key.spec.total_seqlen, count)]))
    tokens = np.sort(generator.permutation(tokens)[:count])
    own = key.q_placement.tokens_of(key.cp_rank)
    at = np.searchsorted(own, tokens)
    mine = np.isin(tokens, own)
    return _Samples(tokens, torch.from_numpy(at[mine]).to(device), torch.from_numpy(mine).to(device))


def _drawn(generator: np.random.Generator, size: int, count: int) -> np.ndarray:
    return generator.integers(0, max(size, 1), min(count, size))


def _equal_parameters(key: AttnKey, named: Mapping[str, Tensor]) -> Check:
    digests = {name: tensor_digest(tensor) for name, tensor in named.items()}
    everyone = _of_all_ranks(key, digests)
    differing = [name for name in digests if any(other.get(name) != everyone[0][name] for other in everyone)]
    said = f"{len(named)} tensors, equal on all ranks"
    if differing:
        name = differing[0]
        ranks = [rank for rank, other in enumerate(everyone) if other.get(name) != everyone[0][name]]
        said = f"{len(differing)} of {len(named)} differ: {name} of ranks {ranks[:4]} from that of rank 0"
    return Check("parameters", "", not differing, said)


def _named(parameters: nn.Module | Mapping[str, Tensor] | Iterable[Tensor]) -> dict[str, Tensor]:
    if isinstance(parameters, nn.Module):
        # Sharded ones (DTensor) differ between ranks as they should.
        found = (*parameters.named_parameters(), *parameters.named_buffers())
        return {name: tensor for name, tensor in found if not hasattr(tensor, "device_mesh")}
    if isinstance(parameters, Mapping):
        return dict(parameters)
    return {str(number): tensor for number, tensor in enumerate(parameters)}


def _chosen(
    key: AttnKey, inputs: tuple[Tensor, ...], asked: Sequence[str] | Literal["all"] | None, softcap: float | None
) -> list[str]:
    if asked is None:
        return [key.options.running.backend]
    problem = _problem(key, inputs[0], softcap is not None)
    if asked != "all":
        names = [asked] if isinstance(asked, str) else list(asked)
        for name in names:
            choose_backend(problem, name)  # or it says why not
        return names
    served = []
    for name in backend_names():
        try:
            choose_backend(problem, name)
        except ValueError:
            continue
        served.append(name)
    return served


def _problem(key: AttnKey, q: Tensor, softcap: bool) -> Problem:
    return Problem(q.device.type, q.dtype, *key.heads.numbers, softcap)


def _with_backend(key: AttnKey, name: str) -> AttnKey:
    options = key.options
    if name == options.running.backend:
        return key
    running = replace(options.running, backend=name)
    return AttnKey(key.planned._replace(options=replace(options, running=running)), key.rank_plan, key.ranks)


def _of_all_ranks(key: AttnKey, value: Any) -> list[Any]:
    if key.cp_group is None:
        return [value]
    values: list[Any] = [None] * key.cp_size
    dist.all_gather_object(values, value, group=key.cp_group)
    return values
