"""The data modules of the DeepFM example."""

import subprocess
import zipfile
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from pyarrow import parquet

from examples.deepfm import movielens
from examples.deepfm.batch import Batch
from examples.deepfm.criteo import (
    CATEGORIES,
    MISSING_ID,
    CriteoDataModule,
    criteo_features,
    to_batch,
)
from examples.deepfm.movielens import MovieLensDataModule, part_files, write_parts
from recis_lightning.data import DataFileError, hash_strings
from tests.helpers.deepfm_data import criteo_rows, write_criteo, write_movielens

SAMPLE = Path(__file__).parents[3] / "shared" / "data" / "criteo"


@pytest.fixture
def ml(tmp_path: Path) -> MovieLensDataModule:
    """A data module over a hundred interactions."""
    data = MovieLensDataModule(str(write_movielens(tmp_path)), batch_size=16)
    data.prepare_data()
    return data


def timeline(batches: list[Batch]) -> list[tuple[int, int, float]]:
    """Return what identifies each example, in order."""
    return [
        (int(user), int(item), float(label))
        for batch in batches
        for user, item, label in zip(
            batch["features"]["user"], batch["features"]["item"], batch["label"], strict=True
        )
    ]


# ---- MovieLens


def test_parts_join_the_files_in_the_order_of_time(tmp_path):
    write_movielens(tmp_path, num_rows=3)
    header, *rows = (tmp_path / "ml-100k.inter").read_text().splitlines()
    rows = ["1\t2\t3\t7200", "2\t3\t4\t3600", "2\t1\t5\t7200"]  # two at the same time
    (tmp_path / "ml-100k.inter").write_text("\n".join([header, *rows]) + "\n")
    write_parts(tmp_path)
    table = pa.concat_tables([parquet.read_table(path) for path in part_files(tmp_path)])
    columns = {name: table[name] for name in table.column_names}
    batch = movielens.to_batch(movielens.FEATURES(columns))
    features = batch["features"]
    assert list(features) == movielens.IDS
    assert features["user"].tolist() == [2, 1, 2]
    assert features["item"].tolist() == [3, 2, 1]
    assert features["hour"].tolist() == [1, 2, 2]
    assert features["age"].tolist() == [53, 24, 53]
    assert torch.equal(features["zip"], hash_strings(["T8H", "857", "T8H"]))
    assert torch.equal(features["year"], hash_strings(["unknown", "1995", "1995"]))
    assert batch["label"].tolist() == [1, 0, 1]
    assert batch["label"].dtype is torch.float32
    assert batch["group"].tolist() == features["user"].tolist()
    assert batch["dense"].shape == (3, 0)
    genres = features["genres"]
    assert genres.offsets.tolist() == [0, 0, 1, 4]
    names = ["Action", "Animation", "Children's", "Comedy"]
    assert torch.equal(genres.values, hash_strings(names))


def test_movielens_is_cut_by_time(ml):
    val, test = timeline([*ml.val_dataloader()]), timeline([*ml.test_dataloader()])
    train = timeline([*ml.train_dataloader()])
    assert [len(part) for part in (train, val, test)] == [72, 8, 20]
    whole = MovieLensDataModule(str(ml.root), batch_size=100, val_fraction=0.0)
    assert list(whole.val_dataloader()) == []
    assert timeline([*whole.test_dataloader()]) == test
    in_order = whole.dataset("train")
    in_order.shuffle_rows = 0
    everything = timeline([*in_order])
    assert everything[72:] == val
    assert sorted(everything[:72]) == sorted(train)
    assert everything[:72] != train


def test_the_parts_are_written_once(ml):
    before = [path.stat().st_mtime_ns for path in part_files(ml.root)]
    ml.prepare_data()
    assert [path.stat().st_mtime_ns for path in part_files(ml.root)] == before
    part_files(ml.root)[7].unlink()
    ml.prepare_data()
    assert all(path.is_file() for path in part_files(ml.root))
    assert not list(ml.root.glob(".*"))


