"""The command: what to try, how often, from which seed."""

from __future__ import annotations

import argparse
import os
import sys

from .report import Sweep

KINDS = {
    "planner": "plans of random masks, replayed in one process (no ranks)",
    "ranks": "random masks on gloo ranks: out, lse, gradients, roll and positions against dense fp64",
    "options": "random options of keys and calls on gloo ranks, against dense fp64",
    "parse": "coverage-guided inputs of mask and hardware files and of command-line numbers (needs atheris)",
    "soak": "groups made and destroyed, runs killed: nothing is left behind",
}
CASES = {"planner": 1000, "ranks": 200, "options": 100, "parse": 50_000, "soak": 200}


def _arguments() -> argparse.Namespace:
    kinds = "\n".join(f"  {name:9}{text} (default {CASES[name]} cases)" for name, text in KINDS.items())
    parser = argparse.ArgumentParser(
        prog="python -m cpattn.launch.fuzz",
        description="Try random cases; a failure is printed with the command that repeats it. Exit code 1 if any.",
        epilog=f"kinds:\n{kinds}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("kind", choices=KINDS, metavar="|".join(KINDS))
    parser.add_argument("--cases", type=int, help="how many")
    parser.add_argument("--seed", type=int, default=0, help="the first seed; a case is its seed (default 0)")
    parser.add_argument("--jobs", type=int, default=1, help="processes of the planner sweep (0: one for each core)")
    parser.add_argument("--ranks", type=int, help="ranks and options: all cases on that many (default: in turn)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    arguments = parser.parse_args()
    arguments.cases = CASES[arguments.kind] if arguments.cases is None else arguments.cases
    for name, least in (("cases", 1), ("seed", 0), ("jobs", 0), ("ranks", 1)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            parser.error(f"--{name} is {value}: it must be at least {least}")
    return arguments


def _sweep(arguments: argparse.Namespace) -> Sweep:
    kind, cases, seed = arguments.kind, arguments.cases, arguments.seed
    again = f"python -m cpattn.launch.fuzz {kind} --cases 1 --seed {{seed}}"
    sweep = Sweep(kind, seed, again)

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    # Each imports what it needs: the planner sweep starts no ranks, and only one of them wants atheris.
    if kind == "planner":
        from . import planner

        sweep.run(planner.batches(cases, seed, arguments.jobs or os.cpu_count() or 1), say)
    elif kind in ("ranks", "options"):
        from . import on_ranks

        sweep.run(on_ranks.batches(kind, cases, seed, arguments.ranks), say)
    elif kind == "parse":
        from . import parse

        sweep.run(parse.batches(cases, seed, sweep.figures), say)
    else:
        from . import soak

        sweep.run(soak.batches(cases, seed, sweep.figures), say)
    return sweep


def main() -> int:
    arguments = _arguments()
    try:
        sweep = _sweep(arguments)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(sweep.to_json() if arguments.json else sweep.summary())
    return bool(sweep.failures)


if __name__ == "__main__":
    sys.exit(main())
