"""Same seed, same data: the same bits, whatever the number of threads."""

import pytest
import torch

from recis_lightning import EmbeddingEngine, EmbeddingOption, Jagged, hash_tables
from recis_lightning.eviction import GlobalStepFilter
from recis_lightning.optim import SparseAdamW


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def run(num_threads):
    """Train an engine with growth, duplicates, clipping and eviction; return all it holds."""
    torch.set_num_threads(num_threads)
    options = {
        "a": EmbeddingOption(8, mode="mean", eviction=GlobalStepFilter(2)),
        "b": EmbeddingOption(8, table="a", mode="sum", eviction=GlobalStepFilter(2)),
        "c": EmbeddingOption(8, dtype="bfloat16", mode="sum"),
        "d": EmbeddingOption(3),
    }
    engine = EmbeddingEngine(options)
    optimizer = SparseAdamW(hash_tables(engine), lr=0.05, clip_grad_norm=1.0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(6):
        # Skewed ids: some rows get hundreds of gradients, whose order of addition counts.
        ids = (torch.rand(6000, generator=generator) ** 4 * 9000).long() - 50
        bags = Jagged(ids, torch.arange(0, 6001, 5), torch.rand(6000, generator=generator))
        out = engine({"a": ids.view(1200, 5), "b": bags, "c": ids.view(600, 10), "d": ids})
        loss = sum((value.float() * 3).sin().sum() for value in out.values())
        loss.backward()
        optimizer.step()
        for table in hash_tables(engine):
            table.update_step()
            table.evict()
    return engine.state_dict()


def flat(state):
    """List what a state holds, by path."""
    for key, value in state.items():
        if isinstance(value, dict):
            yield from ((f"{key}.{path}", part) for path, part in flat(value))
        else:
            yield key, value


@pytest.mark.parametrize("num_threads", [1, 2, 3])
@pytest.mark.slow_except(dict(num_threads=2))
def test_runs_are_alike_bit_by_bit(num_threads):
    """Rows, their order, optimizer state and stamps, against one thread."""
    expected, got = dict(flat(run(1))), dict(flat(run(num_threads)))
    assert expected.keys() == got.keys()
    for key, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, got[key]), key
        else:
            assert value == got[key], key
