"""FlopCount: exact operations of forward and backward passes."""

import torch

from recis_lightning import DynamicEmbedding
from recis_lightning.monitoring.flop_count import FlopCount


def test_forward_and_backward_of_a_tower_over_a_table():
    """A linear layer multiplies three times: forward, for its inputs, and for its weights."""
    embedding, tower = DynamicEmbedding(4), torch.nn.Linear(4, 3)
    count = FlopCount()
    count.start()
    tower(embedding(torch.arange(5))).sum().backward()
    assert count.stop() == 3 * (2 * 5 * 4 * 3)
    assert count.stop() is None
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None
