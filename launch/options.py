"""Options that several commands take, each group of them in one dataclass: the mask, heads, the layer that is run.

`takes_options` gives a command the fields of the groups that it names as options of its own, so that the same thing has
the same name, the same default and the same check everywhere.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from enum import Enum
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias, get_type_hints

import typer

from cpattn.masks.spec import AttnMaskSpec
from cpattn.planning.options import read_heads
from cpattn.planning.ready import make_plan
from cpattn.solver import Convolution, Heads, Mixer, Recurrence
from cpattn.solver.outside import read_text

from .mask_file import spec_from_json

if TYPE_CHECKING:
    import torch.distributed as dist

    from cpattn import AttnKey


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


class Dtypes(str, Enum):
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"
    fp64 = "fp64"

    @property
    def torch_name(self) -> str:
        return {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp64": "float64"}[self.value]

    @property
    def itemsize(self) -> int:
        return {"fp32": 4, "fp64": 8}.get(self.value, 2)


# The most that a command takes: far beyond any use, and within what it can answer.
MAX_TOKENS = 1 << 62
MAX_HEADS = 1 << 16
MAX_RANKS = 1 << 14
MAX_CHUNKS = 1 << 24
# Extras of the package, by the module that is looked for.
_EXTRAS = {"matplotlib": "plot"}


def _dtype(text: str) -> Dtypes:
    """A dtype by either of its names: bf16 or bfloat16."""
    for dtype in Dtypes:
        if text in (dtype.value, dtype.torch_name):
            return dtype
    raise typer.BadParameter(f"dtype {text!r} is unknown: use {', '.join(dtype.value for dtype in Dtypes)}")


def _degree(value: str | int) -> int | str:
    text = str(value)
    if text != "auto" and not text.isdigit():
        raise typer.BadParameter(f"head_degree is {text!r}: give a number of ranks, or auto")
    return text if text == "auto" else int(text)


DtypeOption: TypeAlias = Annotated[
    Dtypes, typer.Option(parser=_dtype, metavar="[fp32|bf16|fp16|fp64]", help="Of q, k and v; bfloat16 is bf16.")
]
LayoutOption: TypeAlias = Annotated[Layouts, typer.Option(help="Who owns which tokens.")]
ScheduleOption: TypeAlias = Annotated[Schedules, typer.Option(help="Whether queries travel too.")]
StagesOption: TypeAlias = Annotated[
    int | None, typer.Option(help="Parts in which remote keys travel; default: chosen.")
]
DegreeOption: TypeAlias = Annotated[
    Any, typer.Option(parser=_degree, metavar="N|auto", help="Ranks that share rows, each with some of the heads.")
]
JsonOption: TypeAlias = Annotated[bool, typer.Option("--json", help="Print JSON for a program instead.")]
RanksOption: TypeAlias = Annotated[
    int | None, typer.Option(min=1, max=MAX_RANKS, help="Start so many ranks here, with torchrun; default: 1.")
]
BackendOption: TypeAlias = Annotated[str, typer.Option(help="Local kernel by name, auto, or fastest: try them.")]


@dataclass(frozen=True)
class MaskOptions:
    """The mask. One of seqlen, lengths and file says how long it is."""

    mask: Annotated[MaskName, typer.Option(help="The shape of the mask of each document.")] = MaskName.causal
    seqlen: Annotated[str, typer.Option(help="Tokens of one sequence: 65536, 64K, 4M.")] = ""
    lengths: Annotated[str, typer.Option(help="Document lengths instead, comma-separated: 8K,3000,512.")] = ""
    file: Annotated[Path | None, typer.Option(help="JSON file with the mask: see `cpattn docs planning`.")] = None
    window: Annotated[int | None, typer.Option(help="Keys that a query sees, itself included.")] = None
    block: Annotated[int | None, typer.Option(help="Tokens of a block of block-causal; default: 1024.")] = None

    def spec(self) -> AttnMaskSpec:
        """The mask that is described.

        Raises:
            ValueError: none or several are given, or one is malformed.
        """
        mask, file, window, block = self.mask, self.file, self.window, self.block
        if sum(map(bool, (self.seqlen, self.lengths, file))) != 1:
            raise ValueError("give the tokens once: --seqlen 1M, or --lengths 8K,3000,512, or --file mask.json")
        if file is not None and (window is not None or block is not None or mask is not MaskName.causal):
            raise ValueError("--file holds the whole mask: leave --mask, --window and --block away")
        if block is not None and mask is not MaskName.block_causal:
            raise ValueError(f"--block {block} goes with --mask block-causal, and --mask is {mask.value}")
        if window is not None and mask not in (MaskName.causal, MaskName.window):
            raise ValueError(
                f"--window {window} is a causal window and --mask is {mask.value}: they do not go together"
            )
        if mask is MaskName.window and window is None:
            raise ValueError("--mask window needs --window, the number of keys that a query sees")
        return spec_from_json(read_text(file), name=str(file)) if file is not None else self._of_lengths()

    def _of_lengths(self) -> AttnMaskSpec:
        documents = [parse_count(part) for part in (self.seqlen or self.lengths).split(",")]
        if self.window is not None:
            return AttnMaskSpec.sliding_window(documents, self.window)
        if self.mask is MaskName.block_causal:
            return AttnMaskSpec.block_causal(documents, 1024 if self.block is None else self.block)
        return AttnMaskSpec.varlen(documents, causal=self.mask is MaskName.causal)

    def words(self) -> str:
        """The mask in a few words, for titles: "causal", "window of 1024, 3 documents"."""
        if self.file is not None:
            return self.file.name
        kind = "causal" if self.mask is MaskName.window else self.mask.value
        kind += f", window of {self.window:,}" if self.window is not None else ""
        kind += f", blocks of {self.block or 1024:,}" if self.mask is MaskName.block_causal else ""
        documents = (self.seqlen or self.lengths).count(",") + 1
        return kind if documents == 1 else f"{kind}, {documents} documents"


@dataclass(frozen=True)
class HeadOptions:
    """Heads of a model, for what is only planned or looked up."""

    heads: Annotated[str, typer.Option(help="Query and key heads, q:kv.")] = "32:8"
    head_dim: Annotated[int, typer.Option(help="Dim of a head.")] = 128
    dtype: DtypeOption = Dtypes.bf16

    def read(self) -> Heads:
        """
        Raises:
            ValueError: they are malformed.
        """
        return replace(heads_of_option(self.heads, self.head_dim), itemsize=self.dtype.itemsize)

    def words(self) -> str:
        return f"heads {self.heads} of {self.head_dim}, {self.dtype.value}"


@dataclass(frozen=True)
class RunHeadOptions(HeadOptions):
    """Heads of what is run on this machine: small enough for a CPU."""

    heads: Annotated[str, typer.Option(help="Query and key heads, q:kv.")] = "8:2"
    head_dim: Annotated[int, typer.Option(help="Dim of a head.")] = 64


@dataclass(frozen=True)
class MixerOptions:
    """Layers without softmax over the same placement, for what is only planned."""

    recurrence: Annotated[
        str, typer.Option(help="A linear recurrence too, heads:dim_k:dim_v, :delta for the delta rule: 32:128:128.")
    ] = ""
    convolution: Annotated[str, typer.Option(help="A short convolution too, width:channels: 4:8192.")] = ""

    def read(self) -> list[Mixer]:
        """
        Raises:
            ValueError: one is malformed.
        """
        mixers: list[Mixer] = []
        if self.recurrence:
            sizes, delta = self.recurrence.removesuffix(":delta"), self.recurrence.endswith(":delta")
            heads, dim_k, dim_v = _sizes("--recurrence", sizes, "heads:dim_k:dim_v or heads:dim_k:dim_v:delta", 3)
            mixers.append(Recurrence(heads, dim_k, dim_v, delta))
        if self.convolution:
            mixers.append(Convolution(*_sizes("--convolution", self.convolution, "width:channels", 2)))
        return mixers


def _sizes(option: str, text: str, form: str, count: int) -> list[int]:
    parts = text.split(":")
    if len(parts) != count or not all(re.fullmatch("[0-9]{1,6}", part) and int(part) for part in parts):
        raise ValueError(f"{option} is {text!r}: give whole numbers above 0 as {form}")
    return [int(part) for part in parts]


@dataclass(frozen=True)
class LayerOptions:
    """How one attention layer is run: what `make_key` takes."""

    chunk_size: Annotated[int, typer.Option(help="Tokens by which ranks may differ.")] = 512
    layout: LayoutOption = Layouts.balanced
    schedule: ScheduleOption = Schedules.auto
    num_stages: StagesOption = None
    head_degree: DegreeOption = 1
    wire: Annotated[str | None, typer.Option(help="8-bit rows on the wire: e4m3 or e5m2.")] = None
    keep_kv: Annotated[bool, typer.Option("--keep-kv", help="Keep fetched keys for backward.")] = False

    def require(self, heads: Heads, cp_size: int) -> None:
        """Refuse what every rank would refuse, before any is started.

        Raises:
            ValueError: as `make_key`.
        """
        degree = self.head_degree
        if degree != "auto" and (degree < 1 or cp_size % degree):
            raise ValueError(f"head_degree is {degree} and the group has {cp_size} ranks: it must divide them")
        tiny = AttnMaskSpec.causal(1)
        make_plan(tiny, cp_size=1, **_named(heads), **self._planning(), wire=self.wire, num_stages=self.num_stages)

    def key(self, spec: AttnMaskSpec, heads: Heads, group: dist.ProcessGroup | None, backend: str = "auto") -> AttnKey:
        """The key of a layer; on every rank of the group."""
        from cpattn import make_key

        return make_key(
            spec,
            **_named(heads),
            **self._planning(),
            cp_group=group,
            backend=backend,
            num_stages=self.num_stages,
            head_degree=self.head_degree,
            wire=self.wire,
            keep_kv=self.keep_kv,
        )

    def _planning(self) -> dict[str, Any]:
        return {"chunk_size": self.chunk_size, "layout": self.layout.value, "schedule": self.schedule.value}


def _named(heads: Heads) -> dict[str, Any]:
    return {"num_heads_q": heads.num_q, "num_heads_kv": heads.num_kv, "head_dim": heads.head_dim}


def takes_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command an option for each field of the dataclasses among its parameters, and it the dataclasses.

    What a caller leaves out has the default of the field.
    """
    hints, parameters = get_type_hints(command, include_extras=True), []
    groups: dict[str, type] = {}
    for parameter in inspect.signature(command).parameters.values():
        kind = hints[parameter.name]
        if not is_dataclass(kind):
            parameters.append(parameter.replace(annotation=kind))
            continue
        groups[parameter.name] = kind  # type: ignore[assignment]
        inner = get_type_hints(kind, include_extras=True)
        for field in fields(kind):
            default = inspect.Parameter.empty if field.default is MISSING else field.default
            parameters.append(parameter.replace(name=field.name, annotation=inner[field.name], default=default))

    def run(**given: Any) -> None:
        made = {}
        for name, kind in groups.items():
            made[name] = kind(**{f.name: given.pop(f.name) for f in fields(kind) if f.name in given})
        command(**made, **given)

    functools.update_wrapper(run, command)
    del run.__dict__["__wrapped__"]  # typer would read its signature instead
    named = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]
    run.__signature__ = inspect.Signature(named)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def heads_of_option(text: str, head_dim: int, head_dim_v: int | None = None) -> Heads:
    """Heads from "32:8"; of 16 bits."""
    try:
        num_q, num_kv = (int(part) for part in text.split(":"))
    except ValueError:
        raise ValueError(f"--heads is {text!r}: give query and key heads as 32:8") from None
    if max(num_q, num_kv, head_dim, head_dim_v or 0) > MAX_HEADS:
        raise ValueError(f"--heads {text}, dim {head_dim}: none of them may exceed {MAX_HEADS:,}")
    return read_heads(num_q, num_kv, head_dim, head_dim_v)


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


def require_file(option: str, path: Path | None) -> None:
    """Refuse a file that could not be written; None is none.

    Raises:
        ValueError: it is a folder, or its folder is not there or takes nothing.
    """
    if path is None:
        return
    folder = path.resolve().parent
    if path.is_dir() or not folder.is_dir():
        raise ValueError(f"{option} is {path}: give a file in a folder that exists")
    require_folder(option, folder)


def require_module(option: str, name: str) -> None:
    """Say what to install for an option, before any work is done for it.

    Raises:
        ValueError: the module is not there.
    """
    try:
        found = find_spec(name) is not None
    except ValueError:  # None in sys.modules
        found = False
    if not found:
        raise ValueError(f"{option} needs {name}, which is not installed: run pip install 'cpattn[{_EXTRAS[name]}]'")
