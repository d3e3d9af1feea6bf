import inspect
import itertools
import platform
from typing import NamedTuple

import numpy as np
import pytest
import torch
from numba import cfunc, types

from recis_lightning import HashTable
from recis_lightning.initializers import Constant, Normal, TruncatedNormal, Uniform
from recis_lightning.ops import backend as ops_backend
from recis_lightning.ops import hash_index, row_init
from recis_lightning.ops.cpu import row_init as row_init_cpu
from recis_lightning.ops.layout import SEGMENT_SIZE
from recis_lightning.table.segment import write_segment

CPU = torch.device("cpu")
DIMS = [1, 2, 3, 7, 8, 10, 16, 24, 33, 64, 128]
INITIALIZERS = [
    Constant(-0.75),
    Uniform(-0.05, 0.1),
    Normal(0.5, 2.0),
    Normal(std=0.0),
    TruncatedNormal(1.0, 0.5, 0.0, 1.7),
    TruncatedNormal(std=0.01, a=-2.0, b=2.0),
]
EDGE_IDS = torch.tensor([-(2**63), 2**63 - 1, -1, 0, 1, 2**32, -(2**32)])


class Feature(NamedTuple):
    """Lookup of one feature in a table."""

    table: HashTable
    ids: torch.Tensor
    insert: bool = True
    padding: int | None = None


def _admit(*features):
    """Insert ids and initialise the new rows; return the rows of each feature."""
    segments = np.zeros((len(features), SEGMENT_SIZE), np.int64)
    for line, (table, _, insert, padding) in zip(segments, features, strict=True):
        write_segment(line, table, insert, padding)
    num_ids = hash_index.describe(segments, [feature.ids for feature in features])
    tables = list(dict.fromkeys(feature.table for feature in features))
    owners = [tables.index(feature.table) for feature in features]
    rows, new = hash_index.find_or_insert(
        segments, num_ids, [table.storage for table in tables], owners, CPU
    )
    if new is not None:
        dim, bfloat16 = tables[0].embedding_dim, tables[0].dtype is torch.bfloat16
        row_init.init_rows_(rows, new, segments, dim, bfloat16)
    return rows.split([feature.ids.numel() for feature in features])


def _initial(ids, dim=4, **options):
    """Return the initial weights of distinct ids, by position."""
    table = HashTable(dim, **{"name": "user", **options})
    (rows,) = _admit(Feature(table, ids))
    return table.storage.rows.read(rows)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("initializer", INITIALIZERS, ids=repr)
@pytest.mark.slow_except(
    dict(kernels="cpu"), dict(dtype=torch.float32), dict(initializer=INITIALIZERS[2])
)
def test_kernels_agree_with_the_reference(kernels, initializer, dtype):
    """Every distribution and dim gives the reference's weights to float rounding."""
    ids = torch.cat([EDGE_IDS, torch.arange(300) * 7919])
    for dim in DIMS if kernels == "cpu" else [1, 7, 128]:
        with ops_backend.use("reference"):
            wanted = _initial(ids, dim, initializer=initializer, dtype=dtype)
        with ops_backend.use(kernels):
            weights = _initial(ids, dim, initializer=initializer, dtype=dtype)
        rtol = 2**-7 if dtype is torch.bfloat16 else 3e-6
        spread = (wanted.float().max() - wanted.float().min()).item()
        torch.testing.assert_close(weights, wanted, rtol=rtol, atol=1e-6 * spread)


def test_a_row_depends_on_its_id_only(backend):
    """Order, batches, neighbours and evictions leave an id's initial row bitwise the same."""
    ids = torch.cat([EDGE_IDS, torch.arange(500)])
    wanted = _initial(ids)
    order = torch.randperm(ids.numel(), generator=torch.Generator().manual_seed(0))
    assert torch.equal(_initial(ids[order]), wanted[order])
    table = HashTable(4, name="user")
    for batch in ids.split(13):
        _admit(Feature(table, batch.repeat(3)))
    assert torch.equal(table.embeddings(ids), wanted)
    table.insert(ids, torch.ones(ids.numel(), 4))
    table.delete(ids[::2])
    _admit(Feature(table, ids.flip(0)))
    wanted[1::2] = 1
    assert torch.equal(table.embeddings(ids), wanted)


def test_dims_share_their_first_columns(backend):
    """A column's weight does not depend on how many columns follow it."""
    ids = torch.arange(50)
    for dim in DIMS:
        assert torch.equal(_initial(ids, 128)[:, :dim], _initial(ids, dim))


def test_seeds_names_ids_and_columns_all_matter(backend):
    """Changing any of them changes every weight."""
    ids = torch.cat([EDGE_IDS, torch.arange(2, 200)])
    base = _initial(ids, 16)
    assert base.unique().numel() > 0.999 * base.numel()
    for other in (
        _initial(ids, 16, seed=1),
        _initial(ids, 16, seed=-1),
        _initial(ids, 16, name="users"),
        _initial(ids, 16, name=None),
    ):
        assert (other != base).float().mean() > 0.999