@pytest.mark.parametrize("fraction", [-0.1, 1.0])
def test_val_fraction_out_of_range_is_refused(fraction):
    with pytest.raises(ValueError, match="val_fraction"):
        MovieLensDataModule(val_fraction=fraction)


def test_training_order_depends_on_seed_and_epoch_only(ml):
    def order(seed: int, epoch: int, num_workers: int = 0) -> list[tuple[int, int, float]]:
        root = str(ml.root)
        data = MovieLensDataModule(root, batch_size=16, seed=seed, num_workers=num_workers)
        data.dataset("train").set_epoch(epoch)
        return timeline([*data.train_dataloader()])

    first = order(0, 0)
    torch.manual_seed(5)
    assert order(0, 0) == first
    assert order(0, 0, num_workers=2) == first
    assert order(1, 0) != first
    assert order(0, 1) != first
    assert sorted(order(0, 1)) == sorted(first)


def fake_wheel(
    folder: Path, source: Path, monkeypatch: pytest.MonkeyPatch, damage: str = ""
) -> None:
    """Put a wheel with the data of ``source`` into ``folder``, one file of it damaged."""
    hashes = {}
    with zipfile.ZipFile(folder / "recbole-1.2.1-py3-none-any.whl", "w") as archive:
        for name in movielens._SHA256:
            content = (source / name).read_bytes()
            hashes[name] = movielens.hashlib.sha256(content).hexdigest()
            archive.writestr(f"{movielens._MEMBERS}/{name}", content + damage.encode())
    monkeypatch.setattr(movielens, "_SHA256", hashes)


def test_download_uses_a_wheel_at_hand_and_then_nothing(tmp_path, monkeypatch):
    source = write_movielens(tmp_path / "source")
    root = tmp_path / "root"
    root.mkdir()
    fake_wheel(root, source, monkeypatch)
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("no need for pip"))
    movielens.download(root)
    assert {path.name for path in root.iterdir()} == {
        *movielens._SHA256,
        "recbole-1.2.1-py3-none-any.whl",
    }
    assert (root / "ml-100k.user").read_text() == (source / "ml-100k.user").read_text()
    (root / "recbole-1.2.1-py3-none-any.whl").unlink()
    movielens.download(root)


def test_a_damaged_download_leaves_nothing(tmp_path, monkeypatch):
    fake_wheel(tmp_path, write_movielens(tmp_path / "source"), monkeypatch, damage="x")
    with pytest.raises(RuntimeError, match=r"not the file that was expected"):
        movielens.download(tmp_path)
    assert not list(tmp_path.glob("ml-100k.*"))


def test_without_network_the_error_says_what_to_do(tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "no route to host")
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: failed)
    with pytest.raises(RuntimeError, match=r"(?s)pip download --no-deps recbole.*no route to host"):
        MovieLensDataModule(str(tmp_path / "root")).prepare_data()
    assert not list((tmp_path / "root").iterdir())


# ---- Criteo


def criteo_batch(rows: dict[str, list[list[float]]]) -> Batch:
    return to_batch(criteo_features(hash=None)(rows))


def test_criteo_takes_numbers_ids_and_what_is_missing():
    batch = criteo_batch(criteo_rows(4))
    assert batch["label"].tolist() == [1, 0, 0, 0]
    assert batch["features"]["c1"].tolist() == [0, 1, 2, 3]
    assert batch["features"]["c2"].tolist() == [MISSING_ID, 2**39 + 1, 2**39 + 2, MISSING_ID]
    assert list(batch["features"]) == CATEGORIES
    counts, missing = batch["dense"].split(13, dim=1)
    torch.testing.assert_close(counts[:, 0], torch.tensor([1.0, 2.0, 3.0, 4.0]).log1p())
    torch.testing.assert_close(counts[:, 1], torch.tensor([0.0, 3.0, 4.0, 0.0]).log1p())
    assert missing[:, 1].tolist() == [1, 0, 0, 1]
    assert missing.sum() == 2
    assert batch["group"].tolist() == [-1] * 4


