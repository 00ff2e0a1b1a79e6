"""`generate` and `Session`: text from a model whose context is spread over the ranks of a context-parallel group.

The prompts run once through the distributed attention and their keys stay where they were computed. Each further token
runs through the model on every rank, and attention over the sharded cache is the only thing that communicates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cpattn.integrations.prefix_tree import PrefixTree, fold_samples
from cpattn.keys.group import find_ranks
from cpattn.keys.key import AttnKey
from cpattn.keys.make import make_key
from cpattn.masks.reading import read_int
from cpattn.masks.spec import AttnMaskSpec
from cpattn.ops.attention import attention
from cpattn.ops.layout import dispatch, position_ids
from cpattn.runtime.agreement import require_agreement, tensor_digest

from .kv_cache import MOST_AT_ONCE, PagedKVCache
from .row_models import LayerShape, ModelShape, RowAttention, RowModel, device_and_dtype, model_shape, rows_of
from .sampling import Sampler, Sampling

__all__ = ["ModelShape", "RowAttention", "RowModel", "Session", "generate", "model_shape"]


@torch.no_grad()
def generate(
    model: Any,
    prompts: Sequence[Tensor | Sequence[int]],
    *,
    max_new_tokens: int,
    cp_group: Any = None,
    eos_token_id: int | Sequence[int] | Tensor | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
    shape: ModelShape | None = None,
    page_size: int = 64,
    cache_dtype: torch.dtype | None = None,
    check_eos_every: int = 16,
    key_options: dict[str, Any] | None = None,
    check: bool = True,
) -> list[Tensor]:
    """Continue prompts of any lengths, token by token.

    Call it on all ranks of the group with the same arguments. Prompts that begin alike (the group of a GRPO step) are
    computed and kept once, as far as they do, where no layer has a window. A model runs without dropout, whatever mode
    it is in.

    Args:
        model: a Hugging Face causal language model with attn_implementation="cpattn", also in wrappers (FSDP2, DDP,
            PEFT, `ContextParallel`, which brings its group); or any `RowModel`, which calls its `attention` argument
            once per layer, in the order of the layers. The same weights on all ranks.
        prompts: token ids of each sequence, at least one each; the same on all ranks.
        max_new_tokens: tokens to add to each sequence.
        cp_group: as in `make_key`; None is one rank.
        eos_token_id: a sequence that produces it ends; its further tokens are the same id.
        temperature: 0 takes the likeliest token (the first of equals); else samples.
        top_k: sample among the likeliest so many tokens (and those as likely as the last of them).
        top_p: then among the fewest likeliest tokens whose probabilities sum to at least this.
        generator: for sampling, seeded alike on all ranks (rank 0's draws count). Every step draws one number for each
            sequence in the order of `prompts`, so the same seed gives the same draws on any number of ranks.
        shape: of a RowModel; None reads `model.config` (num_layers, num_heads_q, num_heads_kv, head_dim). Of a Hugging
            Face model it is found by running it on one token.
        page_size: tokens of a cache page.
        cache_dtype: None is the model's.
        check_eos_every: steps between looks at whether sequences have ended: the only host syncs.
        key_options: further options of `make_key` for the prompt; what a layer sees is up to the model and `shape`.
        check: try a Hugging Face model before it is trusted, once, as `ContextParallel` does.

    Returns:
        For each prompt its new tokens, int64 [<= max_new_tokens] on the CPU, up to and with the first eos.

    Raises:
        ValueError: a prompt is empty, a number is out of range, ranks differ, the model's shape is not known, it is a
            Hugging Face model with another attention or with layers that a cache of keys does not serve; or tokens are
            to be drawn from logits that hold NaN or inf. On all ranks alike.
    """
    how = Sampling(temperature, top_k, top_p).checked()
    max_new_tokens = read_int("max_new_tokens", max_new_tokens, least=0)
    check_eos_every = read_int("check_eos_every", check_eos_every)
    _eos_ids(eos_token_id)
    session = Session(
        model,
        prompts,
        max_tokens=max_new_tokens,
        cp_group=cp_group,
        shape=shape,
        page_size=page_size,
        cache_dtype=cache_dtype,
        key_options=key_options,
        check=check,
        _prefill=max_new_tokens > 0,
    )
    request = _Request(max_new_tokens, how, eos_token_id, check_eos_every)
    return session._generate(request, generator)


class _Request(NamedTuple):
    """What is asked of a session; the same on all ranks."""

    max_new_tokens: int
    how: Sampling
    eos_token_id: Any
    check_eos_every: int

    def fields(self) -> dict[str, Any]:
        """What ranks compare."""
        eos = _eos_ids(self.eos_token_id)
        return {
            "max_new_tokens": self.max_new_tokens,
            "check_eos_every": self.check_eos_every,
            "temperature": float(self.how.temperature),
            "top_k and top_p": (self.how.top_k, self.how.top_p),
            "eos_token_id": None if eos is None else eos.tolist(),
        }


class Session:
    """Sequences that grow over one sharded cache: prompts, generated tokens, and further turns of a conversation.

        session = Session(model, prompts, max_tokens=1000, cp_group=group)
        answers = session.generate(max_new_tokens=200, eos_token_id=2)
        session.append(further_turns)                       # tokens of every sequence
        answers = session.generate(max_new_tokens=200, eos_token_id=2)

    Args:
        max_tokens: tokens that each sequence may grow by in all.
        model, prompts, cp_group, shape, page_size, cache_dtype, key_options, check: as in `generate`.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: Any,
        prompts: Sequence[Tensor | Sequence[int]],
        *,
        max_tokens: int,
        cp_group: Any = None,
        shape: ModelShape | None = None,
        page_size: int = 64,
        cache_dtype: torch.dtype | None = None,
        key_options: dict[str, Any] | None = None,
        check: bool = True,
        _prefill: bool = True,
    ) -> None:
        if not isinstance(prompts, (Sequence, Tensor)) or isinstance(prompts, str):
            raise ValueError(f"prompts is {type(prompts).__name__}: give a list of token ids for each sequence")
        ids = [_token_ids(f"prompt {number}", prompt) for number, prompt in enumerate(prompts)]
        if not ids:
            raise ValueError("generate needs prompts of at least one token each: there are none")
        max_tokens = read_int("max_tokens", max_tokens, least=0)
        key_options = dict(key_options or {})
        _check_options(key_options)
        dim_v = key_options.pop("head_dim_v", None)
        if shape is not None and dim_v is not None:
            shape = shape._replace(head_dim_v=dim_v)
        if cp_group is None and hasattr(model, "loss_group"):  # ContextParallel
            cp_group = model.cp_group
        self.group = find_ranks(cp_group).group
        self.rows = rows_of(model, shape, cp_group, check)
        prompts_digest = [tensor_digest(prompt) for prompt in ids]
        require_agreement("generate", {"prompts": prompts_digest, "max_new_tokens": max_tokens}, self.group)
        for number, prompt in enumerate(ids):
            self.rows.check_tokens(f"prompt {number}", prompt)
        self.lengths = np.array([len(prompt) for prompt in ids], dtype=np.int64)
        self._room = np.full(len(ids), max_tokens)
        # Tokens of each sequence that are not in the cache yet; before the first generate there are none.
        self._pending: list[list[int]] = [[] for _ in ids]
        self._first: tuple[Tensor, Tensor] | None = None
        self.device, dtype = device_and_dtype(model)
        if not _prefill:
            return
        with self.rows.quiet():
            layers = self.rows.layers(int(self.lengths.max()) + max_tokens)
            tree = _Prompt.of(ids, share=all(layer.window is None for layer in layers))
            key = _prompt_key(tree.spec, layers[0], cp_group, key_options)
            numbers = {"max_new_tokens": max_tokens, "page_size": page_size, "dtype": cache_dtype or dtype}
            self._caches = _Caches(key, layers, paths=tree.paths, device=self.device, **numbers)
            self._first = self._prefill(tree, key)

    @property
    def batch_size(self) -> int:
        """Number of sequences."""
        return len(self.lengths)

    @torch.no_grad()
    def generate(
        self,
        *,
        max_new_tokens: int,
        eos_token_id: int | Sequence[int] | Tensor | None = None,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
    ) -> list[Tensor]:
        """New tokens of every sequence; arguments, result and errors as of `cpattn.generate`.

        Waits for the device after every token, since nothing behind a sequence's end may stay in the cache.
        """
        how = Sampling(temperature, top_k, top_p).checked()
        request = _Request(read_int("max_new_tokens", max_new_tokens, least=0), how, eos_token_id, 1)
        return self._generate(request, generator)

    def append(self, turns: Sequence[Tensor | Sequence[int]]) -> None:
        """Tokens that follow what each sequence has, its generated tokens and their end included.

        They run through the model with the next `generate`, on every rank, 16 tokens of a sequence at a time: a long
        text belongs into the prompts of a new session.

        Raises:
            ValueError: not one for each sequence, ids that the model does not know, no room, or nothing was generated
                yet (these tokens belong to the prompts).
        """
        if len(turns) != self.batch_size:
            raise ValueError(f"append: {len(turns)} turns for {self.batch_size} sequences: one each, [] for none")
        if self._first is not None:
            raise ValueError("append before generate: these tokens belong to the prompts of the session")
        given = [_token_ids(f"turn {n}", turn, least=0) for n, turn in enumerate(turns)]
        for number, turn in enumerate(given):
            if len(turn):
                self.rows.check_tokens(f"turn {number}", turn)
        require_agreement("append", {"turns": [tensor_digest(turn) for turn in given]}, self.group)
        added = np.array([len(turn) for turn in given])
        self._require_room(added, "append")
        self._room -= added
        for pending, turn in zip(self._pending, given, strict=True):
            pending += turn.tolist()

    def _require_room(self, wanted: Any, what: str) -> None:
        full = np.flatnonzero(self._room < wanted)
        if len(full):
            raise ValueError(
                f"{what}: sequence {full[0]} may grow by {self._room[full[0]]} more tokens: make the session with a "
                f"larger max_tokens"
            )

    def _generate(self, request: _Request, generator: torch.Generator | None) -> list[Tensor]:
        eos = _eos_ids(request.eos_token_id)
        require_agreement("generate", request.fields(), self.group)
        if not request.max_new_tokens:
            return [torch.zeros(0, dtype=torch.int64) for _ in self.lengths]
        self._require_room(request.max_new_tokens, "generate")
        sampler = Sampler(request.how, self.batch_size, key=self._caches.key, generator=generator)
        with self.rows.quiet():
            steps = self._steps(request, sampler, None if eos is None else eos.to(self.device))
        found = _trim(torch.stack(steps, dim=1).cpu(), eos)
        sampler.check()
        self._room -= np.array([len(tokens) for tokens in found])
        self._pending = [[int(tokens[-1])] for tokens in found]
        return found

    def _steps(self, request: _Request, sampler: Sampler, eos: Tensor | None) -> list[Tensor]:
        """Tokens int64 [B] of every step; after its end a sequence has eos."""
        everyone = torch.arange(self.batch_size, device=self.device)
        if self._first is not None:
            tokens, self._first = sampler.spread(*self._first), None
        else:
            tokens = sampler.replicated(self._feed(self._pending), everyone)
        sampler.check()
        steps, going = [tokens], everyone
        ended = torch.zeros(self.batch_size, dtype=torch.bool, device=self.device)
        for step in range(1, request.max_new_tokens):
            if eos is not None:
                ended = ended | torch.isin(tokens, eos)
                if step % request.check_eos_every == 0:
                    going = (~ended).nonzero().flatten()
                    if not len(going):
                        break
            logits = self._decode(tokens[going], going if len(going) < self.batch_size else None)
            tokens = tokens.index_copy(0, going, sampler.replicated(logits, going))
            if eos is not None:
                tokens = torch.where(ended, eos[0], tokens)
            steps.append(tokens)
        return steps

    def _decode(self, tokens: Tensor, going: Tensor | None) -> Tensor:
        """Logits of one more token of the sequences that go on; None: of all."""
        counts = None if going is None else np.bincount(going.cpu().numpy(), minlength=self.batch_size)
        return self._run(tokens, self._caches.advance(None if counts is None else counts.tolist()))

    def _feed(self, pending: list[list[int]]) -> Tensor:
        """Logits [B, vocab] after each sequence's pending tokens, which go into the cache, some at a time."""
        left = [list(tokens) for tokens in pending]
        last: dict[int, Tensor] = {}
        while any(left):
            counts = [min(len(tokens), MOST_AT_ONCE) for tokens in left]
            some = [token for tokens, n in zip(left, counts, strict=True) for token in tokens[:n]]
            left = [tokens[n:] for tokens, n in zip(left, counts, strict=True)]
            done = [b for b, n in enumerate(counts) if n and not left[b]]
            ends = torch.tensor(np.cumsum(counts)[done] - 1, dtype=torch.int64, device=self.device)
            tokens = torch.tensor(some, dtype=torch.int64, device=self.device)
            last |= dict(zip(done, self._run(tokens, self._caches.advance(counts), keep=ends), strict=True))
        return torch.stack([last[b] for b in range(self.batch_size)])

    def _run(self, tokens: Tensor, positions: Tensor, keep: Tensor | None = None) -> Tensor:
        longest = max(self._caches.all[0].lengths)
        with self._caches.key.checking("generate"):  # the other ranks wait for its layers
            return self.rows.run(tokens, positions, self._caches.decode_attention(), longest - 1, keep)

    def _prefill(self, prompt: _Prompt, key: AttnKey) -> tuple[Tensor, Tensor]:
        """Logits of the prompts that end on this rank, and which these are."""
        mine = torch.from_numpy(key.q_placement.tokens_of(key.cp_rank))
        # Tokens are ascending on a rank, so a binary search finds each sequence's last one, if it is here.
        at = torch.searchsorted(mine, prompt.ends).clamp(max=max(len(mine) - 1, 0))
        here = mine[at] == prompt.ends if len(mine) else torch.zeros_like(prompt.ends, dtype=torch.bool)
        local = dispatch(prompt.tokens.to(self.device), key)
        positions = position_ids(key, device=self.device)
        last, keep = int(self.lengths.max()) - 1, at[here].to(self.device)
        with key.checking("generate"):
            logits = self.rows.run(local, positions, self._caches.prefill_attention(), last, keep)
        return logits, here.nonzero().flatten().to(self.device)


