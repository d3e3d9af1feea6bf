"""Compilation of a first step's kernels by two processes."""

import os
import signal
import time

import numpy as np
import pytest
import torch

from recis_lightning import EmbeddingEngine, EmbeddingOption, hash_tables
from recis_lightning.ops.cpu import first_step, kernel_cache, runtime
from recis_lightning.optim import SparseAdam
from tests.ops.cpu.test_runtime import _add_kernel


@pytest.fixture
def _fresh_folder(tmp_path, monkeypatch):
    """No kernel is kept, and two are worth a fork."""
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(first_step, "_MIN_KERNELS", 2)
    kernel_cache.cache_folder.cache_clear()
    yield
    kernel_cache.cache_folder.cache_clear()


def _kernels(*constants):
    return [runtime.Kernel(_add_kernel(constant).function, (constant,)) for constant in constants]


def _sums(kernels):
    values = np.zeros(3, np.int64)
    for kernel in kernels:
        kernel.launch(3, 2, values=values)
    return values.tolist()


@pytest.mark.usefixtures("_fresh_folder")
def test_a_fork_compiles_its_half():
    ours, theirs = _kernels(1, 2), _kernels(10, 20)
    assert first_step.compile_in_two(ours, theirs)
    assert [k._compiled.is_cached for k in (*ours, *theirs)] == [False, False, True, True]
    assert _sums([*ours, *theirs]) == [33] * 3
    again = _kernels(1, 2, 10)
    assert not first_step.compile_in_two(again, _kernels(20))  # all are kept
    assert all(kernel._compiled.is_cached for kernel in again)


@pytest.mark.usefixtures("_fresh_folder")
def test_a_fork_that_hangs_is_ended(monkeypatch):
    def hang(kernel):
        time.sleep(100)

    children = []
    fork = os.fork
    monkeypatch.setattr(first_step, "compile_to_disk", hang)
    monkeypatch.setattr(first_step, "_PATIENCE", 0)
    monkeypatch.setattr(first_step, "_MIN_PATIENCE", 0.1)
    monkeypatch.setattr(os, "fork", lambda: children.append(fork()) or children[-1])
    start = time.monotonic()
    kernels = _kernels(3, 4)
    assert first_step.compile_in_two(kernels[:1], kernels[1:])
    assert time.monotonic() - start < 60
    with pytest.raises(ProcessLookupError):
        os.kill(children[0], 0)
    assert _sums(kernels) == [7] * 3


@pytest.mark.usefixtures("_fresh_folder")
@pytest.mark.parametrize("error", [ValueError("no such type"), KeyboardInterrupt()])
def test_a_fork_that_fails_leaves_its_kernels(monkeypatch, error, capfd):
    def fail(kernel):
        raise error

    monkeypatch.setattr(first_step, "compile_to_disk", fail)
    kernels = _kernels(5, 6)
    assert first_step.compile_in_two(kernels[:1], kernels[1:])
    assert _sums(kernels) == [11] * 3
    assert capfd.readouterr().err == ""


@pytest.mark.usefixtures("_fresh_folder")
def test_a_fork_keeps_no_file_open_and_runs_no_handler(monkeypatch, tmp_path):
    """A reader sees the end of a pipe while the fork compiles; a signal ends the fork alone."""
    children, handled = [], tmp_path / "handled"
    fork = os.fork
    monkeypatch.setattr(first_step, "compile_to_disk", lambda kernel: time.sleep(100))
    monkeypatch.setattr(os, "fork", lambda: children.append(fork()) or children[-1])
    before = signal.signal(signal.SIGUSR1, lambda *_: handled.write_text("here"))
    reader, writer = os.pipe()

    class Observing(runtime.Kernel):
        @property
        def address(self):
            os.close(writer)
            assert os.read(reader, 1) == b""  # only once the fork has closed it, too
            os.kill(children[0], signal.SIGUSR1)
            return 0

    try:
        assert first_step.compile_in_two([Observing(lambda low: None)], _kernels(12))
    finally:
        signal.signal(signal.SIGUSR1, before)
        os.close(reader)
    assert not handled.exists()
    assert signal.SIGUSR1 not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


@pytest.mark.usefixtures("_fresh_folder")
def test_an_error_here_ends_the_fork(monkeypatch):
    children = []
    fork = os.fork
    monkeypatch.setattr(first_step, "compile_to_disk", lambda kernel: time.sleep(100))
    monkeypatch.setattr(os, "fork", lambda: children.append(fork()) or children[-1])

    class Interrupted(runtime.Kernel):
        address = property(lambda self: int("none"))

    with pytest.raises(ValueError, match="invalid literal"):
        first_step.compile_in_two([Interrupted(lambda low: None)], _kernels(7))
    with pytest.raises(ProcessLookupError):
        os.kill(children[0], 0)


@pytest.mark.usefixtures("_fresh_folder")
def test_without_a_fork_nothing_is_compiled_early(monkeypatch):
    def refuse():
        raise BlockingIOError("no more processes")

    monkeypatch.setattr(os, "fork", refuse)
    kernels = _kernels(8, 9)
    assert not first_step.compile_in_two(kernels[:1], kernels[1:])
    assert not any(kernel._address for kernel in kernels)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0})
    assert not first_step.compile_in_two(kernels[:1], kernels[1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_training_steps_kernels_are_those_named(monkeypatch, dtype):
    named, launched = [], []
    monkeypatch.setattr(
        first_step, "compile_in_two", lambda ours, theirs: named.extend(ours + theirs)
    )
    launch = runtime.Kernel.launch

    def note(kernel, *args, **arguments):
        launched.append(kernel)
        launch(kernel, *args, **arguments)

    monkeypatch.setattr(runtime.Kernel, "launch", note)
    engine = EmbeddingEngine({name: EmbeddingOption(16, dtype=dtype) for name in "ab"})
    optimizer = SparseAdam(hash_tables(engine), lr=0.1)
    for _ in range(3):
        outputs = engine({name: torch.arange(300) for name in "ab"})
        sum(output.sum() for output in outputs.values()).backward()
        optimizer.step()
    assert set(launched) <= set(named)
    unused = {kernel.function.__name__ for kernel in set(named) - set(launched)}
    assert unused <= {"_rebuild_kernel", "update"}  # of a larger table, of other optimizers
