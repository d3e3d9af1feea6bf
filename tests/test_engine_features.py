"""EmbeddingEngine: batches that lack features or have more, and what belongs to a feature."""

import copy
import dataclasses
import pickle
import warnings

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from recis_lightning import EmbeddingEngine, EmbeddingOption, Jagged, checkpoint, hash_tables
from recis_lightning.admission import MinCount, ReadOnly
from recis_lightning.ops import backend as ops_backend
from recis_lightning.optim import SparseSGD
from tests.test_engine import IDS, OFFSETS, PICKED, WEIGHTS, KeyedJagged, KeyedPart, pooled

KNOWN = torch.arange(3)


def engine_of(**options):
    """Return an engine whose features share a table "t", which knows the ids KNOWN."""
    settings = {name: {"embedding_dim": 4, "table": "t", **o} for name, o in options.items()}
    engine = EmbeddingEngine({name: EmbeddingOption(**o) for name, o in settings.items()})
    engine.tables["t"].insert(KNOWN, torch.ones(3, 4))
    return engine


# ---- a subset, and others


def test_a_batch_may_lack_features_and_have_others():
    """Outputs of the features that are there, and the rest as it came, in this order."""
    options = {
        "a": EmbeddingOption(4),
        "b": EmbeddingOption(4, mode="sum"),
        "c": EmbeddingOption(3),
    }
    engine = EmbeddingEngine(options)
    sparse = SparseSGD(hash_tables(engine), lr=1.0)
    dense, label = torch.randn(4, 2), object()
    out = engine({"dense": dense, "b": IDS[:8].view(4, 2), "label": label})
    assert list(out) == ["b", "dense", "label"]
    assert out["dense"] is dense
    assert out["label"] is label
    whole = EmbeddingEngine(options)({"a": IDS, "b": IDS[:8].view(4, 2), "c": IDS})
    assert torch.equal(out["b"], whole["b"])
    assert [len(engine.tables[name]) for name in "abc"] == [0, 8, 0]
    out["b"].sum().backward()
    assert [bool(engine.tables[name].pending) for name in "abc"] == [False, True, False]
    sparse.step()
    engine.eval()
    assert list(engine({"label": label, "c": IDS, "a": IDS})) == ["a", "c", "label"]
    assert engine({"label": label}) == {"label": label}
    assert engine({}) == {}


def test_a_keyed_jagged_tensor_may_lack_features_and_have_others():
    """What is no feature comes back as its own class has it."""
    part = KeyedPart(IDS[PICKED], OFFSETS.diff().int(), None)
    floats = KeyedPart(torch.rand(12), OFFSETS.diff().int(), None)
    engine = EmbeddingEngine({"a": EmbeddingOption(4, mode="sum"), "b": EmbeddingOption(4)})
    out = engine(KeyedJagged({"x": floats, "a": part}))
    assert list(out) == ["a", "x"]
    assert out["x"] is floats


def test_a_strict_engine_refuses_both():
    engine = EmbeddingEngine({"a": EmbeddingOption(4), "b": EmbeddingOption(4)}, strict=True)
    for features in ({"a": IDS}, {"a": IDS, "b": IDS, "c": IDS}):
        with pytest.raises(ValueError, match="features: missing"):
            engine(features)
    assert copy.deepcopy(engine).strict
    assert list(engine({"b": IDS, "a": IDS})) == ["a", "b"]


@pytest.mark.parametrize("key", ["user_ids", "userid", "User-ID", "user_di"])
def test_a_misspelt_feature_is_warned_of_once(key):
    """The warning names both."""
    engine = EmbeddingEngine({"user_id": EmbeddingOption(4), "item": EmbeddingOption(4)})
    with pytest.warns(UserWarning, match=f"'{key}' is no feature .* was 'user_id' meant"):
        engine({key: IDS, "item": IDS})
    engine({key: IDS, "item": IDS})  # warnings are errors


@pytest.mark.parametrize("key", ["label", "cat_2", "user_age", 7, ("user_id",), "item_ids"])
def test_what_looks_like_no_missing_feature_is_not_warned_of(key):
    """Numbered features, other types, and those beside the feature that they look like."""
    names = ("user_id", "cat_1", "item_id")
    engine = EmbeddingEngine({name: EmbeddingOption(4) for name in names})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert list(engine({"item_id": IDS, key: 1})) == ["item_id", key]


# ---- what belongs to a feature


