"""Gathering and scattering of row fields: the contract.

A saved table has its weights, and each slot of optimizer state, in a tensor of its own; in the
table they are fields of one row. One pass over the rows fills or reads all of these tensors.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

from recis_lightning.ops import backend, mapped_rows
from recis_lightning.ops import layout as fields
from recis_lightning.ops.header import Header

Plan = npt.NDArray[np.int64]


class RowField(NamedTuple):
    """Field of each row, in a tensor of its own.

    Attributes:
        data: [n, k], rows contiguous; [1, k] writes the same to all rows.
        first_byte: Offset of the field in a row.
    """

    data: Tensor
    first_byte: int


def gather_fields(header: Header, rows: Tensor, row_fields: list[RowField]) -> None:
    """Copy fields of rows to tensors.

    Args:
        header: The table's header.
        rows: int64 [n], none negative.
        row_fields: Tensors to fill, [n, k] each.
    """
    with backend.region("recis::read_columns", lambda: _num_bytes(rows, row_fields)):
        module = backend.module("row_io", rows.device)
        for chunk in mapped_rows.chunks(header, rows.numel()):
            part, plan = rows[chunk], _plan_of(row_fields, rows.numel(), chunk)
            mapped_rows.bring_in([(header, part)], writes=False)
            module.gather_fields(header, part, plan)


def scatter_fields_(header: Header, rows: Tensor, row_fields: list[RowField]) -> None:
    """Overwrite fields of rows.

    Args:
        header: The table's header.
        rows: int64 [n], distinct, none negative.
        row_fields: Tensors to write.
    """
    with backend.region("recis::write_columns", lambda: _num_bytes(rows, row_fields)):
        module = backend.module("row_io", rows.device)
        for chunk in mapped_rows.chunks(header, rows.numel()):
            part, plan = rows[chunk], _plan_of(row_fields, rows.numel(), chunk)
            mapped_rows.bring_in([(header, part)], writes=True)
            module.scatter_fields_(header, part, plan)


def _num_bytes(rows: Tensor, row_fields: list[RowField]) -> int:
    """Return the bytes that are moved: each field read and written."""
    size = sum(data.shape[1] * data.element_size() for data, _ in row_fields)
    return rows.nbytes + 2 * rows.numel() * size


def _plan_of(row_fields: list[RowField], num_rows: int, chunk: slice) -> Plan:
    """Describe fields of a chunk of rows to a kernel: int64 [num_fields, ROW_FIELD_SIZE]."""
    plan = np.empty((len(row_fields), fields.ROW_FIELD_SIZE), np.int64)
    for line, (data, first_byte) in zip(plan, row_fields, strict=True):
        num_bytes = data.shape[1] * data.element_size()
        stride = num_bytes if data.shape[0] == num_rows else 0
        line[fields.ROW_FIELD_DATA] = data.data_ptr() + chunk.start * stride
        line[fields.ROW_FIELD_STRIDE] = stride
        line[fields.ROW_FIELD_FIRST_BYTE] = first_byte
        line[fields.ROW_FIELD_NUM_BYTES] = num_bytes
    return plan


__all__ = ["RowField", "gather_fields", "scatter_fields_"]
