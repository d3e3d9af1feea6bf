"""Checkpoints of tables without a Trainer, in one process."""

import json
import re
import shutil
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from recis_lightning import DynamicEmbedding, HashTable, checkpoint, hash_tables, report
from recis_lightning.admission import BloomCount, MinCount
from recis_lightning.checkpoint.owned_rows import OwnedRows
from recis_lightning.checkpoint.progress import no_progress
from recis_lightning.eviction import GlobalStepFilter
from recis_lightning.optim import SparseAdagrad, SparseAdam, SparseRowwiseAdagrad, SparseSGD
from tests.helpers.full_disk import largest_file
from tests.helpers.sample_tables import EXTREMES, by_id, same, settings_of, trained


def model(dim=3, dtype=torch.float32, optimizer=SparseAdam, names=("user", "item/ä")):
    """Return untrained tables, and an optimizer for them."""
    tables = [
        DynamicEmbedding(dim, name=name, dtype=dtype, eviction=GlobalStepFilter(9))
        for name in names
    ]
    module = nn.ModuleList(tables)
    module.optimizer = None if optimizer is None else optimizer(hash_tables(module), lr=0.1)
    return module


def train(module, steps=4, size=500):
    """Train on the ends of int64 and on some more ids."""
    for step in range(steps):
        loss = 0.0
        for number, part in enumerate(module):
            ids = torch.arange(step, size // (number + 1), 2)
            loss = loss + part(torch.cat([EXTREMES[step:], ids])).float().pow(2).sum()
            part.table.update_step(number + 1)
        loss.backward()
        if module.optimizer is not None:
            module.optimizer.step()
            module.optimizer.zero_grad()
    return module


def held(module):
    """Return all that the tables of a module hold."""
    return {
        table.name: by_id(table) | settings_of(table) | {"dtype": table.dtype}
        for table in hash_tables(module)
    }


@pytest.mark.parametrize("optimizer", [SparseAdam, SparseAdagrad, SparseRowwiseAdagrad, SparseSGD])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loads_as_saved(tmp_path, optimizer, dtype):
    """Every id, weight, slot, last-seen step and count is loaded; training goes on alike."""
    # More rows than one chunk of a file has.
    module = train(model(dtype=dtype, optimizer=optimizer), size=35_000)
    checkpoint.save(tmp_path / "new" / "folder", module)
    other = model(dtype=dtype, optimizer=optimizer)
    checkpoint.load(tmp_path / "new" / "folder", other)
    assert same(held(module), held(other))
    train(module)
    train(other)
    assert same(held(module), held(other))


@pytest.mark.parametrize("admission", [MinCount(3), BloomCount(3, 2**21)])
def test_counts_of_ids_without_a_row(tmp_path, admission):
    """Counts of admission policies are part of a checkpoint."""
    first, other = (DynamicEmbedding(2, name="t", admission=admission) for _ in range(2))
    first(torch.tensor([5, 5, -7, 9]))
    checkpoint.save(tmp_path, first)
    checkpoint.load(tmp_path, other)
    for part in (first, other):
        part(torch.tensor([5, -7]))
        assert part.table.ids().tolist() == [5]
        part(torch.tensor([-7, 9]))
        assert sorted(part.table.ids().tolist()) == [-7, 5]


def test_a_single_id_waits(tmp_path):
    """Fields of one item may have any stride."""
    first, other = (DynamicEmbedding(2, name="t", admission=MinCount(2)) for _ in range(2))
    first(torch.tensor([7, 7, 8, 8, 9]))
    checkpoint.save(tmp_path, first)
    checkpoint.load(tmp_path, other)
    other(torch.tensor([9]))
    assert sorted(other.table.ids().tolist()) == [7, 8, 9]


def test_no_optimizer_takes_the_state_along(tmp_path):
    """A table without optimizer keeps the optimizer state that was saved."""
    module = train(model())
    checkpoint.save(tmp_path, module)
    other = model(optimizer=None)
    checkpoint.load(tmp_path, hash_tables(other))
    assert same(held(module), held(other))


def test_a_second_save_replaces_the_first(tmp_path):
    """Files of the first save go once the second is whole; files of others stay."""
    module = train(model())
    checkpoint.save(tmp_path, module)
    (tmp_path / "notes.txt").write_text("mine")
    before = {file.name for file in tmp_path.iterdir()}
    train(module)
    checkpoint.save(tmp_path, module)
    after = {file.name for file in tmp_path.iterdir()}
    assert before & after == {"notes.txt", "checkpoint.json"}
    assert len(after) == 4
    other = model()
    checkpoint.load(tmp_path, other)
    assert same(held(module), held(other))


def saved(folder, **kwargs):
    """Save a trained module and return it."""
    module = train(model(**kwargs))
    checkpoint.save(folder, module)
    return module


def a_file(folder, table="user"):
    return next(folder.glob(f"{table}*.safetensors"))


def flip(folder):
    file = a_file(folder)
    content = bytearray(file.read_bytes())
    content[-5] ^= 4
    file.write_bytes(content)


def cut(folder):
    file = a_file(folder, "item")
    file.write_bytes(file.read_bytes()[:-1])


def swap(folder):
    """Replace a file by that of another save of the same tables."""
    saved(folder / "other")
    shutil.copy(a_file(folder / "other"), a_file(folder))


def mix(folder):
    """Let the commit of another save name our files."""
    saved(folder / "other")
    text = (folder / "other" / "checkpoint.json").read_text()
    ours, theirs = (a_file(place).name.split(".")[2] for place in (folder, folder / "other"))
    commit = json.loads(text.replace(theirs, ours))
    commit["save_id"] = theirs
    (folder / "checkpoint.json").write_text(json.dumps(commit))


def garble(folder):
    file = folder / "checkpoint.json"
    file.write_text(file.read_text()[:-20])


def age(folder):
    file = folder / "checkpoint.json"
    file.write_text(file.read_text().replace('"format": 1', '"format": 99'))


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (flip, r"slots.exp_avg_sq is damaged between its rows \d+ and \d+|of another save"),
        (cut, r"expected \d+ bytes, found \d+: the file is torn"),
        (lambda folder: a_file(folder).unlink(), "user.0-of-1.*: this file .* is missing"),
        (swap, "not of this save: expected"),
        (mix, "not of this save: expected"),
        (garble, r"checkpoint.json: damaged"),
        (age, "expected format 1 of tables, got 99"),
        (lambda folder: (folder / "checkpoint.json").unlink(), "it has no checkpoint.json"),
        (shutil.rmtree, "no such checkpoint"),
    ],
)
@pytest.mark.parametrize("fresh", [True, False])
def test_what_is_damaged_changes_nothing(tmp_path, harm, message, fresh):
    """Tables whose own files are whole stay too; and the model trains on."""
    saved(tmp_path / "a")
    harm(tmp_path / "a")
    module = model() if fresh else train(model(), steps=2)
    before, undisturbed = held(module), model() if fresh else train(model(), steps=2)
    with pytest.raises(ValueError, match=message):
        checkpoint.load(tmp_path / "a", module)
    assert same(held(module), before)
    assert same(held(train(module)), held(train(undisturbed)))


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("number", [0, 1])
def test_an_interrupted_load(tmp_path, monkeypatch, fresh, number):
    """Fresh tables stay empty, and others keep their rows, also those that were loaded already."""
    loaded = held(saved(tmp_path))
    module = model() if fresh else train(model(), steps=2)
    before, write, calls = held(module), OwnedRows.write, []

    def interrupted(self, table, *arguments):
        write(self, table, *arguments)
        calls.append(table)
        if len(calls) > number:
            raise KeyboardInterrupt

    monkeypatch.setattr(OwnedRows, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.load(tmp_path, module)
    monkeypatch.undo()
    assert same(held(module), before)
    checkpoint.load(tmp_path, module)
    assert same(held(module), loaded)


def test_a_load_waits_for_other_threads(tmp_path):
    """Threads that evaluate get rows of before or of the checkpoint."""
    values = torch.arange(3000.0)[:, None].expand(-1, 3)
    table, ids = HashTable(3, name="t"), torch.arange(3000)
    for number in (1, 2):
        table.insert(ids, values * number)
        checkpoint.save(tmp_path / str(number), [table])
    ended, torn = threading.Event(), []

    def evaluate():
        while not ended.is_set():
            found = table.embeddings(ids)
            if not torch.equal(found, values) and not torch.equal(found, 2 * values):
                torn.append(found)

    threads = [threading.Thread(target=evaluate) for _ in range(2)]
    for thread in threads:
        thread.start()
    for number in range(20):
        checkpoint.load(tmp_path / str(1 + number % 2), [table])
    ended.set()
    for thread in threads:
        thread.join(30)
    assert not torn


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"dim": 4}, r"table 'user': the checkpoint's .* has embedding_dim=3, the model's 4"),
        ({"dtype": torch.bfloat16}, "has dtype torch.float32, the model's torch.bfloat16"),
        ({"optimizer": SparseAdagrad}, "exp_avg_sq.*SparseAdagrad keeps {'sum': 3}: resume with"),
        ({"optimizer": SparseSGD}, "SparseSGD keeps none"),
        ({"names": ["user"]}, r"\[\] would get no rows, \['item/ä'\] have no place"),
        ({"names": ["user", "x"]}, r"\['x'\] would get no rows"),
    ],
)
def test_another_model_is_refused(tmp_path, other, message):
    """Another dim, dtype, optimizer or set of tables is an error; the model is as it was."""
    saved(tmp_path)
    module = train(model(**other), steps=1)
    before = held(module)
    with pytest.raises(ValueError, match=message):
        checkpoint.load(tmp_path, module)
    assert same(held(module), before)


