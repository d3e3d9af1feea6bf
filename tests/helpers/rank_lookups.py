"""What ranks run in the tests of single lookups of sharded tables."""

import os
import time

import torch
from torch import distributed

from recis_lightning import DynamicEmbedding, DynamicEmbeddingBag, EmbeddingEngine, EmbeddingOption
from recis_lightning.admission import MinCount, ReadOnly
from recis_lightning.distributed import collectives
from recis_lightning.distributed.ownership import owner_of
from recis_lightning.eviction import GlobalStepFilter
from recis_lightning.initializers import Normal, Uniform
from recis_lightning.lookup import finish_evaluation
from recis_lightning.ops import backend
from recis_lightning.optim import SparseAdam, SparseSGD
from recis_lightning.table.listing import hash_tables
from tests.helpers.rank_pool import set_timeout
from tests.helpers.sample_tables import EXTREMES

IDS = torch.cat([EXTREMES, torch.arange(100, 131)])


def rank():
    return distributed.get_rank() if collectives.world_size() > 1 else 0


def initial_rows(dtype, which="cpu"):
    """Return the first rows of ids that every rank asks for in an order of its own."""
    with backend.use(which):
        module = DynamicEmbedding(6, initializer=Uniform(-1, 1), dtype=dtype, name="t", seed=3)
        order = torch.randperm(len(IDS), generator=torch.Generator().manual_seed(rank()))
        rows = module(IDS[order]).detach()
        assert len(module.table) == int((owner_of(IDS, collectives.world_size()) == rank()).sum())
        return rows[order.argsort()].float().numpy()


def evaluation():
    """Known rows on all ranks, zeros for unknown ids, and no change."""
    module = DynamicEmbedding(3, name="t", eviction=GlobalStepFilter(5))
    mine = IDS[rank() :: collectives.world_size()]
    with torch.no_grad():
        trained = module(mine)
    table, held = module.table, len(module.table)
    table.update_step(7)
    module.eval()
    rows = module(IDS)
    assert not rows.requires_grad
    assert torch.equal(rows[rank() :: collectives.world_size()], trained)
    assert rows.any(1).all()
    assert not module(torch.tensor([[-77], [78]])).any()
    assert module(torch.empty(0, 2, dtype=torch.int64)).shape == (0, 2, 3)
    assert len(table) == held
    assert (table.last_seen(table.ids()) == 0).all()
    # A rank that is done answers those that are not.
    more = [module(IDS[:1]) for _ in range(rank())]
    finish_evaluation(module)
    finish_evaluation(module)
    module.train()
    return len(more) + len(module(IDS)) - len(IDS)


def weight_gradients():
    """Gradients of per-sample weights are this rank's own, not averaged here: DDP's work."""
    module = DynamicEmbeddingBag(4, mode="sum", initializer=Normal(std=1.0), name="t")
    weights = torch.rand(2, 5, requires_grad=True)
    ids = IDS[10 * rank() : 10 * rank() + 10].view(2, 5)
    out = module(ids, per_sample_weights=weights)
    rows = module.eval()(ids.view(-1, 1)).view(2, 5, 4)
    torch.testing.assert_close(out, (rows * weights[..., None]).sum(1))
    factors = torch.randn(out.shape)
    (out * factors).sum().backward()
    torch.testing.assert_close(weights.grad, (rows * factors[:, None]).sum(2))


def unused_outputs():
    """Rows are left alone where no rank has a gradient for them."""
    engine = EmbeddingEngine({name: EmbeddingOption(2) for name in ("a", "b", "c")})
    sparse = SparseAdam(hash_tables(engine), lr=0.1)
    ids = {"a": IDS[:4], "b": IDS[4:8], "c": IDS[8:12] + 100 * rank()}
    sum(value.sum() for value in engine(ids).values()).backward()
    sparse.step()
    before = {name: _everywhere(engine, name, ids) for name in ids}
    out = engine(ids)
    (out["a"].sum() + (out["c"].sum() if rank() == 1 else 0)).backward()
    sparse.step()
    after = {name: _everywhere(engine, name, ids) for name in ids}
    assert [table.num_updates for table in hash_tables(engine)] == [2, 1, 2]
    assert not torch.equal(before["a"], after["a"])
    assert torch.equal(before["b"], after["b"])
    # Rank 0's ids of "c" had no gradient: unlike zeros, none moves nothing.
    assert torch.equal(before["c"], after["c"]) == (rank() == 0)


def _everywhere(engine, name, ids):
    engine.eval()
    found = engine(ids)[name].clone()
    engine.train()
    return found


def inserted_rows():
    """What every rank inserts is there once; deleting and clearing are a rank's own."""
    module = DynamicEmbedding(2, name="t")
    module.table.insert(IDS, IDS[:, None].expand(-1, 2).clamp(-99, 99).float())
    assert torch.equal(module.table.ids(all_ranks=True), IDS.sort().values)
    with torch.no_grad():
        module(IDS[:1])
    assert torch.equal(module.table.ids(all_ranks=True), IDS.sort().values)
    mine = IDS[owner_of(IDS, collectives.world_size()) == rank()]
    assert set(module.table.ids().tolist()) == set(mine.tolist())
    found = module.eval()(IDS)
    assert torch.equal(found, IDS[:, None].expand(-1, 2).clamp(-99, 99).float())
    finish_evaluation(module)


