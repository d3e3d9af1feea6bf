"""Columns that a file's path has, in folders such as ``day=2026-11-30/hour=05``."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable
from urllib.parse import unquote

import numpy as np
import pyarrow as pa

__all__ = ["partition_kinds", "partitions_of", "with_partitions"]

_NULL = "__HIVE_DEFAULT_PARTITION__"


def partitions_of(path: str) -> dict[str, str | None]:
    """Return the columns of a path's folders, Hive's partitions: name -> its text, or None.

    Example:
        >>> partitions_of("logs/day=2026-11-30/country=C%C3%B4te/a=b.parquet")
        {'day': '2026-11-30', 'country': 'Côte'}
    """
    found: dict[str, str | None] = {}
    for folder in re.split(r"[/\\]", path)[:-1]:
        name, equals, text = folder.partition("=")
        if equals and name:
            found[name] = None if text == _NULL else unquote(text)
    return found


def partition_kinds(path: str, texts: Container[str] = ()) -> dict[str, pa.DataType]:
    """Return the type of each: int64 of digits, as pyarrow has it, else string.

    Args:
        path: Of a file.
        texts: Columns that are strings, whatever they hold.

    Example:
        >>> partition_kinds("hour=05/city=Rome/a.parquet")
        {'hour': DataType(int64), 'city': DataType(string)}
    """
    partitions = partitions_of(path).items()
    return {name: _scalar(text, name in texts).type for name, text in partitions}


def with_partitions(
    part: pa.Table, path: str, names: Iterable[str], texts: Container[str] = ()
) -> pa.Table:
    """Add those of some columns that a part lacks and its file's path has.

    Args:
        part: Of the file.
        path: Of the file.
        names: Columns to add.
        texts: Columns that are strings, whatever they hold.
    """
    partitions = partitions_of(path)
    for name in names:
        if name not in part.column_names:
            value = _scalar(partitions[name], name in texts)
            part = part.append_column(name, _repeated(value, part.num_rows))
    return part


def _scalar(text: str | None, is_text: bool) -> pa.Scalar:
    if is_text or text is None or not re.fullmatch(r"-?[0-9]{1,19}", text):
        return pa.scalar(text)
    number = int(text)
    return pa.scalar(number if -(2**63) <= number < 2**63 else text)


def _repeated(value: pa.Scalar, num_rows: int) -> pa.Array:
    if not pa.types.is_string(value.type):
        return pa.repeat(value, num_rows)
    # A dictionary, so that the text is hashed once.
    indices = pa.array(np.zeros(num_rows, np.int32))
    return pa.DictionaryArray.from_arrays(indices, pa.array([value]))
