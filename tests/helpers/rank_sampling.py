"""What ranks run in the tests of sampling: each looks a part of the ids up."""

import torch

from recis_lightning import DynamicEmbedding
from recis_lightning.distributed import collectives
from recis_lightning.eviction import MaxRows
from tests.helpers.rank_training import rank

IDS = torch.arange(-20, 20).repeat_interleave(torch.arange(1, 41))


def draw():
    """Return what a rank draws, its shard's ids, and the probabilities of some ids."""
    module = DynamicEmbedding(2, eviction=MaxRows(999, by="count"), name="t")
    own = rank()
    module(IDS[own :: collectives.world_size()])
    drawn = module.table.sample(2000, generator=torch.Generator().manual_seed(1))
    asked = torch.arange(-20, 22)[: 42 - 7 * own]  # another number of them on each rank
    probabilities = module.table.sampling_probabilities(asked)
    return drawn.ids.tolist(), module.table.ids().tolist(), probabilities.numpy()
