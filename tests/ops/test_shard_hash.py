"""The hash by which ids are sharded."""

import torch

from recis_lightning.ops.shard_hash import shard_hash
from tests.helpers.sample_tables import EXTREMES


def test_it_is_the_finalizer_of_murmur_hash():
    """It equals the finalizer in Python's whole numbers, without its low 33 bits."""

    def finalized(key):
        key %= 2**64
        key = (key ^ (key >> 33)) * 0xFF51AFD7ED558CCD % 2**64
        key = (key ^ (key >> 33)) * 0xC4CEB9FE1A85EC53 % 2**64
        return key >> 33

    ids = torch.cat([EXTREMES, torch.arange(-50, 50)])
    assert shard_hash(ids).tolist() == [finalized(i) for i in ids.tolist()]
