"""Initial rows: a pure function of (seed, table name, id, column).

A counter-based generator: the value at a column is a hash of the table's key, the id and the
column, turned into the wanted distribution. So an id starts from the same row on every device (to
float rounding), in every insertion order, on any number of ranks, and again after eviction.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np
from torch import Tensor

from recis_lightning.ops import backend, traffic
from recis_lightning.ops.hash_index import Segments
from recis_lightning.ops.header import Header
from recis_lightning.ops.layout import INIT_ARGS, INIT_KEY, INIT_KIND


def init_key(seed: int, name: str) -> int:
    """Hash a table's seed and name into the key of its initial rows (int64)."""
    digest = hashlib.blake2b(f"{seed}\0{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def write_distribution(header: Header, kind: int, args: tuple[float, ...]) -> None:
    """Enter a distribution into a table's header.

    Args:
        header: int64 [HEADER_SIZE].
        kind: ``INIT_CONSTANT`` (value), ``INIT_UNIFORM`` (low, high), ``INIT_NORMAL`` (mean, std)
            or ``INIT_TRUNCATED_NORMAL`` (mean, std, low, high; bounds in standard deviations from
            the mean).
        args: The values named above.
    """
    values = header.fields
    values[INIT_KIND] = kind
    padded = np.zeros(4)
    padded[: len(args)] = args
    values[INIT_ARGS : INIT_ARGS + 4] = padded.view(np.int64)
    header.publish()


def write_key(header: Header, seed: int, name: str) -> None:
    """Enter the key of (seed, name) into a table's header."""
    header.fields[INIT_KEY] = init_key(seed, name)
    header.publish()


def init_rows_(
    rows: Tensor,
    new: Tensor,
    segments: Segments,
    embedding_dim: int,
    bfloat16: bool,
    row_bytes: Callable[[], int] | None = None,
) -> None:
    """Write initial weights and empty optimizer state into the rows of new ids.

    Args:
        rows: int64 [n], as ``find_or_insert`` returned them.
        new: int64 [m], positions of the new ids, ascending, then any number of -1.
        segments: As given to ``find_or_insert``.
        embedding_dim: Weights in a row.
        bfloat16: Whether weights are bfloat16 (else float32).
        row_bytes: Returns the bytes of a row, for ``ops.traffic``; None: those of its weights.
    """

    def num_bytes() -> int:
        size = embedding_dim * (2 if bfloat16 else 4) if row_bytes is None else row_bytes()
        return traffic.of_new_rows(int((new >= 0).sum()), size)

    with backend.region("recis::init_rows", num_bytes):
        module = backend.module("row_init", rows.device)
        module.init_rows_(rows, new, segments, embedding_dim, bfloat16)
