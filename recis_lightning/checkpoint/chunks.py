"""Work that is done piece by piece, in threads, while someone watches it advance."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager

import torch

Advance = Callable[[int], None]  # takes the number of bytes done since it was last called

_WATCH_SECONDS = 0.1


def in_pieces(
    num_pieces: int,
    work: Callable[[int], int],
    advance: Advance,
    also: Callable[[], None] | None = None,
    also_every: int = 0,
) -> None:
    """Do pieces ``0 ... num_pieces - 1`` in as many threads as torch has; the first error counts.

    Args:
        num_pieces: How many.
        work: Does one piece, on any thread; returns its bytes.
        advance: Called on this thread with the bytes done since, now and then.
        also: Called on this thread meanwhile, each time that many bytes more are done ...
        also_every: ... at least.
    """
    numbers = itertools.count()
    done = [0] * max(torch.get_num_threads(), 1)
    stop = threading.Event()

    def run(thread: int) -> None:
        try:
            while not stop.is_set() and (number := next(numbers)) < num_pieces:
                done[thread] += work(number)
        except BaseException:
            stop.set()
            raise

    if num_pieces <= len(done):
        run(0)
        advance(sum(done))
        return
    told = synced = 0
    with ThreadPoolExecutor(len(done), "recis_lightning") as threads:
        running = {threads.submit(run, thread) for thread in range(len(done))}
        try:
            while running:
                ended, running = wait(running, _WATCH_SECONDS, FIRST_EXCEPTION)
                for future in ended:
                    future.result()
                now = sum(done)
                advance(now - told)
                told = now
                if also is not None and now - synced >= also_every:
                    synced = now
                    also()
        finally:
            stop.set()


@contextmanager
def ahead(num_pieces: int, prepare: Callable[[int], None]) -> Iterator[None]:
    """Prepare pieces, in order, on a thread of its own while something else is done."""
    stop = threading.Event()

    def run() -> None:
        for number in range(num_pieces):
            if stop.is_set():
                return
            prepare(number)

    thread = threading.Thread(target=run, name="recis_lightning", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


__all__ = ["Advance", "ahead", "in_pieces"]
