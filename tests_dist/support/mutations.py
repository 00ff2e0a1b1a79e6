"""Faults planted one by one, to see that the default suite finds them.

    python -m tests_dist.support.mutations [--list] [--jobs N] [id ...]

Each mutation is made in a copy of the checkout, and the tests that should notice run there. A text that no longer
occurs exactly once is an error, not a pass: whoever moves the code moves the mutation. Exit code 1 if one that is to be
caught survives, or is gone.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Queue

ROOT = Path(__file__).parents[2]
FOLDERS = ("cpattn", "solver", "collectives", "launch", "tests_dist")
LIMIT_S = 900.0

# First in sys.meta_path of every process that runs in the copy, before an editable install of the checkout.
_FINDER = """
import importlib.util, sys
class Copy:
    @staticmethod
    def find_spec(name, path=None, target=None):
        folder = {{"cpattn": "cpattn", "cpattn.solver": "solver", "cpattn.collectives": "collectives",
                  "cpattn.launch": "launch"}}.get(name)
        if folder:
            at = {root!r} + "/" + folder
            return importlib.util.spec_from_file_location(name, at + "/__init__.py", submodule_search_locations=[at])
sys.meta_path.insert(0, Copy)
"""


@dataclass(frozen=True, slots=True)
class Mutation:
    """One fault.

    where: the file or folder in which `old` occurs exactly once. old, new: text (where it spans lines, with their
    indentation). breaks: in words. tests: pytest's arguments. equivalent: why no test can see it, if none can.
    """

    where: str
    old: str
    new: str
    breaks: str
    tests: str
    equivalent: str = ""

    def file(self, root: Path) -> Path:
        """The file that has the text.

        Raises:
            LookupError: none has, or it occurs more than once.
        """
        place = root / self.where
        files = [place] if place.is_file() else sorted(place.rglob("*.py"))
        found = [(path, path.read_text().count(self.old)) for path in files]
        found = [(path, count) for path, count in found if count]
        if [count for _, count in found] != [1]:
            times = {str(path.relative_to(root)): count for path, count in found}
            raise LookupError(f"{self.old!r} occurs {times or 'nowhere'} in {self.where}: it must occur once")
        return found[0][0]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the tests said: "caught", "survived", "gone" (no such text), or "broken" (pytest did not run to an end)."""

    name: str
    result: str
    seconds: float
    details: str

    @property
    def wrong(self) -> bool:
        """Whether it is not what the table says."""
        return self.result != ("survived" if MUTATIONS[self.name].equivalent else "caught")


def try_mutation(name: str, tree: Path) -> Outcome:
    """Plant one fault in a copy of the checkout, run its tests there, and take it out again."""
    mutation, start = MUTATIONS[name], time.monotonic()
    try:
        path = mutation.file(tree)
    except LookupError as error:
        return Outcome(name, "gone", 0.0, str(error))
    before = path.read_text()
    path.write_text(before.replace(mutation.old, mutation.new))
    try:
        result, details = _run_tests(tree, mutation.tests.split(" ", 1))
    finally:
        path.write_text(before)
    return Outcome(name, result, time.monotonic() - start, details)


def copy_checkout(to: Path) -> Path:
    """The folders that tests need, and a finder that imports the package from there."""
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, to / folder, ignore=shutil.ignore_patterns("__pycache__", "results"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, to / name)
    (to / "site").mkdir()
    (to / "site" / "sitecustomize.py").write_text(_FINDER.format(root=str(to)))
    return to


