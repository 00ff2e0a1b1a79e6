"""Runtime layer: prefill, decoding and generation over a sharded paged cache against attention over everything."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import cpattn
from cpattn import AttnMaskSpec, ModelShape, PagedKVCache
from cpattn.decoding.kv_cache import merge_over_ranks
from cpattn.launch.demo.model import ModelConfig, Transformer
from tests_dist.support.harness import run_on_ranks
from tests_dist.support.profiles import each_once

LENGTHS = (70, 3, 41)
WINDOWS = (None, 16, None, 5)


def world() -> Any:
    return dist.group.WORLD if dist.is_initialized() else None


def make_layers(new: int, *, heads: tuple[int, int], dims: tuple[int, int], dtype: torch.dtype) -> list[list[tuple]]:
    """q, k, v of every sequence, prompt and new tokens, for each layer."""
    g = torch.Generator().manual_seed(0)

    def normal(n: int, h: int, d: int) -> Tensor:
        return torch.randn(n, h, d, generator=g).to(dtype)

    (hq, hkv), (d, e) = heads, dims
    return [
        [(normal(n + new, hq, d), normal(n + new, hkv, d), normal(n + new, hkv, e)) for n in LENGTHS] for _ in WINDOWS
    ]


def dense_row(
    q_ND: Tensor, k: Tensor, v: Tensor, window: int | None, softcap: float | None, sink: Tensor | None
) -> Tensor:
    """The last of these keys is the query's own token."""
    k, v = (t[-window:] if window else t for t in (k.double(), v.double()))
    groups = q_ND.shape[0] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = torch.einsum("nd,snd->ns", q_ND.double(), k) * q_ND.shape[-1] ** -0.5
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if sink is not None:
        scores = torch.cat([scores, sink.double()[:, None]], dim=1)
        v = torch.cat([v, v.new_zeros(1, *v.shape[1:])])
    return torch.einsum("ns,sne->ne", torch.softmax(scores, -1), v)


def decode_on_rank(new: int, dtype: torch.dtype, options: dict[str, Any]) -> dict[str, Any]:
    """Prefill, then `new` steps of all layers; outputs, and pages in use after every step."""
    heads, dims = options.get("heads", (4, 2)), options.get("dims", (8, 8))
    layers = make_layers(new, heads=heads, dims=dims, dtype=dtype)
    key = cpattn.make_key(
        AttnMaskSpec.varlen(list(LENGTHS)),
        num_heads_q=heads[0],
        num_heads_kv=heads[1],
        head_dim=dims[0],
        head_dim_v=dims[1],
        cp_group=world(),
        chunk_size=8,
    )
    cache = PagedKVCache(
        key,
        windows=WINDOWS,
        max_new_tokens=new,
        page_size=4,
        dtype=dtype,
        static_shapes=options.get("static_shapes", False),
    )
    sink = torch.linspace(-1, 1, heads[0]) if options.get("sink") else None
    for layer, sequences in enumerate(layers):
        prompt = [[t[:n] for t in qkv] for qkv, n in zip(sequences, LENGTHS, strict=True)]
        k, v = (cpattn.dispatch(torch.cat([p[i] for p in prompt]), key) for i in (1, 2))
        cache.prefill(layer, k, v)
    outs, pages = [], []
    for step in range(new):
        positions = cache.advance()
        assert positions.tolist() == [n + step for n in LENGTHS]
        for layer, sequences in enumerate(layers):
            q, k, v = (
                torch.stack([qkv[i][n + step] for qkv, n in zip(sequences, LENGTHS, strict=True)]) for i in range(3)
            )
            source = options.get("source")
            if source is not None and dist.is_initialized() and dist.get_rank() != source:
                q, k, v = (torch.full_like(t, torch.nan) for t in (q, k, v))
            outs.append(
                cache.decode(
                    layer,
                    q,
                    k,
                    v,
                    softcap=options.get("softcap"),
                    sink=sink,
                    merge=options.get("merge", "auto"),
                    source=source,
                )
            )
        pages.append([cache.pages_in_use(layer) for layer in range(len(layers))])
    return {"outs": outs, "pages": pages}


