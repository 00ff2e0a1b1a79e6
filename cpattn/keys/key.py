"""`AttnKey`: a mask planned for a group of ranks, with this rank's share bound to it.

A key holds everything that a step needs besides the tensors. It is made once per mask (`make_key`) and reused by
all layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from cpattn.backends import CHOICES, Backend, Problem, choose_backend, explain_choice, why_never
from cpattn.collectives import HeadExchange, Transport
from cpattn.masks.fragments import mixer_lines
from cpattn.masks.spec import AttnMaskSpec, lower_mask
from cpattn.planning.head_degree import most_heads
from cpattn.planning.options import check_spec, read_heads, window_on_mask
from cpattn.runtime.agreement import require_agreement
from cpattn.runtime.bound import BoundPlan, bind_plan
from cpattn.runtime.exchanges import Exchanges
from cpattn.runtime.fastest import choose_fastest, remembered_choice
from cpattn.runtime.identity import Saying, calls_of
from cpattn.runtime.memory import StepMemory, memory_with_trades, step_memory
from cpattn.runtime.trades import HeadTrades
from cpattn.solver import (
    Draft,
    HeadPart,
    Mixer,
    Placement,
    RankPlan,
    keys_schedule,
    split_heads,
    split_rows,
    spread_rank_plan,
)

from .cache import cached, find_by_handle, new_handle
from .describe import (
    describe_choice,
    describe_memory,
    describe_plan,
    describe_report,
    describe_sharding,
)
from .group import CpRanks
from .options import KeyOptions, PlannedKey
from .transports import choose_head_transport, choose_transport


class HeadSharding(NamedTuple):
    """How a block of ranks shares the heads, from the view of one of them.

    inner: the key of the attention between the trades: all rows of this rank's block, for its heads.
    trades: of rows for heads before it, and back after it.
    """

    inner: AttnKey
    trades: HeadTrades

    @property
    def part(self) -> HeadPart:
        """This rank's heads."""
        return self.trades.part


