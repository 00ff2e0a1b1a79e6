"""What callers give, read once: integers, lengths, ranges, windows and documents, with their errors."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

# Limits in positions on keys before and after a query's own; None on a side: no limit there.
Sides: TypeAlias = tuple[int | None, int | None]
Window: TypeAlias = Sides | None


class Document(NamedTuple):
    """Tokens [start, end) that form one text, the first of them at position `first_position`."""

    start: int
    end: int
    first_position: int = 0


def read_int(name: str, value: Any, *, least: int = 1) -> int:
    """A number of things: an int of Python or numpy, or a tensor of one; not a bool.

    Raises:
        ValueError: it is not an int of at least `least`.
    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < least:
        raise ValueError(f"{name} is {value!r}: it must be an int of at least {least}")
    return number


def read_flag(name: str, value: Any) -> bool:
    """
    Raises:
        ValueError: it is not true or false (1 or 0).
    """
    if not isinstance(value, (bool, int, np.bool_)) or value not in (0, 1):
        raise ValueError(f"{name} is {value!r}: it must be True or False")
    return bool(value)


_FAR = 1 << 62  # a distance that int64 holds, and no two tokens have


def read_window(window: Any, *, ahead: int | None) -> Sides:
    """A window as limits on both sides.

    Args:
        window: an int W: W keys, the query's own included, and those `ahead`; or a pair (left, right) of keys beside
            the query's own, where None is no limit, if it may be `ahead`.
        ahead: keys after the query's own that an int leaves visible; None: no limit.

    Raises:
        ValueError: it is neither, or a number is out of range.
    """
    try:
        if not isinstance(window, Sequence) or isinstance(window, str):
            return min(read_int("window", window), _FAR) - 1, ahead
        sides = [None if side is None and ahead is None else read_int("side", side, least=0) for side in window]
        left, right = (None if side is None else min(side, _FAR) for side in sides)
    except ValueError:
        raise ValueError(
            f"window is {window!r}: give an int of at least 1, or (left, right) of at least 0 each"
        ) from None
    return left, right


def one_or_more(lengths: Any) -> Any:
    """A list of lengths; one int (of Python, numpy or torch) stands for a list of one."""
    return [lengths] if isinstance(lengths, (int, np.integer)) or getattr(lengths, "ndim", 1) == 0 else lengths


def int_array(values: Any, name: str) -> NDArray[np.int64]:
    array = np.asarray(values.detach().cpu() if hasattr(values, "detach") else values)
    if array.size == 0:
        return array.astype(np.int64)
    if not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{name} has dtype {array.dtype}: expected integers")
    return array.astype(np.int64)


def int_list(values: Any, name: str) -> list[int]:
    array = int_array(values, name)
    if array.ndim != 1:
        raise ValueError(f"{name} has shape {array.shape}: expected one dimension")
    return [int(v) for v in array]


def read_spans(lengths: Any, name: str) -> list[tuple[int, int]]:
    """[start, end) of consecutive pieces with the given lengths."""
    spans, at = [], 0
    for length in int_list(lengths, name):
        if length < 0:
            raise ValueError(f"{name} has a length of {length}: lengths are at least 0")
        spans.append((at, at + length))
        at += length
    return spans


def read_ranges(ranges: Iterable[Any], total: int, name: str) -> list[list[int]]:
    try:
        checked = [[operator.index(start), operator.index(end)] for start, end in ranges]
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be a list of [start, end) pairs of ints") from None
    for start, end in checked:
        if not 0 <= start <= end <= total:
            raise ValueError(
                f"{name} has [{start}, {end}): a range needs 0 <= start <= end <= {total}, "
                f"the sequence length"
            )
    return checked


def read_documents(documents: Iterable[Any], total: int) -> list[Document]:
    try:
        checked = [Document(*map(operator.index, document)) for document in documents]
    except TypeError:
        raise ValueError(
            f"documents are {documents!r}: documents are (start, end[, first_position]) tuples of ints"
        ) from None
    at = 0
    for document in checked:
        if document.start != at or document.end < document.start or document.first_position < 0:
            raise ValueError(
                f"documents have {tuple(document)} where token {at} is next: documents are "
                f"(start, end[, first_position]), in order and without gaps"
            )
        at = document.end
    if at != total:
        raise ValueError(f"documents end at token {at}: they must cover all {total} tokens")
    return checked


def brief(values: Sequence[int]) -> str:
    """The first of many numbers, for a message."""
    return repr(list(values)) if len(values) <= 6 else f"[{', '.join(map(str, values[:6]))}, ...]"
