"""Bits of a ledger in a head, and what counts as a backward pass."""

import numpy as np
import pytest
import torch

from recis_lightning.lookup import gradient_ledger
from recis_lightning.lookup.gradient_ledger import split_bits, stack_bits


@pytest.mark.parametrize("size", [0, 1, 56, 57, 1064])
def test_bits_come_back(size):
    """Those of each rank and kind, however many."""
    flags = np.random.default_rng(size).random((2, 3, size)) < 0.5
    lines = np.stack([stack_bits(*rank.tolist(), size=19) for rank in flags])
    assert lines.shape == (2, 57)
    assert np.array_equal(split_bits(lines, 3, size), flags)


def test_a_backward_pass_of_any_loss_counts(monkeypatch):
    """Once it is asked to; ``torch.autograd.backward`` does what it did."""
    original = torch.autograd.backward
    monkeypatch.setattr(torch.autograd, "backward", original)  # put back at the end
    gradient_ledger.count_backward_passes()
    counted = torch.autograd.backward
    gradient_ledger.count_backward_passes()
    assert torch.autograd.backward is counted
    weight = torch.ones(2, requires_grad=True)
    ledger = gradient_ledger.GradientLedger()
    assert not ledger.ran_backward
    (3 * weight).sum().backward()
    assert ledger.ran_backward
    ledger.note_sent()
    assert not ledger.ran_backward
    assert weight.grad.tolist() == [3, 3]
