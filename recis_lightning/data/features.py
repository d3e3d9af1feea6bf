"""``Features``: columns and transforms as one object, for training and for serving."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
from torch import Tensor, nn
from typing_extensions import override

from recis_lightning.close_names import did_you_mean
from recis_lightning.data.columns import Column, Id, IdBags, IdList, Label, Number
from recis_lightning.data.conversion import int64_of
from recis_lightning.data.cross import Cross
from recis_lightning.data.entries import Entry, num_rows_of
from recis_lightning.data.hashing import as_arrow
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
from recis_lightning.jagged import Jagged
from recis_lightning.nested_jagged import NestedJagged

__all__ = ["Features", "features_of"]

_VERSION = 1
_KINDS: dict[str, type[Any]] = {
    kind.__name__: kind
    for kind in (
        *(Id, IdBags, IdList, Label, Number),
        *(Bucketize, Clip, Cross, Log1p, Lookup, Mask, Mod, MultiHash, Truncate),
    )
}


class _Pass(NamedTuple):
    """Transforms of one class that run together.

    Attributes:
        transforms: With their vocabularies as ids.
        reads: For each the places of its inputs.
        writes: For each the places of its outputs.
    """

    transforms: list[Any]
    reads: list[tuple[int, ...]]
    writes: list[tuple[int, ...]]


class Features(nn.Module):
    """Entries of a batch, made of a file's columns and of transforms of them.

    ``ColumnarDataset(features=...)`` makes batches of files with it, and a call those of a request,
    by the same code. It is a module without parameters: as an attribute of a model it is saved and
    loaded with the model's ``state_dict``, as plain data.

    Transforms are applied in their order; one that writes an entry that is there replaces it. Those
    of one class that do not wait for each other run at once, so that the number of passes depends
    on the longest chain, not on the number of features (``num_passes``). ``Mod``, ``MultiHash`` and
    ``Cross`` take all of a pass together; the others those of equal parameters.

    Args:
        columns: Columns of a file, or of a request.
        transforms: What is made of them.
        outputs: Entries of a batch, in their order; None means all.

    Raises:
        TypeError, ValueError: An argument is invalid, or a transform reads what is not there;
            names the transform.

    Example:
        >>> from recis_lightning.data import Bucketize, Cross, Features, Id, Number
        >>> features = Features(
        ...     [Id("user"), Id("city", hash="xxh64"), Number("price", default=0.0)],
        ...     [Bucketize("price", [1.0, 5.0]), Cross("user_city", ["user", "city"])],
        ...     outputs=["user_city", "price"],
        ... )
        >>> features({"user": [7], "city": ["Berlin"], "price": [2.5]})
        {'user_city': tensor([800443409380195055]), 'price': tensor([1])}
        >>> Features.from_json(features.to_json()).to_json() == features.to_json()
        True
    """

    def __init__(
        self,
        columns: list[Column],
        transforms: list[Transform] | None = None,
        outputs: list[str] | None = None,
    ) -> None:
        super().__init__()
        self._set(columns, transforms, outputs)

    def _set(
        self,
        columns: Sequence[Column],
        transforms: Sequence[Transform] | None,
        outputs: Sequence[str] | None,
    ) -> None:
        """Check everything, then set everything."""
        columns, transforms = _check_columns(columns), list(transforms or [])
        wrong = [one for one in transforms if not isinstance(one, Transform)]
        if wrong:
            raise TypeError(f"transforms: expected Mod, Cross, ..., got {type(wrong[0]).__name__}")
        places, passes = _plan(columns, transforms)
        names = list(places) if outputs is None else list(outputs)
        absent = [name for name in names if name not in places]
        if absent or not names or len(set(names)) < len(names):
            raise ValueError(
                f"outputs: expected names among {list(places)}, each once, got {names}"
                f"{did_you_mean(absent, places)}"
            )
        self.columns, self.transforms = columns, transforms
        self.outputs = None if outputs is None else names
        self._places = {name: places[name] for name in names}
        self._passes = passes

    @property
    def num_passes(self) -> int:
        """Number of groups of transforms, each of which runs at once."""
        return len(self._passes)

    @property
    def entries(self) -> list[str]:
        """Names of the entries of a batch, in their order."""
        return list(self._places)

    def without_labels(self) -> Features:
        """Return the same without ``Label`` columns and what is made of them."""
        gone = {column.name for column in self.columns if isinstance(column, Label)}
        kept: list[Transform] = []
        for one in self.transforms:
            if gone & set(one.inputs):
                gone |= set(one.outputs)
            else:
                kept.append(one)
                gone -= set(one.outputs)
        columns: list[Column] = [one for one in self.columns if not isinstance(one, Label)]
        outputs = self.outputs and [name for name in self.outputs if name not in gone]
        return Features(columns, kept, outputs)

    def only(self, outputs: Sequence[str]) -> Features:
        """Return the same for some of its entries: without the columns that they do not need.

        Args:
            outputs: Entries of a batch, in their order.

        Raises:
            ValueError: An entry is not among ``outputs`` of this one.

        Example:
            >>> from recis_lightning.data import Features, Id, Log1p, Number
            >>> features = Features([Id("user"), Number("price")], [Log1p("price")])
            >>> features.only(["user"])
            Features(1 columns, 0 transforms)
        """
        absent = [name for name in outputs if name not in self._places]
        if absent:
            advice = did_you_mean(absent, self._places)
            raise ValueError(
                f"outputs: expected names among {list(self._places)}, got {absent}{advice}"
            )
        needed = set(outputs)
        kept: list[Transform] = []
        for one in reversed(self.transforms):
            if needed & set(one.outputs):
                kept.append(one)
                needed = (needed - set(one.outputs)) | set(one.inputs)
        columns = [column for column in self.columns if column.name in needed]
        return Features(columns, kept[::-1], list(outputs))

    @override
    def forward(self, data: Mapping[str, Any]) -> dict[str, Entry]:
        """Make the entries of a batch.

        Args:
            data: Column of a file -> its values: an Arrow array, a list, a NumPy array or a pandas
                or polars series, as files have them (strings, lists, None). A Tensor or ``Jagged``
                under the name of a ``Column`` is taken for that column's entry as it is. Labels may
                be absent; then what is made of them is, too.

        Returns:
            Entry -> int64 or float [B], or ``Jagged``.

        Raises:
            KeyError: A column is absent; names it.
            TypeError, ValueError: Values do not fit; names the column or transform. Or columns have
                different numbers of rows.
        """
        if isinstance(data, pa.Table | pa.RecordBatch):
            data = {name: data.column(name) for name in data.schema.names}
        if not hasattr(data, "keys"):
            raise TypeError(f"data: expected values by column, got {type(data).__name__}")
        for column in self.columns:
            if isinstance(column, Label) and not {column.name, *column.sources} & set(data):
                return self.without_labels().forward(data)
        entries = [self._entry(column, data) for column in self.columns]
        rows = {c.name: num_rows_of(entry) for c, entry in zip(self.columns, entries, strict=True)}
        if len(set(rows.values())) > 1:
            raise ValueError(f"data: expected as many rows in all columns, got {rows}")
        return self.transform(entries)

    def _entry(self, column: Column, data: Mapping[str, Any]) -> Entry:
        given = data.get(column.name)
        if isinstance(given, Tensor | Jagged | NestedJagged):
            return given
        absent = [name for name in column.sources if name not in data]
        if absent:
            advice = did_you_mean(absent, data)
            raise KeyError(
                f"column {column.name!r}: expected {absent} in the data, got {[*data]}{advice}"
            )
        try:
            return column.read({name: as_arrow(data[name]) for name in column.sources})
        except (TypeError, ValueError, pa.ArrowException) as error:
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(f"column {column.name!r}: {error}") from error

    def transform(self, entries: Sequence[Entry]) -> dict[str, Entry]:
        """Make the entries of a batch of those of the columns, in the order of ``columns``.

        Raises:
            TypeError, ValueError: Values do not fit; names the transforms.
        """
        held: dict[int, Entry] = dict(enumerate(entries))
        for transforms, reads, writes in self._passes:
            try:
                given = [[held[place] for place in places] for places in reads]
                found = transforms[0].run(transforms, given)
            except (TypeError, ValueError) as error:
                names = ", ".join(repr(one.name) for one in transforms)
                kind = type(transforms[0]).__name__
                raise type(error)(f"transform {kind} of {names}: {error}") from error
            for places, made in zip(writes, found, strict=True):
                held.update(zip(places, made, strict=True))
        return {name: held[place] for name, place in self._places.items()}

    def to_state(self) -> dict[str, Any]:
        """Return it as dicts, lists, strings and numbers.

        Example:
            >>> from recis_lightning.data import Features, Id
            >>> Features([Id("user")]).to_state()["columns"]
            [{'kind': 'Id', 'name': 'user'}]
        """
        return {
            "version": _VERSION,
            "columns": [_to_plain(one) for one in self.columns],
            "transforms": [_to_plain(one) for one in self.transforms],
            "outputs": self.outputs and list(self.outputs),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Features:
        """Make one of what ``to_state`` returned.

        Raises:
            ValueError: It is something else, or of a later version; names the part.
        """
        return cls(*_parts_of(state))

    def to_json(self) -> str:
        """Return it as JSON."""
        return json.dumps(self.to_state(), indent=2, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Features:
        """Make one of JSON; errors as of ``from_state``."""
        return cls.from_state(_parsed(text, json.loads))

    def to_yaml(self) -> str:
        """Return it as YAML."""
        import yaml

        text: str = yaml.safe_dump(self.to_state(), sort_keys=False, allow_unicode=True)
        return text

    @classmethod
    def from_yaml(cls, text: str) -> Features:
        """Make one of YAML; errors as of ``from_state``."""
        import yaml

        return cls.from_state(_parsed(text, yaml.safe_load))

    @classmethod
    def load(cls, path: str | Path) -> Features:
        """Read a file that ``save`` wrote, or one written by hand; errors as of ``from_state``."""
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8-sig")  # editors of Windows begin with a mark
        except UnicodeDecodeError as error:
            raise ValueError(f"path: {path} is no UTF-8: {error.reason}") from None
        return cls.from_json(text) if path.suffix == ".json" else cls.from_yaml(text)

    def save(self, path: str | Path) -> None:
        """Write a file, of JSON if its name ends in ``.json``, else of YAML."""
        path = Path(path)
        text = self.to_json() if path.suffix == ".json" else self.to_yaml()
        path.write_text(text, encoding="utf-8")

    @override
    def get_extra_state(self) -> dict[str, Any]:
        return self.to_state()

    @override
    def set_extra_state(self, state: dict[str, Any]) -> None:
        self._set(*_parts_of(state))

    @override
    def extra_repr(self) -> str:
        return f"{len(self.columns)} columns, {len(self.transforms)} transforms"


def features_of(columns: Sequence[Column] | None, features: Features | None) -> Features:
    """Return ``features``, or one of ``columns``.

    Raises:
        ValueError: Both are given, or neither.
    """
    if columns is None and features is not None:
        return features
    if columns is None or features is not None:
        got = "neither" if columns is None else "both"
        raise ValueError(f"columns: expected columns or features, got {got}")
    return Features(list(columns))


def _check_columns(columns: Sequence[Column]) -> list[Column]:
    if isinstance(columns, Column):
        raise TypeError(f"columns: expected a list, got {columns!r}; write [{columns!r}]")
    columns = list(columns)
    wrong = [column for column in columns if not isinstance(column, Column)]
    if wrong or not columns:
        got = type(wrong[0]).__name__ if wrong else "none"
        raise TypeError(f"columns: expected Id, IdList, IdBags, Number or Label, got {got}")
    names = [column.name for column in columns]
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"columns: expected each name once, got {twice} more than once")
    return columns


def _plan(
    columns: Sequence[Column], transforms: Sequence[Transform]
) -> tuple[dict[str, int], list[_Pass]]:
    """Return the last place of each name, and the passes."""
    places = {column.name: place for place, column in enumerate(columns)}
    raw: dict[int, Column] = dict(enumerate(columns))
    depth = dict.fromkeys(raw, 0)
    passes: dict[tuple[int, str], _Pass] = {}
    for one in transforms:
        where = f"transform {type(one).__name__} {one.name!r}"
        absent = [name for name in one.inputs if name not in places]
        if absent:
            advice = did_you_mean(absent, places)
            raise ValueError(
                f"{where}: expected sources among {list(places)}, got {absent}{advice}"
            )
        reads = tuple(places[name] for name in one.inputs)
        level = max(depth[place] for place in reads)
        kind = passes.setdefault((level, type(one).__name__), _Pass([], [], []))
        kind.transforms.append(_with_ids(one, raw.get(reads[0]), where))
        kind.reads.append(reads)
        writes = tuple(range(len(depth), len(depth) + len(one.outputs)))
        kind.writes.append(writes)
        for name, place in zip(one.outputs, writes, strict=True):
            places[name], depth[place] = place, level + 1
    return places, [passes[key] for key in sorted(passes)]


def _with_ids(one: Transform, column: Column | None, where: str) -> Transform:
    """Return a transform that lists values with the ids that its column gives them."""
    if not isinstance(one, Lookup | Mask):
        return one
    values: list[Any] = list(one.vocabulary if isinstance(one, Lookup) else one.values)
    hashed = isinstance(column, Id | IdBags | IdList) and column.hash is not None
    if not hashed and any(isinstance(value, str) for value in values):
        raise ValueError(f"{where}: strings need a source that is a column with a hash=")
    if hashed and isinstance(column, Id | IdBags | IdList):
        values = int64_of(pa.array(values), column.hash, column.seed).tolist()
    if isinstance(one, Lookup):
        return dataclasses.replace(one, vocabulary=values)
    return dataclasses.replace(one, values=values)


def _to_plain(one: Column | Transform) -> dict[str, Any]:
    """Return the fields that differ from their defaults."""
    plain: dict[str, Any] = {"kind": type(one).__name__}
    for field in dataclasses.fields(one):  # type: ignore[arg-type]
        value = _plain(getattr(one, field.name))
        if value != field.default:
            plain[field.name] = value
    return plain


def _plain(value: Any) -> Any:
    """Return a value with lists and Python's numbers in the place of NumPy's."""
    if isinstance(value, str | bytes) or value is None:
        return value
    if hasattr(value, "__iter__") and hasattr(value, "__len__"):
        return [_plain(one) for one in value]
    return value.item() if hasattr(value, "item") else value


def _parts_of(state: Mapping[str, Any]) -> tuple[list[Column], list[Transform], list[str] | None]:
    if not isinstance(state, Mapping) or "columns" not in state:
        raise ValueError(f"state: expected columns and transforms, got {state!r:.200}")
    version = state.get("version", _VERSION)
    if version != _VERSION:
        raise ValueError(f"state: expected version {_VERSION}, got {version!r}")
    unknown = sorted(set(state) - {"version", "columns", "transforms", "outputs"})
    if unknown:
        raise ValueError(f"state: expected columns, transforms and outputs, got {unknown}")
    plain_columns, plain_transforms = state["columns"], state.get("transforms") or []
    outputs = state.get("outputs")
    for part, given in (
        *(("columns", plain_columns), ("transforms", plain_transforms)),
        ("outputs", outputs or []),
    ):
        if not isinstance(given, list | tuple):
            raise ValueError(f"state: expected a list of {part}, got {given!r:.200}")
    if not all(isinstance(name, str) for name in outputs or []):
        raise ValueError(f"state: expected names as outputs, got {outputs!r:.200}")
    columns = [_from_plain(plain, Column) for plain in plain_columns]
    transforms = [_from_plain(plain, Transform) for plain in plain_transforms]
    return columns, transforms, outputs


def _from_plain(plain: Any, wanted: type[Any]) -> Any:
    kind = plain.get("kind") if isinstance(plain, Mapping) else None
    known = [name for name, one in _KINDS.items() if issubclass(one, wanted)]
    if kind not in known:
        raise ValueError(f"state: expected a kind among {known}, got {plain!r:.200}")
    try:
        return _KINDS[kind](**{name: plain[name] for name in plain if name != "kind"})
    except (TypeError, ValueError) as error:
        raise ValueError(f"state: {kind} {plain.get('name')!r}: {error}") from error


def _parsed(text: str, parse: Callable[[str], Any]) -> Any:
    try:
        return parse(text)
    except Exception as error:  # of PyYAML, which is not always there to be named
        raise ValueError(f"text: cannot be parsed: {error}") from error
