"""Columns: types, nulls, lists and the settings of each kind."""

import datetime
import decimal

import pyarrow as pa
import pytest
import torch

from recis_lightning.data import Id, IdBags, IdList, Label, Number, hash_strings


def read(column, **arrays):
    return column.read(arrays)


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (pa.array([-5, 3], pa.int8()), [-5, 3]),
        (pa.array([2**64 - 1, 3], pa.uint64()), [-1, 3]),
        (pa.array([True, False]), [1, 0]),
        (pa.array([decimal.Decimal("12.00"), decimal.Decimal("-3.00")]), [12, -3]),
        (pa.array([7, 9], pa.timestamp("us")), [7, 9]),
        (pa.array([7, 9], pa.timestamp("s", tz="UTC")), [7, 9]),
        (pa.array([7, 9], pa.date32()), [7, 9]),
        (pa.array([7, 9], pa.time32("ms")), [7, 9]),
        (pa.array([7, 9], pa.duration("ns")), [7, 9]),
        (pa.array([[4], [5]]), [4, 5]),
        (pa.array([4, 5, 4]).dictionary_encode(), [4, 5, 4]),
    ],
    ids=lambda value: str(getattr(value, "type", "")),
)
def test_ids_as_they_are(array, expected):
    found = read(Id("x"), x=array)
    assert found.dtype is torch.int64
    assert found.tolist() == expected
    assert read(Id("x"), x=array[1:]).tolist() == expected[1:]
    holes = pa.concat_arrays([array, pa.nulls(1, array.type)])
    assert read(Id("x", default=77), x=holes).tolist() == [*expected, 77]


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (pa.array([-5, 3], pa.int8()), [-5.0, 3.0]),
        (pa.array([0.5, float("inf")], pa.float64()), [0.5, float("inf")]),
        (pa.array([0.5, 2.0], pa.float16()), [0.5, 2.0]),
        (pa.array([True, False]), [1.0, 0.0]),
        (pa.array([decimal.Decimal("1.25"), decimal.Decimal("-3.00")]), [1.25, -3.0]),
        (pa.array([1500, 500], pa.timestamp("ms")), [1.5, 0.5]),
        (pa.array([datetime.date(1970, 1, 3)] * 2), [172800.0] * 2),
        (pa.array([86400000, 0], pa.date64()), [86400.0, 0.0]),
        (pa.array([500, 250], pa.duration("us")), [0.0005, 0.00025]),
        (pa.array([[4.0], [0.5]]), [4.0, 0.5]),
    ],
    ids=lambda value: str(getattr(value, "type", "")),
)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_numbers(array, expected, dtype):
    found = read(Number("x", dtype=dtype), x=array)
    assert str(found.dtype) == f"torch.{dtype}"
    assert torch.equal(found, torch.tensor(expected, dtype=found.dtype))
    holes = pa.concat_arrays([array, pa.nulls(1, array.type)])
    assert read(Number("x", default=-1.0, dtype=dtype), x=holes)[-1] == -1


def test_lists_of_at_most_one_value():
    """An empty list is a null, as in Criteo's files; two values are an error."""
    array = pa.array([[3], [], None, [4]], pa.list_(pa.int64()))
    assert read(Id("x", default=-1), x=array).tolist() == [3, -1, -1, 4]
    assert read(Id("x", default=-1), x=array[1:]).tolist() == [-1, -1, 4]
    missing = read(Number("x", default=float("nan")), x=array).isnan()
    assert missing.tolist() == [False, True, True, False]
    with pytest.raises(ValueError, match="a row has 2 values, not one"):
        read(Id("x"), x=pa.array([[3], [4, 5]]))


@pytest.mark.parametrize(
    "kind",
    [pa.list_, pa.large_list, pa.list_view, pa.large_list_view],
    ids=lambda kind: kind.__name__,
)
def test_bags(kind):
    """Of every layout, sliced, with nulls for bags and in them."""
    array = pa.array([[1, 2, 3], None, [], [4, None]], kind(pa.int32()))
    for start in (0, 1, 3):
        found = read(IdList("x", default=-1), x=array[start:])
        lengths, values = [3, 0, 0, 2][start:], [1, 2, 3, 4, -1][0 if start == 0 else 3 :]
        assert found.values.tolist() == values
        assert found.lengths().tolist() == lengths
    fixed = pa.array([[1, 2], [3, 4]], pa.list_(pa.int8(), 2))
    assert read(IdList("x"), x=fixed[1:])[:1][0].tolist() == [3, 4]
    single = read(IdList("x"), x=pa.array([5, None, 6]))
    assert (single.values.tolist(), single.lengths().tolist()) == ([5, 6], [1, 0, 1])
    nothing = read(IdList("x"), x=pa.nulls(2))
    assert (nothing.values.tolist(), nothing.lengths().tolist()) == ([], [0, 0])


