# Source this from a script in the checkout:
#
#     CPATTN_EXTRAS=cli,plot
#     source launch/venv.sh || exit 1
#     "$PYTHON" -m ...
#
# It makes .venv with the first Python 3.10 or newer that can, installs this checkout in editable mode with the extras
# named in CPATTN_EXTRAS under constraints.txt, and sets PYTHON. A second run with nothing changed takes no time.
# CPATTN_PYTHON names the Python to use instead of searching. Nothing of the calling shell is changed but PYTHON.

_cpattn_say() { printf '[setup] %s\n' "$*" >&2; }

_cpattn_find_python() {
    local candidate
    # A name on the PATH may be a launcher with nothing behind it or an old version, so each is asked.
    for candidate in ${CPATTN_PYTHON:-python3 python3.12 python3.13 python3.11 python3.10 python3.14 python}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; then
            "$candidate" -c 'import sys; print(sys.executable)'
            return 0
        fi
    done
    _cpattn_say "no Python 3.10 or newer found (tried: ${CPATTN_PYTHON:-python3, python3.10 to python3.14});" \
        "install one, or name it: CPATTN_PYTHON=/path/to/python3.12"
    return 1
}

_cpattn_make_venv() {
    local base
    base=$(_cpattn_find_python) || return 1
    _cpattn_say "making .venv with $base ($("$base" -c 'import platform; print(platform.python_version())'))"
    rm -rf "$1/.venv"
    "$base" -m venv "$1/.venv" >/dev/null 2>&1 && return 0
    rm -rf "$1/.venv"
    # Debian ships venv in a package of its own; virtualenv and uv do without it.
    "$base" -m virtualenv -q "$1/.venv" 2>/dev/null && return 0
    uv venv -q --seed --python "$base" "$1/.venv" 2>/dev/null && return 0
    rm -rf "$1/.venv"
    _cpattn_say "$base cannot make a virtual environment: install its venv module (Debian, Ubuntu: apt install" \
        "python3-venv), or name another Python: CPATTN_PYTHON=/path/to/python3.12"
    return 1
}

# The stamp: one line for what was installed from, then the extras installed so far.
_cpattn_fingerprint() {
    (cd "$1" && { pwd; cat pyproject.toml constraints.txt; }) | cksum
}

_cpattn_setup() {
    local root stamp wanted have extra fingerprint missing=
    root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd) || return 1
    stamp=$root/.venv/cpattn-stamp
    PYTHON=$root/.venv/bin/python
    wanted=$(tr ', ' '\n\n' <<<"${CPATTN_EXTRAS:-}" | sed '/^$/d' | sort -u)
    fingerprint=$(_cpattn_fingerprint "$root") || return 1
    have=
    if "$PYTHON" -c '' 2>/dev/null && [ -f "$stamp" ] && [ "$(head -n 1 "$stamp")" = "$fingerprint" ]; then
        have=$(tail -n +2 "$stamp")
        for extra in $wanted; do
            case $extra in cli | plot | test) grep -qx dev <<<"$have" && continue ;; esac # dev includes these
            grep -qx "$extra" <<<"$have" || missing=1
        done
        [ -z "$missing" ] && return 0
    elif ! "$PYTHON" -c '' 2>/dev/null || ! grep -qxF "$root" "$root/.venv/cpattn-home" 2>/dev/null; then
        _cpattn_make_venv "$root" || return 1  # none yet, broken, or copied along with the checkout
        printf '%s\n' "$root" >"$root/.venv/cpattn-home"
    fi
    wanted=$(printf '%s\n%s\n' "$have" "$wanted" | sed '/^$/d' | sort -u)
    rm -f "$stamp"
    _cpattn_say "installing cpattn${wanted:+ with the extras $(paste -sd, <<<"$wanted")} into .venv" \
        "(the first time this takes a few minutes: torch is large)"
    PIP_DISABLE_PIP_VERSION_CHECK=1 "$PYTHON" -m pip install \
        -c "$root/constraints.txt" -e "$root${wanted:+[$(paste -sd, <<<"$wanted")]}" >&2 || {
        _cpattn_say "the installation failed; the lines above say why"
        return 1
    }
    printf '%s\n%s\n' "$fingerprint" "$wanted" >"$stamp"
    _cpattn_say "ready: $("$PYTHON" -c 'import sys, torch; print("Python", sys.version.split()[0], "torch", torch.__version__)')"
}

_cpattn_setup
