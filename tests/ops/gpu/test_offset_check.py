"""Malformed offsets beside a GPU: what is reported late must do no harm until then."""

from unittest.mock import patch

import pytest
import torch

from recis_lightning import DynamicEmbeddingBag, hash_tables
from recis_lightning.ops import backend
from recis_lightning.optim import SparseAdam, SparseSGD

pytestmark = pytest.mark.interpreted

_empty = torch.empty


def _poisoned(*shape, **options):
    """Return memory as an allocator may hand it out: full of what look like rows."""
    made = _empty(*shape, **options)
    return made.fill_(3) if made.dtype in (torch.int32, torch.int64) else made


def _trained(offsets, num_ids, mode, optimizer, weights=None):
    """Return a table after two steps whose offsets nobody checks in time."""
    module = DynamicEmbeddingBag(4, mode=mode, name="t", include_last_offset=True)
    sparse = optimizer(hash_tables(module), lr=0.5)
    module(torch.arange(20), torch.tensor([0, 20]))
    sparse.zero_grad()
    with (
        patch("recis_lightning.ops.gpu.embedding_bag.malformed_feature", lambda plan, flag: -1),
        patch("torch.empty", _poisoned),
    ):
        for _ in range(2):
            ids, ends = torch.arange(num_ids), torch.tensor(offsets)
            given = () if weights is None else (weights[:num_ids],)
            module(ids, ends, *given).sum().backward()
            sparse.step()
    return module.table


@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize("optimizer", [SparseSGD, SparseAdam])
@pytest.mark.slow_except(
    dict(mode="mean", optimizer=SparseSGD), dict(mode="sum", optimizer=SparseAdam)
)
def test_ids_in_no_bag_are_not_updated(mode, optimizer):
    """Offsets end before the ids do: the update touches the rows of all bags, and no others."""
    with backend.use("triton"):
        ours = _trained([0, 4, 7], 10, mode, optimizer)
        wanted = _trained([0, 4, 7], 7, mode, optimizer)
        ids = torch.arange(20)
        assert torch.equal(ours.embeddings(ids), wanted.embeddings(ids))


@pytest.mark.parametrize(
    "offsets", [[0, 9, 4, 10], [-7, 3, 50], [5, 5, 5], [10, 0], [2**62, -(2**62), 4]]
)
@pytest.mark.slow_except(dict(offsets=[[0, 9, 4, 10], [2**62, -(2**62), 4]]))
def test_any_offsets_leave_other_rows_alone(offsets):
    """Bags that overlap, or reach beyond the ids, update rows of the feature's ids only."""
    with backend.use("triton"):
        weights = torch.rand(10, requires_grad=True)
        ours = _trained(offsets, 10, "sum", SparseSGD, weights)
        untouched = _trained([0, 0], 0, "sum", SparseSGD)
        ids = torch.arange(10, 20)
        assert torch.equal(ours.embeddings(ids), untouched.embeddings(ids))
        assert weights.grad.shape == (10,)
