"""Loads of a part of a checkpoint: asked for by name, printed, and all or nothing."""

import pytest
import torch

from recis_lightning import HashTable, checkpoint
from recis_lightning.checkpoint.progress import no_progress
from recis_lightning.optim import SparseAdagrad, SparseAdam
from recis_lightning.table import state as table_state
from tests.helpers.sample_tables import same, settings_of

IDS = torch.arange(20)


def tables(*names, dtype=torch.float32, optimizer=SparseAdam, dim=3):
    made = [HashTable(dim, name=name, dtype=dtype) for name in names]
    if optimizer is not None:
        made[0].kept = optimizer(made, lr=0.1)
    return made


def held(made):
    return {table.name: {**table.get_extra_state(), **settings_of(table)} for table in made}


@pytest.fixture(params=["folder", "file"])
def saved(tmp_path, request):
    """Return a checkpoint of three trained tables, and the tables."""
    made = tables("user", "item", "tags")
    for number, table in enumerate(made):
        table.insert(IDS + number, torch.full((20, 3), number + 1 / 3))
        table.storage.rows.write(
            torch.arange(20),
            torch.full((20, 3), number + 1 / 3),
            {"exp_avg": torch.ones(20, 3), "exp_avg_sq": torch.ones(20, 3)},
        )
        table.update_step(5)
    if request.param == "folder":
        checkpoint.save(tmp_path, made)
        return tmp_path, made
    state = {f"{table.name}._extra_state": table.get_extra_state() for table in made}
    torch.save(state, tmp_path / "a.ckpt")
    return tmp_path / "a.ckpt", made


def test_some_tables(saved, capsys):
    """The others of the model stay as they are."""
    path, made = saved
    loaded = tables("user", "other", "item")
    loaded[1].insert(IDS, torch.zeros(20, 3))
    before = held(loaded)
    checkpoint.load(path, loaded, tables=["item", "user"])
    assert same(loaded[0].get_extra_state(), made[0].get_extra_state())
    assert same(loaded[2].get_extra_state(), made[1].get_extra_state())
    assert same(held(loaded)["other"], before["other"])
    assert capsys.readouterr().out == (
        f"Loading 2 of 3 tables of {path}:\n"
        "  item: 20 rows of dim 3\n"
        "  user: 20 rows of dim 3\n"
        "  not loaded: tags\n"
        "  left as they are: other\n"
    )


def test_renamed(saved, capsys):
    """A table keeps its own name; so does the key of its new rows."""
    path, made = saved
    loaded = tables("customer", "item", "tags")
    checkpoint.load(path, loaded, rename={"user": "customer"})
    assert loaded[0].name == loaded[0].get_extra_state()["name"] == "customer"
    for one, other in zip(made, loaded, strict=True):
        assert torch.equal(one.embeddings(IDS), other.embeddings(IDS))
    assert "  customer <- user: 20 rows of dim 3" in capsys.readouterr().out
    swapped = tables("user", "item", "tags")
    checkpoint.load(path, swapped, rename={"user": "item", "item": "user"})
    assert torch.equal(swapped[1].embeddings(IDS), made[0].embeddings(IDS))


def test_without_optimizer_state(saved, capsys):
    """Rows alone, for another optimizer; its state starts afresh."""
    path, made = saved
    loaded = tables("user", "item", "tags", optimizer=SparseAdagrad)
    checkpoint.load(path, loaded, optimizer_state=False)
    assert torch.equal(loaded[2].embeddings(IDS), made[2].embeddings(IDS))
    assert loaded[0].num_updates == 0
    assert loaded[0].step == 5
    assert loaded[0].get_extra_state()["slots"]["sum"].tolist() == [[0.0] * 3] * 20
    assert "without optimizer state (exp_avg, exp_avg_sq)" in capsys.readouterr().out
    again = tables("user", "item", "tags")
    checkpoint.load(path, again, optimizer_state=False)
    assert not again[0].get_extra_state()["slots"]["exp_avg"].any()


def test_cast(saved, capsys):
    """float32 is rounded to bfloat16 where that is asked for."""
    path, made = saved
    loaded = tables("user", "item", "tags", dtype=torch.bfloat16)
    checkpoint.load(path, loaded, cast="bfloat16")
    for one, other in zip(made, loaded, strict=True):
        assert torch.equal(one.embeddings(IDS).bfloat16(), other.embeddings(IDS))
    assert "user: 20 rows of dim 3, float32 -> bfloat16" in capsys.readouterr().out
    assert loaded[0].get_extra_state()["slots"]["exp_avg"].all()


def test_a_whole_load_prints_nothing(saved, capsys):
    """Also with the model under the name that the argument had."""
    path, made = saved
    loaded = tables("user", "item", "tags")
    checkpoint.load(path, tables=loaded)
    assert same(by_name(loaded), by_name(made))
    assert capsys.readouterr().out == ""


def by_name(made):
    return {table.name: table.get_extra_state() for table in made}


