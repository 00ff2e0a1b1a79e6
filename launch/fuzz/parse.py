"""Coverage-guided inputs of everything that is read from outside: mask files, hardware files, numbers of options.

atheris (libFuzzer) never returns from its loop, so it runs in a process of its own: this module, as a command.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .report import Batch

# Of one input: a parser that takes longer on a few kilobytes is a fault too.
LIMIT_S = 10
MEMORY_MB = 4096
MOST_BYTES = 4096
# Masks of more tokens are read, not drawn.
DRAWN = 64

# To begin with, one of each kind; libFuzzer combines and changes them.
SEEDS = (
    "[3, 5, 0]",
    '{"lengths": [9, 2], "causal": false}',
    '{"lengths": [9, 2], "window": [3, 1]}',
    '{"lengths": [9], "block_size": 4}',
    '{"lengths": [9], "prefix_lengths": [4]}',
    '{"node_lengths": [3, 2, 1], "paths": [[0, 1], [0, 2]]}',
    '{"seqlens_q": [3], "seqlens_k": [5], "causal": true}',
    '{"q_ranges": [[0, 3]], "k_ranges": [[0, 5]], "mask_types": ["bi_causal"], "total_seqlen": 5, "total_seqlen_k": 6}',
    "64K,3000,1g",
    "32:8",
)


def batches(cases: int, seed: int, figures: dict[str, float]) -> Iterator[Batch]:
    """One call that tries all inputs.

    Raises:
        ValueError: atheris is not installed.
    """
    if importlib.util.find_spec("atheris") is None:
        raise ValueError("the parse sweep needs atheris, which is not installed: pip install 'cpattn[fuzz]'")
    yield lambda: _fuzz(cases, seed, figures)


def _fuzz(cases: int, seed: int, figures: dict[str, float]) -> tuple[int, list[tuple[int, str]]]:
    with tempfile.TemporaryDirectory(prefix="cpattn-fuzz-") as folder:
        corpus = Path(folder, "corpus")
        corpus.mkdir()
        for number, text in enumerate((*SEEDS, _hardware_text())):
            (corpus / f"{number}.txt").write_text(text)
        options = [f"-atheris_runs={cases}", f"-seed={seed % (1 << 31) + 1}", f"-artifact_prefix={folder}/"]
        options += [f"-timeout={LIMIT_S}", f"-max_len={MOST_BYTES}", f"-rss_limit_mb={MEMORY_MB}", str(corpus)]
        done = subprocess.run([sys.executable, "-m", __name__, *options], capture_output=True, text=True)
        said = done.stdout + done.stderr
        runs = [int(n) for n in re.findall(r"^#(\d+)", said, re.MULTILINE)]
        covered = [int(n) for n in re.findall(r"\bcov: (\d+)", said)]
        figures["branches covered"] = max(covered, default=0)
        if done.returncode == 0:
            if not covered:
                raise RuntimeError(f"atheris ran and reported no coverage:\n{said[-2000:]}")
            return cases, []
        found = [path.read_bytes() for path in Path(folder).glob("*-*") if path.is_file()]
        return max(runs, default=1), [(seed, f"input {found[:1]}\n{said[-3000:]}")]


def _hardware_text() -> str:
    from cpattn.solver import DEFAULT_HARDWARE

    return DEFAULT_HARDWARE.to_json()


def read_everything(text: str) -> None:
    """Give a text to every reader. What is refused with ValueError is refused well.

    Raises:
        Exception: any other; or AssertionError where a mask that was read is not the one that is lowered.
    """
    from cpattn.launch.mask_file import spec_from_json
    from cpattn.launch.options import heads_of_option, parse_count
    from cpattn.masks.spec import lower_mask
    from cpattn.solver import Hardware

    readers: tuple[Callable[[str], Any], ...] = (
        spec_from_json,
        Hardware.from_json,
        parse_count,
        lambda t: heads_of_option(t, 64),
    )
    for read in readers:
        try:
            value = read(text)
            table = lower_mask(value) if read is spec_from_json and value.total_seqlen <= 1 << 20 else None
        except ValueError:
            continue
        if read is Hardware.from_json:
            assert Hardware.from_json(value.to_json()) == value, "hardware does not survive a file"
        if table is not None and max(value.total_seqlen, value.seqlen_k) <= DRAWN:
            dense = value.to_dense()
            assert (table.to_dense(*dense.shape) == dense).all(), "the slices are not the mask"
            assert table.area() == dense.sum(), "slices overlap"


def _one_input(data: bytes) -> None:
    read_everything(data.decode("utf-8", errors="replace"))


def main() -> None:
    import atheris

    with atheris.instrument_imports(include=["cpattn"]):
        import cpattn.launch.mask_file
        import cpattn.launch.options
        import cpattn.masks.spec
        import cpattn.solver  # noqa: F401
    atheris.Setup(sys.argv, _one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
