"""Batches of real documents: files read as bytes and packed to a fixed number of tokens.

The default text is the Python standard library's own source files: every machine that can run this
has it, and its lengths are those of real text, from a few bytes to hundreds of thousands.
"""

from __future__ import annotations

import os
import random
import sysconfig
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

# Documents that may be passed over because they do not fit, before the next one is cut to fit.
MAX_PASSED_OVER = 4


class Batch(NamedTuple):
    """Packed documents.

    tokens: [T] int64, the bytes. seqlens: tokens of each document, in order; they sum to T.
    """

    tokens: Tensor
    seqlens: list[int]

    @property
    def num_labels(self) -> int:
        """Rows that have a next token in their document: all but the last of each."""
        return sum(length - 1 for length in self.seqlens)


def stdlib_files() -> list[Path]:
    """The source files of the running Python's standard library, without installed packages."""
    root = Path(sysconfig.get_path("stdlib"))
    return sorted(path for path in root.rglob("*.py") if not {"site-packages", "dist-packages"} & set(path.parts))


def folder_files(folder: Path) -> list[Path]:
    """All files below a folder, hidden ones left out.

    Raises:
        ValueError: there is no such folder, or no file in it.
    """
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise ValueError(f"--data {folder} {what}: give a folder of text files")
    files = []
    for base, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        files += [Path(base, name) for name in sorted(names) if not name.startswith(".")]
    files = [path for path in files if path.is_file()]
    if not files:
        raise ValueError(f"--data {folder} holds no files: give a folder of text files")
    return files


def batches(folder: Path | None, *, num_tokens: int, seed: int) -> Iterator[Batch]:
    """Endless batches of exactly `num_tokens` tokens, the same ones on every rank.

    Files come in an order that depends on the seed alone. One that does not fit in what is left of a
    batch goes back to the end of the queue; after MAX_PASSED_OVER of those the next one is cut to
    fit. So most documents keep their real length, and a batch holds long and short ones. When every
    file has been used, they come again.

    Args:
        folder: read every text file below it (files with a zero byte are taken for binary and left
            out, and so are files of less than two bytes: nothing to predict); None reads the
            standard library.

    Raises:
        ValueError: no text found.
    """
    files = stdlib_files() if folder is None else folder_files(folder)
    random.Random(seed).shuffle(files)
    queue, used = deque(files), list[Path]()
    while True:
        documents: list[bytes] = []
        room, passed_over = num_tokens, 0
        while room:
            if not queue:
                if not used:
                    where = "the standard library" if folder is None else f"--data {folder}"
                    raise ValueError(f"{where} holds no text: its files are all empty, of one byte, or binary")
                queue, used = deque(used), []
            path = queue.popleft()
            text = read_text(path, num_tokens + 1)
            if len(text) > room and passed_over < MAX_PASSED_OVER:
                passed_over += 1
                queue.append(path)
            elif len(text) > 1:
                used.append(path)
                documents.append(text[:room])
                room -= len(documents[-1])
        tokens = torch.frombuffer(bytearray(b"".join(documents)), dtype=torch.uint8).long()
        yield Batch(tokens, [len(document) for document in documents])


def read_text(path: Path, limit: int) -> bytes:
    """The first `limit` bytes of a file; nothing where it is binary."""
    with path.open("rb") as file:
        text = file.read(limit)
    return b"" if 0 in text else text
