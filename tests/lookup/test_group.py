"""LookupGroup under threads, and where tensors have no data; all is checked before a change."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch._subclasses import FakeTensorMode

from recis_lightning import (
    DynamicEmbedding,
    DynamicEmbeddingBag,
    EmbeddingEngine,
    EmbeddingOption,
    HashTable,
    Jagged,
    hash_tables,
)
from recis_lightning.eviction import GlobalStepFilter
from recis_lightning.initializers import Constant
from recis_lightning.optim import SparseSGD
from recis_lightning.table.lock import TableLock

KNOWN = torch.arange(1000)
THREADS = 4


def in_threads(work, *others):
    """Run ``work(number)`` in several threads at once, and others beside them, and raise errors."""
    tasks = [lambda number=number: work(number) for number in range(THREADS)] + list(others)
    barrier = threading.Barrier(len(tasks))

    def start(task):
        barrier.wait()
        return task()

    with ThreadPoolExecutor(len(tasks)) as pool:
        return [future.result() for future in [pool.submit(start, task) for task in tasks]]


def written(table):
    """Write to each known id's row its id."""
    table.insert(KNOWN, KNOWN.float()[:, None].expand(-1, table.embedding_dim))


def one(module):
    return lambda ids: module(ids)[:, 0]


def bag(module):
    """Pool each id and its successor."""
    return lambda ids: (
        module(torch.stack([ids, ids.roll(1)], 1).flatten(), torch.arange(len(ids)) * 2)[:, 0]
        - ids.roll(1)
    )


def engine_of(module):
    def look_up(ids):
        offsets = torch.tensor([0, len(ids)])
        out = module({"a": ids, "b": Jagged(ids, offsets), "c": ids[:1].expand(3, 2)})
        assert out["b"].sum() == ids.sum() * out["b"].shape[1]
        assert (out["c"] == ids[0]).all()
        return out["a"][:, 0]

    return look_up


MODULES = {
    "embedding": (lambda: DynamicEmbedding(8, name="one"), one),
    "bag": (lambda: DynamicEmbeddingBag(8, mode="sum", name="bag"), bag),
    "engine": (
        lambda: EmbeddingEngine(
            {
                "a": EmbeddingOption(8, table="t"),
                "b": EmbeddingOption(8, table="t", mode="sum"),
                "c": EmbeddingOption(4),
            }
        ),
        engine_of,
    ),
}


@pytest.mark.parametrize("kind", MODULES)
def test_threads_evaluate_one_module(kind):
    """Each gets the rows of its own batches, whatever their sizes are."""
    make, asks = MODULES[kind]
    module = make().eval()
    for table in hash_tables(module):
        written(table)
    look_up = asks(module)

    def evaluate(number):
        sizes = torch.Generator().manual_seed(number)
        for _ in range(60):
            size = int(torch.randint(1, 900, (1,), generator=sizes))
            ids = torch.randint(1000, (size,), generator=sizes)
            assert torch.equal(look_up(ids), ids.float())

    in_threads(evaluate)


def test_threads_evaluate_while_another_trains_and_evicts():
    """Growth and eviction replace memory; nobody reads what is gone."""
    module = DynamicEmbedding(8, name="both", eviction=GlobalStepFilter(1))
    written(module.table)
    module.table.pin(KNOWN)
    other = DynamicEmbedding(8, name="both")
    other.table = module.table
    other.eval()

    def train():
        for step in range(40):
            module(torch.arange(step * 5000, (step + 1) * 5000) + 10_000)
            module.table.update_step()
            if step % 10 == 9:
                module.table.evict()

    def evaluate(number):
        for _ in range(60):
            ids = KNOWN[number :: number + 1]
            assert torch.equal(other(ids)[:, 0], ids.float())
            assert torch.equal(module.table.embeddings(ids)[:, 0], ids.float())

    in_threads(evaluate, train)
    assert set(KNOWN.tolist()) <= set(module.table.ids().tolist())


def test_threads_train_one_after_the_other():
    """No row and no gradient is lost, with steps in between."""
    module = DynamicEmbedding(4, name="trained", initializer=Constant(0.0))
    optimizer = SparseSGD([module.table], lr=1.0)

    def train(number):
        ids = torch.arange(number * 500, number * 500 + 500 + 10 * number)
        for _ in range(20):
            module(ids).sum().backward()
            optimizer.step()

    in_threads(train)
    optimizer.step()
    ids = torch.cat([torch.arange(n * 500, n * 500 + 500 + 10 * n) for n in range(THREADS)])
    distinct, counts = ids.unique(return_counts=True)
    assert torch.equal(module.table.ids().sort().values, distinct)
    assert torch.equal(module.table.embeddings(distinct)[:, 0], -20.0 * counts)


