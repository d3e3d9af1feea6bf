"""``NestedJagged``: ragged features of two levels, such as a sequence of bags for each sample."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree

from recis_lightning.arguments import check_ids
from recis_lightning.jagged import Jagged

__all__ = ["NestedJagged", "check_outer"]


class NestedJagged(NamedTuple):
    """Ragged values of two levels: sample b holds bags ``outer_offsets[b]`` to ``[b + 1]``.

    Bag m holds ``values[offsets[m]:offsets[m + 1]]``. Pooling lookups pool each bag, and give a
    ``Jagged`` of B sequences of vectors. A plain tuple of tensors, as ``Jagged`` is.

    Attributes:
        values: [N, ...].
        offsets: int64 [M + 1], from 0 to N.
        outer_offsets: int64 [B + 1], from 0 to M.
        weights: float32 [N], or None.

    Example:
        Two samples: of the bags 4, 5 and none, and of the bag 6.

        >>> ids = NestedJagged.from_lengths(
        ...     torch.tensor([4, 5, 6]), torch.tensor([2, 0, 1]), torch.tensor([2, 1])
        ... )
        >>> ids.offsets, ids.outer_offsets
        (tensor([0, 2, 2, 3]), tensor([0, 2, 3]))
    """

    values: Tensor
    offsets: Tensor
    outer_offsets: Tensor
    weights: Tensor | None = None

    @classmethod
    def from_lengths(
        cls,
        values: Tensor,
        lengths: Tensor,
        outer_lengths: Tensor,
        weights: Tensor | None = None,
    ) -> NestedJagged:
        """Make one of the number of values of each bag, and of bags of each sample.

        Args:
            values: [N, ...].
            lengths: int64 or int32 [M], none negative; they add up to N.
            outer_lengths: int64 or int32 [B], none negative; they add up to M.
            weights: float32 [N], or None.

        Raises:
            TypeError, ValueError: As of ``Jagged.from_lengths``.
        """
        inner = Jagged.from_lengths(values, lengths, weights)
        try:
            outer = Jagged.from_lengths(lengths, outer_lengths)
        except (TypeError, ValueError) as error:
            raise type(error)(f"outer_{error}") from error
        return cls(values, inner.offsets, outer.offsets, weights)

    @property
    def num_bags(self) -> int:
        """Number of samples, B."""
        return self.outer_offsets.numel() - 1

    def lengths(self) -> Tensor:
        """Return the number of bags of each sample, int64 [B]."""
        return self.outer_offsets.diff()

    def inner(self) -> Jagged:
        """Return the M bags of all samples."""
        return Jagged(self.values, self.offsets, self.weights)

    def select(self, samples: Tensor | slice) -> NestedJagged:
        """Return a copy of some samples, in their order.

        Args:
            samples: As of ``Jagged.select``.

        Raises:
            TypeError, ValueError: As of ``Jagged.select``.

        Example:
            >>> ids = NestedJagged.from_lengths(
            ...     torch.tensor([4, 5, 6]), torch.tensor([2, 0, 1]), torch.tensor([2, 1])
            ... )
            >>> ids.select(torch.tensor([1, 0]))[:3]
            (tensor([6, 4, 5]), tensor([0, 1, 3, 3]), tensor([0, 1, 3]))
        """
        bags = torch.arange(self.offsets.numel() - 1, device=self.offsets.device)
        chosen = Jagged(bags, self.outer_offsets).select(samples)
        values, offsets, weights = self.inner().select(chosen.values)
        return NestedJagged(values, offsets, chosen.offsets.clone(), weights)

    def to_padded(
        self, max_bags: int | None = None, max_len: int | None = None, value: float = 0
    ) -> tuple[Tensor, Tensor]:
        """Return the values as a dense tensor, and which of its places hold one.

        Args:
            max_bags: Bags S of a sample, the first ones; None takes the most there are.
            max_len: Values L of a bag, the first ones; None takes the most there are.
            value: Fills the other places.

        Returns:
            Values [B, S, L, ...] and bool [B, S, L].

        Raises:
            TypeError, ValueError: A length is not None or an int of at least 0.

        Example:
            >>> ids = NestedJagged.from_lengths(
            ...     torch.tensor([4, 5, 6]), torch.tensor([2, 0, 1]), torch.tensor([2, 1])
            ... )
            >>> ids.to_padded(value=-1)[0].tolist()
            [[[4, 5], [-1, -1]], [[6, -1], [-1, -1]]]
        """
        values, mask = self.inner().to_padded(max_len, value)
        padded, _ = Jagged(values, self.outer_offsets).to_padded(max_bags, value)
        return padded, Jagged(mask, self.outer_offsets).to_padded(max_bags)[0]

    def to(
        self, device: torch.device | str | int, non_blocking: bool | None = None
    ) -> NestedJagged:
        """Return it on another device; arguments as of ``Jagged.to``."""
        values, offsets, weights = self.inner().to(device, non_blocking)
        outer, _, _ = Jagged(self.outer_offsets, self.outer_offsets).to(device, non_blocking)
        return NestedJagged(values, offsets, outer, weights)

    def pin_memory(self) -> NestedJagged:
        """Return it in memory from which copies to a GPU need not wait; needs a GPU."""
        values, offsets, weights = self.inner().pin_memory()
        return NestedJagged(values, offsets, self.outer_offsets.pin_memory(), weights)


# By this name programs of torch.export that take one are saved.
_pytree._register_namedtuple(NestedJagged, serialized_type_name="recis_lightning.NestedJagged")


def check_outer(feature: NestedJagged, name: str) -> Tensor:
    """Return a feature's ``outer_offsets`` as int64, if they fit its bags.

    Raises:
        TypeError, ValueError: They do not, as far as the host can see without waiting.
    """
    outer = check_ids(feature.outer_offsets, f"{name}.outer_offsets")
    if outer.dim() != 1 or not outer.numel():
        raise ValueError(f"{name}.outer_offsets: expected shape [B + 1], got {tuple(outer.shape)}")
    num_bags = feature.offsets.numel() - 1
    if outer.device.type == "cpu":
        first, last = int(outer[0]), int(outer[-1])
        if first or last != num_bags or bool((outer.diff() < 0).any()):
            raise ValueError(
                f"{name}.outer_offsets: expected ascending numbers from 0 to {num_bags}, the "
                f"number of bags, got {outer[:8].tolist()} ... up to {last}"
            )
    return outer
