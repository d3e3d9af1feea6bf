"""Copy parts of rows out of a table, or into it: the contract.

A saved table has its weights, and each slot of optimizer state, in a tensor of its own; in the
table they stand side by side in a row. One pass over the rows fills or reads all of these tensors.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

from recis_lightning.ops import backend
from recis_lightning.ops import layout as fields
from recis_lightning.ops.header import Header

# Aliases until all rooms name the fields of ops.layout.
PLAN_SIZE = fields.ROW_FIELD_SIZE
DATA = fields.ROW_FIELD_DATA
STRIDE = fields.ROW_FIELD_STRIDE
FIRST_BYTE = fields.ROW_FIELD_FIRST_BYTE
NUM_BYTES = fields.ROW_FIELD_NUM_BYTES

Plan = npt.NDArray[np.int64]


class Column(NamedTuple):
    """A part of each row, in a tensor of its own.

    Attributes:
        data: [n, k], rows contiguous; [1, k] writes the same to all rows.
        first_byte: Where in a row the part begins.
    """

    data: Tensor
    first_byte: int


def read_columns(header: Header, rows: Tensor, columns: list[Column]) -> None:
    """Copy parts of rows to tensors.

    Args:
        header: The table's header.
        rows: int64 [n], none negative.
        columns: What to fill, [n, k] each.
    """
    with backend.region("recis::read_columns"):
        module = backend.module("row_io", rows.device)
        module.read_columns(header, rows, plan_of(columns, rows.numel()))


def write_columns_(header: Header, rows: Tensor, columns: list[Column]) -> None:
    """Overwrite parts of rows.

    Args:
        header: The table's header.
        rows: int64 [n], distinct, none negative.
        columns: What to write.
    """
    with backend.region("recis::write_columns"):
        module = backend.module("row_io", rows.device)
        module.write_columns_(header, rows, plan_of(columns, rows.numel()))


def plan_of(columns: list[Column], num_rows: int) -> Plan:
    """Describe columns to a kernel: int64 [len(columns), PLAN_SIZE]."""
    plan = np.empty((len(columns), PLAN_SIZE), np.int64)
    for line, (data, first_byte) in zip(plan, columns, strict=True):
        num_bytes = data.shape[1] * data.element_size()
        stride = num_bytes if data.shape[0] == num_rows else 0
        line[:] = data.data_ptr(), stride, first_byte, num_bytes
    return plan


__all__ = ["Column", "read_columns", "write_columns_"]
