"""The choice of a local kernel: names, refusals in words, preference, and what explains it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import cpattn
from cpattn import AttnMaskSpec, backends
from cpattn.backends import Problem, choose_backend, explain_backends, explain_choice
from cpattn.backends.flash_attn import FlashAttnBackend
from cpattn.backends.reference import ReferenceBackend
from tests_dist.test_layers import imports_of


def _problem(device: str = "cpu", dtype: torch.dtype = torch.bfloat16, softcap: bool = False) -> Problem:
    return Problem(device, dtype, 8, 2, 64, 64, softcap)


@pytest.mark.parametrize(
    ("name", "package"),
    [
        ("te", "transformer-engine"),
        ("cudnn", "nvidia-cudnn-frontend"),
        ("ffa", "magi_attention"),
        ("flash_attn", "flash-attn"),
    ],
)
def test_a_missing_package_is_named_and_nothing_else_is_taken(name: str, package: str) -> None:
    if any(refusal is None for _, refusal in explain_backends(_problem("cuda"), name)):
        pytest.skip(f"{package} is installed")
    with pytest.raises(ValueError, match=f"the package {package}.* is not installed"):
        choose_backend(_problem("cuda"), name)


def test_make_key_with_a_kernel_for_gpus_needs_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans for GPUs need none: they take no backend."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    heads = {"num_heads_q": 1, "num_heads_kv": 1, "head_dim": 8}
    with pytest.raises(ValueError, match=r"'te' cannot run in this process, which sees no GPU: te .*(install|runs on)"):
        cpattn.make_key(AttnMaskSpec.causal(8), **heads, backend="te")
    assert cpattn.make_plan(AttnMaskSpec.causal(8), **heads, cp_size=2, hardware="h200").plan.cp_size == 2


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(ValueError, match="backend 'tee' is unknown: use auto, fastest, sdpa, "):
        choose_backend(_problem(), "tee")


def test_auto_on_cpu() -> None:
    assert choose_backend(_problem()).name == "sdpa"
    assert choose_backend(_problem(softcap=True)).name == "reference"
    said = explain_choice(_problem(softcap=True))
    assert "not sdpa: torch's CPU flash kernel has no softcap" in said
    assert explain_choice(_problem(), "reference").endswith("as named")


def test_auto_takes_only_what_its_table_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "device_kind", lambda device_type: "sm120")
    said = {b.name: refusal for b, refusal in explain_backends(_problem("cuda"))}
    assert said["flex"] is None
    assert choose_backend(_problem("cuda", softcap=True)).name == "flex"
    assert "not installed" in str(said["te"])


def test_describe_explains_the_backend() -> None:
    key = cpattn.make_key(AttnMaskSpec.causal(64), num_heads_q=2, num_heads_kv=1, head_dim=16)
    line = next(x for x in key.describe(device="cpu").splitlines() if x.startswith("backend"))
    assert line.startswith("backend (bfloat16 on cpu): sdpa (torch's CPU flash attention), first that serves")


def test_register_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_backends", list(backends._backends))

    class Mine(ReferenceBackend):
        name = "mine"

    backends.register_backend(Mine())
    assert choose_backend(_problem(), "mine").name == "mine"
    assert choose_backend(_problem()).name == "sdpa"
    with pytest.raises(ValueError, match="'mine' is taken"):
        backends.register_backend(Mine())


def test_head_dims_are_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cpattn.backends.flash_attn.missing_package", lambda module, package, how: None)
    wide = Problem("cuda", torch.bfloat16, 8, 8, 320, 320)
    assert FlashAttnBackend(2).refusal(wide) == "head_dim 320 is more than it takes here (256)"


def test_doctor() -> None:
    typer = pytest.importorskip("typer.testing")
    from cpattn.launch.commands import app

    run = typer.CliRunner().invoke
    result = run(app, ["doctor", "--device", "cpu"])
    assert result.exit_code == 0
    assert "auto would run: sdpa" in result.output
    assert "not installed" in result.output
    result = run(app, ["doctor", "--device", "cpu", "--backend", "te"])
    assert result.exit_code == 1
    assert run(app, ["doctor", "--device", "cpu", "--dtype", "fp32"]).exit_code == 0
    for bad in (["--dtype", "float99"], ["--device", "tpu"], ["--head-dim", "0"], ["--heads", "3:2"]):
        assert run(app, ["doctor", *bad]).exit_code == 2


def test_a_kernel_imports_no_kernel() -> None:
    """What two kernels share lies beneath both, so a kernel can be read, and removed, alone."""
    kernels = {type(b).__module__ for b in backends._backends}
    assert len(kernels) > 5
    for module in kernels:
        path = Path(sys.modules[module].__file__ or "")
        imported = {i.module for i in imports_of(path.read_text(), module, is_package=False)}
        assert not [i for i in imported for other in kernels - {module} if i.startswith(other + ".")], module