def truth_of(new: int, dtype: torch.dtype, options: dict[str, Any]) -> list[Tensor]:
    heads, dims = options.get("heads", (4, 2)), options.get("dims", (8, 8))
    layers = make_layers(new, heads=heads, dims=dims, dtype=dtype)
    sink = torch.linspace(-1, 1, heads[0]) if options.get("sink") else None
    return [
        torch.stack(
            [
                dense_row(q[n + step], k[: n + step + 1], v[: n + step + 1], window, options.get("softcap"), sink)
                for (q, k, v), n in zip(sequences, LENGTHS, strict=True)
            ]
        )
        for step in range(new)
        for window, sequences in zip(WINDOWS, layers, strict=True)
    ]


OPTIONS: dict[str, dict[str, Any]] = {
    "gqa": {},
    "mqa": {"heads": (4, 1)},
    "mha": {"heads": (3, 3), "merge": "gather"},
    "scatter": {"merge": "scatter"},
    "gather": {"merge": "gather"},
    "other value dim": {"dims": (8, 12)},
    "sink": {"sink": True, "merge": "scatter"},
    "sink gathered": {"sink": True, "merge": "gather"},
    "softcap": {"softcap": 2.0},
    "static shapes": {"static_shapes": True},
    "from one rank": {"source": 0},
}


@each_once(name=OPTIONS, cp_size=[4, 3, 1, 2])
def test_decoding_equals_attention_over_everything(name, cp_size):
    """Uneven prompts, three sequences, full and windowed layers; the same bits on every rank."""
    options = OPTIONS[name]
    results = run_on_ranks(cp_size, decode_on_rank, 24, torch.float32, options)
    for mine, exact in zip(results[0]["outs"], truth_of(24, torch.float32, options), strict=True):
        torch.testing.assert_close(mine.double(), exact, atol=2e-6, rtol=2e-6)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0]["outs"], other["outs"], strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits(dtype):
    results = run_on_ranks(3, decode_on_rank, 6, dtype, {})
    tolerance = 4 * torch.finfo(dtype).eps
    for mine, exact in zip(results[0]["outs"], truth_of(6, dtype, {}), strict=True):
        assert mine.dtype == dtype
        torch.testing.assert_close(mine.double(), exact, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("cp_size", [1, 3])
def test_windows_drop_old_pages(cp_size):
    """Pages of windowed layers stop growing; with all ranks together they hold the window and two pages' slack."""
    results = run_on_ranks(cp_size, decode_on_rank, 60, torch.float32, {})
    last = [sum(r["pages"][-1][layer] for r in results) for layer in range(len(WINDOWS))]
    total = sum(n + 60 for n in LENGTHS)
    for layer, window in enumerate(WINDOWS):
        if window is None:
            assert last[layer] * 4 >= total
        else:
            assert last[layer] * 4 <= len(LENGTHS) * (window + cp_size * 2 * 4)
    # They had stopped growing before: the last steps need no more than those before.
    for window, layer in ((w, i) for i, w in enumerate(WINDOWS) if w):
        history = [sum(r["pages"][step][layer] for r in results) for step in range(60)]
        assert max(history[-20:]) <= max(history[window : window + 20])


def merge_on_rank(rows: int, dtype: torch.dtype, method: str) -> Tensor:
    """Parts of a random attention, some ranks of it blind."""
    g = torch.Generator().manual_seed(dist.get_rank())
    out, lse = torch.randn(rows, 3, 5, generator=g), torch.randn(rows, 3, generator=g) * 5
    blind = torch.rand(rows, 3, generator=g) < 0.4
    out[blind], lse[blind] = 0, -torch.inf
    return torch.cat([merge_over_ranks(out, lse, world(), dtype=dtype, method=method).float(), out, lse[..., None]], -1)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["gather", "scatter"])
@pytest.mark.parametrize("rows", [1, 2, 7])
def test_merge_of_parts_some_of_them_blind(method, rows):
    results = run_on_ranks(4, merge_on_rank, rows, torch.float32, method)
    parts = torch.stack([r[..., 5:10] for r in results]).double()
    lse = torch.stack([r[..., 10] for r in results]).double()
    weights = torch.softmax(lse, 0).nan_to_num(0.0)
    expected = (parts * weights[..., None]).sum(0)
    for r in results:
        torch.testing.assert_close(r[..., :5].double(), expected, atol=1e-6, rtol=1e-6)


