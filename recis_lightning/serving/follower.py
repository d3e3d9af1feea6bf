"""``follow``: a served model that takes up deltas while it answers."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Self, override

from recis_lightning.arguments import check_bound, check_path
from recis_lightning.serving.chain import State, chain_folder, links_of
from recis_lightning.serving.chain_link import BASE, Head, Link
from recis_lightning.serving.delta_file import DeltaFile
from recis_lightning.serving.layered_table import Layer, LayeredTable, Shard
from recis_lightning.serving.merging import check_alike
from recis_lightning.serving.model import ServedModel, load
from recis_lightning.serving.parameter_names import match_names
from recis_lightning.serving.values import DTYPES

_TRIES = 5  # to read a chain that is compacted meanwhile
_PREFIX = "model."  # of a parameter's name in an exported program


class FollowedModel:
    """Model of a served folder that follows the folder's chain of deltas; call it as the model.

    Each call is answered from one version: the rows of all tables and the parameters behind one
    delta. A new version is made beside the one that answers, and takes its place at once, so no
    call waits. Any number of threads may call. Pickle keeps the folder's path, and loading it
    follows the folder anew; so does a copy.

    Args:
        folder: The folder.
        model: Its model.
        poll_seconds: Time between looks for deltas; None never looks by itself.

    Attributes:
        error: What kept the last look from a newer version, or None; the version before stays.
    """

    def __init__(self, folder: Path, model: ServedModel, poll_seconds: float | None) -> None:
        self._chain, self._model = chain_folder(folder), model
        self._poll_seconds = poll_seconds
        self._state: State | None = None
        self._link: Link | None = None
        self._shards: dict[str, list[Shard]] = {}
        self._refreshing, self._closed = threading.Lock(), threading.Event()
        self.error: Exception | None = None
        self._thread: threading.Thread | None = None
        self.refresh()
        if poll_seconds is not None:
            self._thread = threading.Thread(
                target=self._poll, args=(poll_seconds,), name="recis_lightning follow", daemon=True
            )
            self._thread.start()

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """Return what ``ServedModel`` would of the version that is there now."""
        return self._model(*arguments, **named)

    def score_records(self, records: Any) -> Any:
        """Return what ``ServedModel.score_records`` would of the version that is there now."""
        return self._model.score_records(records)

    @property
    def columns(self) -> list[str]:
        """Columns that raw records must have; none, where the folder has no transforms."""
        return self._model.columns

    @property
    def model(self) -> ServedModel:
        """The version that is there now, with its ``step``; it never changes."""
        return self._model

    @property
    def step(self) -> int | None:
        """Step of the last delta that it has; None without any."""
        return self._model.step

    @property
    def nbytes(self) -> int:
        """Bytes of rows in memory: those that deltas changed since the base."""
        tables = self._model.tables.values()
        return sum(table.nbytes for table in tables if isinstance(table, LayeredTable))

    def refresh(self) -> bool:
        """Take up the deltas that have come; return whether there were any.

        Raises:
            ValueError: The chain is damaged, or of another model; the version before stays.
        """
        with self._refreshing:
            for tried in range(_TRIES):
                head = Head.read(self._chain)
                if head is None or (head.seq, head.id) == self._state:
                    return False
                try:
                    self._take_up(head)
                except ValueError:
                    # Files that were there a moment ago, if the chain has another head by now.
                    if tried == _TRIES - 1 or Head.read(self._chain) == head:
                        raise
                else:
                    return True
        return False

    def _take_up(self, head: Head) -> None:
        """Make the version behind a head, and let it answer."""
        links = links_of(self._chain, head, self._state)
        if not links:
            return
        check_alike(links if self._link is None else [self._link, *links], self._chain)
        shards = {name: list(of_table) for name, of_table in self._shards.items()}
        wanted = self._model.manifest.tables
        for link in links:
            numbers = {table.name: number for number, table in enumerate(link.tables)}
            for name, record in wanted.items():
                table = link.tables[numbers[name]] if name in numbers else None
                if table is None or (table.embedding_dim, table.dtype) != (
                    record.embedding_dim,
                    record.dtype,
                ):
                    raise ValueError(
                        f"{self._chain / link.file}: the model looks up {record.embedding_dim} x "
                        f"{record.dtype} of table {name!r}, which the chain does not have"
                    )
            files = [DeltaFile(self._chain, link, rank) for rank in range(len(link.files))]
            for name in wanted:
                before = shards.get(name, [])
                shards[name] = [
                    _after(file, numbers[name], before[rank] if before else None)
                    for rank, file in enumerate(files)
                ]
        dense = self._constants(links[-1], files[0].dense())
        tables = {name: LayeredTable(of_table) for name, of_table in shards.items()}
        self._model = self._model.with_values(tables, dense, links[-1].step)
        self._shards, self._link = shards, links[-1]
        self._state = State(head.seq, head.id)

    def _constants(self, link: Link, dense: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the parameters of a link that the program reads, by their names there."""
        found = {}
        manifest, file = self._model.manifest, self._chain / link.file
        own = [
            name.removeprefix(_PREFIX) for name in manifest.constants if name.startswith(_PREFIX)
        ]
        try:
            matched = match_names(own, dense)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None
        if own and dense and not matched:
            raise ValueError(
                f"{file}: it has none of the exported parameters, such as {own[0]!r}; export the "
                "module that is trained, or one that holds it"
            )
        for exported, trained in matched.items():
            name, value = _PREFIX + exported, dense[trained]
            dtype = manifest.constants[name]
            shape = manifest.dense.arrays[name].shape
            if (tuple(value.shape), value.dtype) != (shape, DTYPES[dtype]):
                raise ValueError(
                    f"{file}: parameter {trained!r} is {value.dtype} "
                    f"{tuple(value.shape)}, the model's is {dtype} {shape}"
                )
            found[name] = value
        return found

    def _poll(self, seconds: float) -> None:
        while not self._closed.wait(seconds):
            try:
                self.refresh()
                self.error = None
            except Exception as error:
                self.error = error

    def close(self) -> None:
        """Look for deltas no more; the version that is there goes on answering."""
        self._closed.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        self._thread = None

    @override
    def __reduce__(self) -> tuple[Any, ...]:
        seconds = None if self._closed.is_set() else self._poll_seconds
        return _reopen, (str(self._model.folder.absolute()), seconds, str(self._model.device))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"FollowedModel({self._model.manifest.model}, step={self.step})"