@pytest.mark.parametrize("first", [True, False])
def test_one_of_two_features_of_a_table_is_frozen(first):
    """Only the other one's gradients reach the shared rows."""
    engine = engine_of(a={"trainable": first}, b={"trainable": not first, "mode": "sum"})
    sparse = SparseSGD(hash_tables(engine), lr=1.0)
    out = engine({"a": KNOWN, "b": KNOWN[None, :1]})
    assert out["a"].requires_grad is first
    assert out["b"].requires_grad is not first
    (out["a"].sum() + out["b"].sum()).backward()
    sparse.step()
    drop = torch.ones(3) if first else torch.tensor([1.0, 0.0, 0.0])
    assert torch.equal(engine.tables["t"].embeddings(KNOWN), 1 - drop[:, None].expand(3, 4))


def test_weights_of_a_frozen_feature_still_learn():
    engine = engine_of(a={"mode": "sum", "trainable": False}, b={})
    weights = torch.ones(1, 3, requires_grad=True)
    engine({"a": (KNOWN[None], weights), "b": KNOWN})["a"].sum().backward()
    assert torch.equal(weights.grad, torch.full((1, 3), 4.0))
    assert not engine.tables["t"].pending


def test_a_table_of_frozen_features_can_be_unfrozen():
    """Where all features agree, the table's own attribute decides."""
    engine = engine_of(a={"trainable": False}, b={"trainable": False})
    assert not engine({"a": KNOWN, "b": KNOWN})["a"].requires_grad
    engine.tables["t"].trainable = True
    assert engine({"a": KNOWN, "b": KNOWN})["a"].requires_grad


@pytest.mark.parametrize("order", [("a", "b"), ("b", "a")])
@pytest.mark.parametrize("policy", [None, MinCount(2)])
def test_one_of_two_features_of_a_table_is_read_only(order, policy):
    """It inserts nothing, and reads what was there before; the other admits as its policy says."""
    admissions = {"a": ReadOnly(), "b": policy}
    engine = engine_of(**{name: {"admission": admissions[name]} for name in order})
    table = engine.tables["t"]
    out = engine({"a": torch.tensor([0, 50, 60]), "b": torch.tensor([60, 70, 60])})
    assert table.ids().tolist() == ([0, 1, 2, 60, 70] if policy is None else [0, 1, 2, 60])
    assert out["a"].any(1).tolist() == [True, False, False]
    assert out["b"].any(1).tolist() == [True, policy is None, True]
    assert table.statistics().refused == (2 if policy is None else 3)
    again = engine({"a": torch.tensor([60, 50]), "b": torch.tensor([0])})
    assert again["a"].any(1).tolist() == [True, False]
    assert 50 not in table.ids().tolist()


def test_one_of_two_features_admits_what_the_other_counts():
    engine = engine_of(a={"admission": MinCount(3)}, b={})
    engine({"a": torch.tensor([50, 60]), "b": torch.tensor([60, 70])})
    assert engine.tables["t"].ids().tolist() == [0, 1, 2, 60, 70]
    assert engine.tables["t"].admission == MinCount(3)


def test_a_read_only_feature_beside_very_many_new_ids():
    """Ids that are inserted in several rounds are all unknown to it, whatever round has them."""
    engine = engine_of(a={"admission": ReadOnly()}, b={})
    new = torch.arange(100, 200_100)
    out = engine({"a": new[::1000], "b": new})
    assert not out["a"].any()
    assert out["b"].any(1).all()
    assert len(engine.tables["t"]) == 200_003


@pytest.mark.parametrize("kernels", ["reference", "cpu"])
def test_kernels_agree_on_features_that_differ(kernels):
    with ops_backend.use(kernels):
        engine = engine_of(a={"admission": ReadOnly()}, b={"admission": MinCount(2)}, c={})
        ids = torch.tensor([1, 50, 60, 60, 70])
        out = engine({"a": ids, "b": ids, "c": ids[3:]})
    assert out["a"].any(1).tolist() == [True, False, False, False, False]
    assert out["b"].any(1).tolist() == [True, False, True, True, False]
    assert out["c"].any(1).all()
    assert sorted(engine.tables["t"].ids().tolist()) == [0, 1, 2, 60, 70]


def test_two_counting_policies_of_a_table_are_refused():
    """The error names both features."""
    with pytest.raises(ValueError, match=r"'a' and 'c' share table 't'.*MinCount\(k=2.*k=3"):
        engine_of(a={"admission": MinCount(2)}, b={}, c={"admission": MinCount(3)})


def test_weights_of_a_feature_may_be_ignored():
    """One feature uses the weights that come with its ids, the other does not."""
    engine = engine_of(a={"mode": "sum"}, b={"mode": "sum", "use_weights": False})
    feature = Jagged(IDS[PICKED], OFFSETS, WEIGHTS)
    out = engine({"a": feature, "b": feature})
    bare = engine({"a": feature._replace(weights=None)})["a"]
    assert torch.equal(out["b"], bare)
    assert not torch.equal(out["a"], bare)


