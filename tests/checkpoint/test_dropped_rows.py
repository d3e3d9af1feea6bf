"""Rows that read_table and write_parquet leave out are those that evict() would remove."""

import numpy as np
import pytest
import torch

from recis_lightning import DynamicEmbedding, checkpoint, hash_tables
from recis_lightning.checkpoint import export
from recis_lightning.eviction import AllOf, AnyOf, GlobalStepFilter, MaxRows, MinNorm, TimeToLive
from recis_lightning.optim import SparseAdam


class Clock:
    now = 1e6

    def __call__(self):
        return self.now


CLOCK = Clock()
OWN = AnyOf([MaxRows(10**6, by="count"), TimeToLive(10**6, clock=CLOCK)])


def trained(dtype=torch.float32):
    """Return a module whose rows differ in all that policies decide by; some are pinned."""
    module = DynamicEmbedding(3, eviction=OWN, dtype=dtype, name="user")
    sparse = SparseAdam(hash_tables(module), lr=0.5)
    generator = torch.Generator().manual_seed(2)
    for _ in range(6):
        batch = (torch.rand(20, generator=generator) ** 2 * 60 - 10).long()
        module(batch).pow(2).sum().backward()
        sparse.step()
        sparse.zero_grad()
        module.table.update_step()
        CLOCK.now += 10
    module.table.pin(module.table.ids()[:3])
    return module


POLICIES = [
    MinNorm(0.8),
    GlobalStepFilter(3),
    MaxRows(9, by="count"),
    TimeToLive(25, clock=CLOCK),
    AllOf([AnyOf([MinNorm(0.5), GlobalStepFilter(2)]), MaxRows(5)]),
]


@pytest.mark.parametrize("form", ["folder", "file"])
@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: type(policy).__name__)
def test_the_rest_is_what_evict_leaves(tmp_path, monkeypatch, form, policy):
    """Chunk by chunk, of a folder and of a single file; pinned ids stay."""
    monkeypatch.setattr(export, "_CHUNK_ROWS", 7)
    module = trained(torch.bfloat16)
    if form == "folder":
        path = tmp_path / "saved"
        checkpoint.save(path, module)
    else:
        path = tmp_path / "one.ckpt"
        torch.save({"state_dict": module.state_dict()}, path)
    everything = checkpoint.read_table(path, "user")
    found = checkpoint.read_table(path, "user", drop=policy)
    assert module.table.evict(policy)
    assert len(found["ids"]) == len(module.table) > 3
    assert set(found["ids"].tolist()) == set(module.table.ids().tolist())
    kept = np.isin(everything["ids"], found["ids"])
    for key, column in everything.items():
        np.testing.assert_array_equal(found[key], column[kept])
    parquet = pytest.importorskip("pyarrow.parquet")
    checkpoint.write_parquet(path, "user", tmp_path / "user.parquet", drop=policy)
    written = parquet.read_table(tmp_path / "user.parquet")
    assert written["ids"].to_pylist() == found["ids"].tolist()
    np.testing.assert_array_equal(np.stack(written["weights"].to_numpy()), found["weights"])


def test_all_rows_may_go(tmp_path):
    """The columns are there all the same, as of a table without rows."""
    module = DynamicEmbedding(2, name="user")
    with torch.no_grad():
        module(torch.arange(5))
    checkpoint.save(tmp_path, module)
    found = checkpoint.read_table(tmp_path, "user", drop=MinNorm(1e9))
    assert {key: value.shape for key, value in found.items()} == {"ids": (0,), "weights": (0, 2)}
    assert checkpoint.read_table(tmp_path, "user", drop=MinNorm(0.0))["ids"].shape == (5,)


def test_a_policy_may_ask_for_what_was_saved_only(tmp_path):
    """The error names policy, column and table; what is no policy is refused."""
    module = DynamicEmbedding(2, name="user")
    with torch.no_grad():
        module(torch.arange(5))
    checkpoint.save(tmp_path, module)
    words = r"drop: GlobalStepFilter\(filter_step=2\) asks for \['last_seen'\], which table 'user'"
    with pytest.raises(ValueError, match=words):
        checkpoint.write_parquet(
            tmp_path, "user", tmp_path / "user.parquet", drop=GlobalStepFilter(2)
        )
    assert not list(tmp_path.glob("*parquet*"))
    with pytest.raises(TypeError, match=r"drop: expected Eviction, got 0\.5"):
        checkpoint.read_table(tmp_path, "user", drop=0.5)
