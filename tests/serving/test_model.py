"""Served models: the trainer's values, on threads, in a fresh process, from damaged folders."""

import copy
import json
import pickle
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from recis_lightning import DynamicEmbedding, hash_tables, serving
from recis_lightning.serving.manifest import Manifest, _checksum
from tests.helpers.served_model import make_batch, trained_model

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Return a model and the folder that it was exported to."""
    folder = tmp_path_factory.mktemp("served")
    model = trained_model()
    serving.export(model, folder, example=make_batch(5, seed=1))
    return model, folder


@pytest.fixture
def copied(exported, tmp_path):
    """Return a folder of one's own."""
    return Path(shutil.copytree(exported[1], tmp_path / "served"))


@pytest.mark.parametrize("size", [0, 1, 2, 5, 64])
def test_scores_are_those_of_the_model_to_the_bit(exported, size):
    """Jagged, weighted, padded, unknown and int32 ids, in batches of any size, none included."""
    model, folder = exported
    batch = make_batch(size, seed=size)
    scores = serving.load(folder)(batch)
    assert scores.equal(model(batch))
    assert not scores.requires_grad
    by_path = serving.load(str(folder), check_all=True)
    assert by_path(batch).equal(scores)


def test_any_integer_ids_may_be_served(exported):
    """int32 and int64, whatever the example had."""
    model, folder = exported
    batch = make_batch(6, seed=2)
    other = {**batch, "item": batch["item"].long(), "user": batch["user"].int()}
    assert serving.load(folder)(other).equal(model(batch))


def test_what_the_model_does_not_use_may_be_missing(exported):
    model, folder = exported
    served, batch = serving.load(folder), make_batch(4, seed=3)
    scores = model(batch)
    assert served({key: value for key, value in batch.items() if key != "label"}).equal(scores)
    assert served({**batch, "more": "anything", "label": None}).equal(scores)
    ids, _ = batch["unweighted"]
    assert served({**batch, "unweighted": (ids, None)}).equal(scores)


def test_an_argument_that_does_not_fit_is_named(exported):
    served, batch = serving.load(exported[1]), make_batch(4, seed=3)
    history = batch["history"]
    for changed, error, message in [
        ({"user": batch["user"].float()}, TypeError, r"batch\['user'\]: expected torch.int64"),
        ({"user": [1, 2]}, TypeError, r"batch\['user'\]: expected a Tensor"),
        ({"user": batch["user"][None]}, ValueError, r"batch\['user'\]: expected the shape"),
        ({"history": history._replace(weights=None)}, TypeError, r"\['history'\].weights"),
        ({"short": history}, ValueError, r"batch\['short'\]\[2\]: expected None"),
        ({"history": history._replace(offsets=history.offsets + 1)}, ValueError, "offsets"),
    ]:
        with pytest.raises(error, match=message):
            served({**batch, **changed})
    with pytest.raises(ValueError, match=r"batch: missing \['user'\]"):
        served({key: value for key, value in batch.items() if key != "user"})
    with pytest.raises(TypeError, match=r"takes \(batch\), got 2"):
        served(batch, batch)


