"""bytes_of: operators of torch, by hand-counted bytes."""

import pytest
import torch

from recis_lightning.monitoring.operator_bytes import bytes_of

aten = torch.ops.aten
x, ids = torch.ones(6, 4), torch.tensor([1, 2, 2])


def count(func, *args, **kwargs):
    return bytes_of(func, args, kwargs, func(*args, **kwargs))


@pytest.mark.parametrize(
    ("func", "args", "wanted"),
    [
        (aten.add.Tensor, (x, x), 2 * 96),  # one tensor, read once
        (aten.add.Tensor, (x, 2 * x), 3 * 96),
        (aten.mm.default, (x, torch.ones(4, 2)), 96 + 32 + 48),
        (aten.sum.default, (x,), 96 + 4),
        (aten.add.Tensor, (x, torch.ones(1, 4).expand(6, 4)), 96 + 16 + 96),
        (aten.view.default, (x, (4, 6)), 0),
        (aten.t.default, (x,), 0),
        (aten.empty.memory_format, ((7,),), 0),
        (aten.zeros.default, ((7,),), 28),
        (aten.embedding.default, (x, ids), 24 + 2 * 48),
        (aten.index_select.default, (x, 0, ids), 24 + 2 * 48),
        (aten.index_add_.default, (x.clone(), 0, ids, torch.ones(3, 4)), 24 + 48 + 2 * 48),
        (aten.mul_.Tensor, (x.clone(), 2.0), 2 * 96),
        (aten.copy_.default, (x.clone(), 2 * x), 3 * 96),
        (aten.sum.default, (torch.empty(0, 4),), 4),
    ],
)
def test_bytes(func, args, wanted):
    assert count(func, *args) == wanted


def test_lists_and_results_by_argument():
    """``_foreach_add_`` changes a list; ``out=`` is written, and read as any tensor is."""
    values = [torch.ones(3), torch.ones(5)]
    assert count(aten._foreach_add_.Scalar, values, 1.0) == 2 * 32
    out = torch.empty(6, 4)
    assert count(aten.add.out, x, x, out=out) == 3 * 96


def test_sparse_tensors_count_nothing():
    assert count(aten.neg.default, torch.ones(3).to_sparse()) == 0
