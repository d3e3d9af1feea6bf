"""DynamicEmbedding and DynamicEmbeddingBag beside nn.Embedding and nn.EmbeddingBag."""

import copy

import pytest
import torch
from torch import nn

from recis_lightning import (
    DynamicEmbedding,
    DynamicEmbeddingBag,
    EmbeddingEngine,
    EmbeddingOption,
    Jagged,
    hash_tables,
)
from recis_lightning.admission import ReadOnly
from recis_lightning.eviction import GlobalStepFilter
from recis_lightning.initializers import Constant, Normal
from recis_lightning.optim import SparseSGD
from tests.helpers.sample_tables import EXTREMES, LOW

IDS = torch.cat([EXTREMES, torch.arange(100, 131)])  # 40 ids


def bag_and_reference(mode, padding=None, dim=4):
    """Return a bag, all its ids known, and ``nn.EmbeddingBag`` with the same rows."""
    padding_idx = None if padding is None else int(IDS[padding])
    ours = DynamicEmbeddingBag(dim, mode=mode, padding_idx=padding_idx, name="bag")
    ours(IDS[:, None])
    theirs = nn.EmbeddingBag(40, dim, mode=mode, padding_idx=padding)
    theirs.weight.data.copy_(ours.table.embeddings(IDS))
    return ours, theirs


def compare_after_a_step(ours, theirs, out, expected):
    """Compare outputs, and rows after one step of SGD on both."""
    torch.testing.assert_close(out, expected)
    sparse = SparseSGD(hash_tables(ours), lr=0.5)
    dense = torch.optim.SGD(theirs.parameters(), lr=0.5)
    factors = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
    (out * factors).sum().backward()
    (expected * factors).sum().backward()
    sparse.step()
    dense.step()
    torch.testing.assert_close(ours.table.embeddings(IDS), theirs.weight.detach())


# ---- shapes


@pytest.mark.parametrize("shape", [(), (0,), (1,), (5,), (2, 3), (2, 0, 3), (0, 4), (2, 3, 2)])
def test_shapes_are_those_of_nn_embedding(shape):
    """Whatever the shape of the ids, empty and 0-d included."""
    ids = torch.randint(40, shape)
    module = DynamicEmbedding(3, name="shape")
    out = module(ids)
    assert out.shape == nn.Embedding(40, 3)(ids).shape
    out.sum().backward()
    assert module.eval()(ids).shape == out.shape
    torch.testing.assert_close(module(ids), out)


def test_ids_need_not_be_contiguous():
    """Transposed, strided and expanded ids are read as they look."""
    module = DynamicEmbedding(3, name="strides")
    grid = torch.arange(12).view(3, 4)
    module(grid)
    for ids in (grid.T, grid[:, ::2], grid[1:2].expand(5, 4), grid.flip(0)):
        assert torch.equal(module(ids), module.table.embeddings(ids.contiguous()))


@pytest.mark.parametrize("kind", ["expanded", "transposed", "sliced", "bfloat16", "column"])
def test_gradients_of_any_layout(kind):
    """The backward pass of what follows may hand over any strides."""
    dim = 1 if kind == "column" else 4
    module = DynamicEmbedding(dim, name="layout")
    before = module(IDS).detach()
    gradients = {
        "expanded": torch.full((1, 1), 2.0).expand(40, 4),
        "column": torch.full((1, 1), 2.0).expand(40, 1),
        "transposed": torch.randn(4, 40).T,
        "sliced": torch.randn(40, 9)[:, 1:5],
        "bfloat16": torch.randn(40, 4).bfloat16().float(),
    }
    sparse = SparseSGD(hash_tables(module), lr=1.0)
    out = module(IDS)
    if kind == "bfloat16":
        out = out.bfloat16()
    out.backward(gradients[kind].to(out.dtype))
    sparse.step()
    torch.testing.assert_close(module.table.embeddings(IDS), before - gradients[kind])


# ---- modes of running


