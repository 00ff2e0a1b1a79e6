#!/usr/bin/env bash
# Several nodes: the same command on each, by hand or by whatever starts programs on your nodes. They meet at a host that all
# can reach (torchrun's c10d rendezvous); which of them is first does not matter, and node numbers need not be given.
#
#     NODES=2 HOST=node-a bash several_nodes.sh train.py --its options
#
# RANKS: on each node (default: its GPUs). PORT: of the rendezvous. JOB: a name, where several jobs meet at one host.
# Where a node has several networks, GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME name the one to use.
set -euo pipefail
python=${PYTHON:-python}
ranks=${RANKS:-$("$python" -c 'import torch; print(torch.cuda.device_count() or 1)')}
exec "$python" -m torch.distributed.run \
    --nnodes "${NODES:?how many nodes}" --nproc-per-node "$ranks" \
    --rdzv-backend c10d --rdzv-endpoint "${HOST:?a host that all nodes can reach}:${PORT:-29400}" \
    --rdzv-id "${JOB:-cpattn}" ${ADDRESS:+--local-addr "$ADDRESS"} "$@"
