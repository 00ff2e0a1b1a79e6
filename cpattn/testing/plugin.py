"""pytest's mark `ranks`: a test whose body runs on several ranks at once.

    @pytest.mark.ranks(4)
    @pytest.mark.parametrize("length", [64, 101])
    def test_my_model(length):              # on each of four processes, in a process group of all of them
        ...

Under torchrun pytest runs on every rank already: the body then runs where it is, if there are as many ranks.
"""

from __future__ import annotations

import functools
import os
import sys
from typing import Any, NamedTuple

import pytest

_MARK = "ranks(n, *, backend='gloo', timeout=120): run the test's body on n processes, in one process group"


class _Ranks(NamedTuple):
    """What the mark says."""

    number: int
    backend: str
    timeout: float

    @classmethod
    def of(cls, mark: pytest.Mark) -> _Ranks:
        """
        Raises:
            UsageError: the arguments are not those of the mark.
        """
        options = {"backend": "gloo", "timeout": 120.0, **mark.kwargs}
        count = mark.args[0] if len(mark.args) == 1 else None
        known = set(options) == {"backend", "timeout"} and options["backend"] in ("gloo", "nccl")
        if not known or isinstance(count, bool) or not isinstance(count, int) or count < 1:
            given = ", ".join([*map(repr, mark.args), *(f"{k}={v!r}" for k, v in mark.kwargs.items())])
            raise pytest.UsageError(f"ranks({given}): write ranks(4), or with backend='nccl' or timeout=300")
        return cls(count, options["backend"], float(options["timeout"]))


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", _MARK)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    mark = pyfuncitem.get_closest_marker("ranks")
    if mark is None:
        return None
    ranks = _Ranks.of(mark)
    arguments = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}
    _require_devices(ranks)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        _run_here(pyfuncitem.obj, arguments, ranks)
    else:
        _run_in_pool(pyfuncitem.obj, arguments, ranks)
    return True


def pytest_unconfigure() -> None:
    harness = sys.modules.get("cpattn.testing.harness")  # not imported here: other runs need no torch
    if harness is not None:
        harness.shutdown_pools()


def _require_devices(ranks: _Ranks) -> None:
    """Skip where NCCL has not a device for each rank."""
    if ranks.backend == "nccl":
        import torch

        found = torch.cuda.device_count()
        if found < ranks.number:
            pytest.skip(f"{ranks.number} ranks on nccl need as many CUDA devices, and here are {found}")


def _run_in_pool(function: Any, arguments: dict[str, Any], ranks: _Ranks) -> None:
    from .harness import RankError, run_on_ranks

    try:
        # Bound, as a fixture may have the name of an option of run_on_ranks.
        body = functools.partial(function, **arguments)
        run_on_ranks(ranks.number, body, timeout=ranks.timeout, backend=ranks.backend)
    except RankError as error:
        # The rank's own traceback says it all: that of this process leads to the pipe alone.
        pytest.fail(str(error), pytrace=False)


def _run_here(function: Any, arguments: dict[str, Any], ranks: _Ranks) -> None:
    """On this rank, one of torchrun's."""
    import torch
    import torch.distributed as dist

    size = int(os.environ["WORLD_SIZE"])
    if size != ranks.number:
        pytest.skip(f"a test of {ranks.number} ranks, and torchrun started {size}")
    if not dist.is_initialized():
        if ranks.backend == "nccl":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group(ranks.backend)
    function(**arguments)
    dist.barrier()
