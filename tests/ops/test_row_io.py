"""Gathering and scattering of row fields; whole rows are in table/test_row_store.py."""

import pytest
import torch

from recis_lightning.ops.header import Header
from recis_lightning.ops.layout import NEXT_ROW
from recis_lightning.ops.row_io import RowField, gather_fields, scatter_fields_
from recis_lightning.table.row_store import RowStore


def store_of(num_rows, words):
    header = Header(torch.device("cpu"), False)
    store = RowStore(header, words, torch.float32)
    store.reserve(num_rows)
    header.fields[NEXT_ROW] = num_rows
    rows = torch.arange(num_rows)
    store.write(rows, torch.arange(float(num_rows * words)).view(num_rows, words), {})
    return store, rows


@pytest.mark.parametrize("num_rows", [0, 1, 5000])
@pytest.mark.parametrize("num_bytes", [1, 2, 4, 64, 67, 140])
def test_fields_are_copied_byte_by_byte(backend, num_rows, num_bytes):
    """Each field reads as its bytes of the row, and writing it changes no others."""
    store, rows = store_of(num_rows, 37)
    whole = store.read(rows)[0].view(torch.uint8)
    first = 148 - num_bytes
    field, front = (torch.full((num_rows, n), 99, dtype=torch.uint8) for n in (num_bytes, 4))
    gather_fields(store.header, rows, [RowField(field, first), RowField(front, 0)])
    assert torch.equal(field, whole[:, first:])
    assert torch.equal(front, whole[:, :4])
    back = rows.flip(0)
    scatter_fields_(store.header, back, [RowField(field, first)])
    assert torch.equal(store.read(back)[0].view(torch.uint8)[:, first:], field)
    assert torch.equal(store.read(rows)[0].view(torch.uint8)[:, :first], whole[:, :first])


def test_one_field_for_all_rows(backend):
    """A tensor of one row is written to every row."""
    store, rows = store_of(300, 5)
    scatter_fields_(store.header, rows[::2].contiguous(), [RowField(torch.full((1, 2), -1.0), 4)])
    values = store.read(rows)[0]
    assert (values[::2, 1:3] == -1).all()
    assert (values[1::2] >= 0).all()
    assert (values[::2, 3] > 0).all()
