"""Retrieval over the items of all ranks."""

import numpy as np
import torch

from tests.helpers import rank_retrieval


def test_the_pages_example_is_right_on_any_number_of_ranks(ranks):
    """The recall of one rank, and the same ids and rows on every rank."""
    [(recall, ids, rows, num_rows)] = ranks.run(1, rank_retrieval.evaluate)
    assert 0 < recall < 1
    assert ids.tolist() == rank_retrieval.ITEMS.tolist()
    assert num_rows == len(ids)
    for world_size in (2, 4):
        answers = ranks.run(world_size, rank_retrieval.evaluate)
        assert sum(answer[3] for answer in answers) == num_rows
        for found, its_ids, its_rows, _ in answers:
            assert found == recall
            np.testing.assert_array_equal(its_ids, ids)
            np.testing.assert_array_equal(its_rows, rows)


def test_rows_inserted_on_all_ranks_are_gathered_once(ranks):
    wanted = rank_retrieval.ITEMS.tolist(), torch.arange(240.0).view(120, 2).bfloat16().float()
    for world_size in (1, 2):
        for ids, rows in ranks.run(world_size, rank_retrieval.gather_what_was_inserted):
            assert ids == wanted[0]
            assert rows == wanted[1].tolist()
