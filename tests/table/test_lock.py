"""TableLock: readers together, writers one by one."""

import os
import signal
import threading
import time

import pytest

from recis_lightning.table.lock import _PATIENCE, TableLock, distinct_locks, read, write


def background(work):
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def test_readers_do_not_wait_for_each_other():
    lock, inside = TableLock(), threading.Barrier(3, timeout=30)

    def enter():
        read([lock], inside.wait)

    threads = [background(enter) for _ in range(2)]
    enter()
    for thread in threads:
        thread.join(30)
    assert not inside.broken


def test_a_writer_is_alone():
    """Increments that are read and written in two steps are not lost, and no reader sees halves."""
    lock, state, torn = TableLock(), [0, 0], []

    def change():
        before = state[0]
        state[0] = before + 1
        time.sleep(0)
        state[1] = before + 1

    def change_often():
        for _ in range(100):
            write([lock], write, [lock], change)

    def compare():
        first = state[0]
        time.sleep(0)
        if state[1] != first:
            torn.append(first)

    def look():
        for _ in range(300):
            read([lock], compare)

    threads = [background(work) for work in (change_often, change_often, change_often, look, look)]
    for thread in threads:
        thread.join(60)
    assert state == [300, 300]
    assert not torn


def test_a_writer_may_read_and_write_again():
    lock = TableLock()

    started, done = threading.Event(), threading.Event()

    def look():
        started.set()
        read([lock], done.set)

    def change():
        assert read([lock], write, [lock], len, "abc") == 3
        thread = background(look)
        started.wait(30)
        assert not done.wait(0.05)
        return thread

    write([lock], change).join(30)
    assert done.is_set()


def test_an_error_releases_what_was_taken():
    """Of several locks, which are taken in one order, in whatever order they are given."""
    locks = [TableLock() for _ in range(3)]
    taken = distinct_locks([locks[2], locks[0], locks[1], locks[0]])
    assert taken == tuple(locks)
    others = []

    for enter in (write, read):
        with pytest.raises(KeyError):
            enter(taken, {}.__getitem__, 1)
        background(lambda: write(taken, others.append, 1)).join(30)
    assert others == [1, 1]


def test_a_read_within_a_read_keeps_writers_out():
    """The inner one neither ends the outer, nor waits for the writer that waits for it."""
    lock, order = TableLock(), []

    def outer():
        writer = background(lambda: write([lock], order.append, "written"))
        while lock.writer is None:
            time.sleep(0.001)
        read([lock], order.append, "inner")
        time.sleep(4 * _PATIENCE)  # the writer looks again who reads
        order.append("outer")
        return writer

    writer = read([lock], outer)
    writer.join(30)
    assert order == ["inner", "outer", "written"]


def test_a_reader_of_two_waits_for_a_writer_of_one_with_empty_hands():
    """A writer of both that comes first would wait for what the reader has, and it for the writer.

    So do a save in the background, the lookup of one table and the step that trains all of them.
    """
    one, two = TableLock(), TableLock()
    begun, over, order = threading.Event(), threading.Event(), []

    def change_two():
        begun.set()
        over.wait(30)

    threads = [background(lambda: write([two], change_two))]
    begun.wait(30)
    threads.append(background(lambda: write([one, two], order.append, "written")))
    while one.turn.acquire(blocking=False):  # it has the first, and waits for the second
        one.turn.release()
        time.sleep(0.001)
    threads.append(background(lambda: read([one, two], order.append, "read")))
    time.sleep(4 * _PATIENCE)
    over.set()
    for thread in threads:
        thread.join(10)
    assert sorted(order) == ["read", "written"]
    assert not one._readers
    assert not two._readers


@pytest.mark.parametrize("ended", [True, False])
def test_a_read_that_an_interrupt_left_behind(ended):
    """Of a thread that is gone, or one that does other things by now."""
    lock, over, written = TableLock(), threading.Event(), threading.Event()

    def leave():
        lock.begin_read()
        if not ended:
            over.wait(30)
            read([lock], written.wait, 30)

    thread = background(leave)
    if ended:
        thread.join(30)
    else:
        while not lock._readers:
            time.sleep(0.001)
    background(lambda: write([lock], written.set)).join(30)
    assert written.is_set()
    over.set()
    thread.join(30)


def test_an_interrupted_wait_for_readers_lets_others_write(monkeypatch):
    lock, inside, over, written = TableLock(), *(threading.Event() for _ in range(3))

    def stay():
        inside.set()
        over.wait(30)

    def interrupt():
        raise KeyboardInterrupt

    reader = background(lambda: read([lock], stay))
    inside.wait(30)
    monkeypatch.setattr(lock, "_forget_the_gone", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write([lock], print)
    monkeypatch.undo()
    over.set()
    reader.join(30)
    background(lambda: write([lock], written.set)).join(30)
    assert written.is_set()


@pytest.mark.parametrize("num_locks", [1, 3])
def test_ctrl_c_at_any_time_lets_other_threads_go_on(num_locks):
    locks, done = [TableLock() for _ in range(num_locks)], []

    def use_until_interrupted(number):
        signal.setitimer(signal.ITIMER_REAL, 1e-4 + number * 1e-7)
        while True:
            write(locks, read, locks, write, locks[:1], len, "")

    def use():
        write(locks, done.append, "written")
        read(locks, done.append, "read")

    def interrupt(number, frame):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        for number in range(300):
            with pytest.raises(KeyboardInterrupt):
                use_until_interrupted(number)
            done.clear()
            background(use).join(10)
            assert done == ["written", "read"]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_a_read_that_did_not_begin_does_not_end_the_one_around_it(monkeypatch):
    lock, order = TableLock(), []

    def interrupt(self):
        raise KeyboardInterrupt

    def outer():
        monkeypatch.setattr(TableLock, "begin_read", interrupt)
        with pytest.raises(KeyboardInterrupt):
            read([lock], len, "")
        monkeypatch.undo()
        writer = background(lambda: write([lock], order.append, "written"))
        while lock.writer is None:
            time.sleep(0.001)
        time.sleep(4 * _PATIENCE)
        order.append("read")
        return writer

    read([lock], outer).join(30)
    assert order == ["read", "written"]


def test_a_reader_that_a_writer_forgets_as_it_begins():
    """What the writer of before left behind does not matter either."""

    class Forgotten(dict):
        def __setitem__(self, thread, depth):
            pass

    lock = TableLock()
    lock._readers, lock.writer = Forgotten(), -1
    assert read([lock], len, "abc") == 3
    assert lock.writer is None


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_child_does_not_wait_for_threads_that_it_does_not_have():
    lock, held, over = TableLock(), threading.Event(), threading.Event()

    def stay():
        held.set()
        over.wait(30)

    thread = background(lambda: write([lock], stay))
    held.wait(30)
    child = os.fork()
    if not child:
        write([lock], read, [lock], os._exit, 7)
    over.set()
    thread.join(30)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
