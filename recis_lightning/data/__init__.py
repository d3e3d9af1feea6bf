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
from recis_lightning.data.dataset import ColumnarDataset
from recis_lightning.data.files import DataFileError
from recis_lightning.data.hashing import hash_strings

if TYPE_CHECKING:
    from recis_lightning.data.module import ColumnarDataModule

__all__ = [
    "Column",
    "ColumnarDataModule",
    "ColumnarDataset",
    "DataFileError",
    "Id",
    "IdList",
    "Label",
    "Number",
    "hash_strings",
]


def __getattr__(name: str) -> Any:
    if name == "ColumnarDataModule":  # imports Lightning, which the rest does without
        from recis_lightning.data.module import ColumnarDataModule

        return ColumnarDataModule
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
