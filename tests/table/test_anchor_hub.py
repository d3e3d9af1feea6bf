"""Hubs: leaves for the anchors of several tables."""

import pytest
import torch

from recis_lightning import HashTable
from recis_lightning.table.anchor_hub import AnchorHub


class Asking(torch.autograd.Function):
    """Notes what a pass asks of a hub; its gradient goes to a weight alone."""

    @staticmethod
    def forward(ctx, hub, said, weight, joined):
        ctx.hub, ctx.said = hub, said
        return weight.clone()

    @staticmethod
    def backward(ctx, gradient):
        ctx.said.append(ctx.hub.asked())
        return None, None, gradient, None


@pytest.mark.parametrize("trainable", [(True, True, True), (True, False, True), (False, True)])
def test_a_pass_says_which_tables_it_is_asked_for(trainable):
    """All that train, or those whose anchors it is given; any number of passes."""
    tables = [HashTable(1, trainable=trains) for trains in trainable]
    anchors = [table.anchor for table in tables]
    with torch.inference_mode():
        hub = AnchorHub(anchors)
    assert hub.joined.requires_grad
    weight, said = torch.ones(1, requires_grad=True), []

    def out():
        return Asking.apply(hub, said, weight, hub.joined)

    out().backward()
    out().backward(inputs=[weight])
    last = len(tables) - 1
    out().backward(inputs=[weight, anchors[last]])
    torch.autograd.grad(out(), [weight])
    torch.autograd.grad(out(), [weight, anchors[last]], allow_unused=True)
    none = [False] * len(tables)
    assert said == [list(trainable), none, [*none[:-1], trainable[last]], none, none]
    assert all(anchor.grad is None for anchor in anchors)
