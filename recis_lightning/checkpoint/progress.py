"""Progress bars of saving and loading."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from tqdm import tqdm

from recis_lightning.checkpoint.chunks import ProgressCallback
from recis_lightning.distributed import collectives

# Takes a description and the total bytes; its context is called with the bytes that are done.
Progress = Callable[[str, int], AbstractContextManager[ProgressCallback]]

SHOWN_AFTER_SECONDS = 3.0


@contextmanager
def progress_bar(description: str, total_bytes: int) -> Iterator[ProgressCallback]:
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

        def advance(num_bytes: int) -> None:
            bar.update(num_bytes)

        yield advance


@contextmanager
def no_progress(description: str, total_bytes: int) -> Iterator[ProgressCallback]:
    """Show nothing."""
    yield lambda num_bytes: None


def on_rank_zero(progress: Progress) -> Progress:
    """Return ``progress`` on rank 0, and ``no_progress`` on the others."""
    return progress if collectives.rank() == 0 else no_progress


__all__ = ["SHOWN_AFTER_SECONDS", "Progress", "no_progress", "on_rank_zero", "progress_bar"]
