"""Evaluation lookups in programs of ``torch.export`` and ``torch.compile``."""

import gc
import io
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from recis_lightning import (
    DynamicEmbedding,
    DynamicEmbeddingBag,
    EmbeddingEngine,
    EmbeddingOption,
    HashTable,
    Jagged,
    NestedJagged,
    hash_tables,
)
from recis_lightning.lookup import named_tables
from recis_lightning.lookup.named_tables import Binding, find_table, key_of
from recis_lightning.lookup.operator import RecordedFeature, record, run
from tests.helpers.served_model import make_batch, trained_model

# torch.compile touches the attribute itself.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")

AUTO, STATIC = torch.export.Dim.AUTO, torch.export.Dim.STATIC


@pytest.fixture(autouse=True)
def _fresh_compiler():
    gc.collect()  # names are looked up among the tables alive
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def shapes_of(value):
    """Return the dynamic shapes of a batch: torch finds which sizes belong together."""
    if isinstance(value, dict):
        return {key: shapes_of(part) for key, part in value.items()}
    if isinstance(value, tuple):
        return type(value)(*map(shapes_of, value)) if type(value) is Jagged else tuple(
            map(shapes_of, value)
        )  # fmt: skip
    return None if value is None else {0: AUTO}


def export(model, size=5, strict=False):
    batch = make_batch(size, seed=1)
    return torch.export.export(model, (batch,), dynamic_shapes=(shapes_of(batch),), strict=strict)


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_program_gives_the_values_of_the_model(strict, monkeypatch):
    """Bit for bit, for batches of other sizes, and as the rows are when it runs."""
    model = trained_model()
    file = io.BytesIO()
    torch.export.save(export(model, strict=strict), file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    # Tests before may have left tables of the same names.
    monkeypatch.setattr(
        named_tables, "live_hash_tables", lambda: [*hash_tables(model), HashTable(2)]
    )
    sizes = {id(table): len(table) for table in hash_tables(model)}
    for size in (5, 2, 17):
        batch = make_batch(size, seed=size)
        assert loaded(batch).equal(model(batch))
    with torch.no_grad():
        (user,) = hash_tables(model.user)
        user.insert(torch.tensor([4]), torch.full((1, 4), 7.0))
    assert loaded(batch).equal(model(batch))
    assert {id(table): len(table) for table in hash_tables(model)} | {
        id(user): len(user)
    } == sizes | {id(user): len(user)}


def test_a_program_names_its_tables():
    program = export(trained_model())
    (tables,) = {
        tuple(node.args[3])
        for node in program.graph.nodes
        if "look_up" in str(node.target) and len(node.args[3]) > 1
    }
    assert tables == ("item", "item", "tiles", "short", "item", "item")


def test_no_list_of_the_operator_is_empty():
    """AOTInductor's runtime takes none."""
    program = torch.export.export(DynamicEmbedding(2, name="user").eval(), (torch.arange(3),))
    (lookup,) = [node for node in program.graph.nodes if "look_up" in str(node.target)]
    assert all(len(part) == 1 for part in lookup.args)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs a C++ compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # torch's own
def test_a_package_of_aotinductor_gives_the_values_of_the_model(tmp_path):
    """Features of all kinds, in batches of any size."""
    model = trained_model()
    package = str(tmp_path / "model.pt2")
    torch._inductor.aoti_compile_and_package(export(model), package_path=package)
    loaded = torch._inductor.aoti_load_package(package)
    with Binding({table.name: table for table in hash_tables(model)}):
        for size in (5, 2, 17):
            batch = make_batch(size, seed=size)
            torch.testing.assert_close(loaded(batch), model(batch))


FRESH = """
import sys, torch
from recis_lightning import serving
import recis_lightning
program, batch, tables, scores = torch.load(sys.argv[1], weights_only=False)
loaded = torch.export.load(program).module()
try:
    loaded(batch)
except RuntimeError as error:
    assert "none is alive" in str(error), error
else:
    raise AssertionError("read rows of no table")
made = {}
for name, (ids, rows) in tables.items():
    made[name] = recis_lightning.HashTable(rows.shape[1], dtype=rows.dtype, name=name)
    made[name].insert(ids, rows)
with serving.bind(made):
    assert loaded(batch).equal(scores)
"""


def test_a_fresh_process_runs_a_program_with_bound_tables(tmp_path):
    """It imports recis_lightning.serving alone, and gives the same values."""
    model, batch = trained_model(), make_batch(6, seed=4)
    torch.export.save(export(model), tmp_path / "model.pt2")
    rows = {t.name: (t.ids(), t.embeddings(t.ids())) for t in hash_tables(model)}
    given = (str(tmp_path / "model.pt2"), batch, rows, model(batch).detach())
    torch.save(given, tmp_path / "given.pt")
    command = [sys.executable, "-c", FRESH, str(tmp_path / "given.pt")]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[2])


