"""Transforms: exact vectors, RecIS's formulas, limits and errors."""

import math

import pytest
import torch

from recis_lightning import Jagged
from recis_lightning.data import (
    Bucketize,
    Clip,
    Features,
    Id,
    IdList,
    Label,
    Log1p,
    Lookup,
    Mask,
    Mod,
    MultiHash,
    Number,
    Truncate,
)

LEAST, MOST = -(2**63), 2**63 - 1
IDS = [0, 1, 7, 1001, -1, MOST, LEAST]


def run(column, *transforms, values):
    return Features([column], list(transforms))({column.name: values})


@pytest.mark.parametrize("modulus", [1, 2, 7, 1000, 2**40 + 15, 2**62 + 3, MOST])
def test_mod_is_unsigned(modulus):
    found = run(Id("a"), Mod("a", modulus), values=IDS)["a"]
    assert found.tolist() == [value % 2**64 % modulus for value in IDS]


def test_mods_of_a_pass():
    """Equal and other moduli, single ids and bags, side by side."""
    features = Features(
        [Id("a"), IdList("b"), Id("c")], [Mod("a", 7), Mod("b", 10), Mod("d", 7, source="c")]
    )
    assert features.num_passes == 1
    found = features({"a": [-1, 8], "b": [[], [12, -5]], "c": [13, 14]})
    assert found["a"].tolist() == [(2**64 - 1) % 7, 1]
    assert found["b"].values.tolist() == [2, (2**64 - 5) % 10]
    assert found["b"].offsets.tolist() == [0, 0, 2]
    assert found["d"].tolist() == [6, 0]
    assert found["c"].tolist() == [13, 14]


def test_bucketize():
    """RecIS's: the number of boundaries that are not above the value, in float32."""
    nan, inf = float("nan"), float("inf")
    values = [-inf, 0.69, 0.7, 17.9, 18.0, 40.0, inf, nan]
    found = run(Number("x"), Bucketize("x", [0.7, 18, 25.5]), values=values)["x"]
    assert found.tolist() == [0, 0, 1, 1, 2, 3, 3, 3]
    assert found.dtype is torch.int64
    whole = run(Id("x"), Bucketize("x", [0.7, 18, 25.5]), values=[0, 1, 18, 26])["x"]
    assert whole.tolist() == [0, 1, 2, 3]


def test_buckets_of_a_pass():
    features = Features(
        [Number("a"), Number("b"), Number("c", dtype="float64")],
        [Bucketize("a", [1, 2]), Bucketize("b", [1, 2]), Bucketize("c", [5])],
    )
    found = features({"a": [0, 1.5], "b": [2, 9], "c": [4.9, 5]})
    assert [found[name].tolist() for name in "abc"] == [[0, 1], [2, 2], [0, 1]]


def test_multi_hash_is_recis():
    """By its formula, with the primes that its search finds."""
    sizes = [1000, 1000, 20000, 1]
    primes = [28979, 46997, 1339993, 83]
    found = run(Id("a"), MultiHash("h", sizes, source="a"), values=IDS)
    assert list(found) == ["a", "h_0", "h_1", "h_2", "h_3"]
    for i, (size, prime) in enumerate(zip(sizes, primes, strict=True)):
        assert all(prime % n for n in range(2, 1200) if n < prime)
        products = [(value * (1, 3, 5, 7)[i] + 2**63) % 2**64 - 2**63 for value in IDS]
        assert found[f"h_{i}"].tolist() == [product % prime % size for product in products]


def test_multi_hashes_of_a_pass():
    features = Features(
        [Id("a"), IdList("b")],
        [MultiHash("a", [10]), MultiHash("b", [10, 20]), Mod("b_1", 3)],
    )
    found = features({"a": [300, 2], "b": [[300], [2, 5]]})
    assert found["a_0"].tolist() == [300 % 283 % 10, 2]
    assert found["b_0"].values.tolist() == [300 % 283 % 10, 2, 5]
    assert found["b_1"].values.tolist() == [x * 3 % 937 % 20 % 3 for x in (300, 2, 5)]


