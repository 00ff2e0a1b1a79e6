"""The hardware that plans are made for: a preset, a file or a description. Loads no torch."""

from __future__ import annotations

import functools
import os
from pathlib import Path

from cpattn.solver import HARDWARE, Hardware
from cpattn.solver.outside import read_text


def find_hardware(hardware: Hardware | str | Path) -> Hardware:
    """A description as it is, the preset of a name, or what the file holds that `cpattn calibrate` wrote.

    A file is read again when it has changed.

    Raises:
        ValueError: no such preset or file, or the file does not hold a description.
    """
    if isinstance(hardware, Hardware):
        return hardware
    if isinstance(hardware, str) and hardware in HARDWARE:
        return HARDWARE[hardware]
    try:
        path = os.path.abspath(hardware)
        seen = os.stat(path)
    except (TypeError, OSError, ValueError) as error:
        raise ValueError(
            f"hardware is {hardware!r}: give one of {', '.join(HARDWARE)}, a file that `cpattn calibrate --out` wrote, "
            f"or a cpattn.solver.Hardware (as a file: {error})"
        ) from error
    return _read_file(path, seen.st_mtime_ns, seen.st_size)


@functools.lru_cache(maxsize=8)
def _read_file(path: str, changed: int, size: int) -> Hardware:
    try:
        return Hardware.from_json(read_text(path))
    except ValueError as error:
        raise ValueError(f"hardware file {path}: {error}; `cpattn calibrate --out` writes one") from error
