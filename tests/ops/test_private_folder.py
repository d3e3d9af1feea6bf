"""Folders for kernels: made for their user alone, refused if others own or can write them."""

import os
import stat

import pytest

from recis_lightning.ops.private_folder import open_private


def test_a_new_folder_is_its_users_alone(tmp_path):
    folder = tmp_path / "a" / "b"
    assert open_private(folder) is None
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert open_private(folder) is None


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o720, 0o702])
def test_one_that_others_can_write_to_is_refused(tmp_path, mode):
    tmp_path.chmod(mode)
    assert "can be written to by others" in open_private(tmp_path)


def test_one_that_another_user_owns_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: tmp_path.stat().st_uid + 1)
    assert f"{tmp_path} belongs to user" in open_private(tmp_path)


def test_links_and_files_are_refused(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path)
    assert "File exists" in open_private(tmp_path / "file")
    assert "is a link" in open_private(tmp_path / "link")


def test_a_read_only_place_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write to anything
    assert "cannot be written to" in open_private(tmp_path)
