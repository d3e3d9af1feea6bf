"""Fetcher of training batches that ends on all ranks together."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

# Lightning offers no way to say how many batches an epoch has once it has begun.
from lightning.pytorch.loops.fetchers import _DataFetcher, _PrefetchDataFetcher
from typing_extensions import override

from recis_lightning.callbacks.empty_batch import without_samples
from recis_lightning.distributed import collectives

__all__ = ["LevelFetcher"]


class LevelFetcher(_PrefetchDataFetcher):
    """Lightning's fetcher of batches, with as many batches on all ranks.

    If the data of all ranks have a length, ranks agree on the number of batches when an epoch
    begins. Otherwise they tell each other in each batch whether they have another one.

    Args:
        fetcher: Lightning's, whose iterator is made.
        on_uneven: "stop" ends with the first rank whose data end, "pad" with the last: a rank
            without data gets batches without samples.
        set_length: Told how many batches an epoch has; infinity if nobody knows.

    Attributes:
        num_padded: Batches without samples that this rank got in this epoch.
    """

    def __init__(
        self,
        fetcher: _PrefetchDataFetcher,
        on_uneven: Literal["stop", "pad"],
        set_length: Callable[[float], None],
    ) -> None:
        super().__init__()
        vars(self).update(vars(fetcher))
        self._on_uneven, self._set_length = on_uneven, set_length
        self._own_length = self.length
        self._template: Any = None
        self.num_padded = 0
        self._agree()

    @override
    def __iter__(self) -> LevelFetcher:
        super().__iter__()
        self._agree()
        return self

    @override
    def __next__(self) -> Any:
        if self.done:
            raise StopIteration
        if self.length is not None:
            assert self._own_length is not None
            fetched = self._fetch() if self.fetched < self._own_length else None
            if fetched is None:
                if self._on_uneven == "stop":  # the length was wrong
                    self.done = True
                    raise StopIteration
                self.fetched += 1
            self.done = self.fetched >= self.length
        else:
            fetched = self.batches.pop(0) if self.batches else None
            self._fetch_ahead()
            self.done = self._ends(self._ask("another batch"))
        if fetched is None:
            return self._padding()
        if self._template is None and self._on_uneven == "pad":
            self._template = without_samples(fetched[0])
        return fetched

    @property
    def has_own(self) -> bool:
        """Whether the next batch, if there is one, is of this rank's data."""
        if self.length is None or self._own_length is None:
            return bool(self.batches)
        return self.fetched < self._own_length

    @property
    def template(self) -> Any:
        """Batch without samples that this rank gets where others have another one, if known."""
        return self._template

    def _agree(self) -> None:
        """Agree with the other ranks on how many batches there are."""
        self._own_length, self.num_padded = self.length, 0
        lengths = collectives.gather(self.length)
        known = [length for length in lengths if length is not None]
        if len(known) == len(lengths):
            self.length = min(known) if self._on_uneven == "stop" else max(known)
            self.done = self.fetched >= self.length
        else:
            self.length = None
            self.done = False
            if self._own_length is not None:
                self._fetch_ahead()
            has_batch = self._ask("a first batch")
            self.done = self._ends(has_batch)
            if not self.done and not all(has_batch):
                own = without_samples(self.batches[0][0]) if self.batches else None
                offered = collectives.gather((bool(self.batches), own))
                self._template = next(part for has_one, part in offered if has_one)
        self._set_length(math.inf if self.length is None else self.length)

    def _fetch_ahead(self) -> None:
        """Fetch the next batch if there is one."""
        fetched = self._fetch()
        if fetched is not None:
            self.batches.append(fetched)

    def _fetch(self) -> Any:
        """Return the next batch, None if there is none."""
        try:
            return _DataFetcher.__next__(self)
        except StopIteration:
            return None

    def _ask(self, what: str) -> list[bool]:
        """Return which ranks have a batch ahead."""
        return [number > 0 for number in collectives.exchange_number(what, len(self.batches))]

    def _ends(self, has_batch: list[bool]) -> bool:
        return not (all(has_batch) if self._on_uneven == "stop" else any(has_batch))

    def _padding(self) -> Any:
        """Return a batch without samples."""
        if self._template is None:  # this rank's data had ended before the run resumed
            batch, *_ = next(iter(self.combined_loader))
            self._template = without_samples(batch)
        self.num_padded += 1
        return self._template, self.fetched - 1, 0
