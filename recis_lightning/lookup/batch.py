"""A batch on its way through a group: what belongs to one lookup alone.

Layouts are shared by threads and calls, so they hold nothing that a lookup writes. What an update
reads later is copied here, and so is what must not change between its check and its use.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from recis_lightning.jagged import Bags, FeatureBags
from recis_lightning.ops import layout as fields
from recis_lightning.ops.embedding_bag import Plan
from recis_lightning.ops.hash_index import Segments
from recis_lightning.ops.layout import SEGMENT_IDS, SEGMENT_START


class SizedLines(NamedTuple):
    """Segments and plan of batches of some sizes, without addresses; never written again.

    Attributes:
        sizes: n of each feature.
        shapes: (B, bag length) of each, where any feature is not plain.
        num_ids: Number of all ids.
        plan: int64 [num_features, PLAN_SIZE].
        training: Segments that insert, without sizes.
        evaluation: Segments that only read, without sizes.
        num_bags: Size of each output.
        starts: Where each feature's ids start if all lie one after the other.
        ragged: Features with offsets.
        pooled: Those of them whose outputs are bags.
        offset_starts: Where each ragged feature's offsets start if all lie one after the other.
        offset_lasts: Where the last of each one's lies.
        ragged_sizes: n of each ragged feature.
        kept: What is kept for lookups of these sizes, and for their updates; most of it by a
            backend.
    """

    sizes: Sequence[int]
    shapes: Sequence[tuple[int, int]]
    num_ids: int
    plan: Plan
    training: Segments
    evaluation: Segments
    num_bags: list[int]
    starts: npt.NDArray[np.int64]
    ragged: list[int]
    pooled: list[int]
    offset_starts: npt.NDArray[np.int64]
    offset_lasts: npt.NDArray[np.int64]
    ragged_sizes: npt.NDArray[np.int64]
    kept: dict[str, Any]

    def resized(self, sizes: Sequence[int], has_row_per_id: npt.NDArray[np.bool_]) -> SizedLines:
        """Return the lines of a batch whose bags have other sizes.

        Args:
            sizes: n of each feature.
            has_row_per_id: bool [num_features], whether its ids are not pooled.
        """
        num_ids = np.array(sizes, np.int64)
        starts = np.cumsum(num_ids) - num_ids
        plan, num_bags = self.plan.copy(), self.num_bags
        plan[:, fields.PLAN_FIRST_ID], plan[:, fields.PLAN_NUM_IDS] = starts, num_ids
        if not num_bags or len(self.pooled) < len(self.ragged):
            plan[has_row_per_id, fields.PLAN_NUM_BAGS] = num_ids[has_row_per_id]
            num_bags = plan[:, fields.PLAN_NUM_BAGS].tolist()
        plan.flags.writeable = False
        return self._replace(
            sizes=sizes,
            num_ids=int(num_ids.sum()),
            plan=plan,
            num_bags=num_bags,
            starts=starts,
            ragged_sizes=num_ids[self.ragged],
            kept={},
        )

    def segments(self, ids: Sequence[Tensor], training: bool) -> Segments:
        """Return segments for one lookup of ``ids``, which the caller keeps alive."""
        name = "training segments" if training else "evaluation segments"
        sized = self.kept.get(name)
        if sized is None:
            sized = self.kept[name] = (self.training if training else self.evaluation).copy()
            sized[:, SEGMENT_START] = self.starts
            sized[:, SEGMENT_IDS] = -8 * self.starts  # kernels count from the lookup's first id
            sized.flags.writeable = False
        segments: Segments = sized.copy()
        addresses = segments[:, SEGMENT_IDS]
        addresses += list(map(Tensor.data_ptr, ids))
        return segments

    def point_to_rows(self, plan: Plan, rows: Tensor) -> None:
        """Point each line of a plan to the rows of its ids, int64 [num_ids]."""
        plan[:, fields.PLAN_ROWS] = 8 * self.starts + rows.data_ptr()


class Batch(NamedTuple):
    """Bags of a lookup that were checked.

    Attributes:
        bags: One for each feature, on the group's device.
        lines: Segments and plan for their sizes.
        offsets: Copy of all ragged features' offsets, one after the other; None where the caller's
            are used, or there are none.
        weighted: Features with weights.
        weights: Copy of these features' weights, float32, one after the other; None as above.
        came_from: Device of the bags as the caller gave them.
        occurrences: int64 [num_ids], how many occurrences each id stands for; None means 1.
    """

    bags: FeatureBags
    lines: SizedLines
    offsets: Tensor | None
    weighted: list[int]
    weights: Tensor | None
    came_from: torch.device
    occurrences: Tensor | None = None

    def enter_arguments(self, plan: Plan) -> None:
        """Enter the addresses of offsets and weights."""
        lines, details = self.lines, self.bags.details
        if self.offsets is not None:
            # Those of features that are not pooled are not read.
            if len(lines.ragged) == 1:
                plan[lines.ragged[0], fields.PLAN_OFFSETS] = self.offsets.data_ptr()
            else:
                addresses = self.offsets.data_ptr() + 8 * lines.offset_starts
                plan[lines.ragged, fields.PLAN_OFFSETS] = addresses
        else:
            for feature in lines.pooled:
                offsets = details[feature].offsets
                assert offsets is not None
                plan[feature, fields.PLAN_OFFSETS] = offsets.data_ptr()
        if self.weights is not None:
            first = self.weights.data_ptr()
            for feature in self.weighted:
                plan[feature, fields.PLAN_WEIGHTS] = first
                first += 4 * self.bags.sizes[feature]
        else:
            for feature in self.weighted:
                weights = details[feature].weights
                assert weights is not None
                plan[feature, fields.PLAN_WEIGHTS] = weights.data_ptr()

    def buffers(self) -> list[Tensor]:
        """Return the tensors that a plan points into, rows and outputs apart."""
        return [copy for copy in (self.offsets, self.weights) if copy is not None]

    def bags_of(self, feature: int) -> Bags:
        """Return a feature's bags as they were looked up."""
        bags: Bags = self.bags[feature]
        if self.offsets is not None and bags.offsets is not None:
            first = int(self.lines.offset_starts[self.lines.ragged.index(feature)])
            bags = bags._replace(offsets=self.offsets[first : first + bags.num_bags + 1])
        if self.weights is not None and bags.weights is not None:
            before = self.weighted[: self.weighted.index(feature)]
            first = sum(self.bags.sizes[other] for other in before)
            size = self.bags.sizes[feature]
            bags = bags._replace(weights=self.weights[first : first + size])
        return bags


