"""Tables whose rows are in the ``state_dict`` of Lightning's checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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
from recis_lightning.table import state as table_state
from recis_lightning.table.hash_table import HashTable
from recis_lightning.table.state_schema import (
    CHECKSUM,
    check_checksum,
    check_distinct,
    check_structure,
)


class StateTables(SavedTables):
    """Tables of a ``state_dict``, by their name, or by their module's if they have none.

    Args:
        state_dict: Of a module.
        file: That it was read from, for errors.

    Raises:
        ValueError: A table's state has no valid structure, or two tables have one name.
    """

    def __init__(self, state_dict: Mapping[str, Any], file: Path) -> None:
        self._file = file
        self._states: dict[str, dict[str, Any]] = {}
        for key, state in state_dict.items() if isinstance(state_dict, Mapping) else ():
            if not isinstance(key, str) or not key.endswith("_extra_state"):
                continue
            if isinstance(state, dict) and "ids" in state:
                module = key.removesuffix("._extra_state").removesuffix(".table")
                name = str(state.get("name") or module or "table")
                check_structure(state, self._where(name), _dim(state))
                if not _is_same(self._states.setdefault(name, state), state):
                    raise ValueError(
                        f"{file}: two of its tables have the name {name!r}, and tables are told "
                        "apart by their names here; load it by module.load_state_dict, give each "
                        "a name (name='user') and save it anew"
                    )

    def _where(self, name: str) -> str:
        return f"{self._file}: state of table {name!r}"

    @property
    @override
    def save_id(self) -> None:
        return None

    @override
    def names(self) -> list[str]:
        return list(self._states)

    @override
    def contents(self, name: str) -> TableContents:
        state = self._states[name]
        weights, slots = state["weights"], state["slots"]
        return TableContents(
            rows=[len(state["ids"])],
            embedding_dim=state["embedding_dim"],
            dtype=weights.dtype,
            slots={key: slot.shape[1] for key, slot in slots.items()},
            step=state["step"],
            num_updates=state["num_updates"],
            num_bytes=sum(tensor.nbytes for tensor in (weights, state["ids"], *slots.values())),
        )

    @override
    def chunks(self, name: str, num_rows: int) -> Iterator[dict[str, Tensor]]:
        state = self._states[name]
        check_checksum(state, self._where(name))
        columns = {key: state[key] for key in table_state.row_columns(state)}
        columns |= {"weights": state["weights"], **state["slots"]}
        for start in range(0, max(len(state["ids"]), 1), num_rows):
            yield {key: column[start : start + num_rows] for key, column in columns.items()}

    @override
    def pinned(self, name: str) -> Tensor:
        state = self._states[name]
        check_checksum(state, self._where(name))
        pinned: Tensor = state.get("pinned_ids", state["ids"][:0])
        return pinned

    @override
    def check_fit(self, name: str, table: HashTable, how: FitRules) -> None:
        state = self._states[name]
        check_structure(state, self._where(name), table.embedding_dim)
        saved = self.contents(name)
        layout = (saved.embedding_dim, saved.dtype, saved.slots)
        check_layout(str(self._file), table, *layout, how)
        check_checksum(state, self._where(name))
        check_distinct(state, self._where(name))

    @override
    def load(self, tables: dict[str, HashTable], how: FitRules, progress: Progress) -> None:
        def restore() -> None:
            for name, table in tables.items():
                state = self._states[name]
                if name != table.name:
                    state = {**state, "name": table.name}
                if not how.optimizer_state:
                    state = {**state, "slots": {}, "num_updates": 0}
                if state is not self._states[name]:
                    state.pop(CHECKSUM, None)  # that of the whole, which is checked
                table.set_extra_state(state)

        with all_or_none(tables.values()):
            collectives.run_on_all_ranks(restore)


def _is_same(state: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Return whether two states are of one table, which modules may share."""
    if state is other:
        return True
    if CHECKSUM in state and CHECKSUM in other:
        return bool(state[CHECKSUM] == other[CHECKSUM])
    return all(torch.equal(state[key], other[key]) for key in ("ids", "weights"))


def _dim(state: dict[str, Any]) -> int:
    dim = state.get("embedding_dim")
    return dim if isinstance(dim, int) and dim > 0 else 1


__all__ = ["StateTables"]
