"""Checkpoints of tables that are sharded over real processes."""

import os
import re

import pytest
import torch

from recis_lightning import checkpoint
from tests.helpers import rank_checkpoints as checkpoint_ranks
from tests.helpers.rank_checkpoints import held, joined, same


def test_any_number_of_ranks_loads(tmp_path, ranks):
    """Saved by 2, loaded and saved by 1, 2 and 3, loaded by 2: every bit, every count."""
    # With an empty cache, kernels are compiled first.
    first = ranks.run(2, checkpoint_ranks.make_and_save, tmp_path / "first", timeout_s=200)
    whole = joined(first)
    assert len(whole["adam", "ids"]) == 20_000 == len(whole["bf16", "pending_ids"])
    for world_size in (1, 2, 3):
        folder = tmp_path / f"by {world_size}"
        answers = ranks.run(world_size, checkpoint_ranks.load_and_save, tmp_path / "first", folder)
        assert len(answers) == world_size
        assert same(joined(answers), whole)
        back = ranks.run(2, checkpoint_ranks.load_and_save, folder)
        assert all(map(same, back, first))


def test_a_failure_on_one_rank_is_one_on_all(tmp_path, ranks):
    """A full disk, a damaged file, other tables: all raise, nobody waits, nothing changes."""
    folder = tmp_path / "a"
    ranks.run(2, checkpoint_ranks.make_and_save, folder)
    files = sorted(os.listdir(folder))
    for full_rank in (0, 1):
        answers = ranks.run(2, checkpoint_ranks.save_with_full_disk, folder, full_rank)
        assert answers[full_rank][0].startswith("OSError: [Errno 28] No space left on device")
        assert answers[1 - full_rank][0].startswith(f"RuntimeError: rank {full_rank} failed: OSE")
        assert answers[1 - full_rank][1] == files
    (answer, other) = ranks.run(2, checkpoint_ranks.refused, folder, rank_with_tables=1)
    assert "ValueError: " in other
    assert "['bf16'] have no place" in other
    assert answer.startswith("RuntimeError: rank 1 failed: ValueError")
    for message in ranks.run(2, checkpoint_ranks.save_other_tables, tmp_path / "b"):
        assert message == "tables: rank 0 has {'of 0': 2}, rank 1 has {'of 1': 2}"
    file = folder / next(name for name in files if name.startswith("adam.1-of-2"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    for world_size in (2, 3):
        answers = ranks.run(world_size, checkpoint_ranks.refused, folder)
        assert "is damaged" in answers[1]
        assert answers[0].startswith("RuntimeError: rank 1 failed: ValueError")
    file.unlink()
    answers = ranks.run(3, checkpoint_ranks.refused, folder)
    assert all("is missing" in answer for answer in answers)


@pytest.mark.parametrize("under_trainer", [False, True])
def test_a_save_without_a_shared_disk_fails_on_all_ranks(tmp_path, ranks, under_trainer):
    """It could not be loaded. The error says what to do; no file is left, and one may go on."""
    (one, left), (other, left_there) = ranks.run(
        2, checkpoint_ranks.save_to_own_disks, tmp_path, under_trainer
    )
    for words in (
        "expected a folder that all ranks share",
        "rank 1 on host",
        "which is not there for rank 0",
        "Save to a file system that all hosts have in common",
    ):
        assert words in one
        assert words in other
    assert (left, left_there) == ([], [])
    assert checkpoint.inspect(tmp_path / "shared.ckpt")


def test_ranks_load_what_one_process_put_in_a_state_dict(tmp_path, ranks):
    """Each takes the rows that it owns."""
    torch.manual_seed(0)
    made, _optimizers = checkpoint_ranks.filled(count=3000)
    torch.save({table.name: table.get_extra_state() for table in made}, tmp_path / "a")
    answers = ranks.run(2, checkpoint_ranks.load_state_dict, tmp_path / "a")
    assert same(joined(answers), held(made))


def test_a_failure_on_one_rank_leaves_the_tables_of_all(tmp_path, ranks):
    """Also those of Lightning's own file, which each rank loads without asking the others."""
    torch.manual_seed(0)
    made, _optimizers = checkpoint_ranks.filled(count=3000)
    state = {f"{table.name}._extra_state": table.get_extra_state() for table in made}
    torch.save(state, tmp_path / "a.ckpt")
    file = tmp_path / "a.ckpt"
    other, failed = ranks.run(2, checkpoint_ranks.load_file_where_one_rank_fails, file, 1)
    assert failed == "MemoryError: no room"
    assert other == "RuntimeError: rank 1 failed: MemoryError: no room"


def test_ranks_that_load_different_things(tmp_path, ranks):
    """Else a table would have half of its rows, or those of two saves."""
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        ranks.run(2, checkpoint_ranks.make_and_save, folder)
    for folders, arguments, message in (
        ((one, one), ({"tables": ["adam"]}, {"tables": ["bf16"]}), "'tables': {'bf16': 'bf16'}"),
        ((one, one), ({}, {"optimizer_state": False}), "optimizer_state=False"),
        ((one, two), ({}, {}), f"'path': '{two}'"),
    ):
        answers = ranks.run(2, checkpoint_ranks.load_what_differs, folders, arguments)
        assert all("ranks must load the same; rank 0 loads {" in answer for answer in answers)
        assert all(message in answer for answer in answers)


@pytest.mark.parametrize("world_size", [2])
def test_a_state_dict_of_many_ranks_is_refused(tmp_path, ranks, world_size):
    """Without the hook it would hold one rank's rows."""
    with pytest.raises(AssertionError, match="saving a table on 2 ranks"):
        ranks.run(world_size, checkpoint_ranks.state_dict_alone)


def test_lightning_on_any_number_of_ranks(tmp_path, ranks):
    """Saved under ddp by 2; loaded by 1, with the hook and without it, 2 and 3; trained on by 3."""
    answers = ranks.run(2, checkpoint_ranks.fit, tmp_path, save_top_k=1, save_last="link")
    first, whole = [state for state, _ in answers], joined([state for state, _ in answers])
    assert {len(state["user", "ids"]) for state in first} != {0}
    assert sorted(os.listdir(tmp_path)) == ["last.ckpt", "step=4.ckpt", "step=4.ckpt.tables"]
    assert len(os.listdir(tmp_path / "step=4.ckpt.tables")) == 6
    assert checkpoint.inspect(tmp_path / "last.ckpt")["user"].rows == [
        len(state["user", "ids"]) for state in first
    ]
    file = tmp_path / "last.ckpt"
    for world_size, hook in ((1, True), (1, False), (2, True), (2, False), (3, True)):
        found = ranks.run(world_size, checkpoint_ranks.load_in_trainer, file, hook)
        assert same(joined(found), whole)
        assert world_size != 2 or all(map(same, found, first))
    more = ranks.run(3, checkpoint_ranks.fit, tmp_path / "more", file, max_epochs=2)
    found = joined([state for state, _ in more])
    assert found["user", "settings"][0]["step"] > whole["user", "settings"][0]["step"]


def test_lightning_without_the_hook(tmp_path, ranks):
    """A save of several ranks would keep one rank's rows, and says so."""
    with pytest.raises(AssertionError, match=r"saving a table on 2 ranks: .*CheckpointHook"):
        ranks.run(2, checkpoint_ranks.fit_without_hook, tmp_path)
    assert not list(tmp_path.glob("**/*.ckpt"))


def test_all_ranks_raise_if_the_main_file_is_not_written(tmp_path, ranks):
    """None waits for rank 0; the checkpoint there was stays whole, and the next one is saved."""
    answers = ranks.run(
        2, checkpoint_ranks.save_where_the_main_file_fails, tmp_path, group_timeout_s=60
    )
    assert answers[0][0].startswith("OSError: [Errno 28]")
    assert answers[1][0].startswith("RuntimeError: rank 0 failed: OSError: [Errno 28]")
    assert max(waited for _, waited in answers) < 30
    for name in ("a.ckpt", "b.ckpt"):
        assert len(list((tmp_path / f"{name}.tables").iterdir())) == 2 * 3
        checkpoint.read_table(tmp_path / name, "user")


@pytest.mark.parametrize(("failing_rank", "of_module"), [(0, False), (1, True)])
def test_all_ranks_raise_if_one_has_no_state_to_save(tmp_path, ranks, failing_rank, of_module):
    """Lightning asks callbacks and module on every rank, and one of them may raise there alone."""
    answers = ranks.run(
        2,
        checkpoint_ranks.save_where_a_hook_fails,
        tmp_path,
        failing_rank,
        of_module,
        group_timeout_s=60,
    )
    assert answers[failing_rank][0] == "KeyError: 'no state'"
    error = f"RuntimeError: rank {failing_rank} failed: KeyError: 'no state'"
    assert answers[1 - failing_rank][0] == error
    assert max(waited for _, waited in answers) < 30
    for name in ("a.ckpt", "b.ckpt"):
        assert len(list((tmp_path / f"{name}.tables").iterdir())) == 2 * 3
        checkpoint.read_table(tmp_path / name, "user")


def test_all_ranks_raise_if_one_does_not_see_the_shards(tmp_path, ranks):
    """As on a machine that does not share the folder: none waits for the one that fails."""
    ranks.run(2, checkpoint_ranks.fit, tmp_path, save_top_k=1)
    answers = ranks.run(
        2,
        checkpoint_ranks.load_where_the_folder_is_missing,
        tmp_path / "step=4.ckpt",
        1,
        group_timeout_s=60,
    )
    assert re.match("ValueError: .*this folder .* is missing", answers[1][0])
    assert answers[0][0].startswith("RuntimeError: rank 1 failed: ValueError: ")
    assert max(waited for _, waited in answers) < 30
