"""Fields of a source."""

import pytest

from recis_lightning.checkpoint import Source


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"path": ""}, TypeError, "path: expected the path of a file or folder, got ''"),
        ({"path": 3}, TypeError, "path: expected the path of a file or folder, got 3"),
        ({"load": "user"}, TypeError, r"load: expected a list .* got 'user'; write \['user'\]"),
        ({"load": []}, ValueError, "load: expected names or patterns, got none"),
        ({"exclude": "a"}, TypeError, "exclude: expected a list"),
        ({"rename": ["a"]}, TypeError, "rename: expected a dict, name in the source -> name in"),
        ({"rename": {"a": 1}}, TypeError, "rename: expected a dict"),
        ({"rename": {"a_*": "b"}}, ValueError, r"rename: expected as many \* on both sides"),
        ({"clear": 1}, TypeError, "clear: expected"),
        ({"skip_missing": "yes"}, TypeError, "skip_missing: expected"),
        ({"oname": []}, TypeError, r"write rename="),
    ],
)
def test_wrong_fields(arguments, error, message):
    with pytest.raises(error, match=message):
        Source(**{"path": "a.ckpt", **arguments})


def test_fields_are_of_each_source():
    one, other = Source("a"), Source("a")
    assert one == other
    assert one.load is not other.load
    assert str(one) == "a"
