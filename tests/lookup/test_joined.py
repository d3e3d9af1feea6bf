"""Joined output: the outputs of all features, side by side in one tensor, to the bit."""

import copy
import gc
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from recis_lightning import EmbeddingEngine, EmbeddingOption, Jagged, hash_tables
from recis_lightning.admission import MinCount, ReadOnly
from recis_lightning.eviction import GlobalStepFilter
from recis_lightning.ops.cpu import embedding_bag
from recis_lightning.optim import SparseAdam, SparseSGD
from tests.helpers import rank_lookups
from tests.helpers.sample_tables import EXTREMES

OFFSETS = torch.tensor([0, 3, 3, 4, 9, 12])  # five samples, one with an empty bag
IDS = torch.cat([EXTREMES, torch.arange(100, 131)])
PICKED = IDS[torch.randint(40, (15,), generator=torch.Generator().manual_seed(1))]
WEIGHTS = torch.rand(15, generator=torch.Generator().manual_seed(2)) + 0.5
PADDING = int(PICKED[2])

OPTIONS = {
    "plain": {"embedding_dim": 4},
    "one": {"embedding_dim": 3, "padding_idx": PADDING},
    "weighted": {"embedding_dim": 4, "table": "plain"},
    "sum": {"embedding_dim": 8, "mode": "sum", "admission": MinCount(2)},
    "mean": {"embedding_dim": 3, "mode": "mean", "table": "one", "padding_idx": PADDING},
    "count": {"embedding_dim": 4, "mode": "mean", "mean_by": "count"},
    "tile": {"embedding_dim": 8, "mode": "tile", "tile_len": 2},
    "frozen": {"embedding_dim": 4, "mode": "sum", "table": "plain", "trainable": False},
    "reads": {"embedding_dim": 3, "mode": "sum", "table": "one", "admission": ReadOnly()},
    "still": {"embedding_dim": 3, "mode": "sum", "trainable": False},
}


def batch_of(shift=0, learns=True):
    """Return features of every layout, and their weights that ask for a gradient."""
    ids, weights = PICKED.roll(shift), [WEIGHTS.clone().requires_grad_(learns) for _ in range(4)]
    features = {
        "plain": ids[:5],
        "one": ids[5:10, None],
        "weighted": (ids[:5], weights[0][:5]),
        "sum": Jagged(ids[:12], OFFSETS, weights[1][:12]),
        "mean": (ids.view(5, 3), weights[2].view(5, 3)),
        "count": Jagged(ids[:12], OFFSETS, WEIGHTS[:12]),
        "tile": (ids.view(5, 3), weights[3].view(5, 3)),
        "frozen": Jagged(ids[:12], OFFSETS),
        "reads": ids.view(5, 3),
        "still": ids.view(5, 3),
    }
    return features, weights


def engine_of(**changes):
    return EmbeddingEngine(
        {name: EmbeddingOption(**option, **changes) for name, option in OPTIONS.items()}
    )


def cat(engine, features):
    """Return what ``concat`` must be."""
    out = engine(features)
    return torch.cat([out[name].flatten(1) for name in engine.options], 1)


def concat(engine, features):
    return engine.concat(features)


def train(engine, look_up, loss, steps=3):
    """Train; return outputs, gradients of weights, and all that the tables hold."""
    sparse = SparseAdam(hash_tables(engine), lr=0.1)
    found = []
    for step in range(steps):
        features, weights = batch_of(step)
        out = look_up(engine, features)
        loss(out).backward()
        found += [out.detach().clone(), *(weight.grad for weight in weights)]
        sparse.step()
    return found + contents(engine)


def contents(engine):
    states = [table.get_extra_state() for table in hash_tables(engine)]
    return [value for state in states for value in flat(state)]


def flat(state):
    if isinstance(state, dict):
        return [leaf for value in state.values() for leaf in flat(value)]
    return [state]


def assert_equal(ours, theirs):
    assert len(ours) == len(theirs)
    for number, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        if isinstance(one, torch.Tensor):
            assert one.dtype is other.dtype
            assert torch.equal(one, other), number
        else:
            assert one == other, number


def weighed(out):
    """Return a loss whose gradient differs in every place."""
    factors = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
    return (out.float() * factors).sin().sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.slow_except(dict(backend=["reference", "cpu"]), dict(dtype=torch.bfloat16))
def test_training_is_that_of_outputs_that_torch_joins(backend, dtype):
    """Outputs, gradients of weights, rows and optimizer state, by every backend."""
    steps = 1 if backend == "triton" else 3
    ours, theirs = engine_of(dtype=dtype), engine_of(dtype=dtype)
    found = train(ours, concat, weighed, steps)
    assert found[0].dtype is dtype
    assert found[0].shape == (5, sum(ours.widths.values()))
    assert_equal(found, train(theirs, cat, weighed, steps))


