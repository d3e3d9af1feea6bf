"""``SharedEpoch``: an epoch that worker processes learn from their parent while they live."""

from __future__ import annotations

from multiprocessing.context import get_spawning_popen

import torch

__all__ = ["SharedEpoch"]


class SharedEpoch:
    """Epoch that a parent sets, seen by the workers that have a copy of this.

    ``DataLoader(persistent_workers=True)`` starts workers once; what is set later is in shared
    memory.

    Example:
        >>> shared = SharedEpoch()
        >>> shared.tell(3)
        >>> shared.news()  # by who told, none
    """

    def __init__(self) -> None:
        # Epoch, how often it was set, how often a place was loaded. Lightning makes loaders in
        # inference mode, whose tensors nobody may write to later.
        with torch.inference_mode(False):
            self._numbers = torch.zeros(3, dtype=torch.int64, device="cpu").share_memory_()
        self._num_set = self._num_loaded = 0

    def tell(self, epoch: int) -> None:
        """Set the epoch."""
        self._numbers[0] = epoch
        self._num_set += 1
        self._numbers[1] = self._num_set

    def tell_loaded(self) -> None:
        """Say that a place was loaded, which workers that are there do not know."""
        self._num_loaded += 1
        self._numbers[2] = self._num_loaded

    def news(self) -> int | None:
        """Return the epoch, if it was set since this was copied or asked last; else None.

        Raises:
            RuntimeError: A place was loaded since this was copied.
        """
        epoch, num_set, num_loaded = self._numbers.tolist()
        if num_loaded != self._num_loaded:
            raise RuntimeError(
                "load_state_dict: worker processes that were there before cannot go on from the "
                "place; make a new DataLoader, or set persistent_workers=False"
            )
        if num_set == self._num_set:
            return None
        self._num_set = num_set
        return int(epoch)

    def of_copy(self) -> SharedEpoch:
        """Return what a copy of its owner has: this, in a worker that is spawned, else another."""
        return SharedEpoch() if get_spawning_popen() is None else self