def test_evaluation_reads_only():
    """Nothing inserted, nothing stamped, zeros for the unknown, no gradient."""
    module = DynamicEmbedding(3, name="eval", eviction=GlobalStepFilter(5))
    known = module(IDS[:5]).detach()
    module.table.update_step(2)
    out = module.eval()(IDS)
    assert torch.equal(out[:5], known)
    assert torch.equal(out[5:], torch.zeros(35, 3))
    assert not out.requires_grad
    assert len(module.table) == 5
    assert module.table.last_seen(IDS[:6]).tolist() == [0] * 5 + [-1]


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_training_lookups_without_gradients(guard):
    """They insert and stamp, and leave no gradient; the table trains on afterwards."""
    module = DynamicEmbedding(3, name="guard", eviction=GlobalStepFilter(5))
    sparse = SparseSGD(hash_tables(module), lr=1.0)
    with guard():
        out = module(IDS)
        module(torch.arange(10**6, 10**6 + 3000))
    assert not out.requires_grad
    assert len(module.table) == 3040
    module(torch.arange(5000)).sum().backward()
    before = module.table.embeddings(IDS[:3])
    module(IDS[:3]).sum().backward()
    sparse.step()
    torch.testing.assert_close(module.table.embeddings(IDS[:2]), before[:2] - 1)
    module.table.update_step(9)
    assert module.table.evict() > 0


def test_read_only_trains_what_is_known():
    """Unknown ids give zeros, no row and no gradient."""
    module = DynamicEmbedding(2, name="fixed", admission=ReadOnly(), eviction=GlobalStepFilter(1))
    module.table.insert(IDS[:3], torch.ones(3, 2))
    sparse = SparseSGD(hash_tables(module), lr=0.25)
    module.table.update_step()
    out = module(IDS[[0, 7, 0]])
    assert out.tolist() == [[1.0, 1.0], [0.0, 0.0], [1.0, 1.0]]
    out.sum().backward()
    sparse.step()
    assert module.table.embeddings(IDS[:2]).tolist() == [[0.5, 0.5], [1.0, 1.0]]
    assert module.table.last_seen(IDS[[0, 1, 7]]).tolist() == [1, 0, -1]
    assert len(module.table) == 3


@pytest.mark.parametrize("padding_idx", [0, 7, -1, -100, LOW, 2**63 - 1])
def test_padding_is_no_id(padding_idx):
    """Zeros, no row, no gradient, whatever number it is."""
    module = DynamicEmbedding(2, name="pad", padding_idx=padding_idx, initializer=Constant(1.0))
    sparse = SparseSGD(hash_tables(module), lr=0.25)
    out = module(torch.tensor([padding_idx, 5, padding_idx]))
    assert out.tolist() == [[0.0, 0.0], [1.0, 1.0], [0.0, 0.0]]
    out.sum().backward()
    sparse.step()
    assert module.table.ids().tolist() == [5]
    assert module.table.embeddings(torch.tensor([5])).tolist() == [[0.75, 0.75]]


def test_backward_twice_counts_twice():
    """A retained graph adds its gradients once more."""
    module = DynamicEmbedding(2, name="twice")
    before = module(IDS).detach()
    sparse = SparseSGD(hash_tables(module), lr=1.0)
    loss = module(IDS).sum()
    loss.backward(retain_graph=True)
    loss.backward()
    with pytest.raises(RuntimeError, match="Trying to backward through the graph a second time"):
        loss.backward()
    sparse.step()
    torch.testing.assert_close(module.table.embeddings(IDS), before - 2)


def test_gradients_survive_what_happens_to_their_source():
    """A dense parameter beside a lookup gets the same gradient tensor, and clipping scales it."""
    module = DynamicEmbedding(2, name="beside")
    before = module(IDS[:2]).detach()
    sparse = SparseSGD(hash_tables(module), lr=1.0)
    offset = nn.Parameter(torch.zeros(2, 2))
    ((module(IDS[:2]) + offset) * 8).sum().backward()
    nn.utils.clip_grad_norm_([offset], 1e-3)
    sparse.step()
    torch.testing.assert_close(module.table.embeddings(IDS[:2]), before - 8)


# ---- bags


