"""Copies of a table, by ``copy.deepcopy`` or a pickle: what goes into one, and what it is made of.

A copy has the rows and the state of its table in the form of a saved one, and the attributes that
are no part of its machinery.
"""

from __future__ import annotations

from typing import Any

from recis_lightning.table import state as table_state

# Made anew; storage and pins are filled from the saved state.
_PARTS_ARE_MADE_OF = ("embedding_dim", "dtype", "device", "eviction", "trainable")
_NOT_COPIED = (
    "storage",
    "evictor",
    "pending",
    "shard_reference",
    "_optimizer",
    "_originals",
    "lock",
    "groups",
    "_process_group",
)
# Fields of tables that 0.1.0 pickled, which parts have now.
_FIELDS_OF_0_1_0 = {
    *("kept_columns", "generation", "may_hold_foreign_rows"),
    *("_num_evicted", "_num_removed", "_num_loaded"),
}


def pack(table: table_state.StatefulTable) -> dict[str, Any]:
    """Return what a copy of a table is made of; it can be pickled."""
    packed = {key: value for key, value in vars(table).items() if key not in _NOT_COPIED}
    packed |= {name: getattr(table, name) for name in _PARTS_ARE_MADE_OF}
    others = {name: p for name, p in packed["_parameters"].items() if name != "anchor"}
    saved = table_state.to_arrays(table_state.export(table))
    return {**packed, "_parameters": others, "_saved": saved}


def unpack(packed: dict[str, Any]) -> tuple[dict[str, Any], list[Any], dict[str, Any]]:
    """Take apart what ``pack`` returned, here or in an older version.

    Returns:
        The attributes of the copy, what its parts are made of, and its state.
    """
    attributes = dict(packed)
    saved = table_state.from_arrays(attributes.pop("_saved"))
    parts = [attributes.pop(name) for name in _PARTS_ARE_MADE_OF]
    if "_name" in attributes:  # pickled by 0.1.0
        attributes["given_name"] = attributes.pop("_name")
        attributes["default_name"] = "table"  # as which the rows of those without a name began
        for name in _FIELDS_OF_0_1_0:
            attributes.pop(name, None)
    return attributes, parts, saved


__all__ = ["pack", "unpack"]
