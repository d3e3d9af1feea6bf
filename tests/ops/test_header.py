"""Header: counts that the host has seen, and those that may have come since."""

import torch

from recis_lightning.ops.header import Header, watch_counts

CPU = torch.device("cpu")


def test_the_host_knows_what_may_have_been_inserted():
    """It takes every id for new until it sees the counts, and never waits for them."""
    header, other, whole = (Header(CPU, is_mirrored) for is_mirrored in (True, True, False))
    header.note_insertion(10)
    header.tensor[3], other.tensor[3] = 4, 6  # what kernels counted
    watch_counts([header, whole, other])
    watch_counts([whole])
    assert other.unacknowledged() == 0
    assert other.fields[3] == 6
    header.note_insertion(5)
    assert header.unacknowledged() == 5
    assert header.fields[3] == 4
    header.tensor[3] = 9
    assert header.unacknowledged() == 5  # nobody has asked since
    assert header.read_counts()[3] == 9
    assert header.unacknowledged() == 0
