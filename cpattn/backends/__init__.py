"""Local attention kernels, one file each, and the choice among them."""

from __future__ import annotations

import torch

from .base import FLOAT_DTYPES, Attending, Backend, KeyRows, Problem, Returning, Scoring
from .cudnn import CudnnBackend
from .ffa import FfaBackend
from .flash_attn import FlashAttnBackend
from .flex import FlexBackend
from .installed import device_capability
from .reference import ReferenceBackend
from .sdpa_cpu import SCRATCH as CPU_SCRATCH
from .sdpa_cpu import CpuSdpaBackend
from .sdpa_cuda import SCRATCH as CUDA_SCRATCH
from .sdpa_cuda import CudaSdpaBackend
from .te import TeBackend
from .triton import TritonBackend

__all__ = [
    "KERNEL_SCRATCH",
    "Attending",
    "Backend",
    "FlexBackend",
    "KeyRows",
    "Problem",
    "Returning",
    "Scoring",
    "backend_names",
    "choose_backend",
    "device_kind",
    "explain_backends",
    "explain_choice",
    "register_backend",
    "serving_backends",
    "why_never",
]

# A name may stand for several kernels; those that come first are preferred among them.
_backends: list[Backend] = [
    CpuSdpaBackend(),
    CudaSdpaBackend(),
    FlashAttnBackend(3),
    FlashAttnBackend(4),
    FlashAttnBackend(2),
    CudnnBackend(),
    TeBackend(),
    FfaBackend(),
    FlexBackend(),
    ReferenceBackend(),
    TritonBackend(),
]

# Bytes that an operator allocates inside, beyond its results, from its arguments. An operator that is not listed is
# taken to need none.
KERNEL_SCRATCH = CPU_SCRATCH | CUDA_SCRATCH

# What backend="auto" tries, by kind of device. Order by speed where launch/benchmarks/kernels.py has
# measured it on such a device; until then torch's own kernels come first, and then the published order.
# Not listed: never chosen unless named.
_PREFERENCE: dict[str, tuple[str, ...]] = {
    "cpu": ("sdpa", "reference", "flex"),  # measured
    "sm80": ("sdpa", "flash_attn", "flex", "reference"),
    "sm90": ("sdpa", "flash_attn", "cudnn", "te", "ffa", "flex", "reference"),
    "sm100": ("sdpa", "cudnn", "te", "flash_attn", "flex", "reference"),
}
_PREFERENCE_ELSEWHERE = ("sdpa", "flex", "reference")


# Names that `backend=` takes and that are no kernel's: by the table above, and by trial (`runtime/fastest.py`).
CHOICES = ("auto", "fastest")


def register_backend(backend: Backend) -> None:
    """Make a kernel of one's own available under its name; "auto" does not choose it, "fastest" may.

    Raises:
        ValueError: the name is taken, or is one of "auto" and "fastest".
    """
    if backend.name in (*CHOICES, *backend_names()):
        raise ValueError(f"backend name {backend.name!r} is taken: choose another")
    _backends.append(backend)


def backend_names() -> tuple[str, ...]:
    """Names that `backend=` takes, besides "auto" and "fastest"."""
    return tuple(dict.fromkeys(b.name for b in _backends))


def device_kind(device_type: str) -> str:
    """The row of the preference table: "cpu", or the GPU's generation such as "sm90"."""
    capability = device_capability(device_type)
    return device_type if capability is None else f"sm{capability[0]}0"


def explain_backends(problem: Problem, name: str = "auto") -> list[tuple[Backend, str | None]]:
    """Every backend of that name (all for "auto"), in order of preference, and why it refuses.

    For "auto", a backend outside the preference of the device comes last, with that as its reason.

    Raises:
        ValueError: the name is unknown.
    """
    listed = _in_order(problem, name)
    explained = [(b, b.refusal(problem)) for b in listed]
    if name != "auto":
        return explained
    others = [b for b in _backends if b not in listed]
    unlisted = f"auto does not use it on {device_kind(problem.device_type)}: name it"
    return explained + [(b, b.refusal(problem) or unlisted) for b in others]


def _in_order(problem: Problem, name: str) -> list[Backend]:
    """Backends of that name, or those that "auto" may take, most preferred first."""
    if name == "auto":
        order = _PREFERENCE.get(device_kind(problem.device_type), _PREFERENCE_ELSEWHERE)
        return sorted((b for b in _backends if b.name in order), key=lambda b: order.index(b.name))
    if name not in backend_names():
        raise ValueError(f"backend {name!r} is unknown: use {', '.join((*CHOICES, *backend_names()))}")
    return [b for b in _backends if b.name == name]


def serving_backends(problem: Problem) -> list[Backend]:
    """What "fastest" tries: every kernel that serves, those first that "auto" prefers.

    Triton's interpreter is left out: it is there for tests, and hundreds of times slower than a kernel.
    """
    tried = [b for b, _ in explain_backends(problem) if (b.name, problem.device_type) != ("triton", "cpu")]
    return [b for b in tried if b.refusal(problem) is None]


def choose_backend(problem: Problem, name: str = "auto") -> Backend:
    """The backend of that name, or for "auto" the first that accepts the problem.

    Raises:
        ValueError: the name is unknown, or none that it stands for accepts; says why each refused.
    """
    for backend in _in_order(problem, name):
        if backend.refusal(problem) is None:
            return backend
    reasons = "; ".join(f"{b.name} ({b.kernel}): {refusal}" for b, refusal in explain_backends(problem, name))
    raise ValueError(f"no backend {name!r} serves {problem}: {reasons}")


def why_never(name: str, head_numbers: tuple[int, int, int, int]) -> str | None:
    """Why no kernel of that name can serve tensors of this process, whatever their dtype; None if one can.

    Tensors can be on the CPU and, if there is one, on a GPU.

    Args:
        head_numbers: query and key heads, dims of q and k and of v.

    Raises:
        ValueError: the name is unknown.
    """
    cuda = torch.cuda.is_available()
    reasons: dict[str, None] = {}  # in order, each once
    for device in ("cuda", "cpu") if cuda else ("cpu",):
        for dtype in FLOAT_DTYPES:
            for backend, refusal in explain_backends(Problem(device, dtype, *head_numbers), name):
                if refusal is None:
                    return None
                reasons[f"{backend.name} ({backend.kernel}): {refusal}"] = None
    where = "" if cuda else ", which sees no GPU"
    return (
        f"backend {name!r} cannot run in this process{where}: {'; '.join(reasons)}; name another backend or 'auto' "
        f"(`cpattn doctor` says which serve here); make_plan plans for other machines"
    )


def explain_choice(problem: Problem, name: str = "auto") -> str:
    """The choice and its reason in a line.

    Raises:
        ValueError: as `choose_backend`.
    """
    chosen = choose_backend(problem, name)
    said = f"{chosen.name} ({chosen.kernel})"
    if name != "auto":
        return f"{said}, as named"
    before = []
    for backend, refusal in explain_backends(problem):
        if backend is chosen:
            break
        if backend.name != chosen.name:  # its like for another device needs no mention
            before.append(f"{backend.name}: {refusal}")
    kind = device_kind(problem.device_type)
    return f"{said}, first that serves in the order for {kind}" + (f"; not {'; '.join(before)}" if before else "")
