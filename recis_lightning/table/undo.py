"""Changes of a table that are undone if they do not come to their end."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
from typing_extensions import Self

from recis_lightning.ops.header import Header
from recis_lightning.table.versions import block_version, layout_version, removal_version


class Undo:
    """Context that puts attributes and headers back if its block is left by an exception.

    Memory that attributes refer to is kept, not copied: the block makes new memory, and whatever
    it writes to the old it hands to ``on_failure``. Any exception counts, also one that a signal
    or another thread raises between two lines: up to the end of the block everything is as before
    it, then as after it.

    Args:
        parts: Objects whose attributes the block may set.
        headers: Headers that it may write; it need not have read their counts.

    Example:
        >>> class Part: size = 1
        >>> part = Part()
        >>> part.size = 2
        >>> try:
        ...     with Undo([part], []):
        ...         part.size = 3
        ...         raise KeyboardInterrupt
        ... except KeyboardInterrupt:
        ...     print(part.size)
        2
    """

    def __init__(self, parts: Sequence[object], headers: Sequence[Header]) -> None:
        self._attributes = [(part, dict(part.__dict__)) for part in parts]
        self._headers: list[tuple[Header, npt.NDArray[np.int64]]] = [
            (header, header.read_counts().copy()) for header in headers
        ]
        self._callbacks: list[Callable[[], object]] = []

    def on_failure(self, callback: Callable[[], object]) -> None:
        """Call ``callback`` if the block fails, the last one first; it may be called twice."""
        self._callbacks.append(callback)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        if kind is None:
            return
        try:
            self._put_back()
        except BaseException:  # interrupted once more
            self._put_back()
            raise

    def _put_back(self) -> None:
        for part, attributes in self._attributes:
            part.__dict__.update(attributes)
        for header, fields in self._headers:
            header.restore(fields)
        layout_version.advance()
        block_version.advance()
        removal_version.advance()
        for callback in reversed(self._callbacks):
            callback()


__all__ = ["Undo"]
