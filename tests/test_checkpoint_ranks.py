"""Checkpoints of tables that are sharded over real processes."""

import os

import pytest
import torch

from tests import checkpoint_ranks
from tests.checkpoint_ranks import held, joined, same


def test_any_number_of_ranks_loads(tmp_path, ranks):
    """Saved by 2, loaded and saved by 1, 2 and 3, loaded by 2: every bit, every count."""
    first = ranks.run(2, checkpoint_ranks.make_and_save, tmp_path / "first")
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


def test_ranks_load_what_one_process_put_in_a_state_dict(tmp_path, ranks):
    """Each takes the rows that it owns."""
    torch.manual_seed(0)
    made, _optimizers = checkpoint_ranks.filled(count=3000)
    torch.save({table.name: table.get_extra_state() for table in made}, tmp_path / "a")
    answers = ranks.run(2, checkpoint_ranks.load_state_dict, tmp_path / "a")
    assert same(joined(answers), held(made))


@pytest.mark.parametrize("world_size", [2])
def test_a_state_dict_of_many_ranks_is_refused(tmp_path, ranks, world_size):
    """Without the hook it would hold one rank's rows."""
    with pytest.raises(AssertionError, match="saving a table on 2 ranks"):
        ranks.run(world_size, checkpoint_ranks.state_dict_alone)
