"""Lists of sources: which part comes from which, all of it or nothing."""

import copy
import os
import threading

import numpy as np
import pytest
import torch
from torch import nn

from recis_lightning import HashTable, checkpoint
from recis_lightning.checkpoint import Source, load_sources
from recis_lightning.checkpoint.source_loader import SourceLoader
from recis_lightning.eviction import GlobalStepFilter
from recis_lightning.optim import SparseAdagrad, SparseAdam
from tests.helpers import rank_checkpoints
from tests.helpers.lightning_model import differences, everything


class Net(nn.Module):
    """Two tables and a tower, all of whose values are a number at first."""

    def __init__(self, value=0.0, ids=(), names=("user", "item"), optimizer=SparseAdam):
        super().__init__()
        self.a = HashTable(2, name=names[0], eviction=GlobalStepFilter(9))
        self.b = HashTable(3, name=names[1])
        self.tower = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        self.optimizer = None if optimizer is None else optimizer([self.a, self.b], lr=0.1)
        for tensor in self.tower.state_dict().values():
            tensor.fill_(value)
        for table in (self.a, self.b):
            self.fill(table, ids, value)

    def fill(self, table, ids, value):
        ids = torch.tensor(ids, dtype=torch.int64)
        table.insert(ids, torch.full((len(ids), table.embedding_dim), float(value)))
        rows = table.ids_map()[1]
        weights, slots = table.storage.rows.read(rows)
        slots = {name: torch.full_like(slot, value + 0.5) for name, slot in slots.items()}
        table.storage.rows.write(rows, weights, slots)


def ckpt(path, net):
    """Save a module as Lightning does."""
    torch.save({"state_dict": net.state_dict()}, path)
    return path


def rows(table):
    """Return the first weight of each row, by id."""
    ids = table.ids()
    return dict(zip(ids.tolist(), table.embeddings(ids)[:, 0].tolist(), strict=True))


def state(table, name="exp_avg"):
    ids, places = table.ids_map()
    slot = table.storage.rows.read(places)[1][name]
    return dict(zip(ids.tolist(), slot[:, 0].tolist(), strict=True))


def test_later_sources_win(tmp_path, capsys):
    """Each part comes from the last that has it; the plan says so before anything changes."""
    one = ckpt(tmp_path / "1.ckpt", Net(1, [1, 2]))
    two = ckpt(tmp_path / "2.ckpt", Net(2, [2, 3]))
    net = Net(9, [7])
    load_sources(net, [Source(one), Source(two, load=["item", "tower.0.*"])])
    assert rows(net.a) == {1: 1.0, 2: 1.0}
    assert rows(net.b) == {2: 2.0, 3: 2.0}
    assert state(net.a) == {1: 1.5, 2: 1.5}
    assert net.tower[0].weight.unique().tolist() == [2.0]
    assert net.tower[1].weight.unique().tolist() == [1.0]
    assert int(net.tower[1].num_batches_tracked) == 1
    assert capsys.readouterr().out.splitlines() == [
        "Loading from 2 sources, later ones win:",
        f"  1. {one}:",
        "    user: 2 rows of dim 2, with optimizer state (exp_avg, exp_avg_sq)",
        "    dense: tower.1.weight, tower.1.bias, tower.1.running_mean, tower.1.running_var, "
        "tower.1.num_batches_tracked",
        "    from a later one: item, tower.0.bias, tower.0.weight",
        f"  2. {two}:",
        "    item: 2 rows of dim 3, with optimizer state (exp_avg, exp_avg_sq)",
        "    dense: tower.0.weight, tower.0.bias",
        "    not loaded: user, tower.1.weight, tower.1.bias, tower.1.running_mean, "
        "tower.1.running_var, tower.1.num_batches_tracked",
    ]


def test_names_are_chosen_and_renamed(tmp_path, capsys):
    """Tables and dense tensors alike; excluded state starts afresh."""
    old = Net(1, [1], names=("old_user", "old_item"))
    saved = {f"net.{name}": value for name, value in old.state_dict().items()}
    torch.save(saved, tmp_path / "old.pt")
    net = Net(9, [7])
    exclude = ["*.bias", "old_user.exp_avg_sq"]
    rename = {"old_*": "*", "net.tower.*": "tower.*"}
    load_sources(net, [Source(tmp_path / "old.pt", exclude=exclude, rename=rename)])
    assert rows(net.a) == rows(net.b) == {1: 1.0}
    assert (state(net.a), state(net.b)) == ({1: 0.0}, {1: 1.5})
    assert net.tower[0].weight.unique().tolist() == [1.0]
    assert net.tower[0].bias.unique().tolist() == [9.0]
    assert "user <- old_user: 1 rows of dim 2, without optimizer state" in capsys.readouterr().out
    folder = tmp_path / "folder"
    checkpoint.save(folder, old)
    net = Net(9, [7])
    load_sources(net, [Source(folder, load=["old_item"], rename={"old_item": "item"})])
    assert (rows(net.a), rows(net.b)) == ({7: 9.0}, {1: 1.0})
    assert "tables left as they are: user" in capsys.readouterr().out


