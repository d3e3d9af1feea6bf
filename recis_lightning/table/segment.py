"""Segment of a feature in a lookup: the line of numbers by which kernels know its table."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from recis_lightning.ops.layout import (
    CHECK_ADMISSION,
    HAS_PADDING,
    INSERT,
    SEGMENT_FLAGS,
    SEGMENT_HEADER,
    SEGMENT_PADDING,
    TOUCH,
)
from recis_lightning.table.hash_table import HashTable


def write_segment(
    line: np.ndarray[Any, np.dtype[np.int64]],
    table: HashTable,
    insert: bool,
    padding_idx: int | None,
    admits: Literal["policy", "all", "none"] = "policy",
) -> None:
    """Enter what a feature asks of a table, int64 [SEGMENT_SIZE]; not where its ids are.

    Args:
        line: The feature's line of the segments.
        table: Its table.
        insert: Whether the lookup trains.
        padding_idx: An id that reads as zeros, or None.
        admits: Unknown ids that the feature inserts: those that the table's policy admits, or all,
            or none.
    """
    storage = table.storage
    line[SEGMENT_HEADER] = storage.header.address
    inserts, asks_policy = insert and admits != "none", admits == "policy"
    if asks_policy and table.admission is not None:
        inserts = insert and table.admission.admits
    line[SEGMENT_FLAGS] = INSERT * inserts | HAS_PADDING * (padding_idx is not None)
    is_screened = insert and asks_policy and storage.admission_counter is not None
    line[SEGMENT_FLAGS] |= CHECK_ADMISSION * is_screened
    line[SEGMENT_FLAGS] |= TOUCH * (insert and storage.keeps_access_metadata)
    line[SEGMENT_PADDING] = 0 if padding_idx is None else padding_idx


__all__ = ["write_segment"]
