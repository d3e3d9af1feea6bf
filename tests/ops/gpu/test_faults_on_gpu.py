"""Tests that need a GPU: what went wrong, or might, where kernels run by themselves."""

from unittest.mock import patch

import pytest
import torch

from recis_lightning import DynamicEmbedding, DynamicEmbeddingBag, hash_tables
from recis_lightning.initializers import Constant
from recis_lightning.optim import SparseAdam, SparseRowwiseAdagrad, SparseSGD

pytestmark = pytest.mark.gpu

_DEVICE = "cuda"


@pytest.mark.parametrize("dim", [4, 24, 32, 64, 96, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_very_many_gradients(dim, dtype):
    """Row-wise Adagrad adds each gradient once: two runs are the same, and near float64."""
    ids = (torch.arange(40_000) ** 2 % 97 % 11).to(_DEVICE)
    gradients = torch.randn(40_000, dim, generator=torch.Generator().manual_seed(0)).to(_DEVICE)
    runs = []
    for _ in range(2):
        module = DynamicEmbedding(
            dim, dtype=dtype, device=_DEVICE, name="t", initializer=Constant(0.0)
        )
        sparse = SparseRowwiseAdagrad(hash_tables(module), lr=0.1)
        for _ in range(5):
            module(ids).float().backward(gradients)
            sparse.step()
        runs.append(module.table.embeddings(torch.arange(11)).cpu())
    assert torch.equal(*runs)
    sums = torch.zeros(11, dim, dtype=torch.float64)
    sums.index_add_(0, ids.cpu(), gradients.cpu().double())
    mean_square = sums.square().mean(1, keepdim=True)
    wanted = -sum(0.1 * sums / (mean_square * step).sqrt() for step in range(1, 6))
    rtol = 2e-2 if dtype == torch.bfloat16 else 1e-3
    known = module.table.storage.find(torch.arange(11)) >= 0
    torch.testing.assert_close(runs[0][known].double(), wanted[known], rtol=rtol, atol=1e-3)


def test_malformed_offsets_in_training():
    """Steps before the error is known update the rows of the bags only."""
    module = DynamicEmbeddingBag(
        4, mode="sum", device=_DEVICE, name="t", include_last_offset=True, initializer=Constant(1.0)
    )
    sparse = SparseSGD(hash_tables(module), lr=0.5)
    ids, offsets = torch.arange(10, device=_DEVICE), torch.tensor([0, 4, 7], device=_DEVICE)
    with pytest.raises(ValueError, match="did not start at 0, ascend and end at"):  # noqa: PT012
        for _ in range(20):
            module(ids, offsets).sum().backward()
            sparse.step()
            torch.cuda.synchronize()
    rows = module.table.embeddings(torch.arange(10)).cpu()
    assert (rows[:7] < 1).all()
    assert (rows[7:] == 1).all()


def test_no_memory_in_an_insertion():
    """The table is as before, whichever allocation fails."""
    for failing in range(6):
        module = DynamicEmbedding(2, device=_DEVICE, name="t", initializer=Constant(1.0))
        module(torch.arange(20, device=_DEVICE))
        module.table.storage.reserve_ids(1000)
        module.table.storage.reserve_rows(1000)
        made, left = torch.empty, [failing]

        def empty(*args, made=made, left=left, **kwargs):
            left[0] -= 1
            if left[0] == -1:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return made(*args, **kwargs)

        ids = torch.cat([torch.arange(10).repeat(3), torch.arange(10, 30)]).to(_DEVICE)
        with patch.object(torch, "empty", empty):
            try:
                module(ids[30:])
            except MemoryError:
                assert len(module.table) == 20
        module(ids)
        assert len(module.table) == 30
        assert module.table.storage.find(torch.arange(30)).sort().values.tolist() == [*range(30)]


@pytest.mark.parametrize("place", ["cpu", _DEVICE])
def test_a_default_device(place):
    """Tables on either device train, whatever torch's default device is."""
    results = []
    for default in ("cpu", _DEVICE):
        with torch.device(default):
            module = DynamicEmbedding(4, device=place, name="t")
            sparse = SparseAdam(hash_tables(module), lr=0.1)
            ids = torch.arange(200, device=place)
            for _ in range(3):
                module(ids).square().sum().backward()
                sparse.step()
            module.table.delete(ids[:5])
            results.append(module.table.embeddings(ids).cpu())
    assert torch.equal(*results)


def test_two_streams():
    """Growth on one stream while the other still reads: rows are those of one stream."""
    results = []
    for streams in ([None, None], [torch.cuda.Stream(), torch.cuda.Stream()]):
        module = DynamicEmbedding(64, device=_DEVICE, name="t")
        sparse = SparseAdam(hash_tables(module), lr=0.1)
        for step in range(40):
            stream = streams[step % 2]
            with torch.cuda.stream(stream):
                if stream is not None:
                    stream.wait_stream(torch.cuda.default_stream())
                ids = torch.arange(step * 2000, step * 2000 + 20_000, device=_DEVICE)
                module(ids).square().sum().backward()
            with torch.cuda.stream(streams[(step + 1) % 2]):
                sparse.step()
        torch.cuda.synchronize()
        results.append(module.table.embeddings(torch.arange(90_000)).cpu())
    assert torch.equal(*results)


@pytest.mark.skipif("torch.cuda.device_count() < 2", reason="needs two GPUs")
def test_a_second_gpu():
    """Kernels are launched where the table is, whatever the current device is."""
    results = []
    for device in ("cuda:0", "cuda:1"):
        module = DynamicEmbedding(4, device=device, name="t")
        sparse = SparseAdam(hash_tables(module), lr=0.1)
        for _ in range(3):
            module(torch.arange(100, device=device)).square().sum().backward()
            sparse.step()
        assert module.table.device == torch.device(device)
        results.append(module.table.embeddings(torch.arange(100)).cpu())
    assert torch.equal(*results)
