"""Options that several commands take, and what they describe: the mask, heads, hardware."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from tempfile import TemporaryFile
from typing import Annotated, Any, TypeAlias

import typer
from rich.console import Console
from rich.markup import escape

from cpattn.masks.spec import AttnMaskSpec
from cpattn.solver import Heads
from cpattn.solver.outside import parse_json, read_text


class MaskName(str, Enum):
    """Masks that need no more than options."""

    causal = "causal"
    full = "full"
    window = "window"
    block_causal = "block-causal"


class Layouts(str, Enum):
    balanced = "balanced"
    contiguous = "contiguous"
    zigzag = "zigzag"


class Schedules(str, Enum):
    auto = "auto"
    keys = "keys"
    tiles = "tiles"


# The mask (`spec_of_options`).
MaskOption: TypeAlias = Annotated[MaskName, typer.Option(help="The shape of the mask of each document.")]
SeqlenOption: TypeAlias = Annotated[str, typer.Option(help="Tokens of one sequence: 65536, 64K, 4M.")]
LengthsOption: TypeAlias = Annotated[str, typer.Option(help="Document lengths instead, comma-separated: 8K,3000,512.")]
FileOption: TypeAlias = Annotated[Path | None, typer.Option(help="JSON file with the mask: see docs/planning.md.")]
WindowOption: TypeAlias = Annotated[int | None, typer.Option(help="Keys that a query sees, itself included.")]
BlockOption: TypeAlias = Annotated[int | None, typer.Option(help="Tokens of a block of block-causal; default: 1024.")]
# The most that a command takes: far beyond any use, and within what it can answer.
MAX_TOKENS = 1 << 62
MAX_HEADS = 1 << 16
MAX_RANKS = 1 << 14
MAX_CHUNKS = 1 << 24
# A mask of many ranges or documents can take hours: a command says so and stops.
LIMIT_S = 900
# Dtypes by the names of options and of torch.
TORCH_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp64": "float64"}
# Heads (`heads_of_option`).
HeadsOption: TypeAlias = Annotated[str, typer.Option(help="Query and key heads, q:kv.")]
HeadDimOption: TypeAlias = Annotated[int, typer.Option(help="Dim of a head.")]
# The plan.
LayoutOption: TypeAlias = Annotated[Layouts, typer.Option(help="Who owns which tokens.")]
ScheduleOption: TypeAlias = Annotated[Schedules, typer.Option(help="Whether queries travel too.")]
StagesOption: TypeAlias = Annotated[
    int | None, typer.Option(help="Parts in which remote keys travel; default: chosen.")
]


def refused(error: ValueError) -> typer.Exit:
    """Say what is wrong with the options, and how to end the command."""
    Console(stderr=True).print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
    return typer.Exit(2)


@contextmanager
def answering(limit_s: float = 0) -> Iterator[None]:
    """What a command does with what it was given: an error ends it with a sentence and status 2, not with a traceback.

    Args:
        limit_s: seconds after which the body ends with such an error too; 0: none. Only in the main thread.
    """
    try:
        with _within(limit_s):
            yield
    except ValueError as error:
        raise refused(error) from None
    except MemoryError:
        raise refused(ValueError("this needs more memory than there is: give fewer tokens or larger chunks")) from None


@contextmanager
def _within(limit_s: float) -> Iterator[None]:
    def stop(number: int, frame: Any) -> None:
        raise ValueError(
            f"no answer within {limit_s:g} seconds: give fewer documents, ranges or ranks, or more time (--limit)"
        )

    if not limit_s or not hasattr(signal, "setitimer"):
        yield
        return
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, limit_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def require_folder(option: str, path: Path | None) -> None:
    """Make the folder that files are to be written to, if it is not there yet; None is none.

    Raises:
        ValueError: it is a file, or nothing can be written there.
    """
    if path is None:
        return
    if path.exists() and not path.is_dir():
        raise ValueError(f"{option} is {path}, which is a file: give a folder, or a name that is not there yet")
    try:
        path.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise ValueError(f"{option} is {path}, where nothing can be written: {error.strerror}") from None


def heads_of_option(text: str, head_dim: int) -> Heads:
    """Heads from "32:8"; of 16 bits."""
    try:
        num_q, num_kv = (int(part) for part in text.split(":"))
    except ValueError:
        raise ValueError(f"--heads is {text!r}: give query and key heads as 32:8") from None
    if max(num_q, num_kv, head_dim) > MAX_HEADS:
        raise ValueError(f"--heads {text}, dim {head_dim}: none of them may exceed {MAX_HEADS:,}")
    if num_q < 1 or num_kv < 1 or num_q % num_kv or head_dim < 1:
        raise ValueError(f"--heads {text}, dim {head_dim}: query heads must be a multiple of key heads, all at least 1")
    return Heads(num_q, num_kv, head_dim, head_dim)


def parse_count(text: str) -> int:
    """Tokens from 65536, 64K or 4M (powers of 1024).

    >>> parse_count("64K"), parse_count("4m"), parse_count("300")
    (65536, 4194304, 300)
    """
    units = {"k": 1 << 10, "m": 1 << 20, "g": 1 << 30}
    digits, unit = (text[:-1], units[text[-1].lower()]) if text[-1:].lower() in units else (text, 1)
    try:
        count = int(digits) * unit
    except ValueError:
        raise ValueError(f"{text[:40]!r} is not a number of tokens: write 65536, 64K or 4M") from None
    if count > MAX_TOKENS:
        raise ValueError(f"{text[:40]} tokens are more than {MAX_TOKENS:,}: they cannot be counted in 64 bits")
    return count


def spec_of_options(
    mask: MaskName, seqlen: str, lengths: str, file: Path | None, window: int | None, block: int | None
) -> AttnMaskSpec:
    """The mask that the options of a command describe.

    Raises:
        ValueError: none or several are given, or one is malformed.
    """
    if sum(map(bool, (seqlen, lengths, file))) != 1:
        raise ValueError("give the tokens once: --seqlen 1M, or --lengths 8K,3000,512, or --file mask.json")
    if file is not None and (window is not None or block is not None or mask is not MaskName.causal):
        raise ValueError("--file holds the whole mask: leave --mask, --window and --block away")
    if block is not None and mask is not MaskName.block_causal:
        raise ValueError(f"--block {block} goes with --mask block-causal, and --mask is {mask.value}")
    if window is not None and mask not in (MaskName.causal, MaskName.window):
        raise ValueError(f"--window {window} is a causal window and --mask is {mask.value}: they do not go together")
    if file is not None:
        return spec_from_json(read_text(file), name=str(file))
    documents = [parse_count(part) for part in (seqlen or lengths).split(",")]
    if mask is MaskName.window or window is not None:
        if window is None:
            raise ValueError("--mask window needs --window, the number of keys that a query sees")
        return AttnMaskSpec.sliding_window(documents, window)
    if mask is MaskName.block_causal:
        return AttnMaskSpec.block_causal(documents, 1024 if block is None else block)
    return AttnMaskSpec.varlen(documents, causal=mask is MaskName.causal)


_JSON_KINDS: dict[str, frozenset[str]] = {
    "lengths": frozenset({"lengths", "causal", "window", "block_size", "prefix_lengths"}),
    "node_lengths": frozenset({"node_lengths", "paths"}),
    "seqlens_q": frozenset({"seqlens_q", "seqlens_k", "causal"}),
    "q_ranges": frozenset({"q_ranges", "k_ranges", "mask_types", "total_seqlen", "total_seqlen_k"}),
}


def spec_from_json(text: str, *, name: str = "mask") -> AttnMaskSpec:
    """The mask that a JSON text describes, by the fields it has.

    A list of ints is document lengths. An object has one of: `lengths` (with one of `causal`, `window`,
    `block_size` or `prefix_lengths`, if any), `node_lengths` and `paths` (a prefix tree), `seqlens_q` and
    `seqlens_k` (cross-attention), or `q_ranges`, `k_ranges`, `mask_types`, `total_seqlen`.

    Raises:
        ValueError: it is not JSON, or not one of these.

    >>> spec_from_json("[3, 5]").total_seqlen
    8
    """
    try:
        data = parse_json(text)
    except ValueError as error:
        raise ValueError(f"{name} is not JSON: {error}") from None
    if isinstance(data, list):
        data = {"lengths": data}
    kind = next((k for k in _JSON_KINDS if isinstance(data, dict) and k in data), None)
    if kind is None:
        kinds = ", ".join(_JSON_KINDS)
        raise ValueError(f"{name} describes no mask: give a list of lengths, or an object with one of {kinds}")
    fields = ", ".join(sorted(_JSON_KINDS[kind]))
    unknown = set(data) - _JSON_KINDS[kind]
    if unknown:
        raise ValueError(f"{name} has {', '.join(sorted(unknown))}: the fields are {fields}")
    for field in set(data) - {"causal"}:
        _require_no_booleans(data[field], f"{name}: {field}")
    try:
        return _spec_of_fields(kind, data)
    except OverflowError:
        raise ValueError(f"{name} holds a number of more than 63 bits: no mask has that many tokens") from None
    except (KeyError, TypeError) as error:
        missing = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{name}: {missing}; the fields are {fields}") from None
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _require_no_booleans(value: Any, name: str) -> None:
    """Python takes True for 1; a file that says true where a number belongs says something else."""
    if isinstance(value, bool):
        raise ValueError(f"{name} holds {json.dumps(value)} where a number belongs")
    for child in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _require_no_booleans(child, name)


def _spec_of_fields(kind: str, data: dict[str, Any]) -> AttnMaskSpec:
    if kind == "node_lengths":
        return AttnMaskSpec.prefix_tree(data["node_lengths"], data["paths"])[0]
    if kind == "seqlens_q":
        return AttnMaskSpec.cross(data["seqlens_q"], data["seqlens_k"], causal=_causal_of(data, default=False))
    if kind == "q_ranges":
        return AttnMaskSpec(
            data["q_ranges"], data["k_ranges"], data["mask_types"], data["total_seqlen"], data.get("total_seqlen_k")
        )
    return _spec_of_lengths(data)


def _spec_of_lengths(data: dict[str, Any]) -> AttnMaskSpec:
    extra = [name for name in ("causal", "window", "block_size", "prefix_lengths") if name in data]
    if len(extra) > 1:
        raise ValueError(f"{' and '.join(extra)} do not go together")
    if "window" in data:
        window = data["window"]
        return AttnMaskSpec.sliding_window(data["lengths"], tuple(window) if isinstance(window, list) else window)
    if "block_size" in data:
        return AttnMaskSpec.block_causal(data["lengths"], data["block_size"])
    if "prefix_lengths" in data:
        return AttnMaskSpec.prefix_lm(data["prefix_lengths"], data["lengths"])
    return AttnMaskSpec.varlen(data["lengths"], causal=_causal_of(data, default=True))


def _causal_of(data: dict[str, Any], *, default: bool) -> bool:
    causal = data.get("causal", default)
    if not isinstance(causal, bool):
        raise ValueError(f"causal is {json.dumps(causal)}: write true or false")
    return causal
