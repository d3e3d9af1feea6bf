"""What metrics are updated with: the argument that is wrong is named."""

import pytest
import torch

from recis_lightning.metrics.checks import check_tensors, is_finite_weight


def test_arguments_that_are_no_tensors_are_named():
    check_tensors(torch.ones(1), target=torch.ones(1), weights=None)
    with pytest.raises(TypeError, match="target: expected a Tensor, got list"):
        check_tensors(torch.ones(1), target=[1])
    with pytest.raises(TypeError, match="preds: expected a floating point dtype"):
        check_tensors(torch.ones(1).long())
    with pytest.raises(TypeError, match="preds: expected a floating point dtype, got None"):
        check_tensors(None)


@pytest.mark.parametrize(
    ("weights", "wanted"),
    [
        *(([], True), ([0.0, 3e38], True)),
        *(([-1e-30], False), ([torch.inf], False), ([1.0, torch.nan], False)),
    ],
)
def test_weights_are_finite(weights, wanted):
    assert is_finite_weight(torch.tensor(weights)) is wanted
