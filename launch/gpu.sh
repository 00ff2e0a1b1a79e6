#!/usr/bin/env bash
# Tests and benchmarks on a machine with a GPU, no network needed: uses the Python and the torch that are there
# ($PYTHON, else python3), plus any wheels in .whl/. Changes nothing in the checkout or in that Python.
#
#     bash launch/gpu.sh [part ...]       parts: kernels ranks <benchmark module>; default: all, most valuable first
#
# Each part has a time limit, and one that fails or runs out of time does not stop the next. Results go to ${OUT:-runs/gpu}
# as they come: summary.txt (a line per part), log.txt (everything printed), and what the benchmarks write there.
# TOTAL_S bounds the whole run (default 570 s). Exit status 1 if any part failed.
#
# A benchmark joins by its name: launch/benchmarks/gpu_*.py is run as a module with `--out DIR`, in alphabetical order.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

root=$PWD
python=${PYTHON:-python3}
out=${OUT:-runs/gpu}
total_s=${TOTAL_S:-570}
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 1
: >"$out/summary.txt"
: >"$out/log.txt"
work=$(mktemp -d) || exit 1
trap 'rm -rf "$work"' EXIT
site=$work/site

say() { printf '%s\n' "$*" | tee -a "$out/log.txt"; }

# Outside the checkout, where the folder cpattn/ would shadow the installed package and lose cpattn.solver.
install_package() {
    mkdir -p "$work/source" "$site"
    cp -r cpattn solver collectives launch pyproject.toml README.md LICENSE "$work/source/" || return 1
    "$python" -m pip install -q --disable-pip-version-check --no-index --no-deps --no-build-isolation \
        --target "$site" "$work/source" && return 0
    say "pip could not install the package; copying its folders instead"
    rm -rf "$site/cpattn"
    cp -r cpattn "$site/cpattn" && cp -r solver collectives launch "$site/cpattn/"
}

install_wheels() {
    local wheels=("$root"/.whl/*.whl)
    [ -e "${wheels[0]}" ] || return 0
    say "installing ${#wheels[@]} wheels from .whl/"
    "$python" -m pip install -q --disable-pip-version-check --no-index --no-deps --no-compile \
        --target "$site" "${wheels[@]}"
}

failures=0
part() { # name, limit in seconds, command...
    local name=$1 limit=$2 left=$((total_s - SECONDS)) start=$SECONDS status verdict
    shift 2
    : >"$work/part.txt"
    if [ ${#chosen[@]} -gt 0 ] && [[ " ${chosen[*]} " != *" $name "* ]]; then
        return
    fi
    if [ "$left" -lt 15 ]; then
        verdict="not run: the $total_s s are used up"
        failures=$((failures + 1))
    else
        say "=== $name (at most $((limit < left ? limit : left)) s)"
        (cd "$work/run" && timeout --kill-after=10 "$((limit < left ? limit : left))" "$@") 2>&1 |
            tee -a "$out/log.txt" "$work/part.txt"
        status=${PIPESTATUS[0]}
        case $status in
            0) verdict=passed ;;
            5) verdict="nothing to run" ;; # pytest: no test was selected
            124 | 137) verdict="out of time" && failures=$((failures + 1)) ;;
            *) verdict="FAILED (exit status $status)" && failures=$((failures + 1)) ;;
        esac
    fi
    printf '%-28s %s, %d s   %s\n' "$name" "$verdict" "$((SECONDS - start))" \
        "$(grep -E '^=+ .* in [0-9.]+s' "$work/part.txt" | tail -n 1 | tr -d =)" |
        tee -a "$out/summary.txt" "$out/log.txt"
}

chosen=("$@")
{ install_wheels && install_package; } >>"$out/log.txt" 2>&1 || {
    tail -n 20 "$out/log.txt"
    echo "could not install; see $out/log.txt"
    exit 1
}
mkdir "$work/run"
cp -r tests_dist pyproject.toml "$work/run/"
export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1

(
    cd "$work/run" || exit
    nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader 2>/dev/null || echo "no nvidia-smi"
    "$python" -c 'import platform, torch, cpattn, cpattn.solver
print("Python", platform.python_version(), "torch", torch.__version__, "CUDA", torch.version.cuda, torch.cuda.is_available())
print("cpattn", cpattn.__version__, cpattn.__file__)'
) 2>&1 | tee -a "$out/log.txt"

pytest=("$python" -m pytest -v -p no:cacheprovider --durations=10 -m "gpu and not nightly")
part kernels 240 "${pytest[@]}" tests_dist/gpu
part ranks 240 "${pytest[@]}" tests_dist --ignore=tests_dist/gpu
for file in launch/benchmarks/gpu_*.py; do
    [ -e "$file" ] || continue
    name=$(basename "$file" .py)
    part "$name" 240 "$python" -m "cpattn.launch.benchmarks.$name" --out "$out"
done

echo
cat "$out/summary.txt"
[ "$failures" -eq 0 ]
