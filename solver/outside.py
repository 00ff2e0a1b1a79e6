"""Text that comes from outside, read with limits: a file that is a file, and JSON that says one thing.

What Python's own reader lets pass is refused here: keys given twice (the last would count), NaN and Infinity (no JSON),
numbers beyond every float, nesting that is a trick. What reads masks, hardware and plans goes through this.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Callable
from typing import Any, NoReturn

# Ten million document lengths, and far more than any hardware description.
MAX_BYTES = 64 << 20
MAX_DEPTH = 16


def read_text(path: str | os.PathLike[str]) -> str:
    """The text of a regular file of at most MAX_BYTES, in UTF-8.

    Raises:
        ValueError: there is none, it is a folder, a pipe or a device, larger, or no text.
    """
    try:
        # Opening a pipe that nobody writes to would wait for ever.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {_words(error)}") from None
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise ValueError(f"{path} is {_kind(status.st_mode)}: give a regular file")
    with os.fdopen(descriptor, "rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ValueError(f"{path} has {status.st_size:,} bytes: at most {MAX_BYTES:,} are read")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text: {error}") from None


def parse_json(text: str) -> Any:
    """What a JSON text says, if it says one thing.

    Raises:
        ValueError: it is no JSON, an object has a key twice, a number is no finite one or too long to read, or lists
            and objects lie more than MAX_DEPTH deep in each other.

    >>> parse_json('{"lengths": [3, 5]}')
    {'lengths': [3, 5]}
    """
    try:
        data = json.loads(text, object_pairs_hook=_object, parse_constant=_constant, parse_float=_finite)
    except RecursionError:
        raise ValueError(f"it is nested more than {MAX_DEPTH} deep") from None
    level, depth = [data], 0
    while level := [
        child
        for outer in level
        for child in (outer.values() if isinstance(outer, dict) else outer if isinstance(outer, list) else ())
        if isinstance(child, (dict, list))
    ]:
        depth += 1
        if depth >= MAX_DEPTH:
            raise ValueError(f"it is nested more than {MAX_DEPTH} deep")
    return data


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} is given twice")
    return found


def _constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is no number of JSON")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{digits[:40]} is beyond every float")
    return value


_KINDS: dict[str, tuple[Callable[[int], bool], ...]] = {
    "a folder": (stat.S_ISDIR,),
    "a pipe": (stat.S_ISFIFO,),
    "a socket": (stat.S_ISSOCK,),
    "a device": (stat.S_ISCHR, stat.S_ISBLK),
}


def _kind(mode: int) -> str:
    return next((name for name, tests in _KINDS.items() if any(test(mode) for test in tests)), "no regular file")


def _words(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
