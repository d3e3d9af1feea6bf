"""Collectives: process groups that cannot carry a table are refused."""

import pytest
import torch

from recis_lightning.distributed import collectives


class Group:
    """A process group with a backend for some devices."""

    def __init__(self, backends):
        self.backends = backends

    def _get_backend(self, device):
        if device.type not in self.backends:
            raise RuntimeError("No backend type associated with device type")
        return self

    def name(self):
        return next(iter(self.backends.values()))


@pytest.mark.parametrize(
    ("backends", "device", "says"),
    [
        ({"cpu": "gloo", "cuda": "gloo"}, "cuda:1", "'cuda:1'.*backend 'gloo'; expected 'nccl'"),
        ({"cpu": "gloo"}, "cuda", "'cuda'.*backend 'none'; expected 'nccl'"),
        ({"cuda": "nccl"}, "cpu", "'cpu'.*backend 'none'; expected 'gloo'.*cpu:gloo,cuda:nccl"),
        ({"cuda": "nccl"}, "cuda", None),
        ({"cpu": "gloo"}, "cpu", None),
    ],
)
def test_a_process_group_that_cannot_carry_a_table_is_refused(monkeypatch, backends, device, says):
    c10d = torch.distributed.distributed_c10d
    monkeypatch.setattr(c10d, "_get_default_group", lambda: Group(backends))
    if says is None:
        collectives.check_backend("user", torch.device(device))
        return
    with pytest.raises(ValueError, match=f"device: table 'user' is on {says}"):
        collectives.check_backend("user", torch.device(device))
