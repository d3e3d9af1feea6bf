"""MovieLens-100k for the examples: ratings in the order of time, likes by user, and scores."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc

from recis_lightning import GAUC, Jagged
from recis_lightning.cli.movielens import Examples, examples_of, find_texts

HISTORY = 20  # liked items that a sample has, the newest
TASKS = {"liked": 4, "loved": 5}  # the least rating


class Split(NamedTuple):
    """Ratings of training, validation and test, in the order of time: 70, 10 and 20%."""

    train: Examples
    val: Examples
    test: Examples


class Likes(NamedTuple):
    """Items that users liked (ratings of 4 and 5), each with what its user liked before.

    Attributes:
        users: int64 [n].
        items: int64 [n]; an id is 1 or more.
        histories: int64 [n, HISTORY], the oldest first, at most ``HISTORY``, then zeros.
    """

    users: Tensor
    items: Tensor
    histories: Tensor

    def part(self, index: Tensor) -> Likes:
        """Return the likes at some positions, int64 [n], or where a mask holds."""
        return Likes(*(column[index] for column in self))


Batch = TypeVar("Batch", bound="Examples | Likes")


class LikesSplit(NamedTuple):
    """Likes by user and time: each user's last one is the test's, the last but one validation's.

    Users of less than three likes have all of them in the training part.

    Attributes:
        train: Likes with at least one before them.
        val: One for each user.
        test: One for each user.
        items: int64 [num_items], all that anyone liked, ascending.
        seen: bool [num_users, num_items], for the users of ``test``: liked in training.
    """

    train: Likes
    val: Likes
    test: Likes
    items: Tensor
    seen: Tensor


def load(folder: str | None, num_rows: int | None = None) -> Split:
    """Return the split of the ratings in a folder.

    Every example has ``history``: the items that its user liked before it, at most ``HISTORY``; and
    ``rating``, 1 to 5, which is no feature.

    Args:
        folder: As for ``recis-lightning demo --data``.
        num_rows: Ratings to take, the first ones; None takes all.
    """
    whole = _ratings(folder, num_rows)
    whole.features["history"] = histories(whole)
    num = len(whole.label)
    ends = [0, num * 7 // 10, num * 8 // 10, num]
    return Split(*(whole.part(torch.arange(start, end)) for start, end in pairwise(ends)))


def load_likes(folder: str | None, num_rows: int | None = None) -> LikesSplit:
    """Return the likes in a folder, by user; arguments as of ``load``."""
    whole = _ratings(folder, num_rows)
    liked = whole.part(whole.label.nonzero().squeeze(1)).features
    return split_likes(_ids(liked["user"]), _ids(liked["item"]))


def split_likes(users: Tensor, items: Tensor) -> LikesSplit:
    """Return likes, int64 [n] in the order of time, as those of training, validation and test."""
    order = users.argsort(stable=True)
    users, items, places = users[order], items[order], torch.arange(len(users))
    first, end = torch.searchsorted(users, users), torch.searchsorted(users, users, right=True)
    start = torch.maximum(first, places - HISTORY)
    before = start[:, None] + torch.arange(HISTORY)
    padded = torch.where(before < places[:, None], items[before.clamp(max=len(items) - 1)], 0)
    likes, left = Likes(users, items, padded), end - places
    is_held = (end - first >= 3) & (left <= 2)
    test, catalogue = likes.part(is_held & (left == 1)), items.unique()
    seen = torch.zeros(len(test.users), len(catalogue), dtype=torch.bool)
    known = torch.isin(users, test.users) & ~is_held
    rows = torch.searchsorted(test.users, users[known])
    seen[rows, torch.searchsorted(catalogue, items[known])] = True
    is_trained = ~is_held & (first < places)
    val = likes.part(is_held & (left == 2))
    return LikesSplit(likes.part(is_trained), val, test, catalogue, seen)


def histories(examples: Examples) -> Jagged:
    """Return for each example what its user liked before, the oldest first."""
    liked: dict[int, list[int]] = defaultdict(list)
    users, items = _ids(examples.features["user"]), _ids(examples.features["item"])
    bags = []
    for user, item, label in zip(
        users.tolist(), items.tolist(), examples.label.tolist(), strict=True
    ):
        bags.append(torch.tensor(liked[user][-HISTORY:], dtype=torch.int64))
        if label:
            liked[user].append(item)
    return Jagged.from_lengths(torch.cat(bags), torch.tensor([len(bag) for bag in bags]))


def batches(examples: Batch, size: int, generator: torch.Generator | None) -> Iterator[Batch]:
    """Yield batches of examples or likes, shuffled by a generator, or in order without one."""
    num = len(examples[1])
    order = torch.arange(num) if generator is None else torch.randperm(num, generator=generator)
    return (examples.part(index) for index in order.split(size))  # type: ignore[misc]


def labels(examples: Examples, tasks: Sequence[str] = ("liked",)) -> Tensor:
    """Return the labels of tasks, float32 [N, number of tasks]."""
    rating = _ids(examples.features["rating"])
    return (rating[:, None] >= torch.tensor([TASKS[task] for task in tasks])).float()


def auc_and_gauc(logits: Tensor, label: Tensor, examples: Examples) -> tuple[float, float]:
    """Return AUC, and GAUC by user, of logits [N]."""
    gauc = GAUC()
    gauc.update(logits, label, _ids(examples.features["user"]))
    return float(binary_auroc(logits.sigmoid(), label.long())), float(gauc.compute())


def hit_and_ndcg(
    scores: Tensor, split: LikesSplit, part: str = "test", k: int = 10
) -> tuple[float, float]:
    """Return HR@k and NDCG@k of a ranking of all items that the user had not liked before.

    With one item to find, at rank r, they are the means of ``r <= k`` and of ``1 / log2(r + 1)``
    where that holds. Of equal scores, the one to find comes last.

    Args:
        scores: [num_users, num_items], of each user of the part for each of ``split.items``.
        split: Its training part is what a user had liked before; for the test, validation, too.
        part: "val" or "test".
        k: Length of the list.
    """
    found, seen = getattr(split, part), split.seen
    rows, wanted = torch.arange(len(found.users)), torch.searchsorted(split.items, found.items)
    if part == "test":
        seen = seen.clone()
        seen[rows, torch.searchsorted(split.items, split.val.items)] = True
    own = scores[rows, wanted]
    seen[rows, wanted] = False  # a film is rated once, but for damaged data
    rank = ((scores >= own[:, None]) & ~seen).sum(1)
    gain = torch.where(rank <= k, 1 / (rank + 1.0).log2(), 0.0)
    return float((rank <= k).double().mean()), float(gain.double().mean())


def _ratings(folder: str | None, num_rows: int | None) -> Examples:
    """Return examples in the order of time, with their ratings."""
    texts = find_texts(folder)
    whole = examples_of(texts)
    head, *lines = (line.split("\t") for line in texts["ml-100k.inter"].splitlines())
    names = [field.partition(":")[0] for field in head]
    rating, time = (
        torch.tensor([float(line[names.index(name)]) for line in lines], dtype=torch.float64)
        for name in ("rating", "timestamp")
    )
    whole.features["rating"] = rating[time.argsort(stable=True)].long()
    num = len(whole.label) if num_rows is None else min(num_rows, len(whole.label))
    return whole.part(torch.arange(num))


def _ids(feature: Tensor | Jagged) -> Tensor:
    assert isinstance(feature, Tensor)
    return feature
