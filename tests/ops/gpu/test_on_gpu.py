"""Tests that need a GPU: contention, parity with the CPU, determinism, memory, a Trainer."""

import copy
import io

import pytest
import torch
from hypothesis import settings

from benchmarks import (
    bench_cuda_step,
    bench_embedding_bag,
    bench_filter,
    bench_hash_index,
    bench_memory,
    bench_row_update,
    bench_training,
    harness,
)
from recis_lightning import (
    DynamicEmbedding,
    EmbeddingEngine,
    EmbeddingOption,
    HashTable,
    hash_tables,
)
from recis_lightning.admission import BloomCount, MinCount, Probability
from recis_lightning.callbacks import LoggerHook, ProfilerHook
from recis_lightning.eviction import GlobalStepFilter
from recis_lightning.initializers import Normal
from recis_lightning.optim import SparseAdam, SparseAdamW, SparseRowwiseAdagrad, SparseSGD
from tests.helpers.click_data import loader
from tests.helpers.lightning_model import Model, everything, trainer
from tests.helpers.no_host_sync import no_waiting_for_cuda
from tests.helpers.sample_tables import EXTREMES, by_id, filled, insert_initial, same, trained
from tests.table.test_hash_table_machine import TableAgainstDict

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*number of training batches"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no"),
]


def _first_appearances(ids):
    """Return the row of each id if rows are assigned as ids first appear."""
    rows = {}
    return torch.tensor([rows.setdefault(i, len(rows)) for i in ids.tolist()])


def _rows_of(table, ids):
    return table._find(ids).cpu()


@pytest.mark.parametrize("distinct", [1, 3, 100])
def test_a_million_duplicates_of_few_ids(distinct):
    """Many lanes claim one entry: each id gets one row, in the order of first appearance."""
    table = HashTable(4, device="cuda", name="t")
    ids = torch.randint(0, distinct, (1_000_000,), generator=torch.Generator().manual_seed(0))
    insert_initial(table, ids.cuda())
    assert len(table) == len(ids.unique())
    assert torch.equal(_rows_of(table, ids.cuda()), _first_appearances(ids))


def test_a_million_new_ids():
    """All ids are inserted at once, with the extremes of int64 among them."""
    table = HashTable(1, device="cuda", name="t")
    ids = torch.cat([EXTREMES, torch.randperm(1_000_000) * 7919 + 5])
    insert_initial(table, ids.cuda())
    assert len(table) == len(ids)
    assert torch.equal(_rows_of(table, ids.cuda()), torch.arange(len(ids)))


def test_blocks_racing_for_one_slot():
    """Ids whose search starts at one slot form one long run of entries, and none is lost."""
    table = HashTable(1, device="cuda", name="t")
    table.storage.reserve_ids(1 << 15)
    shift = 64 - (table.capacity.bit_length() - 1)
    candidates = torch.arange(1 << 24)
    mixed = candidates * (0x9E3779B97F4A7C15 - 2**64)
    mixed = (mixed ^ ((mixed >> 32) & 0xFFFFFFFF)) * (0xD6E8FEB86659FD93 - 2**64)
    slots = (mixed >> shift) & (table.capacity - 1)
    ids = candidates[slots == slots[0]].repeat(50)
    assert len(ids.unique()) > 100
    ids = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))]
    insert_initial(table, ids.cuda())
    assert torch.equal(_rows_of(table, ids.cuda()), _first_appearances(ids))


def test_rows_are_reused_under_churn():
    """50 rounds of insertion and deletion agree with a table on the CPU."""
    ours, wanted = HashTable(3, device="cuda", name="t"), HashTable(3, device="cpu", name="t")
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        ids = torch.randint(-5000, 5000, (4000,), generator=generator)
        gone = torch.randint(-5000, 5000, (2000,), generator=generator)
        for table in (ours, wanted):
            insert_initial(table, ids.to(table.device))
        assert torch.equal(_rows_of(ours, ids), _rows_of(wanted, ids))
        assert ours.delete(gone) == wanted.delete(gone)
    assert torch.equal(ours.storage.rows.free_rows.cpu(), wanted.storage.rows.free_rows)
    assert ours.storage.rows.num_rows == wanted.storage.rows.num_rows < 10_500


