"""Who owns an id."""

import numpy as np
import pytest
import torch

from recis_lightning.distributed.ownership import owner_of
from recis_lightning.ops.cpu.probe import _mix
from tests.helpers.sample_tables import EXTREMES

PATTERNS = {
    "counting": torch.arange(100_000),
    "negative": -torch.arange(1, 100_001),
    "even": torch.arange(100_000) * 2,
    "powers": torch.arange(100_000) << 32,
    "high": torch.arange(100_000) << 47,
    "field": (torch.arange(100_000) % 100 << 52) | (torch.arange(100_000) // 100),
}


def _mixed(value):
    """Return MurmurHash3's finalizer of an int64, in Python's whole numbers."""
    value %= 2**64
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        value = (value ^ value >> 33) * factor % 2**64
    return value ^ value >> 33


@pytest.mark.parametrize("world_size", [1, 2, 3, 8, 1000])
def test_owner_is_the_hash_modulo_the_ranks(world_size):
    """All of int64 is legal, and no step depends on a device's rounding."""
    ids = torch.cat([EXTREMES, torch.randint(-(2**63), 2**63 - 1, (100,))])
    # The upper half of the hash is what the last shift leaves as it was.
    wanted = [(_mixed(value) >> 33) % world_size for value in ids.tolist()]
    assert owner_of(ids, world_size).tolist() == wanted


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_patterned_ids_spread_over_ranks(pattern, world_size):
    """No rank gets 3% more or less than its share."""
    counts = owner_of(PATTERNS[pattern], world_size).bincount(minlength=world_size)
    assert ((counts * world_size / 100_000 - 1).abs() < 0.03).all()


@pytest.mark.parametrize("pattern", PATTERNS)
def test_ids_of_one_owner_spread_over_its_index(pattern):
    """A shard's index has no more collisions than chance gives it."""
    ids = PATTERNS[pattern]
    mine = ids[owner_of(ids, 8) == 3].numpy()
    lines = (_mix.py_func(mine) >> np.uint64(64 - 17)) // np.uint64(4)
    load = len(mine) / 2**15
    used = len(np.unique(lines)) / 2**15
    # Of lines that chance fills, 1 - exp(-load) hold something; better than chance is welcome.
    assert used > 0.97 * (1 - np.exp(-load))


def test_owner_keeps_the_shape_of_ids():
    """Empty and many-dimensional ids too."""
    assert owner_of(torch.empty(0, 3, dtype=torch.int64), 2).shape == (0, 3)
    assert owner_of(torch.arange(6).view(2, 3), 2).shape == (2, 3)


def test_bad_arguments_are_named():
    """Errors say what was wanted."""
    with pytest.raises(TypeError, match="int64"):
        owner_of(torch.zeros(2), 2)
    with pytest.raises(ValueError, match="world_size"):
        owner_of(torch.zeros(2, dtype=torch.int64), 0)
    with pytest.raises(TypeError, match="world_size"):
        owner_of(torch.zeros(2, dtype=torch.int64), 2.0)
