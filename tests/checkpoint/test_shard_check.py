"""Crafted and mutated files: always an error that names the file, before a table changes."""

import json
import os
import random
import shutil

import pytest
import torch

from recis_lightning import HashTable, checkpoint
from recis_lightning.eviction import GlobalStepFilter
from recis_lightning.optim import SparseAdam
from tests.helpers.crafted_shards import craft
from tests.helpers.sample_tables import by_id, same, settings_of


def tables(rows=0, names=("user", "item")):
    """Return tables with ids 0 ... rows - 1, and their optimizer's state."""
    made = [HashTable(4, name=name, eviction=GlobalStepFilter(9)) for name in names]
    SparseAdam(made, lr=0.1)
    for table in made:
        table.insert(torch.arange(rows), torch.arange(4.0 * rows).view(rows, 4))
        table.update_step(3)
    return made


def held(made):
    return {table.name: by_id(table) | settings_of(table) for table in made}


def put(key, value):
    """Return what changes a tensor by a function."""
    return lambda tensors, metadata: tensors.update({key: value(tensors.get(key))})


def note(key, value):
    """Return what sets a field of the metadata."""
    return lambda tensors, metadata: metadata.update({key: value})


def wide(rows):
    return torch.zeros(len(rows), 100_000)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("weights", wide), r"expected weights of shape \(50, 4\) .*, got \(50, 100000\)"),
        (put("weights", lambda w: w.bfloat16()), "expected weights of .*float32, got .*bfloat16"),
        (put("weights", lambda w: w.flatten()), "expected weights of shape"),
        (put("weights", lambda w: w[:-1]), "expected weights of shape"),
        (put("slots.exp_avg", wide), "expected 1 to 256 words of optimizer state a row"),
        (put("slots.exp_avg", lambda slot: slot[:, :0]), "expected 1 to 256 words"),
        (put("slots.exp_avg", lambda slot: slot[:, 0]), "expected slots.exp_avg of shape"),
        (put("slots.exp_avg", lambda slot: slot.long()), "expected slots.exp_avg of .*float32"),
        (put("ids", lambda ids: ids.int()), "expected ids of shape"),
        (put("ids", lambda ids: ids[:-1]), "expected ids of shape"),
        (put("ids", lambda ids: ids // 2), "of 50 ids, 25 occur twice"),
        (put("last_seen", lambda seen: seen[1:]), "expected last_seen of shape"),
        (put("pinned_ids", lambda _: torch.zeros(3, 3)), "expected pinned_ids of shape"),
        (put("pending_counts", lambda _: torch.arange(3)), "expected pending_counts of shape"),
        (put("sketch", lambda _: torch.zeros(3)), "sketch is not what it should be"),
        (put("more", lambda _: torch.zeros(3)), "unknown tensor 'more'"),
        (lambda tensors, _: tensors.pop("weights"), "no tensor 'weights'"),
        (lambda tensors, _: tensors.pop("ids"), "no tensor 'ids'"),
        (note("step", 2**63), "expected step from"),
        (note("step", "3"), "step is missing or not"),
        (note("num_updates", -1), "expected num_updates from 0"),
        (note("state_fill", 1e300), "expected a float32 state_fill"),
        (note("embedding_dim", 100_000), "expected weights of shape"),
        (note("embedding_dim", None), "expected embedding_dim >= 1, got None"),
        (note("dtype", "complex64"), r"safetensors: dtype: expected .* got 'complex64'"),
        (note("rows", 49), "not of this save"),
        (note("rows", [50]), "not of this save"),
        (note("more", 1), r"unknown fields \['more'\]"),
        (lambda _, metadata: metadata.pop("seed"), "seed is missing"),
    ],
)
@pytest.mark.parametrize("fresh", [True, False])
def test_crafted_files_are_refused(tmp_path, change, message, fresh):
    """With checksums that are right: each tensor is checked against the table and its fields."""
    checkpoint.save(tmp_path, tables(50))
    craft(tmp_path, "item", change)
    made = tables(0 if fresh else 7)
    before = held(made)
    with pytest.raises(ValueError, match=message):
        checkpoint.load(tmp_path, made)
    assert same(held(made), before)


@pytest.mark.parametrize("key", ["weights", "slots.exp_avg_sq"])
def test_ranks_whose_files_differ(tmp_path, ranks_of_two, key):
    """The file of one rank is of another table."""
    craft(ranks_of_two, "item.1-of-2", put(key, lambda rows: rows[:, :3].contiguous()))
    made = tables(7)
    before = held(made)
    with pytest.raises(ValueError, match=rf"item.1-of-2.*({key} is|expected {key} of shape)"):
        checkpoint.load(ranks_of_two, made)
    assert same(held(made), before)


@pytest.fixture
def ranks_of_two(tmp_path):
    """Return a folder that looks as if two ranks had saved to it."""
    checkpoint.save(tmp_path, tables(50))
    commit = json.loads((tmp_path / "checkpoint.json").read_text())
    commit["world_size"] = 2
    for shards in commit["tables"].values():
        old = shards[0]["file"]
        files = [old.replace("0-of-1", f"{rank}-of-2") for rank in range(2)]
        for file in files:
            shutil.copy(tmp_path / old, tmp_path / file)
        shards[:] = [{**shards[0], "file": file} for file in files]
    (tmp_path / "checkpoint.json").write_text(json.dumps(commit))
    for name in commit["tables"]:
        for rank in range(2):

            def change(tensors, metadata, rank=rank):
                metadata.update(rank=rank, world_size=2)
                tensors["ids"] += 100 * rank

            craft(tmp_path, f"{name}.{rank}-of-2", change)
    return tmp_path


