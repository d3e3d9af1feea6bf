"""Raw records: the Trainer's scores to the bit, and errors that name the column."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet
import pytest
import torch
from torch import nn

from recis_lightning import (
    DynamicEmbedding,
    EmbeddingEngine,
    EmbeddingOption,
    Jagged,
    NestedJagged,
    serving,
)
from recis_lightning.data import Cross, Features, Id, IdBags, IdList, Log1p, Number
from tests.helpers.raw_model import FEATURES, raw_table, to_batch, trained_on
from tests.serving.test_model import rewrite, set_in

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Return a trained model, its served folder, raw records, and the Trainer's scores of them."""
    files = tmp_path_factory.mktemp("files")
    model, scores = trained_on(files)
    folder = tmp_path_factory.mktemp("served")
    example = raw_table(0, 5).to_pydict()
    serving.export(model, folder, example=example, features=FEATURES, convert=to_batch)
    return model.eval(), folder, pyarrow.parquet.read_table(files / "new.parquet"), scores


def test_scores_of_raw_records_are_those_that_the_trainer_predicts(exported):
    """Bit for bit: strings, nulls, jagged, weighted, crossed, padded and unknown ids."""
    _, folder, table, predicted = exported
    served = serving.load(folder)
    first = 0
    for scores in predicted:
        part = table[first : first + len(scores)]
        assert served(part.to_pydict()).equal(scores)
        assert served(part).equal(scores)
        assert served(part.combine_chunks().to_batches()[0]).equal(scores)
        assert served({name: part[name] for name in part.column_names}).equal(scores)
        assert served.score_records(part.to_pandas()).equal(scores)
        first += len(scores)
    assert first == 40
    assert len(predicted) > 2


@pytest.mark.parametrize("size", [0, 1, 2, 40])
def test_scores_are_those_of_the_model_for_batches_of_any_size(exported, size):
    model, folder, table, _ = exported
    served, raw = serving.load(folder), table[:size].to_pydict()
    batch = to_batch(FEATURES(raw))
    expected = model(batch)
    assert served(raw).equal(expected)
    assert not served(raw).requires_grad
    assert served(batch).equal(expected)  # tensors, as before
    entries = FEATURES(raw)
    mixed = {
        **raw,
        "user": entries["user"],
        "tags": entries["tags"],
        "price": table["price"][:size],
    }
    assert served(mixed).equal(expected)


def test_unused_columns_may_be_missing(exported):
    _, folder, table, _ = exported
    served = serving.load(folder)
    scores = served(table)
    assert "row" not in served.columns
    assert "click" not in served.columns
    assert served(table.select(served.columns)).equal(scores)
    assert served(table.append_column("more", [["x"] * 40])).equal(scores)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"user": None}, ValueError, r"records: column 'user': expected \['user'\]"),
        ({"user": [1.5, 2.5]}, TypeError, "records: column 'user': expected strings, bytes"),
        ({"history": [["a"], ["b"]]}, TypeError, "records: column 'history': .*give it a hash="),
        ({"user": ["a"]}, ValueError, "expected columns of equally many rows, got {'user': 1"),
        ({"history_weights": [[1.0], []]}, ValueError, "row 0 has 3 values and 1 weights"),
        ({"user": [None, "a"]}, ValueError, "column 'user': 1 of 2 values are null"),
        ({"user": torch.zeros(2)}, TypeError, "user.*expected torch.int64"),
    ],
)
def test_records_that_do_not_fit_are_named(exported, change, error, words):
    _, folder, table, _ = exported
    served = serving.load(folder)
    raw = {**table[10:12].to_pydict(), **change}
    if change.get("user", 0) is None:
        del raw["user"]
    with pytest.raises(error, match=words):
        served(raw)
    with pytest.raises(TypeError, match="records: expected a dict of columns, or a table, got int"):
        served.score_records(3)


FRESH = """
import sys
import time
import torch
start = time.perf_counter()
from recis_lightning import serving
served = serving.load(sys.argv[1])
scores = served({"user": ["a", "user-1"], "city": [None, "Rome"], "history": [[1], None],
    "history_weights": [[0.5], None], "tags": [["a"], []], "price": [1.0, None]})
seconds = time.perf_counter() - start
assert scores.shape == (2,)
loaded = sorted({name.partition(".")[0] for name in sys.modules})
assert not {"lightning", "pytorch_lightning", "triton", "numba", "llvmlite"} & set(loaded), loaded
print(seconds)
"""


