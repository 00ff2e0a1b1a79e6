"""One rank of a launcher: runs a module as `python -m` does, and dies with the process that started it from the outset.

    python -m cpattn.launch.rank MODULE [arguments]

torchrun starts its ranks without a word to the kernel, and importing torch takes seconds: a rank whose agent is killed
meanwhile would be left behind, were it the module's own business to ask. This one asks before it imports anything.
"""

from __future__ import annotations

import runpy
import sys

from .torchrun import die_with_parent


def main() -> None:
    die_with_parent()
    _, module, *sys.argv[1:] = sys.argv
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
