import pytest

from recis_lightning.serving.parameter_names import match_names

TRAINED = ["tower.0.weight", "tower.0.bias", "other.weight"]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (TRAINED, {name: name for name in TRAINED}),
        ([f"model.{name}" for name in TRAINED], {f"model.{name}": name for name in TRAINED}),
        (["0.weight", "0.bias"], {"0.weight": "tower.0.weight", "0.bias": "tower.0.bias"}),
        (["tower.0.bias", "scale"], {"tower.0.bias": "tower.0.bias"}),
        (["a.model.other.weight"], {"a.model.other.weight": "other.weight"}),
        (["mother.weight", "scale"], {}),
        ([], {}),
    ],
)
def test_one_prefix_tells_the_names_apart(names, expected):
    assert match_names(names, TRAINED) == expected
    assert match_names(names, []) == {}


@pytest.mark.parametrize(
    ("names", "trained"),
    [
        (["a.weight", "b.weight"], ["weight"]),
        (["weight", "bias"], ["a.weight", "a.bias", "b.weight", "b.bias"]),
    ],
)
def test_two_places_that_fit_alike_are_refused(names, trained):
    with pytest.raises(ValueError, match=r"those of 'a\.' or 'b\.'"):
        match_names(names, trained)
    assert match_names(names, [*trained, *names]) == {name: name for name in names}
