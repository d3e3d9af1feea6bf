"""Random ids in any form that a lookup takes: shapes, strides, offsets, weights."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from recis_lightning import Jagged
from tests.fuzz.oracle import Bags
from tests.helpers.sample_tables import EXTREMES

_USUAL = [*range(24), *EXTREMES.tolist()]
_SIZES = (0, 1, 1, 2, 3, 5, 8, 40)


def some_ids(rng: random.Random, count: int) -> list[int]:
    """Pick ids: mostly a few that recur, the ends of int64 among them, or any at all."""
    if rng.random() < 0.1:
        return [rng.randrange(-(2**63), 2**63) for _ in range(count)]
    return rng.choices(_USUAL, k=count)


def some_count(rng: random.Random) -> int:
    return rng.choice(_SIZES) if rng.random() < 0.97 else rng.randrange(500, 5000)


def strided(rng: random.Random, tensor: Tensor) -> Tensor:
    """Return a tensor of the same items that may lie in memory in another way."""
    kind = rng.choice(("as it is", "as it is", "every second", "behind another", "transposed"))
    if kind == "every second" and tensor.dim():
        wide = torch.full((*tensor.shape, 2), -77, dtype=tensor.dtype)
        wide[..., 0] = tensor
        return wide[..., 0]
    if kind == "behind another":
        behind = torch.cat([torch.full((3,), -77, dtype=tensor.dtype), tensor.reshape(-1)])
        return behind[3:].view(tensor.shape)
    if kind == "transposed" and tensor.dim() >= 2:
        return tensor.transpose(0, 1).contiguous().transpose(0, 1)
    return tensor


def plain(rng: random.Random) -> tuple[Tensor, Bags]:
    """Return ids of any shape, each read by itself."""
    ids = some_ids(rng, some_count(rng))
    count = len(ids)
    shapes: list[tuple[int, ...]] = [(count,), (count, 1), (1, count), (1, count, 1)]
    if count % 2 == 0:
        shapes += [(2, count // 2), (count // 2, 2), (1, 2, count // 2)]
    shapes += [(), ()] if count == 1 else []
    shapes += [(0, 3), (3, 0), (2, 0, 2)] if count == 0 else []
    tensor = torch.tensor(ids, dtype=torch.int64).view(rng.choice(shapes))
    if count == 1 and rng.random() < 0.3:  # one item, read again and again
        tensor = tensor.reshape(1).expand(4)
        ids = ids * 4
    return strided(rng, tensor), Bags(ids)


def dense_bags(rng: random.Random, longest: int = 6) -> tuple[Tensor, Bags]:
    """Return ids [B, L] and the bags they make."""
    num_bags, length = rng.randrange(0, 6), rng.randrange(0, longest + 1)
    ids = some_ids(rng, num_bags * length)
    bag = [at // length for at in range(len(ids))]
    tensor = torch.tensor(ids, dtype=torch.int64).view(num_bags, length)
    return strided(rng, tensor), Bags(ids, bag, num_bags)


def ragged_bags(rng: random.Random) -> tuple[Jagged, Bags]:
    """Return ids and offsets, ending with the number of ids, and the bags they make."""
    lengths = [rng.choice((0, 0, 1, 2, 5)) for _ in range(rng.randrange(0, 7))]
    ids = some_ids(rng, sum(lengths))
    offsets = torch.tensor([sum(lengths[:at]) for at in range(len(lengths) + 1)])
    bag = [at for at, length in enumerate(lengths) for _ in range(length)]
    values = strided(rng, torch.tensor(ids, dtype=torch.int64))
    return Jagged(values, strided(rng, offsets)), Bags(ids, bag, len(lengths))


def some_weights(rng: random.Random, count: int) -> list[float]:
    return [rng.choice((0.0, 0.5, 1.0, -2.0)) for _ in range(count)]


def with_weights(rng: random.Random, bags: Bags, shape: Sequence[int]) -> tuple[Tensor, Bags]:
    """Return weights of ids in that shape, and bags that have them."""
    weights = some_weights(rng, len(bags.ids))
    return strided(rng, torch.tensor(weights).view(tuple(shape))), bags._replace(weights=weights)


def wrong_ids(rng: random.Random) -> tuple[str, Any]:
    """Return something that is no ids, and its name."""
    count = rng.choice((1, 3))
    fresh = torch.tensor([rng.randrange(2**40, 2**41) for _ in range(count)])
    choices: dict[str, Any] = {
        "floats": fresh.double(),
        "bools": fresh.bool(),
        "complex numbers": fresh.to(torch.complex64),
        "a list": fresh.tolist(),
        "None": None,
        "text": "ids",
        "a number": 7,
        "on meta": torch.empty(count, dtype=torch.int64, device="meta"),
        "sparse": fresh.to_sparse(),
        "an array": fresh.numpy(),
    }
    name = rng.choice(list(choices))
    return name, choices[name]


def wrong_offsets(rng: random.Random, count: int) -> tuple[str, Any]:
    """Return offsets [B + 1] that do not fit ``count`` >= 2 ids, and their name."""
    good = torch.tensor([0, 1, count])
    choices: dict[str, Any] = {
        "floats": good.double(),
        "lengths": torch.tensor([1, count - 1, 1]),
        "not from zero": torch.tensor([1, 1, count]),
        "falling": torch.tensor([0, count, 1, count]),
        "negative": torch.tensor([0, -1, count]),
        "behind the end": torch.tensor([0, count + 1, count]),
        "far behind the end": torch.tensor([0, 2**40, count]),
        "past the end": torch.tensor([0, 1, count + 5]),
        "too short": torch.tensor([0, 1]),
        "the ends of int64": torch.tensor([0, 2**63 - 1, -(2**63), count]),
        "two dimensions": good[None],
        "no dimension": torch.tensor(0),
        "a list": good.tolist(),
        "on meta": torch.empty(3, dtype=torch.int64, device="meta"),
    }
    name = rng.choice(list(choices))
    return name, choices[name]


def wrong_weights(rng: random.Random, count: int) -> tuple[str, Any]:
    """Return weights that do not fit ``count`` ids, and their name."""
    choices: dict[str, Any] = {
        "too few": torch.ones(count - 1),
        "too many": torch.ones(count + 1),
        "two dimensions": torch.ones(count, 1),
        "whole numbers": torch.ones(count, dtype=torch.int64),
        "a list": [1.0] * count,
        "on meta": torch.empty(count, device="meta"),
    }
    name = rng.choice(list(choices))
    return name, choices[name]
