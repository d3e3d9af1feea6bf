"""Tables whose rows lie in a mapped file, in what tables are used for: all is as in memory."""

import errno
import multiprocessing
import os
import random
import shutil
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from recis_lightning import (
    DynamicEmbedding,
    EmbeddingEngine,
    EmbeddingOption,
    HashTable,
    checkpoint,
    hash_tables,
    serving,
)
from recis_lightning.eviction import MaxRows
from recis_lightning.ops import file_memory
from recis_lightning.optim import SparseAdagrad, SparseAdam
from recis_lightning.table import row_store
from tests.helpers import rank_mapped_rows

pytestmark = [
    pytest.mark.skipif(not file_memory.is_supported(), reason="this system cannot map such files"),
    pytest.mark.usefixtures("small_blocks"),
]


@pytest.fixture
def small_blocks(monkeypatch):
    """Give tables blocks of 1 KiB, and ranges of the file of 4."""
    monkeypatch.setattr(row_store, "_BLOCK_BYTES", 1 << 10)
    monkeypatch.setattr(row_store, "_MAPPED_RANGE", 1 << 12)


def made(rows, dim=5, dtype=torch.float32):
    module = DynamicEmbedding(
        dim, name="t", dtype=dtype, rows=rows, eviction=MaxRows(900, by="count")
    )
    return module, SparseAdam(hash_tables(module), lr=0.1)


def train(module, sparse, first, last, ids_dtype=torch.int64):
    """Take steps; return the outputs. Now and then rows are evicted, and the rest compacted."""
    (table,), outputs = hash_tables(module), []
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(-100, 3000, (700,), generator=generator).to(ids_dtype)
        out = module(ids)
        out.float().square().sum().backward()
        sparse.step()
        outputs.append(out.detach().clone())
        if step % 4 == 3:
            table.delete(torch.arange(500, 1500))
            table.evict()
            table.storage.compact()
    return outputs


def assert_same(one, other):
    """Compare two tables' ids, weights and optimizer state, whatever the order of their rows."""
    states = [table.get_extra_state() for table in (one, other)]
    orders = [state["ids"].argsort() for state in states]
    for key in ("ids", "weights"):
        assert torch.equal(*(s[key][order] for s, order in zip(states, orders, strict=True))), key
    for name in states[0]["slots"]:
        slots = [s["slots"][name][order] for s, order in zip(states, orders, strict=True)]
        assert torch.equal(*slots), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [1, 3, 33])
@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
@pytest.mark.slow_except(
    dict(ids_dtype=torch.int32, dtype=torch.bfloat16, dim=[1, 33]),
    dict(ids_dtype=torch.int64, dtype=torch.float32, dim=[1, 3]),
    dict(ids_dtype=torch.int32, dtype=torch.float32, dim=33),
)
def test_odd_dims_and_narrow_ids(tmp_path, dim, dtype, ids_dtype):
    """Rows that are no multiple of 16 bytes, some of them on two pages; ids of either dtype."""
    wanted, optimizer = made(None, dim, dtype)
    wanted_outputs = train(wanted, optimizer, 0, 6)
    module, optimizer = made(f"file:{tmp_path}?memory=2KiB", dim, dtype)
    outputs = train(module, optimizer, 0, 6, ids_dtype)
    assert module.table.mapped_bytes > 0
    assert all(map(torch.equal, outputs, wanted_outputs))
    assert_same(module.table, wanted.table)


@pytest.mark.parametrize("memory", ["0", "6KiB"])
def test_training_that_is_resumed(tmp_path, memory):
    """Save, load into a table with other rows in memory, train on: as without an interruption."""
    wanted, optimizer = made(None)
    wanted_outputs = train(wanted, optimizer, 0, 9)
    module, optimizer = made(f"file:{tmp_path}?memory=1KiB")
    train(module, optimizer, 0, 5)
    checkpoint.save(tmp_path / "saved", module)
    state = optimizer.state_dict()
    del module, optimizer
    assert os.listdir(tmp_path) == ["saved"]  # nothing else is needed, or left
    resumed, optimizer = made(f"file:{tmp_path}?memory={memory}")
    checkpoint.load(tmp_path / "saved", resumed)
    optimizer.load_state_dict(state)
    outputs = train(resumed, optimizer, 5, 9)
    assert resumed.table.mapped_bytes > 0
    assert all(map(torch.equal, outputs, wanted_outputs[5:]))
    assert_same(resumed.table, wanted.table)


