"""ColumnarDataset: batches, their order for any workers and ranks, and resuming."""

import itertools
import json
import pickle
import random

import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from pyarrow import orc
from torch.utils.data import DataLoader

from recis_lightning import EmbeddingEngine, EmbeddingOption, Jagged
from recis_lightning.data import (
    ColumnarDataset,
    DataFileError,
    Features,
    Id,
    IdBags,
    Label,
    Mod,
    Number,
    Truncate,
    hash_strings,
)
from recis_lightning.distributed import collectives
from tests.helpers.columnar_files import COLUMNS, rows_of, table_of, write_files

# The order of version 1 of the state: PCG64 by (seed, epoch) and (seed, epoch, block).
EXACT = [[9, 18, 20, 19], [10, 8, 1, 4], [3, 5, 17, 0], [2, 16, 13, 11], [14, 12, 6, 15], [21, 7]]


@pytest.fixture
def pattern(tmp_path):
    return write_files(tmp_path)


def make(pattern, batch_size=4, **settings):
    settings = {"shuffle_rows": 6, "seed": 1, **settings}
    return ColumnarDataset(pattern, COLUMNS, batch_size, **settings)


def as_rank(monkeypatch, rank, num_ranks):
    monkeypatch.setattr(collectives, "rank", lambda: rank)
    monkeypatch.setattr(collectives, "world_size", lambda: num_ranks)


@pytest.mark.parametrize("shuffle_rows", [0, 6])
@pytest.mark.parametrize("suffix", [".parquet", ".orc"])
def test_every_column_follows_its_row(tmp_path, shuffle_rows, suffix):
    """Shuffled or not, across splits, blocks and files."""
    data = make(write_files(tmp_path, suffix=suffix), shuffle_rows=shuffle_rows)
    seen, expected = [], table_of(0, 22)
    for batch in data:
        assert list(batch) == ["row", "user", "tags", "price", "click"]
        rows = batch["row"].tolist()
        seen += rows
        users = [expected["user"][row].as_py() for row in rows]
        assert torch.equal(batch["user"], hash_strings(users, seed=1))
        assert batch["price"].tolist() == [-1.0 if row % 5 == 0 else row for row in rows]
        assert batch["click"].tolist() == [float(row % 3 == 0) for row in rows]
        assert isinstance(batch["tags"], Jagged)
        bags = [list(range(row % 4))[-2:] for row in rows]
        assert batch["tags"].values.tolist() == [tag for bag in bags for tag in bag]
        assert batch["tags"].lengths().tolist() == [len(bag) for bag in bags]
        weights = [row + tag / 4 for row, bag in zip(rows, bags, strict=True) for tag in bag]
        assert batch["tags"].weights.tolist() == weights
    assert len(data) == 6
    assert (seen == list(range(22))) == (shuffle_rows == 0)
    assert sorted(seen) == list(range(22))


def test_exact_order(pattern):
    """A run that resumes relies on it: this order may never change."""
    assert [batch["row"].tolist() for batch in make(pattern)] == EXACT


def test_order_depends_on_seed_and_epoch_alone(pattern):
    data = make(pattern)
    first, second = rows_of(data), rows_of(data)
    assert first != second
    assert rows_of(make(pattern)) == first
    assert rows_of(make(pattern, seed=2)) != first
    data.set_epoch(0)
    assert rows_of(data) == first
    assert data.epoch == 1


def test_batches_are_the_users_own(pattern):
    """Writing to one changes neither the next batch nor the next epoch."""
    data = make(pattern, shuffle_rows=0, prefetch=0)
    for batch in data:
        batch["row"].fill_(-7)
        batch["tags"].values.fill_(-7)
    assert rows_of(data) == list(range(22))


@pytest.mark.parametrize("lanes", [1, 2, 3])
@pytest.mark.parametrize("prefetch", [0, 3])
def test_prefetching_changes_nothing(pattern, lanes, prefetch):
    expected = rows_of(make(pattern, lanes=lanes))
    assert rows_of(make(pattern, lanes=lanes, prefetch=prefetch)) == expected
    assert sorted(expected) == list(range(22))