def test_hex_strings_are_hashed():
    """As the raw files have them: a value a row, null where it is missing."""
    rows = {
        name: [values[0] if values else None for values in column]
        for name, column in criteo_rows(2).items()
    }
    rows |= {name: ["68fd1e64", None] for name in CATEGORIES}
    features = to_batch(criteo_features()(rows))["features"]
    known = int(hash_strings(["68fd1e64"])[0])
    assert all(column.tolist() == [known, MISSING_ID] for column in features.values())


def test_negative_counts_keep_their_sign():
    rows = criteo_rows(2)
    rows["i1"] = [[-3.0], [3.0]]
    first = criteo_batch(rows)["dense"][:, 0]
    torch.testing.assert_close(first, torch.tensor([-1.0, 1.0]) * torch.tensor(4.0).log())


def test_rows_with_several_values_are_refused():
    rows = criteo_rows(2)
    rows["c3"] = [[1], [1, 2]]
    with pytest.raises(ValueError, match=r"column 'c3': a row has 2 values, not one"):
        criteo_batch(rows)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder with 20 rows in ORC and 30 in Parquet, the latter in three pieces."""
    write_criteo(tmp_path / "part-0.orc", 20)
    write_criteo(tmp_path / "part-1.parquet", 30, first=20, piece=10)
    return tmp_path


def numbers(batches: list[Batch]) -> list[int]:
    return torch.cat([batch["features"]["c1"] for batch in batches]).tolist()


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("shuffle_rows", [0, 15])
def test_criteo_reads_every_row_once(files, num_workers, shuffle_rows):
    data = CriteoDataModule(
        str(files),
        ["part-*"],
        batch_size=8,
        shuffle_rows=shuffle_rows,
        num_workers=num_workers,
        hash=None,
    )
    rows = numbers(list(data.train_dataloader()))
    assert sorted(rows) == list(range(50))
    assert (rows == list(range(50))) is (shuffle_rows == 0 and num_workers == 0)


def test_criteo_parts_come_from_patterns_in_order(files):
    data = CriteoDataModule(
        str(files), ["*1.parquet", "part-*"], val=["part-0.orc"], test=["part-[1-9]*"], hash=None
    )
    names = [Path(file.path).name for file in data.dataset("train")._files.files]
    assert names == ["part-1.parquet", "part-0.orc"]
    assert numbers(list(data.val_dataloader())) == list(range(20))
    assert numbers(list(data.test_dataloader())) == list(range(20, 50))
    assert list(CriteoDataModule(str(files), ["*"], val=[]).val_dataloader()) == []


def test_files_that_do_not_fit_are_named(tmp_path):
    data = CriteoDataModule(str(tmp_path), ["part-*"])
    with pytest.raises(FileNotFoundError, match=r"no file matches '.*/part-\*'"):
        data.train_dataloader()
    (tmp_path / "part-0.csv").write_text("")
    with pytest.raises(ValueError, match=r"\.parquet.*\.orc"):
        data.train_dataloader()
    (tmp_path / "part-0.csv").unlink()
    rows = criteo_rows(2)
    del rows["i7"]
    parquet.write_table(pa.table(rows), tmp_path / "part-0.parquet")
    with pytest.raises(DataFileError, match=r"part-0.parquet: columns \['i7'\] are missing"):
        data.train_dataloader()


@pytest.mark.skipif(not SAMPLE.is_dir(), reason="the Criteo sample is not beside the checkout")
def test_the_criteo_sample_can_be_read():
    data = CriteoDataModule(str(SAMPLE), ["part-0.orc"], batch_size=4096)
    batches = list(data.train_dataloader())
    label = torch.cat([batch["label"] for batch in batches])
    assert [len(batch["label"]) for batch in batches] == [4096, 4096, 1808]
    assert 0.02 < label.mean() < 0.05
    assert all(batch["dense"].isfinite().all() for batch in batches)
