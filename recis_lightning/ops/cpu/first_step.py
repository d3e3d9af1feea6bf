"""Compilation of a first training step's kernels on two processors.

Numba's compiler is Python under a lock, so a second thread would gain nothing. Half of the kernels
are compiled by a fork, which leaves them on disk: it starts at once, with all modules imported,
calls nothing but the compiler, and ends without running any exit handler.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import time
import warnings
from collections.abc import Sequence

import torch
from numba.core.compiler_lock import global_compiler_lock

from recis_lightning.ops import row_update as updates
from recis_lightning.ops.cpu import (
    gradient_sort,
    hash_index,
    hash_insert,
    kernel_cache,
    plan,
    row_init,
    row_update,
)
from recis_lightning.ops.cpu.runtime import Kernel, compile_to_disk

_MIN_KERNELS = 6  # to be compiled, that a fork is worth it
_PATIENCE, _MIN_PATIENCE = 3, 10  # times our own half's time, and seconds, for the fork's half
_log = logging.getLogger(__name__)


def compile_step(gathers: Sequence[Kernel], embedding_dim: int, bfloat16: int) -> None:
    """Compile a training step's kernels that are not kept on disk, if there are many.

    Args:
        gathers: Its kernels that gather rows.
        embedding_dim: Size of the rows.
        bfloat16: 1 for weights in bfloat16, 0 for float32.
    """
    ours = [*hash_index.STEP_KERNELS, *hash_insert.STEP_KERNELS, row_init.kernel_of(bfloat16)]
    ours += [*plan.STEP_KERNELS, *gradient_sort.STEP_KERNELS]
    rules = sorted(updates.announced_rules())
    theirs = [*gathers, *(row_update.kernel_of(rule, embedding_dim, bfloat16) for rule in rules)]
    compile_in_two(ours, theirs)


def compile_in_two(ours: Sequence[Kernel], theirs: Sequence[Kernel]) -> bool:
    """Compile kernels that are not kept, ours here and theirs in a fork, and load all of them.

    Where a fork is not possible or not safe, nothing is done: kernels compile when they are needed.

    Returns:
        Whether there was a fork.
    """
    ours = [kernel for kernel in ours if not kernel.load()]
    theirs = [kernel for kernel in theirs if not kernel.load()]
    if not theirs or len(ours) + len(theirs) < _MIN_KERNELS or not _may_fork():
        return False
    child = _fork_to_compile(theirs)
    if child is None:
        return False
    start, has_ended = time.monotonic(), False
    try:
        for kernel in ours:
            _ = kernel.address
        now = time.monotonic()
        has_ended = _ends_until(child, now + _MIN_PATIENCE + _PATIENCE * (now - start))
    finally:
        if not has_ended:
            _log.debug("The process that compiles kernels is ended")
            with contextlib.suppress(OSError):
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
    for kernel in theirs:
        kernel.load()
    return True


def _may_fork() -> bool:
    return (
        sys.platform == "linux"
        and len(os.sched_getaffinity(0)) > 1
        and kernel_cache.cache_folder() is not None
        and not torch.cuda.is_initialized()
        and not (torch.distributed.is_available() and torch.distributed.is_initialized())
    )


def _fork_to_compile(kernels: Sequence[Kernel]) -> int | None:
    """Return the process that compiles; None if there is none."""
    # Whoever catches a signal must not do so in the fork as well.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    child = None
    try:
        with warnings.catch_warnings(), global_compiler_lock:  # nobody else is inside the compiler
            warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads
            child = os.fork()
    except OSError as error:  # no memory, no more processes
        _log.debug("Kernels are compiled by one process: %s", error)
    finally:
        if child != 0:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    if child == 0:
        _compile_and_exit(kernels, mask)
    return child


def _compile_and_exit(kernels: Sequence[Kernel], mask: set[int]) -> None:
    """Compile with the signals' default actions, and without the files that the process has open.

    A pipe, a socket or a lock of a file that its owner closes would stay open here.
    """
    try:
        for number in signal.valid_signals():
            with contextlib.suppress(OSError, ValueError):  # SIGKILL, and those of libc
                signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for name in os.listdir("/proc/self/fd"):
            if int(name) > 2:
                with contextlib.suppress(OSError):  # that of the list
                    os.close(int(name))
        kernel_cache.notice.silence()
        for kernel in kernels:
            compile_to_disk(kernel)
    finally:
        os._exit(0)


def _ends_until(child: int, deadline: float) -> bool:
    while time.monotonic() < deadline:
        try:
            if os.waitpid(child, os.WNOHANG) != (0, 0):
                return True
        except ChildProcessError:  # someone else waited for it
            return True
        time.sleep(0.005)
    return False


__all__ = ["compile_in_two", "compile_step"]