def test_threads_score_batches_of_mixed_sizes(exported):
    """Sixteen at once, from files that nobody has checked yet."""
    model, folder = exported
    served = serving.load(folder)
    batches = [make_batch(size, seed=size) for size in range(24)]
    expected = [model(batch).detach() for batch in batches]
    wrong, start = [], threading.Barrier(16)

    def work(thread):
        start.wait()
        for i in range(30):
            number = (7 * thread + i) % len(batches)
            if not served(batches[number]).equal(expected[number]):
                wrong.append((thread, number))

    threads = [threading.Thread(target=work, args=(thread,)) for thread in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


FRESH = """
import sys
import torch
from recis_lightning import serving
folder, given = sys.argv[1:]
served = serving.load(folder)
batch, scores = torch.load(given, weights_only=True)
assert served(batch).equal(scores)
loaded = sorted({name.partition(".")[0] for name in sys.modules})
assert not {"lightning", "pytorch_lightning", "triton", "numba", "llvmlite"} & set(loaded), loaded
assert not {"torch._dynamo", "torchmetrics"} & set(sys.modules)
assert not [name for name in sys.modules if name.startswith("recis_lightning.ops.gpu")]
assert not [name for name in sys.modules if name.startswith("recis_lightning.ops.cpu")]
"""


def test_a_fresh_process_needs_no_lightning_and_compiles_nothing(exported, tmp_path):
    model, folder = exported
    batch = make_batch(7, seed=7)
    torch.save((batch, model(batch).detach()), tmp_path / "given.pt")
    command = [sys.executable, "-c", FRESH, str(folder), str(tmp_path / "given.pt")]
    subprocess.run(command, check=True, cwd=ROOT)


def test_an_exported_program_may_be_bound_to_a_served_folder(exported):
    model, folder = exported
    (table,) = hash_tables(model.user)
    program = torch.export.export(
        model.user, (torch.arange(3),), dynamic_shapes=({0: torch.export.Dim.AUTO},)
    ).module()
    table.insert(torch.tensor([77]), torch.ones(1, 4))
    ids = torch.tensor([77, 3, 0, -1])
    try:
        with serving.bind(model):
            assert program(ids).equal(model.user(ids))
        with serving.bind(serving.load(folder)):
            found = program(ids)
        assert not found[0].any()
        assert found[1:].equal(model.user(ids[1:]))
    finally:
        table.delete(torch.tensor([77]))


# ---- hostile folders


def rewrite(folder, change):
    """Change a manifest's state, and give it a right checksum."""
    path = folder / "manifest.json"
    state = json.loads(path.read_text())
    state.pop("checksum")
    change(state)
    path.write_text(json.dumps({**state, "checksum": _checksum(state)}))


def set_in(*path):
    """Return a change of one entry: the keys to it, and its value."""

    def change(state):
        *keys, last, value = path
        for key in keys:
            state = state[key]
        state[last] = value

    return change


HOSTILE = {
    "another format": set_in("format", "zip"),
    "a later version": set_in("version", 99),
    "transforms of later": set_in("transforms", [{"kind": "hash"}]),
    "a path": set_in("tables", "user", "file", "file", "../user.rows"),
    "a file's size": set_in("tables", "user", "file", "size", 1 << 40),
    "rows of another width": set_in("tables", "user", "embedding_dim", 1 << 20),
    "a row format": set_in("tables", "user", "row_format", "float64"),
    "a row dtype": set_in("tables", "user", "dtype", "int64"),
    "a number of rows": set_in("tables", "user", "num_rows", -1),
    "an unknown field": set_in("tables", "user", "more", 1),
    "no tables": set_in("tables", {}),
    "no list of tables": set_in("tables", None),
    "a weight of another dtype": set_in("constants", "model.tower.bias", "float64"),
    "a weight that is missing": set_in("constants", {}),
    "no inputs": set_in("inputs", []),
    "an input's dtype": set_in("inputs", 0, "dtype", "object"),
    "outputs of more": set_in("outputs", {"tensor": 7}),
    "deep outputs": set_in(
        "outputs", json.loads('{"tuple": [' * 40 + '{"none": true}' + "]}" * 40)
    ),
    "a program that runs more": set_in(
        "program", "calls", 0, ["aten::from_file.default", ["/etc/passwd"], {}]
    ),
    "a name that is none": set_in("features", [1]),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_manifest_is_refused(copied, kind):
    """Its checksum is right: anyone can write one."""
    rewrite(copied, HOSTILE[kind])
    with pytest.raises(ValueError, match=str(copied)[:10] if kind == "a path" else "."):
        serving.load(copied)


@pytest.mark.parametrize("change", ["flip", "cut", "empty", "no json", "missing", "folder"])
def test_a_damaged_manifest_is_refused(copied, change):
    path = copied / "manifest.json"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    if change in ("missing", "folder"):
        path.unlink()
        if change == "folder":
            path.mkdir()
    else:
        cut = {"cut": bytes(data[:-9]), "empty": b"", "no json": b"[" * 100_000}
        path.write_bytes(cut.get(change, bytes(data)))
    with pytest.raises(ValueError, match="manifest"):
        serving.load(copied)


@pytest.mark.parametrize("suffix", [".rows", ".weights"])
def test_a_flipped_bit_in_any_file_is_refused_before_it_is_used(copied, suffix):
    """By load with ``check_all``, and otherwise by the first score that reads it."""
    for path in sorted(copied.glob(f"*{suffix}")):
        whole = path.read_bytes()
        data = bytearray(whole)
        data[len(data) // 3] ^= 4
        path.write_bytes(data)
        with pytest.raises(ValueError, match="damaged"):
            serving.load(copied, check_all=True)
        with pytest.raises(ValueError, match="damaged"):
            serving.load(copied)(make_batch(64, seed=0))
        path.write_bytes(whole)
    serving.load(copied, check_all=True)


def test_files_of_another_export_are_refused(copied, exported, tmp_path):
    serving.export(trained_model(), tmp_path / "other", example=make_batch(4, seed=2))
    one = next(copied.glob("user.*.rows"))
    other = next((tmp_path / "other").glob("tags.*.rows"))
    one.write_bytes(other.read_bytes())
    with pytest.raises(ValueError, match=r"user\..*rows"):
        serving.load(copied)


def test_a_manifest_is_read_as_it_was_written(exported):
    manifest = Manifest.read(exported[1])
    assert manifest.model == "Model"
    assert sorted(manifest.tables) == ["fixed", "item", "short", "tags", "tiles", "user"]
    assert "history" in manifest.features
    assert "label" in manifest.features
    assert manifest.versions["torch"] == str(torch.__version__)


# ---- another device


def test_a_device_that_is_not_there_is_refused(exported, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for device, words in [("cuda", "no GPU here"), ("meta", "got 'meta'"), ("x", "got 'x'")]:
        for opened in (serving.load, serving.follow):
            with pytest.raises(ValueError, match=f"device: .*{words}"):
                opened(exported[1], device=device)
    assert serving.load(exported[1], device=torch.device("cpu")).device.type == "cpu"


@pytest.mark.gpu
def test_a_model_computes_on_a_gpu(exported):
    """Lookups are the CPU's; ids may be on either."""
    model, folder = exported
    batch = make_batch(7, seed=7)
    expected = model(batch).detach()
    with serving.follow(folder, poll_seconds=None, device="cuda") as followed:
        for served in (serving.load(folder, device="cuda"), followed):
            for given in (batch, {**batch, "user": batch["user"].cuda()}):
                found = served(given)
                assert found.device.type == "cuda"
                torch.testing.assert_close(found.cpu(), expected)


def test_copies_and_pickles_are_of_the_folder(exported):
    model, folder = exported
    served, batch = serving.load(folder), make_batch(4, seed=8)
    assert copy.copy(served) is copy.deepcopy(served) is served
    opened = pickle.loads(pickle.dumps(served))
    assert opened.folder == folder
    assert opened(batch).equal(model(batch))
    behind = served.with_values(served.tables, {}, step=3)
    with pytest.raises(TypeError, match="the version of step 3 is not pickled; pickle the model"):
        pickle.dumps(behind)


def test_entries_of_differing_lengths_are_named(exported):
    batch = make_batch(4, seed=8)
    shorter = {**batch, "price": batch["price"][:3]}
    with pytest.raises(ValueError, match=r"as many samples each, .*'price'\]\": 3"):
        serving.load(exported[1])(shorter)


def test_a_small_request_calls_torch_for_the_dense_part_alone(tmp_path):
    """A call of torch releases the interpreter's lock, and waits until other requests let it go."""
    called = []

    class Note(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            called.append(func.name())
            return func(*args, **(kwargs or {}))

    model = nn.Sequential(DynamicEmbedding(2, name="user"), nn.ReLU())
    model(torch.arange(5))
    serving.export(model, tmp_path, example=torch.arange(3))
    served, ids = serving.load(tmp_path), torch.tensor([1, 9])
    with Note():
        scores = served(ids)
    to_numpy_and_back = {"aten::detach", "aten::lift_fresh"}
    assert [name for name in called if name not in to_numpy_and_back] == ["aten::relu"]
    assert len(called) <= 3
    assert scores.equal(model.eval()(ids))


@pytest.mark.parametrize("call", [serving.load, serving.follow, serving.compact])
def test_what_is_no_path_is_named(call):
    with pytest.raises(TypeError, match="folder: expected a path, got None"):
        call(None)


def test_arguments_may_be_given_by_name(tmp_path):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.user = DynamicEmbedding(2, name="user")

        def forward(self, ids, price):
            return self.user(ids).sum(1) * price

    model, ids, price = Two(), torch.arange(3), torch.rand(3)
    model(ids, price)
    serving.export(model, tmp_path, example=(ids, price))
    served, scores = serving.load(tmp_path), model.eval()(ids, price)
    assert served(ids, price=price).equal(scores)
    assert served(price=price, ids=ids).equal(scores)
    for arguments, named in (((), {}), ((ids,), {"ids": ids}), ((ids, price), {"price": price})):
        with pytest.raises(TypeError, match=r"the model takes \(ids, price\), got"):
            served(*arguments, **named)
