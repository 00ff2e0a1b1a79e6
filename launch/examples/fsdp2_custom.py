"""A model of your own with FSDP2, the sequence of each replica spread over context-parallel ranks.

    torchrun --nproc-per-node 4 -m cpattn.launch.examples.fsdp2_custom --cp 2

No framework: the model takes a key next to its tokens and hands it to `cpattn.attention`; everything
else in it works token by token and need not know. Two replicas of two ranks train on packed documents;
parameters are sharded over all four.
"""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

import cpattn
from cpattn import AttnKey, AttnMaskSpec

VOCAB, WIDTH, HEADS = 64, 64, 4


class Block(nn.Module):
    """Attention over the whole sequence, and a token-wise MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.RMSNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor, key: AttnKey) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, HEADS, -1)).unbind(-3)
        x = x + self.out(cpattn.attention(q, k, v, key).flatten(-2))
        return x + self.mlp(x)


class Model(nn.Module):
    """Tokens [T_local] and their positions to logits [T_local, VOCAB]."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCAB, WIDTH), nn.Embedding(1024, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, ids: Tensor, positions: Tensor, key: AttnKey) -> Tensor:
        x = self.tokens(ids) + self.positions(positions)
        for block in self.blocks:
            x = block(x, key)
        return self.head(x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cp", type=int, default=2, help="ranks that share a sequence")
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size() // options.cp, options.cp), mesh_dim_names=("dp", "cp"))
    torch.manual_seed(0)
    model = Model()
    everyone = mesh["dp", "cp"]._flatten("dp_cp")
    for block in model.blocks:
        fully_shard(block, mesh=everyone)
    fully_shard(model, mesh=everyone)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(options.steps):
        # The same on the ranks of a replica, different for each replica.
        generator = torch.Generator().manual_seed(1000 * step + mesh.get_local_rank("dp"))
        lengths = torch.randint(20, 200, (4,), generator=generator).tolist()
        ids = torch.cat([(torch.arange(n) * 3 + n) % VOCAB for n in lengths])
        spec = AttnMaskSpec.varlen(lengths)
        key = cpattn.make_key(
            spec, num_heads_q=HEADS, num_heads_kv=HEADS, head_dim=WIDTH // HEADS, cp_group=mesh["cp"], chunk_size=16
        )
        local = cpattn.dispatch(ids, key)
        targets = cpattn.roll(local, key, fill_value=-100)  # the next token of the document, across the shards
        logits = model(local, cpattn.position_ids(key), key)
        count = (targets != -100).sum()
        dist.all_reduce(count)  # targets of all ranks and replicas
        loss = F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum") / count
        (loss * dist.get_world_size()).backward()  # FSDP2 averages over the ranks; the shares want a sum
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach()
        dist.all_reduce(total)
        if dist.get_rank() == 0:
            print(f"step {step:3d}  loss {total:.4f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