@pytest.mark.parametrize(("lanes", "workers"), [(1, 2), (2, 2)])
def test_workers_change_nothing(pattern, lanes, workers):
    """Whether each reads its own lane or all read all; Arrow's threads do not survive a fork."""
    data = make(pattern, lanes=lanes, filter="price != 3")
    expected = [batch["row"].tolist() for batch in data]
    data.set_epoch(0)
    loader = DataLoader(data, batch_size=None, num_workers=workers)
    assert [batch["row"].tolist() for batch in loader] == expected


def test_a_worker_reads_its_own_lanes_only(pattern, monkeypatch):
    """With as many lanes as workers, no split is read by both."""
    data = make(pattern, batch_size=2, lanes=2, shuffle_rows=0, prefetch=0)
    read = {0: set(), 1: set()}
    for worker in read:
        monkeypatch.setattr(
            type(data), "read_block", spy(type(data).read_block, read[worker]), raising=True
        )
        list(data._batches(data._plan(), worker, 2))
        monkeypatch.undo()
    assert len(read[0] & read[1]) <= 1  # the block within which the lanes are cut
    assert len(read[0] | read[1]) == 10


def spy(function, seen):
    def call(self, block, splits):
        seen.add(block)
        return function(self, block, splits)

    return call


@pytest.mark.parametrize("num_ranks", [2, 3])
@pytest.mark.parametrize("drop_last", [False, True])
def test_ranks_share_the_rows(pattern, monkeypatch, num_ranks, drop_last):
    """Each row on one rank, equally many batches, in runs of one order."""
    whole, parts, lengths = rows_of(make(pattern)), [], set()
    for rank in range(num_ranks):
        as_rank(monkeypatch, rank, num_ranks)
        data = make(pattern, batch_size=3, drop_last=drop_last)
        lengths.add(len(data))
        batches = list(data)
        lengths.add(len(batches))
        parts.append(rows_of(batches))
    assert len(lengths) == 1
    if drop_last:
        assert {len(part) for part in parts} == {lengths.pop() * 3}
    else:
        assert [row for part in parts for row in part] == whole


def test_more_ranks_than_rows(tmp_path, monkeypatch):
    """A rank without rows gets an empty batch, so that all take as many steps."""
    pattern, found = write_files(tmp_path, sizes=(2,)), []
    for rank in range(3):
        as_rank(monkeypatch, rank, 3)
        found.append(list(make(pattern)))
    assert [len(batches) for batches in found] == [1, 1, 1]
    assert sorted(row for batches in found for row in rows_of(batches)) == [0, 1]
    empty = min(found, key=lambda batches: len(batches[0]["row"]))[0]
    assert empty["user"].shape == empty["price"].shape == (0,)
    assert empty["tags"].num_bags == 0


def test_resuming_anywhere_trains_each_row_once(pattern, monkeypatch):
    """Interrupted at random, on 1 to 3 ranks, with other batch sizes and lanes, repeatedly."""
    draw = random.Random(3)
    for _ in range(12):
        state, seen = None, []
        while len(seen) < 22:
            num_ranks, batch_size = draw.randint(1, 3), draw.randint(1, 5)
            lanes, stop = draw.randint(1, 2), draw.randint(0, 4)
            states = set()
            for rank in range(num_ranks):
                as_rank(monkeypatch, rank, num_ranks)
                data = make(pattern, batch_size, lanes=lanes, prefetch=0)
                if state is not None:
                    data.load_state_dict(json.loads(state))
                batches = iter(data)
                for batch in itertools.islice(batches, stop + 1):
                    seen += batch["row"].tolist()
                states.add(json.dumps(data.state_dict()))
                batches.close()
            assert len(states) == 1  # one rank's state speaks for all
            state = states.pop()
        assert sorted(seen) == list(range(22))
        assert len(state) < 1000


