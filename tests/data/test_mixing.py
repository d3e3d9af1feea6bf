"""MixedDataset: rows of several data sets by proportion, each once, on any ranks."""

import json
import random

import pyarrow as pa
import pyarrow.parquet
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from recis_lightning.data import ColumnarDataModule, ColumnarDataset, Id, IdList, MixedDataset
from recis_lightning.data.mixing import rows_by_proportion
from tests.data.test_dataset import as_rank
from tests.data.test_module import Clicks, fit, weights_of
from tests.helpers.columnar_files import COLUMNS, rows_of, table_of, write_files

SIZES = {"ads": 23, "search": 9}
PROPORTIONS = {"ads": 3, "search": 1}


@pytest.fixture
def patterns(tmp_path):
    """Write the rows of two sources, those of the second numbered from 100."""
    found = {}
    for name, first in (("ads", 0), ("search", 100)):
        path = tmp_path / f"{name}.parquet"
        pa.parquet.write_table(table_of(first, SIZES[name]), path, row_group_size=4)
        found[name] = str(path)
    return found


def mixed(patterns, batch_size=4, **settings):
    sources = {
        name: ColumnarDataset(path, COLUMNS, shuffle_rows=6, seed=1, prefetch=0)
        for name, path in patterns.items()
    }
    return MixedDataset(sources, PROPORTIONS, batch_size, **settings)


def rows(batches):
    return [batch["row"].tolist() for batch in batches]


def test_each_batch_has_rows_of_each_by_proportion(patterns):
    """Until one ends: then batches are smaller, and an epoch has all rows."""
    data = mixed(patterns, source_entry="source")
    found = list(data)
    assert len(found) == 9
    assert [batch["source"].tolist() for batch in found[:7]] == [[0, 0, 0, 1]] * 7
    assert [len(batch["row"]) for batch in found[7:]] == [3, 1]  # the 22nd and 23rd of "ads"
    assert all(batch["tags"].num_bags == len(batch["row"]) for batch in found)
    assert sorted(rows_of(found)) == [*range(23), *range(100, 109)]
    again = mixed(patterns)
    assert rows(again) == rows(found)
    assert rows(again) != rows(found)  # another epoch
    assert (again.epoch, again.num_rows) == (2, 32)
    again.set_epoch(0)
    assert rows(again) == rows(found)


def test_an_epoch_may_end_with_the_first(patterns):
    data = mixed(patterns, 8, until="first")  # 6 of 23, and 2 of 9
    found = rows(data)
    assert len(found) == len(data) == 4
    assert sorted(row for batch in found for row in batch if row < 100) == list(range(23))
    assert [len([row for row in batch if row >= 100]) for batch in found] == [2] * 4


@pytest.mark.parametrize("until", ["all", "first"])
def test_workers_change_nothing(patterns, until):
    expected = rows(mixed(patterns, until=until))
    loader = DataLoader(mixed(patterns, until=until), batch_size=None, num_workers=2)
    assert rows(loader) == expected


def test_resuming_anywhere_trains_each_row_once(patterns, monkeypatch):
    """On 1 to 3 ranks, with other batch sizes, repeatedly."""
    draw = random.Random(5)
    for _ in range(3):
        state, seen = None, []
        while len(seen) < sum(SIZES.values()):
            num_ranks, batch_size, stop = (
                draw.randint(1, 3),
                draw.choice((4, 8)),
                draw.randint(1, 3),
            )
            states = set()
            for rank in range(num_ranks):
                as_rank(monkeypatch, rank, num_ranks)
                data = mixed(patterns, batch_size)
                if state is not None:
                    data.load_state_dict(json.loads(state))
                batches, length = iter(data), len(data)
                taken = 0
                for batch in batches:
                    seen += batch["row"].tolist()
                    taken += 1
                    if taken == stop:
                        break
                before = 0 if state is None else json.loads(state)["num_batches"]
                assert taken == min(stop, length - before)
                states.add(json.dumps(data.state_dict()) if data.epoch == 0 else "done")
                batches.close()
            assert len(states) == 1
            state = states.pop()
        assert sorted(seen) == [*range(23), *range(100, 109)]