def test_arguments(tmp_path):
    """Tables that cannot be saved are named in the error."""
    with pytest.raises(ValueError, match="two have the name 'a'"):
        checkpoint.save(tmp_path, [HashTable(2, name="a"), HashTable(3, name="a")])
    with pytest.raises(TypeError, match="expected HashTable, got Linear"):
        checkpoint.save(tmp_path, [nn.Linear(1, 1)])
    assert not list(tmp_path.iterdir())


def test_a_full_disk_keeps_the_checkpoint_before(tmp_path):
    """The error is the system's, nothing is left of the save, and the older one loads."""
    module = saved(tmp_path)
    files, before = sorted(tmp_path.iterdir()), held(module)
    train(module)
    with largest_file(10_000), pytest.raises(OSError, match="user"):
        checkpoint.save(tmp_path, module)
    assert sorted(tmp_path.iterdir()) == files
    other = model()
    checkpoint.load(tmp_path, other)
    assert same(held(other), before)


def test_a_full_disk_at_the_commit_leaves_nothing(tmp_path):
    """Shards that are written go, if the file that would name them cannot be."""
    tables = [HashTable(1, name=f"a table with a longer name {i}") for i in range(60)]
    before, small = saved(tmp_path), sorted(tmp_path.iterdir())
    with largest_file(10_000), pytest.raises(OSError, match="File too large"):
        checkpoint.save(tmp_path, tables)
    assert sorted(tmp_path.iterdir()) == small
    other = model()
    checkpoint.load(tmp_path, other)
    assert same(held(other), held(before))


