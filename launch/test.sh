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
# Hundreds of processes are started, and each would compile the package again.
unset PYTHONDONTWRITEBYTECODE

failed=()
step() { # name, command...: run it, go on to the next whatever it says
    local name=$1
    shift
    printf '\n=== %s\n' "$name"
    "$@" || failed+=("$name")
}

read -ra more <<<"${PYTEST_ARGS:-}"
step ruff "$PYTHON" -m ruff check .
# mypy keeps one core busy while pytest starts; what it says comes last.
types=$(mktemp)
trap 'rm -f "$types"; kill "$mypy" 2>/dev/null' EXIT
bash launch/typecheck.sh >"$types" 2>&1 &
mypy=$!
# A worker for each core, at most four: each keeps ranks of its own. Files come in one piece until a worker has nothing
# left: then it takes half of what waits at another.
workers=$("$PYTHON" -c 'import os; print(min(4, os.cpu_count() or 1))')
step pytest "$PYTHON" -m pytest -n "$workers" --dist worksteal -m "not gpu and not nightly" ${more[@]+"${more[@]}"} "$@"
wait "$mypy"
typed=$?
step mypy eval 'cat "$types"; [ "$typed" = 0 ]'

if [ ${#failed[@]} -gt 0 ]; then
    printf '\nfailed: %s (after %d s)\n' "${failed[*]}" "$SECONDS"
    exit 1
fi
printf '\nall passed in %d s\n' "$SECONDS"
