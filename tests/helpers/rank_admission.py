"""What ranks run in the tests of admission."""

import torch
from torch import distributed

from recis_lightning import DynamicEmbedding
from recis_lightning.distributed import collectives
from recis_lightning.table.state import saved_fields


def admit(admission, batches, state=None, saves_after=None):
    """Look up this rank's part of each batch; return its ids, and its state on the way.

    Args:
        admission: The table's policy.
        batches: int64 [steps, n], those of all ranks.
        state: A module's in one process, to begin with.
        saves_after: Number of steps before the state is read.
    """
    size = collectives.world_size()
    rank = distributed.get_rank() if size > 1 else 0
    module = DynamicEmbedding(2, admission=admission, name="t")
    if state is not None:
        module.load_state_dict(state)
    saved = None
    for i, batch in enumerate(batches):
        module(batch[rank::size])
        if i + 1 == saves_after:
            saved = saved_fields(module.table, torch.arange(0))
    return module.table.ids().tolist(), saved
