"""Kept kernels: where they lie, and what happens where none can be kept."""

import logging
import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from recis_lightning.ops.cpu import kernel_cache

ROOT = Path(__file__).parents[3]
_IMPORT = "from recis_lightning.ops.cpu import kernel_cache"
_SCRIPT = """
import numpy as np
from recis_lightning.ops.cpu import kernel_cache, runtime
from tests.ops.cpu.test_runtime import _add_kernel
for constant in CONSTANTS:
    values = np.zeros(3, np.int64)
    _add_kernel(constant).launch(3, 2, values=values)
    assert values.tolist() == [constant] * 3, (constant, values)
    print(constant, int(_add_kernel(constant)._compiled.is_cached))
"""


def _start(folder, constants):
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(folder)}
    command = [sys.executable, "-c", _SCRIPT.replace("CONSTANTS", repr(constants))]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)


def _cached(process):
    out, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    return dict(line.split() for line in out.splitlines())


@pytest.fixture(autouse=True)
def _search_anew():
    """Where kernels lie is found once a process."""
    kernel_cache.cache_folder.cache_clear()
    yield
    kernel_cache.cache_folder.cache_clear()


@pytest.mark.slow
def test_processes_that_compile_at_once_do_not_mix_kernels(tmp_path):
    """Of one definition, with other constants: each later gets the code of its own."""
    processes = [_start(tmp_path, [1, 2, 3]), _start(tmp_path, [3, 1, 2])]
    for process in processes:
        _cached(process)
    assert _cached(_start(tmp_path, [1, 2, 3])) == {"1": "1", "2": "1", "3": "1"}
    folder = tmp_path / "recis_lightning"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert len(list(folder.glob("*.nbi"))) == 3


def test_a_folder_of_others_is_passed_over(tmp_path, monkeypatch, caplog):
    """The next one is taken, and a warning names both."""
    (tmp_path / "recis_lightning").mkdir()
    (tmp_path / "recis_lightning").chmod(0o777)
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    with caplog.at_level(logging.WARNING):
        folder = kernel_cache.cache_folder()
    assert folder not in (None, tmp_path / "recis_lightning")
    assert "can be written to by others" in caplog.text


def test_without_a_folder_kernels_compile_all_the_same(monkeypatch, caplog):
    """A read-only install without a home: one warning."""
    monkeypatch.setattr(kernel_cache, "open_private", lambda folder: f"{folder}: read-only")
    with caplog.at_level(logging.WARNING):
        assert kernel_cache.cache_folder() is None
        assert kernel_cache.cache_folder() is None
    assert len(caplog.records) == 1
    assert "set NUMBA_CACHE_DIR" in caplog.text

    def function(values):
        pass

    cache = kernel_cache.KernelCache(function, (), "signature")
    assert cache.load() is None


@pytest.mark.slow
def test_damaged_files_and_full_disks_are_no_errors(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    assert _cached(_start(tmp_path, [5])) == {"5": "0"}
    for path in (tmp_path / "recis_lightning").iterdir():
        path.write_bytes(b"no kernel")
    assert _cached(_start(tmp_path, [5])) == {"5": "0"}


def _lines_of(folder, constants, silent_seconds):
    """Return what a process says that needs these kernels."""
    patience = f"\nkernel_cache.SILENT_SECONDS = {silent_seconds}\n"
    done = subprocess.run(
        [sys.executable, "-c", _IMPORT + patience + _SCRIPT.replace("CONSTANTS", repr(constants))],
        cwd=ROOT, env={**os.environ, "NUMBA_CACHE_DIR": str(folder)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return [line for line in done.stderr.splitlines() if "Compiling" in line]


def test_the_first_process_says_that_it_compiles(tmp_path):
    """One line for all kernels, with the folder, seen without any set-up; none where they load."""
    (line,) = _lines_of(tmp_path, [1, 2, 3], 0.02)
    folder = tmp_path / "recis_lightning"
    assert line == f"Compiling kernels, each once per installation; they are kept in {folder}"
    assert _lines_of(tmp_path, [1, 2, 3], 0.02) == []


@pytest.mark.slow
def test_a_process_that_compiles_little_says_nothing(tmp_path):
    """As later processes do that need a kernel more."""
    assert _lines_of(tmp_path, [1, 2], 600) == []


def test_the_seconds_of_kernels_add_up(monkeypatch, caplog):
    monkeypatch.setattr(kernel_cache, "SILENT_SECONDS", 0.2)
    notice = kernel_cache.CompilingNotice()
    for _ in range(4):
        with notice.compiling():
            time.sleep(0.15)
    assert [record.message[:38] for record in caplog.records] == [
        "Compiling kernels, each once per insta"
    ]
