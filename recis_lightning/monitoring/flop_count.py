"""``FlopCount``: floating-point operations of what runs between two calls."""

from __future__ import annotations

from typing import Any, final

__all__ = ["FlopCount"]


@final
class FlopCount:
    """Count by torch's ``FlopCounterMode``: products of matrices, convolutions and attention.

    Forward and backward passes count, on every thread of autograd; kernels of tables have no such
    products, and what ``torch.compile`` has compiled is not seen. To count slows what runs, and
    changes no result.

    Example:
        >>> import torch
        >>> count = FlopCount()
        >>> count.start()
        >>> _ = torch.ones(2, 3) @ torch.ones(3, 4)
        >>> count.stop()
        48
    """

    def __init__(self) -> None:
        self._mode: Any = None

    def start(self) -> None:
        """Begin to count."""
        from torch.utils.flop_counter import FlopCounterMode  # its import takes a while

        self._mode = FlopCounterMode(display=False)
        self._mode.__enter__()

    def stop(self) -> int | None:
        """Return the operations since ``start``; None if it does not count."""
        if self._mode is None:
            return None
        mode, self._mode = self._mode, None
        mode.__exit__(None, None, None)
        return int(mode.get_total_flops())
