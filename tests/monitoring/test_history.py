"""RunHistory: bounded, evenly spaced, and the same after a checkpoint."""

import io
import math

import pytest
import torch

from recis_lightning.monitoring.history import RunHistory


def filled(num_points, max_points=8):
    history = RunHistory(max_points)
    for step in range(1, num_points + 1):
        history.append(10 * step, {"count": step, **({"rare": step} if step % 5 == 0 else {})})
    return history


@pytest.mark.parametrize("num_points", [1, 2, 7, 8, 9, 16, 17, 100, 1001])
def test_first_and_newest_stay_and_the_rest_lies_evenly(num_points):
    history = filled(num_points)
    assert len(history) <= 8
    assert history.steps[0] == 10
    assert history.steps[-1] == 10 * num_points
    gaps = {b - a for a, b in zip(history.steps[:-1], history.steps[1:-1], strict=False)}
    assert len(gaps) <= 1
    assert history.column("count") == [step / 10 for step in history.steps]


def test_columns_that_come_and_go():
    history = RunHistory()
    history.append(1, {"a": 1})
    history.append(2, {"b": 2})
    history.append(2, {"a": 3})
    assert history.steps == [1, 2]
    assert history.column("a") == [1.0, 3.0]
    assert math.isnan(history.column("b")[0])
    assert history.column("b")[1] == 2.0
    assert history.names == ["a", "b"]
    assert all(math.isnan(value) for value in history.column("unknown"))
    assert (history.last("a"), history.last("unknown", 7.0)) == (3.0, 7.0)
    history.truncate(1)
    assert history.steps == [1]
    assert history.column("a") == [1.0]


def test_goes_on_after_a_checkpoint_as_if_nothing_had_been():
    saved, whole = filled(37), filled(37)
    saved.distributions = {"norms": [1, 2]}
    file = io.BytesIO()
    torch.save(saved.state_dict(), file)
    file.seek(0)
    loaded = RunHistory(8)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    assert loaded.distributions == {"norms": [1, 2]}
    for step in range(38, 60):
        for history in (loaded, whole):
            history.append(10 * step, {"count": step})
    assert loaded.steps == whole.steps
    assert loaded.column("count") == whole.column("count")


def test_max_points_is_checked():
    with pytest.raises(ValueError, match="max_points: expected an int >= 8, got 3"):
        RunHistory(3)
