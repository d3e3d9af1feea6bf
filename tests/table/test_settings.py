"""Settings of tables and modules that are changed after the first lookup: they take effect."""

import pytest
import torch

from recis_lightning import DynamicEmbedding, DynamicEmbeddingBag, EmbeddingEngine, EmbeddingOption
from recis_lightning.admission import BloomCount, MinCount, ReadOnly
from recis_lightning.eviction import AnyOf, GlobalStepFilter, TimeToLive
from recis_lightning.initializers import Constant, Normal
from recis_lightning.table.hash_table import HashTable
from tests.helpers.interruptions import run_interrupted

ONE, TWO, THREE = (torch.tensor([number]) for number in (1, 2, 3))


def test_read_only_stops_insertion_and_none_starts_it_again():
    user = DynamicEmbedding(2, name="user")
    user(ONE)
    user(ONE)  # one pass by now, while all ids are known
    user.table.admission = ReadOnly()
    assert not user(TWO).any()
    assert len(user.table) == 1
    user.table.admission = None
    assert user(TWO).any()
    assert len(user.table) == 2


@pytest.mark.parametrize("first", [None, ReadOnly(), MinCount(4), BloomCount(3, 1024)])
def test_counts_begin_with_the_policy_that_asks_for_them(first):
    """And go on if the one before counted too."""
    user = DynamicEmbedding(2, name="user", admission=first)
    user(ONE)
    user(ONE)
    user.table.admission = MinCount(3)
    if first is None:
        assert len(user.table) == 1
    user(TWO)
    user(TWO)
    assert user.table.ids().tolist() == ([1] if first is None else [])
    assert user(TWO).any()
    if isinstance(first, MinCount):
        assert user(ONE).any()
    user.table.admission = None
    assert user(THREE).any()


def test_an_initializer_is_that_of_rows_from_now_on():
    user = DynamicEmbedding(2, name="user")
    before = user(ONE)
    user.table.initializer = Constant(7.0)
    assert user(TWO).tolist() == [[7.0, 7.0]]
    assert user(ONE).equal(before)


def test_a_seed_is_that_of_rows_from_now_on():
    one, other = DynamicEmbedding(2, name="user"), DynamicEmbedding(2, name="user", seed=9)
    one(ONE)
    one.table.seed = 9
    assert one(TWO).equal(other(TWO))


def test_an_eviction_policy_needs_columns_that_the_table_keeps():
    """To set another one is an error, and the old one goes on."""
    table = HashTable(2, eviction=GlobalStepFilter(filter_step=5))
    kept = table.eviction
    with pytest.raises(ValueError, match=r"eviction: .*TimeToLive.* asks for \['last_time'\]"):
        table.eviction = TimeToLive(3)
    assert table.eviction is kept
    table.eviction = AnyOf([GlobalStepFilter(2), GlobalStepFilter(9)])
    table.insert(ONE, torch.ones(1, 2))
    table.update_step(3)
    assert table.evict() == 1
    table.eviction = None
    assert table.evict() == 0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("admission", "ReadOnly"),
        ("initializer", "normal"),
        ("initializer", None),
        ("eviction", 3),
        ("seed", "1"),
        ("seed", True),
        ("seed", 2**64),
        ("given_name", 4),
    ],
)
def test_what_is_no_setting_is_refused(name, value):
    table = HashTable(2, name="user")
    before = getattr(table, name)
    error = ValueError if value == 2**64 else TypeError
    with pytest.raises(error, match=f"^{name.removeprefix('given_')}: expected"):
        setattr(table, name, value)
    assert getattr(table, name) is before


@pytest.mark.parametrize("training", [True, False])
def test_padding_idx_mode_and_table_of_a_module(training):
    bag = DynamicEmbeddingBag(2, mode="sum", initializer=Constant(1.0), name="tags")
    ids = torch.tensor([[1, 2, 2]])
    bag(ids)
    bag.train(training)
    assert bag(ids).tolist() == [[3.0, 3.0]]
    bag.mode = "mean"
    assert bag(ids).tolist() == [[1.0, 1.0]]
    bag.mode, bag.padding_idx = "sum", 2
    assert bag(ids).tolist() == [[1.0, 1.0]]
    other = HashTable(2, name="other")
    other.insert(ONE, torch.full((1, 2), 5.0))
    bag.table = other
    assert bag(ONE.view(1, 1)).tolist() == [[5.0, 5.0]]
    for name, value, error in (
        ("mode", "max", ValueError),
        ("padding_idx", 1.5, TypeError),
        ("include_last_offset", None, TypeError),
        ("table", torch.nn.Linear(2, 2), TypeError),
    ):
        with pytest.raises(error, match=f"^{name}: expected"):
            setattr(bag, name, value)
    with pytest.raises(
        ValueError, match=r"mode: expected 'none' or 'unique', got .*; DynamicEmbeddingBag pools"
    ):
        DynamicEmbedding(2).mode = "sum"


def test_an_engine_may_become_strict():
    engine = EmbeddingEngine({"a": EmbeddingOption(2), "b": EmbeddingOption(2)})
    engine({"a": ONE})
    with pytest.raises(TypeError, match=r"^strict: expected a bool, got 'yes'"):
        engine.strict = "yes"
    engine.strict = True
    with pytest.raises(ValueError, match="features: missing"):
        engine({"a": ONE})


def test_another_table_of_an_engine():
    engine = EmbeddingEngine({"a": EmbeddingOption(2), "b": EmbeddingOption(2)})
    engine({"a": ONE, "b": ONE})
    other = HashTable(2, name="other")
    other.insert(ONE, torch.full((1, 2), 5.0))
    engine.tables["a"] = other
    assert engine({"a": ONE, "b": ONE})["a"].tolist() == [[5.0, 5.0]]
    for wrong in (HashTable(3), torch.nn.Linear(2, 2)):
        engine.tables["a"] = wrong
        with pytest.raises(TypeError, match=r"tables\['a'\]: feature 'a' needs a HashTable of"):
            engine({"a": ONE, "b": ONE})
    engine.tables["a"] = other
    assert engine({"a": ONE, "b": ONE})["a"].tolist() == [[5.0, 5.0]]


def test_options_of_an_engine_are_fixed():
    engine = EmbeddingEngine({"a": EmbeddingOption(2)})
    for change in (
        lambda: engine.options.update(a=EmbeddingOption(2, padding_idx=1)),
        lambda: engine.options.__setitem__("b", EmbeddingOption(2)),
        lambda: engine.options.pop("a"),
    ):
        with pytest.raises(TypeError, match="options: an engine's options are fixed"):
            change()
    with pytest.raises(AttributeError, match="options: an engine's options are fixed"):
        engine.options = {}
    assert list(engine.options) == ["a"]


@pytest.mark.parametrize(
    ("name", "value"),
    [("initializer", Constant(2.0)), ("seed", 9), ("admission", ReadOnly())],
)
def test_a_setting_that_is_interrupted_says_what_it_does(name, value):
    """Either the old value and its rows, or the new one and those of it."""
    for at in range(80):
        table = HashTable(2, initializer=Normal(std=1.0), name="t")
        interrupted = run_interrupted(lambda table=table: setattr(table, name, value), at)
        twin = HashTable(
            2, name="t", **{"initializer": Normal(std=1.0), name: getattr(table, name)}
        )
        assert torch.equal(table(ONE), twin(ONE)), at
        if not interrupted.was_interrupted:
            assert getattr(table, name) == value
            return
    pytest.fail("it is never done")
