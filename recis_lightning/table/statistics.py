"""What a table can tell of itself: ``HashTable.statistics()``."""

from __future__ import annotations

from typing import NamedTuple


class TableStatistics(NamedTuple):
    """Sizes now, and counts since the table was made (loading a state is not counted).

    Attributes:
        rows: Ids that have a row.
        capacity: Entries of the index.
        load: Share of them that is filled.
        index_bytes: Of the index.
        weight_bytes: Of the weights that there is room for, and of the lists of blocks and rows.
        state_bytes: Of the optimizer state that there is room for.
        column_bytes: Of what policies keep.
        admitted: Ids given a row, by a training lookup or ``insert``.
        refused: Occurrences in training lookups that read zeros because the admission policy let
            their id have no row.
        evicted: Rows thrown out by ``evict``.
        readmitted: Ids given a row after an eviction; 0 without ``track_readmissions``.
    """

    rows: int
    capacity: int
    load: float
    index_bytes: int
    weight_bytes: int
    state_bytes: int
    column_bytes: int
    admitted: int
    refused: int
    evicted: int
    readmitted: int


__all__ = ["TableStatistics"]
