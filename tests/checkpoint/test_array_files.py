"""npz and Parquet files as tables."""

import numpy as np
import pytest
import torch

from recis_lightning import HashTable, checkpoint
from recis_lightning.admission import MinCount
from recis_lightning.checkpoint import Source, load_sources
from recis_lightning.checkpoint.array_files import read_npz
from recis_lightning.checkpoint.progress import no_progress
from recis_lightning.eviction import GlobalStepFilter
from recis_lightning.optim import SparseAdam

IDS = np.array([-(2**63), -1, 0, 7, 2**63 - 1])
ROWS = np.arange(15, dtype=np.float32).reshape(5, 3)


def loaded(file, name="user", dim=3, **arguments):
    """Return a table that was loaded from a file."""
    table = HashTable(dim, name=name)
    load_sources(torch.nn.ModuleList([table]), [Source(file, **arguments)], progress=no_progress)
    return table


def held(table):
    """Return a table's rows by id."""
    return dict(zip(table.ids().tolist(), table.embeddings(table.ids()).tolist(), strict=True))


def expected(ids=IDS, rows=ROWS):
    return {int(i): [float(x) for x in row] for i, row in zip(ids, rows, strict=True)}


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("names", [("ids", "weights"), ("rows", "matrix"), ()])
def test_npz_of_one_table(tmp_path, dtype, names):
    """Named as the file, or renamed; the arrays' names are free."""
    arrays = IDS, ROWS.astype(dtype)
    if names:
        np.savez(tmp_path / "user.npz", **dict(zip(names, arrays, strict=True)))
    else:
        np.savez(tmp_path / "user.npz", *arrays)
    assert held(loaded(tmp_path / "user.npz")) == expected()
    assert held(loaded(tmp_path / "user.npz", "new", rename={"user": "new"})) == expected()


def test_npz_of_several_tables(tmp_path):
    arrays = {"user.ids": IDS, "user.weights": ROWS, "b.ids": IDS[:2], "b.weights": ROWS[:2, :1]}
    np.savez_compressed(tmp_path / "all.npz", **arrays)
    assert held(loaded(tmp_path / "all.npz")) == expected()
    assert held(loaded(tmp_path / "all.npz", "b", 1)) == expected(IDS[:2], ROWS[:2, :1])


@pytest.mark.parametrize("kind", [np.int8, np.int32, np.uint64, ">i4"])
def test_other_integers(tmp_path, kind):
    np.savez(tmp_path / "user.npz", ids=np.array([1, 5], kind), weights=ROWS[:2].astype(">f4"))
    assert held(loaded(tmp_path / "user.npz")) == expected([1, 5], ROWS[:2])


def test_no_rows(tmp_path):
    np.savez(tmp_path / "user.npz", ids=np.empty(0, np.int64), weights=np.empty((0, 3)))
    table = HashTable(3, name="user")
    table.insert(torch.tensor([1]), torch.ones(1, 3))
    load_sources(torch.nn.ModuleList([table]), [Source(tmp_path / "user.npz")])
    assert len(table) == 0


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"ids": IDS}, "expected an array of ids, one dimension of integers"),
        ({"ids": IDS, "a": ROWS, "b": ROWS}, "expected an array of ids"),
        ({"ids": IDS[:4], "weights": ROWS}, "4 ids and 5 rows"),
        ({"ids": IDS, "weights": ROWS.astype(int)}, "expected rows of floats, got int64"),
        ({"ids": np.array([1, 1]), "weights": ROWS[:2]}, "of 2 ids, 1 occur twice"),
        ({"ids": np.array([2**63], np.uint64), "weights": ROWS[:1]}, "expected ids of int64, got"),
        ({"ids": IDS, "weights": ROWS[:, :2]}, "has embedding_dim=2, the model's 3"),
        ({"ids": IDS, "weights": ROWS[:, :0]}, r"expected floating rows \[n, dim\]"),
        ({"ids": np.array(["a", {}], object), "weights": ROWS[:2]}, "damaged, or no npz file"),
    ],
)
def test_npz_that_is_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "user.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        loaded(tmp_path / "user.npz")


