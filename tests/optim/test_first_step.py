"""Listeners that hear when tables begin to train."""

import pytest
import torch

from recis_lightning import DynamicEmbedding, hash_tables
from recis_lightning.initializers import Constant
from recis_lightning.optim import SparseSGD, first_step


def test_an_optimizer_announces_its_first_step_once(monkeypatch):
    monkeypatch.setattr(first_step, "_listeners", [])
    heard = []
    first_step.on_first_step(heard.append)
    user = DynamicEmbedding(2, name="user")
    optimizer = SparseSGD(hash_tables(user), lr=0.1)
    assert heard == []
    for batch in range(3):
        user(torch.arange(100 * batch, 100 * batch + 100)).sum().backward()
        optimizer.step()
    assert heard == [[user.table]]


def test_a_first_step_that_was_interrupted_is_done_again(monkeypatch):
    """Not left out: what the next step finds noted is whole."""

    def interrupt(tables):
        raise KeyboardInterrupt

    monkeypatch.setattr(first_step, "_listeners", [interrupt])
    user = DynamicEmbedding(2, name="user", initializer=Constant(1.0))
    optimizer = SparseSGD(hash_tables(user), lr=0.5)
    user(torch.arange(3)).sum().backward()
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    optimizer.step()
    assert torch.equal(user.table.embeddings(torch.arange(3)), torch.full((3, 2), 0.5))
    assert not user.table.pending