def _run_tests(tree: Path, arguments: list[str]) -> tuple[str, str]:
    files, *selection = arguments
    command = [sys.executable, "-B", "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", files]
    command += ["-k", selection[0]] if selection else []
    environment = {**os.environ, "PYTHONPATH": str(tree / "site"), "PYTHONDONTWRITEBYTECODE": "1"}
    where = "import cpattn.solver as s, cpattn as c; print(c.__file__, s.__file__)"
    places = subprocess.run(
        [sys.executable, "-c", where], cwd=tree, env=environment, capture_output=True, text=True, check=True
    ).stdout
    assert places.split() == [f"{tree}/{name}/__init__.py" for name in ("cpattn", "solver")], places
    try:
        done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        return "caught", f"no end within {LIMIT_S:g} s"
    failed = re.findall(r"^FAILED (\S+)", done.stdout, re.MULTILINE)
    if done.returncode == 1 and failed:
        return "caught", failed[0]
    if done.returncode == 0:
        return "survived", done.stdout.strip().splitlines()[-1]
    return "broken", (done.stdout + done.stderr)[-2000:]


def try_all(names: Iterable[str], jobs: int = 1) -> list[Outcome]:
    """Outcomes in the order of the names; prints each as it is known."""
    with tempfile.TemporaryDirectory(prefix="mutations-") as folder:
        trees: Queue[Path] = Queue()
        for number in range(jobs):
            trees.put(copy_checkout(Path(folder, str(number)).resolve()))

        def one(name: str) -> Outcome:
            tree = trees.get()
            try:
                outcome = try_mutation(name, tree)
            finally:
                trees.put(tree)
            mark = "  <-- not as the table says" if outcome.wrong else ""
            print(f"{name:4} {outcome.result:9}{outcome.seconds:6.0f} s  {outcome.details}{mark}", flush=True)
            return outcome

        with ThreadPoolExecutor(jobs) as pool:
            return list(pool.map(one, names))


def main() -> int:
    parser = argparse.ArgumentParser(description="Plant faults and see whether the tests notice.")
    parser.add_argument("names", nargs="*", metavar="id", help="mutations to try; default: all")
    parser.add_argument("--list", action="store_true", help="print the table and stop")
    parser.add_argument("--jobs", type=int, default=1, help="mutations tried at once (default 1)")
    args = parser.parse_args()
    unknown = sorted(set(args.names) - set(MUTATIONS))
    if unknown:
        parser.error(f"no mutations {', '.join(unknown)}: use {', '.join(MUTATIONS)}")
    names = args.names or list(MUTATIONS)
    if args.list:
        for name in names:
            print(f"{name:4} {MUTATIONS[name].where:28} {MUTATIONS[name].breaks}")
        return 0
    outcomes = try_all(names, args.jobs)
    caught = sum(outcome.result == "caught" for outcome in outcomes)
    wrong = [outcome.name for outcome in outcomes if outcome.wrong]
    print(f"{caught} of {len(outcomes)} caught" + (f"; not as the table says: {', '.join(wrong)}" if wrong else ""))
    return bool(wrong)


SOLVER, RANKS, BACKENDS = "tests_dist/solver/test_", "tests_dist/ranks/test_", "tests_dist/backends/test_"
FUSED = "tests_dist/compat/te_ops/test_fused_attn.py"

