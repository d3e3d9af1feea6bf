"""Sharded tables train as unsharded ones do: real processes, the same global batches."""

import numpy as np
import pytest
import torch

from recis_lightning.admission import MinCount, Probability, ReadOnly
from recis_lightning.distributed.ownership import owner_of
from recis_lightning.eviction import AnyOf, GlobalStepFilter, MaxRows
from tests.helpers import rank_training as checks

OPTIMIZERS = ["SparseSGD", "SparseAdagrad", "SparseRowwiseAdagrad", "SparseAdam", "SparseAdamW"]


def joined(answers, table):
    """Return the shards of a table as one table, by id, after checking who holds what."""
    shards = [answer["tables"][table] for answer in answers]
    for rank, shard in enumerate(shards):
        assert (owner_of(torch.from_numpy(shard["ids"]), len(shards)) == rank).all()
    order = np.concatenate([shard["ids"] for shard in shards]).argsort()
    columns = [key for key in shards[0] if isinstance(shards[0][key], np.ndarray)]
    whole = {key: np.concatenate([shard[key] for shard in shards]) for key in columns}
    whole = {key: _by_id(col) if key == "pending" else col[order] for key, col in whole.items()}
    assert len({(shard["num_updates"], shard["step"]) for shard in shards}) == 1
    return whole | {key: shards[0][key] for key in ("num_updates", "step")}


def _by_id(pending):
    return pending[pending[:, 0].argsort()]


def assert_same_training(ours, theirs):
    """Compare ranks' answers with one process's: ids and counts exactly, the rest to rounding."""
    (theirs,) = theirs
    for answer in ours:
        for name, value in theirs["tower"].items():
            np.testing.assert_allclose(answer["tower"][name], value, rtol=2e-4, atol=2e-5)
    for name, wanted in theirs["tables"].items():
        found = joined(ours, name)
        assert len(wanted["ids"])
        for key, value in wanted.items():
            if key in ("ids", "last_seen", "num_updates", "pending", "step"):
                assert np.array_equal(found[key], value), (name, key)
            else:
                np.testing.assert_allclose(found[key], value, rtol=2e-3, atol=2e-4, err_msg=key)
    for key in ("sizes", "counts"):
        assert np.array_equal(np.sum([answer[key] for answer in ours], 0), theirs[key])
    scores = np.concatenate([answer["scores"] for answer in ours])
    np.testing.assert_allclose(scores, theirs["scores"], rtol=1e-3, atol=1e-4)


def assert_sharding_changes_nothing(ranks, world_size, **plan):
    """Train on several ranks and on one, and compare."""
    ours = ranks.run(world_size, checks.train, **plan)
    assert_same_training(ours, ranks.run(1, checks.train, **plan))
    return ours


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.slow_except(
    dict(world_size=2, optimizer=["SparseSGD", "SparseRowwiseAdagrad"]),
    dict(world_size=4, optimizer=["SparseAdagrad", "SparseAdam"]),
)
def test_sharded_is_unsharded(ranks, optimizer, world_size):
    """50 steps of every optimizer, with uneven parts, an empty rank and evictions."""
    plan = {"optimizer": optimizer, "steps": 50, "model": {"eviction": GlobalStepFilter(6)}}
    ours = assert_sharding_changes_nothing(ranks, world_size, **plan)
    assert sum(evicted for *_, evicted in ours[0]["counts"]) > 20


@pytest.mark.parametrize(
    "kwargs",
    [
        {"optimizer": "SparseFTRL", "l1": 0.01, "l2": 0.1},
        {"optimizer": "SparseLion", "weight_decay": 0.1},
        {"optimizer": "SparseRMSprop", "weight_decay": 0.1, "eps": 1e-3},
        {"optimizer": "SparseRowwiseAdam", "weight_decay": 0.1, "cow_clip": (0.05, 1e-3)},
        {
            "optimizer": "SparseSGD",
            "momentum": 0.9,
            "nesterov": True,
            "weight_decay": 0.1,
            "cow_clip": (0.1, 0.01),
        },
        {"optimizer": "SparseAdamAR", "alpha": 0.1, "eps": 1e-3},
        {"optimizer": "SparseRowwiseAdagrad", "weight_decay": 0.1},
    ],
    ids=lambda kwargs: kwargs["optimizer"],
)
@pytest.mark.slow_except(dict(id=["SparseFTRL", "SparseRowwiseAdam", "SparseSGD"]))
def test_sharded_is_unsharded_with_accumulation(ranks, kwargs):
    """Rules and weight decay see a row's gradient of all ranks and micro-batches, once a step."""
    world_size = 3 if "cow_clip" in kwargs else 2
    assert_sharding_changes_nothing(ranks, world_size, steps=8, accumulate=2, **kwargs)


