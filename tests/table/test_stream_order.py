"""Uses of a table on several streams of a GPU, which here only note what is asked of them."""

import gc
import weakref
from unittest.mock import patch

import pytest
import torch

from recis_lightning import DynamicEmbedding, EmbeddingEngine, EmbeddingOption, hash_tables
from recis_lightning.admission import MinCount
from recis_lightning.eviction import GlobalStepFilter
from recis_lightning.ops import backend
from recis_lightning.optim import SparseAdam
from recis_lightning.table import stream_order
from recis_lightning.table.stream_order import StreamOrder

pytestmark = pytest.mark.interpreted


class Stream:
    """Stream that notes which others it waited for."""

    def __init__(self):
        self.waited_for = []

    def wait_stream(self, other):
        self.waited_for.append(other)

    def take(self):
        waited, self.waited_for = self.waited_for, []
        return waited


@pytest.fixture
def streams(monkeypatch):
    """Let the test choose the current stream, and note which memory is recorded for which."""
    chosen = {"now": Stream(), "recorded": []}
    monkeypatch.setattr(stream_order, "current_stream", lambda device: chosen["now"])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    record = patch.object(
        torch.Tensor,
        "record_stream",
        lambda self, stream: chosen["recorded"].append((self.data_ptr(), stream)),
    )
    with backend.use("triton"), record:
        yield chosen


class Table:
    device = torch.device("cpu")

    def memory(self):
        yield from ()


def test_reads_wait_for_the_last_write_and_writes_for_all_reads(streams):
    first, second, third = streams["now"], Stream(), Stream()
    order, table = StreamOrder(), Table()
    order.watch(table)

    def enter(stream, writes):
        streams["now"] = stream
        order.enter(writes)
        return stream.take()

    assert enter(first, True) == []
    assert enter(second, False) == [first]
    assert enter(second, False) == []
    assert enter(third, False) == [first]
    assert enter(first, False) == []
    assert set(enter(first, True)) == {second, third}
    assert enter(second, True) == [first]
    assert enter(first, False) == [second]


def test_a_table_that_is_gone_is_not_kept(streams):
    order, table = StreamOrder(), Table()
    order.watch(table)
    gone = weakref.ref(table)
    del table
    gc.collect()
    assert gone() is None


def test_nothing_waits_while_a_graph_is_captured(streams, monkeypatch):
    """A capture must not wait for a stream outside it."""
    first, second = streams["now"], Stream()
    order, table = StreamOrder(), Table()
    order.watch(table)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    streams["now"] = second
    order.enter(False)
    assert second.take() == first.take() == []


def test_a_step_on_one_stream_waits_for_nothing(streams):
    module = DynamicEmbedding(2, name="t")
    sparse = SparseAdam(hash_tables(module), lr=0.1)
    for _ in range(2):
        module(torch.arange(10)).sum().backward()
        sparse.step()
        module.table.evict()
    assert streams["now"].take() == []
    assert streams["recorded"] == []


@pytest.mark.parametrize(
    "use",
    [
        lambda engine, sparse: engine({"a": torch.arange(9), "b": torch.arange(300)}),
        lambda engine, sparse: engine.eval()({"a": torch.arange(9)}),
        lambda engine, sparse: sparse.step(),
        lambda engine, sparse: engine.tables["a"].insert(torch.arange(9), torch.ones(9, 2)),
        lambda engine, sparse: engine.tables["a"].evict(),
        lambda engine, sparse: engine.tables["a"].delete(torch.arange(3)),
        lambda engine, sparse: engine.tables["a"].embeddings(torch.arange(3)),
        lambda engine, sparse: engine.tables["a"].get_extra_state(),
        lambda engine, sparse: engine.tables["a"].clear(),
    ],
)
def test_any_use_on_another_stream_is_ordered(streams, use):
    """It waits for the first stream, and all memory of all tables is recorded for it."""
    options = {
        "a": EmbeddingOption(2, admission=MinCount(1), eviction=GlobalStepFilter(1)),
        "b": EmbeddingOption(2),
    }
    engine = EmbeddingEngine(options)
    sparse = SparseAdam(hash_tables(engine), lr=0.1)
    out = engine({"a": torch.arange(20), "b": torch.arange(50)})
    sum(part.sum() for part in out.values()).backward()
    first, second = streams["now"], Stream()
    memory = {t.data_ptr() for table in hash_tables(engine) for t in table.memory() if t.numel()}
    kept = {t.data_ptr() for table in hash_tables(engine) for r in table.pending for t in r.keep}
    assert len(memory) > 10
    assert kept <= memory
    assert kept
    streams["now"] = second
    use(engine, sparse)
    assert second.take() == [first]
    assert memory <= {address for address, stream in streams["recorded"] if stream is second}