MUTATIONS: dict[str, Mutation] = {
    # ---- slices, plans
    "s1": Mutation(
        "solver/slices.py", "keys_start - rows_end + 1", "keys_start - rows_end + 2",
        "canonical(): lower edge of the band clamped one diagonal too high", f"{SOLVER}slices.py",
    ),
    "s2": Mutation(
        "solver/union.py", "(*_WITHIN, (HI, LO, -1))", "(*_WITHIN, (HI, LO, 0))",
        "difference keeps a diagonal of what it takes away: pairs twice", f"{SOLVER}slices.py",
    ),
    "s3": Mutation(
        "solver/routes.py", "np.flatnonzero(low < high)", "np.flatnonzero(low <= high)",
        "routes without rows in stages that have none of theirs", f"{SOLVER}routes.py",
    ),
    "s4": Mutation(
        "solver/schedule.py", "k_cost * shared_keys <= q_cost * shared_queries",
        "q_cost * shared_keys <= k_cost * shared_queries", "tiles cut by the costs of the other side",
        f"{SOLVER}schedule.py",
    ),
    "s5": Mutation(
        "solver/rounds.py", "a >= keys - 1)", "a >= keys - 2)",
        "a document longer than the window by one joins it", f"{BACKENDS}rounds.py",
    ),
    "s6": Mutation(
        "solver/rounds.py", "if end <= q0[i] and", "if end <= q0[i] + 1 and",
        "slices of one round share a query row", f"{BACKENDS}rounds.py",
    ),
    "s7": Mutation(
        "solver/kernel_tiles.py", "if first and square <= SMALL_SQUARE", "if square <= SMALL_SQUARE",
        "a masked tile where a plain causal square would do", f"{SOLVER}kernel_tiles.py", "the same pairs, slower",
    ),
    "s8": Mutation(
        "solver/head_split.py", "step = math.gcd(*runs.tolist())", "step = int(runs.max())",
        "groups cut into runs of unequal length share a key head", f"{RANKS}head_sharding.py heads_are_shared",
    ),
    "n1": Mutation(
        "solver/routes.py", "(nth >= 0) & (placement.owners[run] == needed.ranks)", "nth >= 0",
        "rows of another rank counted as owned", f"{SOLVER}routes.py",
    ),
    "n2": Mutation(
        "solver/plan.py", "if relays else (num_stages, ranks_per_node)", "if relays else (num_stages, 1)",
        "fingerprints do not tell plans for other nodes apart", f"{SOLVER}plan.py fingerprint",
    ),
    "n3": Mutation(
        "solver/slices.py", "np.maximum(end, q0)", "np.maximum(end + 1, q0)",
        "areas before a query count one row too many", f"{SOLVER}slices.py",
    ),
    "n4": Mutation(
        "solver/slices.py", "- 1 - shift) == self.areas", "- 1 - shift) >= self.areas",
        "neighbours joined over a gap: pairs that nobody may see", f"{SOLVER}slices.py",
    ),
    "n5": Mutation(
        "solver/head_split.py", "sum(len(other.kv) for other in parts) - len(part.kv)",
        "sum(len(other.kv) for other in parts)", "a part pays for its own key heads", f"{RANKS}head_sharding.py bytes",
    ),
    # ---- masks
    "m1": Mutation(
        "cpattn/masks", "np.diff(positions, axis=1) != 1", "np.diff(positions, axis=1) < 1",
        "a gap in positions does not start a document", "tests_dist/masks/test_mask_spec.py hand",
    ),
    "n6": Mutation(
        "cpattn/masks", "q_shift - k_shift", "k_shift - q_shift",
        "a window over a prefix tree is off by twice the distance of the nodes", "tests_dist/masks/test_mask_spec.py",
    ),
    # ---- collectives
    "c1": Mutation(
        "collectives", "rows[1].fill_(-torch.inf)", "rows[1].fill_(0.0)",
        "relayed lse totals start at 0", f"{RANKS}exactness.py two_levels",
    ),
    "c2": Mutation(
        "collectives/exchange.py", "if group is None or not exchange.active:",
        "if group is None or not (received.numel() or send.numel()):",
        "a rank without rows skips the collective, and the others wait", f"{RANKS}collectives.py take_part",
    ),
    "c3": Mutation(
        "collectives/merge.py", ".nan_to_num_(nan=0.0)", "",
        "two blind rows merge to NaN", f"{RANKS}collectives.py merge",
    ),
    "c4": Mutation(
        "collectives/heads.py", "dtype=torch.promote_types(like.dtype, torch.float32)", "dtype=like.dtype",
        "gradients of shared heads summed in bf16", f"{RANKS}collectives.py heads",
    ),
    "c5": Mutation(
        "collectives", ".clamp_(1, 253)", ".clamp_(0, 254)",
        "scales of 8-bit rows without a finite, normal inverse", f"{RANKS}fp8_wire.py subnormals",
    ),
    "n7": Mutation(
        "collectives/packing.py", "(-_row_bytes(shape, dtype) // multiple) * multiple", "(-_row_bytes(shape, dtype))",
        "packed tensors not aligned", f"{BACKENDS}row_kernels.py packing_copies",
    ),
    "n8": Mutation(
        "collectives/exchange.py", "_reduce_rows(totals, into, index, op)", "pass",
        "gradients from the own node lost on two levels", f"{RANKS}collectives.py two_hops",
    ),
    "h1": Mutation(
        "collectives/exchange.py", "self._held += [self._sending, self._then]", "pass",
        "what queued hops use freed before they are made", f"{RANKS}collectives.py two_hops",
    ),
    "n9": Mutation(
        "collectives/exchange.py", "incoming[rank].copy_(outgoing[rank])", "pass",
        "rows that a rank sends itself lost point to point", f"{RANKS}transports.py",
    ),
    "r1": Mutation(
        "collectives/exchange.py", "view.index_copy_(0, relay.landed_at, came.index_select(0, relay.landed))", "pass",
        "rows that are passed on are not those that came", f"{RANKS}relays.py",
    ),
    "r2": Mutation(
        "solver/relays.py", "rest = (self.starts + passed)", "rest = self.starts + 0 * passed",
        "rows that travel on go to all at once as well", f"{SOLVER}relays.py",
    ),
    "r3": Mutation(
        "solver/relays.py", "busy = (load > room)", "busy = (load > 2 * room)",
        "who sends less than twice what the busiest takes is not relieved", f"{SOLVER}relays.py",
    ),
    # ---- runtime, ops
    "e1": Mutation(
        "cpattn/runtime", "lse.masked_fill(lse == -torch.inf, torch.inf)", "lse.clone()",
        "kernels get lse -inf in backward", f"{BACKENDS}conformance.py minus_infinity",
    ),
    "e2": Mutation(
        "cpattn/runtime", "topk(min(3, dout.shape[-1])", "topk(min(1, dout.shape[-1])",
        "delta rounded to 16 bits where queries travel", f"{RANKS}transforms.py saturated",
    ),
    "e3": Mutation(
        "cpattn/runtime", "while len(self._pending) >= self._num_hops:", "while len(self._pending) > self._num_hops:",
        "one more gradient exchange in flight: memory", f"{RANKS}memory.py in_flight",
    ),
    "n10": Mutation(
        "cpattn/runtime", ".masked_fill_(total == -torch.inf, 0)", "",
        "NaN where a row sees nothing and the sink is -inf", f"{RANKS}runtime.py sink",
    ),
    "a1": Mutation(
        "cpattn/ops", "sink[sharding.part.first : sharding.part.last]", "sink[: sharding.part.num_q]",
        "every part of a block gets the sinks of the first heads", f"{RANKS}head_sharding.py everything",
    ),
    "a2": Mutation(
        "cpattn/runtime", "- lse_TN).masked_fill(lse_TN == -torch.inf, 0)", "- lse_TN)",
        "gradient of a sink of -inf is NaN with blind rows", f"{RANKS}runtime.py sink",
    ),
    "n11": Mutation(
        "cpattn/ops", "(-q_TND, -scale) if scale < 0", "(q_TND, -scale) if scale < 0",
        "a negative scale taken for its magnitude", f"{RANKS}runtime.py softmax_scale",
    ),
    "n12": Mutation(
        "cpattn/ops", "t if t.dtype == torch.float64 else t.to(dtype)", "t.to(dtype)",
        "autocast takes fp64 inputs too", f"{RANKS}training.py autocast",
    ),
    "l1": Mutation(
        "cpattn/ops/layout.py", "torch.promote_types(grad.dtype, torch.float32)", "grad.dtype",
        "undispatch's backward sums in the gradient's dtype", f"{RANKS}layout.py",
    ),
    "l2": Mutation(
        "cpattn/ops/layout.py", ", make).clone()", ", make)",
        "position_ids hands out the cached tensor", f"{RANKS}layout.py",
    ),
    "n13": Mutation(
        "cpattn/ops/layout.py", "starts[document] + max(shift, 0)", "starts[document]",
        "roll to the right brings rows of the document before", f"{RANKS}layout.py roll",
    ),
    "n14": Mutation(
        "cpattn/ops/layout.py", " + first[document])", ")",
        "positions of a branch begin at 0", f"{RANKS}layout.py positions",
    ),
    "k2": Mutation(
        "cpattn/keys", "_replace(heads=heads, degree", "_replace(heads=heads, layer_plans=(), degree",
        "with_heads loses the plans of the other masks", f"{RANKS}key.py",
    ),
    "g1": Mutation(
        "cpattn/runtime/identity.py", "first, *others = present", "*others, first = present",
        "ranks compare with the last rank and name the wrong ones", f"{RANKS}identity.py",
    ),
    # ---- decoding
    "k1": Mutation(
        "cpattn/decoding", "<= position - self.window:", "<= position - self.window + 1:",
        "a page of the cache dropped one token too early", f"{RANKS}kv_cache.py decoding_equals",
    ),
    "n15": Mutation(
        "cpattn/decoding", "position_BS[:, None] > queries_BM[", "position_BS[:, None] >= queries_BM[",
        "a window of decoding one key too wide", f"{RANKS}kv_cache.py decoding_equals",
    ),
    "n16": Mutation(
        "cpattn/decoding", "scores = softcap * torch.tanh(scores / softcap)", "scores = torch.tanh(scores / softcap)",
        "decoding caps scores at 1", f"{RANKS}kv_cache.py decoding_equals",
    ),
    # ---- kernels
    "b1": Mutation(
        "cpattn/backends/sdpa_cpu.py", " and (count == 1 or abs(q_step) >= first.q1 - first.q0)", "",
        "tiles of one call over the same rows overwrite each other", f"{BACKENDS}conformance.py sdpa",
    ),
    "b2": Mutation(
        "cpattn/backends/reference.py", "ds = ds * slope", "ds = ds * 1",
        "no derivative of the softcap", f"{BACKENDS}conformance.py softcap",
    ),
    "n17": Mutation(
        "cpattn/backends/rows.py", "flags.append(not _overlaps(spans, mine))", "flags.append(not spans)",
        "only the first call of a kernel counts as the first writer", f"{BACKENDS}rounds.py first_writers",
    ),
    # ---- compatibility, integrations
    "t1": Mutation(
        "cpattn/te_ops/dense.py", "torch.full((q_QND.shape[1],), -torch.inf", "torch.full((q_QND.shape[1],), 0.0",
        "the largest logit is never below 0", f"{FUSED} negative",
    ),
    "n18": Mutation(
        "cpattn/te_ops", "((k.length - q.length) if bottom_right else 0)", "(k.length - q.length)",
        "top-left causal masks aligned bottom-right", f"{FUSED} equals_the_contract",
    ),
    "n19": Mutation(
        "cpattn/te_ops/dense.py", "return keep.to(p.dtype) / (1 - extras.dropout)", "return keep.to(p.dtype)",
        "dropout without its factor", f"{FUSED} drop",
    ),
    "i1": Mutation(
        "cpattn/integrations/batch_layout.py", "if layout.explicit:\n        goes_on", "if False:\n        goes_on",
        "labels cross documents of an explicit mask", f"{RANKS}hf_training.py targets",
    ),
    "n20": Mutation(
        "cpattn/integrations/batch_layout.py",
        "goes_on[[start - 1 for start, _ in layout.texts if 0 < start < len(index)]] = False", "pass",
        "labels cross the texts of a packed row", f"{RANKS}hf_training.py",
    ),
}  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
