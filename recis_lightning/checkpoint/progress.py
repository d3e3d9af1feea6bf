"""A progress bar for what takes more than a few seconds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from tqdm import tqdm

from recis_lightning.checkpoint.chunks import Advance

# Takes a description and a number of bytes; gives what is called with the bytes that are done.
Progress = Callable[[str, int], AbstractContextManager[Advance]]

SHOWN_AFTER_SECONDS = 3.0


@contextmanager
def progress_bar(description: str, total_bytes: int) -> Iterator[Advance]:
    """Show a bar on stderr if the work takes ``SHOWN_AFTER_SECONDS``; remove it at the end."""
    with tqdm(
        desc=description,
        total=total_bytes,
        unit="B",
        unit_scale=True,
        delay=SHOWN_AFTER_SECONDS,
        leave=False,
        dynamic_ncols=True,
    ) as bar:

        def advance(done: int) -> None:
            bar.update(done)

        yield advance


@contextmanager
def no_progress(description: str, total_bytes: int) -> Iterator[Advance]:
    """Show nothing."""
    yield lambda done: None


__all__ = ["SHOWN_AFTER_SECONDS", "Progress", "no_progress", "progress_bar"]