def test_means_by_count_and_their_gradients():
    """Weighted sums over the number of ids that are not padding; gradients are autograd's."""
    bags = [[0, 1, 2], [], [3], [4, 5, 6, 7, 8], [9, 10, 11]]
    engine = EmbeddingEngine({"f": EmbeddingOption(4, mode="mean", mean_by="count", table="t")})
    weights = WEIGHTS.clone().requires_grad_()
    expected_weights = WEIGHTS.clone().requires_grad_()
    out = engine({"f": Jagged(IDS[PICKED], OFFSETS, weights)})["f"]
    rows = engine.tables["t"].embeddings(IDS).requires_grad_()
    sums = pooled(rows[PICKED], bags, "sum", expected_weights)
    expected = sums / torch.tensor([3, 1, 1, 5, 3])[:, None]
    torch.testing.assert_close(out, expected)
    factors = torch.randn(out.shape, generator=torch.Generator().manual_seed(0))
    (out * factors).sum().backward()
    (expected * factors).sum().backward()
    torch.testing.assert_close(weights.grad, expected_weights.grad)
    before = rows.detach().clone()
    SparseSGD(hash_tables(engine), lr=1.0).step()
    seen = PICKED.unique()
    after = engine.tables["t"].embeddings(IDS)[seen]
    torch.testing.assert_close(after, (before - rows.grad)[seen])


class _NoFloatAtomics(TorchDispatchMode):
    """Refuses what CUDA adds up in whatever order its threads come."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.removeprefix("aten::").rstrip("_")
        if name in ("index_add", "scatter_add", "scatter_reduce", "index_reduce", "cumsum", "put"):
            assert not any(torch.is_tensor(a) and a.is_floating_point() for a in args), name
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", ["none", "sum", "mean", "tile"])
@pytest.mark.parametrize("mean_by", ["weights", "count"])
@pytest.mark.parametrize("ragged", [True, False])
def test_gradients_of_weights_are_added_in_one_order(mode, mean_by, ragged):
    """Two runs on a GPU give the same bits."""
    tiles = {"tile_len": 2} if mode == "tile" else {}
    mean = {"mean_by": mean_by} if mode == "mean" else {}
    engine = engine_of(f={"mode": mode, **tiles, **mean})
    weights = WEIGHTS.clone().requires_grad_()
    feature = (IDS[PICKED].view(4, 3), weights.view(4, 3))
    if ragged:
        feature = Jagged(IDS[PICKED], OFFSETS, weights)
    with _NoFloatAtomics():
        out = engine({"f": feature})["f"]
        (out.values if isinstance(out, Jagged) else out).square().sum().backward()
    assert weights.grad.abs().sum() > 0


# ---- names, copies and options


@pytest.mark.parametrize("name", ["type", "keys", "items", "forward", "training", "user.id", "pop"])
def test_names_that_modules_reserve(name, tmp_path):
    """Lookup, training, copies, state dicts and checkpoints."""
    engine = EmbeddingEngine({name: EmbeddingOption(4, mode="sum"), "other": EmbeddingOption(4)})
    features = {name: IDS[None], "other": IDS}
    out = engine(features)[name]
    out.sum().backward()
    SparseSGD(hash_tables(engine), lr=0.1).step()
    assert engine.tables[name].name == name
    assert list(engine.tables) == [name, "other"]
    rows = engine.tables[name].embeddings(IDS)
    checkpoint.save(tmp_path, engine)
    loaded, fresh = (EmbeddingEngine(engine.options) for _ in range(2))
    checkpoint.load(tmp_path, loaded)
    fresh.load_state_dict(engine.state_dict())
    for other in (loaded, fresh, copy.deepcopy(engine), pickle.loads(pickle.dumps(engine))):
        assert torch.equal(other.tables[name].embeddings(IDS), rows)


def test_state_dict_keys_of_ordinary_names():
    """They are the tables' names, also of methods of a dict."""
    engine = EmbeddingEngine({name: EmbeddingOption(4) for name in ("item", "100%", "type")})
    keys = ["tables.item._extra_state", "tables.100%._extra_state", "tables.type._extra_state"]
    assert list(engine.state_dict()) == keys


def test_options_do_not_change():
    """What an engine was made of is what it goes on with."""
    option = EmbeddingOption(4, mode="sum")
    with pytest.raises(dataclasses.FrozenInstanceError):
        option.mode = "mean"
    assert dataclasses.replace(option, mode="mean").mode == "mean"
