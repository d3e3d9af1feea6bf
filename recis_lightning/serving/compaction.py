"""Compaction of a chain: a base and its deltas become a new base."""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from pathlib import Path

from recis_lightning.serving.chain import (
    State,
    WriterLock,
    chain_folder,
    links_of,
    publishing,
    read_head,
    remove_links,
    remove_strays,
)
from recis_lightning.serving.chain_link import BASE, Head, Link, link_file, rows_file
from recis_lightning.serving.delta_file import tables_of, write_delta
from recis_lightning.serving.merging import merge


def compact(folder: str | os.PathLike[str]) -> int:
    """Merge a chain's base and deltas into a new base, and remove what it replaces.

    Any process may do that, also while another one adds deltas or follows them: the state stays
    the same, and those who have it go on with the next delta. What was overwritten or removed is
    then in no file of the chain. Takes memory for one rank's rows of all tables.

    Args:
        folder: That of ``ChainSink``, ``DeltaHook`` or ``follow``.

    Returns:
        How many deltas were merged.

    Raises:
        ValueError: There is no chain, or a file of it is damaged; the chain is as it was.
        RuntimeError: Another compaction or a new base came first; the chain is as that left it.
    """
    path = chain_folder(folder)
    read_head(path)
    with publishing(path):
        head = read_head(path)
        links = links_of(path, head)
        # A process that was killed may have left files; as long as another one writes, nobody
        # can tell them from those that it has not published yet.
        with contextlib.suppress(RuntimeError):
            lock = WriterLock(path)
            try:
                remove_strays(path)
            finally:
                lock.close()
    last, num_ranks = links[-1], len(links[-1].files)
    if len(links) == 1:
        return 0
    new_id = secrets.token_hex(8)
    names = [rows_file(BASE, last.seq, new_id, rank, num_ranks) for rank in range(num_ranks)]
    try:
        written = []
        for rank, name in enumerate(names):
            delta = merge(path, links, rank)
            written.append(write_delta(path / name, delta, rank == 0))
        merged = Link(
            *(BASE, last.seq, new_id, "", last.state_id, last.step, time.time()),
            tables_of(delta, [parts for _, parts in written]),
            [file for file, _ in written],
            last.dense,
        )
        merged.write(path)
        with publishing(path):
            now = read_head(path)
            is_ours = (now.base_seq, now.base_id) == (head.base_seq, head.base_id)
            if not is_ours or not all((path / name).exists() for name in merged.file_names()):
                raise RuntimeError(f"{path}: the chain got another base while this one was made")
            Head(now.seq, now.id, merged.seq, merged.id).write(path)
            remove_links(path, links)
    except BaseException:
        if not _is_base(path, State(last.seq, new_id)):
            for name in [*names, link_file(BASE, last.seq, new_id)]:
                (path / name).unlink(missing_ok=True)
        raise
    return len(links) - 1


def _is_base(path: Path, base: State) -> bool:
    with contextlib.suppress(ValueError, OSError):
        head = read_head(path)
        return State(head.base_seq, head.base_id) == base
    return False


__all__ = ["compact"]
