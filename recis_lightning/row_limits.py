"""Eviction policies that keep a number of rows: the last, or the most, used."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from recis_lightning.arguments import check_bound, check_int, explain_arguments
from recis_lightning.eviction_policy import RowColumns, RowLimit
from recis_lightning.row_ranking import ascending

_WHEN = ("evict", "lookup")


def _check_limit(n: int, when: str) -> None:
    check_int("n", n, least=0 if when == "evict" else 1)
    if when not in _WHEN:
        raise ValueError(f"when: expected 'evict' or 'lookup', got {when!r}")


@explain_arguments()
@dataclass(frozen=True)
class MaxRows(RowLimit):
    """Evict down to ``n`` rows: the least recently, or least frequently, used are evicted first.

    Exact, over all ranks together. ``by="last_seen"`` ranks rows by the step of their last training
    lookup, ``by="count"`` by the number of occurrences in training lookups, and then by that step;
    of rows that are still equal, those with the lower ids are evicted first. Rows that must not be
    evicted (pinned, or with a pending gradient) count among the ``n``.

    ``half_life=h`` lets counts decay: whenever the table's step reaches a multiple of ``h``, all
    counts are halved, rounding down. An id that was frequent long ago goes before one that is
    frequent now.

    With ``when="lookup"`` the table has at most ``n`` rows at any time, on all ranks together: a
    training lookup evicts rows before it inserts as many ids as there is no room for, and
    ``evict()`` works as ever. Rows of the lookup's own ids stay, and so do those of other lookups
    whose backward pass is yet to come, those that wait for the optimizer and pinned ones. If there
    is no room beside them, as for a batch of more than ``n`` distinct ids, the lookup raises a
    RuntimeError, and no row comes or goes. ``insert`` and loading are not limited.

    Args:
        n: Number of rows to keep, an int >= 0, and >= 1 for "lookup".
        by: "last_seen" or "count".
        half_life: Steps after which counts are halved, an int >= 1, for "count" only; None never.
        when: "evict", in ``evict()`` only, or "lookup".

    Raises:
        TypeError, ValueError: An argument is of a wrong type or out of range.

    Example:
        >>> from recis_lightning import DynamicEmbedding
        >>> item = DynamicEmbedding(2, eviction=MaxRows(3, when="lookup"))
        >>> for batch in ([1, 2], [3, 1], [4]):
        ...     _ = item(torch.tensor(batch)).detach()
        ...     item.table.update_step()
        >>> sorted(item.table.ids().tolist())
        [1, 3, 4]

    Source: halving is the reset of TinyLFU (Einziger et al., 2017).
    """

    n: int
    by: str = "last_seen"
    half_life: int | None = None
    when: str = "evict"

    def __post_init__(self) -> None:
        _check_limit(self.n, self.when)
        if self.by not in ("last_seen", "count"):
            raise ValueError(f"by: expected 'last_seen' or 'count', got {self.by!r}")
        if self.half_life is not None:
            check_int("half_life", self.half_life, least=1, alternative=" or None")
            if self.by != "count":
                raise ValueError(
                    f"half_life: only by='count' takes one, got {self.half_life!r} with "
                    f"by={self.by!r}"
                )

    def __repr__(self) -> str:
        half_life = "" if self.half_life is None else f", half_life={self.half_life}"
        when = "" if self.when == "evict" else f", when={self.when!r}"
        return f"MaxRows(n={self.n}, by={self.by!r}{half_life}{when})"

    @property
    @override
    def columns(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset({"last_seen", "ids"} | ({"counts"} if self.by == "count" else set()))

    @property
    @override
    def halving_steps(self) -> int | None:
        return self.half_life

    @property
    @override
    def lookup_limit(self) -> RowLimit | None:
        return self if self.when == "lookup" else None

    @property
    @override
    def max_rows(self) -> int:
        return self.n

    @override
    def keys(self, rows: RowColumns) -> list[Tensor]:
        keys = [rows.last_seen, rows.ids]
        return keys if self.by == "last_seen" else [rows.counts, *keys]


@explain_arguments()
@dataclass(frozen=True)
class DistanceLFU(RowLimit):
    """Evict down to ``n`` rows: those first that were seen seldom and long ago.

    A row's score is ``count / (step - last_seen + 1) ** decay_exponent``, where ``count`` is the
    number of occurrences of its id in training lookups; the lowest go first. Of rows with the same
    score, the less recently seen goes first, and then the lower id. Exact, over all ranks together,
    in float64.

    Args:
        n: Number of rows to keep, an int >= 0, and >= 1 for "lookup".
        decay_exponent: Weight of the distance, a number >= 0; with 0 counts alone decide.
        when: As for ``MaxRows``.

    Raises:
        TypeError, ValueError: An argument is of a wrong type or out of range.

    Example:
        Id 1 was seen three times, but five steps ago; id 2 twice and just now:

        >>> from recis_lightning import DynamicEmbedding
        >>> item = DynamicEmbedding(2, eviction=DistanceLFU(1))
        >>> _ = item(torch.tensor([1, 1, 1])).detach()
        >>> item.table.update_step(5)
        >>> _ = item(torch.tensor([2, 2])).detach()
        >>> int(item.table.evict()), item.table.ids().tolist()
        (1, [2])

    Source: TorchRec, ``DistanceLFU_EvictionPolicy``.
    """

    columns: ClassVar[frozenset[str]] = frozenset({"counts", "last_seen", "ids"})
    n: int
    decay_exponent: float = 1.0
    when: str = "evict"

    def __post_init__(self) -> None:
        _check_limit(self.n, self.when)
        check_bound("decay_exponent", self.decay_exponent)

    @property
    @override
    def lookup_limit(self) -> RowLimit | None:
        return self if self.when == "lookup" else None

    @property
    @override
    def max_rows(self) -> int:
        return self.n

    @override
    def keys(self, rows: RowColumns) -> list[Tensor]:
        distances = (rows.step - rows.last_seen).clamp(min=0).double() + 1
        return [
            ascending(rows.counts.double() / _power(distances, self.decay_exponent)),
            rows.last_seen,
            rows.ids,
        ]


def _power(values: Tensor, exponent: float) -> Tensor:
    """Return powers of float64 [n], each the same wherever in the tensor it stands."""
    if values.device.type != "cpu":
        return values**exponent
    # torch takes another function for the last few, which may differ in the last bit.
    return torch.from_numpy(np.power(values.numpy(), exponent))


__all__ = ["DistanceLFU", "MaxRows"]
