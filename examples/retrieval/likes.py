"""MovieLens-100k for retrieval: films that users liked, the last of each user held out."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import torch
from pyarrow import parquet
from torch import Tensor

from examples.deepfm.movielens import download, part_files, write_parts

HELD_OUT, HISTORY = 5, 30  # likes of each user, the last; and those that a user's vector is of


class Likes(NamedTuple):
    """Films that users rated 4 or 5. A film's id is 1 or more; 0 pads histories.

    Attributes:
        users: int64 [n], of the likes to train on, by user and then by time.
        items: int64 [n], their films.
        histories: int64 [n, HISTORY], the films that the user liked before each, the last first.
        test_users: int64 [m], ascending.
        test_histories: int64 [m, HISTORY].
        held_out: int64 [m, HELD_OUT], what they liked later.
    """

    users: Tensor
    items: Tensor
    histories: Tensor
    test_users: Tensor
    test_histories: Tensor
    held_out: Tensor


def load(root: str = "data/ml-100k") -> Likes:
    """Return the likes of MovieLens-100k, which is downloaded once.

    Users with fewer than twice ``HELD_OUT`` likes have none held out.

    Args:
        root: Folder of the data, as for ``examples.deepfm``.
    """
    folder = Path(root)
    if not all(path.is_file() for path in part_files(folder)):
        download(folder)
        write_parts(folder)
    columns = ["user", "item", "rating"]
    parts = [parquet.read_table(path, columns=columns) for path in part_files(folder)]
    table = pa.concat_tables(parts)  # by time
    users, items, ratings = (torch.from_numpy(table[name].to_numpy().copy()) for name in columns)
    users, items = users[ratings >= 4], items[ratings >= 4]
    return split(users, items)


def split(users: Tensor, items: Tensor) -> Likes:
    """Return likes, int64 [n] in the order of time, as those to train on and those held out."""
    order = users.argsort(stable=True)
    users, items = users[order], items[order]
    first, end = torch.searchsorted(users, users), torch.searchsorted(users, users, right=True)
    places = torch.arange(len(users))
    back = places[:, None] - 1 - torch.arange(HISTORY)
    histories = torch.where(back >= first[:, None], items[back.clamp(min=0)], 0)
    is_held = (end - first >= 2 * HELD_OUT) & (end - places <= HELD_OUT)
    at = places[is_held & (end - places == HELD_OUT)]
    return Likes(
        *(users[~is_held], items[~is_held], histories[~is_held]),
        *(users[at], histories[at], items[at[:, None] + torch.arange(HELD_OUT)]),
    )


__all__ = ["HELD_OUT", "HISTORY", "Likes", "load", "split"]