def test_the_folder_of_two_ranks_is_valid(ranks_of_two):
    made = tables()
    checkpoint.load(ranks_of_two, made)
    assert [len(table) for table in made] == [100, 100]


@pytest.mark.parametrize(
    "header",
    [
        lambda header: header["weights"].update(shape=[-50, -4]),
        lambda header: header["weights"].update(shape=[50, 4.0]),
        lambda header: header["weights"].update(shape=[]),
        lambda header: header["weights"].update(dtype=[]),
        lambda header: header["weights"].update(data_offsets=[0]),
        lambda header: header["weights"].update(data_offsets=["a", "b"]),
        lambda header: header.update(weights=None),
        lambda header: header.pop("checksums"),
        lambda header: header.update(__metadata__=[]),
        lambda header: header["__metadata__"].update(piece_rows='{"ids": 0}'),
        lambda header: header["__metadata__"].update(piece_rows="[1]"),
        lambda header: header["__metadata__"].update(piece_rows="[" * 100_000),
        lambda header: header["__metadata__"].update(step="[" * 100_000),
    ],
)
def test_malformed_headers(tmp_path, header):
    """Of whatever shape the JSON is, the error names the file."""
    checkpoint.save(tmp_path, tables(50))
    file = next(tmp_path.glob("item*"))
    copies = [tmp_path / "checkpoint.json", file]
    kept = [copy.read_bytes() for copy in copies]
    try:
        craft(tmp_path, "item", lambda tensors, metadata: None, header)
    except KeyError:
        for copy, content in zip(copies, kept, strict=True):
            copy.write_bytes(content)
        return
    with pytest.raises(ValueError, match=f"{file}: damaged, or no file of a checkpoint"):
        checkpoint.inspect(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda commit: commit.update(tables=[]),
        lambda commit: commit.update(world_size="1"),
        lambda commit: commit.update(save_id=None),
        lambda commit: commit.update(folder="../other"),
        lambda commit: commit.update(folder="/etc"),
        lambda commit: commit["tables"].update(user=[{}]),
        lambda commit: commit["tables"].update(user=None),
        lambda commit: commit["tables"]["user"][0].update(file="../item"),
        lambda commit: commit["tables"]["user"][0].update(file="/etc/passwd"),
        lambda commit: commit["tables"]["user"][0].update(file="a\0b"),
        lambda commit: commit["tables"]["user"][0].update(file="x" * 256),
        lambda commit: commit["tables"]["user"][0].update(file="\ud800"),
        lambda commit: commit.update(folder="x" * 5000),
        lambda commit: commit["tables"]["user"][0].update(size="1"),
        lambda commit: commit["tables"]["user"][0].update(rows=-1),
        lambda commit: commit["tables"]["user"][0].update(rows=True),
    ],
)
def test_malformed_commits(tmp_path, change):
    """No file outside the folder is opened."""
    checkpoint.save(tmp_path, tables(5))
    file = tmp_path / "checkpoint.json"
    commit = json.loads(file.read_text())
    change(commit)
    file.write_text(json.dumps(commit))
    with pytest.raises(ValueError, match=f"{tmp_path}: its list of tables is damaged"):
        checkpoint.load(tmp_path, tables())


def folder_instead(file):
    file.unlink()
    file.mkdir()


def pipe_instead(file):
    file.unlink()
    os.mkfifo(file)


def loop_instead(file):
    file.unlink()
    file.symlink_to(file)


def device_instead(file):
    file.unlink()
    file.symlink_to("/dev/zero")


def nested(file):
    file.write_text("[" * 200_000)


def binary(file):
    file.write_bytes(bytes(range(256)))


@pytest.mark.parametrize("name", ["checkpoint.json", "user*.safetensors", "model.ckpt"])
@pytest.mark.parametrize(
    "harm", [folder_instead, pipe_instead, loop_instead, device_instead, nested, binary]
)
def test_special_and_malformed_files(tmp_path, name, harm):
    """No wait for the other end of a pipe, no other kind of error."""
    torch.save({"state_dict": {}}, tmp_path / "model.ckpt")
    checkpoint.save(tmp_path, tables(5))
    file = next(tmp_path.glob(name))
    harm(file)
    path = file if name == "model.ckpt" else tmp_path
    with pytest.raises(ValueError, match=str(file)):
        checkpoint.load(path, tables())
    with pytest.raises(ValueError, match=str(file)):
        checkpoint.read_table(path, "user")


def test_random_mutations(tmp_path):
    """Bits, cuts, gaps and swaps in any file: an error that names the file, and nothing changed."""
    random.seed(0)
    whole, made = tmp_path / "whole", tables(7)
    checkpoint.save(whole, tables(50))
    before = held(made)
    for number in range(60):
        folder = tmp_path / str(number)
        shutil.copytree(whole, folder)
        file = random.choice(sorted(folder.iterdir()))
        content = bytearray(file.read_bytes())
        at = random.randrange(len(content))
        kind = number % 4
        if kind == 0:
            content[at] ^= 1 << random.randrange(8)
        elif kind == 1:
            del content[at:]
        elif kind == 2:
            content[at : at + 20] = random.randbytes(20)
        else:
            content[at:at] = content[: random.randrange(1, 200)]
        file.write_bytes(content)
        try:
            checkpoint.load(folder, made)
        except ValueError as error:
            named = str(folder) in str(error)
        else:  # a place that is for people, such as the path where it was written
            named = file.name == "checkpoint.json"
            made = tables(7)
        assert named, file
        assert same(held(made), before)
