"""Tables that several tests start from, and how they compare them."""

import torch

from recis_lightning import DynamicEmbedding, HashTable, hash_tables
from recis_lightning.eviction import GlobalStepFilter
from recis_lightning.ops import hash_index, row_init
from recis_lightning.optim import SparseAdam

LOW, HIGH = -(2**63), 2**63 - 1
EXTREMES = torch.tensor([LOW, HIGH, -1, 0, 1, LOW + 1, HIGH - 1, 2**62, -(2**62)])


def filled(dim=3, count=5, **kwargs):
    """Return a table whose row of id i is filled with i."""
    table = HashTable(dim, name="t", **kwargs)
    ids = torch.arange(count)
    table.insert(ids, ids[:, None].expand(count, dim).float())
    return table


def insert_initial(table, ids):
    """Give ids, int64 [n], an initial row, whatever the admission policy; return their rows."""
    segments = table.storage.segments(ids, insert=True)
    rows, new = hash_index.find_or_insert(segments, ids.numel(), [table.storage], [0], table.device)
    if new is not None:
        bfloat16 = table.dtype is torch.bfloat16
        row_init.init_rows_(rows, new, segments, table.embedding_dim, bfloat16)
    return rows


def trained(optimizer=SparseAdam, dtype=torch.float32):
    """Return an embedding and an optimizer after a few steps, with stamps and a free row."""
    module = DynamicEmbedding(3, name="t", eviction=GlobalStepFilter(50), dtype=dtype)
    sparse = optimizer(hash_tables(module), lr=0.1)
    for step in range(4):
        module(EXTREMES[step : step + 5]).float().pow(2).sum().backward()
        sparse.step()
        module.table.update_step()
    module.table.delete(EXTREMES[2:3])
    return module, sparse


def by_id(table):
    """Return a table's state in the order of its ids: rows lie elsewhere in a copy."""
    state = table.get_extra_state()
    order = state["ids"].argsort()
    columns = {key: state[key][order] for key in ("ids", "weights", "last_seen")}
    return {**columns, **{key: slot[order] for key, slot in state["slots"].items()}}


def settings_of(table):
    """Return what a load changes beside rows and what policies keep."""
    storage = table.storage
    counts = {"step": table.step, "num_updates": table.num_updates}
    layout = {"slots": storage.rows.slots, "state_fill": storage.rows.state_fill}
    return {"name": table.given_name, "seed": table.seed, **counts, **layout}


def same(a, b):
    """Tell whether two states hold the same, bit by bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype is b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    return a == b
