"""Solver layer: bytes and seconds of the cost model, the presets, and the choice of stages."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from cpattn.solver import (
    DEFAULT_HARDWARE,
    HARDWARE,
    Hardware,
    Heads,
    Link,
    row_costs,
)


def test_row_bytes_by_hand() -> None:
    """Heads 32:8 of 128 in bf16: k and v are 8 * 128 * 2 bytes each, their gradients twice that."""
    row = Heads(32, 8, 128, 128).row_bytes()
    assert row.kv == 2 * 8 * 128 * 2
    assert row.dkv == 2 * row.kv
    assert row.q == 32 * 128 * 2
    assert row.partial == row.q + 32 * 4
    assert row.q_again == 2 * row.q + 2 * 32 * 4
    costs = row_costs(32, 8, 128, 128)
    assert costs.kv == 2 * row.kv + row.dkv
    assert costs.q == row.q + row.partial + row.q_again + row.dq


def test_backward_is_five_halves_of_forward_at_equal_dims() -> None:
    heads = Heads(8, 8, 64, 64)
    assert heads.backward_flop == 2.5 * heads.forward_flop


def test_a_transfer_of_nothing_takes_no_time() -> None:
    link = Link(1e-5, 1e9)
    assert link.seconds(np.array([0.0, 1e9])).tolist() == [0.0, 1.0 + 1e-5]


@pytest.mark.parametrize("name", HARDWARE)
def test_presets_survive_json_and_name_their_source(name: str) -> None:
    hardware = HARDWARE[name]
    assert Hardware.from_json(hardware.to_json()) == hardware
    assert "assumed" in hardware.source


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "Expecting property name"),
        ("[1]", "a list"),
        ("{}", "across, backward_flops, .* missing"),
        ("3", "an? int"),
        (DEFAULT_HARDWARE.to_json().replace('"source"', '"sauce"'), "sauce"),
    ],
)
def test_bad_hardware_files_are_refused(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=rf"not a hardware description \(.*{reason}.*\): expected a JSON object"):
        Hardware.from_json(text)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("ranks_per_node", 2.5, "ranks_per_node is 2.5: an int of at least 1"),
        ("launch_s", True, "launch_s is True: a time is a finite number, at least 0"),
        ("forward_flops", "fast", "forward_flops is 'fast': a rate is a finite number above 0"),
        ("within", {"latency_s": -1, "bytes_per_s": 1.0}, r"within\.latency_s is -1: a time"),
    ],
)
def test_bad_fields_of_hardware_are_named(field: str, value: object, message: str) -> None:
    values = json.loads(DEFAULT_HARDWARE.to_json())
    with pytest.raises(ValueError, match=message):
        Hardware.from_json(json.dumps({**values, field: value}))


def test_a_file_from_before_the_load_of_transfers_is_read() -> None:
    values = json.loads(DEFAULT_HARDWARE.to_json())
    del values["transfer_load"]
    assert Hardware.from_json(json.dumps(values)) == DEFAULT_HARDWARE


def test_merging_by_hand() -> None:
    """Rows of 3 query heads and 2 key heads in fp32, at 1 KB/s."""
    hardware = dataclasses.replace(DEFAULT_HARDWARE, copy_bytes_per_s=1e3)
    heads, rows, keys = Heads(3, 2, 5, 7), np.array([10.0]), np.array([20.0])
    assert hardware.merge_seconds(rows, keys, heads)[0] == pytest.approx(10 * 3 * 7 * 4 / 1e3)
    backward = (10 * 3 * 5 + 20 * 2 * (5 + 7)) * 4 / 1e3
    assert hardware.merge_seconds(rows, keys, heads, backward=True)[0] == pytest.approx(backward)


def test_numbers_out_of_range_are_refused() -> None:
    text = DEFAULT_HARDWARE.to_json().replace("645000000000000.0", "-1")
    with pytest.raises(ValueError, match=r"forward_flops is -1: a rate is a finite number above 0"):
        Hardware.from_json(text)
    text = DEFAULT_HARDWARE.to_json().replace('"transfer_load": 0.0', '"transfer_load": 1.5')
    with pytest.raises(ValueError, match=r"transfer_load is 1\.5: a share, from 0 to 1"):
        Hardware.from_json(text)
    text = DEFAULT_HARDWARE.to_json().replace('"hops_by_host": false', '"hops_by_host": "no"')
    with pytest.raises(ValueError, match="hops_by_host is 'no': true or false"):
        Hardware.from_json(text)
