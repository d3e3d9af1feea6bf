import pytest
import torch
from torch import nn

from recis_lightning import DynamicEmbedding, HashTable, checkpoint, serving
from recis_lightning.eviction import TimeToLive
from recis_lightning.optim import SparseAdam
from tests.helpers import rank_deltas
from tests.helpers.delta_model import Run, assert_same
from tests.helpers.rank_checkpoints import joined, same


def _followed(tmp_path, steps=14, compact_at=()):
    """Return a run whose changes were written with their state, at all steps but a few."""
    run = Run()
    run.model.user.table.pin(torch.tensor([1, 2]))
    mark = serving.ModelMark(run.model, state=True)
    sink = serving.ChainSink(tmp_path / "chain", compact_every=None)
    sink.write(mark.take(-1))
    for step in range(steps):
        run.step()
        if step % 3 == 0:
            # Seen, but not updated.
            run.model.user(torch.arange(0, 40))
            run.model.zero_grad()
        if step == 6:
            run.model.item.table.insert(torch.tensor([3, 500]), torch.ones(2, 3))
            run.model.user.table.compact()
        if step % 4 != 1 or step == steps - 1:
            sink.write(mark.take(step))
        if step in compact_at:
            serving.compact(tmp_path / "chain")
    sink.close()
    mark.close()
    return run


@pytest.mark.parametrize("compact_at", [(), (3, 9), (13,)])
def test_a_chain_restores_what_a_checkpoint_does(tmp_path, compact_at):
    """Tables, optimizer state, counts and order of rows, bit for bit; so do the next steps."""
    run = _followed(tmp_path, compact_at=compact_at)
    checkpoint.save(tmp_path / "full", run.model)
    dense = {k: v.clone() for k, v in run.model.tower.state_dict().items()}
    loaded, restored = Run(), Run()
    checkpoint.load(tmp_path / "full", loaded.model)
    loaded.model.tower.load_state_dict(dense)
    assert serving.restore(tmp_path / "chain", restored.model) == 13
    assert_same(restored.states(), loaded.states())
    assert_same(dict(restored.model.tower.state_dict()), dict(loaded.model.tower.state_dict()))
    for other in (loaded, restored):
        other.generator.set_state(run.generator.get_state())
        for _ in range(5):
            other.step()
    assert_same(restored.states(), loaded.states())
    assert_same(dict(restored.model.tower.state_dict()), dict(loaded.model.tower.state_dict()))


def test_ages_are_those_at_the_last_delta(tmp_path):
    """A row that no delta since has ages as it would have in memory."""
    clock = [1000.0]
    policy = TimeToLive(50.0, clock=lambda: clock[0])
    module = DynamicEmbedding(2, name="t", eviction=policy)
    optimizer = SparseAdam([module.table], lr=0.1)
    mark, sink = serving.ModelMark([module.table], state=True), serving.ChainSink(tmp_path)
    for step in range(4):
        module(torch.tensor([0, step])).sum().backward()
        optimizer.step()
        sink.write(mark.take(step))
        clock[0] += 7
    wanted = module.table.get_extra_state()
    sink.write(mark.take(4))
    sink.close()
    new = DynamicEmbedding(2, name="t", eviction=policy)
    keep = SparseAdam([new.table], lr=0.1)
    serving.restore(tmp_path, [new.table])
    assert_same(new.table.get_extra_state(), wanted)
    del keep


def test_what_does_not_fit_changes_nothing(tmp_path):
    run = _followed(tmp_path, steps=3)
    before = run.states()
    with pytest.raises(ValueError, match="no chain"):
        serving.restore(tmp_path, run.model)
    with pytest.raises(ValueError, match=r"tables \['item', 'user'\], the model \['user'\]"):
        serving.restore(tmp_path / "chain", run.model.user)
    run.model.extra = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"differ in the parameters \['extra.bias'"):
        serving.restore(tmp_path / "chain", run.model)
    assert_same(run.states(), before)
    table = HashTable(2, name="t")
    sink = serving.ChainSink(tmp_path / "plain")
    sink.write(serving.ModelMark([table]).take(0))
    sink.close()
    with pytest.raises(ValueError, match="state=True"):
        serving.restore(tmp_path / "plain", [table])


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_what_fails_in_the_middle_changes_nothing(tmp_path, error, monkeypatch):
    """The first table and the parameters hold what they held, if the second cannot be loaded."""
    _followed(tmp_path, steps=3)
    other = Run()
    other.step()
    before = other.states(), {k: v.clone() for k, v in other.model.tower.state_dict().items()}
    load, loaded = HashTable.set_extra_state, []

    def failing(table, state):
        if loaded:
            raise error("no more")
        loaded.append(table)
        load(table, state)

    monkeypatch.setattr(HashTable, "set_extra_state", failing)
    with pytest.raises(error, match="no more"):
        serving.restore(tmp_path / "chain", other.model)
    assert loaded
    assert_same(other.states(), before[0])
    assert_same(dict(other.model.tower.state_dict()), before[1])


@pytest.mark.parametrize("full_rank", [None, 0, 1])
def test_ranks_write_one_chain_and_any_number_restores_it(tmp_path, ranks, full_rank):
    """Each its shard, one commit; of a full disk of one rank all hear, and nothing is lost."""
    answers = ranks.run(2, rank_deltas.write, tmp_path, full_rank, timeout_s=200)
    whole = joined([state for state, _ in answers])
    for rank, (_, errors) in enumerate(answers):
        expected = 0 if full_rank is None else 1
        assert len(errors) == expected
        if errors:
            own = "OSError: [Errno 28]" if rank == full_rank else f"RuntimeError: rank {full_rank}"
            assert errors[0].startswith(own)
    for world_size in (1, 2, 3) if full_rank is None else (2,):
        restored = ranks.run(world_size, rank_deltas.restore, tmp_path)
        assert {step for _, step in restored} == {3}
        assert same(joined([state for state, _ in restored]), whole)
