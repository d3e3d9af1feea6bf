"""HashTable: saving, loading, copying, and changing dtype or optimizer."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from recis_lightning import DynamicEmbedding, hash_tables
from recis_lightning.eviction import GlobalStepFilter
from recis_lightning.optim import SparseAdagrad, SparseAdam, SparseRowwiseAdagrad, SparseSGD
from tests.helpers.sample_tables import EXTREMES, by_id, filled, same, trained


@pytest.mark.parametrize("optimizer", [SparseSGD, SparseAdagrad, SparseRowwiseAdagrad, SparseAdam])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_travels_through_a_safe_file(optimizer, dtype):
    """A saved table is loaded with weights_only=True and holds the same, bit by bit."""
    module, _ = trained(optimizer, dtype)
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    other = DynamicEmbedding(3, eviction=GlobalStepFilter(50), dtype=dtype, seed=5)
    other(torch.arange(9))
    other.load_state_dict(torch.load(file, weights_only=True))
    assert same(other.table.get_extra_state(), module.table.get_extra_state())


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_trains_as_the_original_and_apart_from_it(copier):
    """Module and optimizer copied together go on alike, each on rows of its own."""
    module, sparse = trained()
    twin, twin_sparse = copier((module, sparse))
    ids = torch.cat([EXTREMES, torch.arange(50, 60)])
    for embedding, optimizer in ((module, sparse), (twin, twin_sparse)):
        embedding(ids).pow(2).sum().backward()
        optimizer.step()
    assert same(by_id(twin.table), by_id(module.table))
    twin(ids).sum().backward()
    twin_sparse.step()
    assert not same(by_id(twin.table), by_id(module.table))


def test_a_copy_leaves_pending_gradients_behind():
    """As a copied parameter leaves its grad."""
    module, sparse = trained()
    module(EXTREMES).sum().backward()
    twin, twin_sparse = copy.deepcopy((module, sparse))
    before = twin.table.embeddings(EXTREMES)
    twin_sparse.step()
    assert torch.equal(twin.table.embeddings(EXTREMES), before)
    sparse.step()
    assert not torch.equal(module.table.embeddings(EXTREMES), before)


def test_loading_into_another_optimizer_keeps_only_fitting_state(caplog):
    """SparseAdagrad's sum of a whole row is no row-wise sum, and moments mean nothing to it."""
    for source in (SparseAdagrad, SparseAdam, SparseSGD):
        caplog.clear()
        module, _ = trained(source)
        other = DynamicEmbedding(3, name="t")
        sparse = SparseRowwiseAdagrad(hash_tables(other), initial_accumulator_value=0.5)
        other.load_state_dict(module.state_dict())
        state = other.table.get_extra_state()
        assert torch.equal(state["weights"], module.table.get_extra_state()["weights"])
        assert state["slots"]["sum"].tolist() == [[0.5]] * len(other.table)
        lost = {SparseAdagrad: "sum", SparseAdam: "exp_avg, exp_avg_sq", SparseSGD: None}[source]
        messages = [r.getMessage() for r in caplog.records if r.name.endswith("table.state")]
        assert len(messages) == (lost is not None)
        assert all(f"another optimizer's; {lost} is dropped, and sum" in m for m in messages)
        other(EXTREMES).sum().backward()
        sparse.step()


def test_changing_the_optimizer_keeps_weights():
    """A second optimizer lays rows out anew; the first may not step on them any more."""
    module, first = trained(SparseAdagrad)
    before = module.table.get_extra_state()["weights"]
    second = SparseRowwiseAdagrad(hash_tables(module))
    assert torch.equal(module.table.get_extra_state()["weights"], before)
    module(EXTREMES[:1]).sum().backward()
    with pytest.raises(RuntimeError, match="'t' was given to another optimizer since, SparseRow"):
        first.step()
    second.step()


