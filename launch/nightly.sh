#!/usr/bin/env bash
# The heavy sweeps: tests marked `nightly`, which other runs leave out; all property tests with many more examples; and
# random cases of every kind (`python -m cpattn.launch.fuzz`), from another seed each night.
#
#     bash launch/nightly.sh                        everything, some hours
#     bash launch/nightly.sh [pytest arguments]     tests alone
#
# FUZZ_SEED=N repeats the random cases of another night.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

CPATTN_EXTRAS=dev,fuzz
source launch/venv.sh || exit 1
status=0
"$PYTHON" -m pytest -m "(nightly or hypothesis) and not gpu" --timeout=3600 --durations=20 "$@" || status=1
[ $# -gt 0 ] && exit $status

seed=${FUZZ_SEED:-$(date +%Y%m%d)000000}
for sweep in "planner --cases 100000 --jobs 0" "ranks --cases 2000" "options --cases 1000" "parse --cases 1000000" \
    "soak --cases 200"; do
    read -ra arguments <<<"$sweep"
    "$PYTHON" -m cpattn.launch.fuzz "${arguments[@]}" --seed "$seed" || status=1
done
exit $status