@pytest.mark.parametrize("length", [0, 1, 100, 400])
def test_torn_npz(tmp_path, length):
    np.savez(tmp_path / "user.npz", ids=IDS, weights=ROWS)
    content = (tmp_path / "user.npz").read_bytes()
    (tmp_path / "user.npz").write_bytes(content[:length])
    with pytest.raises(ValueError, match="damaged, or no npz file"):
        read_npz(tmp_path / "user.npz")


def test_rows_begin_as_rows_that_were_just_seen(tmp_path):
    """Step, seed and optimizer of the table stay; the state of the rows starts afresh."""
    np.savez(tmp_path / "user.npz", ids=IDS, weights=ROWS)
    table = HashTable(3, name="user", eviction=GlobalStepFilter(2), admission=MinCount(9), seed=5)
    _optimizer = SparseAdam([table], lr=0.1)
    table.update_step(100)
    load_sources(torch.nn.ModuleList([table]), [Source(tmp_path / "user.npz")])
    assert (table.step, table.seed, table.num_updates) == (100, 5, 0)
    assert table.last_seen(torch.from_numpy(IDS)).tolist() == [100] * 5
    assert not any(slot.any() for slot in table.storage.rows.read(table.ids_map()[1])[1].values())
    table.update_step(2)
    table.evict()
    assert len(table) == 5
    table.update_step()
    table.evict()
    assert len(table) == 0


def test_parquet(tmp_path):
    """As ``write_parquet`` and pandas write it, as a list of any length, and as a folder."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = HashTable(3, name="user")
    table.insert(torch.from_numpy(IDS), torch.from_numpy(ROWS))
    checkpoint.save(tmp_path / "saved", [table])
    file = tmp_path / "user.parquet"
    checkpoint.write_parquet(tmp_path / "saved", "user", file)
    assert held(loaded(file)) == expected()
    pytest.importorskip("pandas")
    checkpoint.read_table(tmp_path / "saved", "user", "pandas").to_parquet(file)
    assert held(loaded(file)) == expected()
    columns = {"key": IDS, "vector": [list(row) for row in ROWS.astype(float)]}
    parquet.write_table(pyarrow.table(columns), file, row_group_size=2)
    assert held(loaded(file)) == expected()
    file.unlink()
    file.mkdir()
    for part in range(5):
        some = {name: values[part : part + 1] for name, values in columns.items()}
        parquet.write_table(pyarrow.table(some), file / f"{part}.parquet")
    assert held(loaded(file)) == expected()


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"ids": [1, 2]}, "expected a column ids of integers, and weights of lists"),
        ({"ids": [1, None], "weights": [[1.0], [2.0]]}, "expected ids, got 1 nulls"),
        ({"ids": [1, 2], "weights": [[1.0], [2.0, 3.0]]}, "expected lists of one length"),
        ({"ids": [1, 2], "weights": [[1.0], None]}, "got nulls in weights"),
        ({"ids": [1, 2], "weights": [["a"], ["b"]]}, "expected rows of floats"),
        ({"ids": ["a"], "weights": [[1.0]]}, "expected a column ids of integers"),
        ({"ids": [1], "weights_1": [1.0], "weights_0": [None]}, "got 1 nulls in weights_0"),
        ({"ids": [1], "weights_0": [1.0], "weights_2": [2.0]}, r"got no \['weights_1'\]"),
        ({"ids": [1], "weights_00": [1.0]}, r"got no \['weights_0'\]"),
    ],
)
def test_parquet_that_is_refused(tmp_path, columns, message):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table(columns), tmp_path / "user.parquet")
    with pytest.raises(ValueError, match=message):
        loaded(tmp_path / "user.parquet")


def test_no_parquet(tmp_path):
    pytest.importorskip("pyarrow")
    (tmp_path / "user.parquet").write_bytes(b"PAR1 and nothing more")
    with pytest.raises(ValueError, match="damaged, or no Parquet file"):
        loaded(tmp_path / "user.parquet")
