"""``EmbeddingOption``: settings of a feature of an ``EmbeddingEngine``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from recis_lightning.admission import Admission
from recis_lightning.arguments import (
    HINTS,
    check_bool,
    check_dtype,
    check_embedding_dim,
    check_int,
    check_padding_idx,
    check_str,
    explain_arguments,
)
from recis_lightning.eviction import Eviction
from recis_lightning.initializers import DEFAULT_INITIALIZER, Initializer
from recis_lightning.table.hash_table import check_policies
from recis_lightning.table.row_file import check_rows

_MODES = ("none", "sum", "mean", "tile", "unique")


@explain_arguments(
    {
        **HINTS,
        "shared_name": "write table=",
        "name": "write table=",
        "combiner_kwargs": "write tile_len=",
        "use_weight": "write use_weights=",
    }
)
@dataclass(frozen=True)
class EmbeddingOption:
    """Settings of a feature: of its lookup, and of its table.

    They do not change; ``dataclasses.replace`` makes another option.

    Args:
        embedding_dim: Size of a row.
        table: Name of the table that has its rows; the feature's name by default. Options that
            name the same table share its rows, and must agree on dim, initializer, eviction,
            dtype, device, seed and rows. The rest belongs to the feature.
        mode: "none" (a row an id), "sum", "mean", "tile" (the first ``tile_len`` rows of a bag
            side by side, zero padded) or "unique" (``UniqueRows``: a row for each distinct id).
        initializer: Distribution of new rows.
        admission: Policy that says which unknown ids of this feature get a row; None admits all. Of
            features that share a table some may have a policy, others ``ReadOnly()`` or None.
        eviction: Policy that says which rows the table evicts; None evicts none.
        padding_idx: An id of this feature that reads as zeros and gets no row.
        dtype: torch.float32 or torch.bfloat16, also by name.
        device: Where the table lives.
        trainable: Whether rows get gradients from this feature.
        tile_len: Rows of a bag, for mode "tile" only.
        seed: With the table's name and the id, what a new row's values depend on; None takes
            torch's initial seed, as ``seed_everything`` sets it.
        use_weights: Whether weights that come with the ids count; otherwise they are ignored.
        mean_by: Divisor of mode "mean": "weights" is the sum of the ids' weights, "count" the
            number of ids, as in RecIS. Without weights both are the same.
        combiner: Function, or module, that makes the feature's output of its rows, with mode
            "none": it is called with rows [n, embedding_dim], times their weights if they have
            any, and offsets, int64 [B + 1], and returns [B, ...]. Gradients flow through it. Rows
            are zeros for padding and for ids without a row.
        combiner_width: Columns of what ``combiner`` returns, which ``concat`` has to know.
        pool_at_owner: On several ranks, have each add up the rows that it owns of a bag, with mode
            "sum" or "mean" and no weights: for long bags, fewer bytes than a row for each id.
        rows: "file:/folder" lets the table grow beyond memory, as ``HashTable`` says.

    Raises:
        TypeError, ValueError: A field is not what it should be.
    """

    embedding_dim: int
    table: str | None = None
    mode: Literal["none", "sum", "mean", "tile", "unique"] = "none"
    initializer: Initializer = DEFAULT_INITIALIZER
    admission: Admission | None = None
    eviction: Eviction | None = None
    padding_idx: int | None = None
    dtype: torch.dtype | str = torch.float32
    device: torch.device | str | None = None
    trainable: bool = True
    tile_len: int | None = None
    seed: int | None = 0
    use_weights: bool = True
    mean_by: Literal["weights", "count"] = "weights"
    combiner: Callable[..., Any] | None = None  # jsonargparse wants annotations of what it names
    combiner_width: int | None = None
    pool_at_owner: bool = False
    rows: str | None = None

    def __post_init__(self) -> None:
        check_embedding_dim(self.embedding_dim)
        check_dtype(self.dtype)
        if isinstance(self.table, int):
            raise TypeError(
                f"table: expected a str, got {type(self.table).__name__} ({self.table!r}); any id "
                "gets a row when it occurs, so there is no num_embeddings: write "
                f"EmbeddingOption({self.table!r})"
            )
        if self.table is not None:
            check_str("table", self.table)
        check_policies(self.initializer, self.admission, self.eviction)
        for name in ("trainable", "use_weights", "pool_at_owner"):
            check_bool(name, getattr(self, name))
        if self.mode not in _MODES:
            raise ValueError(f"mode: expected one of {_MODES}, got {self.mode!r}")
        if self.pool_at_owner and self.mode not in ("sum", "mean"):
            raise ValueError(
                f"pool_at_owner: only modes 'sum' and 'mean' add rows up, this is {self.mode!r}"
            )
        if self.mean_by not in ("weights", "count"):
            raise ValueError(f"mean_by: expected 'weights' or 'count', got {self.mean_by!r}")
        if self.mean_by == "count" and self.mode != "mean":
            raise ValueError(f"mean_by: only mode 'mean' takes 'count', this is {self.mode!r}")
        if (self.mode == "tile") != (self.tile_len is not None):
            raise ValueError(
                f"tile_len: mode 'tile' needs one and no other takes one, got "
                f"tile_len={self.tile_len!r} with mode={self.mode!r}"
            )
        if self.tile_len is not None and (
            isinstance(self.tile_len, bool)
            or not isinstance(self.tile_len, int)
            or self.tile_len < 1
        ):
            raise ValueError(f"tile_len: expected an int >= 1, got {self.tile_len!r}")
        check_padding_idx(self.padding_idx)
        check_rows(self.rows)
        self._check_combiner()

    def _check_combiner(self) -> None:
        if self.combiner is not None and not callable(self.combiner):
            hint = f"; write mode={self.combiner!r}" if self.combiner in _MODES else ""
            raise TypeError(
                f"combiner: expected a function of (rows, offsets), got {self.combiner!r}{hint}"
            )
        if self.combiner is not None and self.mode != "none":
            raise ValueError(f"combiner: only mode 'none' takes one, this is {self.mode!r}")
        if self.combiner_width is not None:
            check_int("combiner_width", self.combiner_width, least=1, alternative=" or None")
            if self.combiner is None:
                raise ValueError(
                    f"combiner_width: expected None without a combiner, got {self.combiner_width}"
                )

    @property
    def width(self) -> int:
        """Columns of the feature's output: embedding_dim, times tile_len for mode "tile".

        Raises:
            ValueError: Mode "unique" has none, or a combiner comes without ``combiner_width``.
        """
        if self.mode == "unique":
            raise ValueError("mode 'unique' returns rows of distinct ids, not one for each sample")
        if self.combiner is not None:
            if self.combiner_width is None:
                raise ValueError("its combiner may return any width; give combiner_width")
            return self.combiner_width
        return self.embedding_dim * (self.tile_len or 1)


__all__ = ["EmbeddingOption"]
