"""Tables whose rows lie in a mapped file: their setting, and that all is as in memory."""

import copy
import errno
import itertools
import os
import pickle

import pytest
import torch

from recis_lightning import (
    DynamicEmbedding,
    DynamicEmbeddingBag,
    EmbeddingEngine,
    EmbeddingOption,
    HashTable,
    checkpoint,
    hash_tables,
    optim,
)
from recis_lightning.admission import MinCount
from recis_lightning.eviction import MaxRows
from recis_lightning.ops import file_memory
from recis_lightning.table import row_file, row_store
from recis_lightning.table.row_file import RowFile, check_rows

pytestmark = pytest.mark.skipif(
    not file_memory.is_supported(), reason="this system cannot map such files"
)

DIM = 8
OPTIMIZERS = [
    name
    for name in optim.__all__
    if name.startswith("Sparse") and name not in ("SparseDenseOptimizer", "SparseOptimizer")
]


@pytest.fixture
def small_blocks(monkeypatch):
    """Give tables blocks of 1 KiB, and ranges of the file of 4."""
    monkeypatch.setattr(row_store, "_BLOCK_BYTES", 1 << 10)
    monkeypatch.setattr(row_store, "_MAPPED_RANGE", 1 << 12)


def state_of(table):
    """Return all tensors of a table's state, by name."""
    state = table.get_extra_state()
    found = {f"slot {name}": slot for name, slot in state["slots"].items()}
    return found | {k: v for k, v in state.items() if isinstance(v, torch.Tensor)}


def assert_equal(one, other):
    states = state_of(one), state_of(other)
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


