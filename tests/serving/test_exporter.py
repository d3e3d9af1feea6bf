"""Exports: what is written, what is left out, and what stays if one fails."""

import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from torch import nn

from recis_lightning import (
    DynamicEmbedding,
    DynamicEmbeddingBag,
    EmbeddingEngine,
    EmbeddingOption,
    Jagged,
    hash_tables,
    serving,
)
from recis_lightning.admission import MinCount
from recis_lightning.eviction import DistanceLFU, GlobalStepFilter, MaxRows, MinNorm
from recis_lightning.optim import SparseAdam
from recis_lightning.serving import exporter
from tests.helpers.served_model import make_batch, trained_model

ROOT = Path(__file__).parents[2]


def small_model(**changed):
    torch.manual_seed(0)
    model = nn.Sequential(DynamicEmbedding(8, name="user", **changed), nn.Linear(8, 1))
    model(torch.arange(100))
    return model


def files(folder):
    return sorted(path.name.split(".")[0] for path in folder.iterdir())


def test_a_model_is_left_as_it_was(tmp_path):
    model = trained_model().train()
    model.tower.eval()
    before = {
        name: value.clone() for name, value in model.state_dict().items() if "extra" not in name
    }
    sizes = [len(table) for table in hash_tables(model)]
    parameters = [name for name, _ in model.named_parameters()]
    serving.export(model, tmp_path, example=make_batch(5, seed=5))
    assert model.training
    assert not model.tower.training
    assert model.engine.training
    assert [len(table) for table in hash_tables(model)] == sizes
    assert [name for name, _ in model.named_parameters()] == parameters
    for name, value in before.items():
        assert model.state_dict()[name].equal(value)