def test_rows_on_top_of_those_that_are_there(tmp_path):
    """``clear=False``: ids of the source get its rows and state, the others keep theirs."""
    one = ckpt(tmp_path / "1.ckpt", Net(1, [1, 2]))
    two = ckpt(tmp_path / "2.ckpt", Net(2, [2, 3]))
    net = Net(9, [2, 7])
    net.a.update_step(5)
    load_sources(net, [Source(two, load=["user"], clear=False)])
    assert rows(net.a) == {7: 9.0, 2: 2.0, 3: 2.0}
    assert state(net.a) == {7: 9.5, 2: 2.5, 3: 2.5}
    assert (net.a.step, rows(net.b)) == (5, {2: 9.0, 7: 9.0})
    assert net.a.last_seen(torch.tensor([7, 2, 3])).tolist() == [0, 5, 5]
    load_sources(net, [Source(one), Source(two, clear=False, exclude=["*.exp_avg"])])
    assert rows(net.a) == rows(net.b) == {1: 1.0, 2: 2.0, 3: 2.0}
    assert state(net.a) == {1: 1.5, 2: 0.0, 3: 0.0}
    np.savez(tmp_path / "user.npz", ids=[3, 4], weights=np.full((2, 2), 4.0))
    load_sources(net, [Source(tmp_path / "user.npz", clear=False)])
    assert rows(net.a) == {1: 1.0, 2: 2.0, 3: 4.0, 4: 4.0}


def test_state_of_another_optimizer_starts_afresh(tmp_path, capsys):
    file = ckpt(tmp_path / "1.ckpt", Net(1, [1], optimizer=SparseAdagrad))
    net = Net(9, [7])
    load_sources(net, [Source(file)])
    assert rows(net.a) == {1: 1.0}
    assert state(net.a) == {1: 0.0}
    assert "without optimizer state (sum)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"load": ["usr"]}, r"load: it has no 'usr'; .*; it has \[user, item, tower.0.weight"),
        ({"load": ["x*"]}, r"load: it has no 'x\*'; nothing of it has a place in the model"),
        ({"rename": {"x_*": "y_*"}}, r"rename: it has no 'x_\*'"),
        ({"rename": {"user": "customer"}}, "the model has no 'customer' for its 'user'"),
        (
            {"rename": {"tower.0.bias": "tower.1.bias"}},
            "both 'tower.0.bias' and 'tower.1.bias'",
        ),
        ({"rename": {"tower.0.weight": "user"}}, "the model has no 'user' for its 'tower.0.we"),
        ({"rename": {"user": "item", "item": "user"}}, "has embedding_dim=3, it has 2"),
        ({"rename": {"tower.0.weight": "tower.0.bias"}, "exclude": ["tower.0.bias"]}, r"shape \[2"),
    ],
)
def test_what_does_not_fit_changes_nothing(tmp_path, arguments, message):
    """Whichever source it is, and whatever came before it in the list."""
    file, net = ckpt(tmp_path / "1.ckpt", Net(1, [1])), Net(9, [7])
    before = copy.deepcopy(everything(net))
    for sources in ([Source(file, **arguments)], [Source(file), Source(file, **arguments)]):
        with pytest.raises(ValueError, match=message):
            load_sources(net, sources)
        assert differences(before, everything(net)) == []


def test_a_source_that_is_damaged_changes_nothing(tmp_path):
    """Rows are checked when they are read, after others were loaded."""
    good, bad = ckpt(tmp_path / "1.ckpt", Net(1, [1])), tmp_path / "bad"
    checkpoint.save(bad, Net(2, range(3000)))
    (file,) = bad.glob("user*")
    content = bytearray(file.read_bytes())
    content[-9] ^= 1
    file.write_bytes(content)
    for clear in (True, False):
        net = Net(9, [7])
        before = copy.deepcopy(everything(net))
        with pytest.raises(ValueError, match="is damaged"):
            load_sources(net, [Source(good, exclude=["user"]), Source(bad, clear=clear)])
        assert differences(before, everything(net)) == []


