"""Tables that are made, moved or filled in inference mode train as any others."""

import pytest
import torch

from recis_lightning import DynamicEmbedding, hash_tables
from recis_lightning.admission import BloomCount, MinCount
from recis_lightning.eviction import AnyOf, GlobalStepFilter, TimeToLive
from recis_lightning.ops import backend as ops_backend
from recis_lightning.optim import SparseAdam
from tests.helpers.sample_tables import same


def _make(admission):
    eviction = AnyOf([GlobalStepFilter(1), TimeToLive(3600, clock=lambda: 0.0)])
    module = DynamicEmbedding(3, name="t", admission=admission, eviction=eviction)
    for _ in range(2):
        module(torch.arange(40))
    return module, SparseAdam(hash_tables(module), lr=0.1)


def _use(module, sparse):
    """Do all that writes to a table, and return its state."""
    for first in (30, 80):
        for _ in range(2):
            module(torch.arange(first, first + 40)).square().sum().backward()
            sparse.step()
        module.table.update_step()
    module.table.insert(torch.tensor([7]), torch.ones(1, 3))
    module.table.delete(torch.tensor([8, 9]))
    module.table.evict()
    module.table.compact()
    state = module.table.get_extra_state()
    module.table.clear()
    module.load_state_dict({"table._extra_state": state})
    module(torch.arange(5)).sum().backward()
    sparse.step()
    return module.table.get_extra_state()


@pytest.mark.parametrize("admission", [None, MinCount(2), BloomCount(2, 64)], ids=repr)
@pytest.mark.parametrize("kernels", ["cpu", pytest.param("triton", marks=pytest.mark.interpreted)])
@pytest.mark.slow_except(dict(kernels="cpu"), dict(admission=None))
def test_a_table_made_in_inference_mode_trains_outside(kernels, admission):
    """Its memory is not of inference mode, which nothing outside may change in place."""
    with ops_backend.use(kernels):
        with torch.inference_mode():
            ours = _make(admission)
        assert same(_use(*ours), _use(*_make(admission)))
