#!/usr/bin/env bash
# Tests and benchmarks on a machine with a GPU in under ten minutes, no network needed: uses the Python and the torch that
# are there ($PYTHON, else python3), plus any wheels in .whl/. Changes nothing in the checkout or in that Python.
#
#     bash launch/gpu.sh [--dry-run] [--fakes] [part ...]
#
# The whole path comes first, on torch's own kernels; then every backend in a process of its own, tests before rates; then,
# in the time that is left, more lengths and heads. A part that fails, crashes or runs out of time stops no other, and a
# wheel that does not install costs its own backend only. At its limit a part gets SIGINT, so that pytest says what it
# knows, and SIGKILL 5 s later. --dry-run says what would run, in which order, with which limits, and runs nothing. --fakes
# runs all of it on the CPU, on the stand-ins of tests_dist/support/fakes, to try this script out.
#
# Results go to ${OUT:-runs/gpu} as they come, four files: summary.txt (a line per part), log.txt (everything printed),
# kernels.jsonl and kernels.md (rates). TOTAL_S (default 570) bounds the whole run, and every limit shrinks with it.
# Exit status 1 if any part failed.
set -uo pipefail
dry='' fakes=''
while [[ ${1:-} == --* ]]; do
    case $1 in
        --dry-run) dry=1 ;;
        --fakes) fakes=1 ;;
        *) echo "unknown option $1 (--dry-run, --fakes)" >&2 && exit 2 ;;
    esac
    shift
done
chosen=("$@")
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

# Name, most seconds, and whether wheels are on the path: one that breaks must not reach torch's own kernels.
PARTS="
install                  40 -
paths                    90 -
kernels_triton           45 -
kernels_sdpa             40 -
kernels_flash_attn       35 wheels
kernels_cudnn            30 wheels
kernels_te               30 wheels
kernels_ffa              25 wheels
kernels_flex             40 -
kernels_reference        20 -
rates_triton             30 -
rates_sdpa               25 -
rates_flash_attn         30 wheels
rates_cudnn              25 wheels
rates_te                 15 wheels
rates_ffa                15 wheels
rates_flex               25 -
"
# Only in time that others left.
LEFTOVERS="triton sdpa flash_attn cudnn te ffa flex"
BUDGETED_S=570

root=$PWD
python=${PYTHON:-python3}
total_s=${TOTAL_S:-$BUDGETED_S}
seconds() { echo $((($1 * total_s + BUDGETED_S - 1) / BUDGETED_S)); } # of a limit in this run

if [ -n "$dry" ]; then
    sum=0
    while read -r name limit path; do
        [ -z "$name" ] && continue
        sum=$((sum + $(seconds "$limit")))
        printf '%-24s at most %3d s, %3d s so far%s\n' "$name" "$(seconds "$limit")" "$sum" "${path/#-/}"
    done <<<"${PARTS// wheels/ , with the wheels}"
    for name in $LEFTOVERS; do printf '%-24s in time that is left\n' "more_rates_$name"; done
    [ "$sum" -le "$total_s" ] || { echo "the limits are $sum s together, more than $total_s" && exit 1; }
    exit 0
fi

out=${OUT:-runs/gpu}
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 1
for file in summary.txt log.txt kernels.jsonl kernels.md; do : >"$out/$file"; done
work=$(mktemp -d) || exit 1
trap 'rm -rf "$work"' EXIT
mkdir -p "$work/source" "$work/site" "$work/wheels" "$work/run"
# In the background of a shell SIGINT is ignored, and Python leaves it so.
heed=()
env --default-signal=INT true 2>/dev/null && heed=(env --default-signal=INT)

say() { printf '%s\n' "$*" | tee -a "$out/log.txt"; }

limited() { # seconds, command...
    local most=$1
    shift
    timeout --signal=INT --kill-after="$(seconds 5)" "$most" ${heed[@]+"${heed[@]}"} "$@"
}

pip_into() { # folder, what...: no network, nothing else than what is named
    local folder=$1
    shift
    limited "$(seconds 15)" "$python" -m pip install -q --disable-pip-version-check --no-index --no-deps \
        --no-build-isolation --no-compile --target "$folder" "$@"
}

# Outside the checkout, where the folder cpattn/ would shadow the installed package and lose cpattn.solver.
install_package() {
    cp -r cpattn solver collectives launch docs pyproject.toml README.md LICENSE "$work/source/" || return 1
    pip_into "$work/site" "$work/source" && return 0
    say "pip could not install the package; copying its folders instead"
    rm -rf "$work/site/cpattn"
    cp -r cpattn "$work/site/cpattn" && cp -r solver collectives launch "$work/site/cpattn/"
}