def _pair(optimizer, dtype=torch.float32, admission=None, **kwargs):
    engines = []
    for device in ("cuda", "cpu"):
        same = {"device": device, "dtype": dtype, "admission": admission}
        options = {
            "none": EmbeddingOption(16, table="a", **same),
            "sum": EmbeddingOption(16, table="a", mode="sum", **same),
            "mean": EmbeddingOption(16, mode="mean", padding_idx=0, **same),
            "tile": EmbeddingOption(7, mode="tile", tile_len=2, **same),
        }
        engines.append(EmbeddingEngine(options))
    return [(engine, optimizer(hash_tables(engine), lr=0.05, **kwargs)) for engine in engines]


def _batch(generator):
    ids = torch.randint(0, 300, (4, 64), generator=generator)
    return {"none": ids[0], "sum": ids[1].view(16, 4), "mean": ids[2].view(8, 8), "tile": ids[3:]}


def _step(engine, optimizer, batch, device):
    out = engine({name: part.to(device) for name, part in batch.items()})
    sum(part.float().square().sum() + part.float().sum() for part in out.values()).backward()
    optimizer.step()


@pytest.mark.parametrize("optimizer", [SparseSGD, SparseAdam, SparseAdamW])
def test_two_hundred_steps_agree_with_the_cpu(optimizer):
    """Weights and state stay near those of the CPU's table."""
    (ours, our_steps), (wanted, its_steps) = _pair(optimizer)
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        batch = _batch(generator)
        _step(ours, our_steps, batch, "cuda")
        _step(wanted, its_steps, batch, "cpu")
    for one, other in zip(hash_tables(ours), hash_tables(wanted), strict=True):
        one_state, other_state = one.get_extra_state(), other.get_extra_state()
        for state in (one_state, other_state):
            order = state["ids"].argsort()
            columns = {"weights": state["weights"], **state["slots"]}
            state["columns"] = {name: column[order] for name, column in columns.items()}
        assert torch.equal(one_state["ids"].sort().values, other_state["ids"].sort().values)
        for name, column in one_state["columns"].items():
            wanted_column = other_state["columns"][name]
            torch.testing.assert_close(column, wanted_column, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dim", [1, 6, 33, 100, 128, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_any_width_and_unaligned_gradients(dim, dtype):
    """Rows, outputs and gradients need not be aligned to 16 bytes."""
    results = []
    for device in ("cuda", "cpu"):
        module = DynamicEmbedding(dim, device=device, dtype=dtype, name="t")
        sparse = SparseRowwiseAdagrad(hash_tables(module), lr=0.1)
        ids = torch.arange(500, device=device) % 90
        for start in range(2):
            out = module(ids)
            wide = torch.ones(500, dim + 1, device=device)  # a view of it is unaligned
            out.float().backward(wide[:, start : start + dim])
            sparse.step()
        results.append(module.eval()(ids).float().cpu())
    torch.testing.assert_close(*results, rtol=2e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_evaluation_agrees_with_the_cpu(dtype):
    """One launch finds and gathers bags of all kinds, padding and unknown ids, in many programs."""
    (ours, _), (wanted, _) = _pair(SparseSGD, dtype)
    generator = torch.Generator().manual_seed(0)
    batch = _batch(generator)
    for engine, device in ((ours, "cuda"), (wanted, "cpu")):
        engine({name: part.to(device) for name, part in batch.items()})
        engine.eval()
    ids = torch.randint(-5, 300, (4, 60_000), generator=generator)
    batch = {
        "none": ids[0],
        "sum": ids[1].view(-1, 20),
        "mean": ids[2].view(-1, 3),
        "tile": ids[3:],
    }
    found = ours({name: part.cuda() for name, part in batch.items()})
    for name, out in wanted(batch).items():
        # One step of float32 may round to another bfloat16: compiled kernels divide and take roots
        # approximately, and fuse multiplications with additions.
        rtol = 1e-2 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(found[name].cpu(), out, rtol=rtol, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_runs_are_alike_bit_by_bit(dtype):
    """No result depends on the order in which blocks ran."""
    states = []
    for _ in range(2):
        engine, optimizer = _pair(SparseAdam, dtype)[0]
        generator = torch.Generator().manual_seed(0)
        for _ in range(20):
            _step(engine, optimizer, _batch(generator), "cuda")
        states.append([table.get_extra_state() for table in hash_tables(engine)])
    for one, other in zip(*states, strict=True):
        assert torch.equal(one["ids"], other["ids"])
        assert torch.equal(one["weights"], other["weights"])
        for name, slot in one["slots"].items():
            assert torch.equal(slot, other["slots"][name])


@pytest.mark.parametrize("admission", [None, MinCount(2), BloomCount(2, 4096), Probability(0.5)])
@pytest.mark.parametrize("clip", [None, 0.5])
def test_a_steady_step_waits_for_nothing(admission, clip):
    """Torch itself raises on a host sync; batches have new ids among known ones."""
    engine, optimizer = _pair(SparseAdam, admission=admission, clip_grad_norm=clip)[0]
    generator = torch.Generator().manual_seed(0)
    batches = [{name: part.cuda() for name, part in _batch(generator).items()} for _ in range(40)]
    for batch in batches[:30]:
        _step(engine, optimizer, batch, "cuda")
    torch.cuda.synchronize()
    with no_waiting_for_cuda():
        for batch in batches[30:]:
            _step(engine, optimizer, batch, "cuda")


def test_out_of_memory_names_the_table_and_changes_nothing():
    """The error names the table, its size and the request; the table still works."""
    table = filled(3, 1000, device="cuda")
    held = by_id_without_stamps(table)
    with pytest.raises(MemoryError, match=r"table 't', with 1000 rows in \d+ bytes, .* rows more"):
        table.storage.reserve_rows(1 << 44)
    with pytest.raises(MemoryError, match=r"table 't', .* an index of \d+ entries"):
        table.storage.reserve_ids(1 << 44)
    after = by_id_without_stamps(table)
    assert all(torch.equal(held[name], after[name]) for name in held)
    table.insert(torch.tensor([5000]), torch.ones(1, 3))
    assert len(table) == 1001


def by_id_without_stamps(table):
    state = table.get_extra_state()
    order = state["ids"].argsort()
    return {name: state[name][order] for name in ("ids", "weights")}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_trained_module_moves_there_and_back(dtype):
    """Rows, state and last-seen steps move with it, and it trains on either side."""
    module, optimizer = trained(dtype=dtype)
    held = by_id(module.table)
    module.to("cuda")
    assert module.table.device.type == "cuda"
    for name, column in by_id(module.table).items():
        assert torch.equal(column, held[name])
    module(EXTREMES.cuda()).float().sum().backward()
    optimizer.step()
    module.cpu()(EXTREMES).float().sum().backward()
    optimizer.step()


@pytest.mark.parametrize(("here", "there"), [("cuda", "cpu"), ("cpu", "cuda")])
def test_a_checkpoint_loads_on_the_other_device(here, there):
    """``torch.load`` with ``weights_only`` loads it."""
    one = DynamicEmbedding(5, initializer=Normal(), name="t", device=here)
    one(torch.arange(100, device=here))
    file = io.BytesIO()
    torch.save(one.state_dict(), file)
    file.seek(0)
    other = DynamicEmbedding(5, name="t", device=there)
    other.load_state_dict(torch.load(file, weights_only=True))
    ids = torch.arange(100)
    assert torch.equal(one.table.embeddings(ids).cpu(), other.table.embeddings(ids).cpu())
    copied = copy.deepcopy(other)
    assert torch.equal(copied.table.embeddings(ids).cpu(), one.table.embeddings(ids).cpu())


def test_a_table_on_the_cpu_serves_a_model_on_the_gpu():
    """Ids and gradients are copied from the GPU, and rows to it."""
    results = []
    for device in ("cpu", "cuda"):
        module = DynamicEmbedding(8, device="cpu", name="t", initializer=Normal())
        module.to(device)
        assert module.table.device.type == "cpu"
        optimizer = SparseSGD(hash_tables(module), lr=0.1)
        for start in range(3):
            out = module(torch.arange(start, start + 50, device=device))
            assert out.device.type == device
            out.square().sum().backward()
            optimizer.step()
        results.append(module.table.embeddings(torch.arange(52)))
    torch.testing.assert_close(*results)


def test_features_elsewhere_are_refused():
    """Kernels take addresses, so ids or weights in the wrong memory must not reach them."""
    module = DynamicEmbedding(4, device="cuda", name="t")
    with pytest.raises(ValueError, match="its table is on cuda:0, its ids on cpu"):
        module(torch.tensor([1]))


def test_a_trainer_on_the_gpu_with_all_hooks(tmp_path):
    """Only ``accelerator="gpu"`` differs, and weights stay near those of the CPU."""
    hooks = [LoggerHook(2), ProfilerHook(1, 1, 1, 1, str(tmp_path))]
    there = Model()
    trainer(tmp_path, *hooks, accelerator="gpu").fit(there, loader())
    here = Model()
    trainer(tmp_path).fit(here, loader())
    ours, wanted = everything(there), everything(here)
    assert ours.keys() == wanted.keys()
    for name, value in wanted.items():
        if torch.is_tensor(value) and value.is_floating_point():
            torch.testing.assert_close(ours[name].cpu(), value, rtol=1e-2, atol=1e-3)
    assert list(tmp_path.glob("*timeline*.json"))


def _bench_checkpoint():
    pytest.importorskip("safetensors")
    from benchmarks import bench_checkpoint

    return bench_checkpoint


@pytest.fixture
def benchmarks_on_cuda(monkeypatch):
    for module in (bench_embedding_bag, bench_row_update, bench_training):
        monkeypatch.setattr(module, "NUM_IDS", 300)
    harness.use_device("cuda")
    yield
    harness.use_device("cpu")


@pytest.mark.filterwarnings("ignore")  # Lightning's advice for long runs
@pytest.mark.parametrize(
    "check",
    [
        lambda: bench_embedding_bag.check(bench_embedding_bag.Data(2, 32, 4, 3)),
        lambda: bench_row_update.check(bench_embedding_bag.Data(2, 64, 4)),
        lambda: bench_training.check(batch=8, dim=4),
        lambda: bench_hash_index.check(None, 1000),
        lambda: bench_filter.check(2000),
        lambda: _bench_checkpoint().check(500),
        lambda: bench_memory.check(),
        lambda: bench_cuda_step.check(torch.device("cuda"), 50, 40),
    ],
)
def test_benchmarks_agree_with_their_peers_there(benchmarks_on_cuda, check):
    """Results that benchmarks time on a GPU are right."""
    check()


class AnsweringOnCpu:
    def __init__(self, table):
        self.on_gpu = table

    def __getattr__(self, name):
        return getattr(self.on_gpu, name)

    def __len__(self):
        return len(self.on_gpu)

    def embeddings(self, ids):
        return self.on_gpu.embeddings(ids).cpu()


class TableOnGpuAgainstDict(TableAgainstDict):
    """State machine whose table is on the GPU; ids and results are copied."""

    def new_module(self):
        return OnGpu(super().new_module())


class OnGpu(torch.nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module.cuda()

    @property
    def table(self):
        return AnsweringOnCpu(self.module.table)

    def forward(self, ids):
        return self.module(ids.cuda()).cpu()


@pytest.mark.parametrize(
    "admission", [MinCount(3), MinCount(2, per="batch"), BloomCount(3, 4096), Probability(0.3)]
)
def test_admission_on_the_gpu(admission):
    """Many lanes count the same ids; admitted ids and counts are those of the CPU."""
    generator = torch.Generator().manual_seed(0)
    batches = (torch.rand(10, 100_000, generator=generator) ** 6 * 200_000).long()
    states = []
    for device in ("cuda", "cpu"):
        module = DynamicEmbedding(2, admission=admission, name="t").to(device)
        for batch in batches:
            module(torch.cat([batch, EXTREMES]).to(device))
        table = module.table
        ids = table.ids().cpu().sort().values
        states.append({**table.storage.admission_counter.state(), "ids": ids})
        states[-1]["refused"] = table.statistics().refused
        assert states[-1]["refused"] > 0
    assert same(*states)


def test_eviction_on_the_gpu():
    """Rows not seen recently are evicted on the device."""
    module = DynamicEmbedding(2, eviction=GlobalStepFilter(1), device="cuda", name="t")
    module(torch.arange(10, device="cuda"))
    module.table.update_step(3)
    module(torch.arange(3, device="cuda"))
    assert module.table.evict() == 7
    assert sorted(module.table.ids().tolist()) == [0, 1, 2]


TableOnGpuAgainstDict.TestCase.settings = settings(
    max_examples=30, stateful_step_count=12, deadline=None
)
test_table_on_gpu_against_dict = TableOnGpuAgainstDict.TestCase