class _NoHostSync(TorchDispatchMode):
    """Fails on operations that wait for the device or whose output shape depends on data."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "repeat_interleave.Tensor", "item")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert not any(name in str(func) for name in self.FORBIDDEN), f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


def test_decode_path_does_not_wait_for_the_device():
    """On CUDA these operations would block the host; here they are only looked for."""
    layers = make_layers(4, heads=(4, 2), dims=(8, 8), dtype=torch.float32)
    key = cpattn.make_key(AttnMaskSpec.varlen(list(LENGTHS)), num_heads_q=4, num_heads_kv=2, head_dim=8)
    cache = PagedKVCache(key, windows=WINDOWS, max_new_tokens=4, page_size=4, dtype=torch.float32, static_shapes=True)
    for layer in range(len(WINDOWS)):
        cache.prefill(
            layer,
            torch.cat([s[1][:n] for s, n in zip(layers[layer], LENGTHS, strict=True)]),
            torch.cat([s[2][:n] for s, n in zip(layers[layer], LENGTHS, strict=True)]),
        )
    shapes = set()
    for step in range(4):
        cache.advance()
        with _NoHostSync():
            for layer in range(len(WINDOWS)):
                q, k, v = (
                    torch.stack([s[i][n + step] for s, n in zip(layers[layer], LENGTHS, strict=True)]) for i in range(3)
                )
                cache.decode(layer, q, k, v, sink=torch.zeros(4))
        shapes.add(tuple(pool.table.shape for pool in cache._pools))
    assert len(shapes) == 1
    with pytest.raises(RuntimeError, match="grown by max_new_tokens = 4: the cache is full"):
        cache.advance()


def counted_bytes_on_rank(method: str) -> tuple[int, int, int, int]:
    """Bytes received in one step of one token per sequence, as the collectives move them; what the cache says."""
    received = 0
    # torch 2.13 renamed the call.
    gather_name = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
    originals = {name: getattr(dist, name) for name in (gather_name, "all_to_all_single")}
    size = dist.get_world_size()

    def count(fn: Any) -> Any:
        def counted(output: Tensor, *args: Any, **kwargs: Any) -> Any:
            nonlocal received
            received += output.numel() * output.element_size() * (size - 1) // size
            return fn(output, *args, **kwargs)

        return counted

    key = cpattn.make_key(
        AttnMaskSpec.varlen(list(LENGTHS)), num_heads_q=4, num_heads_kv=2, head_dim=8, cp_group=world(), chunk_size=8
    )
    cache = PagedKVCache(key, windows=WINDOWS, max_new_tokens=2, page_size=4)
    for layer in range(len(WINDOWS)):
        rows = torch.zeros(key.num_keys, 2, 8)
        cache.prefill(layer, rows, rows)
    try:
        for name, original in originals.items():
            setattr(dist, name, count(original))
        cache.advance()
        for layer in range(len(WINDOWS)):
            k = torch.zeros(len(LENGTHS), 2, 8, dtype=torch.bfloat16)
            cache.decode(layer, torch.zeros(len(LENGTHS), 4, 8, dtype=torch.bfloat16), k, k, merge=method)  # type: ignore[arg-type]
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)
    every_way = [cache.bytes_per_step(merge=m) for m in ("auto", "gather", "scatter")]  # type: ignore[arg-type]
    return received, cache.bytes_per_step(merge=method), min(every_way[1:]), cache.bytes_to_gather_cache()  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["auto", "gather", "scatter"])
@pytest.mark.parametrize("cp_size", [2, 4])
def test_bytes_are_those_that_move(method, cp_size):
    for received, stated, least, _ in run_on_ranks(cp_size, counted_bytes_on_rank, method):
        assert received == stated
        if method == "auto":
            assert stated <= least / 0.9


def cache_of(spec: AttnMaskSpec, **options: Any) -> PagedKVCache:
    key = cpattn.make_key(spec, num_heads_q=2, num_heads_kv=1, head_dim=8)
    return PagedKVCache(key, **{"windows": [None], "max_new_tokens": 1, "dtype": torch.float32, **options})


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (AttnMaskSpec.cross([2], [3]), "separate documents.*: this one is cross-attention"),
        (AttnMaskSpec([[0, 4]], [[0, 4]], ["causal"], 4), "separate documents.*: this one has no documents"),
        (AttnMaskSpec.from_position_ids([0, 1, 7, 8]), "the one at token 2 begins at position 7, not at 0"),
        (AttnMaskSpec.prefix_tree([3, 2], [[0, 1]])[0], "the one at token 3 begins at position 3, not at 0"),
        (AttnMaskSpec.varlen([3, 2]) | AttnMaskSpec([[3, 5]], [[0, 1]], ["full"], 5), "sees tokens of another"),
    ],
)
def test_masks_that_are_not_separate_sequences_are_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        cache_of(spec)


@pytest.mark.parametrize(
    "spec",
    [
        AttnMaskSpec.sliding_window([4, 0, 5], 3),
        AttnMaskSpec.prefix_lm([2, 0], [4, 5]),
        AttnMaskSpec.varlen([0, 4, 0, 5, 0]),
        AttnMaskSpec.varlen([0, 0]),
    ],
)
def test_masks_within_sequences_are_served(spec):
    assert cache_of(spec).lengths == [d.end - d.start for d in spec.documents]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"windows": [0]}, "a layer's window is 0: it must be an int of at least 1"),
        ({"windows": [4.5]}, "a layer's window is 4.5"),
        ({"windows": []}, "windows is empty"),
        ({"max_new_tokens": 1.5}, "max_new_tokens is 1.5: it must be an int of at least 0"),
        ({"page_size": True}, "page_size is True"),
        ({"dtype": torch.int32}, "dtype is torch.int32"),
    ],
)
def test_bad_options_of_a_cache(options, message):
    with pytest.raises(ValueError, match=message):
        cache_of(AttnMaskSpec.varlen([4, 4]), **options)


def test_calls_of_a_cache_that_do_not_fit_are_refused():
    cache = cache_of(AttnMaskSpec.varlen([4, 4]), max_new_tokens=2)
    rows = torch.zeros(8, 1, 8)
    q, k = torch.zeros(2, 2, 8), torch.zeros(2, 1, 8)
    with pytest.raises(ValueError, match=r"k has shape \(7, 1, 8\): the cache expects \(8, 1, 8\)"):
        cache.prefill(0, rows[:7], rows)
    with pytest.raises(ValueError, match="layer is 1: the cache has layers 0 to 0"):
        cache.prefill(1, rows, rows)
    with pytest.raises(RuntimeError, match=r"layers \[0\] have not been prefilled"):
        cache.advance()
    cache.prefill(0, rows, rows)
    with pytest.raises(ValueError, match="layer 0 has been prefilled already"):
        cache.prefill(0, rows, rows)
    with pytest.raises(RuntimeError, match="decode before advance"):
        cache.decode(0, q, k, k)
    cache.advance()
    for arguments, options, message in (
        ((1, q, k, k), {}, "layer is 1: the cache has layers 0 to 0"),
        ((0, q[:1], k, k), {}, r"q has shape \(1, 2, 8\): the cache expects \(2, 2, 8\)"),
        ((0, q, k, k[..., :4]), {}, r"v has shape \(2, 1, 4\)"),
        ((0, q, k, k), {"softcap": -1.0}, "softcap is -1.0"),
        ((0, q, k, k), {"softmax_scale": float("nan")}, "softmax_scale is nan"),
        ((0, q, k, k), {"sink": torch.zeros(3)}, r"sink has shape \(3,\)"),
        ((0, q, k, k), {"merge": "tree"}, "merge is 'tree': use auto, gather, scatter"),
        ((0, q, k, k), {"source": 5}, "source is 5: the group has ranks 0 to 0"),
    ):
        with pytest.raises(ValueError, match=message):
            cache.decode(*arguments, **options)
    with pytest.raises(ValueError, match="merge is 'tree'"):
        cache.bytes_per_step(merge="tree")  # type: ignore[arg-type]
    assert not cache.decode(0, q.requires_grad_(), k, k).requires_grad
    cache.release(0)
    assert cache.pages_in_use(0) == 1


# ----------------------------------------------------------------------------------------------------
# Generation.

CONFIG = ModelConfig(num_layers=2, dim=32, num_heads_q=4, num_heads_kv=2, head_dim=8, ffn_dim=64)


def prompts(lengths: tuple[int, ...]) -> list[Tensor]:
    g = torch.Generator().manual_seed(1)
    return [torch.randint(0, 256, (n,), generator=g) for n in lengths]


def generate_on_rank(lengths: tuple[int, ...], new: int, options: dict[str, Any]) -> list[Tensor]:
    model = Transformer(CONFIG, seed=0)
    options = dict(options)
    windows = options.pop("windows", None)
    if windows is not None:
        options["shape"] = ModelShape(2, 4, 2, 8, windows)
    if options.get("temperature"):
        options["generator"] = torch.Generator().manual_seed(7)
    return cpattn.generate(model, prompts(lengths), max_new_tokens=new, cp_group=world(), page_size=8, **options)


def rerun(lengths: tuple[int, ...], new: int, windows: tuple[int | None, ...] = (None, None)) -> list[Tensor]:
    """The whole sequence through the model again for every token, with dense attention."""
    model = Transformer(CONFIG, seed=0)
    results = []
    for ids in prompts(lengths):
        start = len(ids)
        for _ in range(new):
            layer = iter(windows)

            def attend(q: Tensor, k: Tensor, v: Tensor, layer: Any = layer) -> Tensor:
                window, rows = next(layer), torch.arange(len(q))
                far = rows[:, None] - rows
                mask = (far >= 0) & (far < (window or len(q)))
                heads = (t.transpose(0, 1)[None] for t in (q, k, v))
                out = torch.nn.functional.scaled_dot_product_attention(*heads, attn_mask=mask, enable_gqa=True)
                return out[0].transpose(0, 1)

            with torch.no_grad():
                logits = model(ids, torch.arange(len(ids)), attend)
            ids = torch.cat([ids, logits[-1:].argmax(-1)])
        results.append(ids[start:])
    return results


@each_once(cp_size=[1, 2, 3, 4], windows=[None, (9, 9), (None, 6)])
def test_greedy_generation_equals_rerunning_everything(cp_size, windows):
    lengths, new = (50, 1, 23), 12
    expected = rerun(lengths, new, windows or (None, None))
    for tokens in run_on_ranks(cp_size, generate_on_rank, lengths, new, {"windows": windows}):
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(tokens, expected, strict=True))


def test_generation_stops_at_eos():
    lengths, new = (50, 4), 20
    plain = run_on_ranks(2, generate_on_rank, lengths, new, {})[0]
    eos = int(plain[0][5])
    tokens = run_on_ranks(2, generate_on_rank, lengths, new, {"eos_token_id": eos, "check_eos_every": 4})[0]
    for mine, whole in zip(tokens, plain, strict=True):
        ends = (whole == eos).nonzero()
        stop = int(ends[0]) + 1 if len(ends) else new
        assert torch.equal(mine, whole[:stop])


def test_sampling_is_the_same_on_all_ranks():
    results = run_on_ranks(3, generate_on_rank, (20, 30), 8, {"temperature": 1.0})
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_empty_prompts_are_refused():
    with pytest.raises(ValueError, match="at least one token each"):
        cpattn.generate(Transformer(CONFIG, seed=0), [torch.zeros(0, dtype=torch.int64)], max_new_tokens=1)


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        ([], {}, "there are none"),
        ([1, 2, 3], {}, r"prompt 0 has shape \(\), expected \[tokens\]"),
        ([[1.7, 2.9]], {}, "prompt 0 is torch.float32: token ids are integers"),
        (["a text"], {}, "prompt 0 is str: token ids are needed"),
        ([[1]], {"cache_dtype": torch.float8_e4m3fn}, "dtype is torch.float8_e4m3fn: .* at least 16 bits"),
        ([[1]], {"max_new_tokens": -1}, "max_new_tokens is -1: it must be an int of at least 0"),
        ([[1]], {"temperature": -1.0}, "temperature is -1.0"),
        ([[1]], {"temperature": float("nan")}, "temperature is nan"),
        ([[1]], {"check_eos_every": 0}, "check_eos_every is 0"),
        ([[1]], {"eos_token_id": []}, "eos_token_id is empty"),
        ([[1]], {"eos_token_id": 2.5}, "eos_token_id is torch.float32"),
        ([[1]], {"key_options": {"window": 3}}, r"key_options has window: windows of layers go into shape"),
    ],
)
def test_bad_calls_of_generate(given, options, message):
    with pytest.raises(ValueError, match=message):
        cpattn.generate(Transformer(CONFIG, seed=0), given, **{"max_new_tokens": 1, **options})


def generate_what_differs() -> None:
    odd, model = dist.get_rank() == 1, Transformer(CONFIG, seed=0)
    options: dict[str, Any]
    for field, prompt, options in (
        ("prompts", [1, 2 + odd], {}),
        ("max_new_tokens", [1, 2], {"max_new_tokens": 3 + odd}),
        ("temperature", [1, 2], {"temperature": 1.0 + odd}),
        ("eos_token_id", [1, 2], {"eos_token_id": 5 + odd}),
    ):
        with pytest.raises(ValueError, match=f"generate: {field} differs between ranks"):
            cpattn.generate(model, [prompt], **{"max_new_tokens": 2, **options}, cp_group=world())


def test_ranks_generate_the_same_or_nothing():
    run_on_ranks(2, generate_what_differs, timeout=60)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("Llama4TextConfig", {"attention_chunk_size": 8, "num_local_experts": 2}, "layers of chunked_attention"),
        ("Lfm2Config", {"layer_types": ["conv", "full_attention"]}, "mixes tokens outside attention"),
        ("LlamaConfig", {"vocab_size": 7}, "prompt 0 has token ids from 1 to 9: the model has 7 tokens"),
        ("LlamaConfig", {"is_causal": False}, "layers of bidirectional attention"),
    ],
)
def test_models_that_a_cache_of_keys_does_not_serve_are_refused(kind, changes, message):
    """Layers that would be taken for full causal attention, and ids that one rank would stumble over."""
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "head_dim": 8}
    config = getattr(transformers, kind)(**{**sizes, "num_attention_heads": 2, "num_key_value_heads": 2, **changes})
    config._attn_implementation = "cpattn"
    from cpattn.integrations.transformers import register_attention

    register_attention()
    model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match=message):
        cpattn.generate(model, [[1, 2, 9]], max_new_tokens=20)


def hugging_face_on_rank(kind: str, new: int, *, use_cpattn: bool) -> list[list[int]]:
    """A tiny random model: through `cpattn.generate`, or its own greedy generation prompt by prompt."""
    transformers = pytest.importorskip("transformers")
    from cpattn.integrations.transformers import register_attention

    register_attention()
    shared: dict[str, Any] = {
        "vocab_size": 128,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "head_dim": 8,
    }
    extra = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
    config = {
        "llama": lambda: transformers.LlamaConfig(**shared),
        "gemma2": lambda: transformers.Gemma2Config(**shared, **extra, attn_logit_softcapping=20.0),
        "mistral": lambda: transformers.MistralConfig(**shared, sliding_window=8),
        "gpt_oss": lambda: transformers.GptOssConfig(**shared, **extra, num_local_experts=2, num_experts_per_tok=1),
    }[kind]()
    config._attn_implementation = "cpattn" if use_cpattn else "eager"
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * 0.3)
    texts = [p % 128 for p in prompts((40, 3, 21))]
    if use_cpattn:
        return [t.tolist() for t in cpattn.generate(model, texts, max_new_tokens=new, cp_group=world(), page_size=8)]
    out = []
    for ids in texts:
        start = len(ids)
        for _ in range(new):
            with torch.no_grad():
                logits = model(input_ids=ids[None], use_cache=False).logits
            ids = torch.cat([ids, logits[0, -1:].argmax(-1)])
        out.append(ids[start:].tolist())
    return out


@pytest.mark.parametrize("kind", ["llama", "gemma2", "mistral", "gpt_oss"])
def test_hugging_face_models_generate_the_same(kind):
    pytest.importorskip("transformers")
    expected = hugging_face_on_rank(kind, 10, use_cpattn=False)
    for tokens in run_on_ranks(3, hugging_face_on_rank, kind, 10, use_cpattn=True):
        assert tokens == expected


@pytest.mark.nightly
def test_256_tokens_after_8k_prompt_at_cp_4_equal_one_rank():
    """The issue's own case; launch/benchmarks/decode.py records it with bytes and times."""
    one = run_on_ranks(1, generate_on_rank, (8192,), 256, {}, timeout=600)[0]
    for tokens in run_on_ranks(4, generate_on_rank, (8192,), 256, {}, timeout=600):
        assert torch.equal(tokens[0], one[0])


def test_a_row_without_keys_and_a_sink_of_minus_infinity_is_zero():
    """Nothing to share out, and no NaN: alone, and where another head of the row has a sink."""
    out, lse = torch.zeros(2, 3, 8), torch.full((2, 3), -torch.inf)
    sink = torch.tensor([-torch.inf, 0.5, -torch.inf])
    assert torch.equal(merge_over_ranks(out, lse, None, dtype=torch.float32, sink=sink), out)
