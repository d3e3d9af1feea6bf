"""Ranks that follow a folder together."""

import pathlib
import time

import pyarrow as pa
import pyarrow.parquet
from torch import distributed

from recis_lightning.data import ColumnarDataset, DataFileError, Follow, Id
from tests.helpers.columnar_files import rows_of


def follow(folder):
    """Read two windows, wait for a third that rank 1 gives up, then meet a bad file."""
    folder, rank = pathlib.Path(folder), distributed.get_rank()
    data = ColumnarDataset(
        str(folder / "*.parquet"), [Id("row")], 2, follow=Follow(poll_seconds=0.05)
    )
    found = {"first": rows_of(data)}
    if rank == 1:
        time.sleep(0.2)  # rank 0 waits, and knows what to do before this rank does
        table = pa.table({"row": [100, 101, 102]})
        pa.parquet.write_table(table, folder / "new.tmp")
        (folder / "new.tmp").rename(folder / "new.parquet")
    found["second"] = rows_of(data)
    data.stop_waiting = lambda: rank == 1
    data.set_epoch(2)
    found["ended"] = data.ended
    data.stop_waiting = None
    (folder / "bad.parquet").write_bytes(b"PAR1")
    try:
        data.set_epoch(2)
    except DataFileError as error:
        found["error"] = str(error)
    return found
