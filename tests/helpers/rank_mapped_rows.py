"""What ranks run in the tests of tables whose rows lie in mapped files."""

import torch

from recis_lightning import DynamicEmbedding, hash_tables
from recis_lightning.distributed.process_group import rank
from recis_lightning.eviction import MaxRows
from recis_lightning.optim import SparseAdam
from recis_lightning.table import row_store


def trained(rows):
    """Return the table's rows of all ranks after some steps, and the bytes here in its file."""
    row_store._BLOCK_BYTES, row_store._MAPPED_RANGE = 1 << 10, 1 << 12
    module = DynamicEmbedding(5, name="t", rows=rows, eviction=MaxRows(700, by="count"))
    (table,) = hash_tables(module)
    sparse = SparseAdam([table], lr=0.1)
    generator = torch.Generator().manual_seed(rank())
    for step in range(8):
        ids = torch.randint(0, 3000, (400 - 50 * rank(),), generator=generator)
        module(ids).square().sum().backward()
        sparse.step()
        if step % 3 == 2:
            table.evict()
    return table.gather(), table.mapped_bytes


def same_on_ranks(folder):
    """Each rank has a file of its own in one folder, and rows are as in memory."""
    (wanted_ids, wanted), _ = trained(None)
    (ids, rows), mapped_bytes = trained(f"file:{folder}?memory=2KiB")
    assert torch.equal(ids, wanted_ids)
    assert torch.equal(rows, wanted)
    return mapped_bytes, len(ids)
