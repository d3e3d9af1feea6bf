"""The next training batch, read while this one trains."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

# Lightning offers no way to see the batch after this one.
from lightning.pytorch.loops.fetchers import _PrefetchDataFetcher
from typing_extensions import override

from recis_lightning.callbacks.level_fetcher import LevelFetcher

__all__ = ["next_batch", "stop_reading_ahead"]


def next_batch(fetcher: Any) -> Any:
    """Return the batch that a fetcher of training batches will give next; None if there is none.

    What a checkpoint says of the place in the data does not count a batch that was only seen here.

    Args:
        fetcher: Lightning's, or a ``LevelFetcher``.
    """
    if not isinstance(fetcher, _PrefetchDataFetcher) or fetcher.done:
        return None
    if fetcher.batches:
        return fetcher.batches[0][0]
    if isinstance(fetcher, LevelFetcher) and not fetcher.has_own:
        return fetcher.template
    if fetcher.length is None or fetcher.iterator is None:
        return None
    if not isinstance(fetcher.iterator, _ReadAhead):
        fetcher.iterator = _ReadAhead(fetcher.iterator, fetcher.combined_loader)
    fetcher._start_profiler()
    try:
        found = fetcher.iterator.peek()
    finally:
        fetcher._stop_profiler()
    return None if found is None else found[0]


def stop_reading_ahead(fetcher: Any) -> None:
    """Forget a batch that was read and that nobody will ask for."""
    reader = getattr(fetcher, "iterator", None)
    if isinstance(reader, _ReadAhead):
        reader.close()


class _ReadAhead(Iterator[Any]):
    """Iterator over a loader's batches that can look at the next one.

    Args:
        iterator: The loader's.
        loader: Lightning's ``CombinedLoader``. As long as a batch has been seen but not asked for,
            it tells the state that it had before.
    """

    def __init__(self, iterator: Iterator[Any], loader: Any) -> None:
        self._iterator, self._loader = iterator, loader
        self._seen: list[Any] = []
        self._error: BaseException | None = None
        self._states: list[Any] | None = None
        loader._state_dicts = self._state_dicts

    def peek(self) -> Any:
        """Return the next item; None if there is none, or an error comes in its place."""
        if not self._seen and self._error is None:
            self._states = self._states_before()
            try:
                self._seen.append(next(self._iterator))
            except Exception as error:  # StopIteration too; whoever asks for the item gets it
                self._error = error
        return self._seen[0] if self._seen else None

    @override
    def __next__(self) -> Any:
        self._states = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        return self._seen.pop() if self._seen else next(self._iterator)

    def close(self) -> None:
        """Let the loader tell its own state again."""
        self._seen, self._states = [], None
        vars(self._loader).pop("_state_dicts", None)

    def _states_before(self) -> list[Any] | None:
        """Return the loaders' states before a batch is read; None if they do not depend on that."""
        states = [loader for loader in self._loader.flattened if hasattr(loader, "state_dict")]
        if all(getattr(loader, "tells_trained_batches", False) for loader in states):
            return None
        return copy.deepcopy(self._current_states())

    def _state_dicts(self) -> list[Any]:
        return self._current_states() if self._states is None else self._states

    def _current_states(self) -> list[Any]:
        states: list[Any] = type(self._loader)._state_dicts(self._loader)
        return states
