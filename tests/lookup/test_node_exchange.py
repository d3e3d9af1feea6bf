"""Exchange over nodes: rows of the plain one, and fewer bytes between nodes."""

import pytest
import torch

from recis_lightning import DynamicEmbedding, EmbeddingEngine, EmbeddingOption
from tests.helpers import rank_nodes


@pytest.mark.parametrize(
    "check",
    [
        rank_nodes.same_rows,
        rank_nodes.sums_in_one_order,
        rank_nodes.far_bytes,
        rank_nodes.bad_settings,
    ],
    ids=lambda check: check.__name__,
)
def test_two_nodes_of_two_ranks(ranks, check):
    """The checks themselves say what holds."""
    ranks.run(4, check, timeout_s=200)


def test_one_process_has_no_nodes():
    """The setting is kept; rows are those of any table."""
    ids = torch.arange(5)
    module = DynamicEmbedding(3, name="t", ranks_per_node=8)
    assert module.table.ranks_per_node == 8
    assert torch.equal(module(ids), DynamicEmbedding(3, name="t")(ids))
    engine = EmbeddingEngine({"t": EmbeddingOption(3)}, ranks_per_node=2)
    assert engine.tables["t"].ranks_per_node == 2


@pytest.mark.parametrize(("value", "error"), [(0, ValueError), ("8", TypeError), (2.0, TypeError)])
def test_bad_numbers_are_named(value, error):
    with pytest.raises(error, match="ranks_per_node"):
        DynamicEmbedding(2, ranks_per_node=value)
