"""add_to_trace: copies of values, for the collections that are open."""

import pytest
import torch

from recis_lightning.trace import add_to_trace, collect_trace


def test_values_are_those_of_the_moment(tmp_path):
    """A tensor may be changed in place after it was added, as optimizers do."""
    value = torch.tensor([1.0])
    with collect_trace(["a"]) as found:
        add_to_trace("a", value)
        add_to_trace("b", value)
        value.fill_(2.0)
    add_to_trace("a", value)
    assert found == {"a": torch.tensor([1.0])}


def test_arguments_are_checked():
    with pytest.raises(TypeError, match="name: expected a str"):
        add_to_trace(3, torch.zeros(1))
    with collect_trace(), pytest.raises(TypeError, match=r"'x': expected a tensor, .* got object"):
        add_to_trace("x", object())
