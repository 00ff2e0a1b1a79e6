"""Exchanges of rows between the ranks of a group, and the merge of partial attention results.

Knows routes and tensors, not masks.
"""

from .exchange import PendingRows, RowRoutes, all_gather, group_cast, group_reduce
from .merge import merge_partials
from .wire import Fp8Rows, RowCodec, cast_encoded

__all__ = [
    "Fp8Rows",
    "PendingRows",
    "RowCodec",
    "RowRoutes",
    "all_gather",
    "cast_encoded",
    "group_cast",
    "group_reduce",
    "merge_partials",
]