@pytest.mark.parametrize("dims", [(16, 48, 32), (3, 16, 16)])  # the second's lines are split
def test_a_large_output_is_that_of_a_small_one(dims, monkeypatch):
    """Which goes past the caches; so do known ids, unknown ones and padding."""
    options = {f"f{i}": EmbeddingOption(dim, padding_idx=3) for i, dim in enumerate(dims)}
    engine = EmbeddingEngine(options)
    ids = torch.arange(2000) % 700
    engine.concat(dict.fromkeys(options, ids[:500]))
    for is_training in (True, False):
        engine.train(is_training)
        monkeypatch.setattr(embedding_bag, "_STREAMED_BYTES", 0)
        streamed = engine.concat(dict.fromkeys(options, ids)).detach().clone()
        monkeypatch.undo()
        assert streamed.any()
        assert torch.equal(streamed, engine.concat(dict.fromkeys(options, ids)))
        assert torch.equal(streamed, torch.cat([*engine(dict.fromkeys(options, ids)).values()], 1))


LOSSES = {
    "expanded": lambda out: out.sum(),
    "one row for all": lambda out: out.sum(0).sin().sum(),
    "transposed": lambda out: (out.T.contiguous() * torch.arange(5.0)).sum(),
    "negated": lambda out: torch.view_as_complex(torch.stack([out, out * 2], 2)).conj().imag.sum(),
    "some columns": lambda out: out[:, 5:9].sin().sum(),
    "used twice": lambda out: out.square().sum() + out.sin().sum(),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_of_any_layout(loss):
    ours, theirs = engine_of(), engine_of()
    assert_equal(train(ours, concat, LOSSES[loss]), train(theirs, cat, LOSSES[loss]))


def test_tables_of_several_dtypes():
    """The output has torch's common dtype; gradients are rounded to each table's."""
    options = {
        name: EmbeddingOption(
            **option,
            dtype="bfloat16"
            if "one" in (name, option.get("table")) or name == "tile"
            else "float32",
        )
        for name, option in OPTIONS.items()
    }
    ours, theirs = EmbeddingEngine(options), EmbeddingEngine(options)
    found = train(ours, concat, weighed)
    assert found[0].dtype is torch.float32
    assert_equal(found, train(theirs, cat, weighed))


def test_evaluation_reads_only():
    engine = engine_of()
    features, _ = batch_of()
    engine.concat(features)
    before = contents(engine)
    engine.eval()
    features, _ = batch_of(1)
    with torch.no_grad():
        found, expected = engine.concat(features), cat(engine, features)
    assert torch.equal(found, expected)
    assert not found.requires_grad
    found = engine.concat(features)  # for the sake of weights
    found.sum().backward()
    assert_equal(contents(engine), before)
    assert not any(table.pending for table in hash_tables(engine))


def test_threads_evaluate_one_engine():
    engine = engine_of()
    batches = [batch_of(shift)[0] for shift in range(4)]
    for features in batches:
        engine.concat(features)
    engine.eval()
    with torch.no_grad():
        expected = [engine.concat(features) for features in batches]

    def evaluate(number):
        with torch.no_grad():
            return all(
                torch.equal(engine.concat(batches[i % 4]), expected[i % 4])
                for i in range(number, number + 20)
            )

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(evaluate, range(4)))


def test_frozen_tables():
    """One that is frozen between the lookup and its backward pass, and all of them."""
    results = []
    for look_up in (concat, cat):
        engine = engine_of()
        sparse = SparseSGD(hash_tables(engine), lr=1.0)
        out = look_up(engine, batch_of()[0])
        engine.tables["plain"].requires_grad_(False)
        weighed(out).backward()
        assert not engine.tables["plain"].pending
        sparse.step()
        results.append(contents(engine))
    assert_equal(*results)
    engine.requires_grad_(False)
    features, _ = batch_of(learns=False)
    assert not engine.concat(features).requires_grad


def test_empty_batches():
    """No samples, in every layout."""
    none = torch.empty(0, dtype=torch.int64)
    engine = engine_of()
    features = dict.fromkeys(engine.options, none)
    features |= {"sum": Jagged(none, OFFSETS[:1]), "tile": none.view(0, 3)}
    out = engine.concat(features)
    assert out.shape == (0, sum(engine.widths.values()))
    out.sum().backward()
    SparseSGD(hash_tables(engine), lr=1.0).step()
    assert not any(len(table) for table in hash_tables(engine))


def test_the_output_is_a_tensor_like_any_other():
    """It may be changed in place, and its memory goes when nobody has it, without a collector."""
    engine = engine_of()
    found = []
    for look_up in (concat, cat):
        twin = copy.deepcopy(engine)
        out = look_up(twin, batch_of()[0])
        out.mul_(2).relu_()
        out.sum().backward()
        SparseSGD(hash_tables(twin), lr=1.0).step()
        found.append(contents(twin))
    assert_equal(*found)
    gc.collect()
    gc.disable()
    try:
        out = engine.concat(batch_of()[0])
        gone = weakref.ref(out)
        loss = out.square().sum()
        del out
        del loss
        assert gone() is None
    finally:
        gc.enable()


