"""A mask from a JSON text: the file of `--file`."""

from __future__ import annotations

import json
from typing import Any

from cpattn.masks.spec import AttnMaskSpec
from cpattn.solver.outside import parse_json

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
