"""Jagged: a plain tuple that goes where tensors go; reading the layouts we accept."""

import copy
import pickle

import pytest
import torch
from torch.utils.data import DataLoader

from recis_lightning import Jagged
from recis_lightning.jagged import read_bags, read_features

VALUES, OFFSETS = torch.arange(7), torch.tensor([0, 2, 2, 7])


def test_a_jagged_is_a_tuple():
    """It unpacks, copies, pickles and compares as one."""
    jagged = Jagged(VALUES, OFFSETS)
    values, offsets, weights = jagged
    assert values is VALUES
    assert offsets is OFFSETS
    assert weights is None
    assert jagged.num_bags == 3
    for twin in (copy.deepcopy(jagged), pickle.loads(pickle.dumps(jagged))):
        assert isinstance(twin, Jagged)
        assert torch.equal(twin.values, VALUES)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_jagged_passes_through_a_loader(workers):
    """With worker processes and without."""
    data = [Jagged(VALUES, OFFSETS, torch.ones(7))]
    loader = DataLoader(data, batch_size=None, num_workers=workers)
    (batch,) = loader
    assert isinstance(batch, Jagged)
    assert torch.equal(batch.offsets, OFFSETS)


def test_dense_ids():
    """The last dimension of two or more is the bag."""
    for shape, bags, length in [((6,), 6, 1), ((2, 3), 2, 3), ((2, 3, 4), 6, 4), ((), 1, 1)]:
        read = read_bags(torch.zeros(shape, dtype=torch.int64), "f")
        assert (read.num_bags, read.bag_length, read.shape) == (bags, length, shape)
    assert read_bags(torch.zeros((5, 0), dtype=torch.int64), "f").num_bags == 5


def test_ragged_ids_are_read_without_a_copy():
    """Values and offsets are those given."""
    read = read_bags(Jagged(VALUES, OFFSETS), "f")
    assert read.ids.data_ptr() == VALUES.data_ptr()
    assert read.offsets.data_ptr() == OFFSETS.data_ptr()
    assert (read.num_bags, read.bag_length, read.shape) == (3, -1, None)
    assert read_bags(tuple(Jagged(VALUES, OFFSETS)), "f").num_bags == 3  # a collated tuple


def test_int32_is_widened():
    """Values and offsets, of all layouts."""
    short, weights = VALUES.int(), torch.ones(7)
    nested = torch.nested.nested_tensor_from_jagged(short, OFFSETS)
    for feature in (
        short,
        short.view(7, 1),
        (short, weights),
        Jagged(short, OFFSETS.int()),
        nested,
    ):
        read = read_bags(feature, "f")
        assert read.ids.dtype is torch.int64
        assert torch.equal(read.ids, VALUES)
        if read.offsets is not None:
            assert read.offsets.dtype is torch.int64
            assert torch.equal(read.offsets, OFFSETS)
    both = read_features({"a": short, "b": VALUES}, ["a", "b"])
    assert [ids.dtype for ids in both.ids] == [torch.int64] * 2


@pytest.mark.parametrize(
    ("feature", "words"),
    [
        (VALUES.to_sparse(), r"f: expected a dense Tensor, got one of layout torch\.sparse_coo"),
        ((VALUES, torch.ones(7).to_sparse()), r"f\.weights: expected a dense Tensor"),
    ],
)
def test_sparse_tensors_are_refused(feature, words):
    """Kernels read memory that is dense."""
    with pytest.raises(TypeError, match=words):
        read_features({"f": feature}, ["f"])


def test_weights_that_are_negated_views_keep_their_sign():
    """Their memory holds the negative values."""
    read = read_bags((VALUES, torch._neg_view(torch.ones(7))), "f")
    assert (read.weights.numpy() == -1).all()


def test_nested_tensors_with_holes_are_closed():
    """Torch lets a NestedTensor skip values between its bags."""
    nested = torch.nested.narrow(
        torch.arange(12).view(3, 4),
        1,
        torch.tensor([0, 1, 0]),
        torch.tensor([2, 0, 3]),
        layout=torch.jagged,
    )
    read = read_bags(nested, "f")
    assert read.ids.tolist() == [0, 1, 8, 9, 10]
    assert read.offsets.tolist() == [0, 2, 2, 5]
    assert read.nested


