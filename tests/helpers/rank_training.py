"""What ranks run in the tests of sharded tables: the same on any number of ranks."""

import tempfile
from contextlib import ExitStack
from unittest.mock import patch

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from recis_lightning import (
    DynamicEmbedding,
    EmbeddingEngine,
    EmbeddingOption,
    Jagged,
    hash_tables,
    optim,
)
from recis_lightning.distributed import collectives
from recis_lightning.initializers import Normal
from recis_lightning.lookup import current_groups, regrouping
from recis_lightning.lookup.features import FeatureLayout
from recis_lightning.lookup.group import LookupGroup
from recis_lightning.lookup.sharded import ShardedRows
from recis_lightning.lookup.surroundings import NoRunner
from recis_lightning.ops import backend
from recis_lightning.table import state as table_state

GLOBAL_BATCH = 24
# What part of a global batch each rank has, by number of ranks: uneven, and once nothing.
_CUTS = {1: [0, 24], 2: [0, 17, 24], 3: [0, 11, 11, 24], 4: [0, 5, 5, 18, 24]}


def rank():
    return distributed.get_rank() if collectives.world_size() > 1 else 0


class Model(nn.Module):
    """Tables of two dims, features of every mode and layout, one shared table, a tower on top."""

    def __init__(self, eviction=None, admission=None, ranks_per_node=None, pool_at_owner=False):
        super().__init__()
        torch.manual_seed(0)
        shared = {"initializer": Normal(std=0.1), "eviction": eviction, "admission": admission}
        nodes = {"ranks_per_node": ranks_per_node}
        self.user = DynamicEmbedding(3, name="user", padding_idx=-1, **nodes, **shared)
        self.engine = EmbeddingEngine(
            {
                "item": EmbeddingOption(5, **shared),
                "history": EmbeddingOption(
                    5,
                    table="item",
                    mode="mean",
                    padding_idx=0,
                    pool_at_owner=pool_at_owner,
                    **shared,
                ),
                "tags": EmbeddingOption(5, mode="sum", **shared),
                "words": EmbeddingOption(3, mode="tile", tile_len=2, **shared),
                "frozen": EmbeddingOption(3, mode="sum", trainable=False, **shared),
            },
            **nodes,
        )
        self.tower = nn.Sequential(nn.Linear(27, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, batch):
        found = self.engine({name: batch[name] for name in self.engine.options})
        return self.tower(torch.cat([self.user(batch["user"]), *found.values()], 1)).squeeze(1)


def global_batch(number):
    """Return batch ``number`` of all ranks together."""
    chance = torch.Generator().manual_seed(number)

    def ids(*shape, high=60):
        drawn = torch.rand(shape, generator=chance).pow(2).mul(high).long()
        return drawn * 2654435761 - 2**40 * (drawn % 3)  # patterned, and negative ones

    lengths = torch.randint(0, 5, (GLOBAL_BATCH,), generator=chance)
    lengths[::5] = 0
    count = int(lengths.sum())
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    user = ids(GLOBAL_BATCH)
    user[::7] = -1
    return {
        "user": user,
        "item": ids(GLOBAL_BATCH),
        "history": ids(GLOBAL_BATCH, 3),
        "tags": Jagged(ids(count), offsets, torch.rand(count, generator=chance) + 0.5),
        "words": Jagged(ids(count, high=20), offsets),
        "frozen": ids(GLOBAL_BATCH, 2),
        "label": torch.randn(GLOBAL_BATCH, generator=chance),
    }


def local_batch(number):
    """Return this rank's part of a global batch."""
    cuts = _CUTS[collectives.world_size()]
    low, high = cuts[rank()], cuts[rank() + 1]
    return {name: _cut(value, low, high) for name, value in global_batch(number).items()}


def _cut(value, low, high):
    if not isinstance(value, Jagged):
        return value[low:high]
    start, end = int(value.offsets[low]), int(value.offsets[high])
    offsets = value.offsets[low : high + 1] - start
    weights = None if value.weights is None else value.weights[start:end]
    return Jagged(value.values[start:end], offsets, weights)


def train_on(which, **kwargs):
    """Train as ``train`` does, with the ops of one backend."""
    with backend.use(which):
        return train(**kwargs)


def train_in_parts_of(num_ids, **kwargs):
    """Train as ``train`` does, with received ids in the order of tables below a number a part."""
    with patch.object(regrouping, "IDS_OF_PART", num_ids):
        return train(**kwargs)


def _make_sharded_group(features):
    layout = FeatureLayout(features)
    return LookupGroup(layout, ShardedRows(layout), NoRunner())


def train_alone(group_backend, **kwargs):
    """Train as ``train`` does, one rank that takes the way of many and owns all ids."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        stack.enter_context(patch.object(current_groups, "make_group", _make_sharded_group))
        where = {"init_method": f"file://{folder}/store", "rank": 0, "world_size": 1}
        distributed.init_process_group(group_backend, **where)
        return train(**kwargs)


def train(
    optimizer,
    steps,
    accumulate=1,
    model=None,
    first=0,
    start=None,
    device="cpu",
    clip=None,
    **kwargs,
):
    """Train; return what this rank holds.

    Args:
        optimizer: Name of a sparse one.
        steps: How many.
        accumulate: Batches a step.
        model: Arguments of ``Model``.
        first: Number of the first batch.
        start: A state to start from.
        device: Where the model is.
        clip: Bound and type of the norm of all gradients; None: they are not clipped.
        kwargs: Arguments of the optimizer.
    """
    model = Model(**(model or {}))
    if start is not None:
        model.load_state_dict(start)
    model.to(device)
    tables = hash_tables(model)
    sparse = getattr(optim, optimizer)(tables, lr=0.05, **kwargs)
    dense = torch.optim.SGD(model.tower.parameters(), lr=0.05)
    both = optim.SparseDenseOptimizer(dense, sparse)
    wrapped = DistributedDataParallel(model) if collectives.world_size() > 1 else model
    sizes, norms = [], []
    for step in range(steps):
        for part in range(accumulate):
            batch = _moved(local_batch(first + step * accumulate + part), device)
            # The mean over the global batch, of which DDP averages the ranks' parts.
            error = (wrapped(batch) - batch["label"]).pow(2).sum()
            (error * collectives.world_size() / GLOBAL_BATCH / accumulate).backward()
        if clip is not None:
            norms.append(optim.clip_grad_norm_(both, *clip).item())
        both.step()
        both.zero_grad()
        for table in tables:
            table.update_step()
            table.evict()
        sizes.append([len(table) for table in tables])
    model.eval()
    scores = wrapped(_moved(local_batch(10**6), device)).detach().cpu()
    return {
        "tower": {
            name: value.detach().cpu().numpy() for name, value in model.tower.named_parameters()
        },
        "tables": {table.name: shard(table) for table in tables},
        "counts": [_counts(table) for table in tables],
        "sizes": sizes,
        "norms": norms,
        "scores": scores.numpy(),
    }


def _moved(batch, device):
    """Return a batch on a device."""

    def moved(value):
        if isinstance(value, Jagged):
            return Jagged(*(part if part is None else part.to(device) for part in value))
        return value.to(device)

    return {name: moved(value) for name, value in batch.items()}


def shard(table):
    """Return what a table holds here, by id, as arrays."""
    state = table_state.export(table)
    order = state["ids"].argsort()
    held = {"ids": state["ids"], "weights": state["weights"].float(), **state["slots"]}
    if "last_seen" in state:
        held["last_seen"] = state["last_seen"]
    held = {key: value[order].numpy() for key, value in held.items()}
    if "pending_ids" in state:
        held["pending"] = torch.stack(
            [state[f"pending_{part}"] for part in ("ids", "counts", "lookups")], 1
        ).numpy()
    return {**held, "num_updates": table.num_updates, "step": table.step}


def _counts(table):
    statistics = table.statistics()
    return [statistics.admitted, statistics.refused, statistics.evicted]


def saved(optimizer, steps):
    """Return a model's state after training on one rank."""
    model = Model()
    sparse = getattr(optim, optimizer)(hash_tables(model), lr=0.05)
    dense = torch.optim.SGD(model.tower.parameters(), lr=0.05)
    for step in range(steps):
        batch = local_batch(step)
        ((model(batch) - batch["label"]).pow(2).sum() / GLOBAL_BATCH).backward()
        for part in (dense, sparse):
            part.step()
            part.zero_grad()
        for table in hash_tables(model):
            table.update_step()
    return model.state_dict()


def evict(policy, steps):
    """Look ids up for some steps and evict; return how many went here, and what is left here."""
    module = DynamicEmbedding(2, eviction=policy, name="t")
    module.table.pin(torch.tensor([0]))
    for number in range(steps):
        module(local_batch(number)["user"])
        module.table.update_step()
    wished = module.table.evict(dry_run=True)
    report = module.table.evict()
    assert wished == report
    return int(report), module.table.ids().tolist()