def test_bfloat16_rows_are_rounded_float32_rows(backend):
    """A bfloat16 table starts from the float32 table's weights, rounded to nearest."""
    ids = torch.arange(300)
    for dim in (1, 3, 8):
        assert torch.equal(_initial(ids, dim, dtype=torch.bfloat16), _initial(ids, dim).bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [1, 3, 8, 33])
@pytest.mark.slow_except(
    dict(backend=["reference", "cpu"]),
    dict(dim=[1, 8], dtype=torch.float32),
    dict(dim=[3, 33], dtype=torch.bfloat16),
)
def test_whole_rows_and_no_others_are_written(backend, dim, dtype):
    """Weights and state of new rows leave no NaN behind; other rows keep theirs."""
    table = HashTable(dim, dtype=dtype, initializer=Constant(2.0))
    table.storage.rows.relayout({"sum": dim, "count": 3}, 0.25)
    _admit(Feature(table, torch.arange(100, 120)))
    table.storage.reserve_rows(3000)
    poisoned = table.storage.rows.capacity
    for chunk in table.storage.rows._allocations:
        chunk.view(np.uint32).fill(0x7FC07FC0)  # NaN as float32, and both halves as bfloat16
    _admit(Feature(table, torch.arange(90, 2000)))
    weights, slots = table.storage.rows.read(torch.arange(20, table.storage.rows.num_rows))
    assert (weights == 2).all()
    assert (slots["sum"] == 0.25).all()
    assert (slots["count"] == 0.25).all()
    before, slots = table.storage.rows.read(torch.arange(20))
    assert before.isnan().all()
    assert slots["sum"].isnan().all()
    after, _ = table.storage.rows.read(torch.arange(table.storage.rows.num_rows, poisoned))
    assert after.isnan().all()


def test_features_of_several_tables_in_one_call(backend):
    """Each new id gets its own table's initial row; known, padding and read-only ids get none."""
    initializers = [Constant(1.0), Uniform(3, 4), Normal(100.0), Constant(7.0)]
    tables = [HashTable(3, initializer=kind, name=f"{kind}") for kind in initializers]
    empty = torch.empty(0, dtype=torch.int64)
    features = [
        Feature(tables[0], torch.tensor([1, 2])),
        Feature(tables[1], empty),
        Feature(tables[3], torch.tensor([5]), insert=False),
        Feature(tables[2], torch.arange(600)),
        Feature(tables[1], torch.tensor([8, 9, 8]), padding=9),
        Feature(tables[0], torch.tensor([2, 3]), padding=3),
        Feature(tables[3], empty),
    ]
    _admit(*features)
    assert [len(table) for table in tables] == [2, 1, 600, 0]
    assert tables[0].embeddings(torch.tensor([1, 2, 3])).tolist() == [[1] * 3, [1] * 3, [0] * 3]
    uniform = tables[1].embeddings(torch.tensor([8]))
    assert ((uniform > 3) & (uniform < 4)).all()
    normal = tables[2].embeddings(torch.arange(600))
    assert ((normal - 100).abs() < 6).all()
    alone = [_initial(torch.arange(600), 3, initializer=Normal(100.0), name=tables[2].name)]
    assert torch.equal(normal, alone[0])


def test_no_new_ids_write_nothing(backend):
    """An empty list of new positions is a legal call."""
    table, empty = HashTable(2), torch.empty(0, dtype=torch.int64)
    row_init.init_rows_(empty, empty, table.storage.segments(empty, insert=True), 2, False)
    assert len(table) == 0


def test_keys_of_seeds_and_names_do_not_meet():
    """Seeds next to names hash apart, and a key never changes between versions."""
    pairs = itertools.product([0, 1, -1, 10, 2**63], ["", "0", "1", "a", "table", "名"])
    keys = [row_init.init_key(seed, name) for seed, name in pairs]
    assert len(set(keys)) == len(keys)
    assert row_init.init_key(0, "table") == -3276665695553991942


def test_initial_rows_never_change_between_versions(backend):
    """A later version gives new ids the same rows as this one."""
    pinned = [[-0.9047073, -0.3317324], [-0.2436525, 0.4067551], [-0.4004368, 0.0319692]]
    weights = _initial(torch.tensor([0, -5, 2**40]), 2, initializer=Uniform(-1, 1), name="pinned")
    torch.testing.assert_close(weights, torch.tensor(pinned), rtol=0, atol=1e-6)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="reads x86 machine code")
def test_columns_are_drawn_several_at_a_time():
    """A check for zero or a call in the loop would make it three times as slow, silently."""
    function = row_init_cpu._init_kernel(0).function
    arguments = [types.int64] * len(inspect.signature(function).parameters)
    code = cfunc(types.void(*arguments))(function)._library.get_asm_str()
    assert "sqrtps" in code  # of several float32, in the inverse normal
    assert "divps" in code
