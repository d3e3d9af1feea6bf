"""A table's state out and in: ``state_dict``, copies, and what checkpoints write and read."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from recis_lightning.distributed import collectives
from recis_lightning.ops import hash_index, row_init
from recis_lightning.ops.layout import NUM_REFUSED, NUM_UPDATES, STEP
from recis_lightning.table import state as table_state
from recis_lightning.table.evictor import TableEviction


class TableSaving(TableEviction):
    """What a table says of itself to be saved, and how it takes that up again."""

    device: torch.device
    seed: int
    _name: str | None
    _optimizer: weakref.ref[torch.optim.Optimizer] | None
    _original: weakref.ref[Any] | None
    # Rows came that no lookup brought; of several ranks, others may own them.
    may_hold_foreign_rows: bool
    # While a checkpoint is written whose rows are in files of their own: what names these files.
    reference: dict[str, Any] | None = None
    # Takes up a rank's part of a state, or what a state refers to; ``checkpoint_source`` sets it.
    take_up: ClassVar[Callable[[TableSaving, dict[str, Any]], None]]

    def ids_map(self) -> tuple[Tensor, Tensor]:
        """Return all ids and their rows, int64 [len] each, by row."""
        raise NotImplementedError

    def segments(self, ids: Tensor, insert: bool = False) -> hash_index.Segments:
        """Return the one segment of a lookup that asks this table only, whatever its policy."""
        raise NotImplementedError

    def clear(self) -> None:
        """Remove all ids and pending gradients."""
        raise NotImplementedError

    def _start(self) -> None:
        """Make the storage of an empty table."""
        raise NotImplementedError

    def get_extra_state(self) -> dict[str, Any]:
        """Return everything the table holds, as tensors and primitives, ids by row.

        Raises:
            RuntimeError: Several ranks train; only rank 0's rows would be saved.
        """
        if self.reference is not None:
            return self.reference
        refuse_many_ranks("saving a table")
        return self._whole_state()

    def _whole_state(self) -> dict[str, Any]:
        ids, rows = self.ids_map()
        weights, slots = self.rows.read(rows)
        fields = self.saved_fields(rows)
        return {**fields, "ids": ids.cpu(), "weights": weights, "slots": slots}

    def move(self, device: torch.device) -> None:
        """Move ids, rows, state and stamps to another device; pending gradients are forgotten.

        Raises:
            MemoryError: No room there; the table is as it was.
        """
        before = {**self.__dict__, "pending": list(self.pending)}
        moved = self._whole_state()
        layout = (self.rows.slots, self.rows.state_fill)
        num_refused = self.header.read_counts()[NUM_REFUSED]
        self._num_removed += len(self)  # restoring counts them as loaded
        try:
            self.device = device
            self.start_storage()
            if self.sightings is not None:
                self.start_sightings(self.sightings.screening)
            self._write_initializer()
            self.empty_storage(*layout)
            self.load_state(moved)
            self.header.read_counts()[NUM_REFUSED] = num_refused
            self.header.publish_counts()
        except BaseException:
            self.__dict__.update(before)
            self.start_epoch()
            raise
        self.generation += 1

    def _write_initializer(self) -> None:
        """Enter into the header how new rows start."""
        raise NotImplementedError

    def saved_fields(self, rows: Tensor) -> dict[str, Any]:
        """Return all of the state but ids, weights and slots.

        Args:
            rows: int64 [n], those whose columns to return.
        """
        state: dict[str, Any] = {
            "schema": table_state.SCHEMA,
            "name": self._name,
            "embedding_dim": self.embedding_dim,
            "dtype": str(self.dtype).removeprefix("torch."),
            "seed": self.seed,
            "step": self.step,
            "num_updates": int(self.header.fields[NUM_UPDATES]),
            "state_fill": self.rows.state_fill,
        }
        if self.keeps_last_seen:
            state["last_seen"] = self._last_seen[rows].cpu()
        if "counts" in self.kept_columns:
            state["counts"] = self._columns["counts"][rows].cpu()
        if "last_time" in self.kept_columns:
            state["ages_us"] = self.ages(rows).cpu()
        if self._pinned is not None:
            state["pinned_ids"] = self._pinned
        if self.sightings is not None:
            state |= self.sightings.state()
        return state

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Replace everything the table holds.

        Seed and step come from ``state``, the name too if the table has none, so that a resumed
        run goes on exactly as the saved one would have. Weights are converted to the table's
        dtype, as those of a parameter are.

        Raises:
            ValueError: ``state`` is of another kind of table; the table is as it was.
        """
        if isinstance(state, dict) and (
            table_state.REFERENCE in state or collectives.world_size() > 1
        ):
            TableSaving.take_up(self, state)
            return
        table_state.check_state(state, self.name, self.embedding_dim)
        self.load_state(state)

    def load_state(self, state: dict[str, Any]) -> None:
        """Replace everything the table holds by a whole state that was checked."""
        weights, slots = state["weights"].to(self.dtype), state["slots"]
        words = {name: slot.shape[1] for name, slot in slots.items()}
        self.restore(state, words, lambda rows: self.rows.write(rows, weights, slots))

    def restore(
        self, state: dict[str, Any], slots: dict[str, int], write: Callable[[Tensor], None]
    ) -> None:
        """Replace everything the table holds; if that fails on the way, nothing is left in it.

        Args:
            state: What ``saved_fields`` returned, and the ``ids``, int64 [n], none twice.
            slots: Optimizer state of the rows: name -> float32 words.
            write: Called with the ids' rows, int64 [n]; writes weights and all slots to them.
        """
        layout = (self.rows.slots, self.rows.state_fill) if self._optimizer else None
        if self._name is None:
            self._name = state["name"]
        self.seed = state["seed"]
        # The state's slots may not be those of this table's optimizer: take them, then adapt.
        self.clear()
        self.set_slots(slots, state["state_fill"])
        row_init.write_key(self.header, self.seed, self.name)
        try:
            self.header.fields[STEP] = state["step"]
            self.header.fields[NUM_UPDATES] = state["num_updates"]
            ids = state["ids"].to(self.device).contiguous()
            segments = self.segments(ids, insert=True)
            # No initial rows: all of each is written.
            rows, _ = hash_index.find_or_insert(segments, ids.numel(), [self], [0], self.device)
            self._num_loaded += len(self)
            self.may_hold_foreign_rows = True
            if len(self) != ids.numel():
                raise ValueError(
                    f"state of table {self.name!r}: of {ids.numel()} ids, "
                    f"{ids.numel() - len(self)} occur twice"
                )
            write(rows)
            self._restore_fields(state, rows)
        except BaseException:
            self.clear()
            raise
        if layout is not None:
            self.set_slots(*layout)

    def _restore_fields(self, state: dict[str, Any], rows: Tensor) -> None:
        """Take up the policies' part of ``saved_fields``."""
        if self.keeps_last_seen and "last_seen" in state:
            self._last_seen[rows] = state["last_seen"].to(self.device)
        if "counts" in self.kept_columns and "counts" in state:
            self._columns["counts"][rows] = state["counts"].to(self.device)
        if "last_time" in self.kept_columns and "ages_us" in state:
            self.set_ages(rows, state["ages_us"].to(self.device))
        if "pinned_ids" in state:  # a state that knows of no pins leaves those there are
            self._pinned = state["pinned_ids"].unique()
        if self.sightings is not None:
            self.sightings.load_state(state, self.name)

    def settings(self) -> dict[str, Any]:
        """Return what a load changes beside rows and what policies keep."""
        return {
            "name": self._name,
            "seed": self.seed,
            "step": self.step,
            "num_updates": int(self.header.fields[NUM_UPDATES]),
            "slots": self.rows.slots,
            "state_fill": self.rows.state_fill,
        }

    def reset(self, settings: dict[str, Any]) -> None:
        """Empty the table and give it settings that it had."""
        self.clear()
        self._name, self.seed = settings["name"], settings["seed"]
        self.header.fields[STEP], self.header.fields[NUM_UPDATES] = (
            settings["step"],
            settings["num_updates"],
        )
        self.set_slots(settings["slots"], settings["state_fill"])
        row_init.write_key(self.header, self.seed, self.name)

    def __getstate__(self) -> dict[str, Any]:
        """Return what pickling and deepcopy take: rows and state, but no pending gradients.

        A pickled ``nn.Parameter`` leaves its ``grad`` behind in the same way.
        """
        state = {key: value for key, value in self.__dict__.items() if key not in _NOT_COPIED}
        return {**state, "_saved": table_state.to_arrays(self._whole_state())}

    def __deepcopy__(self, memo: dict[int, Any]) -> TableSaving:
        copied = memo[id(self)] = type(self).__new__(type(self))
        copied.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        copied._original = weakref.ref(self)
        return copied

    def __setstate__(self, state: dict[str, Any]) -> None:
        saved = state.pop("_saved")
        super().__setstate__(state)  # type: ignore[misc]
        self._start()
        self.load_state(table_state.from_arrays(saved))


_NOT_COPIED = (
    *("header", "_entries", "rows", "_columns"),  # made anew, filled from the state
    *("pending", "_optimizer", "_original", "readmissions", "reference", "sightings"),
    *("_listeners", "_pinned"),
)


def refuse_many_ranks(what: str) -> None:
    """Raise if several ranks run, each with a shard of every table."""
    if collectives.world_size() > 1:
        raise RuntimeError(
            f"{what} on {collectives.world_size()} ranks: each has a shard of the table, "
            "and this would keep rank 0's alone; Trainer(callbacks=[CheckpointHook()]) or "
            "recis_lightning.checkpoint.save keeps all"
        )


__all__ = ["TableSaving", "refuse_many_ranks"]
