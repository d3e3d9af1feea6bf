"""Settings of a table that may be changed after it was made: checks, and how they take effect."""

from __future__ import annotations

from typing import Any

from recis_lightning.admission import Admission
from recis_lightning.arguments import check_seed
from recis_lightning.eviction import Eviction
from recis_lightning.initializers import Initializer
from recis_lightning.ops import row_init
from recis_lightning.table.evictor import kept_columns
from recis_lightning.table.storage import Storage
from recis_lightning.table.versions import layout_version

_KINDS: dict[str, Any] = {
    "initializer": Initializer,
    "admission": Admission | None,
    "eviction": Eviction | None,
    "seed": int,
    "given_name": str | None,
}


def is_setting(name: str) -> bool:
    """Return whether an attribute of a table is a setting of this kind."""
    return name in _KINDS


def check(name: str, value: Any, storage: Storage | None = None) -> None:
    """Raise unless a setting may have a value; nothing has changed.

    Args:
        name: The setting.
        value: Its new value.
        storage: Of the table, None before it has one.

    Raises:
        TypeError: The value is of another type.
        ValueError: It is a seed out of range, or an eviction policy that needs columns which the
            table does not keep.
    """
    kind = _KINDS[name]
    if not isinstance(value, kind):
        wanted = getattr(kind, "__name__", str(kind))
        raise TypeError(f"{name.removeprefix('given_')}: expected {wanted}, got {value!r}")
    if name == "seed":
        check_seed(value)
    if name == "eviction" and storage is not None:
        missing = sorted(set(kept_columns(value)) - set(storage.kept_columns))
        if missing:
            raise ValueError(
                f"eviction: {value!r} asks for {missing}, which table {storage.name!r} has not "
                "kept for its rows so far; give the policy to the table when it is made"
            )


def take_effect(name: str, value: Any, key: tuple[int, str, str | None], storage: Storage) -> None:
    """Let a setting that was changed take effect from the next lookup on.

    Args:
        name: The setting.
        value: Its new value.
        key: What new rows depend on, as ``Storage.set_key`` takes it.
        storage: Of the table.
    """
    if name == "initializer":
        row_init.write_distribution(storage.header, *value.distribution(storage.embedding_dim))
    elif name == "admission":
        storage.set_screening(None if value is None else value.screening)
        layout_version.advance()  # lookups keep what a policy admits
    elif name in ("seed", "given_name"):
        storage.set_key(*key)
        layout_version.advance()  # ranks recognise lookups by both


__all__ = ["check", "is_setting", "take_effect"]
