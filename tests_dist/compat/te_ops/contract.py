"""The contract of fused attention, written down twice over: as a dense reference and as a builder of its inputs.

Nothing here uses `cpattn`: sequences are lists of plain tensors, the reference loops over them, and the builder places
them in every layout (padding filled with NaN, so that whatever touches it shows).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """One combination. lens: valid lengths of q and kv of each sequence; room: padded lengths of q and kv."""

    layout: str
    mask: str
    window: tuple[int, int] = (-1, -1)
    softmax: str = "vanilla"
    bias: str = ""  # "", or batch and head dims of the bias: "11", "1h", "b1", "bh"
    heads: tuple[int, int] = (4, 2)
    dims: tuple[int, int] = (8, 8)
    dropout: float = 0.0
    bottom_right: bool | None = None
    dtype: torch.dtype = torch.float32
    scale: float | None = None
    lens_q: tuple[int, ...] = (5, 0, 7)
    lens_kv: tuple[int, ...] = (6, 3, 9)
    room: tuple[int, int] = (7, 9)

    @property
    def paged(self) -> bool:
        return self.layout.startswith("paged_kv_")

    @property
    def formats(self) -> tuple[str, str]:
        """Formats of q and of k and v."""
        parts = self.layout.removeprefix("paged_kv_").split("_")
        named = {"bs": "bshd", "sb": "sbhd", "t": "thd", "bh": "bhsd"}

        def fmt(part: str) -> str:
            letters = part.replace("3", "").replace("2", "")
            return letters if letters in named.values() else named[letters[:2] if letters[0] != "t" else "t"]

        return fmt(parts[0]), fmt(parts[-1])

    @property
    def interleaved(self) -> int:
        """Tensors in one buffer: 3, 2 or 0."""
        return next((n for n in (3, 2) if str(n) in self.layout), 0)

    def valid(self) -> Case:
        """With lengths that the layout and mask allow."""
        lens_q, lens_kv, room = self.lens_q, self.lens_kv, self.room
        heads = self.heads
        if self.interleaved == 3:
            lens_q, room, heads = lens_kv, (room[1], room[1]), (heads[0], heads[0])
        if "padding" not in self.mask:
            lens_q, lens_kv = (room[0],) * len(lens_q), (room[1],) * len(lens_kv)
        return replace(self, lens_q=lens_q, lens_kv=lens_kv, room=room, heads=heads)

    def __str__(self) -> str:
        parts = [self.layout, self.mask]
        if self.window != (-1, -1):
            parts.append(f"w{self.window[0]},{self.window[1]}")
        parts += [
            p for p in (self.softmax if self.softmax != "vanilla" else "", self.bias and f"bias-{self.bias}") if p
        ]
        if self.dropout:
            parts.append(f"drop{self.dropout}")
        if self.bottom_right is not None:
            parts.append(f"br{int(self.bottom_right)}")
        if self.dtype != torch.float32:
            parts.append(str(self.dtype).split(".")[1])
        if self.heads != (4, 2) and self.interleaved != 3:
            parts.append(f"h{self.heads[0]}:{self.heads[1]}")
        if self.dims != (8, 8):
            parts.append(f"d{self.dims[0]}:{self.dims[1]}")
        return "-".join(parts)


@dataclass
class Sequences:
    """Plain per-sequence tensors: q [sq, N, D], k [sk, G, D], v [sk, G, E], dout [sq, N, E]; and what all share."""

    q: list[Tensor]
    k: list[Tensor]
    v: list[Tensor]
    dout: list[Tensor]
    bias: Tensor | None = None
    offset: Tensor | None = None

    def map(self, fn: Any) -> Sequences:
        lists = [[fn(t) for t in ts] for ts in (self.q, self.k, self.v, self.dout)]
        return Sequences(*lists, *(None if t is None else fn(t) for t in (self.bias, self.offset)))


@dataclass
class Results:
    """Per-sequence results: out [sq, N, E], stats [sq, N]; gradients likewise; None where there are none."""

    out: list[Tensor]
    stats: list[Tensor]
    max_logit: Tensor | None = None
    dq: list[Tensor] = field(default_factory=list)
    dk: list[Tensor] = field(default_factory=list)
    dv: list[Tensor] = field(default_factory=list)
    dbias: Tensor | None = None
    doffset: Tensor | None = None


def make_sequences(case: Case, seed: int = 0) -> Sequences:
    """Random numbers, in fp32 values that the case's dtype can hold."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g).to(case.dtype)

    (n, kv), (d, e) = case.heads, case.dims
    bias = offset = None
    if case.bias:
        b, h = (len(case.lens_q) if case.bias[0] == "b" else 1), (n if case.bias[1] == "h" else 1)
        bias = normal(b, h, *case.room)
    if case.softmax == "learnable":
        offset = torch.randn(1, n, 1, 1, generator=g)
    return Sequences(
        [normal(s, n, d) for s in case.lens_q],
        [normal(s, kv, d) for s in case.lens_kv],
        [normal(s, kv, e) for s in case.lens_kv],
        [normal(s, n, e) for s in case.lens_q],
        bias,
        offset,
    )


