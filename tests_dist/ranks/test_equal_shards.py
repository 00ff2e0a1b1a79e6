"""Layer 2: equal shards on real ranks: exact, of one size under every mask of a length, with heads shared out too."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

import cpattn
from cpattn import AttnMaskSpec, LayerKind
from cpattn.testing.rank_cases import run_with_key
from tests_dist.support.harness import run_on_ranks
from tests_dist.support.hf_models import make_model
from tests_dist.support.oracle import assert_exact, make_inputs, oracle

HEADS = {"num_heads_q": 4, "num_heads_kv": 2, "head_dim": 8}
MASKS = [
    AttnMaskSpec.varlen([17, 0, 40, 3]),
    AttnMaskSpec.causal(60),
    AttnMaskSpec([(0, 20)], [(0, 30)], ["full"], total_seqlen=60),  # rows that see nothing
    AttnMaskSpec.cross([10, 50], [80, 4]),
]


def check_exact(**options) -> list[int]:
    group = dist.group.WORLD
    sizes = []
    for spec in MASKS:
        if spec.is_cross and options.get("schedule") == "tiles":
            continue
        key = cpattn.make_key(spec, cp_group=group, equal_shards=True, chunk_size=8, **options, **HEADS)
        inputs = make_inputs(spec, heads=(4, 2), head_dim=8, dtype=torch.float64)
        assert_exact(run_with_key(key, inputs), oracle(spec, inputs), f"{spec} {options}")
        sizes.append(key.num_tokens)
    return sizes


@pytest.mark.parametrize(
    ("cp_size", "options"), [(3, {}), (4, {"head_degree": 2}), (4, {"schedule": "tiles"})], ids=str
)
def test_exact_with_shards_of_one_size(cp_size, options):
    for sizes in run_on_ranks(cp_size, check_exact, **options):
        assert set(sizes) == {60 // cp_size}


def check_refusals() -> None:
    """On all ranks, before anything is sent."""
    spec = AttnMaskSpec.causal(61)
    with pytest.raises(ValueError, match="61 tokens are no multiple of 2 ranks: pad the sequence to 62"):
        cpattn.make_key(spec, cp_group=dist.group.WORLD, equal_shards=True, **HEADS)
    with pytest.raises(ValueError, match="21 tokens are no multiple of 2 ranks"):
        cpattn.make_key(AttnMaskSpec.cross([60], [21]), cp_group=dist.group.WORLD, equal_shards=True, **HEADS)
    even = AttnMaskSpec.causal(60)
    ready = cpattn.make_plan(even, cp_size=2, **HEADS)
    with pytest.raises(ValueError, match="plan was made without it: give make_plan equal_shards=True"):
        cpattn.make_key(even, cp_group=dist.group.WORLD, plan=ready, equal_shards=True, **HEADS)
    ready = cpattn.make_plan(even, cp_size=2, equal_shards=True, also=[LayerKind(None, 9)], **HEADS)
    key = cpattn.make_key(even, cp_group=dist.group.WORLD, plan=ready, **HEADS)
    assert key.num_tokens == key.with_mask(AttnMaskSpec.varlen([30, 30])).num_tokens == 30


def test_refusals():
    run_on_ranks(2, check_refusals)


def check_model() -> list[int]:
    """A model with windows in half of its layers; a batch whose tokens the ranks do not share equally is refused."""
    from cpattn.integrations.transformers import ContextParallel

    parallel = ContextParallel(make_model("gemma2", "cpattn"), dist.group.WORLD, equal_shards=True, check=False)
    eager = make_model("gemma2")
    sizes = []
    for seed in (0, 1):
        ids = torch.randint(3, 60, (2, 20), generator=torch.Generator().manual_seed(seed))
        out = parallel({"input_ids": ids, "labels": ids})
        torch.testing.assert_close(out.loss, eager(input_ids=ids, labels=ids).loss, rtol=1e-5, atol=1e-6)
        sizes.append(out.shard.key.num_tokens)
    with pytest.raises(ValueError, match="21 tokens are no multiple of 2 ranks: pad the sequence to 22"):
        parallel({"input_ids": torch.ones(1, 21, dtype=torch.long)})
    return sizes


def test_models_take_it():
    pytest.importorskip("transformers")
    assert run_on_ranks(2, check_model) == [[20, 20], [20, 20]]
