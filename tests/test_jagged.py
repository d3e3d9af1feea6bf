"""Jagged: a plain tuple that goes where tensors go; reading the layouts we accept."""

import copy
import itertools
import pickle

import pytest
import torch
from torch.utils.data import DataLoader

from recis_lightning import Jagged, NestedJagged
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


@pytest.mark.parametrize("lengths", [[2, 0, 5], [], [0, 0], [1], [0, 3, 0]])
@pytest.mark.parametrize("weighted", [False, True])
def test_lengths_and_offsets_say_the_same(lengths, weighted):
    """With empty bags at both ends, and none at all."""
    lengths = torch.tensor(lengths, dtype=torch.int64)
    values = torch.arange(int(lengths.sum()))
    jagged = Jagged.from_lengths(values, lengths, values.float() if weighted else None)
    assert jagged.offsets.dtype is torch.int64
    assert torch.equal(jagged.lengths(), lengths)
    assert jagged.num_bags == len(lengths)
    assert (jagged.weights is not None) == weighted
    assert read_bags(jagged, "f").num_bags == len(lengths)


@pytest.mark.parametrize(
    ("lengths", "error", "words"),
    [
        (torch.tensor([1, 2]), ValueError, "lengths: expected .* sum of 7.* sum of 3"),
        (torch.tensor([8, -1]), ValueError, "lengths: expected none negative.* least of -1"),
        (torch.tensor([[7]]), ValueError, r"lengths: expected shape \[B\], got \(1, 1\)"),
        (torch.tensor([7.0]), TypeError, "lengths: expected dtype"),
        ([7], TypeError, "lengths: expected a Tensor of int64 or int32, got list"),
    ],
)
def test_lengths_that_do_not_fit_are_refused(lengths, error, words):
    with pytest.raises(error, match=words):
        Jagged.from_lengths(VALUES, lengths)


def bags_of(jagged):
    """List each bag's values."""
    bounds = jagged.offsets.tolist()
    return [jagged.values[a:b].tolist() for a, b in itertools.pairwise(bounds)]


@pytest.mark.parametrize(
    "samples",
    [
        *(slice(a, b) for a in (0, 1, 3, -1) for b in (0, 1, 2, 3, None)),
        *(torch.tensor(rows, dtype=torch.int64) for rows in ([], [2], [2, 0, 2], [1, 1])),
        torch.tensor([True, False, True]),
    ],
    ids=str,
)
def test_samples_are_selected_with_their_weights(samples):
    """By slices, indices in any order and masks."""
    jagged = Jagged(VALUES, OFFSETS, VALUES + 0.5)
    bags = bags_of(jagged)
    if isinstance(samples, slice):
        expected = bags[samples]
    elif samples.dtype is torch.bool:
        expected = [bag for bag, keep in zip(bags, samples, strict=True) if keep]
    else:
        expected = [bags[row] for row in samples]
    found = jagged.select(samples)
    assert bags_of(found) == expected
    assert torch.equal(found.weights, found.values + 0.5)
    assert torch.equal(jagged.offsets, OFFSETS)


def test_what_selects_no_samples_is_refused():
    jagged = Jagged(VALUES, OFFSETS)
    with pytest.raises(ValueError, match="step of 1"):
        jagged.select(slice(None, None, 2))
    with pytest.raises(TypeError, match="samples: expected a Tensor or a slice, got int"):
        jagged.select(1)
    with pytest.raises(TypeError, match="samples: expected dtype"):
        jagged.select(torch.tensor([0.0]))
    for mask in ([True, False], [True] * 4, [[True, False, True]]):
        with pytest.raises(ValueError, match=r"samples: expected a mask of shape \(3,\)"):
            jagged.select(torch.tensor(mask))
    for rows in ([-1], [0, -2], [3], [0, 2**40], [-(2**63)]):
        with pytest.raises(ValueError, match=rf"samples: expected .* \[0, 3\), got {rows[-1]}"):
            jagged.select(torch.tensor(rows))
    for rows in (0, [[0, 1]]):
        with pytest.raises(ValueError, match=r"samples: expected shape \[n\]"):
            jagged.select(torch.tensor(rows))
    nested = NestedJagged(VALUES, OFFSETS, torch.tensor([0, 1, 3]))
    with pytest.raises(ValueError, match=r"samples: expected numbers in \[0, 2\), got -2"):
        nested.select(torch.tensor([-2]))


@pytest.mark.parametrize(
    "offsets", [[2, 0, 1], [0, 2], [0, 9], [1, 7], [0, 7, 2, 7], [], [[0, 7]], [-1, 7]]
)
def test_offsets_that_do_not_fit_are_refused_where_they_are_used(offsets):
    jagged = Jagged(VALUES, torch.tensor(offsets, dtype=torch.int64))
    words = r"offsets: expected shape .*, from 0 to 7, .*did you pass lengths"
    for use in (jagged.to_padded, lambda: jagged.select(slice(0, 1))):
        with pytest.raises(ValueError, match=words):
            use()