def test_resuming_where_nothing_changed_gives_the_same_batches(pattern):
    """Exactly those that an undisturbed run would have seen, and the same length."""
    whole = [batch["row"].tolist() for batch in make(pattern)]
    for stop in range(len(whole) + 1):
        data = make(pattern)
        data.load_state_dict(make(pattern).state_dict(num_batches=stop))
        assert len(data) == len(whole)
        assert [batch["row"].tolist() for batch in data] == whole[stop:]
        assert (data.epoch, len(list(data))) == (1, len(whole))


def test_breaking_off_without_a_state_begins_again(pattern):
    data = make(pattern)
    first = next(iter(data))["row"].tolist()
    assert next(iter(data))["row"].tolist() == first
    state = make(pattern).state_dict(2)
    data.load_state_dict(state)
    third = next(iter(data))["row"].tolist()
    assert next(iter(data))["row"].tolist() == third
    assert data.state_dict()["stages"] == [[1, 4, 1, 3]]


def test_states_of_other_data_are_refused(pattern, tmp_path):
    state = make(pattern).state_dict(1)
    for settings in ({"seed": 2}, {"shuffle_rows": 7}, {"filter": "click == True"}):
        with pytest.raises(ValueError, match="state: it is a place in other data"):
            make(pattern, **settings).load_state_dict(state)
    with pytest.raises(ValueError, match="state: expected version 1, got 2"):
        make(pattern).load_state_dict({**state, "version": 2})
    data = make(pattern)
    data.load_state_dict(state)
    with pytest.raises(ValueError, match="num_batches: expected an int >= 1, got 0"):
        data.state_dict(0)
    pa.parquet.write_table(table_of(22, 3), tmp_path / "part-4.parquet")
    with pytest.raises(ValueError, match="state: it is a place in other data"):
        make(pattern).load_state_dict(state)


def test_a_filter_leaves_whole_batches(pattern):
    data = make(pattern, filter="country == 'DE'", shuffle_rows=0)
    assert [batch["row"].tolist() for batch in data] == [
        [1, 3, 5, 7],
        [9, 11, 13, 15],
        [17, 19, 21],
    ]
    assert data.num_rows == 11


@pytest.mark.parametrize("suffix", [".parquet", ".orc"])
@pytest.mark.parametrize("shuffle_rows", [0, 9])
def test_bags_of_bags_follow_their_row(tmp_path, suffix, shuffle_rows):
    """From files through transforms to the rows of an engine."""
    baskets = [[[row, item] if item else [] for item in range(row % 4)] for row in range(22)]
    for part in range(2):
        rows = slice(11 * part, 11 * part + 11)
        table = pa.table({"row": range(22)[rows], "baskets": baskets[rows]})
        write = orc.write_table if suffix == ".orc" else pa.parquet.write_table
        write(table, tmp_path / f"{part}{suffix}")
    features = Features([Id("row"), IdBags("baskets")], [Mod("small", 5, source="baskets")])
    engine = EmbeddingEngine({"baskets": EmbeddingOption(2, mode="sum")})
    data = ColumnarDataset(
        str(tmp_path / f"*{suffix}"), features=features, batch_size=4, shuffle_rows=shuffle_rows
    )
    seen = []
    for batch in data:
        found, expected = batch["baskets"], [baskets[row] for row in batch["row"].tolist()]
        bags = [bag for basket in expected for bag in basket]
        assert found.values.tolist() == [item for bag in bags for item in bag]
        assert found.inner().lengths().tolist() == [len(bag) for bag in bags]
        assert found.lengths().tolist() == [len(basket) for basket in expected]
        assert batch["small"].values.tolist() == [item % 5 for bag in bags for item in bag]
        assert torch.equal(engine(batch)["baskets"].offsets, found.outer_offsets)
        seen += batch["row"].tolist()
    assert sorted(seen) == list(range(22))
    request = features({"row": [1], "baskets": [[[1, 7], []]]})
    assert request["baskets"].outer_offsets.tolist() == [0, 2]
    assert Features.from_json(features.to_json()).columns == features.columns
    with pytest.raises(TypeError, match=r"Truncate of 'baskets': expected bags, got lists of bags"):
        Features([IdBags("baskets")], [Truncate("baskets", 1)])({"baskets": [[[1]]]})


