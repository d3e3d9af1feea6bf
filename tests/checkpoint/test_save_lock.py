"""The lock of a checkpoint's folder, and what is removed from it."""

import json
import multiprocessing
import os
import signal
import socket
import threading
import time

import pytest
import torch

from recis_lightning import HashTable, checkpoint
from recis_lightning.checkpoint import save_lock
from recis_lightning.checkpoint.commit import Commit
from recis_lightning.checkpoint.save_lock import LOCK_FILE, begin_save, clear_killed_saves, end_save
from tests.helpers.interruptions import run_interrupted

IDS = {"killed": "0" * 16, "there": "1" * 16, "before": "2" * 16, "next": "3" * 16}
HOST = socket.gethostname()
_FORK = multiprocessing.get_context("fork")
pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")


def shard(save):
    return f"t.0-of-1.{IDS[save]}.safetensors"


def nothing():
    return None


def there():
    return Commit.from_state(
        {
            "format": 1,
            "save_id": IDS["there"],
            "world_size": 1,
            "folder": ".",
            "location": "",
            "tables": {"t": [{"file": shard("there"), "rows": 0, "size": 0, "checksum": 0}]},
        },
        "here",
    )


def unreadable():
    raise ValueError


def lock_of(folder, *lines, pid=2**22 + 1, host=HOST):
    """Write the lock that a killed process leaves."""
    lines = [{"format": "recis_lightning.lock", "pid": pid, "host": host}, *lines]
    (folder / LOCK_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))


def names(folder):
    return sorted(os.listdir(folder))


def test_holds_until_the_last_save_ends(tmp_path):
    """One owner may have several saves under way; the file goes with the last."""
    folder, owner = tmp_path / "a.ckpt.tables", object()
    begin_save(folder, IDS["there"], owner, nothing)
    begin_save(folder, IDS["next"], owner, nothing)
    with pytest.raises(RuntimeError, match=rf"a.ckpt.tables: another save .*{os.getpid()} on "):
        begin_save(folder, IDS["before"], object(), nothing)
    end_save(folder, IDS["there"])
    assert names(folder) == [LOCK_FILE]
    end_save(folder, IDS["next"])
    end_save(folder, IDS["next"])
    assert names(folder) == []
    begin_save(folder, IDS["before"], object(), nothing)
    end_save(folder, IDS["before"])


def test_another_process_is_refused(tmp_path):
    """The error names it; after its death the lock is taken over."""
    ours, theirs = _FORK.Pipe()

    def hold():
        begin_save(tmp_path, IDS["killed"], None, nothing)
        (tmp_path / shard("killed")).write_text("half")
        theirs.send(os.getpid())
        time.sleep(60)

    process = _FORK.Process(target=hold)
    process.start()
    pid = ours.recv()
    with pytest.raises(RuntimeError, match=f"process {pid} on {HOST} saves to this checkpoint"):
        checkpoint.save(tmp_path, [HashTable(2, name="t")])
    clear_killed_saves(tmp_path, nothing)
    assert names(tmp_path) == [LOCK_FILE, shard("killed")]
    process.kill()
    process.join()
    checkpoint.save(tmp_path, [HashTable(2, name="t")])
    left = names(tmp_path)
    assert len(left) == 2
    assert LOCK_FILE not in left
    assert shard("killed") not in left


def test_a_child_does_not_keep_the_lock_of_a_killed_parent(tmp_path):
    """As workers that a data loader forked during a save in the background."""
    ours, theirs = _FORK.Pipe()

    def hold():
        begin_save(tmp_path, IDS["killed"], None, nothing)
        child = os.fork()
        if not child:
            theirs.send(os.getpid())
            time.sleep(60)
            os._exit(0)
        time.sleep(60)

    process = _FORK.Process(target=hold)
    process.start()
    child = ours.recv()
    process.kill()
    process.join()
    try:
        checkpoint.save(tmp_path, [HashTable(2, name="t")])
    finally:
        os.kill(child, signal.SIGKILL)
    assert LOCK_FILE not in names(tmp_path)


def test_a_child_saves_that_was_forked_while_a_thread_began_a_save(tmp_path):
    has_begun, over = threading.Event(), threading.Event()

    def look():
        has_begun.set()
        over.wait(60)

    thread = threading.Thread(target=begin_save, args=(tmp_path, IDS["next"], None, look))
    thread.start()
    has_begun.wait(60)
    child = _FORK.Process(target=checkpoint.save, args=(tmp_path / "child", []), daemon=True)
    child.start()
    child.join(30)
    over.set()
    thread.join()
    end_save(tmp_path, IDS["next"])
    assert child.exitcode == 0


