"""UnevenBatches: ranks with unequal numbers of batches, in real processes."""

import pytest

from recis_lightning.callbacks import UnevenBatches
from tests.helpers import rank_uneven as checks

# Samples of each batch done, batches of each validation, optimizer steps: on two ranks.
WANTED = {
    "stop": (([8] * 6, [8] * 6), [1, 1, 1], 6),
    "stop, without lengths": (([8] * 6, [8] * 6), [1, 1, 1], 6),
    "pad": (([8, 8, 8, 0, 0] * 2, [8] * 10), [1, 1, 1], 10),
    "pad, without lengths": (([8] * 8, [8, 8, 8, 0] * 2), [1, 1, 1], 8),
    "pad, none on one rank": (([0, 0], [8, 8]), [1, 1], 2),
    "stop, none on one rank": (([], []), [1], 0),
    "accumulated": (([8, 8, 8, 0] * 2, [8] * 8), [1, 1, 1], 4),
}


def test_ranks_end_an_epoch_together(ranks, tmp_path):
    """Also by a hook alone, with validation after each epoch; dense weights stay equal."""
    answers = ranks.run(2, checks.all_cases, tmp_path, timeout_s=120)
    for case, (samples, validated, steps) in WANTED.items():
        for rank, answer in enumerate(answers):
            assert answer[case][:3] == (samples[rank], validated, steps), (case, rank)
        assert answers[0][case][3] == answers[1][case][3]


def test_a_loss_that_is_not_finite_without_samples_is_refused(ranks, tmp_path):
    """It would spoil all ranks' weights; the other rank is told as well, by what fails there."""
    first, second = ranks.run(2, checks.reckless, tmp_path)
    assert "training_step: expected a finite loss of a batch without samples, got nan" in first
    assert second


@pytest.mark.parametrize("sized", [True, False])
def test_validation_without_a_batch_on_one_rank(ranks, tmp_path, sized):
    """It serves the lookups of the others, and its own hooks run."""
    first, second = ranks.run(2, checks.validation_without_batches, tmp_path, sized)
    assert first == ([2, 3, 3], ["validation"] * 3, 2)
    assert second == ([0, 0, 0], ["validation"] * 3, 2)


def test_another_word_is_refused():
    """The error says what there is."""
    with pytest.raises(ValueError, match="on_uneven: expected 'stop' or 'pad', got 'drop'"):
        UnevenBatches("drop")
