#!/usr/bin/env bash
# One node: a script on as many ranks as it has GPUs, or RANKS of them.
#
#     bash one_node.sh train.py --its options
set -euo pipefail
python=${PYTHON:-python}
ranks=${RANKS:-$("$python" -c 'import torch; print(torch.cuda.device_count() or 1)')}
exec "$python" -m torch.distributed.run --standalone --nproc-per-node "$ranks" "$@"
