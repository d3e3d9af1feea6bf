"""Ahead-of-time compilation of every Triton kernel for every supported GPU."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
FILES = sorted((ROOT / "recis_lightning" / "ops" / "gpu").glob("[!_]*.py"))
TARGETS = {"sm_80", "sm_90", "sm_100", "gfx942"}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Compile all kernels in a process of their own: this one interprets them."""
    pytest.importorskip("triton")
    cache = str(tmp_path_factory.mktemp("triton"))
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_kernels"],
        cwd=ROOT,
        env={**os.environ, "TRITON_CACHE_DIR": cache, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def _declared_kernels():
    """Find the functions that the decorator ``kernel`` makes kernels, without importing them."""
    for path in FILES:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef):
                calls = [d.func for d in node.decorator_list if isinstance(d, ast.Call)]
                if any(isinstance(call, ast.Name) and call.id == "kernel" for call in calls):
                    yield node.name


@pytest.mark.slow
def test_every_kernel_compiles_for_every_target(compiled):
    """No kernel of any kernel file is left out."""
    names = list(_declared_kernels())
    assert len(names) >= 14
    assert len(set(names)) == len(names)
    for name in names:
        assert {line["target"] for line in compiled if line["kernel"] == name} == TARGETS


def test_no_kernel_bypasses_the_decorator():
    """``triton.jit`` occurs in one file only: elsewhere its kernels would not be compiled here."""
    users = [path.name for path in FILES if "triton.jit" in path.read_text()]
    assert users == ["runtime.py"]


@pytest.mark.slow
def test_kernels_keep_to_registers(compiled):
    """Spilling costs more than any launch parameter gains; a word or two are tolerated."""
    spilling = {
        (line["kernel"], str(line["constants"]), line["target"]): line["spilled_bytes"]
        for line in compiled
        if line.get("spilled_bytes", 0) > 16
    }
    assert not spilling
    assert any("registers" in line for line in compiled)
    # Rows of any dim are loaded by four words: of single ones, three programs had room.
    gathers = [line for line in compiled if line["kernel"].endswith("gather_kernel")]
    assert max(line.get("registers", 0) for line in gathers) <= 128


@pytest.mark.slow
def test_no_warp_reads_what_another_has_stored(compiled):
    """Rows with very many gradients are updated once, whichever warp comes last."""
    scanned = [line for line in compiled if "races" in line]
    assert {line["kernel"] for line in scanned} == set(_declared_kernels())
    assert not [line for line in scanned if line["races"]]
    # The scan sees the race that one barrier prevents.
    found = {line["kernel"] for line in scanned if line["without_barriers"]}
    assert "_update_long_kernel" in found