@pytest.mark.parametrize("admission", [None, MinCount(2)])
def test_the_order_of_received_ids_changes_nothing(ranks, admission):
    """Parts by rank and table, or by table alone: the same rows, state and counts, bit by bit."""
    plan = {"optimizer": "SparseAdam", "steps": 6, "model": {"admission": admission}}
    by_rank = ranks.run(4, checks.train_in_parts_of, 0, **plan)
    by_table = ranks.run(4, checks.train_in_parts_of, 10**6, **plan)
    for one, other in zip(by_rank, by_table, strict=True):
        assert np.sum(one["sizes"])
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.interpreted
@pytest.mark.parametrize(
    "kwargs",
    [
        {"optimizer": "SparseAdam", "model": {"eviction": GlobalStepFilter(1)}},
        {"optimizer": "SparseSGD", "clip_grad_norm": 0.05, "model": {"admission": MinCount(2)}},
    ],
    ids=lambda kwargs: kwargs["optimizer"],
)
@pytest.mark.slow_except(dict(id="SparseSGD"))
def test_sharded_is_unsharded_as_beside_a_gpu(ranks, kwargs):
    """Triton's kernels over the CPU's memory, and tables as beside a GPU, their headers split."""
    plan = {"steps": 3, **kwargs}
    ours = ranks.run(2, checks.train_on, "triton", **plan)
    assert_same_training(ours, ranks.run(1, checks.train, **plan))


@pytest.mark.parametrize(
    ("backend", "device"),
    [("gloo", "cpu"), pytest.param("nccl", "cuda", marks=pytest.mark.gpu)],
)
def test_one_rank_may_take_the_way_of_many(ranks, backend, device):
    """It sends itself ids, rows and gradients: all there is to NCCL's way but a second GPU."""
    plan = {"optimizer": "SparseAdam", "steps": 10, "model": {"admission": MinCount(2)}}
    ours = ranks.run(1, checks.train_alone, backend, device=device, **plan)
    assert_same_training(ours, ranks.run(1, checks.train, **plan))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_sharded_over_gpus_is_unsharded(ranks, optimizer):
    """Two GPUs by NCCL against one process on the CPU."""
    plan = {"optimizer": optimizer, "steps": 20, "model": {"eviction": GlobalStepFilter(6)}}
    ours = ranks.run(2, checks.train, group_backend="nccl", device="cuda", **plan)
    assert_same_training(ours, ranks.run(1, checks.train, **plan))


@pytest.mark.parametrize(
    "kwargs",
    [
        {"accumulate": 3},
        {"clip_grad_norm": 0.05},
        {"clip_grad_value": 0.01},
        {"cow_clip": (0.05, 1e-3), "clip": (0.1, 2.0)},
        {"model": {"admission": MinCount(3)}},
        {"model": {"admission": MinCount(3, per="batch"), "eviction": GlobalStepFilter(3)}},
        {"model": {"eviction": MaxRows(20, by="count")}},
        {"model": {"admission": Probability(0.5)}},
    ],
    ids=repr,
)
def test_everything_else_is_global_too(ranks, kwargs):
    """Accumulation, clipping and admission: sums, norms and sightings are those of all ranks."""
    assert_sharding_changes_nothing(ranks, 2, optimizer="SparseAdam", steps=10, **kwargs)


@pytest.mark.parametrize("admission", [None, ReadOnly()])
def test_a_state_of_one_process_goes_on_on_many(ranks, admission):
    """Every rank loads all rows and keeps its own."""
    (start,) = ranks.run(1, checks.saved, "SparseAdam", 6)
    plan = {"optimizer": "SparseAdam", "steps": 6, "first": 6, "start": start}
    plan["model"] = {"admission": admission}
    assert_sharding_changes_nothing(ranks, 4, **plan)


@pytest.mark.parametrize(
    "policy",
    [
        MaxRows(30),
        MaxRows(7, by="count"),
        AnyOf([GlobalStepFilter(4), MaxRows(20, by="count")]),
        MaxRows(10**6),
    ],
    ids=repr,
)
def test_eviction_is_of_all_ranks_together(ranks, policy):
    """MaxRows(n) leaves n rows in all shards together, and the same ones as a single table."""
    [(num_gone, expected)] = ranks.run(1, checks.evict, policy, 8, timeout_s=150)
    for world_size in (2, 4):
        answers = ranks.run(world_size, checks.evict, policy, 8, timeout_s=150)
        assert sorted(i for _, left in answers for i in left) == sorted(expected)
        assert sum(gone for gone, _ in answers) == num_gone
