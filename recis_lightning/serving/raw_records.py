"""Raw records of a request to the tensors that a served program takes, as training made them.

The transforms are ``recis_lightning.data.Features``, the object that training reads its files with.
What makes the model's batch of their entries is a program of its own, recorded with the model's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from recis_lightning.jagged import Jagged
from recis_lightning.nested_jagged import NestedJagged
from recis_lightning.serving.program import Program
from recis_lightning.serving.recording import (
    Recording,
    as_arguments,
    explain_missing,
    record_conversion,
)
from recis_lightning.serving.values import RAGGED, TensorSpec, check_spec, collect

if TYPE_CHECKING:
    from recis_lightning.data.features import Features

Convert = Callable[[dict[str, Any]], Any]
_MADE = (Tensor, Jagged, NestedJagged, Mapping)  # of a batch, rather than raw
_FIELDS = {"features", "entries", "inputs", "program"}


def check_features(features: Any, convert: Any) -> None:
    """Raise TypeError unless both are as ``serving.export`` takes them."""
    if features is not None:
        from recis_lightning.data.features import Features

        if not isinstance(features, Features):
            raise TypeError(
                f"features: expected recis_lightning.data.Features, got {features!r:.200}"
            )
    if convert is not None and (features is None or not callable(convert)):
        raise TypeError("convert: expected a function, together with features=")


def arguments_of(
    example: Any, features: Features | None, convert: Convert | None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of an example for the model, and the entries that they are made of."""
    if features is None:
        return as_arguments(example), {}
    entries = _entries_of(features, example, "example")
    try:
        return as_arguments(_converted(entries, convert)), entries
    except KeyError as error:
        raise explain_missing(error, "convert", [entries]) from error


