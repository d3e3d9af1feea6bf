"""Memory traffic of ops: exact bytes of a small step, on every backend, told to meters."""

import numpy as np
import pytest
import torch

from recis_lightning import DynamicEmbedding, DynamicEmbeddingBag, hash_tables
from recis_lightning.ops import backend as ops_backend
from recis_lightning.ops import layout as fields
from recis_lightning.ops import traffic
from recis_lightning.optim import SparseAdam


class Meter:
    def __init__(self):
        self.open, self.found = [], []

    def begin_op(self, name):
        self.open.append(name)

    def end_op(self, name, num_bytes):
        assert self.open.pop() == name
        self.found.append((name, num_bytes))


@pytest.fixture
def meter():
    meter = Meter()
    ops_backend.add_meter(meter)
    yield meter
    ops_backend.remove_meter(meter)
    assert not meter.open


def test_a_training_step(backend, meter):
    embedding = DynamicEmbedding(4)
    optimizer = SparseAdam(hash_tables(embedding), lr=0.1)
    embedding(torch.tensor([1, 2, 2])).sum().backward()
    optimizer.step()
    found = dict(meter.found)
    row_bytes = 4 * 3 * 4  # weights and two moments
    assert found["recis::find_or_insert"] == 3 * (8 + 16 + 8)
    assert found["recis::init_rows"] == 2 * (16 + row_bytes)
    assert found["recis::gather"] == 3 * (8 + 16) + 3 * 16
    assert found["recis::row_update"] == 3 * (16 + 16) + 2 * 2 * row_bytes
    assert found["recis::sort_gradients"] == 3 * 40
    assert found["recis::lookup"] == 0


def test_no_ids_move_nothing(backend, meter):
    embedding = DynamicEmbedding(4)
    optimizer = SparseAdam(hash_tables(embedding), lr=0.1)
    embedding(torch.empty(0, dtype=torch.int64)).sum().backward()
    optimizer.step()
    assert sum(num_bytes for _, num_bytes in meter.found) == 0


def test_bags_count_by_what_they_read_and_write(meter):
    bag = DynamicEmbeddingBag(2, mode="sum")
    bag.eval()
    bag(torch.arange(5), torch.tensor([0, 2]), torch.ones(5))
    (num_bytes,) = [size for name, size in meter.found if "gather" in name]
    gathered = 8 * (5 + 3) + 4 * 5 + 8 * (5 + 2)  # rows and offsets, weights, rows and outputs
    assert num_bytes in (gathered, gathered + traffic.of_find(5))


def test_tiles_are_written_whole():
    plan = np.zeros((1, fields.PLAN_SIZE), np.int64)
    plan[0, fields.PLAN_MODE], plan[0, fields.PLAN_TILE_LEN] = fields.TILE, 3
    plan[0, [fields.PLAN_NUM_IDS, fields.PLAN_NUM_BAGS, fields.PLAN_BAG_LENGTH]] = 4, 2, 2
    assert traffic.of_gather(plan, 4, 2) == 8 * 4 + 8 * (4 + 2 * 3)


def test_a_failing_op_moves_nothing_and_ends(meter):
    with (
        pytest.raises(RuntimeError, match="broken"),
        ops_backend.region("op", lambda: 1 / 0),
    ):
        raise RuntimeError("broken")
    assert meter.found == [("op", 0)]
