#!/usr/bin/env bash
# Everything that needs no GPU: lint, types, tests. Makes .venv on the first run.
#
#     bash launch/test.sh [pytest arguments]        e.g. bash launch/test.sh tests_dist/solver -x
#
# PYTEST_ARGS is passed on too.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

CPATTN_EXTRAS=dev
source launch/venv.sh || exit 1
export PYTHON

failed=()
step() { # name, command...: run it, go on to the next whatever it says
    local name=$1
    shift
    printf '\n=== %s\n' "$name"
    "$@" || failed+=("$name")
}

read -ra more <<<"${PYTEST_ARGS:-}"
step ruff "$PYTHON" -m ruff check .
step mypy bash launch/typecheck.sh
# A worker for each core, at most four: each keeps ranks of its own, and a file's tests stay together.
workers=$("$PYTHON" -c 'import os; print(min(4, os.cpu_count() or 1))')
step pytest "$PYTHON" -m pytest -n "$workers" --dist loadfile -m "not gpu and not nightly" ${more[@]+"${more[@]}"} "$@"

if [ ${#failed[@]} -gt 0 ]; then
    printf '\nfailed: %s (after %d s)\n' "${failed[*]}" "$SECONDS"
    exit 1
fi
printf '\nall passed in %d s\n' "$SECONDS"
