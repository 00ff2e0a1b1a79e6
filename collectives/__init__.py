"""Exchanges of rows between the ranks of a group, and the merge of partial attention results.

Knows routes and tensors, not masks.
"""

from .exchange import PendingRows, RowRoutes, group_cast, group_reduce
from .merge import merge_partials

__all__ = ["PendingRows", "RowRoutes", "group_cast", "group_reduce", "merge_partials"]
