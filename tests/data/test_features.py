"""Features: one object for files and requests, saved as plain data."""

import json
import pickle

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from torch import nn

from recis_lightning import Jagged
from recis_lightning.data import (
    Bucketize,
    ColumnarDataset,
    Cross,
    Features,
    Id,
    IdList,
    Label,
    Log1p,
    Lookup,
    Mod,
    MultiHash,
    Number,
    hash_strings,
)
from recis_lightning.distributed import collectives
from tests.helpers.columnar_files import table_of, write_files


def features():
    return Features(
        [
            Id("row"),
            Id("user", hash="xxh64", seed=1),
            IdList("tags", weights="tag_weights", max_len=2, keep="last"),
            Number("price", default=-1.0),
            Id("country", hash="farmhash64"),
            Label("click"),
        ],
        [
            Cross("user_tags", ["user", "tags"]),
            Mod("user_tags", 1000),
            Bucketize("price_bucket", [0.0, 5.0, 12.0], source="price"),
            Log1p("price"),
            Lookup("place", ["FR", "DE"], source="country"),
            MultiHash("hashed", [50, 20], source="user"),
            Log1p("target", source="click"),
        ],
    )


def test_files_and_requests_give_the_same(tmp_path):
    """A batch of shuffled files, and its rows from Arrow, lists, NumPy and pandas."""
    made, table = features(), table_of(0, 22)
    data = ColumnarDataset(write_files(tmp_path), features=made, batch_size=5, shuffle_rows=8)
    for batch in data:
        rows = table.take(batch["row"].tolist())
        columns = {name: rows[name] for name in rows.column_names}
        as_lists = {name: rows[name].to_pylist() for name in rows.column_names}
        frame = rows.to_pandas()
        mixed = {**as_lists, "row": np.array(as_lists["row"]), "user": pd.Series(frame["user"])}
        for request in (columns, as_lists, mixed):
            assert_same(made(request), batch)


def assert_same(found, expected):
    assert list(found) == list(expected)
    for name, entry in expected.items():
        if isinstance(entry, Jagged):
            assert all(
                torch.equal(x, y) for x, y in zip(found[name], entry, strict=True) if x is not None
            )
        else:
            assert torch.equal(found[name], entry)


def test_tensors_are_entries_of_columns():
    """A request may hash on its own side; a column's place is found by its name."""
    made = Features([Id("user", hash="xxh64"), IdList("tags")], [Cross("both", ["user", "tags"])])
    bags = Jagged(torch.tensor([5, 6]), torch.tensor([0, 2, 2]))
    by_tensors = made({"user": made({"user": ["a", "b"], "tags": bags})["user"], "tags": bags})
    assert_same(by_tensors, made({"user": ["a", "b"], "tags": [[5, 6], None]}))


def test_a_request_has_no_labels():
    table = {name: column.to_pylist() for name, column in zip(*_columns(3), strict=True)}
    del table["click"]
    found = features()(table)
    assert "click" not in found
    assert "target" not in found
    assert_same(found, {name: features()({**table, "click": [0, 1, 0]})[name] for name in found})


def _columns(num_rows):
    table = table_of(0, num_rows)
    return table.column_names, table.columns


def test_without_labels():
    """A later transform that writes over what was made of a label stays."""
    made = Features(
        [Id("a"), Label("y")],
        [Log1p("z", source="y"), Log1p("w", source="z"), Mod("z", 5, source="a")],
        outputs=["a", "z", "w", "y"],
    ).without_labels()
    assert [type(one).__name__ for one in made.transforms] == ["Mod"]
    assert list(made({"a": [7]})) == ["a", "z"]


@pytest.mark.parametrize("suffix", [".yaml", ".json"])
def test_files_of_features(tmp_path, suffix):
    made = features()
    made.save(tmp_path / f"features{suffix}")
    read = Features.load(tmp_path / f"features{suffix}")
    assert (read.columns, read.transforms) == (made.columns, made.transforms)
    assert read.outputs is None
    text = (tmp_path / f"features{suffix}").read_text()
    assert "hash: xxh64" in text or '"hash": "xxh64"' in text


def test_exact_json():
    """The format of version 1, which later versions read."""
    made = Features([Id("a", hash="xxh64")], [Mod("b", 7, source="a")], outputs=["b"])
    assert json.loads(made.to_json()) == {
        "version": 1,
        "columns": [{"kind": "Id", "name": "a", "hash": "xxh64"}],
        "transforms": [{"kind": "Mod", "name": "b", "modulus": 7, "source": "a"}],
        "outputs": ["b"],
    }