def test_a_window_is_read_to_its_end_while_another_is(tmp_path):
    """As an evaluation within an epoch does, by the next window."""
    for day, first in ((1, 0), (2, 100)):
        folder = tmp_path / f"day=2026-12-0{day}"
        folder.mkdir()
        pa.parquet.write_table(table_of(first, 30), folder / "p.parquet", row_group_size=2)
    data = ColumnarDataset(
        str(tmp_path / "*/*.parquet"), COLUMNS, batch_size=2, window="1d", prefetch=1
    )
    first = iter(data)
    rows = next(first)["row"].tolist()
    data.set_epoch(1)
    others = [row for batch in data for row in batch["row"].tolist()]
    rows += [row for batch in first for row in batch["row"].tolist()]
    assert (sorted(rows), sorted(others)) == (list(range(30)), list(range(100, 130)))


def test_windows_are_epochs(tmp_path):
    """Of fixed files: each in turn, again after the last, and resumed within one."""
    for day, first, size in ((30, 7, 3), (29, 0, 7)):
        folder = tmp_path / f"day=2026-11-{day}"
        folder.mkdir()
        pa.parquet.write_table(table_of(first, size), folder / "part.parquet", row_group_size=3)
    data = make(str(tmp_path / "*/*.parquet"), window="1d", shuffle_rows=0)
    assert (data.num_windows, data.window, data.num_rows) == (2, "2026-11-29", 7)
    names = []
    for window in data.windows():
        names.append((window, len(data), rows_of(data)))
    expected = [("2026-11-29", 2, list(range(7))), ("2026-11-30", 1, [7, 8, 9])]
    assert (names, data.epoch, data.ended) == (expected, 2, False)
    assert [(window, len(data), rows_of(data)) for window in data.windows()] == expected
    data.set_epoch(1)
    assert (data.window, len(data), rows_of(data)) == expected[1]
    data.set_epoch(0)
    state = data.state_dict(1)
    data.set_epoch(1)
    data.load_state_dict(state)
    assert [(data.window, rows_of(data)) for _ in data.windows()] == [
        ("2026-11-29", [4, 5, 6]),
        ("2026-11-30", [7, 8, 9]),
    ]
    with pytest.raises(ValueError, match="state: it is a place in other data"):
        make(str(tmp_path / "*/*.parquet"), window="2d", shuffle_rows=0).load_state_dict(state)
    assert make(str(tmp_path / "*/*.parquet")).num_windows == 1


def test_convert_makes_the_batch(pattern):
    """In threads and in workers."""
    data = make(pattern, shuffle_rows=0, convert=rows_and_labels)
    found = [*data, *DataLoader(make(pattern, shuffle_rows=0, convert=rows_and_labels), None)]
    assert [batch["rows"]["row"].tolist() for batch in found[:2]] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert len(found) == 12
    assert found[0]["label"].tolist() == [1, 0, 0, 1]


def rows_and_labels(batch):
    return {"rows": {"row": batch["row"]}, "label": batch["click"]}


def test_errors_name_the_file_the_part_and_the_column(tmp_path):
    pattern = write_files(tmp_path, sizes=(4, 6))
    for columns, words in [
        ([Number("price")], r"part-0\.parquet, part 0, column 'price': 1 of 3 values are null"),
        ([Id("user")], r"part-0\.parquet, part 0, column 'user': .*give it a hash="),
    ]:
        with pytest.raises(DataFileError, match=words):
            list(ColumnarDataset(pattern, columns, 2))


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"batch_size": 0}, ValueError, "batch_size: expected an int >= 1, got 0"),
        ({"shuffle_rows": -1}, ValueError, "shuffle_rows: expected an int >= 0, got -1"),
        ({"lanes": 0}, ValueError, "lanes: expected"),
        ({"filter": "f()"}, ValueError, "filter: expected comparisons"),
        ({"columns": []}, TypeError, "columns: expected Id, .*got none"),
        ({"columns": ["row"]}, TypeError, "columns: expected Id, .*got str"),
        ({"columns": [Id("a"), Label("a")]}, ValueError, r"\['a'\] more than once"),
    ],
)
def test_bad_arguments(pattern, settings, error, words):
    given = {"paths": pattern, "columns": COLUMNS, "batch_size": 4, **settings}
    with pytest.raises(error, match=words):
        ColumnarDataset(**given)


