"""Tables that have gradients on any rank: a bit for each, in a head or beside gradients.

As many as a head has room for travel in it. Of more tables the head has a digest: where it is the
same on all ranks, as a rule, so are the tables. Else the bits travel with the gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recis_lightning.distributed.digest import digest
from recis_lightning.distributed.joined_messages import Message, exchange_messages
from recis_lightning.distributed.process_group import ProcessGroup, message_device, world_size
from recis_lightning.lookup.gradient_ledger import BITS, split_bits, stack_bits


class TableBits:
    """Bits of one exchange of gradients.

    Args:
        waiting: For each table whether this rank has a gradient.
        size: Numbers that a head has for them.
        process_group: The ranks; None means all.
    """

    def __init__(
        self, waiting: Sequence[bool], size: int, process_group: ProcessGroup | None
    ) -> None:
        self._waiting, self._size, self._process_group = list(waiting), size, process_group
        self._fits = len(waiting) <= BITS * size

    def numbers(self) -> Any:
        """Return what the head has, int64 [size]."""
        if self._fits:
            return stack_bits(self._waiting, size=self._size)
        return np.append(digest(self._waiting), np.zeros(self._size - 1, np.int64))

    def of_any(self, received: Any) -> list[bool] | None:
        """Return for each table whether any rank has a gradient; None if the bits must travel.

        Args:
            received: int64 [num_ranks, size], of the heads.
        """
        if self._fits:
            joined = np.bitwise_or.reduce(received, 0, keepdims=True)
            found: list[bool] = split_bits(joined, 1, len(self._waiting)).ravel().tolist()
            return found
        return self._waiting if (received == received[0]).all() else None

    def message(self, device: torch.device | None = None) -> Message:
        """Return the bits as a part of a message to all ranks.

        Args:
            device: Of the other parts; None means that of messages alone.
        """
        num_ranks = world_size(self._process_group)
        packed = np.packbits(np.array(self._waiting, bool))
        sent = torch.from_numpy(np.tile(packed, num_ranks))
        sizes = [len(packed)] * num_ranks
        return Message(sent.to(device or message_device(self._process_group)), sizes, sizes)

    def read(self, received: Tensor) -> list[bool]:
        """Return for each table whether any rank has a gradient, from what has come."""
        lines = received.cpu().numpy().reshape(world_size(self._process_group), -1)
        joined = np.bitwise_or.reduce(lines, 0)
        found: list[bool] = np.unpackbits(joined, count=len(self._waiting)).astype(bool).tolist()
        return found

    def ask(self, doing: Callable[[], str]) -> list[bool]:
        """Send the bits alone, where no gradients travel; return as ``read``."""
        (received,) = exchange_messages([self.message()], doing, self._process_group)
        return self.read(received)


__all__ = ["TableBits"]
