"""Mark of a table: one consumer's place in the changes of its rows."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from recis_lightning.ops import hash_index
from recis_lightning.table.hash_table import HashTable
from recis_lightning.table.lock import write
from recis_lightning.table.row_changes import RowChanges
from recis_lightning.table.storage import Storage


class Changes(NamedTuple):
    """Changes of a table since a mark.

    Attributes:
        is_whole: Whether they are all there is: what was before counts no more.
        ids: int64 [n] on the CPU, new ids and those of changed rows, by row.
        rows: int64 [n], their rows.
        removed: int64 [m] on the CPU, ids that have gone, ascending; none of them in ``ids``.
    """

    is_whole: bool
    ids: Tensor
    rows: Tensor
    removed: Tensor


class ChangeMark:
    """Mark in a table's changes; all rows come after it when it is made.

    A row has changed when an update, an insertion or ``reinitialize`` wrote it, when its id is new,
    or when it has another number; with ``state`` also when a policy's column of it has. After
    ``clear``, a load, a move to another device or dtype, or another optimizer's state, all rows
    have.

    Args:
        table: The table. It has eight marks at most.
        state: Whether columns of policies count.

    Raises:
        RuntimeError: The table has eight marks already.

    Example:
        >>> table = HashTable(2)
        >>> mark = ChangeMark(table)
        >>> table.insert(torch.tensor([7, 8]), torch.ones(2, 2))
        >>> mark.take().ids.tolist()
        [7, 8]
        >>> table.insert(torch.tensor([8]), torch.zeros(1, 2))
        >>> gone = table.delete(torch.tensor([7]))
        >>> changes = mark.take()
        >>> changes.ids.tolist(), changes.removed.tolist()
        ([8], [7])
        >>> mark.close()
    """

    def __init__(self, table: HashTable, state: bool = False) -> None:
        self.table, self.state = table, state
        self._columns: dict[str, Tensor] = {}  # as they were at the mark
        self._storage: Storage | None = None
        write((table.lock,), self._follow)

    def _follow(self) -> Storage:
        """Return the table's storage; in another one than before, all rows come after the mark."""
        storage = self.table.storage
        if storage is not self._storage:
            self._leave()
            self._bit = storage.watch_changes().add()
            self._storage = storage
        return storage

    def _leave(self) -> None:
        storage, self._storage = self._storage, None
        if storage is not None and storage.changes is not None and storage.changes.drop(self._bit):
            storage.end_changes()

    def close(self) -> None:
        """Forget the mark; it takes nothing any more."""
        write((self.table.lock,), self._leave)

    def take(self) -> Changes:
        """Return the changes since the mark, and set it here.

        Rows keep their numbers and values only as long as the caller holds the table's lock.
        """
        return write((self.table.lock,), self._take)

    def _take(self) -> Changes:
        storage = self._follow()
        assert storage.changes is not None
        try:
            return self._changes_of(storage, storage.changes)
        except BaseException:  # some may be forgotten that nobody has got
            storage.changes.put_back(
                self._bit, torch.empty(0, dtype=torch.int64, device="cpu"), True
            )
            raise

    def _changes_of(self, storage: Storage, changes: RowChanges) -> Changes:
        is_whole = changes.is_whole(self._bit)
        num_rows = storage.rows.num_rows
        marks, changed = storage.columns["marks"][:num_rows], storage.occupied_rows()
        if not is_whole:
            dirty = marks & self._bit == 0
            for name, before in self._columns.items():
                column, same = storage.columns[name][:num_rows], min(num_rows, before.numel())
                dirty[:same] |= column[:same] != before[:same]
            changed &= dirty
        rows = changed.nonzero().squeeze(1)
        ids = rows.cpu()
        if rows.numel():
            ids = hash_index.id_of_row(storage.header, num_rows)[0][rows].cpu()
        removed = changes.take_removed(self._bit)
        if is_whole:
            removed = removed[:0]
        elif removed.numel():
            # None, of all ids: a row may have been freed and given to the same id again.
            removed = removed[(storage.find(removed) < 0).cpu()]
        marks[rows] |= self._bit
        if self.state:
            self._columns = {
                name: storage.columns[name][:num_rows].clone() for name in storage.kept_columns
            }
        return Changes(is_whole, ids, rows, removed)

    def put_back(self, changes: Changes) -> None:
        """Let the next ``take`` return these changes too: nobody has got them."""
        write((self.table.lock,), self._put_back, changes)

    def _put_back(self, changes: Changes) -> None:
        storage = self._follow()
        assert storage.changes is not None
        storage.changes.put_back(self._bit, changes.removed, changes.is_whole)
        rows = storage.find(changes.ids)
        rows = rows[rows >= 0]
        storage.columns["marks"][rows] &= 255 - self._bit


__all__ = ["ChangeMark", "Changes"]
