"""Display-advertising clicks in the Criteo layout, read as they are from ORC or Parquet files."""

from __future__ import annotations

import glob
from typing import Any, cast

import torch
from torch import Tensor

from examples.deepfm.batch import Batch, no_batches
from recis_lightning.data import ColumnarDataModule, Features, Id, Label, Log1p, Number

COUNTS = [f"i{n}" for n in range(1, 14)]
CATEGORIES = [f"c{n}" for n in range(1, 27)]
MISSING_ID = -1  # an id like any other: a missing category is information, too


def criteo_features(hash: str | None = "xxh64") -> Features:
    """Return ``label``, the counts (``sign(x) log(1 + |x|)``, NaN if missing) and the categories.

    A column holds values or lists of at most one; null and an empty list are missing.

    Args:
        hash: Of the categories, hex strings or integers; None takes integers as they are.
    """
    return Features(
        [
            Label("label"),
            *(Number(name, default=float("nan")) for name in COUNTS),
            *(Id(name, hash=hash, default=MISSING_ID) for name in CATEGORIES),
        ],
        [Log1p(name) for name in COUNTS],
    )


def to_batch(entries: dict[str, Any]) -> Batch:
    """Return the model's batch: 13 counts, 0 where missing, and 13 flags that say which are."""
    counts = torch.stack([cast(Tensor, entries[name]) for name in COUNTS], dim=1)
    label = entries["label"]
    return Batch(
        features={name: entries[name] for name in CATEGORIES},
        dense=torch.cat([counts.nan_to_num(0.0), counts.isnan().float()], dim=1),
        label=label,
        group=torch.full(label.shape, -1),
    )


class CriteoDataModule(ColumnarDataModule):
    """Files with ``label``, counts ``i1``..``i13`` and categories ``c1``..``c26``, by name.

    Args:
        root: Folder of the files.
        train: File names or glob patterns under ``root``.
        val: The same, for validation; None if there is none.
        test: The same, for the test.
        batch_size: Rows in a batch of one rank.
        shuffle_rows: Rows within which training rows are shuffled; 0 keeps the order.
        num_workers: Processes that read; 0 reads in threads.
        seed: Of the shuffled order.
        hash: Of the categories; None takes integers as they are.
    """

    def __init__(
        self,
        root: str,
        train: list[str],
        val: list[str] | None = None,
        test: list[str] | None = None,
        batch_size: int = 512,
        shuffle_rows: int = 0,
        num_workers: int = 0,
        seed: int = 0,
        hash: str | None = "xxh64",
    ) -> None:
        def under(names: list[str] | None) -> list[str] | None:
            return [f"{glob.escape(root)}/{name}" for name in names] if names else None

        super().__init__(
            train=under(train),
            val=under(val),
            test=under(test),
            batch_size=batch_size,
            shuffle_rows=shuffle_rows,
            lanes=max(num_workers, 1),
            num_workers=num_workers,
            seed=seed,
            features=criteo_features(hash),
            convert=to_batch,
        )
        if not val:  # on purpose: Lightning need not warn of it
            self.val_dataloader = no_batches  # type: ignore[method-assign]
