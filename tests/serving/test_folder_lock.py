"""Lock of a folder: one holder, whatever happens to it."""

import errno
import fcntl
import os

import pytest

from recis_lightning.serving.folder_lock import exporting


def test_a_folder_is_held_by_one(tmp_path):
    with exporting(tmp_path) as is_held:
        assert is_held
        with pytest.raises(RuntimeError, match="another export writes to"), exporting(tmp_path):
            pass
        (tmp_path / "other").mkdir()
        with exporting(tmp_path / "other"):
            pass
    with exporting(tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_an_error_frees_it(tmp_path):
    with pytest.raises(KeyError), exporting(tmp_path):
        raise KeyError
    with exporting(tmp_path):
        pass


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_does_not_keep_it(tmp_path):
    read, write = os.pipe()
    with exporting(tmp_path):
        child = os.fork()
        if not child:
            os.read(read, 1)  # until the parent has seen that it is free
            os._exit(0)
    try:
        with exporting(tmp_path) as is_held:
            assert is_held
    finally:
        os.write(write, b"x")
        os.waitpid(child, 0)


def test_a_file_system_that_cannot_lock_is_no_error(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "flock", fail)
    with exporting(tmp_path) as is_held:
        assert not is_held
