"""Training by rows of distinct ids, or of repeated ones, on any number of ranks."""

import torch
from torch import distributed

from recis_lightning import DynamicEmbedding, hash_tables
from recis_lightning.distributed import collectives
from recis_lightning.eviction import MaxRows
from recis_lightning.initializers import Uniform
from recis_lightning.optim import SparseSGD
from tests.helpers.sample_tables import HIGH, LOW

BATCHES = [
    torch.tensor([[7, 3, 7, 5], [5, 5, 5, 3]]),
    torch.tensor([[7, 8], [9, 9]], dtype=torch.int32),
    torch.tensor([LOW, HIGH, 7, LOW, 3, 11]),
    torch.empty(2, 0, dtype=torch.int64),
    torch.tensor([[[9, 8, 9]], [[7, 7, 11]]]),
    torch.tensor(5),
]


def train_on_ranks(mode, admission):
    """Return this rank's rows by id, with their counts; ranks share each batch."""
    module = DynamicEmbedding(
        *(2,),
        mode=mode,
        admission=admission,
        eviction=MaxRows(99, by="count"),
        initializer=Uniform(-1, 1),
        name="t",
    )
    sparse = SparseSGD(hash_tables(module), lr=0.5)
    size = collectives.world_size()
    rank = distributed.get_rank() if size > 1 else 0
    for batch in BATCHES:
        found = module(batch.flatten()[rank::size])
        out = found if mode == "none" else found.rows[found.inverse]
        (size * out.sum()).backward()
        sparse.step()
        sparse.zero_grad()
    table, known = module.table, module.table.ids()
    counts = table.storage.columns["counts"][table._find(known)]
    rows = torch.cat([table.embeddings(known), counts[:, None].float()], 1)
    return dict(zip(known.tolist(), rows.tolist(), strict=True))
