"""The dynamic hash table: any int64 id, rows appear on first use.

A table owns its index, its rows and its policy columns. Its tensors are plain attributes, neither
parameters nor buffers: they grow, DDP must not broadcast them, and optimizers for dense
parameters must not see them. They travel through ``state_dict`` as extra state.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from recis_lightning.admission import Admission
from recis_lightning.arguments import check_dtype, check_embedding_dim, check_ids
from recis_lightning.eviction import Eviction
from recis_lightning.initializers import Initializer, Normal
from recis_lightning.ops import backend, embedding_bag, hash_index, row_init
from recis_lightning.ops.layout import (
    HAS_PADDING,
    INSERT,
    NUM_UPDATES,
    SCREEN,
    SEGMENT_FLAGS,
    SEGMENT_HEADER,
    SEGMENT_PADDING,
    SEGMENT_SIZE,
    STAMP,
    STEP,
)
from recis_lightning.table.pending_gradient import PendingGradient
from recis_lightning.table.saving import TableSaving

_live: weakref.WeakValueDictionary[int, HashTable] = weakref.WeakValueDictionary()
_birth = itertools.count()


class HashTable(TableSaving, nn.Module):
    """A table of rows by id.

    Args:
        embedding_dim: Weights in a row.
        initializer: How a new row starts.
        admission: Which unknown ids get a row; None admits all.
        eviction: Which rows ``evict`` throws out; None none.
        dtype: torch.float32 or torch.bfloat16; optimizer state is float32.
        device: Where the table lives: "cpu", and there it stays when its module moves to a GPU, or
            "cuda". By default it is made on torch's default device and moves with its module.
        seed: With ``name`` and the id, what a new row's values depend on.
        name: For logs and checkpoints. An unnamed table is named by ``hash_tables`` after its
            place in the module, or "table" if it is used before.
        trainable: Whether lookups leave gradients.

    Raises:
        TypeError, ValueError: An argument is not what it should be.

    Example:
        >>> table = HashTable(2, initializer=Normal(std=0.1), name="user")
        >>> table.insert(torch.tensor([7, -1]), torch.ones(2, 2))
        >>> len(table), table.embeddings(torch.tensor([7, 8])).tolist()
        (2, [[1.0, 1.0], [0.0, 0.0]])
    """

    def __init__(
        self,
        embedding_dim: int,
        *,
        initializer: Initializer | None = None,
        admission: Admission | None = None,
        eviction: Eviction | None = None,
        dtype: torch.dtype | str = torch.float32,
        device: torch.device | str | None = None,
        seed: int = 0,
        name: str | None = None,
        trainable: bool = True,
    ) -> None:
        super().__init__()
        initializer = Normal(std=0.01) if initializer is None else initializer
        for argument, value, kind in (
            ("initializer", initializer, Initializer),
            ("admission", admission, Admission | None),
            ("eviction", eviction, Eviction | None),
            ("seed", seed, int),
            ("name", name, str | None),
        ):
            if not isinstance(value, kind):
                wanted = getattr(kind, "__name__", str(kind))
                raise TypeError(f"{argument}: expected {wanted}, got {value!r}")
        self.embedding_dim = check_embedding_dim(embedding_dim)
        self.dtype = check_dtype(dtype)
        self.initializer, self.admission, self.eviction = initializer, admission, eviction
        self.device = backend.check_device(
            torch.get_default_device() if device is None else torch.device(device)
        )
        self._stays = device is not None and self.device.type == "cpu"
        self.seed, self._name, self.trainable = seed, name, trainable
        self._start()

    def _start(self) -> None:
        """Make the storage of an empty table."""
        self.start_eviction()
        self.start_storage()
        self.start_sightings(None if self.admission is None else self.admission.screening)
        self._write_initializer()
        self.pending: list[PendingGradient] = []
        self.may_hold_foreign_rows = False
        self._optimizer: weakref.ref[torch.optim.Optimizer] | None = None
        self._original: weakref.ref[HashTable] | None = None
        _live[next(_birth)] = self

    def _write_initializer(self) -> None:
        row_init.write_distribution(self.header, *self.initializer.distribution(self.embedding_dim))
        row_init.write_key(self.header, self.seed, self.name)

    # ---- what it is

    @property
    def name(self) -> str:
        """The table's name, "table" as long as it has none."""
        return "table" if self._name is None else self._name

    def set_default_name(self, name: str) -> None:
        """Name the table unless it has a name or rows already."""
        if self._name is None:
            self._name = name if self.rows.num_rows == 0 else self.name
            row_init.write_key(self.header, self.seed, self.name)

    @property
    def optimizer(self) -> torch.optim.Optimizer | None:
        """The sparse optimizer that updates this table, if one does."""
        return None if self._optimizer is None else self._optimizer()

    @optimizer.setter
    def optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = weakref.ref(optimizer)
        self.start_epoch()

    @property
    def original(self) -> HashTable | None:
        """The table that this one is a deep copy of, as long as it lives."""
        return None if self._original is None else self._original()

    def extra_repr(self) -> str:
        """See ``torch.nn.Module.extra_repr``."""
        policies = {"admission": self.admission, "eviction": self.eviction}
        shown = [f"{key}={policy}" for key, policy in policies.items() if policy is not None]
        return ", ".join([f"{self.embedding_dim}", f"name={self.name!r}", *shown])

    # ---- steps and stamps

    def update_step(self, n: int = 1) -> None:
        """Advance ``step`` by ``n``."""
        header = self.header.fields
        header[STEP] = header.item(STEP) + int(n)  # two times as fast as +=

    @property
    def num_updates(self) -> int:
        """Optimizer steps that found a gradient for this table; Adam's bias correction counts."""
        count: int = self.header.fields.item(NUM_UPDATES)
        return count

    def last_seen(self, ids: Tensor) -> Tensor:
        """Return the step of each id's last training lookup, -1 for an unknown id.

        Args:
            ids: int64 [*].

        Returns:
            int64 [*].

        Raises:
            RuntimeError: No policy of this table keeps stamps.
        """
        if not self.keeps_last_seen:
            raise RuntimeError(
                f"table {self.name!r} keeps no last_seen; give it a policy that does, such as "
                "eviction=GlobalStepFilter(filter_step=...)"
            )
        rows = self._find(ids)
        return torch.where(rows >= 0, self._last_seen[rows.clamp(min=0)], -1).view(ids.shape)

    # ---- reading and writing rows

    def segments(self, ids: Tensor, insert: bool = False) -> hash_index.Segments:
        """Return the one segment of a lookup that asks this table only, whatever its policy.

        Args:
            ids: int64 [n], contiguous; kept by the caller.
            insert: Give unknown ids a row.
        """
        segments = np.zeros((1, SEGMENT_SIZE), np.int64)
        write_segment(segments[0], self, False, None)
        segments[0, SEGMENT_FLAGS] = INSERT * insert | STAMP * (insert and self.stamps)
        hash_index.write_addresses(segments, [ids])
        return segments

    def _find(self, ids: Tensor) -> Tensor:
        """Return int64 [n], the row of each id, negative where there is none."""
        flat = check_ids(ids).reshape(-1).to(self.device).contiguous()
        return hash_index.find(self.segments(flat), flat.numel(), self.device)

    def ids_map(self) -> tuple[Tensor, Tensor]:
        """Return all ids and their rows, int64 [len] each, by row."""
        ids, occupied = hash_index.id_of_row(self.header, self.rows.num_rows)
        rows = occupied.nonzero().squeeze(1)
        return ids[rows], rows

    def ids(self) -> Tensor:
        """Return all ids, int64 [len], in the order of their rows."""
        return self.ids_map()[0]

    def embeddings(self, ids: Tensor) -> Tensor:
        """Read rows and change nothing.

        Args:
            ids: int64 [*].

        Returns:
            [*, embedding_dim] in the table's dtype, zeros for unknown ids; carries no gradient.
        """
        rows = self._find(ids)
        found = embedding_bag.gather_rows(self.header, rows, self.embedding_dim, self.dtype)
        return found.view(*ids.shape, self.embedding_dim)

    def insert(self, ids: Tensor, embeddings: Tensor) -> None:
        """Set the weights of ids, giving the unknown ones a row whatever the admission policy.

        Known ids keep their optimizer state; new ones start with an empty one. All are stamped
        with ``step``. Of an id that occurs twice, the last row counts.

        Args:
            ids: int64 [*].
            embeddings: [*, embedding_dim], any floating dtype.
        """
        flat = check_ids(ids).reshape(-1).to(self.device).contiguous()
        if tuple(embeddings.shape) != (*ids.shape, self.embedding_dim):
            raise ValueError(
                f"embeddings: expected shape {(*ids.shape, self.embedding_dim)}, "
                f"got {tuple(embeddings.shape)}"
            )
        values = embeddings.detach().to(self.device, self.dtype).reshape(-1, self.embedding_dim)
        rows, new = self._find_or_insert(flat, self.segments(flat, insert=True))
        self.may_hold_foreign_rows = True
        if self.sightings is not None:
            self.sightings.forget(flat)
        if new is not None and new.numel() == rows.numel():
            self.rows.write(rows, values, {})
            return
        if new is not None:
            self.rows.write(rows[new], values[new], {})
        chosen = _last_sights(rows, self.rows.num_rows)
        embedding_bag.write_rows_(self.header, rows[chosen], values[chosen].contiguous())

    def _insert(self, ids: Tensor) -> Tensor:
        segments = self.segments(ids, insert=True)
        rows, new = self._find_or_insert(ids, segments)
        if new is not None:
            bfloat16 = self.dtype is torch.bfloat16
            row_init.init_rows_(rows, new, segments, self.embedding_dim, bfloat16)
        return rows

    def _find_or_insert(
        self, ids: Tensor, segments: hash_index.Segments
    ) -> tuple[Tensor, Tensor | None]:
        """Return each id's row and the positions of new ids, whose rows hold nothing yet."""
        rows, new = hash_index.find_or_insert(segments, ids.numel(), [self], [0], self.device)
        if new is not None:
            if (
                new.numel() and int(new[-1]) < 0
            ):  # a device's backend fills up what it did not count
                new = new[new >= 0]
            if self.readmissions is not None:
                self.readmissions.note_new(ids[new].cpu())
        return rows, new

    # ---- removing rows: by policy in TableEviction

    def delete(self, ids: Tensor) -> int:
        """Remove ids, their rows and their pending gradients; return how many were known.

        Args:
            ids: int64 [*]; unknown ids are passed over.
        """
        rows = self._find(ids)
        gone = torch.zeros(self.rows.num_rows, dtype=torch.bool, device=self.device)
        gone[rows[rows >= 0]] = True
        for record in self.pending:
            record.forget(self, gone)
        return self.remove_rows(gone)

    def clear(self) -> None:
        """Remove all ids, sightings and pending gradients; ``step`` and the optimizer stay."""
        self.drop_pending()
        self.generation += 1
        self._num_removed += len(self)
        if self.sightings is not None:
            self.sightings.clear()
        self.empty_storage(self.rows.slots, self.rows.state_fill)

    def drop_pending(self) -> None:
        """Forget the gradients that no optimizer step has used."""
        self.pending.clear()  # a record may still serve other tables, and a retained graph

    # ---- moving; saving and loading are in TableSaving

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> HashTable:
        probe = fn(torch.empty(0, dtype=self.dtype, device=self.device))
        device = self.device if self._stays else backend.check_device(probe.device)
        check_dtype(probe.dtype)
        if device != self.device:
            self.move(device)
        if probe.dtype is not self.dtype:
            state = self._whole_state()
            self.set_dtype(probe.dtype)
            self.load_state(state)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self


