#!/usr/bin/env bash
# Does what is shipped install and work? Builds the wheel and the sdist of the last commit, and tries them in environments
# of other Pythons and versions of torch, without a compiler:
#
#     python3.10 -m venv old && old/bin/python -m pip install torch==2.11.0
#     bash launch/installs.sh old/bin/python [another/bin/python ...]
set -euo pipefail
here=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."

CPATTN_EXTRAS=dev
source launch/venv.sh
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/source" "$work/elsewhere"
git archive HEAD | tar x -C "$work/source"
"$PYTHON" -m build --outdir "$work/dist" "$work/source" >"$work/build.log" 2>&1 || { cat "$work/build.log"; exit 1; }
"$PYTHON" -m twine check --strict "$work"/dist/*

cd "$here"
for python in "$@"; do
    python=$(cd "$(dirname "$python")" && pwd)/$(basename "$python")
    (
        cd "$work/elsewhere" # where no folder of the checkout is found in the place of the package
        export CC=false CXX=false PIP_DISABLE_PIP_VERSION_CHECK=1
        "$python" -m pip install -q --no-deps --force-reinstall "$work"/dist/cpattn-*.tar.gz
        "$python" -m pip uninstall -q -y cpattn
        began=$SECONDS
        "$python" -m pip install -q "$(echo "$work"/dist/cpattn-*.whl)[cli,plot]"
        installed=$((SECONDS - began))
        "$python" -m pip check >/dev/null || "$python" -m pip check
        run() { "$python" -m cpattn.launch.cli "$@" >"$work/said" 2>&1 || { cat "$work/said"; exit 1; }; }
        run --version
        run plan --lengths 8K,3000,512 --ranks 4 --plot plan --html plan.html
        run check --lengths 300,200 --heads 4:2 --head-dim 16 --ranks 2
        run demo --steps 2 --tokens 1024 --out demo
        "$python" -c "import platform, torch; print('Python', platform.python_version(), 'torch', torch.__version__, end=': ')"
        echo "installed in $installed s, plan, check on 2 ranks and demo on 4 passed after $((SECONDS - began)) s"
    )
done
