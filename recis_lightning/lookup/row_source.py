"""Row sources: they fetch the rows of a lookup, and return the gradients of rows."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from recis_lightning.lookup.batch import Batch
from recis_lightning.lookup.dedup import DeduplicatedIds
from recis_lightning.ops.embedding_bag import Plan
from recis_lightning.ops.header import Header


class OutputGradients(NamedTuple):
    """Gradients of a lookup's outputs.

    Attributes:
        features: Positions of the features that have a gradient and train.
        plan: int64 [len(features), PLAN_SIZE]; DATA points to gradients.
        batch: What was looked up.
        tensors: What has the gradients, float32; nobody else writes to it.
    """

    features: Sequence[int]
    plan: Plan
    batch: Batch
    tensors: list[Tensor]

    def buffers(self) -> list[Tensor]:
        """Return all tensors that ``plan`` points into, rows apart."""
        return [*self.tensors, *self.batch.buffers()]


class PreparedIds(NamedTuple):
    """Ids of a group's lookup that were exchanged ahead of time.

    Attributes:
        deduplicated: This rank's.
        received_counts: int64 [num_ranks, num_sources], how many ids came of each source.
        received: What came for them: int64 [r] or [r, 2], as ``exchange_rows`` is sent it.
    """

    deduplicated: DeduplicatedIds
    received_counts: npt.NDArray[np.int64]
    received: Tensor


class FetchedRows(Protocol):
    """Rows of one lookup; returns their gradients to where the rows came from."""

    @property
    def rows(self) -> Tensor:
        """int64 [n], the row of each id in its feature's header; UNKNOWN or PADDING if none."""

    @property
    def is_own(self) -> bool:
        """Whether the rows lie in this rank's tables, so that it alone sees when they are lost."""

    def header_of(self, feature: int) -> Header:
        """Return the header by which kernels find the rows of the feature at a position."""

    def version_of(self, feature: int) -> int:
        """Return a number that grows when what is read by ``header_of`` is overwritten."""

    def return_gradients(self, gradients: OutputGradients) -> None:
        """Leave gradients as pending with the tables that own the rows, on whatever rank."""


class RowSource(Protocol):
    """Source of the rows of one group of tables.

    Attributes:
        is_sharded: Whether a lookup is one of all ranks.
        can_prepare: Whether ids can be exchanged ahead of a lookup.
    """

    is_sharded: ClassVar[bool]
    can_prepare: ClassVar[bool]

    def fetch(
        self,
        batch: Batch,
        plan: Plan,
        training: bool,
        learns: bool,
        prepared: PreparedIds | None = None,
    ) -> Generator[Any, Any, FetchedRows]:
        """Look ids up and fill the outputs; pause where messages travel.

        The groups of an engine take turns at the pauses, so that the messages of all travel
        together. The first pause of sharded rows yields how many ids go to each rank, and is sent
        how many come from each: int64 [num_ranks, num_sources]. Each other one yields a
        ``Message``, and is sent what has come.

        Args:
            batch: What to look up.
            plan: int64 [num_features, PLAN_SIZE]; DATA points to the outputs. HEADER and ROWS are
                overwritten.
            training: Insert unknown ids and stamp rows; otherwise only read.
            learns: Whether rows may get gradients, as far as autograd records.
            prepared: Ids of sharded rows that were exchanged ahead: the first pause is that of the
                message after them. None means that they were not.
        """


__all__ = ["FetchedRows", "OutputGradients", "PreparedIds", "RowSource"]
