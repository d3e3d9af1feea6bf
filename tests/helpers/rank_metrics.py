"""What ranks run in the tests of metrics that a thread computes."""

import threading
from unittest import mock

import torch
from torch import distributed
from torchmetrics import MetricCollection
from torchmetrics.classification import BinaryAUROC, BinaryAveragePrecision

from recis_lightning.metrics import GAUC, add_metric, clear_metrics
from recis_lightning.metrics.values import by_member, registered_values


def samples(rank):
    """Return scores, targets and groups of a rank; rank 1 has none."""
    generator = torch.Generator().manual_seed(rank)
    count = 0 if rank == 1 else 40 + rank
    return (
        torch.rand(count, generator=generator),
        torch.randint(0, 2, (count,), generator=generator),
        torch.randint(0, 3, (count,), generator=generator),
    )


def report():
    """Return the values, the threads that communicated, and how many samples this rank keeps."""
    rank, world_size = distributed.get_rank(), distributed.get_world_size()
    preds, target, groups = samples(rank)
    gauc, both = GAUC(), MetricCollection([BinaryAUROC(), BinaryAveragePrecision()])
    if len(preds):
        gauc.update(preds, target, groups)
        both.update(preds, target)
    threads, gather = set(), distributed.all_gather

    def listen(*args, **kwargs):
        threads.add(threading.current_thread().name)
        return gather(*args, **kwargs)

    add_metric("gauc", gauc)
    add_metric("both", both)
    try:
        with mock.patch.object(distributed, "all_gather", listen):
            late = registered_values(world_size, background=True)
            values = {}
            for name, thread in late.items():
                values.update(by_member(name, thread.values()[name]))
    finally:
        clear_metrics()
    numbers = {name: float(value) for name, value in values.items()}
    return numbers, threads, sum(map(len, gauc.preds))