def test_lookup():
    """Strings go through the hash of their column; what is not listed gets the default."""
    words = ["Rome", "Oslo", "Berlin", None]
    city = Id("city", hash="xxh64", seed=3, default=0)
    found = run(city, Lookup("city", ["Berlin", "Rome"]), values=words)["city"]
    assert found.tolist() == [1, -1, 0, -1]
    bags = IdList("tags", hash="murmur3")
    found = run(bags, Lookup("tags", ["x"], default=9), values=[["y", "x"], []])["tags"]
    assert found.values.tolist() == [9, 0]
    whole = run(Id("a"), Lookup("a", [MOST, 5, LEAST]), values=[5, LEAST, MOST, 6])["a"]
    assert whole.tolist() == [1, 2, 0, -1]


def test_mask_is_recis():
    """0.0 for a listed value, 1.0 for the others; of strings, integers and numbers."""
    animals = Id("a", hash="farmhash64")
    found = run(animals, Mask("a", ["cat", "bird"]), values=["cat", "dog", "bird"])["a"]
    assert found.tolist() == [0.0, 1.0, 0.0]
    assert found.dtype is torch.float32
    assert run(Id("a"), Mask("a", [20, 40]), values=[10, 20, 30, 40])["a"].tolist() == [1, 0, 1, 0]
    assert run(Number("a"), Mask("a", [2.5]), values=[1.5, 2.5])["a"].tolist() == [1, 0]
    assert run(Id("a"), Mask("a", []), values=[10])["a"].tolist() == [1]


def test_clip_and_log1p():
    nan = float("nan")
    found = run(Number("a"), Clip("a", low=0), values=[-1, 2, nan])["a"]
    assert found.tolist()[:2] == [0, 2]
    assert found[2].isnan()
    assert run(Id("a"), Clip("a", high=3), values=[-1, 7])["a"].tolist() == [-1, 3]
    found = run(Number("a"), Log1p("a"), values=[-3, 0, 3, nan])["a"]
    torch.testing.assert_close(
        found[:3],
        torch.tensor([-4.0, 1.0, 4.0]).abs().log() * torch.sign(torch.tensor([-3.0, 0.0, 3.0])),
    )
    assert found[3].isnan()
    assert run(Id("a"), Log1p("a"), values=[0, 1])["a"].dtype is torch.float32
    wide = run(Number("a", dtype="float64"), Log1p("a"), values=[1e-12])["a"]
    assert wide.item() == pytest.approx(1e-12, rel=1e-9)


@pytest.mark.parametrize(
    ("keep", "expected", "weights"),
    [("last", [3, 4, 7], [0.3, 0.4, 0.7]), ("first", [1, 2, 7], [0.1, 0.2, 0.7])],
)
def test_truncate(keep, expected, weights):
    bags = IdList("a", weights="w")
    features = Features([bags], [Truncate("a", 2, keep=keep)])
    given = {"a": [[1, 2, 3, 4], None, [7]], "w": [[0.1, 0.2, 0.3, 0.4], None, [0.7]]}
    found = features(given)["a"]
    assert found.values.tolist() == expected
    assert found.offsets.tolist() == [0, 2, 2, 3]
    torch.testing.assert_close(found.weights, torch.tensor(weights))


def test_bags_keep_their_weights():
    bags = IdList("a", weights="w")
    found = Features([bags], [Mod("a", 5)])({"a": [[7], [9]], "w": [[0.5], [1.5]]})["a"]
    assert found.values.tolist() == [2, 4]
    assert found.weights.tolist() == [0.5, 1.5]


