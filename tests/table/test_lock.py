"""TableLock: readers together, writers one by one."""

import os
import threading
import time

import pytest

from recis_lightning.table.lock import TableLock, distinct_locks, reading, writing


def background(work):
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def test_readers_do_not_wait_for_each_other():
    lock, inside = TableLock(), threading.Barrier(3, timeout=30)

    def read():
        with reading([lock]):
            inside.wait()

    threads = [background(read) for _ in range(2)]
    read()
    for thread in threads:
        thread.join(30)
    assert not inside.broken


def test_a_writer_is_alone():
    """Increments that are read and written in two steps are not lost, and no reader sees halves."""
    lock, state, torn = TableLock(), [0, 0], []

    def write():
        for _ in range(100):
            with lock, lock:
                before = state[0]
                state[0] = before + 1
                time.sleep(0)
                state[1] = before + 1

    def read():
        for _ in range(300):
            with reading([lock]):
                first = state[0]
                time.sleep(0)
                if state[1] != first:
                    torn.append(first)

    threads = [background(work) for work in (write, write, write, read, read)]
    for thread in threads:
        thread.join(60)
    assert state == [300, 300]
    assert not torn


def test_a_writer_may_read_and_write_again():
    lock = TableLock()
    with lock:
        with reading([lock]), lock:
            pass
        started, done = threading.Event(), threading.Event()

        def read():
            started.set()
            with reading([lock]):
                done.set()

        thread = background(read)
        started.wait(30)
        assert not done.wait(0.05)
    thread.join(30)
    assert done.is_set()


def test_an_error_releases_what_was_taken():
    """Of several locks, which are taken in one order, in whatever order they are given."""
    locks = [TableLock() for _ in range(3)]
    taken = distinct_locks([locks[2], locks[0], locks[1], locks[0]])
    assert taken == tuple(locks)
    others = []

    def write():
        with writing(taken):
            others.append(1)

    for context in (writing, reading):
        with pytest.raises(KeyError), context(taken):
            raise KeyError
        background(write).join(30)
    assert others == [1, 1]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_child_does_not_wait_for_threads_that_it_does_not_have():
    lock, held, over = TableLock(), threading.Event(), threading.Event()

    def write():
        with lock:
            held.set()
            over.wait(30)

    thread = background(write)
    held.wait(30)
    child = os.fork()
    if not child:
        with lock, reading([lock]):
            os._exit(7)
    over.set()
    thread.join(30)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
