"""Names that were meant by those that do not exist."""

import pytest

from recis_lightning.close_names import closest, did_you_mean


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("usr", "user"),
        ("USER", "user"),
        ("log_steps", "log_step"),
        ("max_epoch", "max_epochs"),
        ("price", None),
        ("", None),
    ],
)
def test_the_closest_name(name, meant):
    assert closest(name, ["user", "log_step", "max_epochs", "User"]) == meant


def test_a_message_ends_with_each_name_once():
    assert did_you_mean(["usr", "uesr", "nothing"], iter(["user", "item"])) == (
        "; did you mean 'user'?"
    )
    assert did_you_mean(["nothing"], ["user"]) == ""
    assert did_you_mean([], ["user"]) == ""
    assert did_you_mean([3, None, "usr"], [4, "user"]) == "; did you mean 'user'?"
