"""Exchanges of rows between the ranks of a group, and the merge of partial attention results.

Knows routes and tensors, not masks.
"""

from .devices import backend_of, control_device, current_device, define_launches, one_copy, put_on
from .exchange import (
    PendingRows,
    RowRoutes,
    Transport,
    all_gather,
    group_cast,
    group_reduce,
)
from .headers import PendingHeaders, gather_headers, roll_call
from .heads import HeadExchange, heads_to_rows, rows_to_heads
from .merge import merge_partials
from .packing import packed_row_bytes, unpack_rows
from .wire import Fp8Rows, RowCodec, cast_encoded

__all__ = [
    "Fp8Rows",
    "HeadExchange",
    "PendingHeaders",
    "PendingRows",
    "RowCodec",
    "RowRoutes",
    "Transport",
    "all_gather",
    "backend_of",
    "cast_encoded",
    "control_device",
    "current_device",
    "define_launches",
    "gather_headers",
    "group_cast",
    "group_reduce",
    "heads_to_rows",
    "merge_partials",
    "one_copy",
    "packed_row_bytes",
    "put_on",
    "roll_call",
    "rows_to_heads",
    "unpack_rows",
]
