"""Windows of files as callbacks take them: one is current, and is iterated any number of times."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch.utils.data import DataLoader

from recis_lightning.data.dataset import ColumnarDataset, state_after

__all__ = ["WindowBatches"]


class WindowBatches:
    """Batches of a data set in windows, for ``ProgressiveValidation``.

    Args:
        data: In windows of files that are all there; nobody else iterates it.
        num_workers: Processes that read, as for ``ColumnarDataModule``.
        pin_memory: As for it.
        owner: Data module, whose Trainer says how far a window is trained; or None.
    """

    def __init__(
        self,
        data: ColumnarDataset,
        num_workers: int,
        pin_memory: bool,
        owner: Any = None,
    ) -> None:
        self._data, self._num_workers, self._pin_memory = data, num_workers, pin_memory
        self._owner = owner
        self._epoch = 0
        self._begin: dict[str, Any] | None = None  # where the training of a window began
        self._loaded: dict[str, Any] | None = None  # until its window is trained

    def _is_there(self) -> bool:
        count = self._data.num_windows
        assert count is not None
        return self._epoch < count

    @property
    def window(self) -> str | None:
        """Name of the current window; None behind the last one."""
        return self._data.window if self._is_there() else None

    def set_epoch(self, epoch: int) -> None:
        """Make the window with this number, from 0, the current one."""
        self._epoch = epoch
        if self._is_there():
            self._data.set_epoch(epoch)

    def place(self) -> dict[str, Any] | None:
        """Return the place in the window that is trained; None before one is."""
        trainer = getattr(self._owner, "trainer", None)
        if self._begin is None or trainer is None:
            return self._loaded
        # Not what was read: a batch may have been asked for ahead, and windows are evaluated too.
        return state_after(
            self._begin, trainer.fit_loop.epoch_loop.batch_progress.current.processed
        )

    def go_to(self, place: Mapping[str, Any]) -> None:
        """Let the training of a place's window begin at the place."""
        self._loaded, self._begin = dict(place), None

    def __iter__(self) -> Iterator[Any]:
        if not self._is_there():
            return iter(())
        if not self._num_workers:
            return iter(self._data)
        return iter(
            DataLoader(
                self._data,
                batch_size=None,
                num_workers=self._num_workers,
                pin_memory=self._pin_memory,
            )
        )

    def begin_training(self) -> None:
        """Let the next iteration be the training of the current window, from a loaded place on."""
        if not self._is_there():
            return
        loaded, self._loaded = self._loaded, None
        if loaded is not None and loaded["epoch"] == self._epoch:
            self._data.load_state_dict(loaded)
        self._begin = self._data.state_dict()
