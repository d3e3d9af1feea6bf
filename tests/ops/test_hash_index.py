import tracemalloc
from typing import NamedTuple

import numpy as np
import pytest
import torch

from recis_lightning import HashTable
from recis_lightning.admission import ReadOnly
from recis_lightning.eviction import GlobalStepFilter
from recis_lightning.ops import backend as ops_backend
from recis_lightning.ops import hash_index
from recis_lightning.ops.layout import (
    ENTRIES,
    INSERT,
    NEXT_ROW,
    NUM_FREE,
    NUM_IDS,
    PADDING,
    SEGMENT_FLAGS,
    SEGMENT_SIZE,
    UNKNOWN,
)
from recis_lightning.table import sizing
from recis_lightning.table.segment import write_segment

CPU = torch.device("cpu")
LOWEST, HIGHEST = -(2**63), 2**63 - 1


class Feature(NamedTuple):
    """Lookup of one feature in a table."""

    table: HashTable
    ids: torch.Tensor
    insert: bool = True
    padding: int | None = None


def _described(features):
    segments = np.zeros((len(features), SEGMENT_SIZE), np.int64)
    for line, feature in zip(segments, features, strict=True):
        write_segment(line, feature.table, False, feature.padding)
        line[SEGMENT_FLAGS] |= INSERT * feature.insert
    return segments, hash_index.describe(segments, [feature.ids for feature in features])


def _find(*features):
    return hash_index.find(*_described(features), CPU)


def _find_or_insert(*features):
    """Return the rows of each feature, and the positions of the new ids."""
    segments, num_ids = _described(features)
    tables = list(dict.fromkeys(feature.table for feature in features))
    owners = [tables.index(feature.table) for feature in features]
    rows, new = hash_index.find_or_insert(
        segments, num_ids, [table.storage for table in tables], owners, CPU
    )
    assert new is None or new.numel()
    sizes = [feature.ids.numel() for feature in features]
    return list(rows.split(sizes)), [] if new is None else new[new >= 0].tolist()


def _expected(features, known):
    """Return the expected result of ``_find_or_insert``, by a dict of rows for each table."""
    before = {table: dict(rows) for table, rows in known.items()}
    rows, new, position = [], [], 0
    for table, ids, insert, padding in features:
        mine = []
        for key in ids.tolist():
            if key == padding:
                mine.append(PADDING)
            elif insert:
                if key not in known[table]:
                    known[table][key] = len(known[table])
                    new.append(position)
                mine.append(known[table][key])
            else:
                mine.append(before[table].get(key, UNKNOWN))
            position += 1
        rows.append(mine)
    return rows, new


def _contents(table):
    """Return a table's ids and rows in the order of rows."""
    ids, rows = table.ids_map()
    return ids.tolist(), rows.tolist()


def _random_ids(generator, size, spread):
    return torch.randint(-spread, spread, (size,), generator=generator)


@pytest.mark.parametrize("size", [0, 1, 2, 7, 100, 4097])
def test_rows_come_in_the_order_of_first_appearance(backend, size):
    """Every lookup agrees with a dict, whatever was inserted before."""
    table, known = HashTable(1), {}
    generator = torch.Generator().manual_seed(size)
    for spread in (1, 50, 3000, 2**62):
        feature = Feature(table, _random_ids(generator, size, spread))
        want = _expected([feature], {table: known})
        (rows,), new = _find_or_insert(feature)
        assert (want[0], want[1]) == ([rows.tolist()], new)
        again = _find(feature)
        assert torch.equal(again, rows)
        assert _find_or_insert(feature)[1] == []
    assert len(table) == len(known)
    assert _contents(table) == (list(known), list(known.values()))


def test_every_int64_is_an_id(backend):
    """The extremes, 0 and -1 are ids like any other, and so is the mark of an empty entry."""
    table = HashTable(1)
    ids = torch.tensor([HIGHEST, 0, LOWEST, -1, LOWEST, LOWEST + 1, HIGHEST - 1, 1])
    assert _find(Feature(table, ids)).tolist() == [UNKNOWN] * 8
    (rows,), new = _find_or_insert(Feature(table, ids))
    assert rows.tolist() == [0, 1, 2, 3, 2, 4, 5, 6]
    assert new == [0, 1, 2, 3, 5, 6, 7]
    table.storage.reserve_ids(10_000)
    assert _find(Feature(table, ids)).tolist() == rows.tolist()
    assert sorted(table.ids().tolist()) == sorted(set(ids.tolist()))