def test_an_interrupt_changes_nothing(tmp_path, monkeypatch):
    """Between dense tensors and tables, too."""
    files = [ckpt(tmp_path / f"{i}.ckpt", Net(i, [i])) for i in (1, 2)]
    net, copy_ = Net(9, [7]), torch.Tensor.copy_
    before, calls = copy.deepcopy(everything(net)), []

    def interrupted(self, *args, **kwargs):
        calls.append(self)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return copy_(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "copy_", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load_sources(net, [Source(file) for file in files])
    monkeypatch.undo()
    assert len(calls) > 2
    assert differences(before, everything(net)) == []


def test_what_is_missing_may_be_passed_over(tmp_path, capsys):
    file, net = ckpt(tmp_path / "1.ckpt", Net(1, [1])), Net(9, [7])
    with pytest.raises(FileNotFoundError, match=r"source .*none.ckpt: .* no such file or folder"):
        load_sources(net, [Source(file), Source(tmp_path / "none.ckpt")])
    sources = [
        Source(tmp_path / "none.ckpt", skip_missing=True),
        Source(file, load=["user", "usr"], rename={"x": "y"}, skip_missing=True),
    ]
    load_sources(net, sources)
    assert (rows(net.a), rows(net.b)) == ({1: 1.0}, {7: 9.0})
    assert f"1. {tmp_path}/none.ckpt: not there, passed over" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", [None, "a.ckpt", ["a.ckpt"], Source, {"path": "a"}])
def test_what_is_no_list_of_sources(wrong):
    with pytest.raises(TypeError, match=r"sources: expected a list of Source\(path, ...\), got"):
        load_sources(Net(), wrong)


def test_the_newest_of_a_folder(tmp_path):
    """And what is newer than what was loaded, by whatever name."""
    bank = tmp_path / "bank"
    bank.mkdir()
    net, loader = Net(9, [7]), SourceLoader([Source(bank)])
    with pytest.raises(FileNotFoundError, match="no checkpoint, and no folder with checkpoints"):
        loader.load(net)
    ckpt(bank / "b.ckpt", Net(1, [1]))
    (bank / "notes.txt").write_text("no checkpoint")
    assert loader.load(net)
    assert rows(net.a) == {1: 1.0}
    assert not loader.load(net, only_newer=True)
    ckpt(bank / "a.ckpt", Net(2, [2]))
    later = os.stat(bank / "b.ckpt").st_mtime_ns + 10**9
    os.utime(bank / "a.ckpt", ns=(later, later))
    assert loader.load(net, only_newer=True)
    assert rows(net.a) == {2: 2.0}
    checkpoint.save(bank / "c", Net(3, [3]))
    os.utime(bank / "c" / "checkpoint.json", ns=(later + 10**9,) * 2)
    assert loader.load(net, only_newer=True)
    assert rows(net.a) == {3: 3.0}
    checkpoint.save(bank / "c", Net(4, [4]))
    os.utime(bank / "c" / "checkpoint.json", ns=(later + 2 * 10**9,) * 2)
    assert loader.load(net, only_newer=True)
    assert rows(net.a) == {4: 4.0}


def test_a_newer_source_leaves_later_ones_alone(tmp_path):
    """A part belongs to the last source that brings it, changed or not."""
    one, two = tmp_path / "1.ckpt", tmp_path / "2.ckpt"
    ckpt(one, Net(1, [1]))
    ckpt(two, Net(2, [2]))
    net = Net(9, [7])
    loader = SourceLoader([Source(one), Source(two, load=["item"])])
    loader.load(net)
    net.fill(net.b, [5], 5)  # as training would
    ckpt(one, Net(3, [3]))
    assert loader.load(net, only_newer=True)
    assert (rows(net.a), rows(net.b)) == ({3: 3.0}, {2: 2.0, 5: 5.0})


def test_threads_that_read_meanwhile(tmp_path):
    """A lookup sees all rows of one source or of the other."""
    many = list(range(2000))
    files = [ckpt(tmp_path / f"{i}.ckpt", Net(i, many)) for i in (1, 2)]
    net, seen, stop = Net(1, many).eval(), set(), threading.Event()
    ids = torch.tensor(many)

    def read():
        while not stop.is_set():
            seen.add(tuple(net.a.embeddings(ids).unique().tolist()))

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for clear in (True, False):
            for file in files:
                load_sources(net, [Source(file, load=["user"], clear=clear)])
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert seen <= {(1.0,), (2.0,)}


def test_on_ranks(tmp_path, ranks):
    """Each takes what it owns, of files that any number of ranks wrote; all fail together."""
    made, _optimizers = rank_checkpoints.filled(count=600)
    checkpoint.save(tmp_path / "whole", made)
    ids, weights = made[0].ids(), made[0].embeddings(made[0].ids())
    np.savez(tmp_path / "adam.npz", ids=ids[::2], weights=2 * weights[::2].numpy())
    answers = ranks.run(2, rank_checkpoints.load_from_sources, tmp_path, timeout_s=200)
    found = {int(i): w for answer in answers for i, w in answer["rows"]}
    assert len(found) == len(ids)
    expected = weights.clone()
    expected[::2] *= 2
    assert found == dict(zip(ids.tolist(), expected[:, 0].tolist(), strict=True))
    assert all(answer["printed"] == (rank == 0) for rank, answer in enumerate(answers))
    assert all(answer["unchanged"] for answer in answers)
    assert [answer["error"].split(":")[0] for answer in answers] == ["RuntimeError", "MemoryError"]
