"""What the compiler makes of the Triton kernels for GPUs that are not at hand: registers, spills, shared memory.

    python -m cpattn.launch.benchmarks.triton_compile --out DIR [--arch sm90 ...] [--head-dim 64 ...] [--kernel dq ...]
    python -m cpattn.launch.benchmarks.triton_compile --out DIR --rows         (the row kernels, into row_kernels.json)

Compiles the kernels of `cpattn/backends/triton_kernels.py` with the tiles of the table and writes triton_compile.md and
triton_compile.json as results come. Needs triton and no GPU; TRITON_INTERPRET must not be set. A kernel takes some
seconds; triton's cache keeps it.

Spills are bytes of stack a thread, which is where the assembler puts them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cpattn.backends.triton import kernel_constants
from cpattn.backends.triton_tiles import Tile, choose_tiles, tile_kinds

KERNELS = ("forward", "dq", "dkv")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# Bytes that a block may have, from the vendors' tables.
SHARED_LIMIT = {"sm80": 163 * 1024, "sm90": 227 * 1024, "sm100": 227 * 1024, "gfx942": 64 * 1024}
_FP32 = ("lse_QN", "delta_NQ", "dq_QND", "dk_KGD", "dv_KGE")
_POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}


class Compiled(NamedTuple):
    """One kernel for one GPU. spills: bytes a thread; shared: bytes a block; matrix: the instructions that multiply."""

    kernel: str
    arch: str
    dtype: str
    head_dim: int
    tile: Tile
    registers: int
    spills: int
    shared: int
    matrix: str
    seconds: float


def compile_kernel(name: str, arch: str, dtype: str, head_dim: int, tile: Tile | None = None) -> Compiled:
    """Compile a kernel for grouped heads, the tile that the table has (or another), bands and no softcap."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from cpattn.backends import triton_kernels

    kernel = getattr(triton_kernels, f"{name}_kernel")
    element = DTYPES[dtype]
    tile = tile or getattr(choose_tiles(arch, element.itemsize, head_dim), name)
    constants = kernel_constants(4, head_dim, head_dim, tile, capped=False, mixed=False, fresh=False, wide=False)
    options = {key: constants.pop(key) for key in ("num_warps", "num_stages")}
    signature = {n: _type_of(n, name, element, n in constants) for n in kernel.arg_names}
    # What the launcher finds of real tensors: rows and heads of 16 bytes, but for lse, whose rows are a number a head.
    aligned = [s[0] == "*" or (n.startswith("stride_") and not n.startswith("stride_l")) for n, s in signature.items()]
    attrs = {(i,): [["tt.divisibility", 16]] for i, fits in enumerate(aligned) if fits}
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attrs)
    target = GPUTarget("cuda", int(arch[2:]), 32) if arch.startswith("sm") else GPUTarget("hip", arch, 64)
    start = time.perf_counter()
    made = triton.compile(source, target=target, options=options)
    registers, spills = _usage(made.asm)
    seconds = time.perf_counter() - start
    return Compiled(
        name, arch, dtype, head_dim, tile, registers, spills, made.metadata.shared, _matrix(made.asm), round(seconds, 1)
    )


# Of the row kernels that take tuples: what each is compiled for, and types of arguments (others are 32-bit numbers).
_CALLS = 8
_ROWS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "merge_calls": (
        {"dim": 128, "width": 128, "heads": 32, "count": _CALLS, "fresh": True, "converts": True},
        {"out_THD": "*bf16", "lse_TH": "*fp32", "before_THD": "*fp32", "parts": ("*bf16",) * _CALLS}
        | {"part_lses": ("*fp32",) * _CALLS, "num_rows": ("i32",) * _CALLS, "offsets": "*i32", "order": "*i32"},
    ),
    "sum_calls": (
        {"count": _CALLS, "fresh_q": False, "fresh_k": True, "converts": True, "block": 1024},
        {f"{x}_parts": ("*bf16",) * _CALLS for x in "qkv"}
        | {"dq": "*bf16", "dk": "*fp32", "dv": "*fp32", "before_dq": "*fp32"}
        | {f"{x}_{table}": "*i32" for x in "qk" for table in ("offsets", "order")},
    ),
    "pack": (
        {"count": 4, "indexed": True, "block": 1024},
        {"targets": ("*i64",) * 4, "sources": ("*i64",) * 4, "index": "*i64"}
        | dict.fromkeys(("target_rows", "steps", "rows", "cols", "inner", "heads"), ("i32",) * 4),
    ),
}