def test_a_copy_goes_on_by_itself(pattern, monkeypatch):
    """Pickled, as a worker that is not forked gets it."""
    data = make(pattern)
    data.load_state_dict(data.state_dict(2))
    as_rank(monkeypatch, 1, 2)
    assert pickle.loads(pickle.dumps(data))._pickled_ranks == (1, 2)
    monkeypatch.undo()
    copy = pickle.loads(pickle.dumps(data))
    assert rows_of(copy) == rows_of(data)


def test_a_place_is_of_its_filter(tmp_path):
    """Though another one keeps as many rows; how it is written does not count."""
    path = str(tmp_path / "a.parquet")
    pa.parquet.write_table(pa.table({"row": range(10), "k": [0, 1] * 5}), path)
    state = ColumnarDataset(path, [Id("row")], 2, filter="k == 0").state_dict(1)
    same = ColumnarDataset(path, [Id("row")], 2, filter="(k==0)")
    same.load_state_dict(state)
    assert [batch["row"].tolist() for batch in same] == [[4, 6], [8]]
    other = ColumnarDataset(path, [Id("row")], 2, filter="k == 1")
    with pytest.raises(ValueError, match="rows of another filter: 'k == 0', and this is 'k == 1'"):
        other.load_state_dict(state)
    assert other.state_dict() == ColumnarDataset(path, [Id("row")], 2, filter="k == 1").state_dict()
    del state["filter"]  # as before 0.2
    other.load_state_dict(state)


def warned(caplog):
    return [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]


@pytest.mark.parametrize("suffix", [".parquet", ".orc"])
@pytest.mark.parametrize("window", [None, "1d"])
def test_a_filter_that_keeps_no_row_is_named(tmp_path, caplog, suffix, window):
    """With the numbers of rows and files, when the data set is made."""
    pattern = write_files(tmp_path, suffix=suffix)
    if window is not None:
        for number, path in enumerate(sorted(tmp_path.glob("part*"))):
            path.rename(tmp_path / f"part-2026-12-0{number + 1}{suffix}")
    data = make(pattern, filter="country == 'XX'", window=window)
    assert warned(caplog) == [
        "Nothing to read: filter: \"country == 'XX'\" keeps none of 22 rows of 4 files"
    ]
    assert data.why_empty() == warned(caplog)[0].removeprefix("Nothing to read: ")
    assert list(data.windows()) == ([] if window else [None])
    assert list(data) == []
    assert make(pattern, filter="country == 'DE'").why_empty() is None
    assert len(warned(caplog)) == 1


def test_files_without_rows_are_named(tmp_path, caplog, monkeypatch):
    pattern = write_files(tmp_path, sizes=(0, 0))
    make(pattern, filter="country == 'DE'")
    assert warned(caplog) == [
        f"Nothing to read: paths: 2 files without rows, the first is {tmp_path}/part-0.parquet"
    ]
    as_rank(monkeypatch, 1, 2)  # the other ranks say nothing
    make(pattern)
    assert len(warned(caplog)) == 1


def test_too_few_rows_for_a_batch(tmp_path, monkeypatch):
    pattern = write_files(tmp_path, sizes=(3,))
    as_rank(monkeypatch, 0, 4)
    assert make(pattern).why_empty() is None  # a rank without rows has a batch without samples
    assert make(pattern, drop_last=True).why_empty() == (
        "drop_last: 3 rows are fewer than a batch of 4 on each of 4 ranks"
    )
    assert make(pattern, batch_size=1, lanes=2, drop_last=True).why_empty() is not None