class _Prompt(NamedTuple):
    """All prompts as one sequence. ends: int64 [B], their last tokens; paths: as `PagedKVCache` takes them."""

    tokens: Tensor
    spec: AttnMaskSpec
    ends: Tensor
    paths: list[list[int]] | None

    @classmethod
    def of(cls, ids: Sequence[Tensor], share: bool) -> _Prompt:
        """One after the other, or with `share` common beginnings once."""
        tree = fold_samples(ids) if share and len(ids) > 1 else None
        if tree is None or not tree.num_saved_tokens:
            spec = AttnMaskSpec.varlen([len(prompt) for prompt in ids])
            ends = torch.tensor([d.end - 1 for d in spec.documents or []])
            return cls(torch.cat(list(ids)), spec, ends, None)
        ends = torch.stack([places[-1] for places in tree.places])
        return cls(tree.input_ids[0], tree.spec, ends, _paths(tree))


def _paths(tree: PrefixTree) -> list[list[int]]:
    """The documents of each sample of a tree, root first."""
    starts = np.array([d.start for d in tree.spec.documents or []], dtype=np.int64)
    return [np.unique(np.searchsorted(starts, p.numpy(), side="right") - 1).tolist() for p in tree.places]


class _Caches:
    """A cache for the layers of each shape, and the attention of all layers over them."""

    def __init__(
        self, key: AttnKey, layers: list[LayerShape], *, paths: list[list[int]] | None, **options: Any
    ) -> None:
        self.key, self.all = key, list[PagedKVCache]()
        self._of_layer: list[tuple[PagedKVCache, int, AttnKey]] = [None] * len(layers)  # type: ignore[list-item]
        for heads in dict.fromkeys(layer[:4] for layer in layers):
            mine = [n for n, layer in enumerate(layers) if layer[:4] == heads]
            windows = [layers[n].window for n in mine]
            of_heads = key.with_heads(*heads)
            masks = {w: of_heads.with_mask(key.spec, window=w) for w in dict.fromkeys(windows) if w is not None}
            cache = PagedKVCache(of_heads, windows=windows, paths=paths, **options)
            self.all.append(cache)
            for number, n in enumerate(mine):
                self._of_layer[n] = cache, number, of_heads if (window := layers[n].window) is None else masks[window]

    def advance(self, counts: list[int] | None) -> Tensor:
        """Positions of the step's tokens."""
        positions = [cache.advance(counts) for cache in self.all]
        return positions[0]

    def prefill_attention(self) -> RowAttention:
        """Attention of the prompts, layer by layer, which also fills the caches."""
        layers = iter(self._of_layer)

        def attend(q_TND: Tensor, k_TGD: Tensor, v_TGE: Tensor, **options: Any) -> Tensor:
            cache, number, key = next(layers)
            cache.prefill(number, k_TGD, v_TGE)
            out = attention(q_TND, k_TGD, v_TGE, key, **options)
            assert isinstance(out, Tensor)
            return out

        return attend

    def decode_attention(self) -> RowAttention:
        """Attention of a step's tokens, layer by layer."""
        layers = iter(self._of_layer)

        def attend(q_BND: Tensor, k_BGD: Tensor, v_BGE: Tensor, **options: Any) -> Tensor:
            cache, number, _ = next(layers)
            return cache.decode(number, q_BND, k_BGD, v_BGE, **options)

        return attend


