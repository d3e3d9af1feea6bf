"""Evaluation lookups in a CUDA graph, whose replay is launches with the same arguments again.

No GPU is needed: launches are noted and repeated, interpreted over the CPU's memory. Whatever a
lookup would do on the host, once more for each batch, a replay leaves out.
"""

import gc
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from recis_lightning import EmbeddingEngine, EmbeddingOption, Jagged, hash_tables
from recis_lightning.ops import async_copy, backend
from recis_lightning.ops.gpu import runtime
from recis_lightning.optim import SparseAdam

pytestmark = pytest.mark.interpreted


class Pool(TorchDispatchMode):
    """Memory of a graph, which nobody else gets as long as it is there."""

    def __init__(self):
        super().__init__()
        self._kept = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        self._kept.append(made)
        return made


class Graph:
    """Launches of a function, to be repeated."""

    def __init__(self, monkeypatch, function):
        self._launches = []
        launch = runtime.Kernel.launch

        def note(kernel, *numbers, **constants):
            self._launches.append((launch, kernel, numbers, constants))
            launch(kernel, *numbers, **constants)

        with monkeypatch.context() as patched, Pool() as self._pool:
            patched.setattr(runtime.Kernel, "launch", note)
            patched.setattr(async_copy, "is_captured", lambda device: True)
            self.outputs = function()

    def replay(self):
        """Launch again; return the outputs that the capture gave."""
        for launch, kernel, numbers, constants in self._launches:
            launch(kernel, *numbers, **constants)
        return self.outputs


@pytest.fixture
def engine():
    with backend.use("triton"):
        engine = EmbeddingEngine(
            {
                "item": EmbeddingOption(4),
                "history": EmbeddingOption(4, table="item", mode="mean", padding_idx=0),
                "odd": EmbeddingOption(3, mode="sum"),
            }
        )
        for table in hash_tables(engine):
            table.insert(torch.arange(8), torch.rand(8, table.embedding_dim))
        yield engine


def batch():
    history = Jagged(torch.tensor([1, 0, 9, 2]), torch.tensor([0, 3, 4]))
    return {"item": torch.tensor([3, 9]), "history": history, "odd": torch.tensor([[1, 2], [7, 9]])}


def grow(engine):
    for table in hash_tables(engine):
        before = table.capacity
        table.insert(torch.arange(5000), torch.rand(5000, table.embedding_dim))
        assert table.capacity > before


def evict(engine):
    for table in hash_tables(engine):
        table.delete(torch.tensor([1, 3]))


def train(engine):
    optimizer = SparseAdam(hash_tables(engine), lr=0.1)  # lays rows out anew
    engine.train()
    out = engine(batch())  # inserts 9
    sum(rows.sum() for rows in out.values()).backward()
    optimizer.step()
    engine.eval()


def clear(engine):
    for table in hash_tables(engine):
        table.clear()
        table.insert(torch.arange(8), torch.rand(8, table.embedding_dim))


def load(engine):
    state = engine.state_dict()
    clear(engine)
    engine.load_state_dict(state)


@pytest.mark.parametrize("change", [grow, evict, train, clear, load, lambda engine: None])
def test_a_replay_reads_the_tables_and_the_batch_as_they_are_then(engine, monkeypatch, change):
    engine.eval()
    given = batch()
    graph = Graph(monkeypatch, lambda: engine(given))
    assert len(graph._launches) == 2  # one a group
    gc.collect()
    change(engine)
    given["item"].copy_(torch.tensor([7, 3]))  # ids and offsets are read where they lie
    given["history"].values.copy_(torch.tensor([2, 9, 9, 0]))
    given["history"].offsets.copy_(torch.tensor([0, 1, 4]))
    replayed = {name: rows.clone() for name, rows in graph.replay().items()}
    for name, rows in engine(given).items():
        assert replayed[name].equal(rows), name


def test_what_a_graph_copies_is_kept_as_long_as_the_process(monkeypatch):
    def staged():
        return weakref.ref(runtime.stage(torch.arange(3).numpy(), torch.device("cpu")))

    assert staged()() is None
    monkeypatch.setattr(async_copy, "is_captured", lambda device: True)
    kept = staged()()
    assert kept.tolist() == [0, 1, 2]
    async_copy._captured.clear()
