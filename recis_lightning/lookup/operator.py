"""Operator ``recis_lightning::look_up``: an evaluation lookup in a recorded program.

``torch.export`` and ``torch.compile`` cannot follow a lookup, whose kernels read memory by its
address. So in their programs it is one operator, whatever the number of features: tensors go in and
out, and the tables are given by their names. It only reads, as evaluation does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from recis_lightning.jagged import Bags, FeatureBags, Jagged, read_bags
from recis_lightning.lookup.current_groups import CurrentGroups
from recis_lightning.lookup.features import Feature
from recis_lightning.lookup.group import look_up_groups
from recis_lightning.lookup.named_tables import find_table
from recis_lightning.table.hash_table import HashTable

NAME = "recis_lightning::look_up"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# A feature is an entry of each list from ``tables`` on. ``offsets`` and ``weights`` have an entry
# for each feature that is_ragged or is_weighted; one that is not read, if none is. Padding is a
# decimal number, or empty for none.
_SCHEMA = (
    "(Tensor[] ids, Tensor[] offsets, Tensor[] weights, str[] tables, int[] embedding_dims, "
    "str[] dtypes, str[] modes, int[] tile_lens, str[] padding, bool[] is_ragged, "
    "bool[] is_weighted) -> Tensor[]"
)


class RecordedFeature(NamedTuple):
    """Feature of a recorded lookup.

    Attributes:
        ids: int64 [n], or [B, L] where bags have one length.
        offsets: int64 [B + 1] or None.
        weights: float32, shaped as ``ids``, or None.
        table: Key of its table.
        embedding_dim: Weights in a row.
        dtype: Of the output, by name.
        mode: As for ``lookup.features.Feature``.
        tile_len: Rows of a bag for "tile", else 0.
        padding_idx: An id that reads as zeros, or None.
    """

    ids: Tensor
    offsets: Tensor | None
    weights: Tensor | None
    table: str
    embedding_dim: int
    dtype: str
    mode: str
    tile_len: int
    padding_idx: int | None

    def output_shape(self) -> tuple[int, int]:
        """Return the shape of its output."""
        num_bags = self.ids.shape[0] if self.offsets is None else self.offsets.shape[0] - 1
        if self.mode == "none":
            return self.ids.shape[0], self.embedding_dim
        return num_bags, self.embedding_dim * max(self.tile_len, 1)

    def value(self) -> Tensor | Jagged | tuple[Tensor, Tensor]:
        """Return it as lookups take features."""
        if self.offsets is not None:
            return Jagged(self.ids, self.offsets, self.weights)
        return self.ids if self.weights is None else (self.ids, self.weights)


def features_of(
    ids: Sequence[Tensor],
    offsets: Sequence[Tensor],
    weights: Sequence[Tensor],
    tables: Sequence[str],
    embedding_dims: Sequence[int],
    dtypes: Sequence[str],
    modes: Sequence[str],
    tile_lens: Sequence[int],
    padding: Sequence[str],
    is_ragged: Sequence[bool],
    is_weighted: Sequence[bool],
) -> list[RecordedFeature]:
    """Return the features that the operator's arguments describe."""
    ragged, weighted = iter(offsets), iter(weights)
    return [
        RecordedFeature(
            ids[i],
            next(ragged) if is_ragged[i] else None,
            next(weighted) if is_weighted[i] else None,
            table,
            embedding_dims[i],
            dtypes[i],
            modes[i],
            tile_lens[i],
            int(padding[i]) if padding[i] else None,
        )
        for i, table in enumerate(tables)
    ]