@pytest.mark.parametrize("content", ['{"steps": 3}', "mine", "", "[]", '{"format": 99}'])
def test_a_file_of_the_commits_name_that_is_none_is_kept(tmp_path, content):
    """It is another program's, of a later version, or damaged."""
    (tmp_path / "checkpoint.json").write_text(content)
    with pytest.raises(FileExistsError, match=r"directory: .*checkpoint.json is no checkpoint of"):
        checkpoint.save(tmp_path, [HashTable(2, name="t")])
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.json"]
    assert (tmp_path / "checkpoint.json").read_text() == content


@pytest.mark.parametrize("tables", [None, 3])
def test_save_says_what_tables_are(tmp_path, tables):
    with pytest.raises(TypeError, match="tables: expected a module with tables, or tables, got"):
        checkpoint.save(tmp_path / "new", tables)
    assert not (tmp_path / "new").exists()


def test_inspect(tmp_path):
    """``inspect`` returns sizes and layout."""
    module = saved(tmp_path)
    found = checkpoint.inspect(tmp_path)
    assert set(found) == {"user", "item/ä"}
    user = found["user"]
    assert user.rows == [len(module[0].table)]
    assert (user.embedding_dim, user.dtype, user.step) == (3, torch.float32, 4)
    assert user.slots == {"exp_avg": 3, "exp_avg_sq": 3}
    assert user.num_updates == module[0].table.num_updates
    assert user.num_bytes == a_file(tmp_path).stat().st_size


