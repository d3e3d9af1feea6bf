"""Messages of several parts that travel together."""

import pytest
import torch

from tests.helpers import rank_joined_messages


@pytest.mark.parametrize("world_size", [2, 3])
def test_each_part_arrives_as_if_it_travelled_alone(ranks, world_size):
    """Of several dtypes and shapes, with empty parts, in one all-to-all."""
    for one, other in ranks.run(world_size, rank_joined_messages.exchanged, timeout_s=150):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
