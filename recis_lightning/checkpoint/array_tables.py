"""Tables of plain arrays, ids and rows, as other programs write them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from recis_lightning.checkpoint.progress import Progress
from recis_lightning.checkpoint.saved_tables import (
    FitRules,
    SavedTables,
    TableContents,
    all_or_none,
    check_layout,
)
from recis_lightning.distributed import collectives
from recis_lightning.distributed.ownership import owner_of
from recis_lightning.table import state as table_state
from recis_lightning.table.hash_table import HashTable
from recis_lightning.table.state_schema import SCHEMA, check_distinct

# Ids and rows of a part of a table: int64 [n] and [n, dim], of any floating dtype.
Piece = tuple[Tensor, Tensor]


class ArrayTables(SavedTables):
    """Tables of arrays, without optimizer state and policies' columns.

    Their rows count as seen, once, when they are loaded.

    Args:
        pieces: Parts of each table, by its name.
        file: That they were read from, for errors.

    Raises:
        ValueError: Ids and rows of a piece do not fit each other, or pieces of one table.
    """

    def __init__(self, pieces: Mapping[str, Sequence[Piece]], file: Path) -> None:
        self._pieces, self._file = dict(pieces), file
        for name, parts in self._pieces.items():
            for ids, rows in parts:
                self._check_piece(name, ids, rows)
            layouts = {(rows.shape[1], rows.dtype) for _, rows in parts}
            if len(layouts) != 1:
                raise ValueError(
                    f"{self._where(name)}: its parts differ: {sorted(map(str, layouts))}"
                )

    def _check_piece(self, name: str, ids: Tensor, rows: Tensor) -> None:
        if ids.dim() != 1 or ids.dtype is not torch.int64:
            raise ValueError(
                f"{self._where(name)}: expected int64 ids [n], got {ids.dtype} {list(ids.shape)}"
            )
        if rows.dim() != 2 or not rows.is_floating_point() or rows.shape[1] < 1:
            raise ValueError(
                f"{self._where(name)}: expected floating rows [n, dim], got {rows.dtype} "
                f"{list(rows.shape)}"
            )
        if len(ids) != len(rows):
            raise ValueError(f"{self._where(name)}: {len(ids)} ids and {len(rows)} rows")

    def _where(self, name: str) -> str:
        return f"{self._file}: table {name!r}"

    @property
    @override
    def save_id(self) -> None:
        return None

    @override
    def names(self) -> list[str]:
        return list(self._pieces)

    @override
    def contents(self, name: str) -> TableContents:
        parts = self._pieces[name]
        rows = parts[0][1]
        return TableContents(
            rows=[len(ids) for ids, _ in parts],
            embedding_dim=rows.shape[1],
            dtype=rows.dtype,
            slots={},
            step=0,
            num_updates=0,
            num_bytes=sum(ids.nbytes + of.nbytes for ids, of in parts),
        )

    @override
    def chunks(self, name: str, num_rows: int) -> Iterator[dict[str, Tensor]]:
        for ids, rows in self._pieces[name]:
            for start in range(0, max(len(ids), 1), num_rows):
                stop = start + num_rows
                yield {"ids": ids[start:stop], "weights": rows[start:stop]}

    @override
    def pinned(self, name: str) -> Tensor:
        return torch.empty(0, dtype=torch.int64, device="cpu")

    @override
    def check_fit(self, name: str, table: HashTable, how: FitRules) -> None:
        saved = self.contents(name)
        layout = (saved.embedding_dim, saved.dtype, saved.slots)
        check_layout(self._where(name), table, *layout, how._replace(optimizer_state=False))
        ids = torch.cat([ids for ids, _ in self._pieces[name]])
        check_distinct({"ids": ids}, self._where(name), ["ids"])

    @override
    def load(self, tables: dict[str, HashTable], how: FitRules, progress: Progress) -> None:
        def restore() -> None:
            for name, table in tables.items():
                table_state.load(table, self._state(name, table))

        with all_or_none(tables.values()):
            collectives.run_on_all_ranks(restore)

    def _state(self, name: str, table: HashTable) -> dict[str, Any]:
        """Return this rank's part of a table as the state of another one with the same settings."""
        rank, world_size = collectives.rank(), collectives.world_size()
        owned: list[Piece] = []
        for ids, rows in self._pieces[name]:
            own = None if world_size == 1 else owner_of(ids, world_size) == rank
            owned.append((ids, rows) if own is None else (ids[own], rows[own]))
        ids = torch.cat([ids for ids, _ in owned])
        weights = torch.cat([rows.to(table.dtype) for _, rows in owned])
        return {
            "schema": SCHEMA,
            "name": table.name,
            "embedding_dim": table.embedding_dim,
            "dtype": str(table.dtype).removeprefix("torch."),
            "seed": table.seed,
            "step": table.step,
            "num_updates": 0,
            "state_fill": table.storage.rows.state_fill,
            "ids": ids,
            "weights": weights,
            "slots": {},
            "last_seen": torch.full_like(ids, table.step),
            "counts": torch.ones_like(ids),
            "ages_us": torch.zeros_like(ids),
        }


__all__ = ["ArrayTables", "Piece"]
