"""Tables with rows, and a monitored run of two, for tests of monitoring and reports."""

import torch

from recis_lightning import HashTable
from recis_lightning.eviction import GlobalStepFilter
from recis_lightning.monitoring import TableMonitor


def filled(name="t", count=40, **kwargs):
    table = HashTable(2, name=name, **kwargs)
    table.insert(torch.arange(count), torch.randn(count, 2, generator=torch.Generator()))
    return table


def monitored_run(num_points=30):
    """Return the monitor of a run that grows, evicts and evaluates."""
    user, item = filled("user <b>", 10, eviction=GlobalStepFilter(3)), filled("item", 5)
    user.track_readmissions()
    monitor, generator = TableMonitor([user, item]), torch.Generator().manual_seed(4)
    for step in range(1, num_points + 1):
        rows = torch.randn(10, 2, generator=generator)  # the width of bars depends on them
        user.insert(torch.arange(step, step + 10), rows)
        user.update_step()
        user.evict()
        more = {"train_qps": 50.0 + step, "loss": 1 / step}
        monitor.record(10 * step, more | ({"eval_qps": 99.0} if step % 7 == 0 else {}))
    monitor.record(10 * num_points, full=True)
    return monitor