install_wheels() {
    local wheel
    for wheel in "$root"/.whl/*.whl; do
        [ -e "$wheel" ] || continue
        if [ "$SECONDS" -ge "$(seconds 25)" ]; then
            say "not installed, out of time: $(basename "$wheel")"
            continue
        fi
        # Each into a folder of its own, so that half of one that fails does not stay.
        pip_into "$work/wheels/$(basename "$wheel" .whl)" "$wheel" || {
            say "could not install $(basename "$wheel")"
            rm -rf "$work/wheels/$(basename "$wheel" .whl)"
        }
    done
}

failures=0
part() { # name, limit in seconds, wheels or -, command...: only if it was chosen
    local name=$1 limit=$2 path=$work/site left=$((total_s - SECONDS)) start=$SECONDS status verdict said folder
    if [ ${#chosen[@]} -gt 0 ] && [[ " ${chosen[*]} " != *" $name "* ]]; then
        return
    fi
    if [ "$3" = wheels ]; then
        for folder in "$work"/wheels/*/; do [ -e "$folder" ] && path=$path:${folder%/}; done
    fi
    shift 3
    limit=$((limit < left - 5 ? limit : left - 5))
    if [ "$limit" -lt 1 ]; then
        verdict="not run: the $total_s s are used up" said=
        failures=$((failures + 1))
    else
        say "=== $name (at most $limit s)"
        : >"$work/part.txt"
        (cd "$work/run" && PYTHONPATH=$path${PYTHONPATH:+:$PYTHONPATH} limited "$limit" "$@") 2>&1 |
            tee -a "$out/log.txt" "$work/part.txt"
        status=${PIPESTATUS[0]}
        said=$(grep -E '^=+ .* in [0-9.]+s' "$work/part.txt" | tail -n 1 | tr -d =)
        case $status in
            0) verdict=passed && [[ "$said" == *skipped* && "$said" != *passed* ]] && verdict="refused" ;;
            5) verdict="nothing to run" ;; # pytest: no test was selected; rates: the backend refuses
            124 | 137) verdict="out of time" && failures=$((failures + 1)) ;;
            *) verdict="FAILED (exit status $status)" && failures=$((failures + 1)) ;;
        esac
    fi
    printf '%-24s %s, %d s   %s\n' "$name" "$verdict" "$((SECONDS - start))" "$said" |
        tee -a "$out/summary.txt" "$out/log.txt"
}

install_wheels >>"$out/log.txt" 2>&1
install_package >>"$out/log.txt" 2>&1 || {
    tail -n 20 "$out/log.txt"
    echo "could not install; see $out/log.txt"
    exit 1
}
cp -r tests_dist pyproject.toml "$work/run/"
export PYTHONUNBUFFERED=1

tests=("$python" -m pytest -v -p no:cacheprovider --durations=5 -m "gpu and not nightly")
rates=("$python" -m cpattn.launch.benchmarks.kernels --out "$out")
if [ -n "$fakes" ]; then
    export CPATTN_GPU_FAKES=1
    rates=("$python" -m tests_dist.support.fakes.installed cpattn.launch.benchmarks.kernels --out "$out" --device cpu --tokens 64)
fi

command_of() { # name, limit: sets `command`
    local name=$1 limit=$2
    case $name in
        paths) command=("${tests[@]}" tests_dist/gpu --ignore=tests_dist/gpu/test_kernels.py) ;;
        kernels_*) command=(env "CPATTN_GPU_BACKEND=${name#kernels_}" "${tests[@]}" tests_dist/gpu/test_kernels.py) ;;
        rates_*) command=("${rates[@]}" --backend "${name#rates_}" --budget-s "$((limit - limit / 10 - 1))") ;;
        more_rates_*) command=("${rates[@]}" --backend "${name#more_rates_}" --part lengths --budget-s "$((limit - limit / 10 - 1))") ;;
    esac
}

(
    nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader 2>/dev/null || echo "no nvidia-smi"
    cd "$work/run" && PYTHONPATH=$work/site limited "$(seconds 20)" "$python" -c 'import platform, torch, cpattn, cpattn.solver
print("Python", platform.python_version(), "torch", torch.__version__, "CUDA", torch.version.cuda, torch.cuda.is_available())
print("cpattn", cpattn.__version__, cpattn.__file__)'
) 2>&1 | tee -a "$out/log.txt"

while read -r name limit path <&3; do
    [[ -z "$name" || "$name" = install ]] && continue
    limit=$(seconds "$limit")
    command_of "$name" "$limit"
    part "$name" "$limit" "$path" "${command[@]}"
done 3<<<"$PARTS"
for name in $LEFTOVERS; do
    limit=$(seconds 30)
    [ "$((total_s - SECONDS))" -gt "$((limit + 5))" ] || break
    command_of "more_rates_$name" "$limit"
    part "more_rates_$name" "$limit" wheels "${command[@]}"
done

echo
cat "$out/summary.txt"
[ "$failures" -eq 0 ]