def test_saved_with_a_model(tmp_path):
    """As plain data, which weights_only loads; the model's own are replaced."""
    model = nn.ModuleDict({"features": features(), "tower": nn.Linear(2, 1)})
    torch.save(model.state_dict(), tmp_path / "model.pt")
    other = nn.ModuleDict({"features": Features([Id("x")]), "tower": nn.Linear(2, 1)})
    other.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    assert other["features"].to_state() == features().to_state()
    assert pickle.loads(pickle.dumps(features())).to_state() == features().to_state()
    with pytest.raises(ValueError, match="state: expected version 1, got 2"):
        other["features"].set_extra_state({**features().to_state(), "version": 2})
    assert other["features"].to_state() == features().to_state()


def test_passes_do_not_grow_with_features():
    """One for each kind and step of the longest chain."""

    def of(count):
        names = [f"f{i}" for i in range(count)]
        return Features(
            [Number(name) for name in names],
            [Log1p(name) for name in names]
            + [Bucketize(name, [float(i)]) for i, name in enumerate(names)]
            + [Mod(name, i + 1) for i, name in enumerate(names)],
        )

    assert of(1).num_passes == of(100).num_passes == 3


def test_order_of_transforms():
    """Each reads what those before it have written, and replaces for those after it."""
    made = Features(
        [Id("a")], [Mod("b", 100, source="a"), Mod("a", 10), Mod("c", 3, source="a"), Mod("b", 7)]
    )
    found = made({"a": [3458]})
    assert {name: entry.item() for name, entry in found.items()} == {"a": 8, "b": 58 % 7, "c": 2}


def test_ranks_without_rows_get_the_same_entries(tmp_path, monkeypatch):
    pattern = write_files(tmp_path, sizes=(2,))
    monkeypatch.setattr(collectives, "world_size", lambda: 3)
    (batch,) = ColumnarDataset(pattern, features=features(), batch_size=4)
    assert list(batch)[:3] == ["row", "user", "tags"]
    assert batch["user_tags"].num_bags == batch["place"].numel() == 0


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: Features([]), TypeError, "columns: expected Id, .*got none"),
        (lambda: Features([Id("a")], [Id("b")]), TypeError, "transforms: expected .*got Id"),
        (lambda: Features([Id("a")], [Mod("b", 3)]), ValueError, r"Mod 'b': expected sources amo"),
        (lambda: Features([Id("a")], outputs=["b"]), ValueError, "outputs: expected names among"),
        (lambda: Features([Id("a")], outputs=[]), ValueError, "outputs: expected names among"),
        (lambda: Features([Id("a")], [Lookup("a", ["x"])]), ValueError, "Lookup 'a': strings need"),
        (lambda: Features.from_json("{"), ValueError, "text: cannot be parsed"),
        (lambda: Features.from_yaml("3"), ValueError, "state: expected columns and transforms"),
        (
            lambda: Features.from_state({"columns": [{"kind": "Mod", "name": "a"}]}),
            ValueError,
            r"state: expected a kind among \['Id', 'IdBags', 'IdList', 'Label', 'Number'\]",
        ),
        (
            lambda: Features.from_state({"columns": [{"kind": "Id", "nme": "a"}]}),
            ValueError,
            "state: Id None: .*nme",
        ),
        (
            lambda: Features.from_state({"columns": [], "filter": "x"}),
            ValueError,
            r"state: expected columns, transforms and outputs, got \['filter'\]",
        ),
        (lambda: features()({"row": [1]}), KeyError, "column 'user': expected .*'user'"),
        (
            lambda: Features([Id("a")])({"a": ["x"]}),
            TypeError,
            "column 'a': expected integers.*give it a hash=",
        ),
        (
            lambda: Features([Id("a")])({"a": [None]}),
            ValueError,
            "column 'a': .*null",
        ),
        (
            lambda: ColumnarDataset("x.parquet", [Id("a")], 2, features=features()),
            ValueError,
            "columns: expected columns or features, got both",
        ),
        (
            lambda: ColumnarDataset("x.parquet"),
            ValueError,
            "columns: expected columns or features, got neither",
        ),
    ],
)
def test_bad_arguments(make, error, words):
    with pytest.raises(error, match=words):
        make()


def test_arrow_types():
    """A chunked array of a dictionary, as a table has it."""
    column = pa.chunked_array([pa.array(part).dictionary_encode() for part in (["x", "y"], ["x"])])
    plain = Features([Id("a", hash="xxh64")])({"a": ["x", "y", "x"]})["a"]
    assert torch.equal(Features([Id("a", hash="xxh64")])({"a": column})["a"], plain)


