"""A default device of torch's other than the CPU changes nothing for tables that are on the CPU."""

import copy

import pytest
import torch

from recis_lightning import EmbeddingEngine, EmbeddingOption, Jagged, checkpoint, hash_tables, optim
from recis_lightning.admission import BloomCount, MinCount, Probability
from recis_lightning.eviction import AnyOf, GlobalStepFilter, MaxRows, TimeToLive
from recis_lightning.initializers import TruncatedNormal
from recis_lightning.ops import backend as ops_backend
from tests.helpers.sample_tables import EXTREMES, same

_OFFSETS = [0, 3, 3, 9]


def _engine():
    def option(dim, **kwargs):
        return EmbeddingOption(dim, device="cpu", initializer=TruncatedNormal(), **kwargs)

    eviction = AnyOf([GlobalStepFilter(50), TimeToLive(3600, clock=lambda: 0.0), MaxRows(30)])
    return EmbeddingEngine(
        {
            "none": option(4, table="one", eviction=eviction),
            "sum": option(4, table="one", mode="sum", eviction=eviction),
            "mean": option(4, mode="mean", padding_idx=0, admission=MinCount(2)),
            "weighted": option(4, mode="mean"),
            "tile": option(7, mode="tile", tile_len=2, admission=BloomCount(2, 64)),
            "drawn": option(7, dtype=torch.bfloat16, admission=Probability(0.5)),
            "nested": option(7),
        }
    )


def _batch(generator):
    def ids(*shape):
        return torch.randint(0, 40, shape, generator=generator, device="cpu")

    offsets = torch.tensor(_OFFSETS, device="cpu")
    weights = torch.rand(9, generator=generator, device="cpu", requires_grad=True)
    return {
        "none": torch.cat([ids(20), EXTREMES]),
        "sum": ids(4, 3),
        "mean": Jagged(ids(9), offsets),
        "weighted": Jagged(ids(9), offsets, weights),
        "tile": Jagged(ids(9), offsets),
        "drawn": ids(5),
        "nested": torch.nested.nested_tensor_from_jagged(ids(9), offsets),
    }


def _run(optimizer, folder, batches, rows):
    """Train, evaluate, insert, delete, evict, compact, save and load; return what there is."""
    engine = _engine()
    sparse = getattr(optim, optimizer)(hash_tables(engine), lr=0.1, clip_grad_norm=0.5)
    found = []
    for batch in batches:
        out = engine(batch)
        out["nested"] = out["nested"].values()
        sum(part.float().square().sum() for part in out.values()).backward()
        sparse.step()
        found.append({name: part.detach() for name, part in out.items()})
        found.append({"weights": batch["weighted"].weights.grad})
        for table in hash_tables(engine):
            table.update_step()
    table = engine.tables["one"]
    table.insert(rows[0], rows[1])
    found.append({"removed": (table.delete(rows[0][:3]), table.evict()), "count": len(table)})
    table.compact()
    found.append({"known": table.embeddings(rows[0]), "survey": table.survey().norms})
    checkpoint.save(folder, engine)
    loaded, copied = _engine(), copy.deepcopy(engine)
    checkpoint.load(folder, loaded)
    for other in (engine, loaded, copied):
        other.eval()
        evaluated = other({name: batches[0][name] for name in ("none", "mean", "tile")})
        found.append({name: part.detach() for name, part in evaluated.items()})
        found.extend(table.get_extra_state() for table in hash_tables(other))
    return found


@pytest.mark.parametrize(
    ("kernels", "optimizer"),
    [
        *(("cpu", name) for name in ("SparseSGD", "SparseRowwiseAdagrad", "SparseAdam")),
        pytest.param("triton", "SparseAdam", marks=[pytest.mark.interpreted, pytest.mark.slow]),
    ],
)
def test_a_default_device_changes_nothing(kernels, optimizer, tmp_path):
    """Nothing that kernels are given the address of lies on the default device."""
    results = []
    for device in ("cpu", "meta"):
        generator = torch.Generator("cpu").manual_seed(0)
        batches = [_batch(generator) for _ in range(2)]
        rows = torch.arange(5, 15), torch.rand(10, 4, generator=generator)
        with ops_backend.use(kernels), torch.device(device):
            results.append(_run(optimizer, tmp_path / device, batches, rows))
    one, other = results
    assert len(one) == len(other)
    for wanted, got in zip(one, other, strict=True):
        assert same(wanted, got)