@pytest.mark.parametrize(
    ("arguments", "names", "message"),
    [
        ({"tables": ["uesr"]}, ["user"], r"tables: .* has the tables \[.*\], got \['uesr'\]"),
        ({"tables": ["user"]}, ["item"], r"\['user'\] have no place; give tables"),
        ({}, ["user"], r"\['item', 'tags'\] have no place; give tables=\[...\] to load some"),
        ({}, ["user", "item", "tags", "x"], r"\['x'\] would get no rows"),
        ({"rename": {"uesr": "user"}}, ["user"], r"rename: .* has the tables .*\['uesr'\]"),
        ({"rename": {"user": "x"}}, ["user"], r"rename: the model has the tables \['user'\]"),
        (
            {"tables": ["user", "item"], "rename": {"user": "item"}},
            ["item"],
            "rename: expected one saved table for each",
        ),
        ({"tables": ["item"], "rename": {"user": "item"}}, ["item"], r"got \['user'\] too"),
        ({"cast": "float16"}, ["user", "item", "tags"], "cast: expected torch.float32"),
    ],
)
def test_what_is_refused(saved, arguments, names, message):
    """Names that are not there, and anything that was not asked for; nothing changes."""
    path, _ = saved
    loaded = tables(*names)
    before = held(loaded)
    with pytest.raises(ValueError, match=message):
        checkpoint.load(path, loaded, **arguments)
    assert same(held(loaded), before)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ({"optimizer": SparseAdagrad}, r"table 'tags': .* state {'exp_avg': 3, 'exp_avg_sq': 3}, "),
        ({"dtype": torch.bfloat16}, r"table 'tags': .* has dtype torch.float32, the model's "),
        ({"dim": 2}, r"table 'tags'.* embedding_dim=.*"),
    ],
)
def test_another_layout_is_refused(saved, kind, message):
    """Of one table among others, in a folder and in Lightning's file; nothing changes."""
    path, _ = saved
    loaded = [*tables("user", "item"), *tables("tags", **kind)]
    before = held(loaded)
    with pytest.raises(ValueError, match=message):
        checkpoint.load(path, loaded)
    assert same(held(loaded), before)


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("number", [1, 2])
def test_a_load_that_ends_on_its_way_changes_no_table(saved, monkeypatch, error, number):
    """Nor one that was loaded by then; and they train on."""
    path, _ = saved
    loaded, others = tables("user", "item", "tags"), tables("user", "item", "tags")
    for table in (*loaded, *others):
        table.insert(IDS + 7, torch.ones(20, 3))
        table.update_step(2)
    before, replaced, replace = held(loaded), [], table_state._replace

    def fail(table, *arguments):
        if len(replaced) == number:
            raise error
        replaced.append(table)
        replace(table, *arguments)

    monkeypatch.setattr(table_state, "_replace", fail)
    with pytest.raises(error):
        checkpoint.load(path, loaded, progress=no_progress)
    assert replaced == loaded[:number]
    assert same(held(loaded), before)
    for table in (*loaded, *others):
        table(IDS).sum().backward()
    loaded[0].kept.step()
    others[0].kept.step()
    assert same(held(loaded), held(others))


def test_two_tables_of_one_name_in_a_file(tmp_path):
    """They are no checkpoint by name; one table of two modules is."""
    one, other = tables("user")[0], tables("user")[0]
    other.insert(IDS, torch.ones(20, 3))
    for first, second in ((one, other), (one, one)):
        state = {
            "a.table._extra_state": first.get_extra_state(),
            "b.table._extra_state": second.get_extra_state(),
        }
        torch.save({"state_dict": state}, tmp_path / f"{first is second}.ckpt")
    with pytest.raises(ValueError, match="two of its tables have the name 'user', and tables are"):
        checkpoint.inspect(tmp_path / "False.ckpt")
    assert checkpoint.inspect(tmp_path / "True.ckpt")["user"].rows == [0]


@pytest.mark.parametrize("rename", [["user"], "user", []])
def test_rename_is_a_dict(saved, rename):
    path, _ = saved
    with pytest.raises(TypeError, match="rename: expected a dict, name that was saved -> name in"):
        checkpoint.load(path, tables("user"), rename=rename)


@pytest.mark.parametrize("names", ["user", [HashTable(3)], [3]])
def test_names_are_names(saved, names):
    path, _ = saved
    with pytest.raises(TypeError, match="tables: expected a list of names of saved tables, got"):
        checkpoint.load(path, tables("user"), tables=names)


def test_all_or_nothing(saved):
    """One table of another dim: none is loaded, and nothing is printed."""
    path, _ = saved
    loaded = [*tables("user"), *tables("item", dim=4)]
    loaded[0].insert(IDS, torch.zeros(20, 3))
    before = by_name(loaded)
    with pytest.raises(ValueError, match=r"embedding_dim=(4, it has 3|3, the model's 4)"):
        checkpoint.load(path, loaded, tables=["user", "item"], optimizer_state=False)
    assert same(by_name(loaded), before)


def test_a_part_of_a_checkpoint_that_is_damaged_elsewhere(tmp_path):
    """Files of tables that are not loaded are not read, whether there are rows or none."""
    made = tables("user", "item")
    for table in made:
        table.insert(IDS, torch.ones(20, 3))
    checkpoint.save(tmp_path, made)
    (file,) = tmp_path.glob("item.*.safetensors")
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    for loaded in (tables("user"), made):
        checkpoint.load(tmp_path, loaded, tables=["user"])
        assert loaded[0].embeddings(IDS).eq(1).all()
    with pytest.raises(ValueError, match="is damaged"):
        checkpoint.load(tmp_path, made)
