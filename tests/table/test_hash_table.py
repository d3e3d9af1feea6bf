"""HashTable: rows by id, what it tells of itself, and what it refuses."""

import copy
import gc
import pickle

import pytest
import torch

from recis_lightning import DynamicEmbedding, HashTable
from recis_lightning.admission import ReadOnly
from recis_lightning.eviction import GlobalStepFilter
from recis_lightning.initializers import Constant, Normal
from recis_lightning.optim import SparseSGD
from recis_lightning.table.hash_table import live_hash_tables
from tests.helpers.sample_tables import EXTREMES, filled, trained


def test_every_int64_is_an_id():
    """The whole range is legal, the index's own sentinel included."""
    table = HashTable(2)
    values = torch.arange(18.0).view(9, 2)
    table.insert(EXTREMES, values)
    assert len(table) == 9
    assert sorted(table.ids().tolist()) == sorted(EXTREMES.tolist())
    assert torch.equal(table.embeddings(EXTREMES), values)
    assert torch.equal(table.embeddings(EXTREMES // 3 + 5), torch.zeros(9, 2))
    assert table.delete(EXTREMES[:2]) == 2
    assert torch.equal(table.embeddings(EXTREMES[:3]), values[:3] * torch.tensor([[0], [0], [1]]))
    assert len(table) == 7


def test_ids_come_in_the_order_of_their_rows():
    """Rows are handed out by first sight, so ids() lists them so."""
    table = HashTable(2)
    table.insert(torch.tensor([9, 4, 9, 7]), torch.zeros(4, 2))
    ids, rows = table.ids_map()
    assert ids.tolist() == table.ids().tolist() == [9, 4, 7]
    assert rows.tolist() == [0, 1, 2]


def test_embeddings_keep_the_shape_of_the_ids_and_change_nothing():
    """Reading is reading: no rows, no stamps, no gradient."""
    table = filled(eviction=GlobalStepFilter(1))
    table.update_step(3)
    out = table.embeddings(torch.tensor([[4, 77], [0, 1]]))
    assert out.tolist() == [[[4.0] * 3, [0.0] * 3], [[0.0] * 3, [1.0] * 3]]
    assert not out.requires_grad
    assert table.embeddings(torch.tensor(2)).tolist() == [2.0] * 3
    assert table.embeddings(torch.empty(0, 2, dtype=torch.int64)).shape == (0, 2, 3)
    assert len(table) == 5
    assert table.last_seen(torch.tensor([4, 77])).tolist() == [0, -1]


def test_insert_takes_the_last_of_two_and_keeps_optimizer_state():
    """Setting weights is not training: moments stay, and the last row of an id counts."""
    module, _ = trained()
    table, ids = module.table, EXTREMES[[5, 5]]
    before = table.get_extra_state()["slots"]["exp_avg"]
    table.insert(ids, torch.tensor([[1.0] * 3, [2.0] * 3]))
    assert table.embeddings(ids[:1]).tolist() == [[2.0] * 3]
    assert torch.equal(table.get_extra_state()["slots"]["exp_avg"], before)
    assert table.last_seen(ids[:1]).item() == table.step


@pytest.mark.parametrize("num_rows", [0, 3, 1000])
def test_insert_keeps_the_last_sight_of_known_and_new_ids(num_rows):
    """Whatever the table's size beside the call's, and new rows start with empty state."""
    table = HashTable(2, name="user")
    table.storage.set_slots({"sum": 1}, 0.5)
    table.insert(torch.arange(num_rows), torch.zeros(num_rows, 2))
    ids = torch.tensor([7, 1, 7, 5000, 1, 5000, 2])
    table.insert(ids, torch.arange(7.0)[:, None].expand(7, 2))
    wanted = torch.tensor([[2.0], [4.0], [5.0], [6.0]]).expand(4, 2)
    asked = torch.tensor([7, 1, 5000, 2])
    assert torch.equal(table.embeddings(asked), wanted)
    assert torch.equal(
        table.storage.rows.read(table._find(asked))[1]["sum"], torch.full((4, 1), 0.5)
    )


def test_insert_overrules_admission():
    """An admission policy is about lookups; insert is an order."""
    table = HashTable(2, admission=ReadOnly())
    table.insert(torch.tensor([3]), torch.ones(1, 2))
    assert len(table) == 1


def test_growth_keeps_every_row():
    """Index and rows grow many times over without losing or mixing up anything."""
    table = HashTable(5)
    ids = torch.randperm(20_000, generator=torch.Generator().manual_seed(0)) * 7919 - 10**9
    values = torch.randn(20_000, 5)
    for start in range(0, 20_000, 997):
        table.insert(ids[start : start + 997], values[start : start + 997])
    assert len(table) == 20_000
    assert table.capacity >= 20_000
    assert table.nbytes >= 20_000 * (5 * 4 + 16)
    assert torch.equal(table.embeddings(ids), values)


def test_freed_rows_are_reused_first_and_start_afresh():
    """A table that loses and gains ids in equal number does not grow."""
    table = filled(initializer=Constant(9.0))
    rows = dict(zip(*(x.tolist() for x in table.ids_map()), strict=True))
    table.delete(torch.tensor([1, 3]))
    table.insert(torch.tensor([50, 51, 52]), torch.ones(3, 3))
    new = dict(zip(*(x.tolist() for x in table.ids_map()), strict=True))
    assert {new[50], new[51]} == {rows[1], rows[3]}
    assert new[52] == 5


def test_clear_leaves_step_and_optimizer():
    """After clear the table is empty, trains on, and ids start from their initial rows."""
    module, sparse = trained(SparseSGD)
    table = module.table
    first = DynamicEmbedding(3, name="t")(EXTREMES)
    table.clear()
    assert len(table) == 0
    assert table.step == 4
    assert torch.equal(module(EXTREMES), first)
    module(EXTREMES).sum().backward()
    sparse.step()
    torch.testing.assert_close(table.embeddings(EXTREMES), first - 0.1)


def test_last_seen_needs_a_policy_that_keeps_it():
    """Columns exist where a policy asks for them."""
    with pytest.raises(RuntimeError, match=r"'t' keeps no last_seen.*GlobalStepFilter"):
        filled().last_seen(torch.tensor([1]))


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"embedding_dim": -1}, ValueError, "embedding_dim: expected an int >= 1, got -1"),
        ({"embedding_dim": 0}, ValueError, "embedding_dim: expected an int >= 1, got 0"),
        ({"embedding_dim": 2.0}, TypeError, r"embedding_dim: expected an int >= 1, got 2\.0"),
        ({"embedding_dim": True}, TypeError, "embedding_dim: expected an int >= 1, got True"),
        ({"dtype": torch.float64}, ValueError, "dtype: expected torch.float32 or.*got.*float64"),
        ({"dtype": "int8"}, ValueError, "dtype: expected torch.float32 or.*got 'int8'"),
        ({"device": "meta"}, ValueError, r"device: .*\['cpu', 'cuda'\].*got 'meta'"),
        ({"initializer": 0.1}, TypeError, r"initializer: expected Initializer, got 0\.1"),
        ({"eviction": 5}, TypeError, "eviction: expected .*Eviction.*, got 5"),
        ({"admission": ReadOnly}, TypeError, "admission: expected .*Admission"),
        ({"seed": "x"}, TypeError, "seed: expected int, got 'x'"),
        ({"name": 3}, TypeError, r"name: expected a str, got int \(3\)"),
    ],
)
def test_wrong_arguments(arguments, error, words):
    """An error names the argument, the value got and what was expected."""
    with pytest.raises(error, match=words):
        HashTable(**{"embedding_dim": 4, **arguments})


