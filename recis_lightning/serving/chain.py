"""Chain of deltas in a folder: which links make its state, and its locks."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from recis_lightning import system_calls
from recis_lightning.arguments import check_path
from recis_lightning.serving.chain_link import (
    BASE,
    CHAIN_FOLDER,
    DELTA,
    Head,
    Link,
    is_chain_file,
)

_PUBLISH_LOCK, _WRITER_LOCK = ".publish.lock", ".writer.lock"


class State(NamedTuple):
    """State of a chain: that behind a link.

    Attributes:
        seq: Number of the link.
        id: ``state_id`` of the link.
    """

    seq: int
    id: str


def chain_folder(folder: str | os.PathLike[str]) -> Path:
    """Return where in a folder its chain is."""
    return check_path("folder", folder) / CHAIN_FOLDER


def read_head(folder: Path) -> Head:
    """Return a chain's head; ValueError if there is none, or it is damaged."""
    head = Head.read(folder)
    if head is None:
        raise ValueError(f"{folder}: no chain of deltas")
    return head


def links_of(folder: Path, head: Head, since: State | None = None) -> list[Link]:
    """Return the links that lead to a chain's head, the first one first.

    Args:
        folder: The chain's.
        head: Its head.
        since: State that the caller has; None if it has none.

    Returns:
        The deltas since that state, if the chain goes through it; else the base, and the deltas
        since.

    Raises:
        ValueError: A link is missing, damaged, or does not follow on the one before it.
    """
    if since is not None and head.seq >= since.seq > head.base_seq:
        with contextlib.suppress(ValueError):  # another chain by now, or some were removed
            return _deltas(folder, head, since)
    base = Link.read(folder, BASE, head.base_seq, head.base_id)
    state = State(base.seq, base.state_id)
    if since == state:
        return _deltas(folder, head, state)
    return [base, *_deltas(folder, head, state)]


def _deltas(folder: Path, head: Head, since: State) -> list[Link]:
    """Return the deltas from a state to the head; ValueError if they do not lead there."""
    links: list[Link] = []
    wanted = head.id
    for seq in range(head.seq, since.seq, -1):
        link = Link.read(folder, DELTA, seq, wanted)
        if link.state_id != link.id:
            raise ValueError(f"{folder / link.file}: damaged (its state)")
        links.append(link)
        wanted = link.parent
    if wanted != since.id:
        raise ValueError(f"{folder}: link {since.seq} is not the one that the next one follows on")
    return links[::-1]


@contextlib.contextmanager
def publishing(folder: Path) -> Iterator[None]:
    """Let no other process or thread change the head meanwhile."""
    file = _open_lock(folder / _PUBLISH_LOCK)
    try:
        system_calls.lock(file, wait=True)
        yield
    finally:
        os.close(file)


class WriterLock:
    """Hold of the one writer of a chain; it ends with the process, however that ends.

    Args:
        folder: The chain's.

        patience: Seconds to wait for one that is about to end.

    Raises:
        RuntimeError: Another one writes there.
    """

    def __init__(self, folder: Path, patience: float = 0.0) -> None:
        self._file: int | None = _open_lock(folder / _WRITER_LOCK)
        end = time.monotonic() + patience
        while True:
            try:
                system_calls.lock(self._file)
                return
            except BlockingIOError:
                if time.monotonic() >= end:
                    self.close()
                    message = f"{folder}: another writer adds deltas to this chain"
                    raise RuntimeError(message) from None
                time.sleep(0.01)

    def close(self) -> None:
        """Let others write."""
        file, self._file = self._file, None
        if file is not None:
            os.close(file)


def _open_lock(path: Path) -> int:
    flags = system_calls.open_flags("O_RDWR", "O_CREAT", "O_CLOEXEC", "O_NOFOLLOW")
    return os.open(path, flags, 0o644)


def remove_links(folder: Path, links: Iterable[Link]) -> None:
    """Remove the files of links that the head does not need any more, records first."""
    for link in links:
        for name in link.file_names():
            (folder / name).unlink(missing_ok=True)


def remove_strays(folder: Path) -> None:
    """Remove files of links that the head does not lead to, as a killed writer leaves them.

    The caller holds the writer's lock, and publishes nothing meanwhile.
    """
    head = Head.read(folder)
    links = [] if head is None else links_of(folder, head)
    kept = {name for link in links for name in link.file_names()} | {"head.json"}
    for name in os.listdir(folder):
        if is_chain_file(name) and name not in kept:
            (folder / name).unlink(missing_ok=True)


__all__ = [
    "State",
    "WriterLock",
    "chain_folder",
    "links_of",
    "publishing",
    "read_head",
    "remove_links",
    "remove_strays",
]
