"""Kernels give the same results in whatever order a GPU runs their programs.

``INTERLEAVING_CASES=100 pytest -m slow tests/ops/gpu/test_interleaving.py`` looks at that many
cases of each kind; ``INTERLEAVING_SEED`` is the first one's seed.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
_CASES = int(os.environ.get("INTERLEAVING_CASES", "4"))
_SEED = int(os.environ.get("INTERLEAVING_SEED", "1"))


def _run(*arguments):
    """Return the exit status of some cases, and what they print."""
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-m", "tests.helpers.interleaved_cases", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


def _check(cases, seed):
    status, result = _run("--cases", cases, "--seed", seed)
    assert not result["wrong"]
    assert status == 0
    assert result["held"] == 4 * cases  # insertion, admission, eviction, update
    assert result["switches"] > 1000 * cases
    assert result["stale"] > 10 * cases


def test_any_order_of_programs_gives_the_same():
    """Programs switch at any element, and loads may be stale."""
    _check(1, 0)


@pytest.mark.slow
@pytest.mark.timeout(120 + 60 * _CASES)
def test_many_orders_of_programs_give_the_same():
    """The same with more seeds."""
    _check(_CASES, _SEED)


@pytest.mark.parametrize("mutant", ["cas", "minimum"])
@pytest.mark.slow
def test_a_planted_race_is_seen(mutant):
    """The answer of a compare-and-swap is ignored, or a minimum is not atomic."""
    status, result = _run("--kind", "insertion", "--seed", 2, "--cases", 2, "--mutant", mutant)
    assert status == 1
    assert result["wrong"]