def test_a_gradient_that_the_caller_holds_may_be_overwritten():
    found = []
    for look_up in (concat, cat):
        engine = engine_of()
        out = look_up(engine, batch_of()[0])
        gradient = torch.randn(out.shape, generator=torch.Generator().manual_seed(0))
        out.backward(gradient)
        gradient.fill_(float("nan"))
        SparseSGD(hash_tables(engine), lr=1.0).step()
        found.append(contents(engine))
    assert_equal(*found)


def test_rows_that_went_away_before_the_backward_pass():
    """No table gets a gradient then."""
    engine = engine_of()
    out = engine.concat(batch_of()[0])
    engine.tables["tile"].clear()
    with pytest.raises(RuntimeError, match="table 'tile' lost rows between a lookup and its"):
        out.sum().backward()
    assert not any(table.pending for table in hash_tables(engine))


class Operations(TorchDispatchMode):
    """Counts the operators that torch runs."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def test_nothing_is_made_for_each_feature():
    """Forty features run the operators of four, and none of them copies."""
    counts = []
    for count in (4, 40):
        names = [f"f{number}" for number in range(count)]
        engine = EmbeddingEngine({name: EmbeddingOption(4) for name in names})
        features = dict.fromkeys(names, torch.arange(5))
        engine.concat(features)
        gradient = torch.ones(5, 4 * count)
        with Operations() as operations:
            engine.concat(features).mul(2).backward(gradient)
        counts.append(operations.names)
    assert counts[0] == counts[1]
    assert not [name for name in counts[0] if "cat" in name or "narrow" in name or "copy" in name]


def test_ranks(ranks):
    """Several dims and dtypes, uneven parts, and evaluation batches that others do not have."""
    ranks.run(2, rank_lookups.joined_outputs)


# ---- what is refused


GOOD = {"a": torch.arange(3), "b": torch.arange(6).view(3, 2)}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"a": torch.arange(6).view(3, 2)}, r"^a: .*mode 'none', .* got ids of shape \(3, 2\)"),
        ({"a": Jagged(torch.arange(3), torch.arange(4))}, "^a: .* got ragged ids; give it mode="),
        ({"a": torch.tensor(4)}, r"^a: concat needs one id a sample .* got ids of shape \(\)"),
        ({"a": (torch.ones(3, 0).long(), torch.ones(3, 0))}, r"^a: .* got ids of shape \(3, 0\)"),
        ({"b": torch.ones(3, 1, 2).long()}, r"^b: concat needs ids \[B\] .*shape \(3, 1, 2\)"),
        ({"b": torch.arange(4)}, "^b: concat needs as many samples .* 'a' has 3; got 4"),
        ({"b": Jagged(torch.arange(3), torch.tensor([0, 3]))}, "^b: .* 'a' has 3; got 1"),
        ({"b": Jagged(torch.arange(3), torch.tensor([1, 1, 1]))}, "^b: .* did you pass lengths"),
        ({"b": None}, r"^features: concat needs every feature .* missing \['b'\], unknown \[\]"),
    ],
)
def test_wrong_features(change, words):
    """The error names the feature, and no table has changed."""
    features = {name: value for name, value in (GOOD | change).items() if value is not None}
    engine = EmbeddingEngine({"a": EmbeddingOption(2), "b": EmbeddingOption(3, mode="sum")})
    with pytest.raises(ValueError, match=words):
        engine.concat(features)
    assert not any(len(table) for table in hash_tables(engine))


def test_keys_that_are_no_features():
    """They are left alone, but for a strict engine; of keyed jagged tensors too."""
    options = {"a": EmbeddingOption(2), "b": EmbeddingOption(3, mode="sum")}
    engine, strict = EmbeddingEngine(options), EmbeddingEngine(options, strict=True)
    found = engine.concat({"label": object(), **GOOD})
    assert torch.equal(strict.concat(GOOD), found)
    with pytest.raises(ValueError, match=r"missing \[\], unknown \['label'\]"):
        strict.concat({"label": object(), **GOOD})
    with pytest.raises(TypeError, match="features: expected a dict or KeyedJaggedTensor, got list"):
        engine.concat([GOOD])


def test_columns_are_in_the_order_of_the_options():
    """Whatever the order of a batch, and also where another table is put in."""
    engine = EmbeddingEngine(
        {
            "tile": EmbeddingOption(2, mode="tile", tile_len=3, eviction=GlobalStepFilter(5)),
            "a": EmbeddingOption(4),
            "b": EmbeddingOption(2, mode="sum"),
        }
    )
    assert list(engine.widths.items()) == [("tile", 6), ("a", 4), ("b", 2)]
    features = {"b": PICKED.view(5, 3), "a": PICKED[:5], "tile": PICKED.view(5, 3)}
    for _ in range(2):
        parts = engine.concat(features).split([*engine.widths.values()], 1)
        out = engine(features)
        for name, part in zip(engine.widths, parts, strict=True):
            assert torch.equal(part, out[name])
        engine.tables["a"] = copy.deepcopy(engine.tables["a"])
        engine.tables["a"].insert(PICKED[:5].unique(), torch.ones(PICKED[:5].unique().numel(), 4))
