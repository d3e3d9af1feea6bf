"""Load of a model's tables and dense tensors from a list of sources: of all parts or of none."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from recis_lightning.checkpoint.name_patterns import dense_tensors
from recis_lightning.checkpoint.progress import Progress, progress_bar
from recis_lightning.checkpoint.reader import NoCheckpointError
from recis_lightning.checkpoint.row_merge import merge_rows
from recis_lightning.checkpoint.saved_tables import FitRules, all_or_none
from recis_lightning.checkpoint.source import Source
from recis_lightning.checkpoint.source_content import newest, read_source, version_of
from recis_lightning.checkpoint.source_plan import (
    SourcePlan,
    describe,
    let_later_win,
    plan_source,
)
from recis_lightning.checkpoint.writer import tables_by_name
from recis_lightning.distributed import collectives
from recis_lightning.table.hash_table import HashTable
from recis_lightning.table.lock import distinct_locks, write


class OwnCheckpoint(NamedTuple):
    """Checkpoint of the run itself, which comes after all sources.

    Attributes:
        path: Of it.
        parts: Names of its tables and dense tensors, which no source brings.
        load: Loads its tables.
    """

    path: Path
    parts: Collection[str]
    load: Callable[[], None]


class _Found(NamedTuple):
    """Place of a source's content, or the error if there is none."""

    path: Path | None
    version: str
    error: str


class SourceLoader:
    """Loader of a list of sources, which knows what it loaded before.

    Args:
        sources: Later ones win.

    Attributes:
        sources: The list.
        versions: Version of each source that was loaded last, by its path as it was given.

    Raises:
        TypeError: ``sources`` is no list of ``Source``.
    """

    def __init__(self, sources: Iterable[Source]) -> None:
        self.sources = _check_sources(sources)
        self.versions: dict[str, str] = {}
        self._targets: list[set[str]] = [set() for _ in self.sources]

    def load(
        self,
        module: nn.Module,
        progress: Progress = progress_bar,
        own: OwnCheckpoint | None = None,
        only_newer: bool = False,
    ) -> bool:
        """Load what the sources hold now; all ranks call it together. Rank 0 prints the plan first.

        Args:
            module: The model.
            progress: Shows the progress of rank 0.
            own: Checkpoint that is loaded after them.
            only_newer: Whether only sources are loaded that changed since they were loaded last.
                What a source that did not change brings too stays as it is.

        Returns:
            Whether there was anything to load.

        Raises:
            ValueError: A source does not fit or is damaged; all is as it was.
        """
        found = self._find()
        chosen = [
            number
            for number, source in enumerate(self.sources)
            if not only_newer
            or (found[number].path and found[number].version != self.versions.get(str(source)))
        ]
        if not chosen:
            return False
        tables = collectives.run_on_all_ranks(lambda: tables_by_name(module))
        dense = dense_tensors(module)
        plans = collectives.run_on_all_ranks(
            lambda: [_plan(self.sources[n], found[n], tables, dense) for n in chosen]
        )
        targets = [plan.targets() for plan in plans]
        claims = [self._claims(number, chosen, own) for number in chosen]
        let_later_win(plans, claims)
        text = describe(plans, tables, None if own is None else str(own.path))
        _check_alike(text)
        if collectives.rank() == 0:
            print(text)
        locks = distinct_locks(table.lock for table in tables.values())
        write(locks, _apply, plans, tables, dense, progress, own)
        for number, brought in zip(chosen, targets, strict=True):
            self._targets[number] = brought
            self.versions[str(self.sources[number])] = found[number].version
        return True

    def _find(self) -> list[_Found]:
        """Return where the sources are now, as rank 0 sees it."""
        own = [_find(source) for source in self.sources] if collectives.rank() == 0 else []
        return collectives.gather(own)[0]

    def _claims(self, number: int, chosen: Sequence[int], own: OwnCheckpoint | None) -> set[str]:
        """Return the parts that a source does not bring, because others have brought them."""
        claimed = set[str]() if own is None else set(own.parts)
        for other in range(number + 1, len(self.sources)):
            if other not in chosen:
                claimed |= self._targets[other]
        return claimed