def test_features_of_some_entries_need_only_their_columns():
    made = features()
    raw = table_of(0, 9).to_pydict()
    part = made.only(["place", "user_tags", "price"])
    assert [one.name for one in part.columns] == ["user", "tags", "price", "country"]
    assert [one.name for one in part.transforms] == ["user_tags", "user_tags", "price", "place"]
    whole, found = made(raw), part(raw)
    assert list(found) == ["place", "user_tags", "price"]
    assert found["place"].equal(whole["place"])
    assert found["price"].equal(whole["price"])
    assert all(map(torch.equal, found["user_tags"], whole["user_tags"]))
    raw_price = Features([Number("price")], [Log1p("price"), Log1p("twice", source="price")])
    assert len(raw_price.only(["price"]).transforms) == 1
    assert len(raw_price.only(["twice"]).transforms) == 2
    with pytest.raises(ValueError, match="outputs: expected names among"):
        made.only(["prices"])


@pytest.mark.parametrize("is_batch", [False, True], ids=["Table", "RecordBatch"])
def test_arrow_tables_are_records(is_batch):
    """With labels and without."""
    made, table = features(), table_of(0, 6)
    for records in (table, table.drop(["click"])):
        wanted = made(records.to_pydict())
        found = made(records.combine_chunks().to_batches()[0] if is_batch else records)
        assert found.keys() == wanted.keys()
        assert ("click" in found) == ("click" in records.schema.names)
        for name, entry in wanted.items():
            for one, other in zip(entry, found[name], strict=True):
                assert one is other is None or torch.equal(one, other)


def test_a_file_that_is_no_utf8_is_named(tmp_path):
    text = "columns: [{kind: Id, name: \u00e9}]"
    (tmp_path / "features.yaml").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"^path: .*features\.yaml is no UTF-8: invalid"):
        Features.load(tmp_path / "features.yaml")


@pytest.mark.parametrize("suffix", [".yaml", ".json"])
def test_files_as_windows_writes_them(tmp_path, suffix):
    path = tmp_path / f"a b%20\u00e9{suffix}"
    features().save(path)
    text = path.read_text(encoding="utf-8")
    path.write_text(text, encoding="utf-8-sig", newline="\r\n")
    assert Features.load(path).to_state() == features().to_state()


def test_rows_of_a_numpy_array_are_bags():
    ids = np.arange(6).reshape(2, 3)
    for given in (ids, ids.T.copy().T, ids.astype(np.uint64)):
        bags = Features([IdList("ids")])({"ids": given})["ids"]
        assert bags.values.tolist() == [0, 1, 2, 3, 4, 5]
        assert bags.offsets.tolist() == [0, 3, 6]
    assert Features([IdList("ids")])({"ids": ids[:0]})["ids"].offsets.tolist() == [0]
    with pytest.raises(ValueError, match="column 'ids': a row has 3 values, not one"):
        Features([Id("ids")])({"ids": ids})


def test_a_name_that_was_meant_is_said():
    with pytest.raises(ValueError, match=r"got \['usr'\]; did you mean 'user'\?$"):
        Features([Id("user")], [Mod("usr", 10)])
    with pytest.raises(ValueError, match=r"got \['usr'\]; did you mean 'user'\?$"):
        Features([Id("user")], outputs=["usr"])
    with pytest.raises(ValueError, match=r"got \['user', 3\]$"):
        Features([Id("user")], outputs=["user", 3])
    with pytest.raises(ValueError, match=r"got \['usr'\]; did you mean 'user'\?$"):
        Features([Id("user")]).only(["usr"])
    with pytest.raises(KeyError, match=r"did you mean 'USER'"):
        Features([Id("user")])({"USER": [1]})


def test_columns_of_different_lengths_are_refused():
    features = Features([Id("user"), IdList("items"), Number("price")])
    with pytest.raises(ValueError, match=r"as many rows .*\{'user': 2, 'items': 2, 'price': 1\}"):
        features({"user": [1, 2], "items": [[1], []], "price": [1.0]})
    with pytest.raises(ValueError, match="data: expected as many rows"):
        features({"user": torch.arange(3), "items": [[1], []], "price": [1.0, 2.0]})


def test_ids_of_requests_may_be_unsigned():
    assert Features([Id("u")])({"u": [2**63 + 5]})["u"].tolist() == [5 - 2**63]
    with pytest.raises(ValueError, match="column 'u': expected integers of 64 bits"):
        Features([Id("u")])({"u": [2**64]})


@pytest.mark.parametrize("value", ["Berlin", b"Berlin", 7])
def test_a_value_in_the_place_of_a_list_is_refused(value):
    """A string's letters were rows."""
    city = Features([Id("city", hash="xxh64")])
    with pytest.raises(
        TypeError, match="column 'city': expected a list of values, one for each row"
    ):
        city({"city": value})
    with pytest.raises(TypeError, match="expected a list of values"):
        hash_strings(value)


def test_no_lists_of_columns_and_no_records_are_refused():
    with pytest.raises(TypeError, match=r"columns: expected a list, got Id\(.*; write \[Id\("):
        Features(Id("user"))
    with pytest.raises(TypeError, match="data: expected values by column, got list"):
        Features([Id("user")])([7])
