"""A shard file by itself: what is written is read, and nothing else is."""

import json
import os

import pytest
import safetensors
import safetensors.torch
import torch

from recis_lightning.checkpoint import mapped_file, shard_file
from recis_lightning.checkpoint.shard_file import (
    ShardFile,
    TensorGroup,
    TensorSpec,
    opened,
    write_shard,
)
from tests.helpers.full_disk import largest_file

TENSORS = {
    "half": torch.randn(7, 3).bfloat16(),
    "ids": torch.randint(-(2**63), 2**63 - 1, (40_000,)),
    "wide": torch.randn(3, 400_000),
    "flags": torch.arange(70_000).remainder(251).to(torch.uint8).view(7, 10_000),
    "none": torch.empty(0, 5),
}
METADATA = {"table": 'ünï"c/ode', "step": 2**53 + 1, "fill": 0.1, "nothing": None}


def no_progress(num_bytes):
    pass


def written(path, tensors=TENSORS):
    """Write a file; return its digest."""
    groups = [TensorGroup.of(name, tensor) for name, tensor in tensors.items()]
    return write_shard(path, METADATA, groups, no_progress)


def content(path, digest):
    """Read all of a file, as a checkpoint does."""
    file = ShardFile(path)
    file.check(digest)
    return {name: file.read(name) for name in file.specs}


def test_reads_as_written(tmp_path):
    """Bit by bit, by us and by safetensors itself; no other file is left in the folder."""
    reported = []
    groups = [TensorGroup.of(name, tensor) for name, tensor in TENSORS.items()]
    digest = write_shard(tmp_path / "a", METADATA, groups, reported.append)
    assert os.listdir(tmp_path) == ["a"]
    assert digest.size == os.stat(tmp_path / "a").st_size
    assert sum(reported) == sum(tensor.nbytes for tensor in TENSORS.values())
    file = ShardFile(tmp_path / "a")
    assert file.metadata == METADATA
    assert file.specs == {k: TensorSpec(v.dtype, tuple(v.shape)) for k, v in TENSORS.items()}
    for found in (content(tmp_path / "a", digest), safetensors.torch.load_file(tmp_path / "a")):
        assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())
    with safetensors.safe_open(tmp_path / "a", "pt") as theirs:
        assert json.loads(theirs.metadata()["table"]) == METADATA["table"]


def test_the_same_content_is_the_same_file(tmp_path):
    """Whatever order threads came in."""
    assert written(tmp_path / "a") == written(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_no_flipped_bit_passes(tmp_path):
    """Wherever it is: in the length, the header, the checksums or any tensor."""
    digest = written(tmp_path / "a", {"ids": TENSORS["ids"][:500], "half": TENSORS["half"]})
    whole = (tmp_path / "a").read_bytes()
    places = [*range(0, 1200, 7), *range(1200, len(whole), 61), len(whole) - 1]
    for place in places:
        broken = bytearray(whole)
        broken[place] ^= 1 << place % 8
        (tmp_path / "b").write_bytes(broken)
        with pytest.raises(ValueError, match=str(tmp_path / "b")):
            content(tmp_path / "b", digest)


def test_no_cut_or_longer_file_passes(tmp_path):
    """A file that ends early, or late, says so."""
    digest = written(tmp_path / "a", {"ids": TENSORS["ids"][:500]})
    whole = (tmp_path / "a").read_bytes()
    for size in (0, 1, 7, 8, 9, 100, len(whole) - 4001, len(whole) - 1, len(whole) + 1):
        (tmp_path / "b").write_bytes((whole + b"\0")[:size])
        with pytest.raises(ValueError, match=r"truncated|torn|damaged|no file of a checkpoint"):
            content(tmp_path / "b", digest)


def test_foreign_and_missing_files(tmp_path):
    """A file of another writer, another file of ours, none at all."""
    digest = written(tmp_path / "a")
    safetensors.torch.save_file({"ids": TENSORS["ids"]}, tmp_path / "theirs")
    with pytest.raises(ValueError, match="no file of a checkpoint"):
        content(tmp_path / "theirs", digest)
    written(tmp_path / "b", {**TENSORS, "half": TENSORS["half"] + 1})
    with pytest.raises(ValueError, match="damaged, or of another save"):
        content(tmp_path / "b", digest)
    with pytest.raises(ValueError, match="is missing"):
        content(tmp_path / "c", digest)


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    """At the reservation, and at a write where a file system reserves nothing."""
    (tmp_path / "a").write_bytes(b"before")
    for reserve in (shard_file.reserve, lambda file, size: None):
        monkeypatch.setattr(shard_file, "reserve", reserve)
        with largest_file(1_000_000), pytest.raises(OSError, match=r"\[Errno"):
            written(tmp_path / "a")
        assert os.listdir(tmp_path) == ["a"]
        assert (tmp_path / "a").read_bytes() == b"before"


def not_mapped(monkeypatch):
    """Let the system not know the call that maps a file's pages and says what it cannot read."""

    def unknown(address, count):
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(mapped_file, "_populate", unknown)


def test_reads_what_it_cannot_map(tmp_path, monkeypatch):
    """With the same checks."""
    not_mapped(monkeypatch)
    digest = written(tmp_path / "a")
    found = content(tmp_path / "a", digest)
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())
    test_no_flipped_bit_passes(tmp_path)


@pytest.mark.parametrize("mapped", [True, False])
def test_views_what_it_can_map(tmp_path, monkeypatch, mapped):
    """The file itself, after every chunk was checked; otherwise memory of its own."""
    if not mapped:
        not_mapped(monkeypatch)
    written(tmp_path / "a")
    file = ShardFile(tmp_path / "a")
    assert torch.equal(file.view("ids"), TENSORS["ids"])  # not open
    with file.opened():
        for name, tensor in TENSORS.items():
            assert torch.equal(file.view(name), tensor)
        one, other = file.view("ids"), file.view("ids")
        assert (one.data_ptr() == other.data_ptr()) == mapped
    content = bytearray((tmp_path / "a").read_bytes())
    content[-7] ^= 2
    (tmp_path / "a").write_bytes(content)
    last = next(reversed(file.specs))
    with file.opened(), pytest.raises(ValueError, match=f"{last} is damaged"):
        file.view(last)


def test_keeps_no_more_files_open_than_it_may(tmp_path, monkeypatch):
    """Chunks of the others are read all the same."""
    files = []
    for name in "abc":
        written(tmp_path / name)
        files.append(ShardFile(tmp_path / name))
    monkeypatch.setattr(shard_file, "_MAX_OPEN", 2)
    with opened(files):
        assert [file._open is None for file in files] == [False, False, True]
        assert all(torch.equal(file.chunk("half", 0), TENSORS["half"]) for file in files)


@pytest.mark.parametrize("mapped", [True, False])
def test_a_file_that_is_cut_while_it_is_read(tmp_path, monkeypatch, mapped):
    """An error, and no signal that ends the process."""
    if not mapped:
        not_mapped(monkeypatch)
    written(tmp_path / "a")
    file = ShardFile(tmp_path / "a")
    with file.opened():
        os.truncate(tmp_path / "a", 100_000)
        with pytest.raises(ValueError, match=r"cannot be read|ended while it was read"):
            file.chunk("flags", 0)
        file.prefetch("flags", 0)  # nobody has asked for it yet