@pytest.mark.parametrize(
    "transform",
    [
        Mod("a", 3),
        MultiHash("a", [3, 4]),
        Bucketize("a", [1]),
        Lookup("a", [1]),
        Mask("a", [1]),
        Clip("a", low=0),
        Log1p("a"),
    ],
    ids=lambda one: type(one).__name__,
)
def test_no_rows(transform):
    for column, given in ((Id("a"), []), (IdList("a"), [[], []])):
        for entry in Features([column], [transform])({"a": given}).values():
            values = entry.values if isinstance(entry, Jagged) else entry
            assert values.shape == (0,)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Mod("a", 0), "modulus: expected an int >= 1, got 0"),
        (lambda: Bucketize("a", []), "boundaries: expected at least one"),
        (lambda: Bucketize("a", [2, 1]), "boundaries: .*ascending"),
        (lambda: Bucketize("a", [1, float("nan")]), "boundaries: .*ascending"),
        (lambda: Clip("a"), "low, high: expected"),
        (lambda: Clip("a", 2, 1), "low: expected at most high=1, got 2"),
        (lambda: MultiHash("a", []), "num_buckets: expected one to four"),
        (lambda: MultiHash("a", [1, 0]), "num_buckets: expected an int >= 1, got 0"),
        (lambda: Lookup("a", []), "vocabulary: expected at least one"),
        (lambda: Lookup("a", [1, 1]), "vocabulary: .*each once"),
        (lambda: Truncate("a", 0), "max_len: expected"),
        (lambda: Truncate("a", 1, keep="middle"), "keep: expected 'first' or 'last'"),
    ],
)
def test_bad_arguments(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize(
    ("column", "transform", "words"),
    [
        (Number("a"), Mod("a", 3), "transform Mod of 'a': expected integers, got torch.float32"),
        (Label("a"), Lookup("a", [3]), "transform Lookup of 'a': expected integers"),
        (Id("a"), Truncate("a", 3), "transform Truncate of 'a': expected bags"),
    ],
)
def test_values_that_do_not_fit(column, transform, words):
    with pytest.raises(TypeError, match=words):
        run(column, transform, values=[1])


def test_ids_stay_exact():
    """Limits and values may be floats; ids that floats do not have are not changed."""
    ids = torch.tensor([2**24 + 1, -5, 2**62 + 1])
    clip = Features([Id("u")], [Clip("u", 0.0, 1e30)])
    assert clip({"u": ids})["u"].tolist() == [2**24 + 1, 0, 2**62 + 1]
    assert Features([Id("u")], [Clip("u", low=-math.inf)])({"u": ids})["u"].equal(ids)
    assert Features([Id("u")], [Clip("u", high=7)])({"u": ids})["u"].tolist() == [7, -5, 7]
    with pytest.raises(ValueError, match=r"Clip of 'u': expected whole limits .* got 0.5"):
        Features([Id("u")], [Clip("u", 0.5)])({"u": ids})
    mask = Features([Id("u")], [Mask("m", [0.5, 7.0, math.inf, 1e30], source="u")])
    assert mask({"u": [0, 1, 7]})["m"].tolist() == [1, 1, 0]
    narrow = Features([Id("u")], [Mask("m", [2**40, 3], source="u")])
    for dtype in (torch.int32, torch.uint8):
        ids = torch.tensor([3, 4], dtype=dtype)
        assert narrow({"u": ids})["m"].tolist() == [0, 1]
    with pytest.raises(TypeError, match=r"vocabulary: expected strings or ints, got \[1.5\]"):
        Lookup("u", [1.5])


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: Clip("a", math.nan), ValueError, "low: expected a number or None, got nan"),
        (lambda: Clip("a", 0, math.nan), ValueError, "high: expected a number or None, got nan"),
        (lambda: Bucketize("a", [math.nan]), ValueError, "boundaries: expected at least one, asc"),
        (lambda: MultiHash("a", 3), TypeError, "num_buckets: expected a list of sizes, got 3"),
    ],
)
def test_parameters_that_would_make_nonsense(make, error, words):
    with pytest.raises(error, match=words):
        make()
