"""``export``: a trained model to a folder that is served."""

from __future__ import annotations

import os
import re
import secrets
import sys
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from recis_lightning.admission import MinCount
from recis_lightning.arguments import check_folder
from recis_lightning.checkpoint.commit import file_stems
from recis_lightning.close_names import did_you_mean
from recis_lightning.distributed import collectives
from recis_lightning.eviction import Eviction
from recis_lightning.eviction_policy import RowColumns
from recis_lightning.serving.array_file import ArrayWriter, FileRecord, to_numpy
from recis_lightning.serving.delta import dense_tensors
from recis_lightning.serving.folder_lock import exporting
from recis_lightning.serving.manifest import MANIFEST_FILE, Manifest, TableRecord
from recis_lightning.serving.model import ServedModel
from recis_lightning.serving.raw_records import arguments_of, check_features, record_transforms
from recis_lightning.serving.recording import Recording, record_model
from recis_lightning.serving.served_table import FORMATS, write_table
from recis_lightning.serving.values import flatten
from recis_lightning.table.hash_table import HashTable
from recis_lightning.table.listing import hash_tables
from recis_lightning.table.lock import distinct_locks, read

if TYPE_CHECKING:
    from recis_lightning.data.features import Features

_ROUNDING = 1e-4  # of float32, summed up: a larger difference is of something else
# A table's file, the parameters' file, and a manifest that was not renamed: each of one save.
_SAVE_ID = "[0-9a-f]{16}"
_OWN_FILE = re.compile(rf".+\.{_SAVE_ID}\.(rows|weights)|{re.escape(MANIFEST_FILE)}\.{_SAVE_ID}")


def export(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    example: Any,
    features: Features | None = None,
    convert: Callable[[dict[str, Any]], Any] | None = None,
    rows: str | Mapping[str, str] | None = None,
    drop: Eviction | MinCount | Mapping[str, Eviction | MinCount] | None = None,
) -> None:
    """Write a model to a folder for ``serving.load``.

    The folder gets a file a table (index and rows, never optimizer state), one of the parameters,
    and ``manifest.json`` with the program of ``torch.export``, which is written last: a reader sees
    the old export or the new one, whole. The model is not changed. Where rows are kept as they are,
    and the model is on the CPU, the served scores of the example are compared with the model's, bit
    for bit, before the folder changes.

    Args:
        model: A module, or LightningModule, whose forward takes tensors, dicts, tuples and lists of
            them, ``Jagged`` and ``NestedJagged``, and returns such.
        folder: Where to; made if it is not there. An older export in it is replaced.
        example: A batch as forward takes it, of two samples at least; a tuple (which is no
            ``Jagged``) stands for several arguments. What depends on the number of samples or ids
            may have any other number later. With ``features``: raw records, column -> its values.
        features: ``recis_lightning.data.Features`` by which training made batches of raw values.
            They are written, so that the served model takes raw records too.
        convert: What made a batch of the entries of ``features``, as ``ColumnarDataset`` takes it;
            recorded like the forward pass. None: the entries are the batch.
        rows: As what rows are kept: "float32", "bfloat16" or "int8" (with a scale a row), for all
            tables or by name; by default as the table has them.
        drop: Policy, for all tables or by name, that names rows to leave out, as for
            ``HashTable.evict``: ``MinNorm(...)``, ``GlobalStepFilter(...)``, ``AnyOf(...)``. Or
            ``MinCount(k)``: ids of fewer occurrences, in tables whose eviction policy counts.

    Raises:
        TypeError, ValueError: An argument is not what it should be; or the model's forward does
            what a served program cannot (says what).
        NotADirectoryError: ``folder`` is a file.
        RuntimeError: The tables are sharded over ranks, the served scores are not the model's, or
            another export writes to the folder.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a module, got {type(model).__name__}")
    if collectives.world_size() > 1:
        raise RuntimeError(
            "model: its rows are spread over ranks; load its checkpoint in one process, and export "
            "there"
        )
    if example is None:
        raise TypeError(
            "example: expected a batch as the model's forward takes it (raw records with "
            "features=), got None"
        )
    check_features(features, convert)
    dense_tensors(model)  # of which none may wait for its shape
    tables = _tables_by_name(model)
    formats = {name: _format_of(rows, name, table) for name, table in tables.items()}
    policies = {name: _policy_of(drop, table) for name, table in tables.items()}
    for argument, given in (("rows", rows), ("drop", drop)):
        unknown = sorted(set(given) - set(tables), key=str) if isinstance(given, Mapping) else []
        if unknown:
            raise ValueError(
                f"{argument}: no such tables {unknown}; there are {sorted(tables)}"
                f"{did_you_mean(unknown, tables)}"
            )
    path = check_folder("folder", folder)
    path.mkdir(parents=True, exist_ok=True)
    save_id = secrets.token_hex(8)
    written: list[Path] = []
    with exporting(path) as is_held, _evaluating(model), torch.no_grad():
        older = _older_export(path)
        arguments, entries = arguments_of(example, features, convert)
        recorded = record_model(model, arguments)
        transforms, constants = record_transforms(features, convert, entries, recorded)
        recorded = recorded._replace(constants={**recorded.constants, **constants})

        def write() -> Manifest:
            records = _write_tables(path, save_id, tables, formats, policies, written)
            manifest = _write_dense(path, save_id, model, recorded, transforms, records, written)
            served = ServedModel(path, manifest, check_all=False)
            devices = {table.device.type for table in tables.values()}
            devices |= {parameter.device.type for parameter in model.parameters()}
            is_exact = (
                all(formats[name] == _dtype_name(table) for name, table in tables.items())
                and not any(policies.values())
                and devices <= {"cpu"}
            )
            if is_exact:
                _compare(served(*arguments), model(*arguments))
            if features is not None:
                _compare(served.score_records(example), served(*arguments))
            manifest.write(path)
            return manifest

        try:
            # No thread trains the tables meanwhile: rows and scores are of one moment.
            manifest = read(distinct_locks(table.lock for table in tables.values()), write)
        except BaseException:
            for file in written:
                file.unlink(missing_ok=True)
            raise
        _remove_unnamed(path, set(manifest.files()), None if is_held else older)


def check_replaceable(folder: str | os.PathLike[str]) -> Path:
    """Return the path of a folder that is new, is empty or has nothing but an export, else raise.

    ``export`` itself leaves other files alone; this is for who names a folder by mistake.

    Args:
        folder: The folder.

    Raises:
        NotADirectoryError: It is a file.
        ValueError: It has other files; names one.
    """
    path = check_folder("folder", folder)
    if not path.is_dir() or (path / MANIFEST_FILE).exists():
        return path
    others = sorted(name for name in os.listdir(path) if not _OWN_FILE.fullmatch(name))
    if others:
        raise ValueError(
            f"folder: {path} is no export and has other files, such as {others[0]}; name a new or "
            "an empty folder"
        )
    return path


def _remove_unnamed(path: Path, kept: Set[str], older: Manifest | None) -> None:
    """Remove files of older exports, those that were killed among them.

    Args:
        path: The folder.
        kept: Files of the new export.
        older: Only what this manifest names goes; None: all files of an export's kind that are not
            kept, for none is under way.
    """
    names = os.listdir(path) if older is None else older.files()
    for name in names:
        if name not in kept and _OWN_FILE.fullmatch(name):
            with suppress(IsADirectoryError, PermissionError):  # a folder is nothing of ours
                (path / name).unlink(missing_ok=True)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put a module into evaluation, and each part back as it was.

    Without torch's fast path of ``nn.TransformerEncoderLayer``, whose kernel is in no program, and
    rounds otherwise.
    """
    modes = [(module, module.training) for module in model.modules()]
    has_fast_path = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        model.eval()
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(has_fast_path)
        for module, mode in modes:
            module.training = mode