def joined_outputs():
    """One joined output is what torch joins, to the bit: values, rows and optimizer state."""
    results = []
    for joins in (True, False):
        options = {
            "a": EmbeddingOption(4),
            "b": EmbeddingOption(3, mode="sum"),
            "c": EmbeddingOption(4, table="a", mode="tile", tile_len=2),
            "d": EmbeddingOption(4, trainable=False),
            "e": EmbeddingOption(4, dtype="bfloat16", mode="mean"),
        }
        engine = EmbeddingEngine(options)
        sparse = SparseAdam(hash_tables(engine), lr=0.1)

        def look_up(features, engine=engine, joins=joins):
            if joins:
                return engine.concat(features)
            return torch.cat([*engine(features).values()], 1)

        found = []
        for step in range(4):
            size = 0 if step == 2 and rank() == 1 else 4 + rank()
            bags = IDS.roll(3 * step + rank())[: 2 * size].view(size, 2)
            features = {"a": bags[:, 0], "b": bags, "c": bags.flip(1), "d": bags[:, 1], "e": bags}
            found.append(look_up(features))
            (found[-1] * torch.arange(float(found[-1].shape[1]))).sin().sum().backward()
            sparse.step()
        engine.eval()
        with torch.no_grad():
            found += [look_up(features) for _ in range(1 + rank())]
        finish_evaluation(engine)
        for table in hash_tables(engine):
            found.append(table.embeddings(table.ids()).float())
        results.append(found)
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
    assert len(results[0][-1])


def features_that_differ():
    """Read-only, counting and frozen features of one table, and ranks that lack some of them."""
    options = {
        "reads": EmbeddingOption(2, table="t", admission=ReadOnly()),
        "counts": EmbeddingOption(2, table="t", admission=MinCount(3)),
        "frozen": EmbeddingOption(2, table="t", trainable=False, mode="sum"),
    }
    engine = EmbeddingEngine(options)
    table = engine.tables["t"]
    sparse = SparseSGD(hash_tables(engine), lr=1.0)
    given = {"reads": torch.tensor([1, 2, 4, 2]), "counts": torch.tensor([2, 2, 3])}
    if rank() == 0:
        given["frozen"] = torch.tensor([[4, 5]])
    out = engine(given)
    assert list(out) == list(given)
    ids = torch.tensor([1, 2, 3, 4, 5])
    # Two ranks have id 2 four times; those of rank 0 only insert 4 and 5.
    known = _everywhere(engine, "reads", {"reads": ids}).any(1).tolist()
    assert known == [False, True, False, True, True]
    assert not out["reads"].any()
    assert out["counts"].any(1).tolist() == [True, True, False]
    rejected = collectives.sum_over_ranks(torch.tensor(table.statistics().refused))
    assert int(rejected) == 10
    again = engine(given)
    assert again["reads"].any(1).tolist() == [False, True, True, True]
    before = _everywhere(engine, "reads", {"reads": ids})
    (again["reads"].sum() + sum(o.sum() for o in again.values())).backward()
    sparse.step()
    drop = torch.tensor([0.0, 2 * 2 + 2, 1.0, 2.0, 0.0])
    after = _everywhere(engine, "reads", {"reads": ids})
    torch.testing.assert_close(before - after, drop[:, None].expand(5, 2))


def gradients_are_averaged():
    """As DDP has it: the mean over ranks, also where ranks ask unequally often."""
    module = DynamicEmbedding(2, name="t")
    sparse = SparseSGD([module.table], lr=1.0)
    ids = IDS[:3].repeat(rank() + 1)
    before = module(ids)
    (before * (rank() + 1)).sum().backward()
    sparse.step()
    # Rank r adds (r + 1) occurrences with a gradient of r + 1 each.
    mean = sum((r + 1) ** 2 for r in range(collectives.world_size())) / collectives.world_size()
    after = module.eval()(ids)
    torch.testing.assert_close(after, before.detach() - mean)
    finish_evaluation(module)


def different_lookups():
    """One rank trains while another evaluates: both are told."""
    module = DynamicEmbedding(2, name="t")
    module(IDS)
    try:
        DynamicEmbedding(2, name=f"t{rank()}")(IDS)
    except RuntimeError as error:
        return str(error)
    return ""


def refused_copies():
    """Of a table on several ranks a state dict would hold one shard."""
    module = DynamicEmbedding(2, name="t")
    module(IDS)
    try:
        module.state_dict()
    except RuntimeError as error:
        return str(error)
    return ""


def dying(how, timeout_s):
    """Rank 1 goes away in the middle of training; the others must not wait for ever."""
    module = DynamicEmbedding(2, name="t")
    module(IDS)
    set_timeout(timeout_s)
    if rank() == 1:
        if how == "dies":
            os._exit(9)
        time.sleep(2 * timeout_s)
    start = time.monotonic()
    try:
        module(IDS)
    except RuntimeError as error:
        return time.monotonic() - start, str(error)
    return None
