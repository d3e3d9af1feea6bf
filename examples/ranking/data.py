"""MovieLens-100k for ranking models: likes in the order of time, and what was liked before."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc

from recis_lightning import GAUC, Jagged
from recis_lightning.cli.movielens import Examples, examples_of, find_texts

HISTORY = 20  # liked items that a sample has, the newest


class Split(NamedTuple):
    """Examples of training, validation and test, in the order of time: 70, 10 and 20%."""

    train: Examples
    val: Examples
    test: Examples


def load(folder: str | None, num_rows: int | None = None) -> Split:
    """Return the split of the data in a folder.

    Every example has ``history``: the items that its user liked before it, at most ``HISTORY``.

    Args:
        folder: As for ``recis-lightning demo --data``.
        num_rows: Ratings to take, the first ones; None takes all.
    """
    whole = examples_of(find_texts(folder))
    num = len(whole.label) if num_rows is None else min(num_rows, len(whole.label))
    whole = whole.part(torch.arange(num))
    features = {**whole.features, "history": histories(whole)}
    whole = Examples(features, whole.label)
    ends = [0, num * 7 // 10, num * 8 // 10, num]
    parts = [torch.arange(start, end) for start, end in pairwise(ends)]
    return Split(*(whole.part(part) for part in parts))


def histories(examples: Examples) -> Jagged:
    """Return for each example what its user liked before, the oldest first."""
    liked: dict[int, list[int]] = defaultdict(list)
    users, items = examples.features["user"], examples.features["item"]
    assert isinstance(users, Tensor)
    assert isinstance(items, Tensor)
    bags = []
    for user, item, label in zip(
        users.tolist(), items.tolist(), examples.label.tolist(), strict=True
    ):
        bags.append(torch.tensor(liked[user][-HISTORY:], dtype=torch.int64))
        if label:
            liked[user].append(item)
    return Jagged.from_lengths(torch.cat(bags), torch.tensor([len(bag) for bag in bags]))


def batches(examples: Examples, size: int, generator: torch.Generator | None) -> Iterator[Examples]:
    """Yield batches, shuffled by a generator, or in order without one."""
    num = len(examples.label)
    order = torch.arange(num) if generator is None else torch.randperm(num, generator=generator)
    return (examples.part(index) for index in order.split(size))


def scores(logits: Tensor, examples: Examples) -> tuple[float, float]:
    """Return AUC, and GAUC by user, of logits [N]."""
    auc, user = binary_auroc(logits.sigmoid(), examples.label.long()), examples.features["user"]
    assert isinstance(user, Tensor)
    gauc = GAUC()
    gauc.update(logits, examples.label, user)
    return float(auc), float(gauc.compute())