def test_a_lightning_module_is_served(tmp_path):
    class Module(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.save_hyperparameters()
            self.user = DynamicEmbedding(4, name="user")
            self.tags = DynamicEmbeddingBag(4, mode="mean", name="tags")
            self.tower = nn.Linear(8, 1)

        def forward(self, user, tags):
            found = torch.cat([self.user(user), self.tags(tags)], 1)
            return {"score": self.tower(found).sigmoid(), "parts": (found, None)}

    model = Module()
    tags = Jagged(torch.arange(5), torch.tensor([0, 2, 2, 5]))
    model(torch.arange(3), tags)
    serving.export(model, tmp_path, example=(torch.arange(3), tags))
    served = serving.load(tmp_path)
    more = Jagged(torch.arange(3), torch.tensor([0, 3]))
    model.eval()
    expected, found = model(torch.tensor([1]), more), served(torch.tensor([1]), more)
    assert list(found) == ["score", "parts"]
    assert found["score"].equal(expected["score"])
    assert found["parts"][0].equal(expected["parts"][0])
    assert found["parts"][1] is None


def test_optimizer_state_is_not_written(tmp_path):
    """It would be twice the size of the rows."""
    model = small_model()
    optimizer = SparseAdam(hash_tables(model), lr=0.1)
    model(torch.arange(5000)).sum().backward()
    optimizer.step()
    serving.export(model, tmp_path, example=torch.arange(3))
    size = next(tmp_path.glob("user.*.rows")).stat().st_size
    assert 5000 * (8 + 4 * 8) < size < 5000 * (8 + 4 * 8) + 8 * 4096 + 4 * 5000
    assert serving.load(tmp_path)(torch.arange(5)).equal(model.eval()(torch.arange(5)))


@pytest.mark.parametrize("rows", ["bfloat16", "int8", {"user": "int8"}])
def test_rows_may_be_kept_smaller(tmp_path, rows):
    model = small_model().eval()
    serving.export(model, tmp_path, example=torch.arange(3), rows=rows)
    ids = torch.arange(100)
    served, expected = serving.load(tmp_path)(ids), model(ids)
    assert not served.equal(expected)
    torch.testing.assert_close(served, expected, atol=2e-3, rtol=0)


def test_rows_may_be_left_out(tmp_path):
    model = small_model(eviction=GlobalStepFilter(5)).eval()
    (table,) = hash_tables(model)
    table.insert(torch.arange(40), torch.full((40, 8), 1e-9))
    serving.export(model, tmp_path, example=torch.arange(3), drop=MinNorm(1e-3))
    served = serving.load(tmp_path)
    assert len(served.tables["user"]) == 60
    assert len(table) == 100
    assert served(torch.arange(40, 50)).equal(model(torch.arange(40, 50)))
    assert served(torch.tensor([3])).equal(model(torch.tensor([-1])))
    table.update_step(10)
    drop = {"user": GlobalStepFilter(5)}
    serving.export(model, tmp_path, example=torch.arange(3), drop=drop)
    assert len(serving.load(tmp_path).tables["user"]) == 0


@pytest.mark.parametrize("policy", [MaxRows(1000, by="count"), DistanceLFU(1000)])
def test_ids_of_few_occurrences_may_be_left_out(tmp_path, policy):
    model = small_model(eviction=policy)
    model(torch.tensor([3, 3, 7, 9]))
    serving.export(model, tmp_path, example=torch.arange(3), drop={"user": MinCount(2)})
    served = serving.load(tmp_path)
    assert sorted(served.tables["user"].ids().tolist()) == [3, 7, 9]
    assert served(torch.tensor([7])).equal(model.eval()(torch.tensor([7])))
    serving.export(model, tmp_path, example=torch.arange(3), drop=MinCount(3))
    assert serving.load(tmp_path).tables["user"].ids().tolist() == [3]
    hash_tables(model)[0].pin(torch.tensor([9]))  # as no policy names it
    serving.export(model, tmp_path, example=torch.arange(3), drop=MinCount(3))
    assert sorted(serving.load(tmp_path).tables["user"].ids().tolist()) == [3, 9]
    assert len(hash_tables(model)[0]) == 100


def test_an_export_replaces_the_older_one(tmp_path):
    """What is open stays as it was, and other files are not ours to remove."""
    (tmp_path / "notes.txt").write_text("mine")
    model = small_model().eval()
    serving.export(model, tmp_path, example=torch.arange(3))
    older = serving.load(tmp_path)
    ids = torch.arange(10)
    scores = older(ids)
    with torch.no_grad():
        model[1].bias.add_(1)
    serving.export(model, tmp_path, example=torch.arange(3))
    assert files(tmp_path) == ["dense", "manifest", "notes", "user"]
    assert older(ids).equal(scores)
    assert serving.load(tmp_path)(ids).equal(model(ids))


def test_a_failed_export_leaves_the_older_one(tmp_path, monkeypatch):
    model = small_model().eval()
    serving.export(model, tmp_path, example=torch.arange(3))
    scores = serving.load(tmp_path)(torch.arange(10))
    before = sorted(path.name for path in tmp_path.iterdir())

    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr(exporter, "_write_constants", fail)
    with pytest.raises(OSError, match="no space"):
        serving.export(small_model(), tmp_path, example=torch.arange(3))
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert serving.load(tmp_path)(torch.arange(10)).equal(scores)


KILLED = """
import os, sys
import torch
from recis_lightning import serving
from recis_lightning.serving import exporter
from tests.serving.test_exporter import small_model
def kill(*_):
    os.kill(os.getpid(), 9)
exporter._write_dense = kill
serving.export(small_model(), sys.argv[1], example=torch.arange(3))
"""


def test_what_a_killed_export_left_is_removed_by_the_next(tmp_path):
    """Of an export's own kind only, whether or not it was the one before."""
    left = [
        *("user.0123456789abcdef.rows", "other.0123456789abcdef.rows"),
        *("dense.aaaaaaaaaaaaaaaa.weights", "manifest.json.0123456789abcdef"),
    ]
    kept = [
        *("user.rows", "notes.weights", "user.0123456789abcdeF.rows", "manifest.json.bak"),
        *("base-0000000001-0123456789abcdef.0-of-1.rows", "user.0123456789abcdef.rows.txt"),
    ]
    for name in (*left, *kept):
        (tmp_path / name).write_text("x")
    (tmp_path / "folder.0123456789abcdef.rows").mkdir()
    model = small_model().eval()
    serving.export(model, tmp_path, example=torch.arange(3))
    names = {path.name for path in tmp_path.iterdir()}
    assert names >= {*kept, "folder.0123456789abcdef.rows", "manifest.json"}
    assert not names & set(left)
    assert len(names) == len(kept) + 4
    assert serving.load(tmp_path, check_all=True)(torch.arange(5)).equal(model(torch.arange(5)))


def test_an_export_that_is_killed_leaves_the_older_one(tmp_path):
    model = small_model().eval()
    serving.export(model, tmp_path, example=torch.arange(3))
    before = {path.name for path in tmp_path.iterdir()}
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == -9
    left = {path.name for path in tmp_path.iterdir()} - before
    assert [name.partition(".")[0] for name in left] == ["user"]
    assert serving.load(tmp_path)(torch.arange(5)).equal(model(torch.arange(5)))
    serving.export(model, tmp_path, example=torch.arange(3))
    assert len(list(tmp_path.iterdir())) == 3


def test_two_exports_to_one_folder_are_refused(tmp_path, monkeypatch):
    """The second would remove the first one's files; the first goes on."""
    model, found = small_model().eval(), []
    original = exporter._write_dense

    def write(*args):
        with pytest.raises(RuntimeError, match="another export writes to"):
            serving.export(small_model(), tmp_path, example=torch.arange(3))
        found.append(True)
        return original(*args)

    monkeypatch.setattr(exporter, "_write_dense", write)
    serving.export(model, tmp_path, example=torch.arange(3))
    assert found == [True]
    assert serving.load(tmp_path)(torch.arange(5)).equal(model(torch.arange(5)))


def test_a_table_may_be_called_as_a_method_of_modules_is(tmp_path):
    class Typed(nn.Module):
        def __init__(self):
            super().__init__()
            self.engine = EmbeddingEngine({"type": EmbeddingOption(2), "half": EmbeddingOption(2)})

        def forward(self, batch):
            return self.engine.concat(batch)

    model = Typed()
    batch = {"type": torch.arange(3), "half": torch.arange(3)}
    expected = model(batch)
    serving.export(model, tmp_path, example=batch)
    assert serving.load(tmp_path)(batch).equal(expected)


class Chance(nn.Module):
    """Scores the same ids otherwise each time."""

    def __init__(self):
        super().__init__()
        self.user = DynamicEmbedding(2, name="user")

    def forward(self, ids):
        return self.user(ids) + torch.rand(1)


def test_a_model_whose_scores_are_not_served_is_refused(tmp_path):
    message = r"score the example differently: by up to .*; does forward depend on values"
    with pytest.raises(RuntimeError, match=message):
        serving.export(Chance(), tmp_path, example=torch.arange(3))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("argument", "value", "error", "message"),
    [
        ("model", "model", TypeError, "model: expected a module"),
        ("example", None, TypeError, "example: expected a batch"),
        ("example", {}, ValueError, "example: expected tensors, got none"),
        ("example", {"user": "a"}, TypeError, r"input\['user'\]: .*got str"),
        ("example", torch.arange(1), ValueError, "example: input has 1 samples"),
        ("rows", "int4", ValueError, "rows: expected one of"),
        ("rows", {"item": "int8"}, ValueError, r"rows: no such tables \['item'\]"),
        ("drop", 3, TypeError, "drop: expected an eviction policy"),
        ("drop", MinCount(2), ValueError, "drop: .* asks for counts, which table 'user' does not"),
        ("drop", MinCount(2, per="batch"), ValueError, "drop: .* of occurrences, got"),
        ("rows", {3: "int8", "a": "int8"}, ValueError, "rows: no such tables"),
        ("example", (torch.arange(3), torch.arange(3)), TypeError, "example: Sequential.forward"),
        ("model", nn.Sequential(DynamicEmbedding(8), nn.LazyLinear(1)), ValueError, "'1' .LazyL"),
    ],
)
def test_bad_arguments_are_named(tmp_path, argument, value, error, message):
    arguments = {"model": small_model(), "example": torch.arange(3), argument: value}
    model = arguments.pop("model")
    with pytest.raises(error, match=message):
        serving.export(model, tmp_path / "served", **arguments)
    assert not list(tmp_path.glob("served/*"))


