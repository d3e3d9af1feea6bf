"""Checkpoints that lie in a folder."""

import os

import torch

from recis_lightning import HashTable, checkpoint
from recis_lightning.checkpoint.folder_listing import checkpoints_in


def test_the_newest_comes_first_wherever_it_lies(tmp_path):
    table = HashTable(2, name="user")
    table.insert(torch.arange(3), torch.ones(3, 2))
    checkpoint.save(tmp_path / "saved", [table])
    for name in ("a.ckpt", "run/version_0/b.ckpt", "notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder.ckpt").mkdir()
    (tmp_path / "gone.ckpt").symlink_to("nothing")
    for age, name in enumerate(["run/version_0/b.ckpt", "saved/checkpoint.json", "a.ckpt"]):
        os.utime(tmp_path / name, (1000 - age, 1000 - age))
    found = [path.relative_to(tmp_path).as_posix() for path in checkpoints_in(tmp_path)]
    assert found == ["run/version_0/b.ckpt", "saved", "a.ckpt"]
    assert checkpoints_in(tmp_path / "none") == []