@pytest.mark.parametrize("method", ["embeddings", "delete", "last_seen"])
@pytest.mark.parametrize("ids", [torch.tensor([1.0]), torch.tensor([1], dtype=torch.int16), [1]])
def test_ids_must_be_int64_tensors(method, ids):
    """Other dtypes are refused rather than converted in silence."""
    table = filled(eviction=GlobalStepFilter(1))
    with pytest.raises(TypeError, match=r"ids: expected .*int64.*, got (torch|list)"):
        getattr(table, method)(ids)


def test_int32_ids_are_widened():
    """By every method that takes ids."""
    table = filled(eviction=GlobalStepFilter(1))
    table.clear()
    ids = torch.tensor([3, -4], dtype=torch.int32)
    table.insert(ids, torch.ones(2, table.embedding_dim))
    assert sorted(table.ids().tolist()) == [-4, 3]
    assert (table.embeddings(ids) == 1).all()
    assert table.last_seen(ids).tolist() == [0, 0]
    table.pin(ids)
    assert table.pinned.tolist() == [-4, 3]
    table.unpin(ids)
    assert table.pinned.tolist() == []
    assert table.delete(ids) == 2


def test_insert_checks_shapes():
    """Rows must fit ids and dim."""
    with pytest.raises(ValueError, match=r"embeddings: expected shape \(2, 3\), got \(2, 4\)"):
        filled().insert(torch.tensor([1, 2]), torch.ones(2, 4))
    for rows, got in ([[1.0, 2.0, 3.0]], "list"), (torch.ones(1, 3) * 1j, "torch.complex64"):
        with pytest.raises(TypeError, match=f"embeddings: expected a Tensor .*, got {got}"):
            filled().insert(torch.tensor([1]), rows)


