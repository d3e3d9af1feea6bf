"""FSDP2 (``fully_shard``) around the dense part, and torch.distributed.checkpoint beside tables."""

import numpy as np
import pytest

from tests.helpers import rank_fully_shard


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.filterwarnings("ignore")
def test_the_dense_part_trains_as_under_ddp(ranks, tmp_path, accumulate):
    """Losses, dense weights and rows; what dcp and ``checkpoint.save`` saved is what there was."""
    answers = {
        kind: ranks.run(2, rank_fully_shard.train, kind, accumulate, tmp_path, timeout_s=300)
        for kind in ("ddp", "fsdp2")
    }
    for ddp, fsdp in zip(answers["ddp"], answers["fsdp2"], strict=True):
        np.testing.assert_allclose(fsdp[0], ddp[0], rtol=1e-5)
        for part, wanted in zip(fsdp[1], ddp[1], strict=True):
            assert part.keys() == wanted.keys()
            for name, values in wanted.items():
                np.testing.assert_allclose(part[name], values, rtol=1e-4, atol=1e-5, err_msg=name)
        for _, held, loaded, refused in (ddp, fsdp):
            np.testing.assert_equal(loaded, held)
            assert "saving a table on 2 ranks" in refused