@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize("padding", [None, 3, 0])
@pytest.mark.parametrize("dim", [1, 3, 8])
@pytest.mark.slow_except(
    dict(mode="sum", padding=[None, 0], dim=[1, 8]),
    dict(mode="sum", padding=3, dim=3),
    dict(mode="mean", padding=[None, 0], dim=3),
    dict(mode="mean", padding=3, dim=[1, 8]),
)
def test_fixed_bags(mode, padding, dim):
    """2-D ids, with padding here and there and a bag of nothing else."""
    ours, theirs = bag_and_reference(mode, padding, dim)
    picked = torch.randint(40, (12, 6), generator=torch.Generator().manual_seed(1))
    picked[::2, 1:4] = 3
    picked[5] = 3
    compare_after_a_step(ours, theirs, ours(IDS[picked]), theirs(picked))


@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize("padding", [None, 3])
@pytest.mark.parametrize("last", [False, True])
def test_bags_with_offsets(mode, padding, last):
    """1-D ids, with empty bags first, last and in between."""
    ours, theirs = bag_and_reference(mode, padding)
    ours.include_last_offset = theirs.include_last_offset = last
    picked = torch.randint(40, (31,), generator=torch.Generator().manual_seed(1))
    picked[10:14] = 3
    offsets = torch.tensor([0, 0, 10, 10, 12, 30, 31] + [31] * last)
    out, expected = ours(IDS[picked], offsets), theirs(picked, offsets)
    assert out.shape == (7, 4)
    compare_after_a_step(ours, theirs, out, expected)


@pytest.mark.parametrize("padding", [None, 3])
@pytest.mark.parametrize("flat", [False, True])
def test_weighted_bags(padding, flat):
    """per_sample_weights weigh rows, and get their own gradients."""
    ours, theirs = bag_and_reference("sum", padding)
    picked = torch.randint(40, (6, 5), generator=torch.Generator().manual_seed(1))
    picked[0] = 3
    offsets = [torch.arange(0, 30, 5)] if flat else []
    weights = [torch.randn(6, 5, generator=torch.Generator().manual_seed(2)) for _ in range(2)]
    weights = [nn.Parameter(w.view(-1) if flat else w) for w in weights]
    picked = picked.view(-1) if flat else picked
    out = ours(IDS[picked], *offsets, per_sample_weights=weights[0])
    expected = theirs(picked, *offsets, per_sample_weights=weights[1])
    compare_after_a_step(ours, theirs, out, expected)
    torch.testing.assert_close(weights[0].grad, weights[1].grad)


@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize("shape", [(0, 3), (4, 0), (0, 0)])
def test_bags_of_nothing(mode, shape):
    """No bags, or bags without ids (torch raises there): zeros, and a backward pass."""
    ours, _ = bag_and_reference(mode)
    out = ours(torch.empty(shape, dtype=torch.int64))
    assert out.shape == (shape[0], 4)
    assert not out.any()
    out.sum().backward()


def test_ragged_layouts_say_the_same():
    """Jagged, NestedTensor and offsets are three ways to write one thing."""
    ours, _ = bag_and_reference("mean")
    offsets = torch.tensor([0, 2, 2, 7])
    expected = ours(IDS[:7], offsets[:-1])
    nested = torch.nested.nested_tensor_from_jagged(IDS[:7], offsets)
    assert torch.equal(ours(Jagged(IDS[:7], offsets)), expected)
    assert torch.equal(ours(nested), expected)