def test_a_place_is_that_of_the_same_mixture(patterns, tmp_path):
    state = mixed(patterns).state_dict(2)
    expected = rows(mixed(patterns))
    data = mixed(patterns)
    data.load_state_dict(state)
    assert (len(data), rows(data)) == (9, expected[2:])
    with pytest.raises(ValueError, match="num_batches: expected an int >= 2, got 1"):
        data.load_state_dict(state) or data.state_dict(1)
    for other, words in [
        (mixed(patterns, until="first"), r"state: expected a mixture of .* until='first', got"),
        (
            mixed({**patterns, "ads": patterns["search"]}),
            r"sources\['ads'\]: state: it is a place in",
        ),
    ]:
        with pytest.raises(ValueError, match=words):
            other.load_state_dict(state)
        assert rows(other) != []
    with pytest.raises(ValueError, match="state: expected a mixture's, of version 1"):
        data.load_state_dict(ColumnarDataset(patterns["ads"], COLUMNS).state_dict())


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_run_on_a_mixture_is_resumed(patterns, tmp_path):
    """Under a Trainer, bitwise as a whole one."""
    whole, first, second = Clicks(), Clicks(stop_at=11), Clicks()
    saver = ModelCheckpoint(tmp_path / "s", every_n_train_steps=1, save_top_k=-1, filename="{step}")
    fit(patterns, whole, mix=PROPORTIONS)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(patterns, first, callbacks=[saver], mix=PROPORTIONS)
    fit(patterns, second, ckpt=str(tmp_path / "s/step=11.ckpt"), mix=PROPORTIONS)
    assert first.rows + second.rows == whole.rows
    assert (weights_of(second) == weights_of(whole)).all()
    assert sorted(row for batch in whole.trained(1) for row in batch) == [
        *range(23),
        *range(100, 109),
    ]


def test_batches_are_converted_whole(patterns):
    data = mixed(patterns, convert=lambda batch: len(batch["row"]))
    assert list(data) == [4] * 7 + [3, 1]


@pytest.mark.parametrize(
    ("proportions", "words"),
    [
        ({}, "proportions: expected at least one, got none"),
        ({"a": 1, "b": -1}, r"proportions\['b'\]: expected a number >= 0"),
        ({"a": 1, "b": 0}, r"proportions\['b'\]: expected at least a row in 8, got 0 of 1"),
        ({"a": 0}, r"proportions\['a'\]: expected at least a row in 8"),
        ({"a": 100, "b": 1}, r"proportions\['b'\]: expected at least a row in 8, got 1 of 101"),
    ],
)
def test_proportions_that_do_not_fit_are_refused(proportions, words):
    with pytest.raises(ValueError, match=words):
        rows_by_proportion(proportions, 8)


def test_bad_arguments(patterns, tmp_path):
    one = ColumnarDataset(patterns["ads"], COLUMNS)
    refused = [
        ({"until": "last"}, {"a": one}, ValueError, "until: expected 'all' or 'first', got 'last'"),
        ({}, {"b": one}, ValueError, r"proportions: expected those of \['b'\], got \['a'\]"),
        (
            {"source_entry": "row"},
            {"a": one},
            ValueError,
            "source_entry: expected a name that is not",
        ),
        ({}, {"a": "path"}, TypeError, r"sources\['a'\]: expected ColumnarDataset, got str"),
    ]
    for settings, sources, error, words in refused:
        with pytest.raises(error, match=words):
            MixedDataset(sources, {"a": 1}, 4, **settings)
    others = [
        (ColumnarDataset(patterns["ads"], COLUMNS, follow=True), "data in windows, or followed"),
        (ColumnarDataset(patterns["ads"], COLUMNS, convert=len), "give convert= to the mixture"),
        (ColumnarDataset(patterns["ads"], COLUMNS, filter="row < 0"), "it has no rows"),
        (ColumnarDataset(patterns["ads"], [Id("row"), IdList("tags")]), "batches of 'a' have"),
    ]
    for other, words in others:
        with pytest.raises(ValueError, match=words):
            MixedDataset({"a": one, "b": other}, {"a": 1, "b": 1}, 4)
    pattern = write_files(tmp_path)
    for settings, words in [
        ({"train": pattern, "mix": {"a": 1}}, "mix: expected proportions of the names in train"),
        ({"train": {"a": pattern}}, "mix: expected proportions of the names in train"),
        ({"train": {"a": pattern}, "mix": {"b": 1}}, r"mix: expected .* of \['a'\].* got \['b'\]"),
        ({"train": {"a": pattern}, "mix": {"a": 1}, "follow": True}, "mix: data in windows"),
    ]:
        with pytest.raises(ValueError, match=words):
            ColumnarDataModule(COLUMNS, **settings)
