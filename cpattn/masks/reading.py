"""What callers give, read once: integers, lengths, ranges, windows and documents, with their errors."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

# Limits in positions on (keys before, keys after) a query's own; None on a side, or for both: no limit.
Window: TypeAlias = tuple[int | None, int | None] | None


class Document(NamedTuple):
    """Tokens [start, end) that form one text, the first of them at position `first_position`."""

    start: int
    end: int
    first_position: int = 0


def read_window(window: int | tuple[int, int]) -> tuple[int, int]:
    if isinstance(window, Sequence):
        if len(window) != 2:
            raise ValueError(f"window is {window!r}: give an int, or a pair (left, right)")
        return read_count(window[0], "window[0]"), read_count(window[1], "window[1]")
    return read_count(window, "window", least=1) - 1, 0


def read_count(value: Any, name: str, least: int = 0) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{name} is {value!r}: expected an int of at least {least}") from None
    if number < least:
        raise ValueError(f"{name} is {number}: it must be at least {least}")
    return number


def check_int(name: str, value: Any, *, least: int = 1) -> None:
    """Check a number of things.

    Raises:
        ValueError: it is not an int of at least `least`.
    """
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} is {value!r}: it must be an int of at least {least}")


def one_or_more(lengths: Any) -> Any:
    """A list of lengths; one int (of Python or numpy) stands for a list of one."""
    return [lengths] if isinstance(lengths, (int, np.integer)) else lengths


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


def brief(values: list[int]) -> str:
    return repr(values) if len(values) <= 6 else f"[{', '.join(map(str, values[:6]))}, ...]"
