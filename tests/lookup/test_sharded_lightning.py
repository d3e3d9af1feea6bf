"""Sharded tables under Lightning's ddp: real processes that train, validate, test and predict."""

import numpy as np
import pytest

from tests.helpers import rank_trainers as checks
from tests.lookup.test_sharded import joined


def test_ddp_is_one_process_with_the_batch_of_all(ranks, tmp_path):
    """Weights, rows and scores; also where one rank has a batch more to predict."""
    (whole,) = ranks.run(1, checks.fit, tmp_path, 16)
    parts = ranks.run(2, checks.fit, tmp_path, 8)
    for part in parts:
        for name, value in whole["tower"].items():
            np.testing.assert_allclose(part["tower"][name], value, rtol=1e-3, atol=1e-4)
    for name in ("val_loss", "test_loss"):  # each rank logs that of its own share
        mean = np.mean([part[name] for part in parts])
        np.testing.assert_allclose(mean, whole[name], rtol=1e-3, err_msg=name)
    for name, wanted in whole["tables"].items():
        found = joined(parts, name)
        assert np.array_equal(found["ids"], wanted["ids"])
        np.testing.assert_allclose(found["weights"], wanted["weights"], rtol=1e-2, atol=1e-3)
        assert found["step"] == wanted["step"]
        assert found["num_updates"] == wanted["num_updates"]
    scores = [part["scores"] for part in parts]
    assert [len(part) for part in scores] == [5, 4]
    whole_scores = [whole["scores"][::2], whole["scores"][1::2]]
    for part, wanted in zip(scores, whole_scores, strict=True):
        np.testing.assert_allclose(part, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("stays", [False, True])
def test_a_rank_that_ends_early_in_training(ranks, tmp_path, stays):
    """It ends in peace; the other fails when that one is gone, or at the group's timeout."""
    timeout_s = 4
    long, short = ranks.try_to_run(
        2, checks.unequal, tmp_path, (4, 2), 1.5 * timeout_s * stays, timeout_s
    )
    assert long[0], long[1]
    assert short[0], short[1]
    assert (short[1][0], short[1][2]) == (2, "")
    batches, waited, error = long[1]
    assert error  # which of gloo's many words it has depends on what it was about to do
    assert batches < 4
    assert waited < timeout_s + 5
