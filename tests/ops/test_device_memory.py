from unittest.mock import patch

import pytest
import torch

from recis_lightning.ops import device_memory

_CPU = torch.device("cpu")


@pytest.mark.parametrize("shape", [0, 3, (2, 5)])
def test_memory_of_inference_mode_may_be_changed_outside(shape):
    with torch.inference_mode():
        made = device_memory.zeros(shape, torch.int64, _CPU)
    assert not made.is_inference()
    assert made.dtype is torch.int64
    assert torch.equal(made.add_(1), torch.ones_like(made))


def test_no_memory_is_a_memory_error_that_says_how_much():
    error = torch.OutOfMemoryError("CUDA out of memory")
    with (
        patch.object(torch, "empty", side_effect=error),
        pytest.raises(MemoryError, match=r"^80 bytes on cpu$"),
    ):
        device_memory.empty((2, 5), torch.int64, _CPU)
