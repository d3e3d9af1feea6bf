"""Runs that are killed at random moments train each row of each epoch once, on any ranks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


def found_by(*args):
    """Run the harness in a process of its own, which forks the ranks; return what it prints."""
    command = [sys.executable, "-m", "tests.helpers.killed_runs", *map(str, args)]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False
    )
    assert done.returncode in (0, 1), done.stderr
    assert done.stdout.strip(), done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])


def check(found, kills):
    assert found["kills"] >= kills
    assert found["lives"] == found["kills"] + found["runs"]
    assert found["wrong"] == []
    assert found["differing"] == []


@pytest.mark.slow
def test_a_few_kills_on_one_rank():
    """And the weights are, to the bit, those of a run that nothing disturbed."""
    check(found_by("--kills", 2, "--ranks", 1), kills=2)


@pytest.mark.slow
def test_a_few_kills_on_several_ranks():
    check(found_by("--kills", 1, "--ranks", 2, 3, "--seed", 1), kills=1)


@pytest.mark.slow
def test_a_few_kills_while_files_appear():
    """And what appears while nothing runs is taken up, too."""
    check(found_by("--kills", 1, "--ranks", 1, 2, "--seed", 2, "--follow"), kills=1)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("args", [(1,), (1, 2, 3), (1, 2, 3, "--follow")])
def test_many_kills(args):
    """Six of each kind; RECIS_LIGHTNING_KILLS=100 for as many as that, in half an hour or more."""
    kills = int(os.environ.get("RECIS_LIGHTNING_KILLS", "6"))
    check(found_by("--kills", kills, "--ranks", *args, "--seed", 3), kills=kills)
