"""Tables of served folders: written, searched and read."""

import numpy as np
import pytest
import torch

from recis_lightning.serving import served_table
from recis_lightning.serving.array_file import ArrayWriter, MappedArrays
from recis_lightning.serving.served_table import (
    ServedTable,
    bucket_bits,
    hash_ids,
    quantise,
    write_table,
)

EXTREMES = torch.tensor([-(2**63), -(2**63) + 1, 2**63 - 1, 0, -1, 2**62])


def make_table(folder, ids, row_format="float32", dim=3, dtype=torch.float32):
    """Write rows that are their id's last digits; return the open table and the rows."""
    rows = (ids[:, None] % 1000 - 500).float() + torch.arange(dim) / 8
    by_id = dict(zip(ids.tolist(), rows.to(dtype), strict=True))
    path = folder / f"{row_format}.rows"
    record = write_table(
        *(path, ids.numpy(), lambda asked: torch.stack([by_id[i] for i in asked.tolist()])),
        *(row_format, dim),
    )
    return ServedTable("t", MappedArrays(folder, record), row_format, dim, dtype), rows.to(dtype)


def look_up(table, ids):
    return table.look_up(ids, None, None, "none", 0, None)


@pytest.mark.parametrize("count", [0, 1, 2, 5, 1000])
def test_known_ids_have_their_rows_and_unknown_ones_zeros(tmp_path, count):
    """Ids of every size, the ends of int64 included; duplicates, and more ids than rows."""
    random = torch.Generator().manual_seed(count)
    drawn = torch.randint(-(2**62), 2**62, (count,), generator=random)
    ids = torch.cat([EXTREMES, drawn]).unique()[:count] if count else EXTREMES[:0]
    table, rows = make_table(tmp_path, ids)
    assert len(table) == len(ids)
    assert look_up(table, ids).equal(rows)
    unknown = torch.arange(10**6, 10**6 + 50)
    assert not look_up(table, unknown).any()
    mixed = torch.cat([unknown, ids, ids])
    assert look_up(table, mixed).equal(torch.cat([torch.zeros(50, 3), rows, rows]))
    assert look_up(table, ids[:0]).shape == (0, 3)
    few = [look_up(table, part) for part in mixed.split(99)]  # sought in another way than many
    assert torch.cat(few).equal(look_up(table, mixed))


def test_ids_of_one_bucket_are_all_found(tmp_path):
    """A user may choose ids whose hashes begin alike: more than are compared at once."""
    candidates = torch.arange(200_000)
    buckets = hash_ids(candidates.numpy()) >> np.uint64(64 - bucket_bits(64))
    crowded = candidates[torch.from_numpy(buckets == buckets[0])][:50]
    ids = torch.cat([crowded, -1 - torch.arange(14)])
    table, rows = make_table(tmp_path, ids)
    assert int(np.diff(table._starts).max()) >= 50 > served_table._WINDOW
    assert look_up(table, ids).equal(rows)
    assert not look_up(table, crowded + 10**9).any()


def test_rows_are_kept_as_asked(tmp_path):
    ids = torch.arange(300)
    exact, rows = make_table(tmp_path, ids, dim=64)
    half, _ = make_table(tmp_path, ids, "bfloat16", dim=64)
    small, _ = make_table(tmp_path, ids, "int8", dim=64)
    assert look_up(exact, ids).equal(rows)
    assert look_up(half, ids).equal(rows.bfloat16().float())
    error = (look_up(small, ids) - rows).abs().amax(1)
    assert bool((error <= rows.abs().amax(1) / 254 * 1.001).all())
    assert not look_up(small, torch.tensor([-7])).any()
    sizes = [(tmp_path / f"{name}.rows").stat().st_size for name in ("float32", "bfloat16", "int8")]
    assert sizes == sorted(sizes, reverse=True)


def test_a_row_without_numbers_is_not_quantised():
    with pytest.raises(ValueError, match="int8 has no NaN"):
        quantise(torch.tensor([[1.0, torch.nan]]))
    assert quantise(torch.zeros(2, 3))[1].tolist() == [0, 0]


def test_malformed_offsets_are_refused(tmp_path):
    table, _ = make_table(tmp_path, torch.arange(5))
    ids = torch.arange(3)
    for offsets in ([0, 2], [1, 3], [0, 2, 1, 3], []):
        with pytest.raises(ValueError, match="offsets: of a feature of table 't'"):
            table.look_up(ids, torch.tensor(offsets, dtype=torch.int64), None, "sum", 0, None)


@pytest.mark.parametrize("change", ["largest", "dtype", "missing", "starts"])
def test_arrays_of_something_else_are_refused(tmp_path, change):
    ids = np.arange(4)
    arrays = {
        "starts": np.array([0, 1, 2, 3, 4], np.uint32),
        "ids": ids[np.argsort(hash_ids(ids))],
        "rows": np.ones((4, 2), np.float32),
        "largest": np.array([2]),
    }
    if change == "largest":
        arrays["largest"][0] = 1 << 40
    elif change == "dtype":
        arrays["rows"] = arrays["rows"].astype(np.float64)
    elif change == "missing":
        del arrays["largest"]
    else:
        arrays["starts"] = arrays["starts"][:2]
    writer = ArrayWriter(tmp_path / "t.rows")
    for name, array in arrays.items():
        writer.add(name, array.shape, [array])
    mapped = MappedArrays(tmp_path, writer.close())
    with pytest.raises(ValueError, match=r"t\.rows"):
        ServedTable("t", mapped, "float32", 2, torch.float32)


def test_a_bucket_that_points_beyond_the_ids_finds_nothing(tmp_path):
    """Of a hostile writer, whose checksums are right."""
    ids = np.arange(4)
    writer = ArrayWriter(tmp_path / "t.rows")
    beyond = np.array([2**32 - 1, 0, 2**32 - 1, 7, 2**31], np.uint32)
    for name, array in {
        "starts": beyond,
        "ids": ids,
        "rows": np.ones((4, 2), np.float32),
        "largest": np.array([4]),
    }.items():
        writer.add(name, array.shape, [array])
    table = ServedTable("t", MappedArrays(tmp_path, writer.close()), "float32", 2, torch.float32)
    assert look_up(table, torch.arange(-50, 50)).shape == (100, 2)