# ---- what is refused


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: DynamicEmbeddingBag(4, mode="max"), ValueError, "mode: .*got 'max'; 'max' does n"),
        (lambda: DynamicEmbeddingBag(4, mode="tile"), ValueError, "mode: expected.*, got 'tile'"),
        (lambda: DynamicEmbedding(1000, 16), TypeError, r"write DynamicEmbedding\(16\)"),
        (lambda: DynamicEmbeddingBag(1000, 16), TypeError, r"write DynamicEmbeddingBag\(16\)"),
        (
            lambda: DynamicEmbedding(4, num_embeddings=9),
            TypeError,
            "num_embeddings: .*leave it out",
        ),
        (lambda: DynamicEmbedding(4, combiner="sum"), TypeError, "use DynamicEmbeddingBag"),
        (lambda: DynamicEmbedding(4, max_norm=1.0), TypeError, "max_norm: .*leave it out"),
        (lambda: DynamicEmbedding(4, padding_ix=0), TypeError, "did you mean padding_idx"),
        (lambda: DynamicEmbeddingBag(4, combiner="sum"), TypeError, "combiner: .*; write mode="),
        (lambda: DynamicEmbedding(4, initializer="normal"), TypeError, r"initializer=Normal\(\)"),
        (lambda: DynamicEmbedding(EmbeddingOption(4)), TypeError, "write EmbeddingEngine"),
        (lambda: DynamicEmbeddingBag(4, max_norm=1.0), ValueError, "max_norm: does not exist"),
        (lambda: DynamicEmbeddingBag(4, sparse=True), ValueError, "sparse: does not exist here"),
        (lambda: DynamicEmbeddingBag(4, colour=1), TypeError, "unexpected argument 'colour'"),
        (lambda: DynamicEmbedding(4, sparse=True), (TypeError, ValueError), "sparse"),
        (lambda: DynamicEmbedding(-4), ValueError, "embedding_dim: expected an int >= 1, got -4"),
        (lambda: DynamicEmbedding(4, device="meta"), ValueError, "device: .*got 'meta'"),
        (lambda: DynamicEmbedding(4, dtype=torch.half), ValueError, "dtype: .*got torch.float16"),
        (lambda: DynamicEmbedding(4, padding_idx=1.0), TypeError, r"padding_idx: .*got 1\.0"),
        (lambda: DynamicEmbedding(4, padding_idx=2**63), ValueError, "padding_idx: .*an int64"),
    ],
)
def test_wrong_construction(make, error, words):
    """An error names the argument, the value got and what was expected."""
    with pytest.raises(error, match=words):
        make()


FLAT = torch.arange(6)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((FLAT,), ValueError, "offsets: 1-D ids need them, got None"),
        ((FLAT.short(), FLAT), TypeError, r"ids: expected dtype torch.int64 .*got torch.int16"),
        ((FLAT, FLAT.short()), TypeError, r"offsets: expected dtype .*got torch.int16"),
        ((FLAT.view(2, 3), FLAT), ValueError, "offsets: expected None for 2-D ids"),
        ((FLAT.view(1, 2, 3),), ValueError, r"ids: expected shape .*got \(1, 2, 3\)"),
        ((FLAT, torch.tensor([1, 3])), ValueError, "offsets: .*must start at 0"),
        ((FLAT, torch.tensor([0, 4, 2])), ValueError, "offsets: .*never descend"),
        ((FLAT, torch.tensor([0, 9])), ValueError, "offsets: .*number of ids, 6"),
        (
            (FLAT, torch.tensor([0, 3, 9])),
            ValueError,
            r"offsets: .*got \[0, 3, 9, 6\], .*lengths\?",
        ),
        ((FLAT, torch.tensor([0], device="meta")), ValueError, "its offsets on meta"),
        ((FLAT, torch.tensor([0]), torch.ones(6).to("meta")), ValueError, "its weights on meta"),
        ((FLAT.to("meta"), torch.tensor([0])), ValueError, "its ids on meta"),
        ((FLAT, torch.tensor([0]), torch.ones(5)), ValueError, r"weights of the ids' shape"),
        ((FLAT, torch.tensor([0]), FLAT), TypeError, "expected weights as a floating-point"),
    ],
)
def test_wrong_bags(arguments, error, words):
    """Malformed bags are named, and leave nothing behind."""
    module = DynamicEmbeddingBag(2, mode="sum", name="bag")
    with pytest.raises(error, match=words):
        module(*arguments)
    assert len(module.table) == 0


def test_weights_are_for_sums():
    """As in torch."""
    module = DynamicEmbeddingBag(2, mode="mean")
    with pytest.raises(ValueError, match="per_sample_weights: only mode 'sum' takes them, this is"):
        module(FLAT, torch.tensor([0]), torch.ones(6))


@pytest.mark.parametrize("ids", [FLAT.float(), FLAT.short(), [1, 2], None])
def test_ids_are_int64(ids):
    """No silent conversion."""
    with pytest.raises(TypeError, match=r"ids: expected .*int64.*, got (torch|list|None)"):
        DynamicEmbedding(2)(ids)