def test_a_manifest_of_something_else_is_not_replaced(tmp_path):
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(ValueError, match=r"manifest\.json that is not replaced"):
        serving.export(small_model(), tmp_path, example=torch.arange(3))
    assert (tmp_path / "manifest.json").read_text() == "{}"


def test_two_tables_of_one_name_are_refused(tmp_path):
    model = nn.Sequential(DynamicEmbedding(2, name="user"), nn.Flatten())
    model.other = DynamicEmbedding(2, name="user")
    with pytest.raises(ValueError, match="two of its tables are called 'user'"):
        serving.export(model, tmp_path, example=torch.arange(3))


class Engine(nn.Module):
    """Engine whose outputs are added up."""

    def __init__(self, **changed):
        super().__init__()
        self.engine = EmbeddingEngine({"a": EmbeddingOption(2), "b": EmbeddingOption(2, **changed)})

    def forward(self, batch):
        found = self.engine(batch)
        return found["a"] + found["b"]


@pytest.mark.parametrize(
    ("changed", "features", "error", "message"),
    [
        ({"mode": "unique"}, {}, ValueError, "^b: mode 'unique' is not for an exported program"),
        ({"combiner": lambda rows, _: rows}, {}, ValueError, "^b: a combiner is not for an export"),
        ({}, {"b": None}, TypeError, "^b: an exported program takes ids, .*got NoneType"),
        ({}, {"b": torch.arange(4)}, ValueError, r"^example: .*\{\"batch\['a'\]\": 3, .*: 4\}"),
        ({}, {"b": "gone"}, ValueError, r"^example: .* looks for 'b', .* entries are \['a'\]"),
        ({}, {"a": "gone", "b": "gone"}, ValueError, "^features: missing .*, unknown .'c'"),
    ],
)
def test_a_batch_or_lookup_that_is_not_exported_is_named(
    tmp_path, changed, features, error, message
):
    batch = {"a": torch.arange(3), "b": torch.arange(3), **features}
    batch = {name: value for name, value in batch.items() if not isinstance(value, str)}
    with pytest.raises(error, match=message):
        serving.export(Engine(**changed), tmp_path, example=batch or {"c": torch.arange(3)})
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="folder: expected a folder"):
        serving.export(small_model(), tmp_path / "file", example=torch.arange(3))


