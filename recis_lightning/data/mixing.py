"""``MixedDataset``: batches with rows of several data sets, by proportion."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import IterableDataset, get_worker_info

from recis_lightning.arguments import check_bound, check_int
from recis_lightning.data.dataset import ColumnarDataset, state_after
from recis_lightning.data.rows import Batch, join_rows, pinned

__all__ = ["MixedDataset", "place_after", "rows_by_proportion"]

_STATE_VERSION = 1


class MixedDataset(IterableDataset[Any]):
    """Batches of which each data set gives its part, the same number of rows in each.

    The rows of a batch are those of the first data set, then those of the second, and so on, each
    in its own order: a pure function of the seeds and the epoch. A data set's last rows may be
    fewer. All ranks get the same number of batches.

    Args:
        sources: Name -> data set, whose batches have the same entries. Copies are read, whose
            ``batch_size`` is set; they have no ``convert``, ``window`` or ``follow``.
        proportions: Name -> part of a batch, in any unit.
        batch_size: Rows of a batch on one rank. Proportions are rounded to its rows.
        until: End of an epoch. ``"all"``: every row of every data set was read once; where one has
            no more rows, batches are smaller by its part. ``"first"``: the first data set has no
            more rows; of the others the rest is left out, which in another epoch, where they are
            shuffled, are other rows.
        source_entry: Entry to add to batches: int64 [B], number of the data set of each row.
        convert: Function of a batch whose result takes its place.
        pin_memory: Whether batches lie in pinned memory; needs a GPU.

    Raises:
        TypeError, ValueError: An argument is invalid.

    Example:
        >>> import tempfile, pyarrow as pa, pyarrow.parquet
        >>> from recis_lightning.data import ColumnarDataset, Id, MixedDataset
        >>> folder, sources = tempfile.TemporaryDirectory(), {}
        >>> for name, rows in {"ads": range(6), "search": range(10, 12)}.items():
        ...     path = f"{folder.name}/{name}.parquet"
        ...     pa.parquet.write_table(pa.table({"row": rows}), path)
        ...     sources[name] = ColumnarDataset(path, [Id("row")])
        >>> data = MixedDataset(sources, {"ads": 0.75, "search": 0.25}, batch_size=4)
        >>> [batch["row"].tolist() for batch in data]
        [[0, 1, 2, 10], [3, 4, 5, 11]]
        >>> folder.cleanup()
    """

    def __init__(
        self,
        sources: Mapping[str, ColumnarDataset],
        proportions: Mapping[str, float],
        batch_size: int = 512,
        *,
        until: str = "all",
        source_entry: str | None = None,
        convert: Callable[[Batch], Any] | None = None,
        pin_memory: bool = False,
    ) -> None:
        super().__init__()
        self.batch_size = check_int("batch_size", batch_size, least=1)
        if until not in ("all", "first"):
            raise ValueError(f"until: expected 'all' or 'first', got {until!r}")
        self.until, self.source_entry = until, source_entry
        self.convert, self.pin_memory = convert, pin_memory
        sizes = rows_by_proportion(proportions, batch_size)
        if sizes.keys() != sources.keys():
            raise ValueError(
                f"proportions: expected those of {sorted(sources)}, got {sorted(proportions)}"
            )
        self.sources: dict[str, ColumnarDataset] = {}
        for name, source in sources.items():
            self.sources[name] = _copied(name, source, sizes[name])
        first, *others = self.sources
        entries = self.sources[first].features.entries
        for name in others:
            found = self.sources[name].features.entries
            if found != entries:
                raise ValueError(
                    f"sources: batches of {first!r} have {entries}, those of {name!r} {found}"
                )
        if source_entry in entries:
            raise ValueError(
                f"source_entry: expected a name that is not there, got {source_entry!r}"
            )
        self.epoch = 0
        self._first = 0  # batches of the epoch before the place that was loaded
        self._num_yielded = 0

    @property
    def window(self) -> None:
        """None: a mixture is not divided."""
        return None

    @property
    def num_windows(self) -> int:
        """1: a mixture is not divided."""
        return 1

    @property
    def num_rows(self) -> int:
        """Rows of all data sets."""
        return sum(source.num_rows for source in self.sources.values())

    def __len__(self) -> int:
        """Return the batches of this rank in an epoch, those before a resumption included."""
        return self._first + self._num_left()

    def why_empty(self) -> None:
        """Return None: each data set has rows, or was refused."""

    def set_epoch(self, epoch: int) -> None:
        """Let the next iteration be of this epoch; a place loaded within it is kept."""
        if check_int("epoch", epoch, least=0) != self.epoch:
            self.epoch, self._first, self._num_yielded = epoch, 0, 0
        for source in self.sources.values():
            source.set_epoch(epoch)

    def state_dict(self, num_batches: int | None = None) -> dict[str, Any]:
        """Return the place in the data, as ``ColumnarDataset.state_dict`` does.

        Raises:
            ValueError: ``num_batches`` is below that of the place that was loaded.
        """
        if num_batches is None:
            num_batches = self._first + self._num_yielded
        check_int("num_batches", num_batches, least=self._first)
        places = {}
        for name, source in self.sources.items():
            first, left = source.progress()
            places[name] = {"place": source.state_dict(first), "first": first, "left": left}
        state = {
            "version": _STATE_VERSION,
            "epoch": self.epoch,
            "until": self.until,
            "first": self._first,
            "num_batches": self._first,
            "sources": places,
        }
        return place_after(state, num_batches)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a place: the next iteration yields the rest of its epoch.

        The number of ranks, ``batch_size`` and the proportions may be others.

        Raises:
            ValueError: The state is of other data, another order or a later version.
        """
        if state.get("version") != _STATE_VERSION or "sources" not in state:
            raise ValueError(
                f"state: expected a mixture's, of version {_STATE_VERSION}, got "
                f"{state.get('version')!r} with {sorted(state)}"
            )
        names, until = sorted(state["sources"]), state["until"]
        if names != sorted(self.sources) or until != self.until:
            raise ValueError(
                f"state: expected a mixture of {sorted(self.sources)} until={self.until!r}, got "
                f"{names} until={until!r}"
            )
        copies = {name: copy.copy(source) for name, source in self.sources.items()}
        for name, source in copies.items():
            try:
                source.load_state_dict(state["sources"][name]["place"])
            except ValueError as error:
                raise ValueError(f"sources[{name!r}]: {error}") from error
        for source in self.sources.values():
            source.forget_workers()
        self.sources, self.epoch = copies, int(state["epoch"])
        self._first, self._num_yielded = int(state["num_batches"]), 0

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        worker, num_workers = (0, 1) if info is None else (info.id, info.num_workers)
        for source in self.sources.values():
            source.heed_parent()
            if info is not None and source.epoch != self.epoch:
                self.epoch, self._first = source.epoch, 0
        lefts = [source.progress()[1] for source in self.sources.values()]
        num_left, self._num_yielded = self._num_left(), 0
        batches = [iter(source) for source in self.sources.values()]
        try:
            for index in range(worker, num_left, num_workers):
                given = [n for n, left in enumerate(lefts) if index < left]
                batch = self._joined({n: next(batches[n]) for n in given})
                self._num_yielded += 1
                yield batch
        finally:
            for one in batches:
                one.close()  # type: ignore[attr-defined]
        self.set_epoch(self.epoch + 1)

    def _joined(self, parts: dict[int, Batch]) -> Any:
        batch: Any = dict(join_rows(list(parts.values())))
        if self.source_entry is not None:
            sizes = torch.tensor([_num_rows(part) for part in parts.values()], device="cpu")
            batch[self.source_entry] = torch.tensor(list(parts), device="cpu").repeat_interleave(
                sizes
            )
        if self.convert is not None:
            batch = self.convert(batch)
        return pinned(batch) if self.pin_memory else batch

    def _num_left(self) -> int:
        lefts = [source.progress()[1] for source in self.sources.values()]
        return max(lefts) if self.until == "all" else min(lefts)

    def fingerprint(self) -> str:
        """Return what is the same for data in which a place has the same meaning."""
        return " ".join(source.fingerprint() for source in self.sources.values())