def _tables_by_name(model: nn.Module) -> dict[str, HashTable]:
    tables: dict[str, HashTable] = {}
    for table in hash_tables(model):
        if table.name in tables:
            raise ValueError(f"model: two of its tables are called {table.name!r}; name them apart")
        tables[table.name] = table
    return tables


def _dtype_name(table: HashTable) -> str:
    return str(table.dtype).removeprefix("torch.")


def _format_of(rows: Any, name: str, table: HashTable) -> str:
    wanted = rows.get(name) if isinstance(rows, Mapping) else rows
    if wanted is None:
        return _dtype_name(table)
    if wanted not in FORMATS:
        raise ValueError(f"rows: expected one of {FORMATS}, got {wanted!r}")
    return str(wanted)


class _Rare(Eviction):
    """Evict ids of fewer than ``k`` occurrences: what ``drop=MinCount(k)`` stands for."""

    columns = frozenset({"counts"})

    def __init__(self, k: int) -> None:
        self.k = k

    @override
    def expired(self, rows: RowColumns) -> Tensor:
        assert rows.counts is not None
        return rows.counts < self.k


def _policy_of(drop: Any, table: HashTable) -> Eviction | None:
    policy = drop.get(table.name) if isinstance(drop, Mapping) else drop
    if policy is not None and not isinstance(policy, Eviction | MinCount):
        raise TypeError(f"drop: expected an eviction policy or MinCount(k), got {policy!r}")
    if isinstance(policy, MinCount):
        if policy.per != "occurrence":
            raise ValueError(f"drop: expected MinCount(k) of occurrences, got {policy!r}")
        if "counts" not in table.storage.kept_columns:
            raise ValueError(
                f"drop: {policy!r} asks for counts, which table {table.name!r} does not keep; give "
                'it an eviction policy that does, such as MaxRows(n, by="count")'
            )
        return _Rare(policy.k)
    return policy


