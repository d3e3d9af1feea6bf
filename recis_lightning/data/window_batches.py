"""Windows of files as callbacks take them: one is current, and is iterated any number of times."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader

from recis_lightning.data.dataset import ColumnarDataset

__all__ = ["WindowBatches"]


class WindowBatches:
    """Batches of a data set in windows, for ``ProgressiveValidation``.

    Args:
        data: In windows of files that are all there; nobody else iterates it.
        num_workers: Processes that read, as for ``ColumnarDataModule``.
        pin_memory: As for it.
    """

    def __init__(self, data: ColumnarDataset, num_workers: int, pin_memory: bool) -> None:
        self._data, self._num_workers, self._pin_memory = data, num_workers, pin_memory
        self._epoch = 0

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
