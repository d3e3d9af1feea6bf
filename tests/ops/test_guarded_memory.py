"""Guard pages: an access beyond a range, or after it was freed, ends the process at once."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from recis_lightning.ops import guarded_memory

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("num_bytes", [0, 1, 64, 4096, 100_001])
def test_ranges_are_filled_aligned_and_writable(num_bytes):
    array = guarded_memory.empty(num_bytes)
    assert array.shape == (num_bytes,)
    assert (array == guarded_memory.FILL).all()
    assert array.ctypes.data % 64 == 0
    array[:] = 1
    assert array.sum() == num_bytes


def test_more_than_there_is_raises_memory_error():
    with pytest.raises(MemoryError, match="between guard pages"):
        guarded_memory.empty(1 << 60)


def _run(script):
    environment = {**os.environ, "RECIS_LIGHTNING_GUARD": "1"}
    command = [sys.executable, "-c", script]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


_TABLE = """
import ctypes, torch
from recis_lightning import HashTable
from recis_lightning.ops import host_memory
assert host_memory.IS_GUARDED
table = HashTable(4)
table.insert(torch.arange(1000), torch.ones(1000, 4))
entries = table.storage.entries
address = entries.data_ptr()
"""


_ACCESSES = [
    "ctypes.c_char.from_address(address + entries.nbytes + 63).value",
    "ctypes.c_char.from_address(address - 4096).value",
    "table.clear(); del entries; ctypes.c_char.from_address(address).value",
]
_FORKS = """
import os
for access in ACCESSES:
    if not (child := os.fork()):
        exec(access)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_an_access_beyond_a_table_ends_the_process():
    """Read behind the index, before it, and after it was freed, each in a fork."""
    done = _run(_TABLE + _FORKS.replace("ACCESSES", repr(["pass", *_ACCESSES])))
    assert done.stdout.split() == ["0", *[str(-signal.SIGSEGV.value)] * 3], done.stderr


def test_a_table_between_guard_pages_works():
    """Its own kernels stay within."""
    done = _run(
        _TABLE
        + "table.evict(); table.delete(torch.arange(900)); table.compact()\n"
        + "assert table.embeddings(torch.arange(2000)).sum() == 400\n"
    )
    assert done.returncode == 0, done.stderr


def test_ranges_lie_apart():
    first, second = guarded_memory.empty(100), guarded_memory.empty(100)
    assert abs(np.int64(first.ctypes.data) - np.int64(second.ctypes.data)) >= 8192
