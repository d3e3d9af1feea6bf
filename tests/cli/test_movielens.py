"""MovieLens-100k of recbole's wheel, read without pyarrow."""

import sys
import zipfile

import pytest
import torch

from examples.deepfm.movielens import FEATURES, part_files, to_batch, write_parts
from recis_lightning import Jagged
from recis_lightning.cli.movielens import examples_of, find_texts
from tests.helpers.deepfm_data import write_movielens


def test_the_columns_are_those_of_the_example(tmp_path):
    """Ids are the example's, but for hashes of strings, of which equal ones are of equal words."""
    import pyarrow as pa
    from pyarrow import parquet

    write_movielens(tmp_path, 100)
    write_parts(tmp_path)
    table = pa.concat_tables([parquet.read_table(path) for path in part_files(tmp_path)])
    theirs = to_batch(FEATURES(table))
    ours = examples_of(find_texts(str(tmp_path)))
    assert torch.equal(ours.label, theirs["label"])
    for name in ("user", "item", "age"):
        assert torch.equal(ours.features[name], theirs["features"][name]), name
    for name in ("gender", "occupation", "zip", "year"):
        pairs = set(
            zip(ours.features[name].tolist(), theirs["features"][name].tolist(), strict=True)
        )
        assert len(pairs) == len({pair[0] for pair in pairs}) == len({pair[1] for pair in pairs})
    genres = ours.features["genres"]
    assert torch.equal(genres.offsets, theirs["features"]["genres"].offsets)


def test_a_part_has_the_bags_of_its_rows(tmp_path):
    examples = examples_of(find_texts(str(write_movielens(tmp_path))))
    part = examples.part(torch.tensor([5, 0, 99]))
    genres, whole = part.features["genres"], examples.features["genres"]
    assert isinstance(genres, Jagged)
    for bag, row in enumerate([5, 0, 99]):
        ours = genres.values[genres.offsets[bag] : genres.offsets[bag + 1]]
        assert torch.equal(ours, whole.values[whole.offsets[row] : whole.offsets[row + 1]])
    assert torch.equal(part.label, examples.label[[5, 0, 99]])
    assert len(examples.part(torch.arange(0)).label) == 0


def test_the_data_is_found_in_a_wheel_and_in_the_installed_package(tmp_path, monkeypatch):
    folder = write_movielens(tmp_path / "site" / "recbole" / "dataset_example" / "ml-100k")
    (tmp_path / "site" / "recbole" / "__init__.py").write_text("raise RuntimeError('imported')")
    wheel = tmp_path / "wheels" / "recbole-1.2.1-py3-none-any.whl"
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        for file in folder.iterdir():
            archive.write(file, f"recbole/dataset_example/ml-100k/{file.name}")
    texts = find_texts(str(folder))
    assert find_texts(str(wheel)) == find_texts(str(wheel.parent)) == texts
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert find_texts(None) == texts
    assert "recbole" not in sys.modules


def test_data_that_is_not_there_is_named_with_the_command_that_gets_it(tmp_path, monkeypatch):
    monkeypatch.setattr("recis_lightning.cli.movielens.find_spec", lambda name: None)
    for given in (None, str(tmp_path), str(tmp_path / "recbole-1.2.1.whl")):
        with pytest.raises(FileNotFoundError, match="pip download --no-deps"):
            find_texts(given)


def test_other_files_are_refused(tmp_path):
    texts = find_texts(str(write_movielens(tmp_path)))
    for name, text in texts.items():
        head, *lines = text.splitlines()
        for damaged in (head, "\n".join([head.replace("_id", "_no"), *lines])):
            with pytest.raises(ValueError, match="recbole's wheel"):
                examples_of({**texts, name: damaged})