def test_a_fresh_process_scores_strings_without_a_compiler(exported):
    command = [sys.executable, "-c", FRESH, str(exported[1])]
    subprocess.run(command, check=True, cwd=ROOT, capture_output=True)


def test_without_a_conversion_the_entries_are_the_batch(tmp_path):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.engine = EmbeddingEngine({"user": EmbeddingOption(4), "tags": EmbeddingOption(4)})

        def forward(self, batch):
            user, tags = self.engine({name: batch[name] for name in ("user", "tags")}).values()
            return user.sum(1) + batch["price"], tags.values.sum(1)

    features = Features(
        [Id("user"), IdList("tags", hash="xxh64"), Number("price")], [Log1p("price")]
    )
    raw = {"user": [1, 2, 3], "tags": [["a"], [], ["b", "c"]], "price": [1.0, 2.0, 3.0]}
    model = Model()
    model(features(raw))
    serving.export(model, tmp_path, example=raw, features=features)
    served = serving.load(tmp_path)
    raw = {"user": [3, 9], "tags": [["c"], ["d"]], "price": [5, 6]}
    expected = model.eval()(features(raw))
    for found in (served(raw), served(features(raw))):
        assert all(map(torch.equal, found, expected))


def test_several_arguments_may_be_made_of_entries(tmp_path):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.user = DynamicEmbedding(4, name="user")

        def forward(self, user, others):
            return self.user(user).sum(1) + others[0], others[1]

    def convert(entries):
        return entries["user"], (entries["price"], entries["user"])

    model, features = Model(), Features([Id("user", hash="xxh64"), Number("price")])
    raw = {"user": ["a", "b", "c"], "price": [1.0, 2.0, 3.0]}
    model(*convert(features(raw)))
    serving.export(model, tmp_path, example=raw, features=features, convert=convert)
    served = serving.load(tmp_path)
    scores, ids = served({"user": ["b"], "price": [0.5]})
    expected, expected_ids = model.eval()(*convert(features({"user": ["b"], "price": [0.5]})))
    assert scores.equal(expected)
    assert ids.equal(expected_ids)


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.user = DynamicEmbedding(4, name="user")

    def forward(self, batch):
        return self.user(batch["user"])


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"features": [Id("user")]}, TypeError, "features: expected recis_lightning.data.Features"),
        ({"convert": dict}, TypeError, "convert: expected a function, together with features="),
        ({"features": Features([Id("user")]), "convert": 3}, TypeError, "convert: expected a func"),
        (
            {"features": Features([Id("user")]), "convert": lambda given: {"user": given["x"]}},
            ValueError,
            "example: convert looks for 'x'",
        ),
        (
            {
                "features": Features([Id("user")]),
                "convert": lambda given: {"user": torch.arange(len(given["user"]))},
            },
            ValueError,
            "features: the model uses none of their entries|takes? no other number",
        ),
    ],
)
def test_bad_arguments_of_an_export_write_nothing(tmp_path, options, error, words):
    with pytest.raises(error, match=words):
        serving.export(Small(), tmp_path / "served", example={"user": [1, 2, 3]}, **options)
    served = tmp_path / "served"
    assert not served.exists() or list(served.iterdir()) == []


def test_a_conversion_that_depends_on_values_is_refused(tmp_path):
    def convert(entries):
        return {"user": entries["user"][entries["user"] > 1]}

    def by_number(entries):
        return {"user": entries["user"] + len(entries["user"])}

    options = {"example": {"user": [1, 2, 3]}, "features": Features([Id("user")])}
    model = Small().eval()
    with pytest.raises(ValueError, match="would take no other number"):
        serving.export(model, tmp_path, convert=by_number, **options)
    assert list(tmp_path.iterdir()) == []
    serving.export(model, tmp_path, convert=convert, **options)
    assert serving.load(tmp_path)({"user": [5, 0]}).equal(model({"user": torch.tensor([5])}))


