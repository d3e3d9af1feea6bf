"""Data in time windows, each trained as an epoch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol, final, runtime_checkable

from lightning.pytorch import Trainer

__all__ = ["WindowList", "Windows", "current_window", "follow_windows"]

_KEY = "_recis_lightning_windows"


@runtime_checkable
class Windows(Protocol):
    """Data that comes in windows of time, the oldest first: one is current, and is iterated.

    A plain list of loaders becomes one by ``WindowList``. A data module that reads windows has such
    an object as its attribute ``windows``. With ``state_dict`` and ``load_state_dict``, its place
    within a window is saved with Lightning's checkpoints.

    Attributes:
        window: Name of the current window, for logs and files; None behind the last one.
    """

    window: str | None

    def set_epoch(self, epoch: int) -> None:
        """Make the window with this number, from 0, the current one."""

    def __iter__(self) -> Iterator[Any]:
        """Return an iterator over the batches of the current window; none behind the last one."""


@final
class WindowList:
    """Windows that are a list of loaders, or a dict of them by the names of the windows.

    Each loader is used as it is: on several ranks it yields this rank's batches.

    Args:
        loaders: A loader, or any other iterable of batches, for each window.

    Attributes:
        window: Name of the current window: its key in a dict, its number in a list.

    Raises:
        TypeError: ``loaders`` is no list and no dict, or has what cannot be iterated.
        ValueError: There are none.

    Example:
        >>> windows = WindowList({"monday": ["a", "b"], "tuesday": ["c"]})
        >>> windows.set_epoch(1)
        >>> windows.window, list(windows)
        ('tuesday', ['c'])
        >>> windows.set_epoch(2)
        >>> windows.window, list(windows)
        (None, [])
    """

    def __init__(self, loaders: Mapping[str, Iterable[Any]] | Iterable[Iterable[Any]]) -> None:
        if isinstance(loaders, Mapping):
            named = {str(name): loader for name, loader in loaders.items()}
        elif isinstance(loaders, (list, tuple)):
            named = {str(number): loader for number, loader in enumerate(loaders)}
        else:
            raise TypeError(
                "loaders: expected a list of loaders, or a dict of them by the names of windows, "
                f"got {type(loaders).__name__}"
            )
        for name, loader in named.items():
            if not isinstance(loader, Iterable):
                raise TypeError(
                    f"loaders: expected loaders, got {type(loader).__name__} for window {name!r}"
                )
        if not named:
            raise ValueError("loaders: expected at least one window, got none")
        self._names, self._loaders = list(named), list(named.values())
        self._epoch = 0

    def __len__(self) -> int:
        return len(self._names)

    @property
    def window(self) -> str | None:
        """Name of the current window; None behind the last one."""
        return self._names[self._epoch] if self._epoch < len(self._names) else None

    def set_epoch(self, epoch: int) -> None:
        """Make the window with this number, from 0, the current one."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[Any]:
        return iter(self._loaders[self._epoch]) if self._epoch < len(self._names) else iter(())


class WindowOrder:
    """Order of the windows of one run: which epoch has which.

    Args:
        windows: The windows.
    """

    def __init__(self, windows: Windows) -> None:
        self.windows = windows
        self._names: dict[int, str | None] = {}

    def name(self, epoch: int) -> str | None:
        """Return the name of an epoch's window; None behind the last one."""
        if epoch not in self._names:
            self.windows.set_epoch(epoch)
            self._names[epoch] = self.windows.window
        return self._names[epoch]

    def batches(self, epoch: int, trains: bool = False) -> Iterator[Any]:
        """Yield the batches of an epoch's window, to evaluate them or to train on them.

        Lightning, resuming, asks for those of an evaluation while it is training: windows that keep
        a place in what is trained are told which it is.
        """
        if self.name(epoch) is not None:
            self.windows.set_epoch(epoch)
            begin: Any = getattr(self.windows, "begin_training", None) if trains else None
            if begin is not None:
                begin()
            yield from self.windows


def follow_windows(trainer: Trainer, windows: Windows) -> WindowOrder:
    """Let hooks know the windows of a Trainer's run; return their order."""
    order = vars(trainer).get(_KEY)
    if not isinstance(order, WindowOrder) or order.windows is not windows:
        order = vars(trainer)[_KEY] = WindowOrder(windows)
    return order


def current_window(trainer: Trainer) -> str | None:
    """Return the name of the window that a Trainer trains; None if its data has no windows."""
    order = vars(trainer).get(_KEY)
    return order.name(trainer.current_epoch) if isinstance(order, WindowOrder) else None
