# torchrun --standalone --nproc-per-node 4 quickstart.py
import torch
import torch.distributed as dist

import cpattn

dist.init_process_group("gloo")
torch.manual_seed(0)  # the same data on every rank
spec = cpattn.AttnMaskSpec.varlen([5000, 1234, 9000])  # three packed documents, each causal
key = cpattn.make_key(spec, num_heads_q=8, num_heads_kv=2, head_dim=64, cp_group=dist.group.WORLD)
q, k, v = (torch.randn(spec.total_seqlen, heads, 64, requires_grad=True) for heads in (8, 2, 2))
q_local, k_local, v_local = (cpattn.dispatch(x, key) for x in (q, k, v))  # this rank's rows
out_local = cpattn.attention(q_local, k_local, v_local, key)  # exact: sees the keys of all ranks
(out_local.square().sum() / spec.total_seqlen).backward()  # this rank's part of the loss
out = cpattn.undispatch(out_local, key)  # all rows, on every rank
if dist.get_rank() == 0:
    print(f"out {tuple(out.shape)}\n{key.describe(torch.float32)}")
dist.destroy_process_group()