def _after(file: DeltaFile, number: int, before: Shard | None) -> Shard:
    """Return the rows of a rank after a link."""
    rows = file.table(number)
    if file.link.kind == BASE or file.link.tables[number].parts[file.rank].is_whole:
        return Shard(rows)
    if before is None:
        raise ValueError(f"{file.arrays.path}: a delta without a base")
    every = np.arange(len(rows))
    ids = rows.ids()
    return before.changed(Layer.of(ids, rows.gather(every), file.removed(number)))


def _reopen(folder: str, poll_seconds: float | None, device: str) -> FollowedModel:
    return follow(folder, poll_seconds=poll_seconds, device=device)


def follow(
    folder: str | os.PathLike[str],
    *,
    poll_seconds: float | None = 0.05,
    device: torch.device | str = "cpu",
) -> FollowedModel:
    """Open a served folder, and follow the deltas that ``DeltaHook`` writes to it.

    The folder must be there, by ``serving.export``; the chain of deltas may come later. The base
    of the chain takes the place of the exported rows, each delta changes it, and both bring the
    model's parameters. A base is mapped; in memory are the rows that changed since, each once.

    Args:
        folder: From ``export``.
        poll_seconds: Time between looks for deltas, in a thread of its own; None leaves that to
            calls of ``refresh``.
        device: As for ``load``.

    Raises:
        TypeError, ValueError: ``folder`` is no path, ``poll_seconds`` is no number >= 0 and not
            None, ``device`` is none that there is, or the folder or its chain is damaged, or not
            of one model.

    Example:
        >>> import tempfile
        >>> import torch
        >>> from recis_lightning import DynamicEmbedding, serving
        >>> user = DynamicEmbedding(2, name="user")
        >>> rows = user(torch.arange(3))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     serving.export(user, folder, example=torch.arange(3))
        ...     mark, sink = serving.ModelMark(user), serving.ChainSink(folder)
        ...     sink.write(mark.take(step=0))
        ...     with serving.follow(folder, poll_seconds=None) as model:
        ...         user.table.insert(torch.tensor([1]), torch.ones(1, 2))
        ...         sink.write(mark.take(step=1))
        ...         model.refresh(), model.step, model(torch.tensor([1, 9])).tolist()
        ...     sink.close()
        (True, 1, [[1.0, 1.0], [0.0, 0.0]])
    """
    if poll_seconds is not None:
        check_bound("poll_seconds", poll_seconds)
    return FollowedModel(check_path("folder", folder), load(folder, device=device), poll_seconds)


__all__ = ["FollowedModel", "follow"]