def test_an_evaluation_lookup_breaks_no_graph():
    """``fullgraph`` raises at a break; other sizes compile nothing more than dynamic shapes."""
    model = trained_model()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        for size in (5, 3, 8):
            batch = make_batch(size, seed=size)
            assert compiled(batch).equal(model(batch))
    other = trained_model()  # of tables with the same names
    batch = make_batch(4, seed=4)
    other_compiled = torch.compile(other, backend="eager", fullgraph=True)
    (user,) = hash_tables(other.user)
    user.insert(torch.arange(-5, 9), torch.ones(14, 4))
    assert other_compiled(batch).equal(other(batch))
    assert compiled(batch).equal(model(batch))


def test_a_compiled_program_reads_the_table_that_the_module_has_now():
    """Another table in its place, or another padding id, is another program."""
    module = DynamicEmbedding(2, name="user")
    module(torch.arange(3))
    module.eval()
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    ids = torch.arange(4)
    assert compiled(ids).equal(module(ids))
    other = HashTable(2, name="user")
    other.insert(torch.tensor([2, 3]), torch.ones(2, 2))
    module.table = other
    assert compiled(ids).tolist() == [[0, 0], [0, 0], [1, 1], [1, 1]]
    module.padding_idx = 3
    assert compiled(ids).tolist() == [[0, 0], [0, 0], [1, 1], [0, 0]]


def test_weights_that_ask_for_a_gradient_get_it_when_compiled():
    bag = DynamicEmbeddingBag(3, mode="sum", name="bag")
    bag(torch.arange(4).view(2, 2))
    bag.eval()
    compiled = torch.compile(bag, backend="eager")
    gradients = []
    for module in (bag, compiled):
        weights = torch.ones(2, 2, requires_grad=True)
        module(torch.arange(4).view(2, 2), per_sample_weights=weights).sum().backward()
        gradients.append(weights.grad)
    assert gradients[0].abs().sum() > 0
    assert gradients[0].equal(gradients[1])


def test_training_is_refused_by_export_and_says_what_to_do():
    model = DynamicEmbedding(2, name="user")
    with pytest.raises(RuntimeError, match=r"in eval\(\)"):
        torch.export.export(model, (torch.arange(3),), strict=False)