def test_slots_in_another_order_find_their_places():
    """State is found by name, wherever a file lists it."""
    module, sparse = trained()
    state = module.table.get_extra_state()
    state["slots"] = dict(reversed(state["slots"].items()))
    module.table.set_extra_state(state)
    loaded = module.table.get_extra_state()["slots"]
    assert all(torch.equal(loaded[name], state["slots"][name]) for name in state["slots"])
    sparse.step()


def _without(key):
    return lambda state: state.pop(key)


def _with(key, value):
    return lambda state: state.__setitem__(key, value(state[key]) if callable(value) else value)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_with("schema", 99), "expected schema 1, got 99"),
        (_without("ids"), "ids is missing"),
        (_without("slots"), "slots is missing"),
        (_with("step", "3"), "step is missing or not"),
        (_with("embedding_dim", 4), "embedding_dim=3, it has 4"),
        (_with("ids", lambda ids: ids[:-1]), r"expected .* of shape \(6,"),
        (_with("ids", lambda ids: ids.int()), "expected ids of .*int64"),
        (_with("weights", lambda w: w.double()), r"expected weights .*float32, .*float64"),
        (_with("weights", lambda w: w[:, :2]), r"expected weights of shape"),
        (_with("dtype", "complex64"), "dtype: expected torch.float32 or"),
        (_with("last_seen", lambda seen: seen[1:]), "expected last_seen of shape"),
        (_with("slots", lambda slots: {"exp_avg": slots["exp_avg"].double()}), "exp_avg of"),
        (_with("slots", lambda slots: {"exp_avg": slots["exp_avg"][0]}), "exp_avg of"),
    ],
)
def test_a_foreign_state_is_refused_and_changes_nothing(spoil, words):
    """A torn or foreign file leaves the table as it was."""
    module, _ = trained()
    before = module.table.get_extra_state()
    state = module.table.get_extra_state()
    spoil(state)
    with pytest.raises(ValueError, match=words):
        module.table.set_extra_state(state)
    assert same(module.table.get_extra_state(), before)


def test_no_state_at_all_is_refused():
    """What is no dict is named by its type."""
    with pytest.raises(ValueError, match="state of table 't': expected schema 1, got 'list'"):
        filled().set_extra_state([])


def test_bfloat16_and_back():
    """to(bfloat16) rounds weights and keeps optimizer state; float() goes back."""
    module, _ = trained()
    before = module.table.get_extra_state()
    module.to(torch.bfloat16)
    after = module.table.get_extra_state()
    assert torch.equal(after["weights"], before["weights"].bfloat16())
    assert same(after["slots"], before["slots"])
    assert module(EXTREMES[:1]).dtype is torch.bfloat16
    module.float()
    assert torch.equal(module.table.get_extra_state()["weights"], after["weights"].float())


def test_a_state_is_converted_to_the_dtype_of_the_table():
    """As load_state_dict converts a parameter's."""
    module, _ = trained(dtype=torch.bfloat16)
    other = DynamicEmbedding(3, name="t")
    other.load_state_dict(module.state_dict())
    weights = module.table.get_extra_state()["weights"]
    assert torch.equal(other.table.get_extra_state()["weights"], weights.float())


@pytest.mark.parametrize("convert", [nn.Module.double, nn.Module.half])
def test_other_dtypes_are_refused(convert):
    """double() and half() would need other kernels."""
    module = nn.Sequential(DynamicEmbedding(3, name="u"))
    with pytest.raises(ValueError, match=r"table 'u': expected .*, got torch.(float64|float16)"):
        convert(module)
    assert module(torch.arange(2)).dtype is torch.float32


def test_moving_to_the_cpu_is_nothing():
    """Lightning moves modules about; a table that need not move does not."""
    module, _ = trained()
    before = module.table.get_extra_state()
    assert module.to("cpu").cpu() is module
    assert same(module.table.get_extra_state(), before)
    with pytest.raises(ValueError, match="device: tables have kernels for"):
        module.to("meta")
