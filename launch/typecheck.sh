#!/usr/bin/env bash
# Runs mypy over the package. The folders solver/, collectives/ and launch/ are sub-packages of cpattn only once
# installed, and mypy does not follow that mapping in a checkout; so it is given a tree of links laid out like the
# installed package. Error lines name the files where they are in the checkout.
#
#     bash launch/typecheck.sh [mypy options]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
root=$PWD
python=${PYTHON:-$root/.venv/bin/python}
tree=$root/.mypy_cache/tree

rm -rf "$tree"
mkdir -p "$tree/cpattn"
for entry in "$root"/cpattn/*; do
    [ "${entry##*/}" = __pycache__ ] || ln -s "$entry" "$tree/cpattn/"
done
ln -s "$root/solver" "$root/collectives" "$root/launch" "$tree/cpattn/"

cd "$tree" # mypy looks in the working directory first, and in the checkout it would find the bare cpattn/
"$python" -m mypy --config-file "$root/pyproject.toml" --cache-dir "$root/.mypy_cache/cache" \
    -p cpattn "$@" |
    sed -E 's#^cpattn/(solver|collectives|launch)/#\1/#'