def _check_options(options: dict[str, Any]) -> None:
    reserved = sorted({"window", "also", "num_layers"} & set(options))
    if reserved:
        raise ValueError(f"key_options has {', '.join(reserved)}: windows of layers go into shape=ModelShape(...)")


def _prompt_key(spec: AttnMaskSpec, layer: LayerShape, cp_group: Any, options: dict[str, Any]) -> AttnKey:
    return make_key(
        spec,
        num_heads_q=layer.num_heads_q,
        num_heads_kv=layer.num_heads_kv,
        head_dim=layer.head_dim,
        head_dim_v=layer.head_dim_v,
        cp_group=cp_group,
        **{"chunk_size": max(1, min(512, spec.total_seqlen // 64)), **options},
    )


def _trim(tokens: Tensor, eos: Tensor | None) -> list[Tensor]:
    """Each row up to and with its first eos."""
    if eos is None:
        return list(tokens)
    ends = torch.isin(tokens, eos.cpu())
    return [row[: int(end.int().argmax()) + 1] if end.any() else row for row, end in zip(tokens, ends, strict=True)]


def _token_ids(name: str, tokens: Tensor | Sequence[int], least: int = 1) -> Tensor:
    """int64 [n] on the CPU."""
    try:
        ids = torch.as_tensor(tokens)
    except (TypeError, ValueError, RuntimeError):
        kind = type(tokens).__name__
        raise ValueError(f"{name} is {kind}: token ids are needed, a list or a tensor of integers") from None
    if ids.ndim == 1 and not len(ids) and not least:
        return torch.zeros(0, dtype=torch.int64)
    if ids.ndim != 1 or not len(ids):
        raise ValueError(
            f"generate needs prompts of at least one token each: {name} has shape {tuple(ids.shape)}, expected [tokens]"
        )
    return _integers(name, ids).cpu()


def _integers(name: str, values: Tensor) -> Tensor:
    if values.dtype.is_floating_point or values.dtype.is_complex or values.dtype == torch.bool:
        raise ValueError(f"{name} is {values.dtype}: token ids are integers")
    return values.to(torch.int64)


def _eos_ids(eos_token_id: int | Sequence[int] | Tensor | None) -> Tensor | None:
    if eos_token_id is None:
        return None
    try:
        ids = torch.as_tensor(eos_token_id).flatten()
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"eos_token_id is {eos_token_id!r}: give token ids, or None for no end") from None
    if not len(ids):
        raise ValueError("eos_token_id is empty: give ids, or None for no end")
    return _integers("eos_token_id", ids)
