"""What ranks run in the tests of lookups that were begun ahead."""

import time

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from recis_lightning import DynamicEmbedding, hash_tables, look_up_together, optim
from recis_lightning.distributed import collectives
from recis_lightning.distributed.ahead_channel import channel_of
from recis_lightning.lookup import finish_evaluation, look_ahead, overlap_backward
from recis_lightning.lookup.early_gradients import early_of
from recis_lightning.lookup.prepared import prepared_of
from tests.helpers import rank_backward
from tests.helpers.rank_training import GLOBAL_BATCH, Model, local_batch, shard


def lookups_of(model, batch, together):
    """Return the lookups of a batch, in the order in which the model does them."""
    features = {name: batch[name] for name in model.engine.options}
    pair = (model.engine, features), (model.user, batch["user"])
    return [pair] if together else pair


def scores_of(model, batch, together):
    if not together:
        return model(batch)
    (engine, features), (user, ids) = lookups_of(model, batch, True)[0]
    found, rows = look_up_together((engine, features), (user, ids))
    return model.tower(torch.cat([rows, *found.values()], 1)).squeeze(1)


def train(ahead, steps=8, together=False, accumulate=1, disturb=None, overlap=False, **settings):
    """Train, and evict after each step; return what this rank holds, and how many were used.

    Args:
        ahead: Whether to look ahead.
        steps: How many batches.
        together: Whether modules are looked up together.
        accumulate: Batches a step.
        disturb: Called before each batch with its number, the model and the batch; it returns what
            is trained on in its place.
        overlap: Whether gradients travel from the backward pass on.
        settings: Of ``Model``.
    """
    before = overlap_backward(overlap)
    model = Model(**settings)
    tables = hash_tables(model)
    both = optim.SparseDenseOptimizer(
        torch.optim.SGD(model.tower.parameters(), lr=0.05), optim.SparseAdam(tables, lr=0.05)
    )
    many = collectives.world_size() > 1
    wrapped = DistributedDataParallel(model) if many and not together else model
    losses = []
    for step in range(steps):
        batch = local_batch(step)
        if ahead and step + 1 < steps:
            look_ahead(*lookups_of(model, local_batch(step + 1), together))
        if disturb is not None:
            batch = disturb(step, model, batch)
        scores = wrapped(batch) if not together else scores_of(model, batch, True)
        loss = (scores - batch["label"]).pow(2).sum() * collectives.world_size() / GLOBAL_BATCH
        loss.backward()
        losses.append(loss.item())
        if (step + 1) % accumulate == 0:
            both.step()
            both.zero_grad()
            for table in tables:
                table.update_step()
                table.evict()
    overlap_backward(before)
    used = prepared_of(None).num_used if many else 0
    return {
        "losses": losses,
        "tower": [value.tolist() for value in model.tower.parameters()],
        "tables": {table.name: shard(table) for table in tables},
        "used": used,
    }


def assert_same(ahead, plain):
    """Compare two trainings to the bit."""
    assert ahead["losses"] == plain["losses"]
    assert ahead["tower"] == plain["tower"]
    for name, wanted in plain["tables"].items():
        found = ahead["tables"][name]
        assert found.keys() == wanted.keys()
        for key, value in wanted.items():
            equal = (found[key] == value) if isinstance(value, int) else (found[key] == value).all()
            assert equal, (name, key)


def same_with_and_without(wanted_uses, **kwargs):
    """Train without and with looking ahead."""
    plain = train(False, **kwargs)
    before = prepared_of(None).num_used if collectives.world_size() > 1 else 0
    ahead = train(True, **kwargs)
    assert_same(ahead, plain)
    assert ahead["used"] - before == wanted_uses, ahead["used"] - before


def same_with_early_gradients(wanted_uses, **kwargs):
    """Train without and with gradients that travel from the backward pass on."""
    plain = train(False, **kwargs)
    before = early_of(None).num_used if collectives.world_size() > 1 else 0
    assert_same(train(False, overlap=True, **kwargs), plain)
    if collectives.world_size() > 1:
        assert early_of(None).num_used - before == wanted_uses, early_of(None).num_used - before
    # With ids ahead in the same channel.
    assert_same(train(True, overlap=True, **kwargs), plain)


def early(name):
    """Run a check of ``rank_backward`` with gradients that travel from the backward pass on."""
    before = overlap_backward()
    try:
        first = DynamicEmbedding(1, name="first")
        sparse = optim.SparseSGD([first.table], lr=1.0)
        first(torch.tensor([1])).sum().backward()
        sparse.step()  # it opens the channel
        assert channel_of(None).is_open
        getattr(rank_backward, name)()
    finally:
        overlap_backward(before)


def disturbances():
    """Batches that are skipped, changed, evaluated before, or looked ahead by some ranks only."""
    rank = distributed.get_rank()

    def evaluate(step, model, batch):
        model.eval()
        with torch.no_grad():
            for _ in range(rank + 1):
                model(local_batch(step + 1))
        finish_evaluation(model)
        model.train()
        return batch

    def change(step, model, batch):
        if step == 4 or (step == 5 and rank):  # once on all ranks, once on one
            return {**batch, "user": batch["user"] + 1}
        return batch

    def replace(step, model, batch):
        return local_batch(step + 20) if step in (3, 4) else batch

    def copy(step, model, batch):
        return {name: torch.clone(v) if torch.is_tensor(v) else v for name, v in batch.items()}

    def read_early(step, model, batch):  # rank 0 begins more than the others
        if step == 3 and rank == 0:
            look_ahead((model.user, local_batch(50)["user"]))
            look_ahead((model.user, torch.tensor([0.5])))  # no ids: the lookup would say so
        return batch

    # Two modules, and six batches of eight: the first asks for the channel, the second has it.
    same_with_and_without(12, disturb=evaluate)
    same_with_and_without(14 - 2, disturb=change)
    same_with_and_without(14 - 4, disturb=replace)
    same_with_and_without(14, disturb=copy)
    same_with_and_without(14, disturb=read_early)


def passes_in_another_order():
    """One rank ends a pass before it looks up the second module, the other after: both see all."""
    rank, ids = distributed.get_rank(), torch.arange(6)
    before = overlap_backward()
    try:
        a, b = DynamicEmbedding(1, name="a"), DynamicEmbedding(1, name="b")
        sparse = optim.SparseSGD([a.table, b.table], lr=1.0)
        rows = None
        for _ in range(12):
            first = a(ids)
            if rows is not None:
                assert torch.equal(first.detach(), rows - 1)
            rows = first.detach().clone()
            if rank == 0:
                first.sum().backward()
            second = b(ids)
            if rank == 0:
                second.sum().backward()
            else:
                (first.sum() + second.sum()).backward()
            sparse.step()
    finally:
        overlap_backward(before)


def only_one_rank():
    """One rank alone looks ahead: nobody uses it, and nobody waits."""
    plain = train(False)
    begin, before = time.monotonic(), prepared_of(None).num_used
    assert_same(train(distributed.get_rank() == 0), plain)
    assert prepared_of(None).num_used == before
    assert time.monotonic() - begin < 15