def train(rows, name="SparseAdam", dtype=torch.float32):
    """Train a table through admission, eviction, compaction, deletions and a new layout."""
    module = DynamicEmbedding(
        *(DIM,), name="t", dtype=dtype, rows=rows,
        admission=MinCount(2), eviction=MaxRows(900, by="count"),
    )  # fmt: skip
    (table,) = hash_tables(module)
    table.insert(torch.arange(-300, 0), torch.ones(300, DIM))
    optimizer = getattr(optim, name)([table], lr=0.1)  # lays the rows out anew
    generator, outputs = torch.Generator().manual_seed(0), []
    for step in range(12):
        top = 400 if step > 8 else 4000
        ids = torch.randint(-300, top, (1500,), generator=generator)
        out = module(ids)
        (out * torch.arange(1, DIM + 1)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        outputs.append(out.detach().clone())
        if step % 4 == 3:
            table.evict()
        if step == 8:
            table.delete(torch.arange(400, 4000))
            table.evict()  # compacts
    module.eval()
    outputs.append(module(torch.arange(-400, 4000)))
    module.train()
    return module, outputs


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("memory", ["0", "9KiB"])
@pytest.mark.slow_except(dict(name=["SparseAdam", "SparseAdagrad"], memory="9KiB"))
@pytest.mark.usefixtures("small_blocks")
def test_rows_are_bit_for_bit_those_of_a_table_in_memory(tmp_path, name, memory):
    wanted, wanted_outputs = train(None, name)
    module, outputs = train(f"file:{tmp_path}?memory={memory}", name)
    assert all(map(torch.equal, outputs, wanted_outputs))
    (table,) = hash_tables(module)
    assert table.mapped_bytes > 0
    assert_equal(table, hash_tables(wanted)[0])
    assert table.nbytes >= table.mapped_bytes + len(table) * 16


@pytest.mark.usefixtures("small_blocks")
def test_bfloat16_rows_and_automatic_memory(tmp_path, monkeypatch):
    wanted, wanted_outputs = train(None, dtype=torch.bfloat16)
    left = iter([3000, 1000] + [0] * 1000)
    monkeypatch.setattr(row_file, "memory_left", lambda: next(left))
    module, outputs = train(f"file:{tmp_path}", dtype=torch.bfloat16)
    assert all(map(torch.equal, outputs, wanted_outputs))
    assert_equal(module.table, wanted.table)
    assert 0 < module.table.mapped_bytes < module.table.nbytes


@pytest.mark.usefixtures("small_blocks")
def test_memory_fills_first_and_space_goes_back(tmp_path):
    table = HashTable(DIM, rows=f"file:{tmp_path}?memory=4KiB")
    row_bytes, ids = 4 * DIM, torch.arange(5000)
    table.insert(ids[:100], torch.ones(100, DIM))
    assert table.mapped_bytes == 0
    table.insert(ids[:150], torch.ones(150, DIM))
    in_memory = table.storage.rows.capacity * row_bytes - table.mapped_bytes
    assert in_memory == 4096
    table.insert(ids, ids[:, None].expand(-1, DIM).float())
    assert table.storage.rows.capacity * row_bytes - table.mapped_bytes == 4096
    file = table.storage.row_file._memory
    assert file.nbytes >= table.mapped_bytes > 4800 * row_bytes
    table.delete(ids[:4000])
    table.storage.compact()
    assert 1000 * row_bytes - 4096 <= table.mapped_bytes <= file.nbytes < 1200 * row_bytes + 65536
    assert torch.equal(table.embeddings(ids[4000:])[:, 3], ids[4000:].float())
    table.delete(ids[:4950])
    table.storage.compact()
    assert table.mapped_bytes == file.nbytes == 0
    table.insert(ids, ids[:, None].expand(-1, DIM).float())
    assert torch.equal(table.embeddings(ids)[:, 0], ids.float())
    table.clear()
    assert file.nbytes == 0


@pytest.mark.usefixtures("small_blocks")
def test_copies_have_files_of_their_own(tmp_path):
    rows = f"file:{tmp_path}?memory=1KiB"
    table = HashTable(DIM, rows=rows, name="t")
    ids = torch.arange(1000)
    table.insert(ids, ids[:, None].expand(-1, DIM).float())
    copies = [copy.deepcopy(table), pickle.loads(pickle.dumps(table)), HashTable(DIM, rows=rows)]
    copies[2].load_state_dict(table.state_dict())
    in_memory = HashTable(DIM)
    in_memory.load_state_dict(table.state_dict())
    for other in copies:
        assert (other.rows, other.mapped_bytes > 0) == (rows, True)
        assert_equal(table, other)
        other.insert(ids, torch.zeros(1000, DIM))
    assert_equal(table, in_memory)
    assert table.embeddings(ids)[7, 0] == 7
    table.to(torch.bfloat16)
    assert table.dtype is torch.bfloat16
    assert table.embeddings(ids)[7, 0] == 7


@pytest.mark.usefixtures("small_blocks")
def test_a_checkpoint_is_one_of_any_table(tmp_path):
    module, _ = train(f"file:{tmp_path}?memory=1KiB")
    checkpoint.save(tmp_path / "saved", module)
    for rows in (None, f"file:{tmp_path}?memory=2KiB"):
        other, _ = train(rows)
        other.table.insert(torch.arange(50), torch.ones(50, DIM))
        checkpoint.load(tmp_path / "saved", other)
        assert_equal(other.table, module.table)


@pytest.mark.usefixtures("small_blocks")
def test_a_full_disk_leaves_the_table_as_it_was(tmp_path, monkeypatch):
    module, _ = train(f"file:{tmp_path}?memory=1KiB")
    (table,) = hash_tables(module)
    before, empty = copy.deepcopy(table), RowFile.empty

    def full(self, num_bytes):
        raise OSError(errno.ENOSPC, "No space left on device", self.folder)

    monkeypatch.setattr(RowFile, "empty", full)
    ids = torch.arange(10_000, 20_000)
    pattern = "No space left on device: table 't', with .* rows, found no room in its file"
    with pytest.raises(OSError, match=pattern) as caught:
        table.insert(ids, torch.ones(len(ids), DIM))
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(tmp_path))
    with pytest.raises(OSError, match=pattern):
        module(ids.repeat(2))
    with pytest.raises(OSError, match=pattern):
        optim.SparseAdagrad([HashTable(DIM), table], lr=0.1)
    before_ids = before.ids()
    assert torch.equal(table.ids(), before_ids)
    assert torch.equal(table.embeddings(before_ids), before.embeddings(before_ids))
    monkeypatch.setattr(RowFile, "empty", empty)
    table.insert(ids, torch.ones(len(ids), DIM))
    assert len(table) == len(before_ids) + len(ids)


