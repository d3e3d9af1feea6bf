"""Columnar files to tensors: Parquet and ORC data sets, with a place that survives kills."""

from typing import TYPE_CHECKING, Any

try:
    import pyarrow as _pyarrow  # noqa: F401
except ImportError as error:
    raise ImportError(
        "recis_lightning.data reads Parquet and ORC files with pyarrow: "
        "pip install 'recis-lightning[data]'"
    ) from error

from recis_lightning.data.columns import Column, Id, IdList, Label, Number
from recis_lightning.data.cross import Cross
from recis_lightning.data.features import Features
from recis_lightning.data.hashing import hash_strings
from recis_lightning.data.transforms import (
    Bucketize,
    Clip,
    Log1p,
    Lookup,
    Mask,
    Mod,
    MultiHash,
    Transform,
    Truncate,
)

if TYPE_CHECKING:
    from recis_lightning.data.dataset import ColumnarDataset
    from recis_lightning.data.files import DataFileError
    from recis_lightning.data.module import ColumnarDataModule

__all__ = [
    "Bucketize",
    "Clip",
    "Column",
    "ColumnarDataModule",
    "ColumnarDataset",
    "Cross",
    "DataFileError",
    "Features",
    "Id",
    "IdList",
    "Label",
    "Log1p",
    "Lookup",
    "Mask",
    "Mod",
    "MultiHash",
    "Number",
    "Transform",
    "Truncate",
    "hash_strings",
]


def __getattr__(name: str) -> Any:
    if name == "ColumnarDataModule":  # imports Lightning, which the rest does without
        from recis_lightning.data.module import ColumnarDataModule

        return ColumnarDataModule
    # These import pyarrow.dataset, and with it pandas, which Features does without.
    if name == "ColumnarDataset":
        from recis_lightning.data.dataset import ColumnarDataset

        return ColumnarDataset
    if name == "DataFileError":
        from recis_lightning.data.files import DataFileError

        return DataFileError
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