def test_weights_become_float32():
    """Of any floating dtype and any strides."""
    weights = torch.ones(14, dtype=torch.float64)[::2]
    read = read_bags(Jagged(VALUES, OFFSETS, weights), "f")
    assert read.weights.dtype is torch.float32
    assert read.weights.is_contiguous()


@pytest.mark.parametrize(
    ("feature", "error", "words"),
    [
        (7, TypeError, r"f: expected a Tensor of int64 or int32, .*got int"),
        ([1], TypeError, "f: expected a Tensor of int64 or int32, .*got list"),
        (VALUES.float(), TypeError, r"f: expected .*got torch\.float32"),
        (Jagged(VALUES.short(), OFFSETS), TypeError, r"f\.values: .*got torch\.int16"),
        (Jagged(VALUES, OFFSETS.short()), TypeError, r"f\.offsets: .*got torch\.int16"),
        (Jagged(VALUES.view(7, 1), OFFSETS), ValueError, r"f\.values: .*got \(7, 1\)"),
        (Jagged(VALUES, OFFSETS[:0]), ValueError, r"f\.offsets: .*got \(0,\)"),
        (Jagged(VALUES, OFFSETS[:1]), ValueError, r"f\.offsets: no bags, but 7 values"),
        (Jagged(VALUES, OFFSETS, VALUES), TypeError, "f: expected weights as a floating-point"),
        (Jagged(VALUES, OFFSETS, torch.ones(6)), ValueError, r"f: .*\(7,\), got \(6,\)"),
        ((VALUES, torch.ones(2)), ValueError, r"f: .*\(7,\), got \(2,\)"),
    ],
)
def test_what_cannot_be_read(feature, error, words):
    """The error names the feature and what was wrong with it."""
    with pytest.raises(error, match=words):
        read_bags(feature, "f")


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype")
def test_other_nested_tensors_are_refused():
    """Strided ones, and ragged ones of more dimensions."""
    strided = torch.nested.nested_tensor([VALUES, VALUES[:2]], layout=torch.strided)
    with pytest.raises(TypeError, match=r"f: expected a NestedTensor of layout torch\.jagged"):
        read_bags(strided, "f")
    deep = torch.nested.nested_tensor_from_jagged(VALUES.view(7, 1), OFFSETS)
    with pytest.raises(ValueError, match=r"f: expected a NestedTensor \[B, j\], got 3 dimensions"):
        read_bags(deep, "f")


def test_many_plain_features_are_read_as_each_alone():
    """One pass over all of them, also by position, from behind and in part."""
    features = {"a": torch.arange(3), "b": torch.arange(0), "c": torch.arange(5)}
    names = ["c", "a", "b"]
    together = read_features(features, names)
    apart = [read_bags(features[name], name) for name in names]
    assert not together.details
    assert together.sizes == [5, 3, 0]
    pairs = [*zip(together, apart, strict=True), (together[-1], apart[-1])]
    for one, two in [*pairs, *zip(together[1:], apart[1:], strict=True)]:
        assert one[1:] == two[1:]
        assert one.ids is two.ids


@pytest.mark.parametrize(
    "other",
    [
        torch.arange(6).view(3, 2),
        torch.arange(6)[::2],
        Jagged(VALUES, OFFSETS),
        (torch.arange(3), torch.ones(3)),
    ],
)
def test_features_of_several_kinds_are_read_one_by_one(other):
    """One that is not plain is enough."""
    bags = read_features({"a": torch.arange(3), "b": other}, ["a", "b"])
    assert len(bags.details) == 2
    assert bags[1].ids.is_contiguous()
    assert bags[1][1:2] == read_bags(other, "b")[1:2]


def test_a_plain_feature_of_another_dtype_is_named():
    """It is refused by its name, as it is alone."""
    with pytest.raises(TypeError, match=r"^b: expected dtype torch\.int64 or torch\.int32"):
        read_features({"a": torch.arange(3), "b": torch.arange(3.0)}, ["a", "b"])
