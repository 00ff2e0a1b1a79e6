"""Layer 1: the hardware that keys, plans and commands take."""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path
from typing import Any

import pytest

from cpattn.planning.hardware import find_hardware
from cpattn.solver import DEFAULT_HARDWARE, HARDWARE, Heads


def test_presets_files_and_descriptions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = dataclasses.replace(DEFAULT_HARDWARE, name="here")
    assert find_hardware(here) is here
    assert find_hardware("h200") is HARDWARE["h200"]
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        file = tmp_path / name / "here.json"
        file.write_text(dataclasses.replace(here, name=name).to_json())
        os.utime(file, ns=(1, 1))
        monkeypatch.chdir(file.parent)
        assert find_hardware("here.json").name == find_hardware(file).name == name
    file.write_text(here.to_json())
    assert find_hardware(file) == here, "a file that has changed is read again"


def test_what_is_none_is_refused_with_its_reason(tmp_path: Path) -> None:
    (tmp_path / "text.json").write_text("{")
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\xff")
    cases: tuple[tuple[Any, str], ...] = (
        ("abacus", "hardware is 'abacus': give one of h100, .*No such file"),
        (3, "hardware is 3: give one of h100, .*not int"),
        (tmp_path, "is a folder"),
        (tmp_path / "text.json", rf"hardware file {re.escape(str(tmp_path))}/text.json: not a hardware description .*"),
        ("a\0b", "embedded null byte"),
        (tmp_path / "bytes.json", r"bytes.json: .*can't decode byte.*; `cpattn calibrate --out` writes one"),
    )
    for hardware, message in cases:
        with pytest.raises(ValueError, match=message):
            find_hardware(hardware)


def test_a_calibration_tells_as_often_as_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or its bar would end early, or never."""
    pytest.importorskip("typer")
    from cpattn.launch import calibrate

    monkeypatch.setattr(calibrate, "_kernel_seconds", lambda lengths, *rest: (1e-6 * sum(lengths), 2e-6 * sum(lengths)))
    told: list[str] = []
    calibrate.calibrate(Heads(4, 2, 16), device="cpu", tokens=256, tell=told.append)
    assert len(told) == calibrate.parts_of_calibration(1)
    assert calibrate.parts_of_calibration(4) == len(told) + 3 * 4, "one, half and all of three peers, four sizes"
