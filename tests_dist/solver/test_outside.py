"""Layer 1: text from outside is read with limits, and what says two things or nothing is refused."""

from __future__ import annotations

import os

import pytest

from cpattn.solver import Hardware, outside
from cpattn.solver.outside import parse_json, read_text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000 + "]" * 100_000, "nested more than 16 deep"),
        ("[" * 17 + "]" * 17, "nested more than 16 deep"),
        ('{"a": 1, "b": {"c": 2, "c": 2}}', "the key 'c' is given twice"),
        ("[NaN]", "NaN is no number of JSON"),
        ("-Infinity", "-Infinity is no number of JSON"),
        ("1e400", "1e400 is beyond every float"),
        ("9" * 5000, "Exceeds the limit"),
        ("[1, 2", "Expecting"),
    ],
)
def test_json_that_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_json(text)


def test_json_that_is_read():
    assert parse_json("[" * 16 + "]" * 16) == eval("[" * 16 + "]" * 16)
    assert parse_json('{"a": [true, null, -1.5e3, "\\u00e9"]}') == {"a": [True, None, -1500.0, "\u00e9"]}


def test_only_regular_files_of_some_size_are_read(tmp_path, monkeypatch):
    """A pipe without a writer must not be waited for."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    (tmp_path / "long").write_text("12345")
    (tmp_path / "link").symlink_to("/dev/zero")
    monkeypatch.setattr(outside, "MAX_BYTES", 4)
    for name, message in {
        "pipe": "pipe is a pipe: give a regular file",
        "": "is a folder",
        "link": "is a device",
        "bytes": "is no text: .*can't decode byte",
        "long": "has 5 bytes: at most 4 are read",
        "none": "cannot be read: No such file",
    }.items():
        with pytest.raises(ValueError, match=message):
            read_text(tmp_path / name)
    (tmp_path / "long").write_text("1234")
    assert read_text(tmp_path / "long") == "1234"


def test_hardware_goes_through_it():
    for text in ("[" * 100_000, '{"name": 1, "name": 2}', '{"forward_flops": NaN}'):
        with pytest.raises(ValueError, match=r"not a hardware description \((it is nested|the key|NaN)"):
            Hardware.from_json(text)
