"""Steady steps have no host sync, tested without a GPU.

``backend.use("triton")`` keeps tables as beside a GPU, over the CPU's memory. With a GPU, torch
itself detects host syncs: ``test_on_gpu.test_a_steady_step_waits_for_nothing``.
"""

import warnings
from contextlib import nullcontext

import pytest
import torch

from recis_lightning import (
    DynamicEmbedding,
    EmbeddingEngine,
    EmbeddingOption,
    Jagged,
    hash_tables,
    optim,
)
from recis_lightning.admission import BloomCount, MinCount, Probability, ReadOnly
from recis_lightning.eviction import AnyOf, GlobalStepFilter, MaxRows, TimeToLive
from recis_lightning.ops import backend as ops_backend
from recis_lightning.table import storage
from tests.helpers.no_host_sync import Waited, no_waiting, no_waiting_for_cuda

pytestmark = pytest.mark.interpreted

_OPTIMIZERS = {
    "SparseSGD": {"clip_grad_value": 0.5},
    "SparseAdagrad": {},
    "SparseRowwiseAdagrad": {"clip_grad_norm": 0.5},
    "SparseAdam": {},
    "SparseAdamW": {},
}


def _small_engine(**policies):
    return EmbeddingEngine({"one": EmbeddingOption(4, mode="mean", **policies)})


def _engine():
    return EmbeddingEngine(
        {
            "one": EmbeddingOption(4, table="one"),
            "shared": EmbeddingOption(4, table="one", mode="sum"),
            "mean": EmbeddingOption(4, mode="mean", padding_idx=0),
            "weighted": EmbeddingOption(4, mode="mean"),
            "tile": EmbeddingOption(7, mode="tile", tile_len=2, dtype=torch.bfloat16),
            "nested": EmbeddingOption(7),
            "frozen": EmbeddingOption(4, trainable=False),
        }
    )


def _batch(generator):
    def ids(*shape):
        return torch.randint(0, 40, shape, generator=generator)

    offsets = torch.tensor([0, 3, 3, 9])
    weights = torch.rand(9, generator=generator, requires_grad=True)
    return {
        "one": ids(20),
        "shared": ids(4, 3),
        "mean": Jagged(ids(9), offsets),
        "weighted": Jagged(ids(9), offsets, weights),
        "tile": Jagged(ids(9), offsets),
        "nested": torch.nested.nested_tensor_from_jagged(ids(9), offsets),
        "frozen": ids(5),
    }


def _step(engine, optimizer, batch):
    found = engine({name: batch[name] for name in engine.options})
    if "nested" in found:
        found["nested"] = found["nested"].values()
    sum(part.float().square().sum() for part in found.values()).backward()
    optimizer.step()
    for table in hash_tables(engine):
        table.update_step()


def _steps(engine, name, first=1, **kwargs):
    """Take ``first`` steps that make room, then two without host sync; count what these insert."""
    optimizer = getattr(optim, name)(hash_tables(engine), lr=0.1, **kwargs)
    generator = torch.Generator().manual_seed(0)
    batches = [_batch(generator) for _ in range(first + 2)]
    for batch in batches[:first]:
        _step(engine, optimizer, batch)
    before = [len(table) for table in hash_tables(engine)]
    with no_waiting():
        for batch in batches[first:]:
            _step(engine, optimizer, batch)
        engine.eval()
        engine({name: batches[0][name] for name in engine.options})
        engine.train()
    return sum(len(table) for table in hash_tables(engine)) - sum(before)


def test_a_steady_step_waits_for_nothing():
    """Features have all layouts and modes, shared, frozen and weighted; new ids keep coming."""
    with ops_backend.use("triton"):
        assert _steps(_engine(), "SparseAdam", clip_grad_norm=0.5) > 0


@pytest.mark.parametrize("name", _OPTIMIZERS)
def test_a_steady_step_of_any_optimizer_waits_for_nothing(name):
    """With and without clipping."""
    with ops_backend.use("triton"):
        assert _steps(_small_engine(), name, **_OPTIMIZERS[name]) > 0


@pytest.mark.parametrize(
    "admission", [MinCount(2), MinCount(2, per="batch"), BloomCount(3, 64), Probability(0.3)]
)
@pytest.mark.slow_except(dict(admission=[MinCount(2, per="batch"), BloomCount(3, 64)]))
def test_a_steady_step_that_admits_waits_for_nothing(admission):
    """Admission counts get room in time, and the device decides when a sketch decays."""
    with ops_backend.use("triton"):
        eviction = AnyOf([GlobalStepFilter(50), TimeToLive(3600), MaxRows(100, by="count")])
        _steps(_small_engine(admission=admission, eviction=eviction), "SparseSGD", first=3)


@pytest.mark.parametrize(("free", "waits"), [(1 << 30, False), (1 << 16, True)])
def test_a_lookup_of_many_known_ids_waits_for_nothing(free, waits, monkeypatch):
    """Room is kept for two lookups of any size, unless it would take too much of the memory."""
    monkeypatch.setattr(storage, "_HEADROOM_ROWS", 8)
    monkeypatch.setattr(storage, "free_bytes", lambda device: free)
    ids = torch.arange(50).repeat(40)
    with ops_backend.use("triton"):
        module = DynamicEmbedding(4, name="t")
        sparse = optim.SparseAdam(hash_tables(module), lr=0.1)
        for _ in range(3):
            module(ids).sum().backward()
            sparse.step()
        with no_waiting(), pytest.raises(Waited) if waits else nullcontext():
            for _ in range(3):
                module(ids).sum().backward()
                sparse.step()
        assert len(module.table) == 50


def test_a_read_only_table_waits_for_nothing():
    """The device counts rejected ids."""
    with ops_backend.use("triton"):
        _steps(_small_engine(admission=ReadOnly()), "SparseSGD")


@pytest.mark.parametrize(
    "waits",
    [
        lambda x: x.sum().item(),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: bool(x.any()),
        lambda x: x.cpu(),
        lambda x: x.tolist(),
        lambda x: x.unique(),
    ],
)
def test_the_guard_sees_a_wait(waits):
    """A wait is detected in the forward and in the backward pass."""

    class Both(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            waits(gradient)
            return gradient

    x = torch.ones(3, requires_grad=True)
    with no_waiting(), pytest.raises(Waited):
        waits(x.detach())
    loss = Both.apply(x).sum()
    with no_waiting(), pytest.raises(Waited):
        loss.backward()


@pytest.mark.parametrize("fails", [False, True])
def test_torch_may_wait_again_after_a_test(fails, monkeypatch):
    """Torch warns of the mode after it has set it, and warnings are errors in the tests."""
    modes, seen = [], []

    def set_mode(mode):
        modes.append(mode)
        if len(modes) == 1:
            warnings.warn("Synchronization debug mode is a prototype feature", stacklevel=1)
            if fails:
                raise RuntimeError("no such mode")

    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", set_mode)
    try:
        with no_waiting_for_cuda():
            seen.append(list(modes))
    except RuntimeError:
        assert fails
    assert modes == ["error", "default"]
    assert seen == ([] if fails else [["error"]])