def test_live_tables_are_those_alive():
    """A table that nobody holds is not filtered by a hand-written loop."""
    gc.collect()
    table = HashTable(2)
    assert table in live_hash_tables()
    number = len(live_hash_tables())
    del table
    gc.collect()
    assert len(live_hash_tables()) == number - 1


def test_an_empty_table_is_true_and_a_module_without_tensors():
    """Its tensors are neither parameters nor buffers: they grow, and DDP must leave them.

    The one parameter has no elements: by it autograd, optimizers and DDP know the table.
    """
    table = filled()
    assert HashTable(2)
    assert [parameter.numel() for parameter in table.parameters()] == [0]
    assert not list(table.buffers())
    assert list(table.state_dict()) == ["_extra_state"]
    assert "t" in repr(table)


@pytest.mark.parametrize("change", ["clear", "delete", "evict", "load"])
def test_backward_through_rows_that_are_gone_is_an_error(change):
    """Rows may be another id's by then: the gradient must not reach them."""
    module, sparse = trained()
    table, loss = module.table, module(EXTREMES).sum()
    if change == "clear":
        table.clear()
    elif change == "delete":
        table.delete(EXTREMES[:1])
    elif change == "load":
        module.load_state_dict(module.state_dict())
    else:
        table.update_step(100)
        assert table.evict() == 9
    with pytest.raises(RuntimeError, match="'t' lost rows between a lookup and its backward"):
        loss.backward()
    sparse.step()


def test_saving_is_refused_on_several_ranks(monkeypatch):
    """It would keep rank 0's shard alone; a copy of a model within its rank is fine."""
    module, _ = trained()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda *_: 2)
    with pytest.raises(RuntimeError, match="saving a table on 2 ranks: each has a shard"):
        module.state_dict()
    copied = copy.deepcopy(module.table)
    assert torch.equal(copied.ids(), module.table.ids())


def test_initial_rows_depend_on_seed_name_and_id_only():
    """Neither the order of insertion nor the other ids matter."""
    ids = torch.tensor([5, -(2**63), 2**63 - 1, -1])

    def rows(name="a", seed=0, order=slice(None)):
        module = DynamicEmbedding(4, name=name, seed=seed, initializer=Normal(std=1.0))
        module(ids[order])
        module(torch.arange(100))
        return module(ids)

    assert torch.equal(rows(), rows(order=[3, 1, 0, 2]))
    assert not torch.equal(rows(), rows(name="b"))
    assert not torch.equal(rows(), rows(seed=1))
    assert rows().unique().numel() == 16