def test_a_folder_is_replaceable_if_it_has_nothing_but_an_export(tmp_path):
    check = exporter.check_replaceable
    assert check(tmp_path) == tmp_path
    assert not check(tmp_path / "new").exists()
    (tmp_path / f"user.{'0' * 16}.rows").touch()  # of an export that was killed
    assert check(str(tmp_path)) == tmp_path
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ValueError, match=f"folder: {tmp_path} is no export .*notes.txt"):
        check(tmp_path)
    (tmp_path / "manifest.json").touch()  # export says what it thinks of it
    assert check(tmp_path) == tmp_path
    with pytest.raises(NotADirectoryError, match="folder"):
        check(tmp_path / "notes.txt")


class Rounding(Chance):
    """Computes in another order while it is exported; or another dtype."""

    def __init__(self, by=1e-6):
        super().__init__()
        self.by = by

    def forward(self, ids):
        scores = self.user(ids) + 1
        if not torch.compiler.is_compiling():
            scores = scores * (1 + self.by) if self.by else scores.double()
        return scores, ids


@pytest.mark.parametrize(
    ("by", "words"),
    [
        (1e-6, r"in tensor 0 of 2: by up to .*e-0[67], where the largest is 1: .* of rounding"),
        (0.5, r"in tensor 0 of 2: by up to 0\.5, where the largest is 1\.5; does forward depend"),
        (0, r"in tensor 0 of 2: torch.float32 \(3, 2\) in place of torch.float64 \(3, 2\)$"),
    ],
)
def test_a_difference_is_said_with_its_size(tmp_path, by, words):
    with pytest.raises(RuntimeError, match=words):
        serving.export(Rounding(by), tmp_path, example=torch.arange(3))


def test_a_transformer_of_torch_is_exported_as_it_is(tmp_path):
    """Its fast path is off meanwhile alone."""

    class Encoder(Chance):
        def __init__(self):
            super().__init__()
            self.user = DynamicEmbedding(32, name="user")
            layer = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True)
            self.layers = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)

        def forward(self, ids):
            return self.layers(self.user(ids))

    model, ids = Encoder(), torch.arange(6).view(2, 3)
    model(ids)
    assert torch.backends.mha.get_fastpath_enabled()
    serving.export(model, tmp_path, example=ids)
    assert torch.backends.mha.get_fastpath_enabled()
    with torch.no_grad():
        assert serving.load(tmp_path)(ids).allclose(model.eval()(ids), atol=1e-5)