def test_padding_is_no_id_for_its_feature_only(backend):
    """A padding id gets no row; the same id of another feature of the table does."""
    table = HashTable(1)
    ids = torch.tensor([5, 0, 5, -3])
    features = [
        Feature(table, ids, padding=5),
        Feature(table, ids, padding=LOWEST),
        Feature(table, torch.tensor([LOWEST, 0, LOWEST]), padding=LOWEST),
    ]
    (first, second, third), new = _find_or_insert(*features)
    assert first.tolist() == [PADDING, 0, PADDING, 1]
    assert second.tolist() == [2, 0, 2, 1]
    assert third.tolist() == [PADDING, 0, PADDING]
    assert new == [1, 3, 4]
    assert _find(*features[:1]).tolist() == [PADDING, 0, PADDING, 1]


def test_read_only_features_insert_nothing(backend):
    """They see the ids that were known before, and neither insert nor disturb the others."""
    table = HashTable(1)
    _find_or_insert(Feature(table, torch.tensor([1, 2])))
    features = [
        Feature(table, torch.tensor([3, 1, 4]), insert=False),
        Feature(table, torch.tensor([2, 3])),
        Feature(table, torch.tensor([3, 2, 9]), insert=False, padding=9),
    ]
    rows, new = _find_or_insert(*features)
    assert [r.tolist() for r in rows] == [[UNKNOWN, 0, UNKNOWN], [1, 2], [UNKNOWN, 1, PADDING]]
    assert new == [4]
    assert len(table) == 3


@pytest.mark.parametrize(("num_tables", "num_features"), [(1, 9), (3, 40), (60, 60), (60, 7)])
@pytest.mark.slow_except(dict(backend=["reference", "cpu"]), dict(num_tables=[1, 3]))
def test_groups_of_tables_and_features(backend, num_tables, num_features):
    """Many features, empty ones among them, each get their own table's rows."""
    generator = torch.Generator().manual_seed(num_tables)
    tables = [HashTable(1, name=f"{number}") for number in range(num_tables)]
    known = {table: {} for table in tables}
    for _ in range(3 if backend != "triton" else 2):
        features = []
        for _ in range(num_features):
            pick, size, insert, padding = torch.randint(0, 60, (4,), generator=generator).tolist()
            size = 0 if size < 15 else size * 5
            ids = _random_ids(generator, size, 200)
            pad = padding if padding % 2 else None
            features.append(Feature(tables[pick % num_tables], ids, insert % 4 > 0, pad))
        want_rows, want_new = _expected(features, known)
        rows, new = _find_or_insert(*features)
        assert [r.tolist() for r in rows] == want_rows
        assert new == want_new
    for table in tables:
        assert _contents(table) == (list(known[table]), list(known[table].values()))


def test_growth_keeps_every_id_and_the_load_limit(backend):
    """Through eight doublings all ids keep their rows, and the load stays under its limit."""
    table, ids = HashTable(1), torch.randperm(20_000, generator=torch.Generator().manual_seed(0))
    capacities = set()
    for batch in ids.split(777):
        _find_or_insert(Feature(table, batch))
        capacities.add(table.capacity)
        assert not table.storage.outgrows_index(0)
    assert len(capacities) >= 4
    rows = _find(Feature(table, ids))
    assert torch.equal(rows, torch.arange(20_000))


@pytest.mark.parametrize("count", [0, 1, 40, 3000])
def test_rebuild_leaves_evicted_rows_out(backend, count):
    """Ids of evicted rows are removed, others keep their rows; the mask keeps rows with an id."""
    table = HashTable(1)
    ids = torch.cat([torch.arange(count) * 7919, torch.tensor([LOWEST, HIGHEST])])
    _find_or_insert(Feature(table, ids))
    evicted = torch.zeros(table.storage.rows.capacity, dtype=torch.bool)
    evicted[1::3] = True
    evicted[count] = True  # the lowest id's row
    marked = evicted.clone()
    table.storage.entries, removed = hash_index.rebuild(
        table.storage.header, table.capacity, evicted
    )
    gone = marked[: count + 2]
    assert removed == int(gone.sum()) == int(evicted.sum())
    assert torch.equal(evicted[: count + 2], gone)
    assert len(table) == count + 2 - removed
    found = _find(Feature(table, ids))
    assert torch.equal(found, torch.where(gone, UNKNOWN, torch.arange(count + 2)))
    found_ids, occupied = hash_index.id_of_row(table.storage.header, count + 2)
    assert torch.equal(occupied, ~gone)
    assert torch.equal(found_ids[occupied], ids[~gone])


