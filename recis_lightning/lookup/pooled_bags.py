"""Bags of features, split by the rank that owns each id.

A bag becomes one *part* for each rank that owns any of its ids. The rank adds the part's rows up
and returns one row for it. Here a feature's output is the sum of its parts' rows, over the number
of its ids for a mean; and the gradient of a part is that of its bag, over the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from recis_lightning.distributed.joined_messages import by_rank
from recis_lightning.distributed.ownership import owner_of
from recis_lightning.jagged import FeatureBags
from recis_lightning.lookup.features import FeatureLayout
from recis_lightning.ops import layout as fields
from recis_lightning.ops.embedding_bag import Plan

Counts = npt.NDArray[np.int64]  # [num_ranks, num_sources]


class SplitBags(NamedTuple):
    """Bags of a lookup, split into parts.

    Attributes:
        num_ids: How many ids of each source each rank owns.
        num_parts: How many parts of each source it adds up.
        message: int64 [m]: for each rank the sizes of its parts, by source, then bag; then its ids,
            in the same order.
        parts: int64 [p], for each part, by bag, then owner, its position among all rows that come
            back.
        bounds: int64 [num_bags + num_features], for each feature where the parts of its bags start,
            and their number.
        weights: float32 [p], by which each part of ``parts`` counts.
        sizes: Number of parts of each feature.
    """

    num_ids: Counts
    num_parts: Counts
    message: Tensor
    parts: Tensor
    bounds: Tensor
    weights: Tensor
    sizes: npt.NDArray[np.int64]

    def enter(self, plan: Plan) -> None:
        """Have a plan add up the parts' rows for each feature's bags; HEADER and DATA stay."""
        first = np.cumsum(self.sizes) - self.sizes
        lengths = plan[:, fields.PLAN_NUM_BAGS] + 1
        plan[:, fields.PLAN_MODE], plan[:, fields.PLAN_BAG_LENGTH] = fields.SUM, -1
        plan[:, fields.PLAN_FIRST_ID], plan[:, fields.PLAN_NUM_IDS] = first, self.sizes
        plan[:, fields.PLAN_ROWS] = self.parts.data_ptr() + 8 * first
        plan[:, fields.PLAN_WEIGHTS] = self.weights.data_ptr() + 4 * first
        offsets = self.bounds.data_ptr() + 8 * (np.cumsum(lengths) - lengths)
        plan[:, fields.PLAN_OFFSETS] = offsets


def split_bags(layout: FeatureLayout, bags: FeatureBags, num_ranks: int) -> SplitBags:
    """Split the bags of features by the owners of their ids; padding belongs to nobody.

    Args:
        layout: Of the features, which are pooled.
        bags: One for each, with ids in int64 and no weights.
        num_ranks: How many ranks own ids.
    """
    device, num_sources = layout.device, len(layout.sources)
    num_bags = [bag.num_bags for bag in bags]
    first_bags = np.cumsum(num_bags) - np.array(num_bags)
    total, sources = sum(num_bags), list[Tensor]()
    ids, of_bags = list[Tensor](), list[Tensor]()
    for number, (feature, bag) in enumerate(zip(layout.features, bags, strict=True)):
        of_bag, its_ids = bag.positions()[0] + int(first_bags[number]), bag.ids
        if feature.padding_idx is not None:
            is_id = its_ids != feature.padding_idx
            its_ids, of_bag = its_ids[is_id], of_bag[is_id]
        ids.append(its_ids)
        of_bags.append(of_bag)
        sources.append(torch.full_like(its_ids, layout.segment_sources[number]))
    joined, of_bag = torch.cat(ids), torch.cat(of_bags)
    place = owner_of(joined, num_ranks) * num_sources + torch.cat(sources)
    keys, order = torch.sort(place * max(total, 1) + of_bag, stable=True)
    part_keys, part_sizes = torch.unique_consecutive(keys, return_counts=True)
    num_places = num_ranks * num_sources
    part_places, part_bags = part_keys // max(total, 1), part_keys % max(total, 1)
    num_ids = torch.bincount(place, minlength=num_places).cpu().numpy()
    num_parts = torch.bincount(part_places, minlength=num_places).cpu().numpy()
    num_ids, num_parts = (part.reshape(num_ranks, -1) for part in (num_ids, num_parts))
    sizes = np.stack([num_parts.sum(1), num_ids.sum(1)], 1)
    sorted_bags, parts = torch.sort(part_bags, stable=True)
    per_bag = torch.bincount(sorted_bags, minlength=total)
    weights = _weights(layout, torch.bincount(of_bag, minlength=total), num_bags)[sorted_bags]
    bounds, num_parts_of = _bounds(per_bag, num_bags, device)
    message = by_rank([part_sizes, joined[order]], sizes)
    return SplitBags(num_ids, num_parts, message, parts, bounds, weights, num_parts_of)


def _weights(layout: FeatureLayout, num_ids: Tensor, num_bags: Sequence[int]) -> Tensor:
    """Return for each bag by what its sum is multiplied, float32 [num_bags]."""
    is_mean = [feature.mode != "sum" for feature in layout.features]
    divides = torch.from_numpy(np.repeat(is_mean, num_bags)).to(num_ids.device)
    return torch.where(divides, 1.0 / num_ids.clamp(min=1).float(), 1.0)


def _bounds(
    per_bag: Tensor, num_bags: Sequence[int], device: torch.device
) -> tuple[Tensor, npt.NDArray[np.int64]]:
    """Return where the parts of each feature's bags start, and how many each feature has."""
    ends = torch.cat([per_bag.new_zeros(1), per_bag.cumsum(0)])
    firsts = np.cumsum(num_bags) - np.array(num_bags)
    features = zip(firsts.tolist(), num_bags, strict=True)
    bounds = torch.cat([ends[first : first + n + 1] - ends[first] for first, n in features])
    lasts = torch.from_numpy(np.cumsum(np.array(num_bags) + 1) - 1).to(device)
    return bounds, bounds[lasts].cpu().numpy()


__all__ = ["SplitBags", "split_bags"]
