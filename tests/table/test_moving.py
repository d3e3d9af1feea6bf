"""Tables move between devices with all they hold; a GPU's way of keeping them is tried on the CPU.

``backend.use("triton")`` makes a table as it is beside a GPU, its header in two copies and nobody
waiting for kernels, over the CPU's memory.
"""

import copy

import numpy as np
import pytest
import torch

from recis_lightning import (
    DynamicEmbedding,
    EmbeddingEngine,
    EmbeddingOption,
    HashTable,
    hash_tables,
)
from recis_lightning.admission import BloomCount, MinCount, Probability
from recis_lightning.jagged import FeatureBags, Jagged, read_bags
from recis_lightning.lookup import transfer
from recis_lightning.lookup.current_groups import make_group
from recis_lightning.lookup.features import Feature
from recis_lightning.lookup.group import look_up_groups
from recis_lightning.ops import backend as ops_backend
from recis_lightning.ops import layout as fields
from recis_lightning.ops.gpu import embedding_bag as embedding_bag_gpu
from recis_lightning.ops.gpu import hash_insert as hash_insert_gpu
from recis_lightning.ops.header import Header
from recis_lightning.optim import SparseAdam, SparseRowwiseAdagrad, SparseSGD
from recis_lightning.table.row_store import RowStore
from tests.helpers.sample_tables import EXTREMES, by_id, same, trained

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("there", ["cpu", pytest.param("triton", marks=pytest.mark.interpreted)])
def test_a_table_moves_with_all_it_holds(there, dtype):
    """Rows, state, stamps and counts, there and back, and it trains on as if it had not moved."""
    module, optimizer = trained(dtype=dtype)
    stayed, its_optimizer = copy.deepcopy((module, optimizer))
    table = module.table
    held, statistics, header = by_id(table), table.statistics(), table.storage.header
    with ops_backend.use(there):
        table._move(CPU)
        assert table.storage.header.is_mirrored == (there == "triton")
        assert same(by_id(table), held)
        module(EXTREMES).float().sum().backward()
        optimizer.step()
    table._move(CPU)
    assert table.storage.header is not header
    assert not table.storage.header.is_mirrored
    stayed(EXTREMES).float().sum().backward()
    its_optimizer.step()
    ours, wanted = by_id(table), by_id(stayed.table)
    assert ours.keys() == wanted.keys()
    for name in ours:
        torch.testing.assert_close(
            ours[name], wanted[name], rtol=1e-2 if dtype != torch.float32 else 1e-5, atol=1e-6
        )
    assert (table.step, table.num_updates) == (stayed.table.step, stayed.table.num_updates)
    assert table.statistics().admitted == statistics.admitted + 2  # the lookup brought two
    assert table.statistics().evicted == statistics.evicted


def test_a_move_without_room_changes_nothing(monkeypatch):
    """The table goes on where it was."""
    module, optimizer = trained()
    table = module.table
    held, header = by_id(table), table.storage.header

    def no_room(*_):
        raise MemoryError("no room")

    monkeypatch.setattr(RowStore, "write", no_room)
    with pytest.raises(MemoryError, match="no room"):
        table._move(CPU)
    monkeypatch.undo()
    assert table.storage.header is header
    assert same(by_id(table), held)
    module(EXTREMES).sum().backward()
    optimizer.step()


def test_a_table_on_the_cpu_by_name_stays_there():
    """``device="cpu"`` holds when its module moves; without it a table moves, or says why not."""
    stays, follows = DynamicEmbedding(2, device="cpu"), DynamicEmbedding(2)
    stays.to("meta")
    assert stays(torch.tensor([3])).device == CPU
    with pytest.raises(ValueError, match=r"device: .*\['cpu', 'cuda'\].*'meta'"):
        follows.to("meta")


