import pytest
import torch

from recis_lightning import DynamicEmbedding, HashTable, checkpoint, hash_tables, serving
from recis_lightning.admission import BloomCount, MinCount
from recis_lightning.eviction import GlobalStepFilter
from recis_lightning.optim import SparseAdam
from recis_lightning.serving.traces import find_traces


def test_nothing_is_left_of_what_was_forgotten(tmp_path):
    """Checkpoint, state_dict, chain and served folder: first they have the rows, then no byte."""
    module = DynamicEmbedding(4, name="t", eviction=GlobalStepFilter(10))
    table, optimizer = module.table, SparseAdam([module.table], lr=0.1)
    ids = torch.cat([torch.arange(20), torch.arange(3) + 10**12])
    module(ids).pow(2).sum().backward()
    optimizer.step()
    table.pin(torch.tensor([3, 4]))
    mark, sink = serving.ModelMark(module, state=True), serving.ChainSink(tmp_path / "served")
    sink.write(mark.take(0))
    gone = torch.tensor([3, 5, 10**12 + 1])
    rows = table.embeddings(gone)

    def save():
        checkpoint.save(tmp_path / "saved", module)
        torch.save(module.state_dict(), tmp_path / "module.pt")
        for form in (None, "int8", "bfloat16"):
            folder = tmp_path / "served" if form is None else tmp_path / form
            serving.export(module, folder, example=torch.arange(3), rows=form)

    save()
    found = find_traces(tmp_path, gone, rows)
    files = {trace.file.removeprefix(f"{tmp_path}/").split("/")[0] for trace in found}
    # A row of int8 has fewer than eight bytes, so its id is all that tells.
    assert files == {"saved", "module.pt", "served", "bfloat16", "int8"}
    assert {trace.id for trace in found} == set(gone.tolist())
    assert {trace.what for trace in found} == {"id", "row"}
    assert {trace.id for trace in find_traces(tmp_path / "int8", gone)} == set(gone.tolist())

    assert table.forget(torch.cat([gone, torch.tensor([777])])) == (3, False)
    assert table.pinned.tolist() == [4]
    sink.write(mark.take(1))
    assert find_traces(tmp_path / "served" / "deltas", gone, rows)  # the base, and tombstones
    sink.close()
    serving.compact(tmp_path / "served")
    save()
    assert not find_traces(tmp_path, gone, rows)
    kept = torch.tensor([4, 10**12])
    assert {t.id for t in find_traces(tmp_path, kept, table.embeddings(kept))} == set(kept.tolist())


def test_counts_of_ids_without_a_row_are_forgotten():
    """Exact counts go; a sketch says that it keeps them; evicted ids are remembered no more."""
    exact = DynamicEmbedding(2, name="a", admission=MinCount(3))
    sketch = DynamicEmbedding(2, name="b", admission=BloomCount(3, num_counters=1000))
    for module in (exact, sketch):
        module(torch.tensor([1, 1, 2]))
    assert exact.table.forget(torch.tensor([1])) == (0, False)
    assert sketch.table.forget(torch.tensor([1])) == (0, True)
    assert exact.table.get_extra_state()["pending_ids"].tolist() == [2]
    exact(torch.tensor([1]))
    assert len(exact.table) == 0  # it begins to count anew
    table = HashTable(2, eviction=GlobalStepFilter(1))
    table.track_readmissions()
    table.insert(torch.arange(4), torch.ones(4, 2))
    table.update_step(3)
    assert table.evict() == 4
    table.forget(torch.tensor([0, 1]))
    table.insert(torch.arange(4), torch.ones(4, 2))
    assert table.statistics().readmitted == 2


def test_forgotten_rows_have_no_gradient_and_no_memory():
    module = DynamicEmbedding(2, name="t")
    optimizer = SparseAdam(hash_tables(module), lr=0.1)
    module(torch.tensor([1, 2])).sum().backward()
    table = module.table
    (row,) = table.ids_map()[1][table.ids() == 1]
    table.forget(torch.tensor([[1], [1]]))
    weights, _ = table.storage.rows.read(row.reshape(1))
    assert not weights.any()
    optimizer.step()
    assert table.ids().tolist() == [2]
    table.forget(torch.empty(0, dtype=torch.int64))
    with pytest.raises(TypeError, match="int64"):
        table.forget(torch.tensor([1.0]))
    assert len(table) == 1


def test_bad_arguments(tmp_path):
    with pytest.raises(ValueError, match="there is nothing"):
        find_traces(tmp_path / "none", torch.tensor([1]))
    with pytest.raises(ValueError, match=r"weights: expected \[1, dim\]"):
        find_traces(tmp_path, torch.tensor([1]), torch.ones(2, 2))
    (tmp_path / "empty").touch()
    assert find_traces(tmp_path, torch.tensor([2**40]), torch.ones(1, 8)) == []
