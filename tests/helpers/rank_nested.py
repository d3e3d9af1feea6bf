"""Ranks that look features of two levels up."""

import torch
from torch import distributed

from recis_lightning import EmbeddingEngine, EmbeddingOption, NestedJagged, hash_tables
from recis_lightning.optim import SparseSGD


def rows_after_a_step(alone=False):
    """Train rank 0 on two samples, the other on none, or one process alone; return the rows."""
    engine = EmbeddingEngine({"item": EmbeddingOption(2, mode="mean")})
    ids, lengths, outer = [1, 2, 3, 1], [3, 0, 1], [2, 1]
    if not alone and distributed.get_rank():
        ids = lengths = outer = []
    given = NestedJagged.from_lengths(*(torch.tensor(x).long() for x in (ids, lengths, outer)))
    loss = engine({"item": given})["item"].values.square().sum()
    (loss / 2 if alone else loss).backward()  # gradients are averaged over ranks
    SparseSGD(hash_tables(engine), lr=1.0).step()
    engine.eval()
    return engine({"item": torch.tensor([[1], [2], [3]])})["item"].detach()
