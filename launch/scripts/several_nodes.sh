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
# The node that has this address holds the meeting. torchrun asks the host's name only, which need not lead to the address.
here=$(HOST=${HOST:?a host that all nodes can reach} "$python" - <<'PY'
import os, socket
kind, _, _, _, address = socket.getaddrinfo(os.environ["HOST"], 0, type=socket.SOCK_STREAM)[0]
try:
    socket.socket(kind).bind(address)
    print(1)
except OSError:
    print(0)
PY
)
exec "$python" -m torch.distributed.run \
    --nnodes "${NODES:?how many nodes}" --nproc-per-node "$ranks" \
    --rdzv-backend c10d --rdzv-endpoint "$HOST:${PORT:-29400}" --rdzv-conf "is_host=$here" \
    --rdzv-id "${JOB:-cpattn}" ${ADDRESS:+--local-addr "$ADDRESS"} "$@"
