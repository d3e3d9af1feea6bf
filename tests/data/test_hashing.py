"""hash_strings: the same ids from every container and layout."""

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from recis_lightning.data import hash_strings
from recis_lightning.data.hashing import as_arrow

WORDS = ["", "a", "Berlin", "a much longer string than thirty-two bytes of text", "Zürich"]
# xxhash 4.1.0: xxh64_intdigest(word.encode(), seed=3), as int64.
EXPECTED = [
    4188618682377417806,
    5988290767514185389,
    1601191450551721879,
    7505698017103079503,
    -4098579988522933815,
]
LAYOUTS = [
    pa.string(),
    pa.large_string(),
    pa.binary(),
    pa.large_binary(),
    pa.string_view(),
    pa.binary_view(),
    pa.dictionary(pa.int8(), pa.string()),
    pa.dictionary(pa.uint32(), pa.large_string()),
]


@pytest.mark.parametrize("kind", LAYOUTS, ids=str)
def test_arrow_layouts(kind):
    """Whole, sliced, chunked, with nulls, and empty."""
    array = pa.array(WORDS, pa.string()).cast(kind)
    assert hash_strings(array, seed=3).tolist() == EXPECTED
    assert hash_strings(array[1:4], seed=3).tolist() == EXPECTED[1:4]
    chunked = pa.chunked_array([array[:2], array[2:]])
    assert hash_strings(chunked, seed=3).tolist() == EXPECTED
    assert hash_strings(array[:0], seed=3).tolist() == []
    holes = pa.array([None, *WORDS, None], pa.string()).cast(kind)
    assert hash_strings(holes, seed=3, default=-9).tolist() == [-9, *EXPECTED, -9]
    assert hash_strings(holes[1:], seed=3, default=-9).tolist() == [*EXPECTED, -9]


def test_dictionaries_with_null_entries():
    array = pa.DictionaryArray.from_arrays(pa.array([0, 1, None]), pa.array(["a", None]))
    assert hash_strings(array, seed=3, default=5).tolist() == [EXPECTED[1], 5, 5]


@pytest.mark.parametrize(
    "values",
    [
        WORDS,
        [word.encode() for word in WORDS],
        np.array(WORDS),
        np.array(WORDS, object),
        pd.Series(WORDS),
        pd.Series(WORDS, dtype="category"),
    ],
    ids=lambda values: f"{type(values).__name__}-{getattr(values, 'dtype', '')}",
)
def test_other_containers(values):
    assert hash_strings(values, seed=3).tolist() == EXPECTED


def test_polars_by_its_method():
    """Polars is not needed: what has ``to_arrow`` is taken by it."""

    class Series:
        def to_arrow(self):
            return pa.array(WORDS)

    assert hash_strings(Series(), seed=3).tolist() == EXPECTED


def test_bytes_of_fixed_size_and_integers():
    """Integers of any width hash as the eight bytes of an int64."""
    fixed = pa.array([b"abcd", b"efgh", b"ijkl"], pa.binary(4))
    assert hash_strings(fixed[1:]).tolist() == hash_strings(["efgh", "ijkl"]).tolist()
    numbers = [0, 1, 127, 100]
    expected = hash_strings([n.to_bytes(8, "little") for n in numbers]).tolist()
    for kind in (pa.int8(), pa.uint16(), pa.int64(), pa.uint64()):
        assert hash_strings(pa.array(numbers, kind)).tolist() == expected


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"values": ["a", None]}, ValueError, "values: 1 nulls, and no default="),
        ({"values": [0.5]}, TypeError, "expected strings, bytes or integers to hash, got double"),
        ({"values": ["a"], "hash": "md5"}, ValueError, "hash: expected one of .*got 'md5'"),
        ({"values": ["a"], "seed": -1}, ValueError, "seed: expected an int >= 0, got -1"),
        (
            {"values": ["a"], "hash": "murmur3", "seed": 2**32},
            ValueError,
            "seed: expected an int <= 4294967295",
        ),
    ],
)
def test_bad_arguments(arguments, error, words):
    with pytest.raises(error, match=words):
        hash_strings(**arguments)


def test_nulls_among_the_values_of_a_dictionary():
    """They are nulls as any others."""
    words = pa.DictionaryArray.from_arrays(pa.array([0, 1, None]), pa.array(["x", None]))
    with pytest.raises(ValueError, match="values: 2 nulls"):
        hash_strings(words)
    assert hash_strings(words, default=0).tolist()[1:] == [0, 0]


def test_integers_of_64_bits_in_lists():
    assert as_arrow([2**63 + 5, None]).type == pa.uint64()
    assert as_arrow([[2**63 + 5], None]).type == pa.list_(pa.uint64())
    for values in ([2**64], [2**63 + 5, -1]):
        with pytest.raises(ValueError, match="expected integers of 64 bits, all int64 or all"):
            as_arrow(values)


def test_uuids_are_their_bytes():
    values = [bytes(range(16)), bytes(16)]
    uuids = pa.ExtensionArray.from_storage(pa.uuid(), pa.array(values, pa.binary(16)))
    assert hash_strings(uuids).tolist() == hash_strings(values).tolist()