def _entries_of(features: Features, records: Any, name: str) -> dict[str, Any]:
    """Return the entries that features make of raw records, all of equally many samples.

    Raises:
        TypeError, ValueError: Records do not fit (names the argument and the column).
    """
    columns = columns_of(records, name)
    sources = {one for column in features.columns for one in (column.name, *column.sources)}
    read = {key: columns[key] for key in columns if key in sources}
    for key, values in read.items():
        if not hasattr(values, "__len__") or isinstance(values, (str, bytes)):
            raise TypeError(f"{name}: column {key!r}: expected values, got {values!r:.80}")
    _check_equal_rows(read, name)
    try:
        entries: dict[str, Any] = features(columns)
    except KeyError as error:
        raise ValueError(f"{name}: {error.args[0]}") from error
    except (TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{name}: {error}") from error
    _check_equal_rows(entries, name)
    return entries


def _converted(entries: dict[str, Any], convert: Convert | None) -> Any:
    return dict(entries) if convert is None else convert(dict(entries))


def record_transforms(
    features: Features | None,
    convert: Convert | None,
    entries: Mapping[str, Any],
    recorded: Recording,
) -> tuple[dict[str, Any] | None, dict[str, Tensor]]:
    """Return what the manifest says of a model's transforms, and the constants that they read.

    Args:
        features: Of training; None: there are no transforms.
        convert: Makes the model's arguments of their entries; None: they are the argument.
        entries: Of the example.
        recorded: The model's program.
    """
    if features is None:
        return None, {}
    made = record_conversion(
        lambda given: _converted(given, convert), entries, list(recorded.numbers)
    )
    ((_, spec),) = made.specs
    used = {name: part for name, part in spec["dict"].items() if _is_used(part)}
    if not used:
        raise ValueError("features: the model uses none of their entries")
    state = {
        "features": features.only(list(used)).to_state(),
        "entries": {"dict": used},
        "inputs": [one.to_state() for one in made.inputs],
        "program": made.program,
    }
    return state, made.constants


def _is_used(spec: dict[str, Any]) -> bool:
    ((kind, content),) = spec.items()
    return kind == "tensor" or (kind in RAGGED and any(_is_used(part) for part in content))


def is_raw(value: Any) -> bool:
    """Return whether an argument holds raw values rather than tensors throughout.

    Example:
        >>> import torch
        >>> is_raw({"user": [7, 8]}), is_raw({"user": torch.tensor([7, 8])})
        (True, False)
    """
    if not isinstance(value, Mapping):
        return hasattr(value, "columns") or hasattr(value, "column_names")
    return any(_is_raw_column(column) for column in value.values())


def _is_raw_column(value: Any) -> bool:
    if value is None or isinstance(value, _MADE):
        return False
    if isinstance(value, (tuple, list)):
        return not any(isinstance(one, _MADE) for one in value)
    return hasattr(value, "__len__") and not isinstance(value, (str, bytes))


def columns_of(records: Any, name: str) -> Mapping[str, Any]:
    """Return the columns of a dict, or of a table of Arrow, pandas or polars.

    Raises:
        TypeError: It is something else (names it).
    """
    if isinstance(records, Mapping):
        return records
    names = getattr(records, "column_names", None)
    if names is None:
        names = getattr(records, "columns", None)
    if names is None or isinstance(records, type):
        raise TypeError(
            f"{name}: expected a dict of columns, or a table, got {type(records).__name__}"
        )
    return {str(column): records[column] for column in names}


class RecordReader:
    """Reader of raw records. Any number of threads may read.

    Args:
        state: Of the manifest.
        wanted: Tensors that the model's program takes.
        constants: Of the folder.

    Attributes:
        columns: Columns that it needs.

    Raises:
        ValueError: The state is damaged, or does what it may not.
    """

    def __init__(
        self, state: Any, wanted: Sequence[TensorSpec], constants: Mapping[str, Tensor]
    ) -> None:
        if not isinstance(state, dict) or set(state) != _FIELDS:
            raise ValueError(f"expected {sorted(_FIELDS)}")
        if not isinstance(state["inputs"], list) or not isinstance(state["entries"], dict):
            raise ValueError("its entries are damaged")
        self._inputs = [TensorSpec.from_state(one) for one in state["inputs"]]
        self._entries: dict[str, Any] = state["entries"]
        check_spec(self._entries, len(self._inputs))
        if set(self._entries) != {"dict"}:
            raise ValueError("its entries are damaged")
        self._program = Program(state["program"], len(self._inputs), constants, {})
        if self._program.num_outputs != len(wanted):
            raise ValueError(f"they make {self._program.num_outputs} of {len(wanted)} tensors")
        self._features = _features_of(state["features"])
        self.columns: list[str] = []
        if self._features is not None:
            for column in self._features.columns:
                self.columns += [one for one in column.sources if one not in self.columns]
            outputs = self._features.outputs
            if outputs is None or set(outputs) != set(self._entries["dict"]):
                raise ValueError("its entries are not those of its features")

    def read(self, records: Any) -> list[Any]:
        """Return the tensors that the model's program takes.

        Raises:
            ImportError: pyarrow is missing.
            TypeError, ValueError: Records do not fit (names the column).
        """
        if self._features is None:
            raise ImportError("raw records need pyarrow: pip install 'recis-lightning[data]'")
        entries = _entries_of(self._features, records, "records")
        found: dict[int, Any] = {}
        collect(entries, self._entries, "records", found)
        if len(found) != len(self._inputs):
            raise ValueError("records: entries of the folder are damaged")
        inputs = [spec.take(found[number]) for number, spec in enumerate(self._inputs)]
        return self._program.run(inputs)


def _features_of(state: Any) -> Features | None:
    """Return the features of a state; None if pyarrow is missing, which they need."""
    try:
        from recis_lightning.data.features import Features
    except ImportError:
        return None
    try:
        return Features.from_state(state)
    except (AttributeError, KeyError, OverflowError, RuntimeError, TypeError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error


def _check_equal_rows(columns: Mapping[str, Any], where: str) -> None:
    """Raise ValueError if columns, raw or made, differ in their number of samples."""
    sizes = {
        name: column.num_bags if isinstance(column, Jagged | NestedJagged) else len(column)
        for name, column in columns.items()
        if not (isinstance(column, Tensor) and not column.dim())
    }
    if len(set(sizes.values())) > 1:
        raise ValueError(f"{where}: expected columns of equally many rows, got {sizes}")


__all__ = [
    "RecordReader",
    "arguments_of",
    "check_features",
    "columns_of",
    "is_raw",
    "record_transforms",
]
