"""The data modules of the DeepFM example."""

import subprocess
import zipfile
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pytest
import torch

from examples.deepfm import movielens
from examples.deepfm.batch import Batch
from examples.deepfm.criteo import (
    CATEGORIES,
    MISSING_ID,
    Criteo,
    CriteoDataModule,
    rebatch,
    to_batch,
)
from examples.deepfm.movielens import MovieLensDataModule, read, stable_id, take_bags
from recis_lightning import Jagged
from tests.helpers.deepfm_data import criteo_rows, write_criteo, write_movielens

SAMPLE = Path(__file__).parents[3] / "shared" / "data" / "criteo"


@pytest.fixture
def ml(tmp_path: Path) -> MovieLensDataModule:
    """A data module over a hundred interactions."""
    data = MovieLensDataModule(str(write_movielens(tmp_path)), batch_size=16)
    data.prepare_data()
    data.setup()
    return data


def users(batches: list[Batch]) -> list[int]:
    return torch.cat([batch["features"]["user"] for batch in batches]).tolist()


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


def test_stable_id_is_the_number_or_a_fixed_hash():
    assert stable_id("0") == 0
    assert stable_id("85711") == 85711
    assert stable_id("Drama") == -3780808780974187119
    assert stable_id("") != stable_id("Drama")
    assert all(-(2**63) <= stable_id(f"x{n}") < 2**63 for n in range(100))


@pytest.mark.parametrize("rows", [[], [0], [2, 0, 2], [3, 1, 1], [0, 1, 2, 3]])
def test_take_bags_gives_the_bags_asked_for(rows):
    bags = [[7, 8], [], [9], [1, 2, 3]]
    jagged = Jagged(torch.tensor([7, 8, 9, 1, 2, 3]), torch.tensor([0, 2, 2, 3, 6]))
    taken = take_bags(jagged, torch.tensor(rows, dtype=torch.int64))
    ends = taken.offsets.tolist()
    assert ends[0] == 0
    got = [taken.values[a:b].tolist() for a, b in pairwise(ends)]
    assert got == [bags[row] for row in rows]


def test_read_joins_the_files_in_the_order_of_time(tmp_path):
    write_movielens(tmp_path, num_rows=3)
    header, *rows = (tmp_path / "ml-100k.inter").read_text().splitlines()
    rows = ["1\t2\t3\t7200", "2\t3\t4\t3600", "2\t1\t5\t7200"]  # two at the same time
    (tmp_path / "ml-100k.inter").write_text("\n".join([header, *rows]) + "\n")
    data = read(tmp_path)
    batch = data.__getitems__([0, 1, 2])
    ids = {name: batch["features"][name].tolist() for name in data.ids}
    assert ids["user"] == [2, 1, 2]
    assert ids["item"] == [3, 2, 1]
    assert ids["hour"] == [1, 2, 2]
    assert ids["age"] == [53, 24, 53]
    assert ids["zip"] == [stable_id("T8H"), 857, stable_id("T8H")]
    assert ids["year"] == [stable_id("unknown"), 1995, 1995]
    assert batch["label"].tolist() == [1, 0, 1]
    assert batch["group"].tolist() == ids["user"]
    assert batch["dense"].shape == (3, 0)
    genres = batch["features"]["genres"]
    assert genres.offsets.tolist() == [0, 0, 1, 4]
    names = ["Action", "Animation", "Children's", "Comedy"]
    assert genres.values.tolist() == [stable_id(name) for name in names]


def test_movielens_is_cut_by_time(ml):
    assert [len(part) for part in (ml.train, ml.val, ml.test)] == [72, 8, 20]
    everything = timeline([read(ml.root).__getitems__([*range(100)])])
    assert timeline(list(ml.val_dataloader())) == everything[72:80]
    assert timeline(list(ml.test_dataloader())) == everything[80:]
    assert sorted(timeline(list(ml.train_dataloader()))) == sorted(everything[:72])


def test_movielens_without_validation_has_no_validation_loader(ml):
    whole = MovieLensDataModule(str(ml.root), val_fraction=0.0)
    whole.setup()
    assert len(whole.train) == 80
    assert whole.val_dataloader() == []


@pytest.mark.parametrize("fraction", [-0.1, 1.0])
def test_val_fraction_out_of_range_is_refused(fraction):
    with pytest.raises(ValueError, match="val_fraction"):
        MovieLensDataModule(val_fraction=fraction)


def test_training_order_depends_on_seed_and_epoch_only(ml):
    def order(seed: int, epoch: int, num_workers: int = 0) -> list[tuple[int, int, float]]:
        ml.seed, ml.num_workers = seed, num_workers
        loader = ml.train_dataloader()
        loader.sampler.set_epoch(epoch)
        return timeline(list(loader))

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


