"""Small data sets in the layouts that the DeepFM example reads."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import orc, parquet

USERS = [("1", "24", "M", "writer", "85711"), ("2", "53", "F", "other", "T8H1N")]
ITEMS = [
    ("1", "Toys", "1995", "Animation Children's Comedy"),
    ("2", "Spies", "1995", "Action"),
    ("3", "Nothing known", "unknown", ""),
]


def write_movielens(root: Path, num_rows: int = 100) -> Path:
    """Write files like MovieLens-100k's, interactions in no order of time."""
    random = np.random.default_rng(0)
    root.mkdir(parents=True, exist_ok=True)
    times = 881250949 + 60 * random.permutation(num_rows)
    inter = [
        (str(random.integers(1, 3)), str(random.integers(1, 4)), str(random.integers(1, 6)), str(t))
        for t in times
    ]
    tables = {
        "ml-100k.user": ("user_id age gender occupation zip_code", USERS),
        "ml-100k.item": ("item_id movie_title release_year class", ITEMS),
        "ml-100k.inter": ("user_id item_id rating timestamp", inter),
    }
    for name, (header, rows) in tables.items():
        lines = ["\t".join(f"{field}:token" for field in header.split()), *map("\t".join, rows)]
        (root / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return root


def criteo_rows(num_rows: int, first: int = 0) -> dict[str, Any]:
    """Return rows in the Criteo layout; every third value of ``i2`` and ``c2`` is missing.

    ``c1`` numbers the rows from ``first``.
    """
    numbers = range(first, first + num_rows)
    columns: dict[str, Any] = {"label": [[float(n % 4 == 0)] for n in numbers]}
    for i in range(1, 14):
        columns[f"i{i}"] = [[] if i == 2 and n % 3 == 0 else [float(n % 7 + i)] for n in numbers]
    columns["c1"] = [[n] for n in numbers]
    for c in range(2, 27):
        columns[f"c{c}"] = [[] if c == 2 and n % 3 == 0 else [n % 5 + 2**39] for n in numbers]
    return columns


def write_criteo(path: Path, num_rows: int, first: int = 0, piece: int | None = None) -> Path:
    """Write an ORC or Parquet file; a Parquet file has row groups of ``piece`` rows."""
    types = {name: pa.list_(pa.int64()) for name in (f"c{c}" for c in range(1, 27))}
    types |= {name: pa.list_(pa.float64()) for name in ["label", *(f"i{i}" for i in range(1, 14))]}
    rows = criteo_rows(num_rows, first)
    table = pa.table({name: pa.array(values, types[name]) for name, values in rows.items()})
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".orc":
        orc.write_table(table, path)
    else:
        parquet.write_table(table, path, row_group_size=piece)
    return path