def _last_sights(rows: Tensor, num_rows: int) -> Tensor:
    """Return the last position of each row that occurs in ``rows``, int64 [m]."""
    count, known = rows.numel(), rows.cpu().numpy()
    if 8 * count < num_rows:
        last = np.unique(known[::-1], return_index=True)[1]
        return torch.from_numpy(count - 1 - last).to(rows.device)
    last, positions = np.empty(num_rows, np.int64), np.arange(count)
    last[known] = positions  # of equal indices NumPy keeps the last
    return torch.from_numpy(np.flatnonzero(last[known] == positions)).to(rows.device)


def write_segment(
    line: np.ndarray[Any, np.dtype[np.int64]],
    table: HashTable,
    insert: bool,
    padding_idx: int | None,
) -> None:
    """Describe what a feature asks of a table, int64 [SEGMENT_SIZE]; not where its ids lie."""
    line[SEGMENT_HEADER] = table.header.address
    admits = table.admission is None or table.admission.admits
    line[SEGMENT_FLAGS] = INSERT * (insert and admits) | HAS_PADDING * (padding_idx is not None)
    line[SEGMENT_FLAGS] |= SCREEN * (insert and table.sightings is not None)
    line[SEGMENT_FLAGS] |= STAMP * (insert and table.stamps)
    line[SEGMENT_PADDING] = 0 if padding_idx is None else padding_idx


def hash_tables(module: nn.Module) -> list[HashTable]:
    """List a module's tables, each once, and name the unnamed after their place in it.

    Example:
        >>> hash_tables(nn.Sequential(HashTable(4), HashTable(4, name="item")))[0].name
        '0'
    """
    tables = []
    for path, child in module.named_modules():
        if isinstance(child, HashTable):
            child.set_default_name(path.removesuffix(".table") or "table")
            tables.append(child)
    return tables


def live_hash_tables() -> list[HashTable]:
    """List every table alive in this process, in the order of creation."""
    return [table for _, table in sorted(_live.items())]


__all__ = ["HashTable", "hash_tables", "live_hash_tables"]
