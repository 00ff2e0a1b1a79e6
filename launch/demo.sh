#!/usr/bin/env bash
# The main job: trains a small transformer with its sequence spread over ranks, then on one rank without cpattn, and
# compares. Makes .venv on the first run. Pictures and records go to runs/demo.
#
#     bash launch/demo.sh [--data FOLDER] [--steps N] [--tokens N] [--ranks N] [--seed N] [--out FOLDER] [--help]
set -uo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd) || exit 1

CPATTN_EXTRAS=cli,plot
source "$root/launch/venv.sh" || exit 1

# Paths in the arguments are the caller's; the default output folder is the checkout's.
exec "$PYTHON" -m cpattn.launch.demo --out "$root/runs/demo" "$@"
