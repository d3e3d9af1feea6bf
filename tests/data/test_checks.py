"""Settings of columns and transforms that are refused where they are made."""

import numpy as np
import pytest

from recis_lightning.data import (
    Bucketize,
    Clip,
    Cross,
    Features,
    Id,
    IdList,
    Label,
    Log1p,
    Lookup,
    Mask,
    Number,
)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Id(3), r"name: expected a str, got int \(3\)"),
        (lambda: Label("a", source=3), "source: expected a str, got int"),
        (lambda: Log1p("a", source=["b"]), "source: expected a str, got list"),
        (lambda: IdList("a", weights=1), "weights: expected a str, got int"),
        (lambda: Id("a", default="0"), "default: expected an int or None, got '0'"),
        (lambda: Id("a", default=True), "default: expected an int or None, got True"),
        (lambda: IdList("a", default=0.5), "default: expected an int or None, got 0.5"),
        (lambda: Number("a", default="0"), "default: expected a number or None, got '0'"),
        (lambda: Number("a", default=10**400), "default: expected a number or None, got 1000"),
        (lambda: Bucketize("a", ["x", "y"]), "boundaries: expected a number or None, got 'x'"),
        (lambda: Bucketize("a", [1, None]), "boundaries: expected numbers, got None"),
        (lambda: Clip("a", low="x"), "low: expected a number or None, got 'x'"),
        (lambda: Clip("a", 0, [1]), r"high: expected a number or None, got \[1\]"),
        (lambda: Lookup("a", "xyz"), "vocabulary: expected a list, got 'xyz'"),
        (lambda: Lookup("a", ["x", 1]), "vocabulary: expected strings or numbers, got both"),
        (lambda: Lookup("a", [{}]), "vocabulary: expected a number"),
        (lambda: Mask("a", {"x": 1}), "values: expected a list, got {'x': 1}"),
        (lambda: Mask("a", [None]), "values: expected numbers, got None"),
        (lambda: Cross("a", ["b", 3]), "sources: expected a str, got int"),
    ],
)
def test_settings_of_a_wrong_type(make, words):
    with pytest.raises(TypeError, match=words):
        make()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Id("a", default=2**63), "default: expected an int of 64 bits"),
        (lambda: Lookup("a", [-(2**63) - 1]), "vocabulary: expected an int of 64 bits"),
        (lambda: Features.from_state({"columns": 3}), "state: expected a list of columns, got 3"),
        (
            lambda: Features.from_state({"columns": [{"kind": "Id", "name": "a"}], "outputs": "a"}),
            "state: expected a list of outputs, got 'a'",
        ),
        (
            lambda: Features.from_state({"columns": [{"kind": "Id", "name": "a"}], "outputs": [1]}),
            r"state: expected names as outputs, got \[1\]",
        ),
    ],
)
def test_settings_out_of_range(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_numbers_of_numpy_are_numbers():
    features = Features(
        [Id("a", default=np.int64(3)), Number("b", default=np.float64(0.5))],
        [Bucketize("c", np.linspace(0, 1, 3), source="b"), Mask("d", range(2), source="a")],
    )
    found = features({"a": [None, 1], "b": [None, 2.0]})
    assert {name: value.tolist() for name, value in found.items()} == {
        "a": [3, 1],
        "b": [0.5, 2.0],
        "c": [2, 3],
        "d": [1.0, 0.0],
    }
    assert Features.from_json(features.to_json()).to_state() == features.to_state()