def _older_export(path: Path) -> Manifest | None:
    """Return the manifest of an older export in a folder."""
    if not (path / MANIFEST_FILE).exists():
        return None
    try:
        return Manifest.read(path)
    except ValueError as error:
        raise ValueError(
            f"folder: it has a {MANIFEST_FILE} that is not replaced: {error}; remove it, or name "
            "another folder"
        ) from None


def _write_tables(
    path: Path,
    save_id: str,
    tables: Mapping[str, HashTable],
    formats: Mapping[str, str],
    policies: Mapping[str, Eviction | None],
    written: list[Path],
) -> dict[str, TableRecord]:
    """Write a file a table; add their paths to ``written``."""
    stems = file_stems(tables)
    records = {}
    for name, table in tables.items():
        file = path / f"{stems[name]}.{save_id}.rows"
        written.append(file)
        ids = _kept_ids(table, policies[name]).cpu()
        read_rows = _reader_of(table)
        try:
            record = write_table(file, ids.numpy(), read_rows, formats[name], table.embedding_dim)
        except ValueError as error:
            raise ValueError(f"table {name!r}: {error}") from None
        records[name] = TableRecord(
            record, ids.numel(), table.embedding_dim, _dtype_name(table), formats[name]
        )
    return records


def _write_dense(
    path: Path,
    save_id: str,
    model: nn.Module,
    recorded: Recording,
    transforms: dict[str, Any] | None,
    records: dict[str, TableRecord],
    written: list[Path],
) -> Manifest:
    """Write the file of parameters; return the manifest of all files, which is not written."""
    file = path / f"dense.{save_id}.weights"
    written.append(file)
    dense = _write_constants(file, recorded.constants)
    return Manifest(
        save_id=save_id,
        versions={"recis_lightning": _version(), "torch": str(torch.__version__)},
        model=type(model).__name__,
        inputs=[spec.to_state() for spec in recorded.inputs],
        arguments=recorded.specs,
        outputs=recorded.outputs,
        features=[key for _, spec in recorded.specs for key in spec.get("dict", {})],
        transforms=transforms,
        tables=records,
        dense=dense,
        constants={
            name: str(value.dtype).removeprefix("torch.")
            for name, value in recorded.constants.items()
        },
        program=recorded.program,
    )


def _version() -> str:
    return str(sys.modules["recis_lightning"].__version__)  # loaded, and above this room


def _kept_ids(table: HashTable, policy: Eviction | None) -> Tensor:
    """Return a table's ids without those whose rows a policy names."""
    ids, rows = table.ids_map()
    if policy is None:
        return ids
    marked = table.evictor.rows_named_by(policy)
    return ids[~marked.to(rows.device)[rows]]


def _reader_of(table: HashTable) -> Callable[[Tensor], Tensor]:
    return lambda ids: table.embeddings(ids.to(table.device)).cpu()


def _write_constants(file: Path, constants: Mapping[str, Tensor]) -> FileRecord:
    writer = ArrayWriter(file)
    try:
        for name, value in constants.items():
            array = to_numpy(value)
            writer.add(name, array.shape, [array])
        return writer.close()
    except BaseException:
        writer.abandon()
        raise


def _compare(served: Any, expected: Any) -> None:
    """Raise RuntimeError unless both have the same tensors, bit for bit."""
    found: list[Tensor] = []
    wanted: list[Tensor] = []
    if flatten(served, "output", found) != flatten(expected, "output", wanted):
        raise RuntimeError("the served program returns something else than the model")
    for number, (one, other) in enumerate(zip(found, wanted, strict=True)):
        other = other.detach().cpu()
        if one.dtype is not other.dtype or to_numpy(one).tobytes() != to_numpy(other).tobytes():
            which = f" in tensor {number} of {len(found)}" if len(found) > 1 else ""
            raise RuntimeError(
                "the served program and the model score the example differently"
                f"{which}: {_difference(one, other)}"
            )


def _difference(found: Tensor, wanted: Tensor) -> str:
    """Return how far two tensors are apart, and what it may come from."""
    if found.dtype is not wanted.dtype or found.shape != wanted.shape:
        return (
            f"{found.dtype} {tuple(found.shape)} in place of {wanted.dtype} {tuple(wanted.shape)}"
        )
    apart = (found.double() - wanted.double()).abs()
    largest = float(apart.nan_to_num(nan=torch.inf).max())
    scale = float(wanted.double().abs().nan_to_num(nan=0.0, posinf=0.0).max())
    text = f"by up to {largest:.2g}, where the largest is {scale:.2g}"
    if largest <= _ROUNDING * max(scale, 1e-30):
        return (
            f"{text}: a difference of rounding; does a part of forward compute in another way "
            "while it is exported, as by torch.compiler.is_compiling()?"
        )
    return f"{text}; does forward depend on values, on chance, or on what it did before?"


__all__ = ["check_replaceable", "export"]