@pytest.mark.usefixtures("small_blocks")
def test_a_full_disk_has_its_space_back(tmp_path, monkeypatch):
    """What was taken before it was full, though the error is kept; and what compaction frees."""
    table = HashTable(DIM, rows=f"file:{tmp_path}?memory=0", name="t")
    ids = torch.arange(1000)
    table.insert(ids, ids[:, None].expand(-1, DIM).float())
    file, left = table.storage.row_file._memory, [3]
    before, empty = file.nbytes, RowFile.empty

    def nearly_full(self, num_bytes):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device", self.folder)
        return empty(self, num_bytes)

    monkeypatch.setattr(RowFile, "empty", nearly_full)
    with pytest.raises(OSError, match="No space left") as caught:
        table.insert(torch.arange(9000), torch.ones(9000, DIM))
    assert caught.value.__cause__ is not None
    assert left[0] < 0
    assert file.nbytes == before
    del caught  # its traceback knows the table's memory as it was
    table.delete(ids[:960])
    table.storage.compact()
    assert file.nbytes < before / 2
    assert torch.equal(table.embeddings(ids[960:])[:, 0], ids[960:].float())
    table.insert(ids[:20], torch.ones(20, DIM))  # in the room that was kept
    assert len(table) == 60


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
@pytest.mark.usefixtures("small_blocks")
def test_a_forked_child_is_refused(tmp_path):
    module, _ = train(f"file:{tmp_path}?memory=1KiB")
    fresh = DynamicEmbedding(DIM, rows=f"file:{tmp_path}?memory=0")
    ids = module.table.ids()
    before = module.table.embeddings(ids)
    child = os.fork()
    if child == 0:
        refusals = 0
        try:
            for call in (lambda: module(ids), lambda: module.table.embeddings(ids)):
                try:
                    call()
                except RuntimeError as error:
                    refusals += "forked child" in str(error)
            fresh(ids)  # has no file yet: makes one
            refusals += fresh.table.mapped_bytes > 0
        finally:
            os._exit(0 if refusals == 3 else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert torch.equal(module.table.embeddings(ids), before)


MAKERS = (HashTable, DynamicEmbedding, DynamicEmbeddingBag, EmbeddingOption)


def test_settings_are_checked(tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    option, size = "what follows '?' is one option", "a size as in memory=8GiB, 0 or more"
    for bad, message in {
        "ram": "rows: expected None, 'file:/folder' or",
        "": "got ''",
        "file:": "got 'file:'",
        "file: ": "got 'file: '",
        "FILE:/tmp": "got 'FILE:/tmp'",
        "file:?memory=1GiB": "expected None",
        "file:/tmp\0": "expected None",
        "/tmp": "got '/tmp'",
        f"file:{file}": "is none",
        "file://host/tmp": "a path of this machine",
        "file://": "a path of this machine",
        "file://localhost": "a path of this machine",
        "file:~nobody-of-that-name/x": "nobody's home",
        **{
            f"file:{tmp_path}?{bad}": option
            for bad in (
                *("", "mem=8GiB", "Memory=8GiB", "memory", "8GiB", "memory:8GiB", " memory=8GiB"),
                *("memory=1GiB&memory=2GiB", "memory=1GiB?memory=2GiB", "memory=1GiB&", "sync=1"),
            )
        },
        **{
            f"file:{tmp_path}?memory={bad}": size
            for bad in ("much", "", "-1", "+1", "1e3", "8GiBs", "8G", "1,5GiB", "9" * 400, "=8GiB")
        },
    }.items():
        for make in MAKERS:
            with pytest.raises(ValueError, match="rows: expected") as caught:
                make(4, rows=bad)
            assert message in str(caught.value)
            assert repr(bad) in str(caught.value)
    with pytest.raises(TypeError, match="rows: expected None"):
        HashTable(4, rows=tmp_path)  # type: ignore[arg-type]
    assert file.read_text() == "mine"
    assert check_rows(None) is None


def test_a_folder_that_is_not_there_is_an_error(tmp_path):
    names = ("new", "a/b", "my%20disk", "new ")
    (tmp_path / "my disk").mkdir()
    for name, make in itertools.product(names, MAKERS):
        folder = f"{tmp_path}/{name}"
        with pytest.raises(FileNotFoundError, match="rows: expected a folder that is there") as e:
            make(4, rows=f"file:{folder}?memory=1GiB")
        assert (e.value.errno, e.value.filename) == (errno.ENOENT, folder)
        assert "mkdir -p" in str(e.value)
    assert os.listdir(tmp_path) == ["my disk"]


@pytest.mark.usefixtures("small_blocks")
def test_copies_need_the_folder_of_their_table(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    module = DynamicEmbedding(DIM, rows=f"file:{folder}?memory=0", name="t")
    module(torch.arange(100))
    pickled = pickle.dumps(module.table)
    folder.rmdir()  # its file has no name
    for make in (lambda: copy.deepcopy(module), lambda: pickle.loads(pickled)):
        with pytest.raises(FileNotFoundError, match="make it first") as caught:
            make()
        assert caught.value.filename == str(folder)
    assert len(module.table.embeddings(module.table.ids())) == 100  # still there
    folder.mkdir()
    assert pickle.loads(pickled).storage.row_file.folder == str(folder)


def test_a_relative_folder_is_the_one_where_the_table_was_made(tmp_path, monkeypatch):
    (tmp_path / "disk").mkdir()
    monkeypatch.chdir(tmp_path)
    table = HashTable(DIM, rows="file:disk?memory=1KiB")
    assert table.rows == f"file:{tmp_path}/disk?memory=1KiB"
    monkeypatch.chdir("/")
    assert copy.deepcopy(table).storage.row_file.folder == f"{tmp_path}/disk"
    (tmp_path / "what?").mkdir()
    monkeypatch.chdir(tmp_path / "what?")
    with pytest.raises(ValueError, match=r"without '\?' in its path"):
        HashTable(DIM, rows="file:.")


@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_is_read_only_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ValueError, match="that can be written to"):
        HashTable(4, rows=f"file:{tmp_path}")


@pytest.mark.parametrize(
    ("size", "wanted"),
    {
        "0": 0,
        "1000": 1000,
        "1.5KiB": 1536,
        "2 MB": 2_000_000,
        "8GiB": 8 << 30,
        "1tb": 10**12,
    }.items(),
)
def test_sizes_and_paths_are_read(tmp_path, size, wanted):
    for path in (tmp_path, f"//{tmp_path}", f"//localhost{tmp_path}", f"///{tmp_path}/"):
        rows = check_rows(f"file:{path}?memory={size}")
        assert rows == f"file:{tmp_path}?memory={size}"
        file = RowFile(rows)
        assert (file.folder, file._memory_bytes) == (str(tmp_path), wanted)
    assert RowFile(f"file:{tmp_path}")._memory_bytes is None
    assert file.room_in_memory(10, 5) == max(wanted - 10, 0)


def test_features_of_one_table_must_agree(tmp_path):
    rows = f"file:{tmp_path}"
    option = EmbeddingOption(4, table="item", rows=rows)
    engine = EmbeddingEngine({"item": option, "history": option})
    assert engine.tables["item"].rows == rows
    with pytest.raises(ValueError, match=r"item.*history|history.*item"):
        EmbeddingEngine({"item": option, "history": EmbeddingOption(4, table="item")})


def test_a_table_on_a_gpu_is_refused(tmp_path):
    table = HashTable(4, rows=f"file:{tmp_path}", name="t")
    with pytest.raises(ValueError, match=r"rows: table 't' has its rows in a file.*'cpu'"):
        table._new_storage(4, torch.float32, torch.device("cuda"), (), None, lambda: 0.0)


def test_a_system_that_cannot_map_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(file_memory, "is_supported", lambda: False)
    with pytest.raises(ValueError, match="this system cannot map"):
        HashTable(4, rows=f"file:{tmp_path}")
