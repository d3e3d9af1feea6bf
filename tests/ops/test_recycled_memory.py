"""Memory of large outputs: kept when they are dropped, and nobody's while somebody has it."""

import gc
import threading

import pytest
import torch

from recis_lightning.ops import host_memory
from recis_lightning.ops.recycled_memory import RecycledMemory

LARGE = host_memory.HUGE_PAGE // 4  # float32 elements
pytestmark = pytest.mark.skipif(host_memory.IS_GUARDED, reason="guards unmap what is freed")


def test_a_dropped_tensors_memory_is_taken_again():
    """By one of the same size or a little smaller, of another dtype too, as a new tensor."""
    memory = RecycledMemory()
    first = memory.empty(2, LARGE)
    first.fill_(1)
    address = first.data_ptr()
    del first
    second = memory.empty(3, LARGE, torch.bfloat16)
    assert second.data_ptr() == address
    assert second.dtype is torch.bfloat16
    assert second.shape == (3, LARGE)
    assert second.stride() == (LARGE, 1)
    assert not second._is_view()


def test_memory_is_not_shared_while_a_view_has_it():
    """A slice, a NumPy array or an autograd graph keeps it."""
    memory = RecycledMemory()
    first = memory.empty(1, LARGE)
    first.fill_(1)
    kept = first[:, 3:5].numpy()
    del first
    second = memory.empty(1, LARGE)
    second.fill_(2)
    assert (kept == 1).all()
    leaf = torch.ones(1, requires_grad=True)
    product = second * leaf
    del second
    third = memory.empty(1, LARGE)
    third.fill_(3)
    product.sum().backward()
    assert leaf.grad == 2 * LARGE


def test_at_most_one_is_kept_and_only_where_it_fits():
    """A small output does not keep a large one's memory, and the rest goes back to the system."""
    memory = RecycledMemory()
    tensors = [memory.empty(1, LARGE) for _ in range(3)]
    del tensors
    gc.collect()
    assert len(memory._kept) == 1
    large = memory.empty(8, LARGE)
    address = large.data_ptr()
    del large
    small = memory.empty(1, LARGE)
    assert small.untyped_storage().nbytes() < 2 * host_memory.HUGE_PAGE
    assert memory.empty(1, 3).data_ptr() != address


def test_threads_never_get_the_same_memory():
    """Each finds what it wrote, however often they allocate."""
    memory, wrong = RecycledMemory(), []

    def work(number):
        for _ in range(30):
            tensor = memory.empty(1, LARGE)
            tensor.fill_(number)
            if not (tensor == number).all():
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_memory_outlives_its_allocator():
    """A tensor may be used, and dropped, when nothing allocates any more."""
    memory = RecycledMemory()
    tensor = memory.empty(1, LARGE)
    tensor.fill_(5)
    del memory
    assert (tensor == 5).all()
    del tensor
