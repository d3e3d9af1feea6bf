"""``Source``: one entry of the list of files that a model's values come from."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from recis_lightning.arguments import check_bool, explain_arguments
from recis_lightning.checkpoint.name_patterns import check_patterns


@explain_arguments(
    {
        "oname": "write rename={'saved': 'own'}",
        "hashtable_clear": "write clear=",
        "ignore_error": "write skip_missing=",
        "is_dynamic": "write CheckpointHook(reload_every=...)",
        "tables": "write load=[...]",
    }
)
@dataclass(frozen=True)
class Source:
    """Entry of a list of sources: a file or folder, and what to load of it by which names.

    Names are those of tables ("user") and of dense tensors in the ``state_dict``
    ("tower.0.weight"); patterns match them as those of files do. A table brings the optimizer state
    of its rows along, which ``exclude`` calls "user.exp_avg".

    Args:
        path: Lightning's checkpoint; a folder of ``checkpoint.save``; a folder of checkpoints, of
            which the newest is taken; a ``.pt`` or ``.pth`` file with a ``state_dict``; an ``.npz``
            or Parquet file with ids and a matrix (its table has the file's name without ending); a
            folder that RecIS saved.
        load: Names or patterns of what to load.
        exclude: Names or patterns of what not to load.
        rename: Names in the model by the names in the source; ``{"old_*": "new_*"}`` renames all
            that begin so. The first rule that fits counts.
        clear: Whether the rows of a table go before those of the source come; False keeps rows of
            ids that the source does not have.
        skip_missing: Whether a name that the source or the model lacks, or a source that is not
            there, is passed over; else it is an error. Names that only a pattern chose and that
            have no place in the model are passed over in any case.

    Raises:
        TypeError, ValueError: A field is not what it should be.

    Example:
        >>> Source("bank/last.ckpt", load=["user", "tower.*"], rename={"user": "customer"}).clear
        True
    """

    path: str | os.PathLike[str]
    load: list[str] = field(default_factory=lambda: ["*"])
    exclude: list[str] = field(default_factory=list)
    rename: dict[str, str] = field(default_factory=dict)
    clear: bool = True
    skip_missing: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.path, (str, os.PathLike)) or not os.fspath(self.path):
            raise TypeError(f"path: expected the path of a file or folder, got {self.path!r}")
        if not check_patterns("load", self.load):
            raise ValueError("load: expected names or patterns, got none; ['*'] loads all")
        check_patterns("exclude", self.exclude)
        _check_rename(self.rename)
        check_bool("clear", self.clear)
        check_bool("skip_missing", self.skip_missing)

    def __str__(self) -> str:
        return os.fspath(self.path)


def _check_rename(rename: Any) -> None:
    if not isinstance(rename, Mapping) or not all(
        isinstance(name, str) for pair in rename.items() for name in pair
    ):
        raise TypeError(
            f"rename: expected a dict, name in the source -> name in the model, got {rename!r}"
        )
    for pattern, target in rename.items():
        if pattern.count("*") != target.count("*"):
            raise ValueError(
                f"rename: expected as many * on both sides, got {pattern!r}: {target!r}"
            )


__all__ = ["Source"]