def test_int32_ids_and_offsets_are_widened():
    """As torch.nn takes them; the rows are those of the same int64."""
    module, bag = DynamicEmbedding(2, name="wide"), DynamicEmbeddingBag(2, name="wide")
    assert torch.equal(module(FLAT.int()), module(FLAT))
    assert torch.equal(bag(FLAT.view(2, 3).int()), bag(FLAT.view(2, 3)))
    offsets = torch.tensor([0, 2])
    assert torch.equal(bag(FLAT.int(), offsets.int()), bag(FLAT, offsets))
    assert sorted(module.table.ids().tolist()) == sorted(bag.table.ids().tolist())


# ---- beyond one call


def test_rows_start_as_the_initializer_says():
    """Mean and spread of many rows, and dtype."""
    module = DynamicEmbedding(64, initializer=Normal(mean=2.0, std=0.5), name="start")
    rows = module(torch.arange(2000))
    assert rows.mean().item() == pytest.approx(2.0, abs=0.01)
    assert rows.std().item() == pytest.approx(0.5, abs=0.01)


def test_a_compiled_module_gives_the_same():
    """torch.compile breaks its graph at a lookup and trains as the plain module does."""
    torch._dynamo.reset()
    results = []
    for wrap in (lambda module: module, lambda module: torch.compile(module, backend="eager")):
        torch.manual_seed(0)
        module = nn.Sequential(DynamicEmbedding(4, name="compiled"), nn.ReLU(), nn.Linear(4, 1))
        sparse = SparseSGD(hash_tables(module), lr=0.1)
        compiled = wrap(module)
        for size in (3, 5, 9):
            compiled(IDS[:size]).sum().backward()
            sparse.step()
        results.append(module[0].table.embeddings(IDS))
    assert results[0].any()
    torch.testing.assert_close(*results)


def test_signs_that_torch_has_yet_to_apply():
    """Ids, rows, weights and gradients of a tensor with the negative bit keep their sign."""
    negative = torch._neg_view
    ids = negative(torch.tensor([-5, -6, -5]))
    assert ids.is_neg()
    bag = DynamicEmbeddingBag(2, mode="sum", name="t")
    bag.table.insert(ids[:2], negative(torch.ones(2, 2)))
    assert bag.table.ids().tolist() == [5, 6]
    assert torch.equal(bag.table.embeddings(ids), torch.full((3, 2), -1.0))
    sparse = SparseSGD([bag.table], lr=1.0)
    weights, offsets = negative(torch.tensor([-1.0, -2.0, -3.0])), negative(torch.tensor([0, -2]))
    out = bag(ids, offsets, weights)
    assert torch.equal(out, torch.tensor([[-3.0, -3.0], [-3.0, -3.0]]))
    out.backward(negative(torch.ones(2, 2)))
    sparse.step()
    assert torch.equal(
        bag.table.embeddings(torch.tensor([5, 6])), torch.tensor([[3.0, 3.0], [1.0, 1.0]])
    )
    plain = DynamicEmbedding(2, name="p")
    plain(ids)
    assert plain.table.ids().tolist() == [5, 6]


def test_per_sample_weights_learn_in_evaluation_too():
    """As of ``nn.EmbeddingBag``; rows get no gradient."""
    bag = DynamicEmbeddingBag(4, mode="sum", name="tags")
    ids = torch.tensor([[3, 5], [5, 9]])
    bag(ids)
    twin = torch.nn.EmbeddingBag.from_pretrained(bag.table.embeddings(torch.arange(10)), mode="sum")
    found, expected = (torch.ones(2, 2, requires_grad=True) for _ in range(2))
    bag.eval()(ids, per_sample_weights=found).sin().sum().backward()
    twin(ids, per_sample_weights=expected).sin().sum().backward()
    torch.testing.assert_close(found.grad, expected.grad)
    assert not bag.table.pending
    assert not bag(ids, per_sample_weights=torch.ones(2, 2)).requires_grad