def test_exported_programs_pad_without_a_check():
    class Pad(torch.nn.Module):
        def forward(self, values, offsets):
            return Jagged(values, offsets).to_padded(2)[0]

    program = torch.export.export(Pad(), (VALUES, OFFSETS)).module()
    assert torch.equal(program(VALUES, OFFSETS), Jagged(VALUES, OFFSETS).to_padded(2)[0])


@pytest.mark.parametrize("max_len", [None, 0, 1, 3, 9])
def test_padding(max_len):
    """Longer bags are cut, shorter ones filled; torch's own ragged type agrees."""
    values, mask = Jagged(VALUES, OFFSETS).to_padded(max_len, -1)
    width = 5 if max_len is None else max_len
    assert values.shape == mask.shape == (3, width)
    nested = torch.nested.nested_tensor_from_jagged(VALUES, OFFSETS)
    expected = torch.nested.to_padded_tensor(nested, -1)
    expected = torch.nn.functional.pad(expected, (0, 9), value=-1)[:, :width]
    assert torch.equal(values, expected)
    assert torch.equal(mask, expected != -1)


def test_padding_of_vectors_and_of_nothing():
    """Rows of an embedding are padded whole; no values and no bags are legal."""
    rows = torch.randn(7, 2)
    values, mask = Jagged(rows, OFFSETS).to_padded(2, 0)
    assert torch.equal(values[2], rows[2:4])
    assert torch.equal(values[1], torch.zeros(2, 2))
    assert mask.sum() == 4
    empty, mask = Jagged(VALUES[:0], torch.tensor([0, 0])).to_padded(2, 8)
    assert empty.tolist() == [[8, 8]]
    assert not mask.any()
    assert Jagged(VALUES[:0], torch.tensor([0])).to_padded()[0].shape == (0, 0)
    with pytest.raises(ValueError, match="max_len: expected an int >= 0 or None, got -1"):
        Jagged(VALUES, OFFSETS).to_padded(-1)


def test_it_moves_as_lightning_moves_tensors(monkeypatch):
    """All parts, and without waiting only on the way to a GPU."""
    from lightning.pytorch.utilities import move_data_to_device

    asked = []
    to = torch.Tensor.to

    def record(self, device, non_blocking=False):
        asked.append((str(device), non_blocking))
        return to(self, "meta")

    monkeypatch.setattr(torch.Tensor, "to", record)
    jagged = Jagged(VALUES, OFFSETS, VALUES.float())
    moved = move_data_to_device({"f": jagged}, torch.device("cuda", 0))["f"]
    assert isinstance(moved, Jagged)
    assert {part.device.type for part in moved} == {"meta"}
    assert asked == [("cuda:0", True)] * 3
    asked.clear()
    assert jagged[:2] == Jagged(VALUES, OFFSETS)[:2]
    assert Jagged(VALUES, OFFSETS).to("cpu").weights is None
    assert asked == [("cpu", False)] * 2


def test_memory_is_pinned_part_by_part(monkeypatch):
    """A loader's pin_memory gives a Jagged, with or without weights."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self + 1)
    pinned = Jagged(VALUES, OFFSETS).pin_memory()
    assert pinned.values.tolist() == (VALUES + 1).tolist()
    assert pinned.offsets.tolist() == (OFFSETS + 1).tolist()
    assert pinned.weights is None
    assert Jagged(VALUES, OFFSETS, VALUES.float()).pin_memory().weights[0] == 1


def test_a_method_of_tensors_says_how_to_get_one():
    """As a feature of mode "none" is taken for a tensor; other attributes are simply not there."""
    bags = Jagged(torch.tensor([1, 2]), torch.tensor([0, 2]))
    with pytest.raises(AttributeError, match=r"no attribute 'sum'; .*to_padded\(\).*mode='sum'"):
        bags.sum()
    with pytest.raises(AttributeError, match=r"^'Jagged' object has no attribute 'wieghts'$"):
        bags.wieghts  # noqa: B018
    assert getattr(bags, "stride", None) is None
    assert copy.deepcopy(bags)[0].tolist() == pickle.loads(pickle.dumps(bags))[0].tolist() == [1, 2]


def test_parts_that_do_not_fit_are_named():
    lengths = torch.tensor([2, 5])
    for values in ([1, 2, 3, 4, 5, 6, 7], torch.tensor(7)):
        with pytest.raises(TypeError, match=r"values: expected a Tensor \[N, \.\.\.\], got"):
            Jagged.from_lengths(values, lengths)
    for count in (6, 8):
        with pytest.raises(
            ValueError, match=rf"weights: expected shape \[7\], .*, got \[{count}\]"
        ):
            Jagged.from_lengths(VALUES, lengths, torch.ones(count))
