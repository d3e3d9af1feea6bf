"""Batches without samples: what a rank trains on whose data has ended before that of others."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from recis_lightning.jagged import Jagged
from recis_lightning.nested_jagged import NestedJagged

__all__ = ["without_samples"]


def without_samples(batch: Any) -> Any:
    """Return a batch of the same form, dtypes and devices with no samples.

    Args:
        batch: Tensors whose first dimension counts samples, ``Jagged``, and dicts, tuples, lists
            and dataclasses of such; a list of str or numbers counts samples too. Tensors of no
            dimension and other values stay as they are.

    Raises:
        TypeError: It has a NestedTensor, of which there is none without samples; use ``Jagged``.

    Example:
        >>> import torch
        >>> tags = Jagged(torch.tensor([5, 6, 7]), torch.tensor([0, 1, 3]))
        >>> empty = without_samples({"user": torch.ones(2, 4), "tags": tags, "names": ["a", "b"]})
        >>> empty["user"].shape, empty["tags"].offsets, empty["names"]
        (torch.Size([0, 4]), tensor([0]), [])
    """
    if isinstance(batch, Tensor):
        if batch.is_nested:
            raise TypeError(
                "on_uneven='pad': expected batches of tensors and Jagged, got a NestedTensor, of "
                "which there is none without samples; use Jagged, or on_uneven='stop'"
            )
        return batch[:0].clone() if batch.dim() else batch
    if isinstance(batch, Jagged | NestedJagged):
        return batch.select(slice(0, 0))
    if isinstance(batch, Mapping):
        parts = {key: without_samples(value) for key, value in batch.items()}
        return parts if type(batch) is dict else type(batch)(parts)  # type: ignore[call-arg]
    if isinstance(batch, list | tuple):
        if isinstance(batch, list) and all(isinstance(v, str | bytes | int | float) for v in batch):
            return []
        parts_of = [without_samples(value) for value in batch]
        return type(batch)(*parts_of) if hasattr(batch, "_fields") else type(batch)(parts_of)
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        fields = {
            f.name: without_samples(getattr(batch, f.name)) for f in dataclasses.fields(batch)
        }
        return dataclasses.replace(batch, **fields)
    return batch
