"""``recis-lightning inspect``: checkpoints, saved tables and served folders."""

import os

import lightning as L
import pytest
import torch
from torch import nn

from recis_lightning import DynamicEmbedding, EmbeddingOption, HashTable, checkpoint, serving
from recis_lightning.admission import MinCount
from recis_lightning.cli import main
from recis_lightning.cli.inspection import inspection
from recis_lightning.eviction import GlobalStepFilter
from recis_lightning.optim import SparseAdam


def words(text):
    """Return the words of each line."""
    return [line.split() for line in text.splitlines()]


def test_saved_tables(tmp_path):
    user = HashTable(4, name="user", eviction=GlobalStepFilter(9))
    SparseAdam([user])
    user.insert(torch.arange(1234), torch.ones(1234, 4))
    user.update_step(7)
    checkpoint.save(tmp_path, [user, HashTable(2, name="item", dtype=torch.bfloat16)])
    lines = words(inspection(tmp_path))
    assert lines[0][0] == f"{tmp_path}:"
    found = {line[0]: line[1:-1] for line in lines[3:]}
    state = ["exp_avg,", "exp_avg_sq"]
    assert found["user"] == ["1,234", "4", "float32", *state, "last_seen", "7", "0"]
    assert found["item"] == ["0", "2", "bfloat16", "-", "-", "0", "0"]


class Model(L.LightningModule):
    def __init__(self, options):
        super().__init__()
        self.save_hyperparameters()
        self.user = DynamicEmbedding(3, name="user")


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_a_checkpoint_of_lightning_names_the_policies_of_hyperparameters(tmp_path):
    option = EmbeddingOption(3, admission=MinCount(2), eviction=GlobalStepFilter(5))
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, max_steps=0)
    model = Model({"user": option, "city": EmbeddingOption(3, table="place")})
    trainer.strategy.connect(model)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    lines = inspection(tmp_path / "last.ckpt").splitlines()
    assert lines[0].endswith("last.ckpt: checkpoint of Lightning")
    assert lines[3].split()[:4] == ["user", "0", "3", "float32"]
    assert lines[-1].split()[0] == "user"
    assert str(MinCount(2)) in lines[-1]
    assert str(GlobalStepFilter(5)) in lines[-1]
    assert "place" not in lines[-2]  # no policies


def test_a_served_folder(tmp_path):
    model = nn.Sequential(DynamicEmbedding(4, name="user"), nn.Linear(4, 1))
    model(torch.arange(3))
    serving.export(model, tmp_path, example=torch.arange(2), rows="int8")
    text = inspection(tmp_path)
    assert "served folder of Sequential" in text
    (row,) = [line for line in words(text) if line[:1] == ["user"]]
    assert row[:5] == ["user", "3", "4", "float32", "int8"]


def test_a_folder_of_checkpoints_is_listed_and_its_newest_whole_one_shown(tmp_path, capsys):
    table = HashTable(2, name="user")
    torch.save(
        {"state_dict": {"user._extra_state": table.state_dict()["_extra_state"]}},
        tmp_path / "a.ckpt",
    )
    checkpoint.save(tmp_path / "run" / "saved", [table])
    (tmp_path / "torn.ckpt").write_bytes(b"PK")
    for age, name in enumerate(["torn.ckpt", "run/saved/checkpoint.json", "a.ckpt"]):
        os.utime(tmp_path / name, (1000 - age, 1000 - age))
    main(["inspect", str(tmp_path)])
    text = capsys.readouterr().out
    assert text.endswith("\n")
    lines = text.splitlines()
    assert lines[0] == f"{tmp_path}: checkpoints, the newest first"
    assert lines[2].startswith("torn.ckpt  (left out: ")
    assert lines[3:5] == ["run/saved  (the newest that is whole: see below)", "a.ckpt"]
    assert lines[6] == f"{tmp_path}/run/saved: tables of checkpoint.save"
    assert lines[9].split()[:3] == ["user", "0", "2"]
    main(["inspect", str(tmp_path / "a.ckpt")])
    assert "user" in capsys.readouterr().out


def test_what_is_no_checkpoint_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("words")
    with pytest.raises(ValueError, match="notes"):
        inspection(tmp_path / "notes.txt")
    with pytest.raises(ValueError, match="neither"):
        inspection(tmp_path)
    (tmp_path / "torn.ckpt").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"none of its checkpoints.*torn.ckpt  \(left out: "):
        inspection(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        inspection(tmp_path / "nothing")