def test_freed_rows_are_reused_from_the_top_of_the_stack(backend):
    """New ids take freed rows first, in turn, then rows never used, also over several features."""
    table = HashTable(1)
    _find_or_insert(Feature(table, torch.arange(10)))
    table.delete(torch.tensor([7, 2, 4]))
    table.storage.rows.set_free_rows(torch.tensor([4, 2, 7]))
    (first, second), new = _find_or_insert(
        Feature(table, torch.tensor([3, 50, 51, 50])), Feature(table, torch.tensor([52, 51, 53]))
    )
    assert first.tolist() == [3, 7, 2, 7]
    assert second.tolist() == [4, 2, 10]
    assert new == [1, 2, 4, 6]
    assert table.storage.rows.free_rows.tolist() == []
    assert table.storage.rows.num_rows == 11


def _zipf(generator, size):
    return torch.from_numpy(generator.zipf(1.1, size).astype(np.int64))


BATCHES = {
    "one id": lambda generator: torch.zeros(70_000, dtype=torch.int64),
    "all distinct": lambda generator: torch.from_numpy(generator.permutation(90_000)),
    "each id twice": lambda generator: torch.from_numpy(generator.permutation(140_000) // 2),
    "each id in a run": lambda generator: torch.arange(140_000) // 50,
    "zipf": lambda generator: _zipf(generator, 120_000),
    "duplicates, then distinct": lambda generator: torch.cat(
        [torch.zeros(66_000, dtype=torch.int64), torch.arange(-70_000, 0)]
    ),
}


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.slow_except(dict(kernels="cpu"), dict(batch=[*BATCHES][:2]))
def test_batches_with_many_unknown_ids(kernels, batch):
    """New rows are those of a single pass, for any split of the batch into rounds or programs."""
    ids = BATCHES[batch](np.random.default_rng(0))
    small = torch.tensor([4, 5, 4])
    answers = []
    for name in ("reference", kernels):
        with ops_backend.use(name):
            table, other = HashTable(1, name="large"), HashTable(1, name="small")
            features = [
                Feature(other, small),
                Feature(table, ids[:1000]),
                Feature(other, small + 1),
            ]
            rows, new = _find_or_insert(*features, Feature(table, ids[1000:], padding=3))
            answers.append((torch.cat(rows), torch.tensor(new), _contents(table), _contents(other)))
    reference, ours = answers
    assert torch.equal(reference[0], ours[0])
    assert torch.equal(reference[1], ours[1])
    assert reference[2:] == ours[2:]


def _refuse(*_):
    raise MemoryError("no room")


@pytest.mark.parametrize("method", ["reserve_ids", "reserve_rows"])
@pytest.mark.parametrize(
    ("name", "size", "successes"),
    [
        ("reference", 100, 0),
        ("cpu", 100, 0),
        ("cpu", 70_000, 0),
        ("cpu", 70_000, 1),
        pytest.param("triton", 100, 0, marks=pytest.mark.interpreted),
    ],
)
def test_an_insertion_without_room_changes_nothing(name, size, successes, method):
    """Neither of two tables keeps an id or a row of a lookup that failed, however far it came."""
    with ops_backend.use(name):
        _check_insertion_without_room(size, successes, method)


def _check_insertion_without_room(size, successes, method):
    tables = [HashTable(1, name=name) for name in "ab"]
    before = torch.arange(-20, 0)
    for table in tables:
        _find_or_insert(Feature(table, before))
        table.delete(torch.tensor([-3, -9]))
    contents = [_contents(table) for table in tables]
    fields = [table.storage.header.fields[[NEXT_ROW, NUM_FREE]].tolist() for table in tables]
    # Many duplicates first: the kernel then inserts a batch of this size in rounds.
    new = torch.cat([torch.zeros(size - 80, dtype=torch.int64), torch.arange(80)])
    features = [Feature(tables[0], new), Feature(tables[1], new + 1)]
    original, calls = getattr(tables[1].storage, method), []

    def fails_later(count):
        calls.append(count)
        return original(count) if len(calls) <= successes else _refuse()

    setattr(tables[1].storage, method, fails_later)
    with pytest.raises(MemoryError, match="no room"):
        _find_or_insert(*features)
    delattr(tables[1].storage, method)
    for table, content, field in zip(tables, contents, fields, strict=True):
        assert _contents(table) == content
        assert len(table) == 18
        assert table.storage.header.fields[[NEXT_ROW, NUM_FREE]].tolist() == field
        assert _find(Feature(table, new)).max() == UNKNOWN
    rows, _ = _find_or_insert(*features)
    assert rows[0][-80:].tolist() == [11, 17, *range(20, 98)]


@pytest.mark.parametrize("size", [100, 70_000])
def test_new_ids_go_if_their_rows_cannot_be_written(kernels, size):
    """An exception between insertion and initial rows leaves no id without a row's values."""
    size = 100 if kernels == "triton" else size
    with ops_backend.use(kernels):
        table = HashTable(1)
        table.insert(torch.arange(-20, 0), torch.ones(20, 1))
        table.delete(torch.tensor([-3, -9]))
        ids, written = torch.arange(size), []

        def write_new(rows, new):
            written.append(rows[new[new >= 0]])
            if len(written) == 1:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            hash_index.find_or_insert(
                table.storage.segments(ids, insert=True),
                *(size, [table.storage], [0], CPU),
                write_new=write_new,
            )
        # What a device has inserted stays, and its rows are written after all.
        stay = kernels == "triton"
        assert len(table) == 18 + size * stay
        assert len(written) == 1 + stay
        assert (_find(Feature(table, ids)) == UNKNOWN).all() == (not stay)
        assert torch.equal(table.embeddings(torch.tensor([-1, -2])), torch.ones(2, 1))
        table.insert(ids, torch.ones(size, 1))
        assert len(table) == 18 + size


def test_taking_ids_back_allocates_nothing(kernels):
    """As little as a few objects of the launch, however large the table is."""
    size = 500 if kernels == "triton" else 60_000
    with ops_backend.use(kernels):
        table = HashTable(1)
        table.insert(torch.arange(size), torch.ones(size, 1))
        table.delete(torch.arange(0, size, 3))
        header, kept = table.storage.header, len(table)
        counts = header.fields[[NUM_IDS, NEXT_ROW, NUM_FREE]].tolist()
        table.insert(torch.arange(size, 2 * size), torch.ones(size, 1))
        hash_index.take_back(header, counts)
        table.insert(torch.arange(size, 2 * size), torch.ones(size, 1))
        tracemalloc.start()
        num_void = hash_index.take_back(header, counts)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert num_void == size
    assert len(table) == kept == table.ids().numel()
    assert (table.ids() % 3 > 0).all()
    assert kernels == "triton" or peak < 20_000


def test_entries_of_failed_insertions_do_not_fill_the_index(backend):
    """However often an insertion fails, the index keeps empty entries, where searches end."""
    table = HashTable(1)
    for number in range(30):
        header = table.storage.header
        counts = header.fields[[NUM_IDS, NEXT_ROW, NUM_FREE]].tolist()
        table.insert(torch.arange(20) + 20 * number, torch.ones(20, 1))
        table.storage.take_back(counts)
    assert len(table) == 0
    assert table.capacity <= 128  # with the headroom that a device gets
    assert (table.storage.entries[:-1, 0] == hash_index.EMPTY).any()
    assert _find(Feature(table, torch.arange(700))).max() == UNKNOWN


def test_an_interrupted_rebuild_leaves_the_old_index(backend, monkeypatch):
    """The header points to it, with all ids."""
    table = HashTable(1)
    table.insert(torch.arange(20), torch.ones(20, 1))

    def interrupt(*_):
        raise KeyboardInterrupt

    module = ops_backend.module("hash_index", CPU)
    for place in (module, hash_index):
        monkeypatch.setattr(place, "rebuild" if place is module else "enter_entries", interrupt)
        with pytest.raises(KeyboardInterrupt):
            hash_index.rebuild(table.storage.header, 256)
        monkeypatch.undo()
        assert table.storage.header.fields[ENTRIES] == table.storage.entries.data_ptr()
        assert len(table) == 20
        assert _find(Feature(table, torch.arange(20))).tolist() == list(range(20))


@pytest.mark.parametrize(
    "ids",
    [
        pytest.param(torch.arange(60_000), id="consecutive"),
        pytest.param(-torch.arange(60_000), id="negative"),
        *(
            pytest.param(torch.arange(60_000) << shift, id=f"multiples of 2^{shift}")
            for shift in (1, 7, 16, 20, 32, 40, 47)
        ),
        pytest.param((torch.arange(60_000) << 32) | torch.arange(60_000), id="both halves"),
        pytest.param(torch.arange(60_000) * 1_000_003, id="multiples of a prime"),
        pytest.param((torch.arange(60_000) % 250 << 48) + torch.arange(60_000) // 250, id="slots"),
    ],
)
def test_probes_stay_short_for_patterned_ids(ids):
    """Patterned ids spread like random ones, at the index's highest load."""
    table = HashTable(1)
    table.storage.reserve_ids(60_000)
    _find_or_insert(Feature(table, ids))
    assert table.capacity == 1 << 17
    occupied = (table.storage.entries[:-1, 1] < table.capacity).int()
    # An id's probe ends at the latest at the end of its run of occupied entries.
    borders = torch.cat([torch.ones(1), occupied.diff(), torch.ones(1)]).nonzero().squeeze(1)
    runs = borders.diff()[occupied[borders[:-1]] == 1].double()
    assert runs.max() < 130  # random ids at this load: about 60
    assert (runs.square().sum() / runs.sum()) < 8  # random ids at this load: about 5.5


def test_last_seen_steps_follow_training_lookups(backend):
    """``find_or_insert`` writes the step of known and new rows; ``find`` and padding write none."""
    table = HashTable(1, eviction=GlobalStepFilter(filter_step=5))
    _find_or_insert(Feature(table, torch.arange(5)))
    table.update_step(3)
    _find_or_insert(
        Feature(table, torch.tensor([0, 3, 9, 4, 9]), padding=4),
        Feature(table, torch.tensor([1, 77]), insert=False),
    )
    table.update_step(1)
    _find(Feature(table, torch.arange(5)))
    ids = torch.tensor([0, 1, 2, 3, 4, 9, 77])
    assert table.last_seen(ids).tolist() == [3, 3, 0, 3, 0, 3, -1]


@pytest.mark.interpreted
def test_backends_share_a_table(monkeypatch):
    """Each backend finds what another one inserted, evicted or grew."""
    monkeypatch.setattr(sizing, "SMALL_IDS", -1)  # a GPU's kernels know powers of two only
    table, known = HashTable(2, name="shared"), {}
    generator = torch.Generator().manual_seed(5)
    for turn in range(8):
        with ops_backend.use(("reference", "cpu", "triton")[turn % 3]):
            features = [Feature(table, _random_ids(generator, 300, 1000))]
            free = table.storage.rows.free_rows.flip(0).tolist()
            before = set(known)
            (rows,), _ = _find_or_insert(*features)
            for key, row in zip(features[0].ids.tolist(), rows.tolist(), strict=True):
                known.setdefault(key, row)
            assert [known[key] for key in features[0].ids.tolist()] == rows.tolist()
            fresh = list(dict.fromkeys(k for k in features[0].ids.tolist() if k not in before))
            assert [known[key] for key in fresh][: len(free)] == free[: len(fresh)]
            gone = _random_ids(generator, 100, 1000)
            assert table.delete(gone) == len(set(gone.tolist()) & set(known))
            for key in gone.tolist():
                known.pop(key, None)
    ids, rows = _contents(table)
    assert dict(zip(ids, rows, strict=True)) == known


def test_a_table_inserts_what_its_policy_would_not_admit(backend):
    """``HashTable.insert`` gives ids a row although lookups of a read-only table do not."""
    table = HashTable(3, admission=ReadOnly())
    table.insert(torch.tensor([4, -4]), torch.tensor([[1.0, 2, 3], [4, 5, 6]]))
    assert table.embeddings(torch.tensor([-4, 4])).tolist() == [[4, 5, 6], [1, 2, 3]]


@pytest.mark.parametrize("count", [1, 31, 32, 33, 1000, 2**21, 2**22 + 1])
def test_capacity_is_the_smallest_within_the_load_limit(count):
    """Half the capacity would be over the limit."""
    capacity = hash_index.capacity_for(count)
    assert count <= capacity * hash_index.max_load(capacity)
    half = capacity // 2
    assert half < hash_index.MIN_CAPACITY or count > half * hash_index.max_load(half)
