"""Listeners that hear when tables begin to train."""

import torch

from recis_lightning import DynamicEmbedding, hash_tables
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