@pytest.mark.parametrize("strict", [True, False])
def test_an_engine_returns_shapes_of_its_own(strict):
    """Ids of several dimensions, ragged ids without pooling, and what is passed through."""

    class Shapes(nn.Module):
        def __init__(self):
            super().__init__()
            options = {
                "rows": EmbeddingOption(2),
                "many": EmbeddingOption(2, mode="sum"),
                "ragged": EmbeddingOption(2),
                "bags": EmbeddingOption(2, mode="sum"),
                "nested": EmbeddingOption(2),
            }
            self.engine = EmbeddingEngine(options)

        def forward(self, batch):
            return self.engine(batch)

    model, random = Shapes(), torch.Generator().manual_seed(0)
    nested = torch.arange(4), torch.tensor([0, 1, 1, 4]), torch.tensor([0, 0, 1, 3])
    batch = {
        "rows": torch.randint(9, (3, 2), generator=random),
        "many": torch.randint(9, (3, 2, 4), generator=random),
        "ragged": Jagged(torch.arange(4), torch.tensor([0, 1, 1, 4])),
        "bags": NestedJagged(*nested),
        "nested": NestedJagged(*nested),
        "other": torch.ones(3),
    }
    expected = model(batch)
    model.eval()
    program = torch.export.export(model, (batch,), strict=strict).module()
    found = program(batch)
    assert type(torch.compile(model, backend="eager", fullgraph=True)(batch)["bags"]) is Jagged
    assert list(found) == list(expected)
    assert found["rows"].shape == (3, 2, 2)
    assert found["many"].shape == (3, 2, 2)
    assert isinstance(found["ragged"], Jagged)
    assert isinstance(found["bags"], Jagged)
    assert isinstance(found["nested"], NestedJagged)
    for one, other in zip(
        torch.utils._pytree.tree_leaves(found),
        torch.utils._pytree.tree_leaves(expected),
        strict=True,
    ):
        assert one is other or one.equal(other)


def feature(table, ids, **changed):
    given = RecordedFeature(ids, None, None, table, 2, "float32", "none", 0, None)
    return given._replace(**changed)


def test_a_name_of_two_tables_is_an_error_until_one_is_bound():
    one, other = HashTable(2, name="twin"), HashTable(2, name="twin")
    other.insert(torch.tensor([1]), torch.ones(1, 2))
    asked = [feature("twin", torch.tensor([1]))]
    with pytest.raises(RuntimeError, match=r"'twin'.* 2 alive are called so"):
        run(asked)
    with Binding({"twin": other}) as binding:
        assert binding.names == ["twin"]
        assert run(asked)[0].tolist() == [[1, 1]]
        with pytest.raises(ValueError, match="'twin' is bound already"):
            Binding({"twin": one})
    with pytest.raises(RuntimeError, match="alive"):
        run(asked)
    assert find_table(key_of(one, is_exported=False)) is one


def test_a_copy_does_not_take_the_name_of_its_table():
    from copy import deepcopy

    table = HashTable(2, name="original")
    copied = deepcopy(table)
    assert find_table("original") is table
    assert find_table(key_of(copied, is_exported=False)) is copied


def test_a_table_of_other_rows_is_refused():
    table = HashTable(3, name="wide")
    with pytest.raises(RuntimeError, match=r"'wide'.* 2 x float32.* 3 x float32"):
        run([feature("wide", torch.tensor([1]))])
    assert len(table) == 0


def test_outputs_are_as_the_fake_ones():
    """Torch's own check of an operator: schema, aliases, shapes and dtypes of fake outputs."""
    engine = EmbeddingEngine(
        {"a": EmbeddingOption(2, mode="sum"), "b": EmbeddingOption(2, mode="tile", tile_len=2)}
    )
    engine({"a": torch.arange(6).view(3, 2), "b": torch.arange(6).view(3, 2)})
    asked = [
        feature("a", torch.arange(5), offsets=torch.tensor([0, 2, 5]), mode="sum"),
        feature("b", torch.arange(6).view(3, 2), mode="tile", tile_len=2, padding_idx=1),
        feature("a", torch.empty(0, dtype=torch.int64)),
    ]
    captured = []

    class Capture(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            captured.append((func, args))
            return func(*args, **(kwargs or {}))

    with Capture():
        outputs = record(asked)
    assert [tuple(output.shape) for output in outputs] == [f.output_shape() for f in asked]
    func, args = next((f, args) for f, args in captured if "look_up" in str(f))
    torch.library.opcheck(func, args)