@pytest.mark.parametrize("generations", [1, 2])
def test_rows_of_copies_begin_alike(generations):
    """Of copies of one table, and of copies of copies, though none has a name."""
    table = HashTable(4, initializer=Normal(std=1.0))
    twins = [copy.deepcopy(table) for _ in range(2)]
    if generations == 2:
        twins = [copy.deepcopy(twin) for twin in twins]
    rows = [one(torch.arange(5)) for one in (table, *twins)]
    assert torch.equal(rows[0], rows[1])
    assert torch.equal(rows[0], rows[2])
    assert not torch.equal(rows[0], HashTable(4, initializer=Normal(std=1.0))(torch.arange(5)))


def test_a_table_can_be_called():
    """As ``DynamicEmbedding`` looks up: rows and gradients in training, reading in evaluation."""
    table, module = HashTable(3, name="t"), DynamicEmbedding(3, name="t")
    ids = torch.tensor([[7, -1], [7, 2**62]])
    out = table(ids)
    assert torch.equal(out, module(ids))
    assert len(table) == 3
    sparse = SparseSGD([table], lr=1.0)
    before = table.embeddings(ids)
    out.sum().backward()
    sparse.step()
    drop = torch.tensor([[2.0, 1.0], [2.0, 1.0]])[..., None]
    torch.testing.assert_close(table.embeddings(ids), before - drop)
    table.eval()
    assert not table(torch.tensor([8])).any()
    assert not table(ids).requires_grad
    assert len(table) == 3
    twin = copy.deepcopy(table)
    assert torch.equal(twin(ids), pickle.loads(pickle.dumps(table))(ids))
    table.clear()
    assert torch.equal(twin(ids), twin.embeddings(ids))
    with pytest.raises(TypeError, match=r"ids: expected dtype torch\.int64"):
        table(ids.float())


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: HashTable(1000, 16), r"no num_embeddings: write HashTable\(16\)"),
        (lambda: HashTable(embedding_shape=[16]), "embedding_shape: .*; write embedding_dim="),
        (lambda: HashTable(4, initializer="xavier_uniform_"), r"write initializer=XavierUniform\("),
        (lambda: HashTable(4, initializer=torch.nn.init.normal_), r"write initializer=Normal\(\)"),
        (lambda: HashTable(4, admission="ReadOnly"), r"write admission=ReadOnly\(\)"),
        (lambda: HashTable(4, eviction=ReadOnly()), r"eviction: .*; write admission=ReadOnly\(\)"),
        (lambda: HashTable(4, eviction="never"), "eviction: expected Eviction, got 'never'$"),
        (lambda: HashTable(4).evict("max_rows"), r"policy: .*; write policy=MaxRows\(n=\.\.\.\)"),
        (lambda: HashTable(4, seed="1"), "seed: expected int, got '1'"),
        (lambda: HashTable(4, colour=1), r"colour: HashTable has none, only \['admission'"),
    ],
)
def test_wrong_arguments_are_told_what_to_write(make, words):
    with pytest.raises(TypeError, match=words):
        make()


@pytest.mark.parametrize("steps", [2**63, 2**64, -(2**64)])
def test_a_step_beyond_int64_is_refused(steps):
    """And the step stays."""
    table = HashTable(2)
    table.update_step(5)
    with pytest.raises(ValueError, match=r"n: expected an int that keeps the step below 2\*\*63"):
        table.update_step(steps)
    assert table.step == 5
    for part in (1.7, "3", None):
        with pytest.raises(TypeError, match="n: expected an int, got"):
            table.update_step(part)
    assert table.step == 5
    with pytest.raises(ValueError, match="seed: expected an int in"):
        HashTable(2, seed=2**64)


def test_an_empty_table_has_seen_nothing():
    table = HashTable(2, eviction=GlobalStepFilter(3))
    assert table.last_seen(torch.tensor([[1, 2]])).tolist() == [[-1, -1]]
    assert table.last_seen(torch.empty(0, dtype=torch.int64)).tolist() == []