def test_rows_of_unnamed_tables_do_not_begin_alike():
    """Also if nobody names the tables before they are looked up; copies begin as their original."""
    ids = torch.arange(5)
    one, other = DynamicEmbedding(4), DynamicEmbedding(4)
    twin = copy.deepcopy(one)
    rows = one(ids)
    assert not rows.equal(other(ids))
    assert rows.equal(twin(ids))
    names = [table.name for table in hash_tables(torch.nn.ModuleList([one, other]))]
    assert len(set(names)) == 2
    named = torch.nn.ModuleList([DynamicEmbedding(4)])
    named[0].eval()(ids)  # reads only, and names nothing
    assert hash_tables(named)[0].name == "0"


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
def test_weights_of_no_ids_have_an_empty_gradient(training, shape):
    """As in torch, not none."""
    bag = DynamicEmbeddingBag(4, mode="sum", name="tags").train(training)
    weights = torch.ones(shape, requires_grad=True)
    bag(torch.ones(shape, dtype=torch.int64), per_sample_weights=weights).sum().backward()
    assert weights.grad.shape == shape


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("change", ["step", "insert"])
def test_a_gradient_of_weights_needs_the_rows_as_they_were(training, change):
    """As autograd has it: what it would read has changed, so it is an error, not another number."""
    ids, bag = torch.arange(6).view(2, 3), DynamicEmbeddingBag(4, mode="sum", name="tags")
    optimizer = SparseSGD(hash_tables(bag), lr=0.1)
    bag(ids).sum().backward()
    weights = torch.ones(2, 3, requires_grad=True)
    out = bag.train(training)(ids, per_sample_weights=weights)
    if change == "step":
        optimizer.step()
    else:
        bag.table.insert(ids, torch.zeros(2, 3, 4))
    with pytest.raises(
        RuntimeError, match=r"^ids: rows of table 'tags', needed for .* overwritten"
    ):
        out.sum().backward()
    again = bag(ids, per_sample_weights=weights)
    bag.table.insert(torch.tensor([99]), torch.zeros(1, 4))  # a new row is no change
    again.sum().backward()
    assert weights.grad.equal(bag.table.embeddings(ids).sum(-1))


@pytest.mark.parametrize("listed", [True, False])
def test_rows_of_unnamed_tables_filled_by_insert_do_not_begin_alike(listed):
    """Their rows were given, none has begun as that of a name."""
    pair = torch.nn.ModuleList([DynamicEmbedding(4), DynamicEmbedding(4)])
    for module in pair:
        module.table.insert(torch.arange(3), torch.zeros(3, 4))
    if listed:
        assert [table.name for table in hash_tables(pair)] == ["0", "1"]
    ids = torch.arange(5, 9)
    assert not pair[0](ids).equal(pair[1](ids))


def test_a_saved_table_without_a_name_goes_on_with_the_rows_it_would_have_had():
    """Also one that was not the first to be used."""
    first, other = DynamicEmbedding(4), DynamicEmbedding(4)
    first(torch.arange(3)), other(torch.arange(3))
    resumed = DynamicEmbedding(4)
    resumed.load_state_dict(other.state_dict())
    assert resumed(torch.arange(9)).equal(other(torch.arange(9)))


def test_seed_none_is_that_of_torch():
    """So ``seed_everything`` reaches initial rows."""
    ids = torch.arange(5)

    def rows(seed):
        torch.manual_seed(seed)
        modules = [
            DynamicEmbedding(4, name="a", seed=None),
            DynamicEmbeddingBag(4, name="a", seed=None),
        ]
        engine = EmbeddingEngine({"a": EmbeddingOption(4, seed=None)})
        found = [module(ids.view(-1, 1)).view(5, 4) for module in modules]
        return [*found, engine({"a": ids})["a"]]

    assert rows(1)[0].equal(rows(1)[0])
    assert not rows(1)[0].equal(rows(2)[0])
    assert all(part.equal(rows(7)[0]) for part in rows(7))


def test_share_memory_is_refused():
    """It would succeed and share nothing: rows are no parameters, and their memory grows."""
    user = DynamicEmbedding(4, name="user")
    with pytest.raises(RuntimeError, match=r"table 'user': share_memory\(\) cannot share a table"):
        torch.nn.Sequential(user).share_memory()
