"""Rows of mapped files are brought in: they stay as they are, and the disk is read once."""

import os
import resource

import pytest
import torch

from recis_lightning import HashTable
from recis_lightning.ops import backend as ops_backend
from recis_lightning.ops import file_memory, mapped_rows

pytestmark = pytest.mark.skipif(
    not file_memory.is_supported(), reason="this system cannot map such files"
)


def filled(tmp_path, num_rows=4000, dim=64, memory="0"):
    table = HashTable(dim, rows=f"file:{tmp_path}?memory={memory}")
    ids = torch.arange(num_rows)
    table.insert(ids, ids[:, None].expand(-1, dim).float())
    return table, ids


def drop_from_memory(table):
    """Write all pages of the table's file, and have the kernel forget them."""
    libc, file = file_memory._libc(), table.storage.row_file._memory.open()
    os.fsync(file.descriptor)
    for offset, (address, size) in file.mapped.items():
        libc.madvise(address, size, 4)  # MADV_DONTNEED: unmaps the pages, which stay in the file
        os.posix_fadvise(file.descriptor, offset, size, os.POSIX_FADV_DONTNEED)


@pytest.mark.parametrize("name", ["reference", "cpu"])
@pytest.mark.parametrize("writes", [False, True])
@pytest.mark.parametrize("memory", ["0", "300KB"])
def test_rows_stay_as_they_are(tmp_path, name, writes, memory):
    table, ids = filled(tmp_path, memory=memory)
    header = table.storage.header
    assert mapped_rows.has_any(header)
    some = torch.cat([torch.tensor([-1, 3999, 0, -3, 7, 7]), torch.randint(0, 4000, (999,))])
    with ops_backend.use(name):
        for rows in (some, ids, ids[:1], ids[:0], some.flip(0)[::2]):
            mapped_rows.bring_in([(header, rows), (HashTable(3).storage.header, rows)], writes)
    assert torch.equal(table.embeddings(ids)[:, 5], ids.float())


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="asks Linux to forget pages")
def test_what_was_brought_in_is_not_waited_for_again(tmp_path):
    table, ids = filled(tmp_path)
    rows = torch.randperm(4000)[:500]
    drop_from_memory(table)
    mapped_rows.bring_in([(table.storage.header, rows)], writes=True)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_majflt
    assert torch.equal(table.embeddings(ids[rows])[:, 0], rows.float())
    assert resource.getrusage(resource.RUSAGE_SELF).ru_majflt - before < 50
    drop_from_memory(table)
    assert torch.equal(table.embeddings(ids)[:, 0], ids.float())


def test_many_rows_are_copied_in_chunks(tmp_path):
    table, _ = filled(tmp_path, 100, 4)
    header = table.storage.header
    assert list(mapped_rows.chunks(header, 0)) == []
    size = mapped_rows._CHUNK_BYTES // 16
    parts = [(part.start, part.stop) for part in mapped_rows.chunks(header, size + 1)]
    assert parts == [(0, size), (size, size + 1)]
    in_memory = HashTable(4).storage.header
    assert list(mapped_rows.chunks(in_memory, size + 1)) == [slice(0, size + 1)]
