"""Small Parquet and ORC files whose rows are numbered, and what a data set gave of them."""

import pyarrow as pa
import pyarrow.parquet
from pyarrow import orc

from recis_lightning.data import Id, IdList, Label, Number

COLUMNS = [
    Id("row"),
    Id("user", hash="xxh64", seed=1),
    IdList("tags", weights="tag_weights", max_len=2, keep="last"),
    Number("price", default=-1.0),
    Label("click"),
]


def table_of(first, num_rows):
    """Return rows ``first``, ``first + 1``, ...; every fifth has no price."""
    rows = range(first, first + num_rows)
    return pa.table(
        {
            "row": pa.array(rows, pa.int32()),
            "user": pa.array([f"user-{row % 7}" for row in rows], pa.string()),
            "tags": pa.array([list(range(row % 4)) for row in rows], pa.list_(pa.int64())),
            "tag_weights": pa.array(
                [[row + tag / 4 for tag in range(row % 4)] for row in rows],
                pa.list_(pa.float32()),
            ),
            "price": pa.array([None if row % 5 == 0 else float(row) for row in rows], pa.float64()),
            "click": pa.array([row % 3 == 0 for row in rows], pa.bool_()),
            "country": pa.array(["DE" if row % 2 else "FR" for row in rows], pa.string()),
        }
    )


def write_files(folder, sizes=(7, 1, 10, 4), group_rows=3, suffix=".parquet"):
    """Write a file for each size, rows numbered on; return the pattern that matches them."""
    first = 0
    for index, size in enumerate(sizes):
        path = folder / f"part-{index}{suffix}"
        if suffix == ".orc":
            orc.write_table(table_of(first, size), path)
        else:
            pa.parquet.write_table(table_of(first, size), path, row_group_size=group_rows)
        first += size
    return str(folder / f"part-*{suffix}")


def rows_of(batches):
    """List the numbers of the rows of batches."""
    return [row for batch in batches for row in batch["row"].tolist()]
