"""``load``: a served model, read-only and mapped, for any number of threads."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self, override

from recis_lightning.arguments import check_bool, check_dtype, check_path
from recis_lightning.lookup.named_tables import RowReader
from recis_lightning.serving.array_file import MappedArrays
from recis_lightning.serving.manifest import MANIFEST_FILE, Manifest
from recis_lightning.serving.program import Program
from recis_lightning.serving.raw_records import RecordReader, is_raw
from recis_lightning.serving.recording import CONVERTED
from recis_lightning.serving.served_table import ServedTable
from recis_lightning.serving.values import (
    DTYPES,
    TensorSpec,
    collect,
    is_of_sizes,
    num_samples,
    unequal,
    unflatten,
)

_TRIES = 3  # to open a folder that is exported anew meanwhile


class ServedModel:
    """Model of a served folder; call it as the model's forward.

    Any number of threads may call it. It never changes, and reads nothing but its folder. A file
    that is replaced by a new export stays as it was for the models that have it open. A copy is
    the model itself, and pickle keeps the folder's path: loading it opens the folder.

    Args:
        folder: The folder.
        manifest: Its manifest.
        check_all: As for ``load``.
        device: As for ``load``.

    Attributes:
        folder: The folder.
        manifest: What the folder says of itself.
        device: Where it computes.
        tables: The tables by name, to be bound (``serving.bind``) or looked up alone.
        step: Step of the delta behind which its values are; None as it was exported.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        check_all: bool,
        device: torch.device = torch.device("cpu"),  # noqa: B008 - it never changes
    ) -> None:
        self.folder, self.manifest, self.device = folder, manifest, device
        self.step: int | None = None
        served = {
            name: ServedTable(
                *(name, MappedArrays(folder, table.file), table.row_format),
                *(table.embedding_dim, check_dtype(table.dtype)),
            )
            for name, table in manifest.tables.items()
        }
        if check_all:
            for table in served.values():
                table.check_all()
        self.tables: Mapping[str, Any] = served  # of ``RowReader``
        dense = MappedArrays(folder, manifest.dense)
        dense.check_all()
        constants = {
            name: _to_tensor(dense[name], DTYPES[dtype])
            for name, dtype in manifest.constants.items()
        }
        self._inputs = [TensorSpec.from_state(state) for state in manifest.inputs]
        # What makes a batch of raw values stays on the CPU.
        placed = {
            name: value if name.startswith(CONVERTED) else value.to(device)
            for name, value in constants.items()
        }
        given = manifest.program, len(self._inputs)
        self._program = Program(*given, placed, self.tables, device)
        self._reader: RecordReader | None = None
        if manifest.transforms is not None:
            try:
                self._reader = RecordReader(manifest.transforms, self._inputs, constants)
            except ValueError as error:
                raise ValueError(f"{folder / MANIFEST_FILE}: its transforms: {error}") from error

    @property
    def columns(self) -> list[str]:
        """Columns that raw records must have; none, where the folder has no transforms."""
        return [] if self._reader is None else self._reader.columns

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """Return what the model's forward returns in evaluation, without gradients.

        Args:
            arguments: As the model's forward takes them: those of the export's example, with any
                number of samples. Entries of a dict that the model does not use may be missing, and
                others may be there. Or raw records, if the folder has transforms: a table of Arrow
                or pandas, or a dict of which a value is a list, NumPy or Arrow array.
            named: The others, by the names that forward has for them.

        Raises:
            TypeError, ValueError: An argument is not as in the example (names it), or a file is
                damaged where it is read.
        """
        given = (*arguments, *named.values())
        if self._reader is not None and len(given) == 1 and is_raw(given[0]):
            return self.score_records(given[0])
        expected = self.manifest.arguments
        left = [name for name, _ in expected[len(arguments) :]]
        if len(arguments) > len(expected) or set(named) != set(left):
            names = ", ".join(name for name, _ in expected)
            got = [f"{len(arguments)} arguments", *named]
            raise TypeError(f"the model takes ({names}), got {' and '.join(got)}")
        arguments = (*arguments, *(named[name] for name in left))
        found: dict[int, Any] = {}
        for value, (name, spec) in zip(arguments, expected, strict=True):
            collect(value, spec, name, found)
        return self._score([found[number] for number in range(len(self._inputs))])

    def score_records(self, records: Any) -> Any:
        """Return what the model's forward returns for raw records, without gradients.

        Args:
            records: Column -> its values, as the files of training have them: a list (of strings,
                numbers, lists, None), an array of NumPy, Arrow, pandas or polars, or a Tensor or
                ``Jagged`` that is taken as what the column's values would become. A table of Arrow
                or pandas has columns too. Columns that the model does not use may be missing.

        Raises:
            TypeError, ValueError: The folder has no transforms, a column is missing, or its values
                do not fit (names it); or a file is damaged where it is read.
        """
        if self._reader is None:
            raise TypeError(
                "records: the folder has no transforms of raw values; export with features="
            )
        return self._score(self._reader.read(records))

    def _score(self, tensors: Sequence[Any]) -> Any:
        inputs = [spec.take(one) for spec, one in zip(self._inputs, tensors, strict=True)]
        inputs = [one if one.device == self.device else one.to(self.device) for one in inputs]
        try:
            found = self._program.run(inputs)
        except RuntimeError as error:
            sizes = num_samples(self.manifest.arguments, inputs)
            if is_of_sizes(error, sizes):
                raise ValueError(f"{unequal(sizes)}: {error}") from error
            raise
        return unflatten(self.manifest.outputs, found)

    def __copy__(self) -> Self:
        return self  # it never changes

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    @override
    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as the folder, which is opened again, where no delta is behind it.

        Raises:
            TypeError: It is a version that ``follow`` made.
        """
        if self.step is not None:
            raise TypeError(
                f"the version of step {self.step} is not pickled; pickle the model of "
                "serving.follow, which follows the folder wherever it is loaded"
            )
        return _reopen, (str(self.folder.absolute()), str(self.device))

    def __repr__(self) -> str:
        tables = ", ".join(f"{name}: {len(table)} rows" for name, table in self.tables.items())
        return f"ServedModel({self.manifest.model}, {tables})"

    def with_values(
        self, tables: Mapping[str, RowReader], constants: Mapping[str, Tensor], step: int
    ) -> ServedModel:
        """Return the same model over other tables, and other values of some parameters.

        Args:
            tables: Of the same names, dims and dtypes.
            constants: By the names of ``manifest.constants``, of the same dtypes and shapes.
            step: Of the delta that has them.
        """
        other = ServedModel.__new__(ServedModel)
        other.__dict__.update(self.__dict__)
        other.tables, other.step = tables, step
        given = self.manifest.program["inputs"]
        placed = {name: value.to(self.device) for name, value in constants.items()}
        other._program = self._program.with_values(given, placed, tables)
        return other


def _to_tensor(array: Any, dtype: torch.dtype) -> Tensor:
    """Return a copy of an array as a tensor of a dtype that NumPy may not have."""
    tensor = torch.from_numpy(array.copy())
    if tensor.dtype is dtype:
        return tensor
    if tensor.element_size() != dtype.itemsize:
        raise ValueError(f"a parameter of {dtype} is kept as {tensor.dtype}")
    return tensor != 0 if dtype is torch.bool else tensor.view(dtype)


def load(
    folder: str | os.PathLike[str],
    *,
    check_all: bool = False,
    device: torch.device | str = "cpu",
) -> ServedModel:
    """Open a served folder.

    Its tables are mapped, not read: each part is read and checked when it is first used. Nothing in
    a folder is run but operators of torch that compute; see SECURITY.md.

    Args:
        folder: From ``export``.
        check_all: Read and check the tables whole, before the first lookup rather than during it.
        device: Where the model computes and returns what it returns, such as "cuda". Tables stay
            mapped, and look up on the CPU.

    Raises:
        TypeError: ``folder`` is no path, or ``check_all`` no bool.
        ValueError: ``device`` is none that there is, or the folder is no served folder, of another
            version, or damaged (names the file).

    Example:
        >>> import tempfile
        >>> import torch
        >>> from recis_lightning import DynamicEmbedding, serving
        >>> model = torch.nn.Sequential(DynamicEmbedding(4, name="user"), torch.nn.Linear(4, 1))
        >>> scores = model(torch.arange(3))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     serving.export(model, folder, example=torch.arange(2))
        ...     served = serving.load(folder)
        ...     bool((served(torch.arange(3)) == scores).all())
        True
    """
    check_bool("check_all", check_all)
    place = _check_device(device)
    path = check_path("folder", folder)
    manifest = Manifest.read(path)
    for _ in range(_TRIES):
        try:
            return ServedModel(path, manifest, check_all, place)
        except ValueError:
            newer = Manifest.read(path)
            if newer.save_id == manifest.save_id:
                raise
            manifest = newer
    return ServedModel(path, manifest, check_all, place)


def _reopen(folder: str, device: str) -> ServedModel:
    return load(folder, device=device)


def _check_device(device: Any) -> torch.device:
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(f'device: expected "cpu" or "cuda", got {device!r}') from None
    if found.type not in ("cpu", "cuda"):
        raise ValueError(f'device: expected "cpu" or "cuda", got {device!r}')
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: got {device!r}, and torch finds no GPU here")
    return found


__all__ = ["ServedModel", "load"]
