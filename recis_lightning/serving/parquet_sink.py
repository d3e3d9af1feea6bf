"""Sink that writes deltas as Parquet, for whoever reads columns."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recis_lightning.arguments import check_folder
from recis_lightning.checkpoint.commit import file_stems, sync_folder
from recis_lightning.distributed import collectives
from recis_lightning.serving.delta import Delta, TableDelta

_UNFINISHED = ".part"


class ParquetSink:
    """Sink that writes a folder of Parquet files for each delta: a file a table and rank.

    Columns are ``id``, ``removed`` (whether the id has gone: weights are null then), ``weights`` as
    a list, and with state each slot of the optimizer and each column of a policy. The file's schema
    has ``step``, ``table`` and ``is_whole`` (whether what was before counts no more) as metadata.
    Folders are ``delta-0000000000``, ``delta-0000000001`` and so on; one is there whole or not at
    all. Parameters, pins and admission counts are left out.

    Args:
        folder: Where to; made if it is not there. On several ranks all of them see it.

    Raises:
        ImportError: pyarrow is not installed.
        NotADirectoryError, TypeError: ``folder`` is a file, or no path.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        _import_pyarrow()
        self.folder = check_folder("folder", folder)

    def write(self, delta: Delta) -> None:
        """Write a delta; all ranks call it together, and all raise if one fails.

        Raises:
            OSError: A file cannot be written; the folder is as it was.
        """
        rank, num_ranks = collectives.rank(), collectives.world_size()
        begun = collectives.run_on_all_ranks(lambda: self._begin() if rank == 0 else None)
        final = collectives.gather(begun)[0]
        assert final is not None
        aside = final.with_name(final.name + _UNFINISHED)

        def write() -> None:
            for name, stem in file_stems(delta.tables).items():
                path = aside / f"{stem}.{rank}-of-{num_ranks}.parquet"
                _write_table(path, delta.step, delta.tables[name])

        def publish() -> None:
            if rank == 0:
                sync_folder(aside)
                aside.rename(final)
                sync_folder(self.folder)

        try:
            collectives.run_on_all_ranks(write)
            collectives.run_on_all_ranks(publish)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise

    def _begin(self) -> Path:
        """Make the folder of the next delta, under the name that it has until it is whole."""
        self.folder.mkdir(parents=True, exist_ok=True)
        numbers = [
            int(name.removeprefix("delta-"))
            for name in os.listdir(self.folder)
            if name.startswith("delta-") and name.removeprefix("delta-").isdecimal()
        ]
        final = self.folder / f"delta-{max(numbers, default=-1) + 1:010d}"
        aside = final.with_name(final.name + _UNFINISHED)
        if aside.exists():  # of a run that was killed
            shutil.rmtree(aside)
        aside.mkdir()
        return final

    def close(self) -> None:
        """Do nothing: each delta is whole."""


def _write_table(path: Path, step: int, table: TableDelta) -> None:
    pyarrow, parquet = _import_pyarrow()
    removed = table.removed.numel()
    fields: dict[str, Tensor] = {"weights": table.weights}
    if table.state is not None:
        fields |= {f"slots.{name}": slot for name, slot in table.state.slots.items()}
        fields |= table.state.by_id
    columns = {
        "id": pyarrow.array(torch.cat([table.ids, table.removed]).numpy()),
        "removed": pyarrow.array([False] * table.ids.numel() + [True] * removed),
    }
    for name, tensor in fields.items():
        array = (tensor.float() if tensor.dtype is torch.bfloat16 else tensor).numpy()
        column = pyarrow.array(array.reshape(-1))
        if array.ndim == 2:
            column = pyarrow.FixedSizeListArray.from_arrays(column, array.shape[1])
        nulls = pyarrow.nulls(removed, column.type)
        columns[name] = pyarrow.chunked_array([column, nulls])
    notes = {"step": step, "table": table.name, "is_whole": table.is_whole, "dtype": table.dtype}
    made = pyarrow.table(columns).replace_schema_metadata({"recis_lightning": json.dumps(notes)})
    with path.open("xb") as file:
        parquet.write_table(made, file)
        file.flush()
        os.fsync(file.fileno())


def _import_pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError(
            "ParquetSink needs pyarrow: pip install 'recis-lightning[checkpoint]'"
        ) from error
    return pyarrow, parquet


__all__ = ["ParquetSink"]