def compile_rows(arch: str) -> dict[str, tuple[int, int]]:
    """Registers and spilled bytes of the row kernels that take several tensors."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from cpattn.collectives import row_kernels_triton

    target, made = GPUTarget("cuda", int(arch[2:]), 32), {}
    for name, (constants, types) in _ROWS.items():
        kernel = getattr(row_kernels_triton, f"{name}_kernel")
        signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in kernel.arg_names}
        options = {"num_warps": 8 if name == "merge_calls" else 4}
        source = ASTSource(kernel, signature, constexprs=constants)
        made[name] = _usage(triton.compile(source, target=target, options=options).asm)
    return made


def _type_of(argument: str, kernel: str, element: torch.dtype, constant: bool) -> str:
    if constant:
        return "constexpr"
    if argument in ("blocks", "full", "edges"):
        return "*i32"
    if argument in ("factor", "cap", "scale"):
        return "fp32"
    if argument == "num_queries" or argument.startswith("stride_"):
        return "i32"
    accumulator = argument in _FP32 or (argument == "out_QNE" and kernel == "forward")
    return "*fp32" if accumulator else _POINTERS[element]


def _usage(asm: dict[str, Any]) -> tuple[int, int]:
    """Registers of a thread, and bytes of its stack."""
    if "amdgcn" in asm:
        text = asm["amdgcn"]
        spilled = [int(n) for n in re.findall(r"\.vgpr_spill_count:\s*(\d+)", text)]
        return max(int(n) for n in re.findall(r"\.vgpr_count:\s*(\d+)", text)), 4 * max(spilled)
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        said = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", said.stdout + said.stderr)
    assert found is not None, f"cuobjdump said {said.stdout!r}"
    return int(found[1]), int(found[2])


def _matrix(asm: dict[str, Any]) -> str:
    text = asm.get("ptx") or asm["amdgcn"]
    for found, name in (("tcgen05.mma", "tcgen05"), ("wgmma.mma", "wgmma"), ("mma.sync", "mma"), ("v_mfma", "mfma")):
        if found in text:
            return name
    return "none (fma)"


def table_of(results: list[Compiled]) -> str:
    """The results as markdown."""
    lines = [
        "| kernel | GPU | dtype | head dim | rows x keys, warps, stages | registers | spilled bytes "
        "| shared KiB (limit) | multiplies by |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        tile = f"{r.tile.rows} x {r.tile.keys}, {r.tile.warps}, {r.tile.stages}"
        shared = f"{r.shared / 1024:.0f} ({SHARED_LIMIT[r.arch] // 1024})"
        lines.append(
            f"| {r.kernel} | {r.arch} | {r.dtype} | {r.head_dim} | {tile} | {r.registers} | {r.spills} | {shared} | "
            f"{r.matrix} |"
        )
    return "\n".join(lines) + "\n"


def _write(out: Path, results: list[Compiled]) -> None:
    import triton

    head = (
        f"# Triton kernels, compiled without a GPU\n\n`python -m cpattn.launch.benchmarks.triton_compile`, triton "
        f"{triton.__version__}, Python {platform.python_version()}, {platform.machine()}. "
        f"Grouped heads (4), no softcap; nothing was run.\n\n"
    )
    (out / "triton_compile.md").write_text(head + table_of(results))
    rows = [r._asdict() | {"tile": list(r.tile)} for r in results]
    report = {"triton": triton.__version__, "kernels": rows}
    (out / "triton_compile.json").write_text(json.dumps(report, indent=1) + "\n")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for triton_compile.md and .json")
    parser.add_argument("--arch", nargs="*", choices=tile_kinds(), default=list(tile_kinds()))
    parser.add_argument("--head-dim", nargs="*", type=int, default=[64, 128])
    parser.add_argument("--dtype", nargs="*", choices=DTYPES, default=["bfloat16"])
    parser.add_argument("--kernel", nargs="*", choices=KERNELS, default=list(KERNELS))
    parser.add_argument("--rows", action="store_true", help="the row kernels instead")
    args = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET"):
        parser.error("TRITON_INTERPRET is set, under which nothing is compiled: unset it")
    args.out.mkdir(parents=True, exist_ok=True)
    if args.rows:
        made = {arch: compile_rows(arch) for arch in args.arch if arch.startswith("sm")}
        (args.out / "row_kernels.json").write_text(json.dumps(made, indent=1) + "\n")
        return 0
    results: list[Compiled] = []
    for arch in args.arch:
        for dtype in args.dtype:
            for head_dim in args.head_dim:
                for kernel in args.kernel:
                    results.append(compile_kernel(kernel, arch, dtype, head_dim))
                    print(results[-1], flush=True)
                    _write(args.out, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
