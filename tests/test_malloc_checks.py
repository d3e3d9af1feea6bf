"""Tests that reach into memory, under the checks of glibc's malloc: it aborts on a damaged heap."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIBRARY = "libc_malloc_debug.so.0"
FOUND = [
    folder / LIBRARY
    for folder in (Path("/lib/x86_64-linux-gnu"), Path("/lib/aarch64-linux-gnu"), Path("/lib64"))
    if (folder / LIBRARY).exists()
]
CHECKED = {
    "profiler": ["tests/callbacks/test_profiler.py", "tests/callbacks/test_profiler_regions.py"],
    "tables": ["tests/table/test_storage.py", "tests/table/test_row_store.py"],
}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not FOUND, reason=f"needs glibc's {LIBRARY}")
@pytest.mark.parametrize("part", CHECKED)
def test_heap_stays_whole(part):
    environment = {
        "LD_PRELOAD": LIBRARY,
        "MALLOC_CHECK_": "3",
        "MALLOC_PERTURB_": "165",
        "KINETO_LOG_LEVEL": "6",
    }
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *CHECKED[part]],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
