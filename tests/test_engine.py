"""EmbeddingEngine: many features of all layouts and modes, shared tables, groups."""

import copy
import re

import pytest
import torch
from torch import nn

from recis_lightning import EmbeddingEngine, EmbeddingOption, HashTable, Jagged, hash_tables
from recis_lightning.admission import ReadOnly
from recis_lightning.eviction import GlobalStepFilter
from recis_lightning.initializers import Constant, Uniform
from recis_lightning.optim import SparseSGD
from tests.helpers.sample_tables import EXTREMES

IDS = torch.cat([EXTREMES, torch.arange(100, 131)])  # 40 ids
OFFSETS = torch.tensor([0, 3, 3, 4, 9, 12])  # five bags, one empty
PICKED = torch.randint(40, (12,), generator=torch.Generator().manual_seed(1))
WEIGHTS = torch.rand(12, generator=torch.Generator().manual_seed(2)) + 0.5
DENSE = PICKED.view(4, 3)


def pooled(rows, bags, mode, weights=None, tile_len=2):
    """Pool rows in plain torch: ``bags`` lists the positions of each bag."""
    weights = torch.ones(len(rows)) if weights is None else weights
    out = []
    for bag in bags:
        weighted = rows[bag] * weights[bag, None]
        if mode == "tile":
            tile = torch.zeros(tile_len, rows.shape[1])
            out.append(torch.cat([weighted, tile])[:tile_len].flatten())
        else:
            scale = weights[bag].sum() if mode == "mean" and len(bag) else 1
            out.append(weighted.sum(0) / scale)
    return torch.stack(out)


def option(mode, dim=4, **kwargs):
    return EmbeddingOption(dim, mode=mode, tile_len=2 if mode == "tile" else None, **kwargs)


DENSE_BAGS = [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]
RAGGED_BAGS = [[0, 1, 2], [], [3], [4, 5, 6, 7, 8], [9, 10, 11]]
LAYOUTS = {
    "dense": (IDS[DENSE], DENSE_BAGS, None),
    "pair": ((IDS[DENSE], WEIGHTS.view(4, 3)), DENSE_BAGS, WEIGHTS),
    "jagged": (Jagged(IDS[PICKED], OFFSETS), RAGGED_BAGS, None),
    "weighted jagged": (Jagged(IDS[PICKED], OFFSETS, WEIGHTS), RAGGED_BAGS, WEIGHTS),
}


@pytest.mark.parametrize("weights", [[0.0, 0.0], [1.0, -1.0]])
@pytest.mark.parametrize("is_joined", [False, True])
def test_weights_that_add_up_to_nothing(weights, is_joined):
    """Their mean is zeros whatever they are; the other bag's gradient is as ever."""
    engine = EmbeddingEngine({"f": EmbeddingOption(2, mode="mean", table="t")})
    sparse = SparseSGD(hash_tables(engine), lr=1.0)
    given = torch.tensor([weights, [1.0, 3.0]], requires_grad=True)
    feature = {"f": (IDS[:4].view(2, 2), given)}
    out = engine.concat(feature) if is_joined else engine(feature)["f"]
    rows = engine.tables["t"].embeddings(IDS[:4])
    out.sum().backward()
    assert out[0].tolist() == [0.0, 0.0]
    assert given.grad[0].tolist() == [0.0, 0.0]
    slope = (rows[2] - rows[3]).sum() / 16
    torch.testing.assert_close(given.grad[1], torch.stack([slope * 3, -slope]))
    sparse.step()
    assert engine.tables["t"].embeddings(IDS[:4]).isfinite().all()


