"""Process groups: one of the package's own, apart from DDP's, or one that a user made."""

import copy
import pickle

import pytest

from recis_lightning import DynamicEmbedding, DynamicEmbeddingBag, EmbeddingEngine, EmbeddingOption
from recis_lightning.distributed import process_group
from recis_lightning.optim import SparseSGD
from recis_lightning.table.hash_table import HashTable
from tests.helpers import rank_groups as checks


def test_without_ranks_there_is_one():
    """And no group is needed."""
    assert (process_group.world_size(), process_group.rank()) == (1, 0)
    assert process_group.global_ranks() == [0]


def test_messages_go_over_a_group_of_their_own(ranks):
    """Of the same ranks, that waits as long as torch's group does."""
    answers = ranks.run(2, checks.own_group, group_timeout_s=31)
    assert answers == [([0, 1], 31.0)] * 2


def test_parameters_that_a_rank_leaves_unused(ranks):
    """DDP's messages and ours in a backward pass do not meet: dense weights stay equal."""
    first, second = ranks.run(2, checks.unused_parameters, group_timeout_s=10)
    assert first == second


def test_two_dimensions(ranks):
    """Tables sharded over half of the ranks train as on so many; errors have the ranks' numbers."""
    found, refused = ranks.run(4, checks.two_dimensions)[0]
    wanted = ranks.run(2, checks.one_dimension)
    assert wanted == [found] * 2
    assert (
        "rank 0 looks up ids (table 't', mode none) in training; rank 2 looks" in refused["differs"]
    )
    assert "process_group: expected a group that this rank is in" in refused["other"]
    assert "'t' is sharded over ranks [0, 2] of 4" in refused["save"]


@pytest.mark.parametrize(
    "make",
    [
        lambda group: DynamicEmbedding(2, process_group=group),
        lambda group: DynamicEmbeddingBag(2, process_group=group),
        lambda group: EmbeddingEngine({"a": EmbeddingOption(2)}, process_group=group),
        lambda group: HashTable(2, process_group=group),
    ],
)
def test_what_is_no_process_group_is_refused(make):
    """Where the module is made."""
    with pytest.raises(TypeError, match=r"process_group: expected .* or None, got 'all'"):
        make("all")


def test_tables_of_several_groups_do_not_share_a_message():
    """A module's are looked up together, an optimizer's are stepped together."""
    table, other = HashTable(2, name="a"), HashTable(2, name="b")
    other._process_group = object()
    with pytest.raises(ValueError, match="tables 'a' and 'b' of one optimizer"):
        SparseSGD([table, other])
    engine = EmbeddingEngine({"a": EmbeddingOption(2), "b": EmbeddingOption(2)})
    engine.tables["b"] = other
    with pytest.raises(ValueError, match="tables 'a' and 'b' of one module"):
        engine.current_groups()


def test_a_copy_has_the_group_and_a_pickle_has_not():
    """A group is of its process."""
    table, group = HashTable(2), object()
    table._process_group = group
    assert copy.deepcopy(table).process_group is group
    assert pickle.loads(pickle.dumps(table)).process_group is None
