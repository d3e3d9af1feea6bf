"""Messages of several parts: what goes to one rank travels together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from recis_lightning.distributed import collectives
from recis_lightning.distributed.process_group import ProcessGroup

Sizes = npt.NDArray[np.int64]  # [num_ranks, num_parts]


class Message(NamedTuple):
    """Part of what goes to all ranks.

    Attributes:
        tensor: [n, ...], contiguous: first what goes to rank 0, then what goes to rank 1, ...
        output_splits: How many items come from each rank.
        input_splits: How many go to each rank.
    """

    tensor: Tensor
    output_splits: list[int]
    input_splits: list[int]

    @property
    def item_bytes(self) -> int:
        """Bytes of an item."""
        shape = self.tensor.shape[1:]
        return shape.numel() * self.tensor.element_size()


def exchange_messages(
    messages: Sequence[Message],
    doing: Callable[[], str],
    process_group: ProcessGroup | None = None,
) -> list[Tensor]:
    """Send messages to all ranks, those on one device in one all-to-all.

    Args:
        messages: At least one; as many on all ranks, with the same dtypes and shapes of items.
        doing: Returns what this rank does, for errors.
        process_group: The ranks; None means all.

    Returns:
        For each message what has come, [sum(output_splits), ...] by rank.

    Raises:
        RuntimeError: A rank has gone; names it.
    """
    received: list[Tensor] = [message.tensor for message in messages]
    devices = [message.tensor.device for message in messages]
    for device in dict.fromkeys(devices):
        numbers = [number for number, its in enumerate(devices) if its == device]
        some = [messages[number] for number in numbers]
        for number, answer in zip(numbers, _exchange(some, doing, process_group), strict=True):
            received[number] = answer
    return received


def _exchange(
    messages: Sequence[Message], doing: Callable[[], str], process_group: ProcessGroup | None
) -> list[Tensor]:
    """Send messages on one device: alone as it is, or several as their bytes."""
    if len(messages) == 1:
        return [collectives.all_to_all(*messages[0], doing, process_group)]
    item_bytes = np.array([message.item_bytes for message in messages], np.int64)
    sent = np.array([message.input_splits for message in messages], np.int64).T * item_bytes
    come = np.array([message.output_splits for message in messages], np.int64).T * item_bytes
    parts = [_bytes_of(message.tensor) for message in messages]
    splits = come.sum(1).tolist(), sent.sum(1).tolist()
    answer = collectives.all_to_all(by_rank(parts, sent), *splits, doing, process_group)
    return [
        part.view(message.tensor.dtype).view(-1, *message.tensor.shape[1:])
        if part.numel()
        else message.tensor.new_empty(0, *message.tensor.shape[1:])
        for part, message in zip(by_part(answer, come), messages, strict=True)
    ]


def _bytes_of(tensor: Tensor) -> Tensor:
    """Return a view of a contiguous tensor, uint8 [num_bytes]."""
    flat = tensor.view(-1)
    return flat.as_strided(flat.shape, (1,)).view(torch.uint8)  # that of one element may be 0


def by_rank(parts: Sequence[Tensor], sizes: Sizes) -> Tensor:
    """Return parts as one message: for each rank its share of each part, one after the other.

    Args:
        parts: [n_i] each, by rank; one or more.
        sizes: int64 [num_ranks, num_parts], elements of each share.

    Example:
        >>> by_rank([torch.tensor([1, 2, 3]), torch.tensor([7, 8])], np.array([[1, 2], [2, 0]]))
        tensor([1, 7, 8, 2, 3])
    """
    if len(parts) == 1:
        return parts[0]
    ends = np.cumsum(sizes, 0)
    shares = [
        part[end - size : end]
        for line, lasts in zip(sizes.tolist(), ends.tolist(), strict=True)
        for part, size, end in zip(parts, line, lasts, strict=True)
        if size
    ]
    return torch.cat(shares) if shares else parts[0][:0]


def by_part(answer: Tensor, sizes: Sizes) -> list[Tensor]:
    """Return what came for each part, by rank, in memory of its own.

    Args:
        answer: As ``by_rank`` made it on the other ranks.
        sizes: int64 [num_ranks, num_parts], elements of each share.

    Example:
        >>> by_part(torch.tensor([1, 7, 8, 2, 3]), np.array([[1, 2], [2, 0]]))
        [tensor([1, 2, 3]), tensor([7, 8])]
    """
    num_parts = sizes.shape[1]
    shares = answer.split(sizes.reshape(-1).tolist())
    return [torch.cat(shares[number::num_parts]) for number in range(num_parts)]


__all__ = ["Message", "by_part", "by_rank", "exchange_messages"]