def test_two_ranks_in_one_folder(tmp_path, ranks):
    answers = ranks.run(2, rank_mapped_rows.same_on_ranks, str(tmp_path))
    assert all(mapped_bytes > 0 and num_rows > 500 for mapped_bytes, num_rows in answers)
    assert os.listdir(tmp_path) == []


def test_two_tables_in_one_folder(tmp_path):
    """Tables, and copies that come and go, do not see one another's rows."""
    rows = f"file:{tmp_path}?memory=0"
    engine = EmbeddingEngine({name: EmbeddingOption(5, rows=rows) for name in "ab"})
    wanted = EmbeddingEngine({name: EmbeddingOption(5) for name in "ab"})
    for model in (engine, wanted):
        sparse = SparseAdagrad(hash_tables(model), lr=0.1)
        for step in range(4):
            other = HashTable(5, rows=rows)
            other.insert(torch.arange(2000), torch.full((2000, 5), -1.0))
            ids = {"a": torch.arange(step * 300, step * 300 + 900), "b": torch.arange(700)}
            sum(out.square().sum() for out in model(ids).values()).backward()
            sparse.step()
            del other  # its space is another's at once
            model.tables["a"].delete(torch.arange(step * 200))
            model.tables["a"].storage.compact()
    for name in "ab":
        assert engine.tables[name].mapped_bytes > 0
        assert_same(engine.tables[name], wanted.tables[name])


def test_threads_that_evaluate_while_a_table_grows(tmp_path):
    """Every lookup sees whole rows, each as it was given."""
    module = DynamicEmbedding(5, name="t", rows=f"file:{tmp_path}?memory=1KiB").eval()
    known, done = torch.arange(500), threading.Event()
    module.table.insert(known, known[:, None].expand(-1, 5).float())

    def look_up():
        wrong = lookups = 0
        while not done.is_set() or not lookups:
            wrong += int((module(known) != known[:, None]).sum())
            lookups += 1
        return wrong, lookups

    with ThreadPoolExecutor(3) as pool:
        running = [pool.submit(look_up) for _ in range(3)]
        for first in range(500, 9000, 500):
            ids = torch.arange(first, first + 500)
            module.table.insert(ids, ids[:, None].expand(-1, 5).float())
            if first % 1500 == 0:
                module.table.delete(torch.arange(first - 200, first))
                module.table.storage.compact()
        done.set()
        answers = [one.result() for one in running]
    assert [wrong for wrong, _ in answers] == [0, 0, 0]
    assert all(lookups for _, lookups in answers)


def test_what_is_exported_is_as_in_memory(tmp_path):
    scores = []
    for number, rows in enumerate((None, f"file:{tmp_path}?memory=1KiB")):
        torch.manual_seed(0)
        module, sparse = made(rows)
        train(module, sparse, 0, 3)
        model = torch.nn.Sequential(module, torch.nn.Linear(5, 1))
        serving.export(model, tmp_path / str(number), example=torch.arange(3))
        served = serving.load(tmp_path / str(number))
        scores.append(served(torch.arange(-200, 3200)))
    assert torch.equal(*scores)