def load_sources(
    model: nn.Module, sources: Iterable[Source], *, progress: Progress = progress_bar
) -> None:
    """Load tables and dense tensors of a model from a list of sources, of which later ones win.

    Every rank calls it. Rank 0 prints the plan before anything changes; after an error everything
    is as it was. Tables and tensors that no source brings stay as they are.

    Args:
        model: The model.
        sources: The list.
        progress: Shows the progress of rank 0.

    Raises:
        TypeError: ``sources`` is no list of ``Source``.
        ValueError: A source is missing (a FileNotFoundError too), damaged or does not fit. On a
            rank that found nothing wrong while another one did, a RuntimeError.

    Example:
        >>> import tempfile, numpy as np
        >>> from recis_lightning import HashTable
        >>> model = nn.ModuleDict({"user": HashTable(2, name="user")})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     np.savez(f"{folder}/old_user.npz", ids=[7, 8], weights=np.ones((2, 2)))
        ...     load_sources(model, [Source(f"{folder}/old_user.npz", rename={"old_*": "*"})])
        Loading from 1 source:
          1. ...old_user.npz:
            user <- old_user: 2 rows of dim 2, float64 -> float32
        >>> model["user"].embeddings(torch.tensor([8])).tolist()
        [[1.0, 1.0]]
    """
    SourceLoader(sources).load(model, progress)


def _check_sources(sources: Any) -> list[Source]:
    found = list(sources) if isinstance(sources, Iterable) else [sources]
    if isinstance(sources, (str, Mapping)) or not all(isinstance(one, Source) for one in found):
        raise TypeError(f"sources: expected a list of Source(path, ...), got {sources!r}")
    return found


def _find(source: Source) -> _Found:
    try:
        path = newest(source.path)
        return _Found(path, version_of(path), "")
    except OSError as error:
        return _Found(None, "", str(error))


def _plan(
    source: Source, found: _Found, tables: dict[str, HashTable], dense: dict[str, Tensor]
) -> SourcePlan:
    if found.path is None and not source.skip_missing:
        raise NoCheckpointError(f"source {source}: {found.error}")
    content = None if found.path is None else read_source(found.path)
    return plan_source(source, content, tables, dense)


def _check_alike(text: str) -> None:
    """Raise ValueError unless all ranks load the same."""
    plans = collectives.gather(text)
    for rank, other in enumerate(plans):
        if other != plans[0]:
            raise ValueError(
                f"sources: ranks must load the same; rank 0: {plans[0]}, rank {rank}: {other}"
            )


def _apply(
    plans: Sequence[SourcePlan],
    tables: Mapping[str, HashTable],
    dense: Mapping[str, Tensor],
    progress: Progress,
    own: OwnCheckpoint | None,
) -> None:
    changed = {target for plan in plans for target in plan.dense.values()}
    with all_or_none(tables.values()), _dense_undo([dense[name] for name in sorted(changed)]):
        for plan in plans:
            _load_tables(plan, progress)
            collectives.run_on_all_ranks(partial(_load_dense, plan, dense))
        if own is not None:
            own.load()


def _load_tables(plan: SourcePlan, progress: Progress) -> None:
    if plan.content is None or not plan.tables:
        return
    reader = plan.content.tables
    if not plan.source.clear:
        for name, table in plan.tables.items():
            work = partial(merge_rows, reader, name, table, name in plan.with_state)
            collectives.run_on_all_ranks(work)
        return
    for with_state in (True, False):
        part = {
            name: table
            for name, table in plan.tables.items()
            if (name in plan.with_state) is with_state
        }
        if part:
            rules = FitRules(strict=False, optimizer_state=with_state)
            reader.load(part, rules, progress, whole=False)


def _load_dense(plan: SourcePlan, dense: Mapping[str, Tensor]) -> None:
    if plan.content is None:
        return
    with torch.no_grad():
        for name, target in plan.dense.items():
            dense[target].copy_(plan.content.dense[name])


@contextmanager
def _dense_undo(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Give tensors back what they held if the block is left by an exception."""
    before = [tensor.detach().clone() for tensor in tensors]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for tensor, values in zip(tensors, before, strict=True):
                tensor.copy_(values)
        raise


__all__ = ["OwnCheckpoint", "SourceLoader", "load_sources"]
