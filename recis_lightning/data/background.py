"""Running an iterator ahead of its reader, in a thread."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Iterator
from typing import Any, TypeVar

__all__ = ["in_background"]

_T = TypeVar("_T")
_POLL_SECONDS = 0.1  # between checks, by the thread, that its reader is still there


def in_background(items: Iterator[_T], depth: int) -> Iterator[_T]:
    """Yield the items of an iterator that a thread runs up to ``depth`` items ahead.

    An error of the iterator is raised where its item would have come. Closing the generator, or
    dropping it, closes the iterator and ends the thread.

    Args:
        items: The iterator; nothing else may use it.
        depth: Items that wait to be read, at most; 0 runs without a thread.

    Example:
        >>> list(in_background(iter([1, 2, 3]), depth=2))
        [1, 2, 3]
    """
    if not depth:
        yield from items
        return
    waiting: queue.Queue[tuple[str, Any]] = queue.Queue(depth)
    stop = threading.Event()

    def put(kind: str, value: Any) -> bool:
        while not stop.is_set():
            try:
                waiting.put((kind, value), timeout=_POLL_SECONDS)
                return True
            except queue.Full:
                continue
        return False

    def run() -> None:
        try:
            for item in items:
                if not put("item", item):
                    break
            else:
                put("end", None)
        except BaseException as error:
            put("error", error)
        finally:
            close = getattr(items, "close", None)
            if close is not None:
                close()

    thread = threading.Thread(target=run, name="recis_lightning.data", daemon=True)
    thread.start()
    try:
        while True:
            kind, value = waiting.get()
            if kind == "end":
                return
            if kind == "error":
                raise value
            yield value
    finally:
        stop.set()
        with contextlib.suppress(queue.Empty):
            while True:  # so the thread need not wait for room
                waiting.get_nowait()
        thread.join()