def test_threads_that_save_to_one_folder(tmp_path):
    """One of them at a time; the others get the error, and the checkpoint is whole."""
    errors, numbers = [], range(6)

    def work(number):
        table = HashTable(2, name="t")
        table.insert(torch.arange(1000), torch.full((1000, 2), float(number)))
        for _ in range(5):
            try:
                checkpoint.save(tmp_path, [table])
            except RuntimeError as error:
                errors.append(str(error))

    threads = [threading.Thread(target=work, args=(number,)) for number in numbers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all("saves to this checkpoint" in e or "another save of this" in e for e in errors)
    table = HashTable(2, name="t")
    checkpoint.load(tmp_path, [table])
    assert len(table.embeddings(torch.arange(1000)).unique()) == 1
    assert len(names(tmp_path)) == 2


@pytest.mark.parametrize(
    ("lines", "current", "gone"),
    [
        ([{"saving": IDS["killed"]}], nothing, ["killed"]),
        ([{"saving": IDS["killed"]}], there, ["killed"]),
        ([{"saving": IDS["killed"]}], unreadable, []),
        ([{"saving": IDS["killed"]}, {"ended": IDS["killed"]}], there, []),
        # Killed after the rename: the checkpoint before it is known from the lock.
        ([{"saving": IDS["there"]}, {"replaces": [shard("before")]}], there, ["before"]),
        # Killed before it.
        ([{"saving": IDS["killed"]}, {"replaces": [shard("there")]}], there, ["killed"]),
        ([{"saving": IDS["killed"]}, {"replaces": ["notes.txt"]}], there, ["killed"]),
        # Killed while it removed the checkpoint: after Lightning's file had gone, and before it.
        ([{"removes": [shard("before"), "notes.txt"]}], nothing, ["before"]),
        ([{"removes": [shard("there")]}], there, []),
        ([{"saving": "*"}], there, []),
    ],
)
def test_what_a_killed_save_left(tmp_path, lines, current, gone):
    """What its lock names goes, unless the checkpoint that is there names it too."""
    lock_of(tmp_path, *lines)
    for save in ("killed", "there", "before"):
        (tmp_path / shard(save)).write_text("")
        (tmp_path / f"copy of {save}.safetensors").write_text("")
    (tmp_path / f"{shard('killed')}.part").write_text("")
    (tmp_path / "notes.txt").write_text("")
    before = set(names(tmp_path))
    begin_save(tmp_path, IDS["next"], None, current)
    end_save(tmp_path, IDS["next"])
    expected = {shard(save) for save in gone} | {LOCK_FILE}
    if "killed" in gone:
        expected.add(f"{shard('killed')}.part")
    assert before - set(names(tmp_path)) == expected


def test_an_interrupted_save_leaves_no_lock(tmp_path):
    """Wherever it comes: the next save of this process, or of another, is not refused."""
    table = HashTable(2, name="t")
    table.insert(torch.arange(3), torch.ones(3, 2))

    def save():
        checkpoint.save(tmp_path / "saved", [table])

    def save_in_a_process():
        save()
        os._exit(0)

    save()
    num_points = run_interrupted(save, -1).num_points
    for at in range(0, num_points, max(num_points // 60, 1)):
        run_interrupted(save, at)
        save()
        if at % 5 == 0:
            run_interrupted(save, at)
            process = _FORK.Process(target=save_in_a_process)
            process.start()
            process.join()
            assert process.exitcode == 0
        assert len(names(tmp_path / "saved")) == 2


def test_clears_a_folder_beside(tmp_path):
    """A folder that holds nothing else goes too, with Lightning's unfinished file."""
    folder = tmp_path / "last-v1.ckpt.tables"
    folder.mkdir()
    lock_of(folder, {"saving": IDS["killed"]})
    (folder / shard("killed")).write_text("")
    (tmp_path / f"last-v1.ckpt.{IDS['killed']}.part").write_text("")
    (tmp_path / f"last-v2.ckpt.{IDS['killed']}.part").write_text("")
    clear_killed_saves(folder, nothing)
    assert names(tmp_path) == [f"last-v2.ckpt.{IDS['killed']}.part"]


def test_the_lock_of_another_host(tmp_path):
    """It counts as held for an hour: not every file system tells one host of another's locks."""
    lock_of(tmp_path, host="elsewhere", pid=7)
    with pytest.raises(RuntimeError, match=r"process 7 on elsewhere saves .*remove \.recis_"):
        begin_save(tmp_path, IDS["next"], None, nothing)
    old = time.time() - save_lock._FOREIGN_SECONDS - 1
    os.utime(tmp_path / LOCK_FILE, (old, old))
    begin_save(tmp_path, IDS["next"], None, nothing)
    end_save(tmp_path, IDS["next"])


def test_a_file_that_is_no_lock(tmp_path):
    """It is neither taken nor removed."""
    (tmp_path / LOCK_FILE).write_text("mine")
    with pytest.raises(ValueError, match="no lock of a checkpoint"):
        begin_save(tmp_path, IDS["next"], None, nothing)
    assert (tmp_path / LOCK_FILE).read_text() == "mine"


def test_saves_leave_the_files_of_others_alone(tmp_path):
    """A model of another library in the folder stays, and so do files named much like ours."""
    others = ["model.safetensors", "model-00001-of-00002.safetensors", "checkpoint.json.bak",
              "t.0-of-1.mine.safetensors", "model.safetensors.index.json"]  # fmt: skip
    for name in others:
        (tmp_path / name).write_text("mine")
    for _ in range(2):
        checkpoint.save(tmp_path, [HashTable(2, name="t")])
        assert set(others) < set(names(tmp_path))
        assert len(names(tmp_path)) == len(others) + 2
