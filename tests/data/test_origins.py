"""Lasting names of files: through moved folders, added patterns and wider ones."""

import pytest

from recis_lightning.data.files import Pattern
from recis_lightning.data.origins import Origins


def after(*runs):
    """Return the origins of the last of several runs, each of which resumes the one before."""
    state = None
    for texts in runs:
        origins = Origins([Pattern.of(text) for text in texts])
        if state is not None:
            origins.load(state)
        state = origins.state()
    return origins


@pytest.mark.parametrize(
    ("runs", "place", "name"),
    [
        ([["/a/*.parquet"]], "/a/x", "/a/x"),
        ([["/a/*.parquet"], ["/a/*.parquet", "/b/*.parquet"]], "/a/x", "/a/x"),
        ([["/a/*.parquet"], ["/*/*.parquet"]], "/a/x", "/a/x"),
        ([["/a/*.parquet", "/b/*.parquet"], ["/b/*.parquet", "/a/*.parquet"]], "/a/x", "/a/x"),
        ([["/a/*.parquet"], ["/b/*.parquet"]], "/b/x", "/a/x"),
        ([["/a/**/*.parquet"], ["/a/moved/**/*.parquet"]], "/a/moved/x", "/a/x"),
        ([["/a/*.parquet"], ["/b/*.parquet"], ["/c/*.parquet"]], "/c/x", "/a/x"),
        ([["/a/*.parquet"], ["/b/*.parquet"], ["/a/*.parquet"]], "/a/x", "/a/x"),
        ([["/a/*.parquet"], ["/b/*.parquet"], ["/*/*.parquet"]], "/b/x", "/a/x"),
        ([["/a/*.parquet", "/b/*.parquet"], ["/a/*.parquet"]], "/a/x", "/a/x"),
        ([["/a/*.parquet", "/b/*.orc"], ["/c/*.parquet", "/d/*.orc"]], "/d/x", "/b/x"),
    ],
)
def test_names_last(runs, place, name):
    origins = after(*runs)
    assert (origins.name_of(place), origins.place_of(name)) == (name, place)


def test_a_move_and_other_patterns_at_once_are_refused():
    with pytest.raises(ValueError, match=r"state: paths may be other ones, .*'/a/\*.parquet' was"):
        after(["/a/*.parquet"], ["/b/*.parquet", "/c/*.parquet"])
