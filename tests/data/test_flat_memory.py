"""Memory of a run on Criteo files does not grow from pass to pass."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_run_streams_with_flat_memory():
    """Tables have all their rows after the first pass, and caches are full after the second."""
    command = [sys.executable, "-m", "tests.helpers.flat_memory", "--passes", "6"]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert len(set(found["rows"])) == 1
    resident = found["resident_mb"]
    assert len(resident) == 6
    # It varies by what is read ahead; the batches of four passes would take 130 MB.
    assert max(resident[2:]) - max(resident[:2]) < 60, resident
