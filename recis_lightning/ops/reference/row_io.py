"""Gathering and scattering of row fields in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from recis_lightning.ops import row_io
from recis_lightning.ops.header import Header
from recis_lightning.ops.reference.storage import Rows, memory


def gather_fields(header: Header, rows: Tensor, plan: row_io.Plan) -> None:
    words = Rows.of(header.tensor, rows).read(rows).view(torch.uint8)
    for line in plan:
        field, data = _field_and_data(words, line)
        data.copy_(field)


def scatter_fields_(header: Header, rows: Tensor, plan: row_io.Plan) -> None:
    store = Rows.of(header.tensor, rows)
    words = store.read(rows)
    for line in plan:
        field, data = _field_and_data(words.view(torch.uint8), line)
        field.copy_(data)
    store.write(rows, words)


def _field_and_data(words: Tensor, line: row_io.Plan) -> tuple[Tensor, Tensor]:
    """Return the field of the rows and the tensor that a line of a plan names, uint8 [n, bytes]."""
    address, stride, first, num_bytes = line.tolist()
    count = len(words) if stride else 1
    data = memory(address, count * num_bytes, torch.uint8).view(count, num_bytes)
    return words[:, first : first + num_bytes], data.expand(len(words), -1)
