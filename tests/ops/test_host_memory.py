"""Table memory: ranges never overlap, are reused, and go back to the system."""

import ctypes
import gc
import os
import random
import threading
import time
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch

from recis_lightning.ops import host_memory
from recis_lightning.ops.host_memory import HUGE_PAGE, _Allocator, empty
from tests.helpers.interruptions import run_interrupted

MEGABYTE = 1 << 20


def _resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_arrays_start_on_a_cache_line_and_hold_what_is_written():
    """Whatever their sizes, in turn made and dropped: none overlaps another that lives."""
    generator = random.Random(0)
    living = {}
    for number in range(400):
        if living and generator.random() < 0.45:
            array = living.pop(generator.choice(list(living)))
            assert (array == array[0]).all()
            del array
        size = generator.choice([1, 63, 4096, 50_000, 200_001, 3 * MEGABYTE + 5])
        array = empty(size)
        assert array.shape == (size,)
        assert array.ctypes.data % 64 == 0
        array[:] = number % 251
        living[number] = array
    for number, array in living.items():
        assert (array == number % 251).all()


def test_a_view_keeps_the_memory_that_it_shows():
    """A tensor over a slice of a reshaped array is enough."""
    tensor = torch.from_numpy(empty(8 * 100_000).view(np.int64).reshape(-1, 2))[10:20]
    tensor.fill_(7)
    others = [empty(800_000) for _ in range(8)]
    for other in others:
        other[:] = 1
    assert (tensor == 7).all()


def test_a_freed_range_is_used_again():
    """What a table leaves behind, the next one of its size takes."""
    allocator = _Allocator()
    first = allocator.allocate(HUGE_PAGE // 2)
    allocator.allocate(HUGE_PAGE // 2)
    allocator.free(first, HUGE_PAGE // 2)
    assert allocator.allocate(HUGE_PAGE // 4) == first
    assert allocator.allocate(HUGE_PAGE // 4) == first + HUGE_PAGE // 4


def test_an_allocator_whose_ranges_are_all_free_maps_nothing():
    """In whatever order ranges come back, neighbours join until the mapping is closed."""
    allocator = _Allocator()
    generator = random.Random(1)
    ranges = []
    for _ in range(200):
        size = 64 * generator.randint(1, 1 << 16)
        ranges.append((allocator.allocate(size), size))
    ends = sorted(ranges)
    for (start, size), (following, _) in pairwise(ends):
        assert start + size <= following
    generator.shuffle(ranges)
    for address, size in ranges:
        allocator.free(address, size)
    assert allocator._regions == []
    assert allocator._mapped == 0


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads /proc")
def test_pages_of_a_freed_range_go_back_to_the_system():
    """Also where the mapping stays because a small part of it is used."""
    arrays = [empty(8 * MEGABYTE) for _ in range(8)]
    for array in arrays:
        array[:] = 1
    kept, before = arrays[3], _resident()
    del array, arrays
    gc.collect()
    assert before - _resident() > 48 * MEGABYTE
    assert (kept == 1).all()


def test_memory_freed_while_allocating_is_not_lost():
    """A finalizer may run within an allocation, which holds the lock: it waits its turn."""
    allocator = _Allocator()
    first = allocator.allocate(1 << 16)
    allocator._is_busy = True  # as within its methods
    allocator.free(first, 1 << 16)
    assert allocator._regions
    assert allocator.allocate(1 << 16) != first  # nor is a free list read that is half changed
    allocator._is_busy = False
    allocator._regions.pop()
    allocator.allocate(1 << 16)
    assert len(allocator._regions) == 1
    assert allocator._regions[0].free[-1][1] - allocator._regions[0].free[-1][0] < HUGE_PAGE


def test_an_interrupted_allocator_goes_on():
    """An exception at any line loses a range at most: no lock is left, no ranges overlap."""
    sizes = [1 << 16, HUGE_PAGE, 1 << 17, 3 * HUGE_PAGE]

    def work(allocator, held):
        for size in sizes:
            held.append((allocator.allocate(size), size))
        for _ in range(2):
            allocator.free(*held.pop(0))
        held.append((allocator.allocate(1 << 15), 1 << 15))

    num_points = run_interrupted(lambda: work(_Allocator(), []), -1).num_points
    for at in range(num_points):
        allocator, held = _Allocator(), []
        run_interrupted(partial(work, allocator, held), at)
        thread = threading.Thread(target=work, args=(allocator, held), daemon=True)
        thread.start()
        thread.join(30)
        assert not thread.is_alive()  # no lock was left
        ends = sorted(held)
        for (start, size), (following, _) in pairwise(ends):
            assert start + size <= following
        for address, size in held:
            np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))[:] = 1


def test_a_finalizer_does_not_wait_for_another_thread():
    """That one may want a lock that is held where the finalizer came up."""
    allocator, inside, over = _Allocator(), threading.Event(), threading.Event()
    address, other = allocator.allocate(1 << 16), allocator.allocate(1 << 16)
    give_back = allocator._give_back

    def stay():
        give_back()
        inside.set()
        over.wait(30)

    allocator._give_back = stay
    thread = threading.Thread(target=allocator.free, args=(address, 1 << 16), daemon=True)
    thread.start()
    assert inside.wait(30)
    allocator.free(other, 1 << 16)
    allocator._give_back = give_back
    over.set()
    thread.join(30)
    assert not allocator._returned
    assert not allocator._regions


def test_threads_share_the_allocator():
    """Each sees its own values in all that it holds."""
    wrong = []

    def work(number):
        held = []
        for _ in range(60):
            array = empty(100_000)
            array[:] = number
            held.append(array)
            if len(held) > 5 and not (held.pop(0) == number).all():
                wrong.append(number)
        if not all((array == number).all() for array in held):
            wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_fork_waits_for_an_allocation_and_its_child_can_allocate():
    """The child has one thread, and nobody who would release a lock that another held."""
    held, released = threading.Event(), []

    def hold():
        with host_memory._allocator.lock:
            held.set()
            time.sleep(0.2)
            released.append(True)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    child = os.fork()
    if child == 0:
        os._exit(0 if released and (empty(100_000) >= 0).all() else 1)
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert empty(100_000).size == 100_000


def test_more_than_there_is_raises_memory_error():
    """And the next request works."""
    with pytest.raises(MemoryError):
        empty(1 << 60)
    assert empty(100_000).size == 100_000


def test_without_huge_pages_numpy_allocates(monkeypatch):
    """Where the system has none, sizes and alignment are the same."""
    monkeypatch.setattr(host_memory, "_HAS_HUGE_PAGES", False)
    array = empty(100_001)
    assert array.size == 100_001
    assert array.ctypes.data % 64 == 0


def test_a_kernel_that_knows_no_huge_pages_is_no_error(monkeypatch):
    """It refuses the advice; the memory is as good."""
    monkeypatch.setattr(host_memory.mmap, "MADV_HUGEPAGE", 12345)
    allocator = _Allocator()
    address = allocator.allocate(1 << 16)
    allocator.free(address, 1 << 16)
    assert allocator._regions == []