class AttnKey:
    """A mask planned for a group, and this rank's share of the plan.

    Made by `make_key`. Attributes of interest: `spec`, `plan` (all ranks), `rank_plan` (this rank),
    `q_placement` and `k_placement` (which rank has which rows), `cp_group`, `cp_size`, `cp_rank`,
    `num_tokens` (local query rows), `num_keys` (local key rows).

    With head sharding the plan is one for cp_size / head_degree context ranks, each of them a block of ranks;
    `sharding` then says how a block trades rows for heads, and holds the key of the attention inside.

    Not a dataclass: FSDP2 takes dataclasses among a module's arguments apart to cast what is in them.
    """

    def __init__(self, planned: PlannedKey, rank_plan: RankPlan, ranks: CpRanks) -> None:
        self.planned, self.rank_plan, self.ranks = planned, rank_plan, ranks
        self.spec, self.options, self.plan = planned.spec, planned.options, planned.plan
        self.heads, self.layer_plans, self.degree_seconds = planned.heads, planned.layer_plans, planned.degree_seconds
        self.num_heads_q, self.num_heads_kv, self.head_dim, self.head_dim_v = planned.heads.numbers
        self.cp_group, self.cp_size, self.cp_rank = ranks
        degree = self.options.head_degree
        self.q_placement = split_rows(self.plan.q_placement, degree)
        shared = self.plan.k_placement is self.plan.q_placement
        self.k_placement = self.q_placement if shared else split_rows(self.plan.k_placement, degree)
        self.transport = _choose_transport(planned, ranks)
        self.sharding = None if degree == 1 else _shard_heads(self)
        # What a trial of kernels is remembered by, equal on all ranks.
        self.tried_as: Any = (planned.heads.numbers, degree)
        self.cached_tensors: dict[Any, Any] = {}
        self._bound: dict[Any, BoundPlan] = {}
        self._stated: dict[Any, StepMemory] = {}
        self._by_heads: dict[Any, AttnKey] = {}
        self.handle = new_handle(self)

    def __repr__(self) -> str:
        return (
            f"<AttnKey of {self.spec.total_seqlen} x {self.spec.seqlen_k} tokens, heads {self.num_heads_q}:"
            f"{self.num_heads_kv} of {self.head_dim} and {self.head_dim_v}, rank {self.cp_rank} of {self.cp_size}>"
        )

    def __copy__(self) -> AttnKey:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> AttnKey:
        """Itself: it does not change, and the copy of a model attends under the key that the model has."""
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"{self!r} cannot be pickled: it belongs to this process and its group. Send what make_plan returns, and "
            f"call make_key(spec, ..., plan=...) where it is used"
        )

    @property
    def num_tokens(self) -> int:
        """Query rows of this rank."""
        return int(self.q_placement.num_tokens[self.cp_rank])

    @property
    def num_keys(self) -> int:
        """Key and value rows of this rank (the same as `num_tokens` in self-attention)."""
        return int(self.k_placement.num_tokens[self.cp_rank])

    def prepare(self, device: torch.device | str, dtype: torch.dtype, *, softcap: bool = False) -> None:
        """Do now what the first call on a device and with a dtype would do: choose the kernel, bind the plan.

        Call it on all ranks where `backend` is "fastest": they try the kernels and decide together. Before a CUDA graph
        is captured it is needed.

        Raises:
            ValueError: no kernel serves.
        """
        inner = self if self.sharding is None else self.sharding.inner
        inner.bind(_numbered(torch.device(device)), dtype, softcap)

    def bind(self, device: torch.device, dtype: torch.dtype, softcap: bool = False) -> BoundPlan:
        """This rank's plan on a device, for the backend that serves it; made once."""
        assert self.sharding is None, "attention between head trades runs on the inner key"
        kind = (device, dtype, softcap)
        if kind not in self._bound:
            running = self.options.running
            problem, backend = self._problem(device.type, dtype, softcap), self._backend(device, dtype, softcap)
            exchanges = Exchanges(self.cp_group, running.codec, running.grad_dtype)
            self._bound[kind] = bind_plan(
                self.rank_plan, backend, exchanges, device, transport=self.transport, keep_kv=running.keep_kv,
                problem=problem,
            )  # fmt: skip
        return self._bound[kind]

    def _backend(self, device: torch.device, dtype: torch.dtype, softcap: bool) -> Backend:
        problem, name = self._problem(device.type, dtype, softcap), self.options.running.backend
        if name != "fastest":
            return choose_backend(problem, name)
        return choose_fastest(problem, self.tried_as, self.rank_plan, device, self.cp_group).backend

    def require_shapes(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Check that q, k and v have this rank's rows and the key's heads.

        Raises:
            ValueError: names the tensor, its shape and what is expected.
        """
        expected = {
            "q": (q, (self.num_tokens, self.num_heads_q, self.head_dim)),
            "k": (k, (self.num_keys, self.num_heads_kv, self.head_dim)),
            "v": (v, (self.num_keys, self.num_heads_kv, self.head_dim_v)),
        }
        for name, (tensor, shape) in expected.items():
            if tuple(tensor.shape) != shape:
                raise ValueError(
                    f"{name} has shape {tuple(tensor.shape)}: the key expects {shape} (rows of rank "
                    f"{self.cp_rank}, heads, head dim); {_guess(tensor, shape)}?"
                )

    @cached_property
    def identity(self) -> str:
        """What ranks have in common of this key, briefly and with a digest: it travels with each call."""
        return self.planned.identity()

    def calling(self, what: str, device: torch.device, /, **fields: Any) -> AbstractContextManager[int]:
        """Tell the other ranks of a pass, and run the block with its number once all have told the same.

        The block runs at once where there is nobody to tell, or the key was made with identify=False; the number is -1.

        Raises:
            ValueError, LostRankError, RuntimeError: see `Calls.passing`.
        """
        if self.cp_group is None or not self.options.running.identify:
            return nullcontext(-1)
        return calls_of(self.cp_group).passing(Saying.of(what, {"key": self.identity, **fields}), device)

    def arriving(self, what: str, number: int, /, **fields: Any) -> AbstractContextManager[None]:
        """Around what waits for the exchanges of a pass that was told with `calling`; number: what that gave.

        Raises:
            LostRankError: one of them failed.
        """
        if self.cp_group is None or not self.options.running.identify:
            return nullcontext()
        return calls_of(self.cp_group).arriving(Saying.of(what, {"key": self.identity, **fields}), number)

    @contextmanager
    def checking(self, what: str) -> Iterator[None]:
        """Before a pass: what is raised in the block, the ranks that wait in the pass hear of, and raise too."""
        try:
            yield
        except Exception as error:
            if self.cp_group is not None and self.options.running.identify:
                calls_of(self.cp_group).fail(what, error)
            raise

    def with_mask(
        self, spec: AttnMaskSpec, *, window: int | Sequence[int | None] | None = None
    ) -> AttnKey:
        """A key for another mask over the same placement: one dispatch serves both.

        For models whose layers have different masks (full and sliding-window layers). The heads and
        options are this key's; the rows of each rank stay what they are. A mask that this key was made
        with (`also` of `make_key`) has been planned; any other is planned now, over a placement that was not
        made for it.
        """
        check_spec("spec", spec)
        mine = (self.spec.total_seqlen, self.spec.seqlen_k)
        theirs = (spec.total_seqlen, spec.seqlen_k)
        if mine != theirs or self.spec.is_cross != spec.is_cross:
            raise ValueError(
                f"with_mask: the key is over {mine} query and key tokens and the mask over {theirs}: "
                f"masks of one placement are over the same sequence"
            )
        options = replace(self.options, window=window_on_mask(window, spec))
        if options == self.options and spec.fingerprint() == self.spec.fingerprint():
            return self
        identity = ("with_mask", int(self.handle), spec.fingerprint(), options)
        return cached(self.cp_group, identity, lambda: bind_key(self._planned_with(spec, options), self.ranks))

    def with_heads(
        self, num_heads_q: int, num_heads_kv: int, head_dim: int, head_dim_v: int | None = None
    ) -> AttnKey:
        """The same plan for other heads: a tensor-parallel rank's, or those of a layer that differs.

        Nothing is planned again and nothing communicated.
        """
        heads = read_heads(num_heads_q, num_heads_kv, head_dim, head_dim_v, self.options.running.wire)
        heads = replace(heads, latent_dim=self.heads.latent_dim)
        if heads == self.heads:
            return self
        if heads not in self._by_heads:
            of_heads = self.planned._replace(heads=heads, degree_seconds=())
            self._by_heads[heads] = AttnKey(of_heads, self.rank_plan, self.ranks)
        return self._by_heads[heads]

    def _planned_with(self, spec: AttnMaskSpec, options: KeyOptions) -> PlannedKey:
        """Another mask over this placement."""
        of_mask = self.planned._replace(spec=spec, options=options, degree_seconds=())
        for layers, plan in self.layer_plans:
            if layers.is_of(spec, options.window):
                return of_mask._replace(plan=plan)
        planning = options.planning.for_contexts(options.head_degree)
        placements = self.plan.q_placement, self.plan.k_placement
        draft = Draft.of(keys_schedule(lower_mask(spec, options.window), placements[0]), *placements)
        costs, nodes = most_heads(self.heads, options.head_degree).row_costs(), planning.ranks_per_node
        staging = draft.staging(costs, planning.hardware, nodes, planning.num_stages, planning.relays)
        return of_mask._replace(plan=draft.plan(staging, nodes))

    def describe(
        self, dtype: torch.dtype = torch.bfloat16, device: str | None = None, *, mixers: Sequence[Mixer] = ()
    ) -> str:
        """Balance, tokens and bytes per rank, stages and backend, as text.

        Args:
            dtype: of q, k and v, for the bytes and the backend.
            device: device type for the backend's choice; None is CUDA where there is one.
            mixers: layers without softmax under the same key (`cpattn.mixers.Recurrence`, `Convolution`): what they
                move is stated first.

        Raises:
            ValueError: there are mixers, and the mask has no documents for them.
        """
        lines = mixer_lines(self.spec, self.q_placement, mixers, dtype.itemsize, "describe")
        lines += describe_choice(self.planned)
        if self.sharding is not None:
            inner = self.sharding.inner.describe(dtype, device)
            return "\n".join([*lines, describe_sharding(self.planned, dtype), inner])
        device = device or _device_here()
        choice = self._explain_choice(self._problem(device, dtype, False))
        backend = f"backend ({str(dtype).removeprefix('torch.')} on {device}): {choice}"
        lines += describe_plan(self.planned, dtype, transport=self.transport, backend=backend)
        return "\n".join([*lines, self._describe_memory(dtype, device), *describe_report(self.planned, dtype)])

    def _explain_choice(self, problem: Problem) -> str:
        name = self.options.running.backend
        if name != "fastest":
            return explain_choice(problem, name)
        choice = remembered_choice(problem, self.tried_as, self.cp_group)
        return "fastest, not yet tried" if choice is None else choice.in_words()

    def _describe_memory(self, dtype: torch.dtype, device: str) -> str:
        if device != "cpu" and not torch.cuda.is_available():
            return f"memory: not stated, there is no {device} device here"
        try:
            return describe_memory(self.memory(dtype, device), keeps=self.options.running.keep_kv)
        except ValueError as reason:
            return f"memory: {reason}"

    def memory(self, dtype: torch.dtype = torch.bfloat16, device: str | None = None) -> StepMemory:
        """Peak bytes that one attention call allocates on this rank beyond its inputs, forward and backward.

        Without sink and softcap; see docs/profiling.md. dtype: of q, k and v. device: device type; None is
        CUDA where there is one.

        Raises:
            ValueError: no backend serves them, or the kernel cannot be run without data.
        """
        kind = torch.device(device or _device_here())
        if (dtype, kind) not in self._stated:
            if self.sharding is None:
                self._require_choice(kind, dtype)
                stated = step_memory(self.bind(kind, dtype), self.heads, dtype, kind)
            else:
                between = self.sharding.inner.memory(dtype, kind.type)
                stated = memory_with_trades(self.sharding.trades, between, self.heads, dtype, kind)
            self._stated[dtype, kind] = stated
        return self._stated[dtype, kind]

    def _require_choice(self, device: torch.device, dtype: torch.dtype) -> None:
        problem = self._problem(device.type, dtype, False)
        if self.options.running.backend == "fastest" and not remembered_choice(problem, self.tried_as, self.cp_group):
            raise ValueError(
                "backend is 'fastest' and has not been tried yet: call key.prepare(device, dtype) on all ranks first"
            )

    def _problem(self, device_type: str, dtype: torch.dtype, softcap: bool) -> Problem:
        return Problem(device_type, dtype, *self.heads.numbers, softcap)


def require_key(key: Any, call: str) -> None:
    """
    Raises:
        ValueError: it is no key.
    """
    if not isinstance(key, AttnKey):
        raise ValueError(f"{call}: key is {key!r}: expected what make_key returned")


def key_of_handle(handle: Tensor) -> AttnKey:
    """The live key with this handle; custom ops carry the handle because they take no objects."""
    key = find_by_handle(handle)
    assert isinstance(key, AttnKey)
    return key


def bind_key(planned: PlannedKey, ranks: CpRanks) -> AttnKey:
    """The key of a plan on this rank of a group; the ranks compare what they planned.

    Raises:
        ValueError: they differ, or the named kernel cannot run here.
    """
    spec = planned.spec
    # The caller may go on to change the spec's lists; the key keeps its own.
    own = AttnMaskSpec(
        spec.q_ranges, spec.k_ranges, spec.mask_types, spec.total_seqlen, spec.total_seqlen_k, spec.documents
    )
    planned = planned._replace(spec=own)
    never = _why_never(planned)
    # Compared too: what one rank alone lacks, all hear of.
    require_agreement("make_key", {**planned.shared(), "what the kernel lacks": never}, ranks.group)
    if never is not None:
        raise ValueError(never)
    return AttnKey(planned, planned.plan.for_rank(ranks.rank // planned.options.head_degree), ranks)


def _why_never(planned: PlannedKey) -> str | None:
    """Why the kernel that is named cannot run in this process, if one is named and cannot."""
    options = planned.options
    name = options.running.backend
    return None if name in CHOICES else why_never(name, most_heads(planned.heads, options.head_degree).numbers)


def _shard_heads(key: AttnKey) -> HeadSharding:
    degree = key.options.head_degree
    context, nth = divmod(key.cp_rank, degree)
    parts = split_heads(key.num_heads_q, key.num_heads_kv, degree)
    block = tuple(range(context * degree, (context + 1) * degree))
    transport = _choose_head_transport(key)

    def exchange(placement: Placement, heads: Sequence[Sequence[int]], num_heads: int) -> HeadExchange:
        rows = tuple(placement.num_tokens[list(block)].tolist())
        active = placement.total_seqlen > 0
        return HeadExchange(block, nth, rows, tuple(map(tuple, heads)), num_heads, active, transport)

    queries = exchange(key.q_placement, [range(part.first, part.last) for part in parts], key.num_heads_q)
    keys = exchange(key.k_placement, [part.kv for part in parts], key.num_heads_kv)
    contexts = CpRanks(key.cp_group, key.plan.cp_size, context)
    inner = AttnKey(_inner_of(key, parts[nth]), spread_rank_plan(key.rank_plan, degree, nth), contexts)
    inner.identity = key.identity  # its own heads differ between ranks
    inner.tried_as = (key.heads.numbers, degree)
    return HeadSharding(inner, HeadTrades(Exchanges(key.cp_group), parts[nth], queries, keys))


def _choose_transport(planned: PlannedKey, ranks: CpRanks) -> Transport:
    """Between context ranks."""
    options = planned.options
    heads = most_heads(planned.heads, options.head_degree)
    choice, hardware = options.running.transport, options.planning.hardware
    return choose_transport(planned.plan, heads, num_ranks=ranks.size, choice=choice, hardware=hardware)


def _choose_head_transport(key: AttnKey) -> Transport:
    """Within a block."""
    options = key.options
    return choose_head_transport(
        float(key.q_placement.num_tokens.max()),
        key.heads,
        head_degree=options.head_degree,
        num_ranks=key.cp_size,
        choice=options.running.transport,
        hardware=options.planning.hardware,
    )


def _inner_of(key: AttnKey, part: HeadPart) -> PlannedKey:
    """The attention between the trades, for the heads of a part."""
    # Its own heads differ between ranks, and so could its choice.
    running = replace(key.options.running, transport=key.transport)
    return key.planned._replace(
        options=replace(key.options, running=running, head_degree=1),
        heads=replace(key.heads, num_q=part.num_q, num_kv=len(part.kv)),
        layer_plans=(),
        degree_seconds=(),
    )


def _numbered(device: torch.device) -> torch.device:
    """The device as tensors on it say it."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _device_here() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _guess(tensor: Tensor, expected: tuple[int, ...]) -> str:
    """What is most likely wrong with a tensor of another shape, as the beginning of a question."""
    if tensor.ndim == len(expected) + 1:
        return "rows are packed, so is a batch dimension to be flattened, [B, T, heads, dim] to [B T, heads, dim]"
    if tuple(tensor.shape) == (expected[1], expected[0], expected[2]):
        return "do heads come first, so that transpose(0, 1) is missing"
    return "did you dispatch with this key"