@pytest.mark.parametrize("mode", ["none", "sum", "mean", "tile"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_mode_of_every_layout(mode, layout):
    """Outputs and rows after a step are those of plain torch; so are gradients of weights."""
    feature, bags, weights = LAYOUTS[layout]
    engine = EmbeddingEngine({"f": option(mode), "known": EmbeddingOption(4, table="f")})
    engine({"f": feature, "known": IDS})
    table = engine.tables["f"]
    reference = nn.Parameter(table.embeddings(IDS))
    ours, theirs = None, None
    if weights is not None:
        ours, theirs = nn.Parameter(weights.clone()), nn.Parameter(weights.clone())
        shaped = ours.view(4, 3) if layout == "pair" else ours
        feature = (feature[0], shaped) if layout == "pair" else feature._replace(weights=shaped)
    out = engine({"f": feature, "known": IDS[:0]})["f"]
    if mode == "none":
        expected = reference[PICKED] * (1 if theirs is None else theirs[:, None])
        if isinstance(out, Jagged):
            assert torch.equal(out.offsets, OFFSETS)
            out = out.values
        out = out.view(12, 4)
    else:
        expected = pooled(reference[PICKED], bags, mode, theirs)
    torch.testing.assert_close(out, expected)

    factors = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
    (out * factors).sum().backward()
    (expected * factors).sum().backward()
    SparseSGD(hash_tables(engine), lr=1.0).step()
    torch.testing.assert_close(table.embeddings(IDS), reference.detach() - reference.grad)
    if ours is not None:
        torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("mode", ["none", "sum", "mean", "tile"])
def test_gradients_of_weights_by_finite_differences(mode):
    """Padding and unknown ids (zeros) included, and tables that do not train."""
    engine = EmbeddingEngine(
        {"f": option(mode, padding_idx=int(IDS[3]), trainable=False, admission=ReadOnly())}
    )
    engine.tables["f"].insert(IDS[:30], torch.randn(30, 4))
    weights = (WEIGHTS.view(4, 3) + 0.5).requires_grad_()
    ids = IDS[DENSE].clone()
    ids[0, 0] = ids[3, 2] = IDS[3]
    (gradient,) = torch.autograd.grad(engine({"f": (ids, weights)})["f"].sin().sum(), weights)
    for place in range(12):
        ends = []
        for epsilon in (1e-2, -1e-2):
            moved = weights.detach().clone()
            moved.view(-1)[place] += epsilon
            ends.append(engine({"f": (ids, moved)})["f"].double().sin().sum().item())
        slope = (ends[0] - ends[1]) / 2e-2
        assert gradient.view(-1)[place].item() == pytest.approx(slope, abs=2e-3)


def test_plain_ids_without_bags():
    """[B] ids: a row each for "none", bags of one otherwise."""
    engine = EmbeddingEngine({m: option(m, table="t") for m in ("none", "sum", "mean", "tile")})
    out = engine(dict.fromkeys(engine.options, IDS))
    rows = engine.tables["t"].embeddings(IDS)
    assert torch.equal(out["none"], rows)
    assert torch.equal(out["sum"], rows)
    assert torch.equal(out["mean"], rows)
    assert torch.equal(out["tile"], torch.cat([rows, torch.zeros_like(rows)], 1))


def test_nested_tensors_come_back_as_they_came():
    """Mode "none" answers a ragged feature in its own layout; the others pool it."""
    nested = torch.nested.nested_tensor_from_jagged(IDS[PICKED], OFFSETS)
    engine = EmbeddingEngine({"a": option("none", table="t"), "b": option("sum", table="t")})
    out = engine({"a": nested, "b": nested})
    rows = engine.tables["t"].embeddings(IDS[PICKED])
    assert out["a"].is_nested
    assert torch.equal(out["a"].values(), rows)
    assert torch.equal(out["a"].offsets(), OFFSETS)
    torch.testing.assert_close(out["b"], pooled(rows, RAGGED_BAGS, "sum"))
    out["a"].values().sum().backward()


class KeyedPart:
    def __init__(self, values, lengths, weights):
        self._values, self._lengths, self._weights = values, lengths, weights

    def values(self):
        return self._values

    def lengths(self):
        return self._lengths

    def weights_or_none(self):
        return self._weights


class KeyedJagged:
    """What TorchRec's KeyedJaggedTensor offers, as far as we use it."""

    def __init__(self, parts):
        self.parts = parts

    def keys(self):
        return list(self.parts)

    def values(self):
        return torch.cat([part.values() for part in self.parts.values()])

    def lengths(self):
        return torch.cat([part.lengths() for part in self.parts.values()])

    def __getitem__(self, key):
        return self.parts[key]


def test_keyed_jagged_tensors_are_read_by_their_methods():
    """int32 lengths, with weights and without."""
    lengths = OFFSETS.diff().int()
    features = KeyedJagged(
        {
            "a": KeyedPart(IDS[PICKED], lengths, None),
            "b": KeyedPart(IDS[PICKED], lengths, WEIGHTS),
        }
    )
    engine = EmbeddingEngine({"a": option("mean", table="t"), "b": option("sum", table="t")})
    features.keys = lambda: ["a", "b", "a"]
    with pytest.raises(ValueError, match="KeyedJaggedTensor has two of the key 'a'"):
        engine(features)
    del features.keys
    out = engine(features)
    rows = engine.tables["t"].embeddings(IDS[PICKED])
    torch.testing.assert_close(out["a"], pooled(rows, RAGGED_BAGS, "mean"))
    torch.testing.assert_close(out["b"], pooled(rows, RAGGED_BAGS, "sum", WEIGHTS))


# ---- many features


def test_features_of_one_table_share_its_rows():
    """Gradients of all its features add up to one update."""
    engine = EmbeddingEngine(
        {
            "item": EmbeddingOption(2, table="t", padding_idx=100),
            "history": EmbeddingOption(2, table="t", mode="sum", padding_idx=101),
        }
    )
    sparse = SparseSGD(hash_tables(engine), lr=1.0)
    before = engine.tables["t"].embeddings
    ids = {"item": torch.tensor([7, 100, 101]), "history": torch.tensor([[7, 7], [101, 100]])}
    out = engine(ids)
    start = before(torch.tensor([7, 100, 101]))
    assert not out["item"][1].any()
    assert torch.equal(out["item"][2], start[2])
    assert torch.equal(out["history"][1], start[1])
    sum(value.sum() for value in out.values()).backward()
    sparse.step()
    drop = torch.tensor([[3.0], [1.0], [1.0]])
    torch.testing.assert_close(before(torch.tensor([7, 100, 101])), start - drop)


def mixed(count):
    """Return options and features of several dims, dtypes, modes and layouts."""
    options, features = {}, {}
    layouts = list(LAYOUTS.values())
    for number in range(count):
        mode = ("none", "sum", "mean", "tile")[number % 4]
        dtype = "bfloat16" if number % 5 == 0 else torch.float32
        dim = (4, 8, 3)[number % 3]
        options[f"f{number}"] = option(mode, dim, dtype=dtype)
        features[f"f{number}"] = layouts[number % 7 % 4][0]
    return options, features


def values_of(out):
    return out.values if isinstance(out, Jagged) else out


def test_sixty_features_at_once_are_sixty_alone():
    """Groups of several dims and dtypes; order of the answer is that of the options."""
    options, features = mixed(60)
    engine = EmbeddingEngine(options)
    together = engine(dict(reversed(features.items())))
    assert list(together) == list(options)
    sum(values_of(out).float().pow(2).sum() for out in together.values()).backward()
    SparseSGD(hash_tables(engine), lr=0.1).step()
    for name in options:
        alone = EmbeddingEngine({name: options[name]})
        out = values_of(alone({name: features[name]})[name])
        assert torch.equal(values_of(together[name]), out)
        out.float().pow(2).sum().backward()
        SparseSGD(hash_tables(alone), lr=0.1).step()
        rows = alone.tables[name].embeddings(IDS)
        assert torch.equal(engine.tables[name].embeddings(IDS), rows)


def test_unused_outputs_leave_no_gradient():
    """Only what the loss reaches is trained."""
    engine = EmbeddingEngine({"a": option("sum"), "b": option("sum")})
    sparse = SparseSGD(hash_tables(engine), lr=1.0)
    out = engine({"a": IDS[DENSE], "b": IDS[DENSE]})
    before = engine.tables["b"].embeddings(IDS)
    out["a"].sum().backward()
    assert not engine.tables["b"].pending
    sparse.step()
    assert torch.equal(engine.tables["b"].embeddings(IDS), before)


def test_tables_that_do_not_train():
    """trainable=False reads, inserts and stamps, and gets no gradient."""
    engine = EmbeddingEngine(
        {"a": option("sum", trainable=False, eviction=GlobalStepFilter(3)), "b": option("sum")}
    )
    engine.tables["a"].update_step(2)
    out = engine({"a": IDS[DENSE], "b": IDS[DENSE]})
    before = engine.tables["a"].embeddings(IDS)
    (out["a"] + out["b"]).sum().backward()
    SparseSGD(hash_tables(engine), lr=1.0).step()
    assert torch.equal(engine.tables["a"].embeddings(IDS), before)
    assert engine.tables["a"].last_seen(IDS[DENSE]).unique().tolist() == [2]
    frozen = EmbeddingEngine({"a": option("sum", trainable=False)})
    assert not frozen({"a": IDS[DENSE]})["a"].requires_grad


def test_a_group_with_an_empty_read_only_table():
    """Nothing in one table of a group must not trouble the others."""
    engine = EmbeddingEngine({"a": option("none", admission=ReadOnly()), "b": option("none")})
    sparse = SparseSGD(hash_tables(engine), lr=1.0)
    out = engine({"a": IDS, "b": IDS})
    assert not out["a"].any()
    (out["a"] + out["b"]).sum().backward()
    assert engine.tables["a"].delete(IDS) == 0
    sparse.step()
    engine({"a": IDS, "b": IDS})["a"].sum().backward()
    sparse.zero_grad()


def test_evaluation_changes_no_table():
    """Zeros for the unknown in every mode and layout."""
    options, features = mixed(12)
    engine = EmbeddingEngine(options).eval()
    for out in engine(features).values():
        assert not values_of(out).any()
        assert not values_of(out).requires_grad
    assert all(len(table) == 0 for table in hash_tables(engine))


def test_empty_batches():
    """No samples, in every layout."""
    none = torch.empty(0, dtype=torch.int64)
    engine = EmbeddingEngine({m: option(m, table="t") for m in ("none", "sum", "mean", "tile")})
    for feature in (none, none.view(0, 3), Jagged(none, torch.zeros(1, dtype=torch.int64))):
        out = engine(dict.fromkeys(engine.options, feature))
        assert [len(values_of(o)) for o in out.values()] == [0] * 4
        assert out["tile"].shape == (0, 8)
        sum(values_of(value).sum() for value in out.values()).backward()


def test_a_copy_is_apart():
    """Deepcopy takes rows along, and looks up its own."""
    engine = EmbeddingEngine({"a": option("sum"), "b": option("mean", 3)})
    features = {"a": IDS[DENSE], "b": IDS[DENSE]}
    out = engine(features)
    twin = copy.deepcopy(engine)
    assert torch.equal(twin(features)["b"], out["b"])
    engine.tables["a"].clear()
    assert len(twin.tables["a"]) == PICKED.unique().numel()


def test_state_dict_keys_are_stable():
    """A checkpoint names tables, not features."""
    engine = EmbeddingEngine({"a": option("sum", table="t"), "b": option("mean", 3)})
    assert sorted(engine.state_dict()) == ["tables.b._extra_state", "tables.t._extra_state"]


# ---- what is refused


@pytest.mark.parametrize(
    ("field", "first", "second"),
    [
        ("embedding_dim", 4, 8),
        ("initializer", Constant(0.0), Uniform(-1.0, 1.0)),
        ("eviction", None, GlobalStepFilter(3)),
        ("eviction", GlobalStepFilter(2), GlobalStepFilter(3)),
        ("dtype", torch.float32, "bfloat16"),
        ("seed", 0, 1),
    ],
)
def test_options_that_disagree_on_a_table(field, first, second):
    """The error names both features, the table and what they disagree on."""
    one = EmbeddingOption(**{"embedding_dim": 4, "table": "t", field: first})
    two = EmbeddingOption(**{"embedding_dim": 4, "table": "t", field: second})
    words = f"features 'x' and 'y' share table 't' but disagree on {field}: "
    with pytest.raises(ValueError, match=re.escape(words)):
        EmbeddingEngine({"x": one, "y": two})
    EmbeddingEngine({"x": one, "y": copy.deepcopy(one)})


def test_options_are_options():
    """A dict of something else, or of nothing, is refused."""
    with pytest.raises(TypeError, match=r"options\['a'\]: expected EmbeddingOption, got 4"):
        EmbeddingEngine({"a": 4})
    with pytest.raises(ValueError, match="options: expected at least one feature, got none"):
        EmbeddingEngine({})
    with pytest.raises(TypeError, match="options: expected a dict of EmbeddingOption by feature"):
        EmbeddingEngine(EmbeddingOption(4))
    for name in (3, ""):
        with pytest.raises(TypeError, match="options: expected features' names as keys, got "):
            EmbeddingEngine({name: EmbeddingOption(4)})


def test_int32_ids_are_widened():
    """Alone, in bags and beside int64."""
    engine = EmbeddingEngine({"a": option("none"), "b": option("sum")})
    wide = engine({"a": IDS[:12] % 1000, "b": Jagged(PICKED, OFFSETS)})
    narrow = {"a": (IDS[:12] % 1000).int(), "b": Jagged(PICKED.int(), OFFSETS.int())}
    for name, rows in engine(narrow).items():
        assert torch.equal(rows, wide[name])


@pytest.mark.parametrize(
    ("features", "error", "words"),
    [
        ({"a": IDS}, ValueError, r"features: missing \['b'\], unknown \[\]"),
        ({"a": IDS, "b": IDS, "c": IDS}, ValueError, r"missing \[\], unknown \['c'\]"),
        ({"a": IDS, "b": IDS.short()}, TypeError, r"b: expected .*int64 .*, got torch\.int16"),
        ({"a": IDS, "b": "x"}, TypeError, "b: expected a Tensor of int64 or int32.*got str"),
        ({"a": IDS, "b": (IDS, IDS)}, TypeError, "b: expected weights as a floating-point"),
        ({"a": IDS, "b": (IDS, torch.ones(3))}, ValueError, r"b: expected weights .*got \(3,\)"),
        ({"a": IDS, "b": Jagged(IDS, IDS.float())}, TypeError, r"b\.offsets: .*got torch\.float32"),
        ([IDS, IDS], TypeError, "features: expected a dict or KeyedJaggedTensor, got list"),
    ],
)
def test_wrong_features(features, error, words):
    """The error names the feature."""
    engine = EmbeddingEngine({"a": option("none"), "b": option("none")}, strict=True)
    with pytest.raises(error, match=words):
        engine(features)


@pytest.mark.parametrize("mode", ["sum", "mean", "tile"])
def test_bags_of_more_dimensions(mode):
    """Ids [B, S, L] give [B, S, width]."""
    tile_len = 2 if mode == "tile" else None
    engine = EmbeddingEngine({"f": EmbeddingOption(3, mode=mode, tile_len=tile_len)})
    ids = torch.arange(24).view(2, 3, 4) % 7
    found = engine({"f": ids})["f"]
    assert found.shape == (2, 3, 6 if mode == "tile" else 3)
    assert found.view(6, -1).equal(engine({"f": ids.view(6, 4)})["f"])


def test_tables_without_a_name_get_that_of_their_place():
    """So that their rows do not begin alike; one that has a name keeps it."""
    engine = EmbeddingEngine({name: EmbeddingOption(4) for name in "abc"})
    for name in "ab":
        engine.tables[name] = HashTable(4)
    engine.tables["c"] = HashTable(4, name="other")
    out = engine(dict.fromkeys("abc", IDS))
    assert [table.name for table in engine.tables.values()] == ["a", "b", "other"]
    assert not out["a"].equal(out["b"])