def test_a_gpu_table_without_a_gpu_says_so(monkeypatch):
    """The error names the argument, what it got and what would do."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device: torch finds no GPU here, got 'cuda:1'"):
        HashTable(2, device="cuda:1")


@pytest.mark.interpreted
@pytest.mark.parametrize("admission", [MinCount(3), BloomCount(3, 201, 3), Probability(0.3)])
def test_sightings_move_with_their_table(admission):
    """There and back, admitting on either side as if the table had not moved."""
    generator = torch.Generator().manual_seed(0)
    batches = torch.randint(0, 60, (6, 40), generator=generator)
    module, stayed = (DynamicEmbedding(2, admission=admission, name="t") for _ in range(2))
    for start, there in enumerate(("cpu", "triton", "cpu")):
        with ops_backend.use(there):
            module.table._move(CPU)
            assert module.table.storage.admission_counter.header.is_mirrored == (there == "triton")
            for batch in batches[2 * start : 2 * start + 2]:
                module(batch)
        for batch in batches[2 * start : 2 * start + 2]:
            stayed(batch)
    assert same(
        module.table.storage.admission_counter.state(),
        stayed.table.storage.admission_counter.state(),
    )
    assert torch.equal(module.table.ids().sort().values, stayed.table.ids().sort().values)
    assert module.table.statistics().refused == stayed.table.statistics().refused > 0


def _crossing_group(trainable):
    options = [HashTable(3, name=name, trainable=trainable) for name in "ab"]
    group = make_group([Feature("a", options[0], "sum"), Feature("b", options[1], "none")])
    weights = torch.tensor([0.5, -2.0, 1.0, 3.0], requires_grad=True)
    jagged = Jagged(torch.tensor([5, 6, 5, 9]), torch.tensor([0, 1, 1, 4]), weights)
    bags = FeatureBags.of([read_bags(jagged, "a"), read_bags(torch.tensor([[7, 8]]), "b")])
    return group, bags, weights


def _look_up(group, bags):
    return look_up_groups([group], [bags], training=True)[0]


def _look_up_from_device(group, bags):
    """Look up as for a model on a GPU."""
    outputs = _look_up(group, transfer.bags_from_device(bags, CPU))
    return transfer.outputs_to_device(outputs, CPU)


def test_lookups_from_afar_are_those_from_near():
    """Outputs, gradients of rows and of weights cross as they are; here from the CPU to itself."""
    results = []
    for look_up in (_look_up, _look_up_from_device):
        group, bags, weights = _crossing_group(True)
        optimizer = SparseSGD(group.layout.tables, lr=1.0)
        outputs = look_up(group, bags)
        sum(out.square().sum() for out in outputs).backward()
        optimizer.step()
        results.append(
            [*outputs, weights.grad, *(t.embeddings(t.ids()) for t in group.layout.tables)]
        )
    for near, afar in zip(*results, strict=True):
        assert torch.equal(near, afar)
    copies = transfer.bags_from_device(bags, CPU)
    assert copies[1].ids.data_ptr() != bags[1].ids.data_ptr()


def _no_waiting(*_):
    raise AssertionError("the host waited for the device")


@pytest.mark.interpreted
@pytest.mark.parametrize("optimizer", [SparseSGD, SparseRowwiseAdagrad])
@pytest.mark.parametrize("dim", [3, 8])
def test_rows_beside_a_gpu_lie_at_multiples_of_16_bytes(dim, optimizer):
    """Whatever the optimizer's state: kernels load four words at once."""
    with ops_backend.use("triton"):
        table = HashTable(dim)
        optimizer([table], lr=0.1)
        table.storage.reserve_rows(5000)
        header = table.storage.header.fields
        assert header[fields.ROW_BYTES] % 16 == 0
        assert not (table.storage.rows.addresses % 16).any()
    assert HashTable(3).storage.rows.row_words == 3


@pytest.mark.parametrize(
    ("addresses", "strides", "row_bytes", "aligned"),
    [
        ([64, 4096], [16, 32], 16, True),
        ([64, 4100], [16, 32], 16, False),
        ([64, 4096], [16, 36], 16, False),
        ([64, 4096], [48, 48], 12, False),  # tiles: four rows of them would begin together again
    ],
)
def test_lanes_load_four_words_only_where_all_of_them_can(addresses, strides, row_bytes, aligned):
    """One output, or gradient, that lies askew is enough: a GPU refuses to load there."""
    plan = np.zeros((2, fields.PLAN_SIZE), np.int64)
    plan[:, fields.PLAN_DATA], plan[:, fields.PLAN_DATA_STRIDE] = addresses, strides
    assert embedding_bag_gpu.is_aligned(plan, row_bytes) == aligned


@pytest.mark.interpreted
def test_a_steady_training_step_waits_for_nothing(monkeypatch):
    """Once there is room for what lookups may bring, no count is read from the device."""
    with ops_backend.use("triton"):
        options = {"one": EmbeddingOption(4), "bags": EmbeddingOption(4, mode="mean")}
        engine = EmbeddingEngine(options)
        optimizer = SparseAdam(hash_tables(engine), lr=0.1)
        generator = torch.Generator().manual_seed(0)

        def step():
            ids = torch.randint(0, 300, (2, 40), generator=generator)
            out = engine({"one": ids[0], "bags": ids.view(16, 5)})
            sum(part.sum() for part in out.values()).backward()
            optimizer.step()

        for _ in range(12):
            step()
        before = len(engine.tables["one"])
        with monkeypatch.context() as patched:
            patched.setattr(hash_insert_gpu, "_count_distinct", _no_waiting)
            patched.setattr(Header, "read_counts", _no_waiting)
            for _ in range(6):
                step()
        assert len(engine.tables["one"]) > before  # ids came all the while