@pytest.mark.parametrize(
    ("keep", "expected", "weights"),
    [("first", [1, 2, 4], [0.1, 0.2, 0.4]), ("last", [2, 3, 4], [0.2, 0.3, 0.4])],
)
def test_bags_are_cut_with_their_weights(keep, expected, weights):
    arrays = {"x": pa.array([[1, 2, 3], None, [4]]), "w": pa.array([[0.1, 0.2, 0.3], [], [0.4]])}
    found = IdList("x", max_len=2, keep=keep, weights="w").read(arrays)
    assert found.values.tolist() == expected
    assert found.offsets.tolist() == [0, 2, 2, 3]
    assert found.weights.dtype is torch.float32
    assert torch.equal(found.weights, torch.tensor(weights))
    assert IdList("x", max_len=3, weights="w").read(arrays).values.tolist() == [1, 2, 3, 4]


def test_strings_are_hashed_alike_in_columns_and_by_hand():
    words = ["a", "b", "a"]
    expected = hash_strings(words, "murmur3", seed=4)
    assert torch.equal(read(Id("x", "murmur3", 4), x=pa.array(words)), expected)
    bags = read(IdList("x", "murmur3", 4), x=pa.array([words[:1], words[1:]]))
    assert torch.equal(bags.values, expected)


@pytest.mark.parametrize(
    ("column", "array", "error", "words"),
    [
        (Id("x"), pa.array(["a"]), TypeError, "got string; give it a hash="),
        (Id("x"), pa.array([0.5]), TypeError, "expected integers, .*got double"),
        (Id("x"), pa.array([decimal.Decimal("0.5")]), ValueError, "data loss"),
        (Id("x"), pa.array([1, None]), ValueError, "1 of 2 values are null"),
        (Id("x", "xxh64"), pa.array([0.5]), TypeError, "to hash, got double"),
        (IdList("x"), pa.array([[1, None]]), ValueError, "1 of 2 values are null"),
        (IdList("x"), pa.array([[[1]]]), TypeError, "got lists of lists"),
        (IdList("x"), pa.array([["a"]]), TypeError, "got string; give it a hash="),
        (Number("x"), pa.array(["1"]), TypeError, "expected numbers, .*got string"),
        (Number("x"), pa.nulls(2), ValueError, "2 of 2 values are null"),
        (Label("x"), pa.array([1, None]), ValueError, "1 of 2 values are null"),
    ],
)
def test_values_that_do_not_fit(column, array, error, words):
    with pytest.raises(error, match=words):
        read(column, x=array)


