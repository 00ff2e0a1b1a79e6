#!/usr/bin/env bash
# The heavy sweeps: tests marked `nightly`, which other runs leave out.
#
#     bash launch/nightly.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

CPATTN_EXTRAS=dev
source launch/venv.sh || exit 1
exec "$PYTHON" -m pytest -m "nightly and not gpu" --timeout=3600 --durations=20 "$@"
