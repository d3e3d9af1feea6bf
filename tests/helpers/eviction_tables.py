"""Small tables for tests of eviction."""

import torch

from recis_lightning import DynamicEmbedding


def ids(*numbers):
    return torch.tensor(numbers)


def left(module):
    return set(module.table.ids().tolist())


def after_steps(eviction, *batches):
    """Look batches up, one a step."""
    module = DynamicEmbedding(2, eviction=eviction, name="t")
    for batch in batches:
        module(ids(*batch))
        module.table.update_step()
    return module