def test_weights_must_fit():
    arrays = {"x": pa.array([[1], [2, 3]]), "w": pa.array([[0.5], [0.5]])}
    with pytest.raises(ValueError, match="row 1 has 2 values and 1 weights in 'w'"):
        IdList("x", weights="w").read(arrays)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Id("x", hash="md5"), "hash: expected one of"),
        (lambda: Id("x", seed=-1), "seed: expected"),
        (lambda: IdList("x", keep="middle"), "keep: expected 'first' or 'last', got 'middle'"),
        (lambda: IdList("x", max_len=0), "max_len: expected an int >= 1 or None, got 0"),
        (lambda: Number("x", dtype="int8"), "dtype: expected one of"),
    ],
)
def test_settings_that_do_not_fit(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_sources():
    assert Id("x", source="raw").sources == ("raw",)
    assert IdList("x", weights="w").sources == ("x", "w")
    assert Number("n").sources == Label("n").sources == ("n",)
    assert read(Label("y", source="raw"), raw=pa.array([1])).tolist() == [1.0]


def test_bags_of_bags_of_every_layout():
    """Null lists are empty; hashes, weights and the longest sequence are those of ``IdList``."""
    rows = [[[1, 2], None, []], None, [], [[3]], [[4], [5, 6]]]
    for kind in (
        pa.list_(pa.list_(pa.int32())),
        pa.large_list(pa.large_list(pa.int64())),
        pa.list_(pa.large_list(pa.uint8())),
    ):
        found = IdBags("b").read({"b": pa.array(rows, kind)[1:]})
        assert found.values.tolist() == [3, 4, 5, 6]
        assert found.offsets.tolist() == [0, 1, 2, 4]
        assert found.outer_offsets.tolist() == [0, 0, 0, 1, 3]
    array = pa.array(rows, pa.list_(pa.list_(pa.int64())))
    weights = pa.array([[[0.5, 1], [], None], [], None, [[2]], [[3], [4, 5]]])
    arrays = {"b": array, "w": weights}
    found = IdBags("b", weights="w", max_len=1, keep="last").read(arrays)
    assert found.values.tolist() == [3, 5, 6]
    assert found.weights.tolist() == [2, 4, 5]
    assert found.inner().lengths().tolist() == [0, 1, 2]
    assert found.lengths().tolist() == [1, 0, 0, 1, 1]
    assert IdBags("b", weights="w").read(arrays).weights.tolist() == [0.5, 1, 2, 3, 4, 5]
    texts = pa.array([[["a"], ["b", None]]])
    hashed = IdBags("b", hash="xxh64", default=-1).read({"b": texts})
    assert hashed.values.tolist() == [*hash_strings(["a", "b"]).tolist(), -1]
    for empty in (pa.array([None, None]), pa.array([[], [None]]), pa.array([[None], [[]]])):
        assert IdBags("b").read({"b": empty}).num_bags == 2
    fixed = pa.array([[[1, 2], [3, 4]]], pa.list_(pa.list_(pa.int64(), 2), 2))
    assert IdBags("b").read({"b": fixed}).offsets.tolist() == [0, 2, 4]


@pytest.mark.parametrize(
    ("array", "weights", "error", "words"),
    [
        (pa.array([[1]]), None, TypeError, "expected lists of lists of ids, got list<item: int64>"),
        (pa.array([1]), None, TypeError, "expected lists of lists of ids, got int64"),
        (pa.array([[[1, None]]]), None, ValueError, "1 of 2 values are null"),
        (pa.array([[[[1]]]]), None, TypeError, "expected lists of ids, got lists of lists"),
        (pa.array([[[1]]]), pa.array([[1.0]]), TypeError, "expected lists of weights in 'w', got"),
        (pa.array([[[1]]]), pa.array([[[1.0], []]]), ValueError, "row 0 has 1 bags and 2 lists"),
        (pa.array([[[1]]]), pa.array([[[1.0, 2]]]), ValueError, "row 0 has 1 values and 2 weights"),
    ],
)
def test_what_is_no_bag_of_bags_is_refused(array, weights, error, words):
    column = IdBags("b", weights=None if weights is None else "w")
    with pytest.raises(error, match=words):
        column.read({"b": array, "w": weights})


def test_bad_arguments_of_bags_of_bags():
    with pytest.raises(ValueError, match="keep: expected 'first' or 'last'"):
        IdBags("b", keep="middle")
    with pytest.raises(ValueError, match="max_len: expected an int >= 1 or None"):
        IdBags("b", max_len=0)


@pytest.mark.parametrize("indices", [[0, 1], [0, None]])
def test_nulls_among_the_values_of_a_dictionary(indices):
    def array(values):
        return pa.DictionaryArray.from_arrays(pa.array(indices, pa.int32()), pa.array(values))

    for column, values in (
        (Label("x"), [5.0, None]),
        (Number("x"), [5.0, None]),
        (Id("x"), [5, None]),
        (Id("x", hash="xxh64"), ["a", None]),
    ):
        with pytest.raises(ValueError, match="1 of 2 values are null, and there is no default"):
            column.read({"x": array(values)})
    assert Id("x", default=7).read({"x": array([5, None])}).tolist() == [5, 7]
    assert IdList("x").read({"x": array([5, None])}).offsets.tolist() == [0, 1, 1]
    lists = pa.ListArray.from_arrays([0, 2], array([5, None]))
    assert IdList("x", default=7).read({"x": lists}).values.tolist() == [5, 7]
    with pytest.raises(ValueError, match="1 of 2 values are null"):
        IdList("x").read({"x": lists})


def test_integers_with_gaps_of_pandas():
    with pytest.raises(TypeError, match="got double; integers of which some are missing are Int64"):
        Id("x").read({"x": pa.array([1.0, None])})
