"""The README's program runs by the script to copy; the loss scale that docs/gradients.md gives for FSDP2 is right."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

from tests_dist.support.harness import run_on_ranks
from tests_dist.support.pages import python_of

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = ROOT / "launch" / "examples" / "quickstart.py"


def test_readme_shows_the_quickstart_file():
    assert python_of(ROOT / "README.md")[0].text == QUICKSTART.read_text()


def test_quickstart_runs_under_torchrun():
    script, environment = ROOT / "launch" / "scripts" / "one_node.sh", {"PYTHON": sys.executable, "RANKS": "2"}
    result = subprocess.run(
        ["bash", str(script), str(QUICKSTART)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr
    assert "out (15234, 8, 64)" in result.stdout
    assert "53,768,995 visible pairs" in result.stdout


def sharded_gradients() -> list[torch.Tensor]:
    """FSDP2's gradients of the loss that docs/gradients.md describes, and those of one rank."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard
    from torch.nn.functional import cross_entropy

    import cpattn

    seqlens = [70, 1, 57]
    tokens = torch.arange(sum(seqlens)) % 11

    def gradients(group: dist.ProcessGroup | None, scale: float) -> list[torch.Tensor]:
        torch.manual_seed(0)
        spec = cpattn.AttnMaskSpec.varlen(seqlens)
        key = cpattn.make_key(spec, num_heads_q=2, num_heads_kv=1, head_dim=8, cp_group=group, chunk_size=8)

        class Model(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.embedding, self.head = torch.nn.Embedding(11, 32), torch.nn.Linear(16, 11)

            def forward(self, tokens_T: torch.Tensor) -> torch.Tensor:
                q, k, v = self.embedding(tokens_T).unflatten(-1, (4, 8)).split([2, 1, 1], dim=1)
                return self.head(cpattn.attention(q, k, v, key).flatten(1))

        model = Model()
        if group is not None:
            fully_shard(model, mesh=dist.DeviceMesh("cpu", list(range(dist.get_world_size()))))
        local = cpattn.dispatch(tokens, key)
        logits, labels = model(local), cpattn.roll(local, key, shift=-1)
        (scale * cross_entropy(logits, labels, ignore_index=-100, reduction="sum") / 125).backward()
        found = [parameter.grad for parameter in model.parameters()]
        return found if group is None else [gradient.full_tensor() for gradient in found]

    one_rank = gradients(None, 1.0)
    for a, b in zip(gradients(dist.group.WORLD, dist.get_world_size()), one_rank, strict=True):
        torch.testing.assert_close(a, b)
    return one_rank


def test_fsdp2_mean_with_the_documented_scale_equals_one_rank():
    gradients = run_on_ranks(2, sharded_gradients)[0]
    assert all(gradient.abs().max() > 0 for gradient in gradients)
