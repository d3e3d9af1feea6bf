"""Rows of a feature's distinct ids: each row once, and where its ids stand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from recis_lightning.jagged import Bags, FeatureBags


class UniqueRows(NamedTuple):
    """Output of mode "unique".

    ``rows[inverse]`` is what mode "none" returns, with the same gradient; a long sequence of few
    distinct ids takes only the memory of these.

    Attributes:
        rows: [u, embedding_dim], a row for each distinct id, ascending; zeros where mode "none"
            has zeros.
        inverse: int64, of the shape of the ids ([n] if they are ragged): position of each id's row.
        offsets: int64 [B + 1], where the bags start among all ids, and their number.

    Example:
        >>> from recis_lightning import DynamicEmbedding
        >>> item = DynamicEmbedding(4, mode="unique")
        >>> rows, inverse, offsets = item(torch.tensor([[7, 5, 7], [7, 7, 7]]))
        >>> rows.shape, inverse.tolist(), offsets.tolist()
        (torch.Size([2, 4]), [[1, 0, 1], [1, 1, 1]], [0, 3, 6])
    """

    rows: Tensor
    inverse: Tensor
    offsets: Tensor


def offsets_of(bags: Bags) -> Tensor:
    """Return where bags start among their ids, and the number of ids, int64 [B + 1]."""
    if bags.offsets is not None:
        return bags.offsets.clone()
    starts = torch.arange(bags.num_bags + 1, device=bags.ids.device)
    return starts * max(bags.bag_length, 0)


def deduplicate(
    bags: FeatureBags, features: Sequence[int], names: Sequence[str]
) -> tuple[FeatureBags, dict[int, Tensor]]:
    """Return bags in which some features have each of their ids once.

    Args:
        bags: Of several features.
        features: Positions of those with mode "unique".
        names: Of all features, for errors.

    Returns:
        The bags, with how often each id occurs, and position -> int64 [n], the inverse.

    Raises:
        ValueError: A feature has weights (names it).
    """
    details: list[Bags] = list(bags)
    inverses, occurrences = {}, {}
    for feature in features:
        if details[feature].weights is not None:
            raise ValueError(
                f"{names[feature]}: mode 'unique' returns a row once for all of its occurrences, "
                "so it takes no weights; multiply by them later, or set use_weights=False"
            )
        ids, inverses[feature], occurrences[feature] = details[feature].ids.unique(
            return_inverse=True, return_counts=True
        )
        details[feature] = Bags(ids, ids.numel(), 1, None, None, tuple(ids.shape))
    # Plain features keep the short way that they have together.
    is_plain = all(bag.offsets is None and bag.weights is None for bag in details) and all(
        bag.shape is not None and len(bag.shape) == 1 for bag in details
    )
    asked = FeatureBags([bag.ids for bag in details], () if is_plain else details)
    asked.occurrences = occurrences
    return asked, inverses


__all__ = ["UniqueRows", "deduplicate", "offsets_of"]