def join_offsets(bags: FeatureBags, lines: SizedLines) -> Tensor | None:
    """Return a copy of the offsets of all ragged features; None if there are none."""
    ragged = lines.ragged
    if not ragged:
        return None
    offsets: list[Any] = [bags.details[feature].offsets for feature in ragged]
    if len(offsets) > 1:
        return torch.cat(offsets)
    first: Tensor = offsets[0]
    return first if bags.details[ragged[0]].owns_offsets else first.clone()


@torch.no_grad()
def join_weights(bags: FeatureBags, weighted: list[int]) -> Tensor | None:
    """Return a copy of the weights of some features; None if there are none."""
    if not weighted:
        return None
    weights: list[Any] = [bags.details[feature].weights for feature in weighted]
    if len(weights) > 1:
        return torch.cat(weights)
    first: Tensor = weights[0]
    return first.clone()


def join_occurrences(bags: FeatureBags, given: dict[int, Tensor], device: torch.device) -> Tensor:
    """Return how many occurrences each id of all features stands for, int64 [num_ids]."""
    return torch.cat(
        [
            given[feature].to(device)
            if feature in given
            else torch.ones(size, dtype=torch.int64, device=device)
            for feature, size in enumerate(bags.sizes)
        ]
    )


def malformed_feature(offsets: Tensor, lines: SizedLines) -> int | None:
    """Return a feature whose offsets do not ascend from 0 to its number of ids; None if all do.

    Args:
        offsets: int64, on the CPU, as ``join_offsets`` returns them.
        lines: Of the batch.
    """
    values, count = offsets.numpy(), np.count_nonzero  # the fastest way to ask for any
    starts, lasts = lines.offset_starts, lines.offset_lasts
    descends = values[1:] < values[:-1]
    if len(starts) == 1:
        is_wrong = values[0] or values[-1] != lines.ragged_sizes[0] or count(descends)
        return lines.ragged[0] if is_wrong else None
    descends[lasts[:-1]] = False  # from one feature to the next
    wrong = (values[starts] != 0) | (values[lasts] != lines.ragged_sizes)
    if count(descends):
        wrong[np.searchsorted(lasts, int(descends.argmax()), side="left")] = True
    return lines.ragged[int(wrong.argmax())] if count(wrong) else None


__all__ = [
    "Batch",
    "SizedLines",
    "join_occurrences",
    "join_offsets",
    "join_weights",
    "malformed_feature",
]
