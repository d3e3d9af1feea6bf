"""Gathering and scattering of row fields in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from recis_lightning.ops import row_io
from recis_lightning.ops.header import Header
from recis_lightning.ops.reference.storage import Rows, memory


def read_columns(header: Header, rows: Tensor, plan: row_io.Plan) -> None:
    """See ``row_io.read_columns``."""
    words = Rows.of(header.tensor, rows).read(rows).view(torch.uint8)
    for line in plan:
        part, data = _part(words, line)
        data.copy_(part)


def write_columns_(header: Header, rows: Tensor, plan: row_io.Plan) -> None:
    """See ``row_io.write_columns_``."""
    store = Rows.of(header.tensor, rows)
    words = store.read(rows)
    for line in plan:
        part, data = _part(words.view(torch.uint8), line)
        part.copy_(data)
    store.write(rows, words)


def _part(words: Tensor, line: row_io.Plan) -> tuple[Tensor, Tensor]:
    """Return what a line of a plan names: a part of the rows and the tensor, uint8 [n, bytes]."""
    address, stride, first, num_bytes = line.tolist()
    count = len(words) if stride else 1
    data = memory(address, count * num_bytes, torch.uint8).view(count, num_bytes)
    return words[:, first : first + num_bytes], data.expand(len(words), -1)