def visible(case: Case, sq: int, sk: int) -> Tensor:
    """Which query sees which key of a sequence with valid lengths sq and sk, from the contract's definitions."""
    i, j = torch.arange(sq)[:, None], torch.arange(sk)[None, :]
    seen = torch.ones(sq, sk, dtype=torch.bool)
    bottom_right = case.mask.endswith("bottom_right") if case.bottom_right is None else case.bottom_right
    diagonal = i + (sk - sq if bottom_right else 0)
    if "causal" in case.mask:
        seen &= j <= diagonal
    left, right = case.window
    if left >= 0:
        seen &= j >= diagonal - left
    if right >= 0:
        seen &= j <= diagonal + right
    return seen


@torch.enable_grad()  # also inside an operation that makes no graph, as the fake's are
def reference(case: Case, s: Sequences, keep: list[Tensor] | None = None, *, backward: bool = True) -> Results:
    """Dense fp64 attention of each sequence on its own, differentiated by autograd.

    keep: for dropout, which probabilities stay, [N, sq, sk] for each sequence.
    """
    s = s.map(lambda t: t.double().requires_grad_())
    scale = case.dims[0] ** -0.5 if case.scale is None else case.scale
    results = Results([], [])
    maxima = [torch.full((case.heads[0],), -torch.inf, dtype=torch.float64)]
    group = case.heads[0] // case.heads[1]
    for b, (q, k, v) in enumerate(zip(s.q, s.k, s.v, strict=True)):
        sq, sk = len(q), len(k)
        scores = torch.stack([q[:, h] @ k[:, h // group].T for h in range(case.heads[0])]) * scale
        if s.bias is not None:
            scores = scores + s.bias[b if s.bias.shape[0] > 1 else 0][:, :sq, :sk]
        scores = scores.masked_fill(~visible(case, sq, sk), -torch.inf)
        if scores.numel():
            maxima.append(scores.detach().amax((1, 2)))
        sink = {"vanilla": -torch.inf, "off-by-one": 0.0}.get(case.softmax, s.offset)
        extra = torch.full((case.heads[0], sq, 1), sink, dtype=torch.float64) if isinstance(sink, float) else None
        extra = s.offset.view(-1, 1, 1).expand(-1, sq, 1) if extra is None else extra  # type: ignore[union-attr]
        logits = torch.cat([scores, extra], dim=-1)
        stats = torch.logsumexp(logits, dim=-1)
        p = torch.exp(scores - torch.where(stats.isinf(), torch.zeros_like(stats), stats)[..., None])
        if keep is not None and case.dropout:
            p = torch.where(keep[b], p / (1 - case.dropout), torch.zeros_like(p))
        v_heads = torch.stack([v[:, h // group] for h in range(case.heads[0])])
        results.out.append((p @ v_heads).transpose(0, 1))
        results.stats.append(stats.T.detach())
    results.max_logit = torch.stack(maxima).amax(0)
    if backward:
        loss = sum((o * do.detach()).sum() for o, do in zip(results.out, s.dout, strict=True))
        leaves = [*s.q, *s.k, *s.v, *(t for t in (s.bias, s.offset) if t is not None)]
        grads = list(torch.autograd.grad(loss, leaves, allow_unused=True))
        grads = [torch.zeros_like(x) if g is None else g for g, x in zip(grads, leaves, strict=True)]
        b = len(s.q)
        results.dq, results.dk, results.dv = grads[:b], grads[b : 2 * b], grads[2 * b : 3 * b]
        rest = grads[3 * b :]
        if s.bias is not None:
            results.dbias = rest.pop(0)
        if s.offset is not None:
            results.doffset = rest.pop(0)
    results.out = [o.detach() for o in results.out]
    return results


@dataclass
class Placed:
    """Tensors in a layout, and where sequences lie in them."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    arguments: dict[str, Any]
    q_slots: list[int]
    kv_slots: list[int]


def place(case: Case, s: Sequences) -> Placed:
    """The sequences laid out as the case says; everything else is NaN."""
    fmt_q, fmt_kv = case.formats
    q_slots, q_total = _slots(case.lens_q, fmt_q, case.room[0], reverse=False)
    kv_slots, kv_total = _slots(case.lens_kv, fmt_kv, case.room[1], reverse=case.interleaved != 3)
    if case.interleaved == 3:
        kv_slots, kv_total = q_slots, q_total
    args: dict[str, Any] = {}
    for side, lens, fmt, slots, total in (
        ("q", case.lens_q, fmt_q, q_slots, q_total),
        ("kv", case.lens_kv, fmt_kv, kv_slots, kv_total),
    ):
        args[f"cu_seqlens_{side}"] = torch.tensor([0, *lens]).cumsum(0).to(torch.int32)
        if fmt == "thd":
            args[f"cu_seqlens_{side}_padded"] = torch.tensor([*slots, total], dtype=torch.int32)
    q = _fill(s.q, fmt_q, q_slots, q_total, case.room[0])
    dout = _fill(s.dout, fmt_q, q_slots, q_total, case.room[0])
    room_kv = case.room[1]
    if case.paged:
        k, v, table = _pages(case, s, fmt_kv)
        args["page_table_k"] = args["page_table_v"] = table
        room_kv = table.shape[1] * (k.shape[1] if fmt_kv == "bshd" else k.shape[0])
    else:
        k, v = (_fill(t, fmt_kv, kv_slots, kv_total, case.room[1]) for t in (s.k, s.v))
    if case.interleaved:
        joined = [k, v] if case.interleaved == 2 else [q, k, v]
        dim = -3 if case.layout.endswith(f"{case.interleaved}hd") else -2
        views = torch.stack(joined, dim=dim).unbind(dim)
        q, k, v = views if case.interleaved == 3 else (q, *views)
    args |= {
        "max_seqlen_q": case.room[0],
        "max_seqlen_kv": room_kv,
        "qkv_layout": case.layout,
        "attn_mask_type": case.mask,
        "window_size": case.window,
        "softmax_type": case.softmax,
        "attn_scale": case.scale,
        "dropout": case.dropout,
        "bottom_right_diagonal": case.bottom_right,
        "attn_bias_type": "post_scale_bias" if case.bias else "no_bias",
    }
    return Placed(q, k, v, dout, args, q_slots, kv_slots)


def _slots(lens: tuple[int, ...], fmt: str, room: int, *, reverse: bool) -> tuple[list[int], int]:
    """First row of each sequence, and rows in all; packed tokens have gaps, and may lie in reverse order."""
    if fmt != "thd":
        return [i * room for i in range(len(lens))], len(lens) * room
    at, slots = 1, {}
    for i in reversed(range(len(lens))) if reverse else range(len(lens)):
        slots[i] = at
        at += lens[i] + 1 + i
    return [slots[i] for i in range(len(lens))], at


def _fill(parts: list[Tensor], fmt: str, slots: list[int], total: int, room: int) -> Tensor:
    rows = torch.full((total, *parts[0].shape[1:]), torch.nan, dtype=parts[0].dtype)
    for part, slot in zip(parts, slots, strict=True):
        rows[slot : slot + len(part)] = part
    return _from_rows(rows, fmt, len(parts))


def _from_rows(rows: Tensor, fmt: str, batch: int) -> Tensor:
    if fmt == "thd":
        return rows
    x = rows.reshape(batch, -1, *rows.shape[1:])
    return {"bshd": x, "sbhd": x.transpose(0, 1), "bhsd": x.transpose(1, 2)}[fmt].contiguous()


def _to_rows(x: Tensor, fmt: str) -> Tensor:
    if fmt == "thd":
        return x
    return {"bshd": x, "sbhd": x.transpose(0, 1), "bhsd": x.transpose(1, 2)}[fmt].flatten(0, 1)


def _pages(case: Case, s: Sequences, fmt: str) -> tuple[Tensor, Tensor, Tensor]:
    """Pages of 4 tokens in scrambled order; unused table entries name a page that does not exist."""
    size, per_seq = 4, -(-case.room[1] // 4)
    order = torch.randperm(len(case.lens_kv) * per_seq, generator=torch.Generator().manual_seed(1)).tolist()
    table = torch.full((len(case.lens_kv), per_seq), 10_000, dtype=torch.int32)
    containers = [torch.full((len(order), size, *t[0].shape[1:]), torch.nan, dtype=t[0].dtype) for t in (s.k, s.v)]
    for i, length in enumerate(case.lens_kv):
        for p in range(-(-length // size)):
            page = order.pop()
            table[i, p] = page
            for container, parts in zip(containers, (s.k, s.v), strict=True):
                piece = parts[i][p * size : (p + 1) * size]
                container[page, : len(piece)] = piece
    if fmt == "sbhd":
        containers = [c.transpose(0, 1).contiguous() for c in containers]
    return containers[0], containers[1], table


def read(x: Tensor, fmt: str, slots: list[int], lens: tuple[int, ...]) -> tuple[list[Tensor], Tensor]:
    """The sequences of a result tensor, and all its other rows."""
    rows = _to_rows(x, fmt)
    rest = torch.ones(len(rows), dtype=torch.bool)
    for slot, length in zip(slots, lens, strict=True):
        rest[slot : slot + length] = False
    return [rows[slot : slot + n] for slot, n in zip(slots, lens, strict=True)], rows[rest]


def read_stats(stats: Tensor, fmt: str, slots: list[int], lens: tuple[int, ...]) -> list[Tensor]:
    """[sq, N] of each sequence."""
    if fmt == "thd":
        return [stats[slot : slot + n, :, 0] for slot, n in zip(slots, lens, strict=True)]
    return [stats[i, :, :n, 0].T for i, n in enumerate(lens)]


PADDING_MASKS = ("padding", "padding_causal", "padding_causal_bottom_right")
ALL_MASKS = ("no_mask", "causal", "causal_bottom_right", *PADDING_MASKS)
PADDED_LAYOUTS = (
    *("sb3hd", "sbh3d", "sbhd_sb2hd", "sbhd_sbh2d", "sbhd_sbhd_sbhd"),
    *("bs3hd", "bsh3d", "bshd_bs2hd", "bshd_bsh2d", "bshd_bshd_bshd"),
    *("bhsd_bhsd_bhsd", "sbhd_bshd_bshd", "bshd_sbhd_sbhd"),
)
RAGGED_LAYOUTS = ("t3hd", "th3d", "thd_t2hd", "thd_th2d", "thd_thd_thd", "thd_bshd_bshd", "thd_sbhd_sbhd")
PAGED_LAYOUTS = tuple(f"paged_kv_{q}_{kv}_{kv}" for q in ("bshd", "sbhd", "thd") for kv in ("bshd", "sbhd"))
SOFTMAXES = ("vanilla", "off-by-one", "learnable")


def features(case: Case) -> tuple[Any, ...]:
    """What the combinations differ in: the default run shows every pair of them, the nightly one every combination."""
    return (
        *(case.layout, case.mask, case.window, case.softmax, case.bias, case.heads, case.dims),
        *(case.dropout, case.bottom_right, case.dtype, case.scale),
    )


def all_cases() -> list[Case]:
    """Every layout with every mask that it takes, every window and softmax; then bias, dropout and the rest."""
    cases = []
    for layout in (*PADDED_LAYOUTS, *RAGGED_LAYOUTS, *PAGED_LAYOUTS):
        for mask in ALL_MASKS if layout in PADDED_LAYOUTS else PADDING_MASKS:
            windows = [(-1, -1), (3, 0)] if "causal" in mask else [(-1, -1), (2, 3), (-1, 1), (1, -1)]
            for window in windows:
                for softmax in SOFTMAXES:
                    cases.append(Case(layout, mask, window, softmax))
    separate = ("bshd_bshd_bshd", "sbhd_sbhd_sbhd", "bhsd_bhsd_bhsd", "thd_thd_thd", "bshd_bs2hd", "sbhd_bshd_bshd")
    for layout in separate:
        for mask in PADDING_MASKS if layout == "thd_thd_thd" else ALL_MASKS:
            cases += [Case(layout, mask, bias=bias) for bias in ("11", "1h", "b1", "bh")]
            cases += [Case(layout, mask, bias="1h", softmax="learnable", window=(3, 0))]
            cases += [Case(layout, mask, dropout=0.3), Case(layout, mask, dropout=0.5, softmax="learnable", bias="bh")]
            cases += [Case(layout, mask, bottom_right=br, window=(2, 1)) for br in (True, False)]
            cases += [Case(layout, mask, heads=heads) for heads in ((3, 3), (4, 1))]
            cases += [Case(layout, mask, scale=0.7, dtype=torch.float64)]
            if "2hd" not in layout:
                cases += [Case(layout, mask, dims=dims, softmax="off-by-one") for dims in ((16, 8), (8, 24))]
            cases += [Case(layout, mask, dtype=dtype) for dtype in (torch.bfloat16, torch.float16)]
    return [case.valid() for case in cases]