def record(features: list[RecordedFeature]) -> list[Tensor]:
    """Look features up by the operator, of which the program that is recorded has one call."""
    # AOTInductor's runtime takes no empty list. Entries beyond the flags are not read.
    unread = [features[0].ids]
    return torch.ops.recis_lightning.look_up(  # type: ignore[no-any-return]
        [feature.ids for feature in features],
        [feature.offsets for feature in features if feature.offsets is not None] or unread,
        [feature.weights for feature in features if feature.weights is not None] or unread,
        [feature.table for feature in features],
        [feature.embedding_dim for feature in features],
        [feature.dtype for feature in features],
        [feature.mode for feature in features],
        [feature.tile_len for feature in features],
        ["" if feature.padding_idx is None else str(feature.padding_idx) for feature in features],
        [feature.offsets is not None for feature in features],
        [feature.weights is not None for feature in features],
    )


@torch.library.custom_op(NAME, mutates_args=(), schema=_SCHEMA)
def _look_up(  # type: ignore[no-untyped-def]
    ids, offsets, weights, tables, embedding_dims, dtypes, modes, tile_lens, padding,
    is_ragged, is_weighted,
):  # fmt: skip
    features = features_of(
        *(ids, offsets, weights, tables, embedding_dims, dtypes, modes, tile_lens, padding),
        *(is_ragged, is_weighted),
    )
    return run(features)


@_look_up.register_fake
def _allocate(  # type: ignore[no-untyped-def]
    ids, offsets, weights, tables, embedding_dims, dtypes, modes, tile_lens, padding,
    is_ragged, is_weighted,
):  # fmt: skip
    features = features_of(
        *(ids, offsets, weights, tables, embedding_dims, dtypes, modes, tile_lens, padding),
        *(is_ragged, is_weighted),
    )
    return [
        feature.ids.new_empty(feature.output_shape(), dtype=DTYPES[feature.dtype])
        for feature in features
    ]


def run(features: Sequence[RecordedFeature]) -> list[Tensor]:
    """Look features up in the tables that they name.

    Raises:
        RuntimeError: A name stands for no table, or its table has other rows than the program
            was recorded for.
    """
    found = [find_table(feature.table) for feature in features]
    outputs: dict[int, Tensor] = {}
    local = []
    for i, (feature, table) in enumerate(zip(features, found, strict=True)):
        if (table.embedding_dim, table.dtype) != (feature.embedding_dim, DTYPES[feature.dtype]):
            raise RuntimeError(
                f"table {feature.table!r}: the program was recorded for rows of "
                f"{feature.embedding_dim} x {feature.dtype}, and those of its table are "
                f"{table.embedding_dim} x {str(table.dtype).removeprefix('torch.')}"
            )
        if isinstance(table, HashTable):
            local.append((i, feature, table))
        else:
            outputs[i] = table.look_up(
                *(feature.ids, feature.offsets, feature.weights, feature.mode),
                *(feature.tile_len, feature.padding_idx),
            )
    if local:
        outputs.update(_look_up_tables(local))
    return [outputs[i] for i in range(len(features))]


def _look_up_tables(
    asked: Sequence[tuple[int, RecordedFeature, HashTable]],
) -> dict[int, Tensor]:
    """Return the output of each feature, by its position; one pass a group, as in an engine."""
    settings = [
        Feature(str(i), table, feature.mode, feature.padding_idx, feature.tile_len)
        for i, feature, table in asked
    ]
    # The first table keeps the groups, as it keeps those of its own calls: they go with it.
    first = asked[0][2]
    if not isinstance(first.groups, CurrentGroups):
        first.groups = CurrentGroups()
    groups = first.groups.recorded(tuple(settings)).of(lambda: settings)
    bags: dict[str, Bags] = {
        str(i): read_bags(feature.value(), feature.table) for i, feature, _ in asked
    }
    parts = [FeatureBags.of([bags[name] for name in group.layout.names]) for group in groups]
    found = look_up_groups(groups, parts, training=False)
    # Copies: an operator's outputs must not share memory, as those of a lookup do.
    return {
        int(name): rows.detach().clone()
        for group, outputs in zip(groups, found, strict=True)
        for name, rows in zip(group.layout.names, outputs, strict=True)
    }


__all__ = ["NAME", "RecordedFeature", "features_of", "record", "run"]
