"""Memory in a file: contents, space given back, a full disk, forked children."""

import errno
import os
import subprocess
import sys
import textwrap
import traceback
from pathlib import Path

import numpy as np
import pytest

from recis_lightning import system_calls
from recis_lightning.ops import file_memory
from recis_lightning.ops.file_memory import FileMemory

ROOT = Path(__file__).parents[2]
PAGE = 1 << 16  # a multiple of every system's

pytestmark = pytest.mark.skipif(
    not file_memory.is_supported(), reason="this system cannot map such files"
)


def blocks_of(memory):
    """Return the bytes that the disk holds for a memory's file."""
    return 512 * os.fstat(memory.open().descriptor).st_blocks


def test_memory_is_zeros_and_keeps_what_is_written(tmp_path):
    memory = FileMemory(str(tmp_path))
    first, second = memory.empty(PAGE), memory.empty(3 * PAGE + 1)
    assert (first.size, second.size) == (PAGE, 3 * PAGE + 1)
    assert not first.any()
    assert not second.any()
    first[:], second[:] = 1, 2
    file_memory.note_changes(1 << 30)
    file_memory.note_changes(1 << 30)  # writes what was changed before
    assert set(first) == {1}
    assert set(second) == {2}
    assert os.listdir(tmp_path) == []  # nobody else finds the file


def test_space_goes_back_to_the_disk_and_is_used_again(tmp_path):
    memory = FileMemory(str(tmp_path))
    kept, gone = memory.empty(2 * PAGE), memory.empty(4 * PAGE)
    kept[:], gone[:] = 1, 2
    assert memory.nbytes == 6 * PAGE
    del gone
    assert memory.nbytes == 2 * PAGE
    if system_calls.IS_LINUX:
        assert blocks_of(memory) <= 3 * PAGE
    again = [memory.empty(PAGE), memory.empty(3 * PAGE)]
    assert memory.open().size == 6 * PAGE
    assert not any(part.any() for part in again)
    assert set(kept) == {1}
    descriptor = memory.open().descriptor
    del memory, kept, again
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


def test_a_full_disk_is_an_error_and_changes_nothing(tmp_path, monkeypatch):
    memory = FileMemory(str(tmp_path))
    kept = memory.empty(PAGE)
    kept[:] = 3

    def full(file, offset, size):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(system_calls, "reserve_range", full)
        with pytest.raises(OSError, match=r"No space left.*for 131072 bytes of rows") as caught:
            memory.empty(2 * PAGE)
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(tmp_path)
    assert memory.nbytes == PAGE
    assert memory.empty(2 * PAGE).size == 2 * PAGE
    assert set(kept) == {3}


def test_a_limit_of_the_system_is_such_an_error(tmp_path):
    """A file that may not grow further, as the system itself says it."""
    code = f"""
        import errno, resource
        from recis_lightning.ops.file_memory import FileMemory
        memory = FileMemory({str(tmp_path)!r})
        kept = memory.empty(1 << 20)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2 << 20, 2 << 20))
        try:
            memory.empty(4 << 20)
        except OSError as error:
            assert error.errno == errno.EFBIG, error
        else:
            raise AssertionError("no error")
        kept[:] = 5
        assert memory.empty(1 << 20).sum() == 0 and set(kept) == {{5}}
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, cwd=ROOT)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_a_forked_child_changes_nothing_and_is_refused(tmp_path):
    memory = FileMemory(str(tmp_path))
    rows = memory.empty(PAGE)
    rows[:] = 1
    child = os.fork()
    if child == 0:
        status = 1
        try:
            seen = set(rows)
            rows[:] = 2
            refusals = 0
            for call in (
                lambda: memory.empty(PAGE),
                lambda: file_memory.check_process(rows.ctypes.data),
            ):
                try:
                    call()
                except RuntimeError as error:
                    refusals += f"belong to process {os.getppid()}" in str(error)
            del rows  # gives no space of the parent's back
            status = 0 if (seen, refusals) == ({1}, 2) else 1
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    assert set(rows) == {1}
    file_memory.check_process(rows.ctypes.data)
    assert memory.empty(PAGE).size == PAGE


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("generations", [1, 2])
def test_a_forked_child_has_memory_where_its_parents_was(tmp_path, generations):
    memory = FileMemory(str(tmp_path))
    rows, kept = memory.empty(PAGE), memory.empty(PAGE)
    rows[:] = 1
    for _ in range(generations):
        child = os.fork()
        if child:
            break
    if not child:
        status = 1
        try:
            where = rows.ctypes.data
            del rows
            own = []  # Linux gives the first of them the gap
            while not own or (own[-1].ctypes.data != where and len(own) < 100):
                own.append(FileMemory(str(tmp_path)).empty(PAGE))
                file_memory.check_process(own[-1].ctypes.data)
                own[-1][:] = 2
            with pytest.raises(RuntimeError, match="forked child"):
                file_memory.check_process(kept.ctypes.data)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    status = os.waitpid(child, 0)[1]
    if os.getpid() != memory.open().process:
        os._exit(status != 0)
    assert status == 0
    assert set(rows) == {1}


def test_a_folder_that_is_gone_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing"):
        FileMemory(str(tmp_path / "missing")).empty(PAGE)


def test_many_threads_allocate_and_free(tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    memory = FileMemory(str(tmp_path))

    def work(number):
        for size in range(1, 30):
            part = memory.empty(size * 1000)
            part[:] = number
            assert (np.unique(part) == number).all()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(1, 5)))
    assert memory.nbytes == 0
    assert memory.open().free == [(0, memory.open().size)]
