"""What a model does with tables beside a GPU, interpreted, agrees with the CPU.

Concatenated lookups, a norm over several optimizers, deltas of changed rows, and exports.
"""

import pytest
import torch
from torch import nn

from recis_lightning import DynamicEmbedding, EmbeddingEngine, EmbeddingOption, hash_tables, serving
from recis_lightning.ops import backend
from recis_lightning.optim import SparseAdagrad, SparseAdam, clip_grad_norm_
from tests.helpers.delta_model import Run

pytestmark = pytest.mark.interpreted


def _tables(engine):
    found = {}
    for table in hash_tables(engine):
        ids = table.ids().sort().values
        found[table.name] = ids, table.embeddings(ids)
    return found


def _assert_near(one, other):
    assert one.keys() == other.keys()
    for name, (ids, rows) in one.items():
        assert ids.equal(other[name][0])
        torch.testing.assert_close(rows, other[name][1], rtol=1e-5, atol=1e-6)


def test_concatenated_lookups_clipped_together():
    """One tensor of two groups; tables of two optimizers and a tower share one norm."""
    ends = []
    for name in ("triton", "cpu"):
        generator = torch.Generator().manual_seed(0)
        with backend.use(name):
            torch.manual_seed(0)
            engine = EmbeddingEngine(
                {
                    "a": EmbeddingOption(4, mode="sum"),
                    "b": EmbeddingOption(3, mode="mean"),
                    "c": EmbeddingOption(4, table="a"),
                }
            )
            tower = nn.Linear(11, 1)
            a, b = hash_tables(engine)
            optimizers = [
                torch.optim.SGD(tower.parameters(), lr=0.1),
                SparseAdam([a], lr=0.1),
                SparseAdagrad([b], lr=0.1),
            ]
            norms = []
            for _ in range(3):
                batch = {key: torch.randint(0, 9, (6, 2), generator=generator) for key in "ab"}
                batch["c"] = batch["a"][:, 0].contiguous()
                tower(engine.concat(batch)).square().sum().backward()
                norms.append(clip_grad_norm_(optimizers, 0.05).item())
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad()
            ends.append((norms, _tables(engine)))
    assert ends[0][0] == pytest.approx(ends[1][0], rel=1e-5)
    assert all(norm > 0.05 for norm in ends[0][0])
    _assert_near(ends[0][1], ends[1][1])


def test_deltas():
    """Rows that changed, went, or were admitted, with their state."""
    taken = []
    for name in ("triton", "cpu"):
        with backend.use(name):
            run = Run(num_ids=60)
            mark = serving.ModelMark(run.model, state=True)
            deltas = []
            for _ in range(6):
                run.step()
                deltas.append(mark.take(0))
            mark.close()
            taken.append(deltas)
    assert sum(delta.num_removed for delta in taken[0]) > 0
    for ours, cpus in zip(*taken, strict=True):
        for key, table in ours.tables.items():
            other = cpus.tables[key]
            order, its = table.ids.argsort(), other.ids.argsort()
            assert table.ids[order].equal(other.ids[its])
            assert table.removed.sort().values.equal(other.removed.sort().values)
            near = {"rtol": 1e-2, "atol": 1e-2} if table.dtype == "bfloat16" else {}
            torch.testing.assert_close(table.weights[order], other.weights[its], **near)
            for column, values in table.state.by_id.items():
                assert values[order].equal(other.state.by_id[column][its]), column
            for slot, values in table.state.slots.items():
                torch.testing.assert_close(values[order], other.state.slots[slot][its], **near)


def test_exports(tmp_path):
    """A model is served as it scores, wherever its tables were."""
    with backend.use("triton"):
        torch.manual_seed(0)
        model = nn.Sequential(DynamicEmbedding(8, name="user"), nn.Linear(8, 1))
        model(torch.arange(100))
        ids = torch.tensor([3, 99, 100, 7])
        serving.export(model, tmp_path / "served", example=ids)
        model.eval()
        with torch.no_grad():
            wanted = model(ids)
    served = serving.load(tmp_path / "served")
    torch.testing.assert_close(served(ids), wanted)