def same_arrays(found, table):
    state = by_id(table)
    order = found["ids"].argsort()
    assert set(found) == set(state)
    for key, value in state.items():
        np.testing.assert_array_equal(
            found[key][order], value.float() if value.is_floating_point() else value
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_read_a_table(tmp_path, dtype):
    """A table is read into NumPy and pandas, and written to Parquet."""
    module = saved(tmp_path, dtype=dtype)
    found = checkpoint.read_table(tmp_path, "user")
    same_arrays(found, module[0].table)
    pandas = pytest.importorskip("pandas")
    frame = checkpoint.read_table(tmp_path, "user", "pandas")
    assert list(frame.columns[:2]) == ["last_seen", "weights_0"]
    np.testing.assert_array_equal(
        frame.loc[-1, ["weights_0", "weights_2"]], found["weights"][found["ids"] == -1][0, [0, 2]]
    )
    checkpoint.write_parquet(tmp_path, "user", tmp_path / "user.parquet")
    table = pandas.read_parquet(tmp_path / "user.parquet")
    np.testing.assert_array_equal(np.stack(table["exp_avg"]), found["exp_avg"])
    np.testing.assert_array_equal(table["ids"], found["ids"])


def test_read_an_empty_table(tmp_path):
    """A table without rows has columns all the same."""
    checkpoint.save(tmp_path, model())
    found = checkpoint.read_table(tmp_path, "user")
    assert {key: value.shape for key, value in found.items()} == {
        "ids": (0,),
        "last_seen": (0,),
        "weights": (0, 3),
        "exp_avg": (0, 3),
        "exp_avg_sq": (0, 3),
    }


def test_reading_checks_too(tmp_path):
    """A damaged table gives no array and no Parquet file."""
    saved(tmp_path)
    flip(tmp_path)
    with pytest.raises(ValueError, match="is damaged"):
        checkpoint.read_table(tmp_path, "user")
    with pytest.raises(ValueError, match="is damaged"):
        checkpoint.write_parquet(tmp_path, "user", tmp_path / "user.parquet")
    assert not list(tmp_path.glob("*parquet*"))
    with pytest.raises(ValueError, match=r"name: .* has the tables \['user', 'item/ä'\], got 'x'"):
        checkpoint.read_table(tmp_path, "x")
    with pytest.raises(ValueError, match="kind: expected"):
        checkpoint.read_table(tmp_path, "user", "polars")


def test_a_state_dict_is_a_checkpoint_too(tmp_path):
    """Tables within torch.save's file, as one process without the hook writes them."""
    module, _ = trained()
    torch.save({"state_dict": module.state_dict()}, tmp_path / "a.ckpt")
    assert checkpoint.inspect(tmp_path / "a.ckpt")["t"].rows == [len(module.table)]
    same_arrays(checkpoint.read_table(tmp_path / "a.ckpt", "t"), module.table)
    other = DynamicEmbedding(3, name="t", eviction=GlobalStepFilter(50))
    checkpoint.load(tmp_path / "a.ckpt", other, progress=no_progress)
    assert same(by_id(module.table), by_id(other.table))


def test_no_checkpoint_at_all(tmp_path):
    """Files with other content are errors."""
    (tmp_path / "text").write_text("hello")
    torch.save([1, 2], tmp_path / "list")
    torch.save({"state_dict": nn.Linear(1, 1).state_dict()}, tmp_path / "dense")
    torch.save({"model": nn.Linear(1, 1)}, tmp_path / "pickled")
    for name, message in {
        "text": "text: damaged, or ",
        "list": "it holds a list",
        "dense": "it holds no tables",
        "pickled": "more than tensors and primitives: an object of torch.nn.modules.linear.Linear",
        "none": "no such checkpoint",
    }.items():
        with pytest.raises(ValueError, match=message):
            checkpoint.inspect(tmp_path / name)


@pytest.mark.parametrize("path", ["none", "none.ckpt", "."])
def test_a_missing_checkpoint_is_a_file_that_is_not_found(tmp_path, path):
    """Of every reader; a ValueError too, as what is damaged."""
    table, path = HashTable(3, name="t"), tmp_path / path
    for read in (
        lambda: checkpoint.load(path, [table]),
        lambda: checkpoint.inspect(path),
        lambda: checkpoint.read_table(path, "t"),
        lambda: checkpoint.write_parquet(path, "t", tmp_path / "t.parquet"),
        lambda: report(path, tmp_path / "r.html"),
    ):
        with pytest.raises(FileNotFoundError, match=r"no such checkpoint|no checkpoint: it has no"):
            read()
        with pytest.raises(ValueError, match=re.escape(f"{path}: no ")):
            read()
    assert not any(tmp_path.iterdir())


def test_missing_pandas_says_what_to_install(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, [HashTable(2, name="user")])
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r"pandas: pip install 'recis-lightning\[checkpoint\]'"):
        checkpoint.read_table(tmp_path, "user", "pandas")


def test_nobody_is_advised_to_trust_a_file(tmp_path):
    """One that holds other objects is refused, and ``weights_only=False`` is not proposed."""
    path = tmp_path / "foreign.ckpt"
    torch.save({"state_dict": {}, "object": SimpleNamespace()}, path)
    with pytest.raises(ValueError, match="holds more than tensors and primitives") as raised:
        checkpoint.inspect(path)
    assert "weights_only" not in str(raised.value)