def test_a_folder_that_disappears(tmp_path):
    """Before there is a file that is an error, which changes nothing; afterwards it is none."""
    folder = tmp_path / "disk"
    folder.mkdir()
    module, sparse = made(f"file:{folder}?memory=4KiB")
    module(torch.arange(40)).sum().backward()  # in memory as yet, and its gradients pending
    assert module.table.mapped_bytes == 0
    folder.rmdir()
    before = module.table.get_extra_state()
    for call in (
        lambda: module(torch.arange(2000)),
        lambda: module.table.insert(torch.arange(2000), torch.ones(2000, 5)),
    ):
        with pytest.raises(FileNotFoundError, match="table 't'") as caught:
            call()
        assert caught.value.filename is not None
        assert str(folder) in str(caught.value.filename)
    assert torch.equal(module.table.ids(), before["ids"])
    sparse.step()
    assert not torch.equal(module.table.get_extra_state()["weights"], before["weights"])
    folder.mkdir()
    module(torch.arange(2000))
    folder.rmdir()
    module.table.insert(torch.arange(5000), torch.ones(5000, 5))
    assert len(module.table) == 5000
    assert module.table.embeddings(torch.arange(5000)).min() == 1


@pytest.fixture
def small_disk(tmp_path):
    """Mount a disk of 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    options = ["-t", "tmpfs", "-o", "size=256k", "none", str(folder)]
    if shutil.which("mount") is None or subprocess.run(["mount", *options], check=False).returncode:
        pytest.skip("no disk can be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_is_full(small_disk):
    """An error before anything has changed; what is pending is still trained; room is found."""
    module, sparse = made(f"file:{small_disk}?memory=4KiB")
    (table,) = hash_tables(module)
    module(torch.arange(1000)).sum().backward()
    before = table.embeddings(torch.arange(1000)).clone()
    for call in (
        lambda: module(torch.arange(9000)),
        lambda: table.insert(torch.arange(9000), torch.ones(9000, 5)),
        lambda: module(torch.arange(9000).int()),
    ):
        with pytest.raises(OSError, match=r"No space left on device.*table 't'") as caught:
            call()
        assert caught.value.errno == errno.ENOSPC
        assert len(table) == 1000
        assert torch.equal(table.embeddings(torch.arange(1000)), before)
    sparse.step()
    after = table.embeddings(torch.arange(1000))
    assert (after != before).all()
    table.delete(torch.arange(900))
    table.storage.compact()
    module(torch.arange(900, 2000))
    assert len(table) == 1100
    assert torch.equal(table.embeddings(torch.arange(900, 1000)), after[900:])


def _save_until_killed(folder, pipe):
    """Train, evict, compact and save without an end; each save holds one number only."""
    torch.set_num_threads(1)
    module = DynamicEmbedding(3, name="t", rows=f"file:{folder}?memory=1KiB")
    (table,), ids = hash_tables(module), torch.arange(600)
    for number in range(1, 10_000):
        table.insert(torch.arange(600, 3000), torch.zeros(2400, 3))
        table.insert(ids, torch.full((600, 3), float(number)))
        table.delete(torch.arange(600, 3000))
        table.storage.compact()
        table.update_step()
        checkpoint.save(folder / "saved", module)
        pipe.send(number)


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_kill_9_leaves_a_whole_checkpoint_and_no_file(tmp_path):
    random.seed(0)
    context = multiprocessing.get_context("fork")
    for _ in range(6):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_save_until_killed, args=(tmp_path, theirs))
        process.start()
        theirs.close()
        last = ours.recv()
        time.sleep(random.uniform(0, 0.1))
        process.kill()
        process.join()
        while ours.poll():
            try:
                last = ours.recv()
            except EOFError:
                break
        for rows in (None, f"file:{tmp_path}?memory=0"):
            module = DynamicEmbedding(3, name="t", rows=rows)
            checkpoint.load(tmp_path / "saved", module)
            (table,) = hash_tables(module)
            assert table.ids().sort().values.tolist() == list(range(600))
            found = table.embeddings(torch.arange(600))
            assert found.unique().numel() == 1
            assert found[0, 0] == table.step >= last
        del module, table
        assert os.listdir(tmp_path) == ["saved"]  # the file had no name: its space is free
