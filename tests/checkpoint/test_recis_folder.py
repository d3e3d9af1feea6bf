"""Tables that RecIS saved."""

import numpy as np
import pytest
import torch

from recis_lightning import HashTable
from recis_lightning.checkpoint import Source, load_sources
from recis_lightning.checkpoint.recis_folder import read_recis_folder
from tests.helpers.recis_files import write_recis

IDS = np.arange(-3, 40)
ROWS = np.random.default_rng(0).normal(size=(43, 4)).astype(np.float32)
TABLES = {"layer.user": (IDS, ROWS), "item": (IDS[:5], ROWS[:5, :2])}


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_rows_by_their_ids(tmp_path, ranks, old):
    """Of all parts, whatever number of ranks saved; dense tensors come from ``model.pt``."""
    write_recis(tmp_path / "ckpt-5", TABLES, ranks, old)
    dense = {"tower.weight": torch.full((1, 2), 3.0), "tower.bias": torch.zeros(1)}
    torch.save(dense, tmp_path / "ckpt-5" / "model.pt")
    (tmp_path / "checkpoint").write_text("ckpt-1\nckpt-5\n")
    model = torch.nn.ModuleDict(
        {
            "user": HashTable(4, name="user"),
            "item": HashTable(2, name="item"),
            "tower": torch.nn.Linear(2, 1),
        }
    )
    # The folder of checkpoints, whose list names the newest.
    load_sources(model, [Source(tmp_path, rename={"layer.*": "*"})])
    assert sorted(model["user"].ids().tolist()) == IDS.tolist()
    assert torch.equal(model["user"].embeddings(torch.from_numpy(IDS)), torch.from_numpy(ROWS))
    assert torch.equal(
        model["item"].embeddings(torch.from_numpy(IDS[:5])), torch.from_numpy(ROWS[:5, :2])
    )
    assert model["tower"].weight.tolist() == [[3.0, 3.0]]


@pytest.mark.parametrize("length", [0, 4, 8, 60, 500])
def test_torn_files(tmp_path, length):
    write_recis(tmp_path, TABLES, 1)
    (file,) = tmp_path.glob("model-*")
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(ValueError, match=r"truncated, or no safetensors|damaged, or no file"):
        read_recis_folder(tmp_path)


def test_a_missing_file(tmp_path):
    """Rows without ids are not passed over."""
    write_recis(tmp_path, TABLES, 1)
    text = (tmp_path / "tensorkey.json").read_text()
    (tmp_path / "tensorkey.json").write_text(text.replace("item@id^", "item@di^"))
    with pytest.raises(ValueError, match="expected ids and rows of each part, got one of"):
        read_recis_folder(tmp_path)
    (tmp_path / "tensorkey.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"tensorkey.json: damaged"):
        read_recis_folder(tmp_path)


def test_names_without_a_list(tmp_path):
    """Without ``tensorkey.json`` the last dot divides table and slot."""
    write_recis(tmp_path, TABLES)
    (tmp_path / "tensorkey.json").unlink()
    assert set(read_recis_folder(tmp_path).names()) == set(TABLES)
