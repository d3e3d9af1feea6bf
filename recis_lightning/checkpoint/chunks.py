"""Work on chunks of data in threads, with a report of the bytes that are done."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager

import torch

ProgressCallback = Callable[[int], None]  # takes the number of bytes done since its last call

_POLL_SECONDS = 0.1


def parallel_for(
    num_chunks: int,
    work: Callable[[int], int],
    on_progress: ProgressCallback,
    on_bytes: Callable[[], None] | None = None,
    every_bytes: int = 0,
) -> None:
    """Work on chunks ``0 ... num_chunks - 1`` in as many threads as torch has.

    The first error stops all threads and is raised.

    Args:
        num_chunks: Number of chunks.
        work: Works on one chunk, on any thread; returns its bytes.
        on_progress: Called on this thread from time to time, with the bytes done since.
        on_bytes: Called on this thread, while others work, after each ``every_bytes`` or more.
        every_bytes: Bytes between two calls of ``on_bytes``.
    """
    indices = itertools.count()
    done = [0] * max(torch.get_num_threads(), 1)
    stop = threading.Event()

    def run(thread: int) -> None:
        try:
            while not stop.is_set() and (index := next(indices)) < num_chunks:
                done[thread] += work(index)
        except BaseException:
            stop.set()
            raise

    if num_chunks <= len(done):
        run(0)
        on_progress(sum(done))
        return
    reported = called = 0
    with ThreadPoolExecutor(len(done), "recis_lightning") as threads:
        try:
            running = {threads.submit(run, thread) for thread in range(len(done))}
            while running:
                ended, running = wait(running, _POLL_SECONDS, FIRST_EXCEPTION)
                for future in ended:
                    future.result()
                now = sum(done)
                on_progress(now - reported)
                reported = now
                if on_bytes is not None and now - called >= every_bytes:
                    called = now
                    on_bytes()
        finally:
            stop.set()


@contextmanager
def prefetch(num_chunks: int, prepare: Callable[[int], None]) -> Iterator[None]:
    """Prepare chunks, in order, on a thread of its own until the context ends."""
    stop = threading.Event()

    def run() -> None:
        for index in range(num_chunks):
            if stop.is_set():
                return
            prepare(index)

    thread = threading.Thread(target=run, name="recis_lightning", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


__all__ = ["ProgressCallback", "parallel_for", "prefetch"]