def test_tables_of_an_engine_share_a_lock():
    """A copy's do too, and they are not the original's."""
    engine = EmbeddingEngine({name: EmbeddingOption(4) for name in "abc"})
    copied = copy.deepcopy(engine)
    locks = [{table.lock for table in hash_tables(module)} for module in (engine, copied)]
    assert [len(lock) for lock in locks] == [1, 1]
    assert locks[0] != locks[1]
    engine.tables["b"] = HashTable(4, name="b")
    assert engine({name: KNOWN for name in "abc"})["b"].shape == (1000, 4)


def test_whoever_uses_a_table_of_two_engines_takes_its_lock(monkeypatch):
    """Putting it into another engine gives it that one's lock, whoever knows the one before."""
    one = EmbeddingEngine({name: EmbeddingOption(4) for name in "ab"})
    other = EmbeddingEngine({name: EmbeddingOption(4) for name in "ca"})
    batch = {name: KNOWN for name in "abc"}
    optimizer = SparseSGD(hash_tables(one), lr=1.0)
    for _ in range(2):
        outputs = one(batch)
        (outputs["a"].sum() + outputs["b"].sum()).backward()
        optimizer.step()
    outputs = one(batch)
    other.tables["a"] = table = one.tables["a"]
    other(batch)
    assert table.lock is other.tables["c"].lock
    begun, begin = [], TableLock.begin_write
    monkeypatch.setattr(TableLock, "begin_write", lambda lock: (begun.append(lock), begin(lock)))
    loss = outputs["a"].sum() + outputs["b"].sum()
    for use in (loss.backward, optimizer.step, lambda: one(batch)):
        begun.clear()
        use()
        assert table.lock in begun


def test_a_lookup_needs_data():
    """Vmap and FakeTensorMode are refused in words, and tensors that were made there."""
    module = DynamicEmbedding(4, name="data")
    engine = EmbeddingEngine({"f": EmbeddingOption(4), "g": EmbeddingOption(8, mode="sum")})
    with pytest.raises(RuntimeError, match=r"torch\.func .* cannot follow a lookup"):
        torch.func.vmap(module)(torch.arange(6).view(2, 3))
    with FakeTensorMode():
        fake = torch.arange(3)
        with pytest.raises(RuntimeError, match=r"ids: .* FakeTensorMode cannot follow a lookup"):
            module(fake)
    with pytest.raises(TypeError, match="ids: expected a Tensor with data, got a FakeTensor"):
        module(fake)
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        pytest.raises(RuntimeError, match="FakeTensorMode cannot follow a lookup"),
    ):
        engine({"f": KNOWN, "g": KNOWN})
    assert all(len(table) == 0 for table in [module.table, *hash_tables(engine)])


@pytest.mark.parametrize(
    "use",
    [
        lambda table: table.embeddings(KNOWN),
        lambda table: table.insert(KNOWN, torch.ones(1000, 4)),
        lambda table: table.delete(KNOWN),
        lambda table: HashTable(4),
        lambda table: table.ids(),
        lambda table: table.evict(),
        lambda table: table.clear(),
        lambda table: table.get_extra_state(),
        lambda table: copy.deepcopy(table),
        lambda table: table.to(torch.bfloat16),
        lambda table: table.optimizer.step(),
    ],
)
def test_a_table_needs_data(use):
    """As its lookups."""
    table = HashTable(4, name="data")
    optimizer = SparseSGD([table], lr=1.0)
    assert table.optimizer is optimizer
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        pytest.raises(RuntimeError, match="FakeTensorMode cannot follow a lookup"),
    ):
        use(table)
    assert len(table) == 0


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (Jagged(KNOWN[:3], torch.tensor([2, 0, 1])), r"g\.offsets: must .*lengths\?"),
        (Jagged(KNOWN[:3], torch.tensor([0, 4, 2, 3])), r"g\.offsets: .* got \[0, 4, 2, 3\]"),
        (Jagged(KNOWN[:3], torch.tensor([0, 3], device="meta")), "g: .* its offsets on meta"),
        (Jagged(KNOWN[:3], torch.tensor([0, 3]), torch.ones(3).to("meta")), "its weights on meta"),
        ((KNOWN[:3], torch.ones(3).to("meta")), "g: .* its weights on meta"),
        (KNOWN.to("meta"), "g: .* its ids on meta"),
    ],
)
@pytest.mark.parametrize("mode", ["none", "sum"])
@pytest.mark.parametrize("training", [True, False])
def test_all_groups_are_checked_before_any_changes(bad, words, mode, training):
    """An error in the second group leaves the first one's tables as they were."""
    options = {"f": EmbeddingOption(4), "g": EmbeddingOption(8, mode=mode)}
    engine = EmbeddingEngine(options).train(training)
    with pytest.raises(ValueError, match=words):
        engine({"f": KNOWN, "g": bad})
    assert all(len(table) == 0 for table in hash_tables(engine))