def place_after(state: Mapping[str, Any], num_batches: int) -> dict[str, Any]:
    """Return a place moved to ``num_batches`` of its epoch, of a mixture or of one data set."""
    if "sources" not in state:
        return state_after(state, num_batches)
    num_batches = max(num_batches, state["first"])
    places = {}
    for name, source in state["sources"].items():
        taken = min(num_batches - state["first"], source["left"])
        place = state_after(source["place"], source["first"] + taken)
        places[name] = {**source, "place": place}
    return {**state, "num_batches": num_batches, "sources": places}


def rows_by_proportion(proportions: Mapping[str, float], num_rows: int) -> dict[str, int]:
    """Share rows out by proportion, by largest remainders.

    Raises:
        ValueError: There are no proportions, one is not above 0, or gets no row.

    Example:
        >>> rows_by_proportion({"a": 0.5, "b": 0.3, "c": 0.2}, 8)
        {'a': 4, 'b': 2, 'c': 2}
    """
    if not proportions:
        raise ValueError("proportions: expected at least one, got none")
    for name, part in proportions.items():
        check_bound(f"proportions[{name!r}]", part)
    total = sum(proportions.values())
    exact = {name: part / total * num_rows if total else 0.0 for name, part in proportions.items()}
    rows = {name: int(part) for name, part in exact.items()}
    by_rest = sorted(exact, key=lambda name: rows[name] - exact[name])
    for name in by_rest[: num_rows - sum(rows.values())]:
        rows[name] += 1
    for name, given in rows.items():
        if not given or not proportions[name]:
            raise ValueError(
                f"proportions[{name!r}]: expected at least a row in {num_rows}, got "
                f"{proportions[name]!r} of {total!r}"
            )
    return rows


def _copied(name: str, source: Any, batch_size: int) -> ColumnarDataset:
    if not isinstance(source, ColumnarDataset):
        raise TypeError(f"sources[{name!r}]: expected ColumnarDataset, got {type(source).__name__}")
    if source.num_windows != 1:
        raise ValueError(f"sources[{name!r}]: data in windows, or followed, cannot be mixed")
    if source.convert is not None:
        raise ValueError(f"sources[{name!r}]: give convert= to the mixture")
    if not source.num_rows:
        raise ValueError(f"sources[{name!r}]: it has no rows: {source.why_empty()}")
    copied = copy.copy(source)
    copied.batch_size, copied.pin_memory = batch_size, False
    copied.set_epoch(0)
    return copied


def _num_rows(batch: Batch) -> int:
    value = next(iter(batch.values()))
    return value.shape[0] if isinstance(value, torch.Tensor) else value.num_bags