def test_raw_records_need_transforms(tmp_path):
    serving.export(Small(), tmp_path, example={"user": torch.arange(3)})
    served = serving.load(tmp_path)
    assert served.columns == []
    with pytest.raises(TypeError, match=r"batch\['user'\]: expected a Tensor, got list"):
        served({"user": [1, 2]})
    with pytest.raises(TypeError, match="the folder has no transforms"):
        served.score_records({"user": [1, 2]})


HOSTILE = {
    "no dict": set_in("transforms", []),
    "other fields": set_in("transforms", {"kind": "hash"}),
    "a field more": set_in("transforms", "more", 1),
    "no features": set_in("transforms", "features", None),
    "features of later": set_in("transforms", "features", "version", 9),
    "an unknown column": set_in("transforms", "features", "columns", 0, {"kind": "os.system"}),
    "a class by path": set_in(
        "transforms", "features", "columns", 0, "kind", "recis_lightning.data.ColumnarDataset"
    ),
    "a hash": set_in("transforms", "features", "columns", 0, "hash", "md5"),
    "a hash that is none": set_in("transforms", "features", "columns", 0, "hash", ["xxh64"]),
    "a source": set_in("transforms", "features", "columns", 0, "source", 3),
    "a default": set_in("transforms", "features", "columns", 0, "default", "x"),
    "a default of 70 bits": set_in("transforms", "features", "columns", 0, "default", 1 << 70),
    "a seed": set_in("transforms", "features", "columns", 0, "seed", -1),
    "columns that are none": set_in("transforms", "features", "columns", 3),
    "columns that are a dict": set_in("transforms", "features", "columns", {"a": 1}),
    "no columns": set_in("transforms", "features", "columns", []),
    "transforms of text": set_in("transforms", "features", "transforms", "abc"),
    "a transform of nothing": set_in(
        "transforms", "features", "transforms", [{"kind": "Mod", "name": "x", "modulus": 2}]
    ),
    "a vocabulary": set_in(
        *("transforms", "features", "transforms"),
        [{"kind": "Lookup", "name": "user", "vocabulary": [{}]}],
    ),
    "a vocabulary of 70 bits": set_in(
        *("transforms", "features", "transforms"),
        [{"kind": "Lookup", "name": "user", "vocabulary": [1 << 70]}],
    ),
    "boundaries": set_in(
        *("transforms", "features", "transforms"),
        [{"kind": "Bucketize", "name": "price", "boundaries": ["a", "b"]}],
    ),
    "a limit": set_in(
        *("transforms", "features", "transforms"), [{"kind": "Clip", "name": "price", "low": "a"}]
    ),
    "outputs": set_in("transforms", "features", "outputs", ["user"]),
    "outputs that are none": set_in("transforms", "features", "outputs", 5),
    "outputs of numbers": set_in("transforms", "features", "outputs", [5]),
    "entries": set_in("transforms", "entries", {"dict": {"user": {"tensor": 0}}}),
    "entries of more": set_in("transforms", "entries", "dict", "user", {"tensor": 99}),
    "entries that are none": set_in("transforms", "entries", None),
    "an entry": set_in("transforms", "entries", {"tensor": 0}),
    "inputs": set_in("transforms", "inputs", 0, "dtype", "object"),
    "no inputs": set_in("transforms", "inputs", None),
    "fewer outputs": set_in("transforms", "program", "outputs", []),
    "a program that runs more": set_in(
        "transforms", "program", "calls", 0, ["aten::from_file.default", ["/etc/passwd"], {}]
    ),
    "a lookup": set_in("transforms", "program", "calls", 0, ["recis_lightning::look_up", [], {}]),
    "no program": set_in("transforms", "program", None),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_transforms_are_refused(exported, tmp_path, kind):
    """Before anything is scored, with a manifest whose checksum is right."""
    folder = tmp_path / "served"
    folder.mkdir()
    for path in exported[1].iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    serving.load(folder)
    rewrite(folder, HOSTILE[kind])
    with pytest.raises(ValueError, match=r"manifest\.json"):
        serving.load(folder)


def test_transforms_are_data(exported):
    """Plain JSON that a reader of another language may follow."""
    state = json.loads((exported[1] / "manifest.json").read_text())["transforms"]
    kinds = {one["kind"] for one in state["features"]["columns"]}
    assert kinds == {"Id", "IdList", "Number"}
    assert "click" not in json.dumps(state["features"])


def test_pandas_and_numpy_columns(tmp_path):
    features = Features([Id("user", hash="xxh64"), Number("n")])

    class Model(nn.Module):
        def forward(self, batch):
            return batch["n"] * 2, batch["user"]

    raw = {"user": ["a", "b", "c"], "n": [1.0, 2.0, 3.0]}
    serving.export(Model(), tmp_path, example=raw, features=features)
    served = serving.load(tmp_path)
    expected = served(raw)
    frame = pd.DataFrame(raw)
    for given in (frame, {"user": frame["user"], "n": np.array(raw["n"])}):
        assert all(map(torch.equal, served(given), expected))
    assert isinstance(served(raw)[1], torch.Tensor)
    assert not isinstance(expected[0], Jagged)


@pytest.mark.parametrize("mode", ["none", "mean"])
def test_sequences_of_bags_are_served(tmp_path, mode):
    """Of tensors and of raw values, weighted and empty ones, in batches of any size."""
    features = Features([Id("user"), IdBags("baskets", hash="xxh64", weights="amounts")])

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.engine = EmbeddingEngine({"baskets": EmbeddingOption(3, mode=mode)})

        def forward(self, batch):
            found = self.engine({"baskets": batch["baskets"]})["baskets"]
            return found, found.values.sum(1), batch["user"]

    raw = {
        "user": [1, 2, 3, 4],
        "baskets": [[["a", "b"], []], None, [["c"]], [["a"], ["b", "b", "d"]]],
        "amounts": [[[1.0, 2.0], []], None, [[0.5]], [[3.0], [1.0, 1.0, 4.0]]],
    }
    model = Model()
    model(features({name: column[:3] for name, column in raw.items()}))  # "d" is unknown
    model.eval()
    serving.export(model, tmp_path, example=raw, features=features)
    served = serving.load(tmp_path)
    for rows in (slice(0), slice(1, 2), slice(4), slice(2, 4)):
        given = {name: column[rows] for name, column in raw.items()}
        batch = features(given)
        expected = model(batch)
        assert isinstance(expected[0], NestedJagged if mode == "none" else Jagged)
        for found in (served(given), served(batch), served({**given, "baskets": batch["baskets"]})):
            assert type(found[0]) is type(expected[0])
            for one, other in zip(found[0], expected[0], strict=True):
                assert one is other or one.equal(other)
            assert found[1].equal(expected[1])
    with pytest.raises(TypeError, match=r"baskets'\]: expected a nested_jagged of 4"):
        served({**batch, "baskets": batch["baskets"].inner()})
    with pytest.raises(ValueError, match="columns of equally many rows"):
        served({**raw, "user": [1]})


def test_columns_of_differing_lengths_are_named(tmp_path):
    """Before a transform of several of them fails."""
    model = nn.Sequential(EmbeddingEngine({"ab": EmbeddingOption(2, mode="sum")}))
    features = Features([Id("a"), IdList("b")], [Cross("ab", ["a", "b"])], outputs=["ab"])
    example = {"a": [1, 2, 3], "b": [[1], [2], [4, 5]]}
    serving.export(model, tmp_path, example=example, features=features)
    served = serving.load(tmp_path)
    assert served(example)["ab"].shape == (3, 2)
    words = r"records: expected columns of equally many rows, got \{'a': 3, 'b': 2\}"
    for shorter in ([[1], [2]], Jagged(torch.arange(3), torch.tensor([0, 1, 3]))):
        with pytest.raises(ValueError, match=words):
            served.score_records({"a": [1, 2, 3], "b": shorter})
    with pytest.raises(ValueError, match="example: expected columns of equally many rows"):
        serving.export(model, tmp_path, example={**example, "a": [1]}, features=features)
    with pytest.raises(ValueError, match="example: column 'b': expected"):
        serving.export(model, tmp_path, example={"a": [1]}, features=features)
    with pytest.raises(TypeError, match="records: column 'b': expected values, got None"):
        served.score_records({**example, "b": None})
    options = {"features": features, "convert": lambda entries: entries["c"]}
    with pytest.raises(ValueError, match=r"convert looks for 'c', .* entries are \['ab'\]"):
        serving.export(model, tmp_path, example=example, **options)
