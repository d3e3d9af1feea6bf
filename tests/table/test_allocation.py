"""Errors of memory that a table asked for, and memory that goes back to the system."""

import ctypes
import os
import re
from types import SimpleNamespace

import pytest

from recis_lightning import HashTable
from recis_lightning.ops import host_memory
from recis_lightning.table import allocation
from recis_lightning.table.allocation import Allocation, return_to_system


def test_what_a_table_found_no_memory_for_is_said(monkeypatch):
    storage = HashTable(4, name="user").storage

    def fail(*args, **kwargs):
        raise MemoryError

    monkeypatch.setattr(host_memory, "empty_int64", fail)
    pattern = f"table 'user', with 0 rows in {storage.nbytes} bytes, found no memory for an index"
    with pytest.raises(MemoryError, match=re.escape(pattern)):
        storage.larger_index(10**6)


def test_other_errors_pass_through():
    with pytest.raises(ZeroDivisionError), Allocation(SimpleNamespace(), "rows"):
        raise ZeroDivisionError


@pytest.mark.skipif(os.name != "posix", reason="no C library to ask")
def test_the_heap_is_looked_at_once_enough_was_freed(monkeypatch):
    looks = []
    library = SimpleNamespace(malloc_trim=looks.append)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    monkeypatch.setattr(allocation, "_freed_bytes", 0)
    for nbytes in (1 << 19, (1 << 19) - 1, 1, 1 << 19):
        return_to_system(nbytes)
    assert looks == [0]