def test_to_batch_takes_numbers_ids_and_what_is_missing():
    batch = to_batch(pa.table(criteo_rows(4)))
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


def test_negative_counts_keep_their_sign():
    rows = criteo_rows(2)
    rows["i1"] = [[-3.0], [3.0]]
    first = to_batch(pa.table(rows))["dense"][:, 0]
    torch.testing.assert_close(first, torch.tensor([-1.0, 1.0]) * torch.tensor(4.0).log())


def test_rows_with_several_values_are_refused():
    rows = criteo_rows(2)
    rows["c3"] = [[1], [1, 2]]
    with pytest.raises(ValueError, match=r"a.orc: column 'c3' has a row with 2 values"):
        to_batch(pa.table(rows), "a.orc")


def test_absent_columns_are_named():
    rows = criteo_rows(2)
    del rows["i7"]
    with pytest.raises(ValueError, match=r"a.orc lacks the columns \['i7'\]"):
        to_batch(pa.table(rows), "a.orc")


def numbers(batches: list[Batch]) -> list[int]:
    return torch.cat([batch["features"]["c1"] for batch in batches]).tolist()


@pytest.mark.parametrize("sizes", [[], [3], [4], [1, 1, 1, 1, 1], [9, 0, 2], [4, 4]])
def test_rebatch_keeps_rows_and_order(sizes):
    firsts = [sum(sizes[:n]) for n in range(len(sizes))]
    pieces = [
        to_batch(pa.table(criteo_rows(size, first)))
        for size, first in zip(sizes, firsts, strict=True)
        if size
    ]
    batches = list(rebatch(iter(pieces), 4))
    total = sum(sizes)
    assert [len(batch["label"]) for batch in batches] == [4] * (total // 4) + [total % 4] * bool(
        total % 4
    )
    if batches:
        assert numbers(batches) == list(range(total))


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder with 20 rows in ORC and 30 in Parquet, the latter in three pieces."""
    write_criteo(tmp_path / "part-0.orc", 20)
    write_criteo(tmp_path / "part-1.parquet", 30, first=20, piece=10)
    return tmp_path


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("shuffle_rows", [0, 15])
def test_criteo_reads_every_row_once(files, num_workers, shuffle_rows):
    data = CriteoDataModule(
        str(files), ["part-*"], batch_size=8, shuffle_rows=shuffle_rows, num_workers=num_workers
    )
    rows = numbers(list(data.train_dataloader()))
    assert sorted(rows) == list(range(50))
    assert (rows == list(range(50))) is (shuffle_rows == 0 and num_workers == 0)


def test_criteo_shuffles_by_its_seed(files):
    def order(seed: int) -> list[int]:
        return numbers(list(Criteo(sorted(files.iterdir()), 8, shuffle_rows=50, seed=seed)))

    first = order(0)
    torch.manual_seed(5)
    assert order(0) == first
    assert order(1) != first


def test_criteo_parts_come_from_patterns_in_order(files):
    data = CriteoDataModule(
        str(files), ["*1.parquet", "part-*"], val=["part-0.orc"], test=["part-[1-9]*"]
    )
    assert [path.name for path in data.files("train")] == ["part-1.parquet", "part-0.orc"]
    assert numbers(list(data.val_dataloader())) == list(range(20))
    assert numbers(list(data.test_dataloader())) == list(range(20, 50))
    assert list(CriteoDataModule(str(files), ["*"]).val_dataloader()) == []


def test_a_pattern_without_files_is_an_error(tmp_path):
    data = CriteoDataModule(str(tmp_path), ["part-*"])
    with pytest.raises(FileNotFoundError, match=r"'part-\*' \(train part\).*`root`"):
        data.train_dataloader()


def test_other_formats_are_refused(tmp_path):
    (tmp_path / "part-0.csv").write_text("")
    with pytest.raises(ValueError, match=r"\.orc or \.parquet"):
        list(CriteoDataModule(str(tmp_path), ["part-*"]).train_dataloader())


@pytest.mark.skipif(not SAMPLE.is_dir(), reason="the Criteo sample is not beside the checkout")
def test_the_criteo_sample_can_be_read():
    data = CriteoDataModule(str(SAMPLE), ["part-0.orc"], batch_size=4096)
    batches = list(data.train_dataloader())
    label = torch.cat([batch["label"] for batch in batches])
    assert [len(batch["label"]) for batch in batches] == [4096, 4096, 1808]
    assert 0.02 < label.mean() < 0.05
    assert all(batch["dense"].isfinite().all() for batch in batches)
