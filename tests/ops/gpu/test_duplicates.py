"""Ids that occur often in one program: one lane acts for all, and nothing else changes."""

from collections import Counter

import pytest
import torch

from recis_lightning import DynamicEmbedding, EmbeddingEngine, EmbeddingOption, hash_tables
from recis_lightning.admission import BloomCount, MinCount
from recis_lightning.ops import backend

pytestmark = pytest.mark.interpreted

_HOT = [5] * 100 + [-(2**63)] * 60 + [7] * 40 + [8, 9, 8]


@pytest.fixture
def lanes(monkeypatch):
    """Count the lanes that loads, stores and atomics have on, by kernel and kind."""
    from triton.runtime.interpreter import interpreter_builder as builder

    from recis_lightning.ops.gpu.runtime import Kernel

    counts, current = Counter(), []
    launch, rmw = Kernel.launch, builder.create_atomic_rmw
    load, store = builder.create_masked_load, builder.create_masked_store

    def launched(kernel, *numbers, **constants):
        current.append(kernel.name)
        launch(kernel, *numbers, **constants)
        current.pop()

    def count(kind, mask):
        if current:
            counts[current[-1], kind] += int(mask.data.sum())

    def counted_rmw(operation, pointer, value, mask, *policy):
        count(str(operation).rsplit(".", 1)[-1], mask)
        return rmw(operation, pointer, value, mask, *policy)

    def counted_load(pointers, mask, *rest):
        count("load", mask)
        return load(pointers, mask, *rest)

    def counted_store(pointers, value, mask, *policy):
        count("store", mask)
        return store(pointers, value, mask, *policy)

    monkeypatch.setattr(Kernel, "launch", launched)
    monkeypatch.setattr(builder, "create_atomic_rmw", counted_rmw)
    monkeypatch.setattr(builder, "create_masked_load", counted_load)
    monkeypatch.setattr(builder, "create_masked_store", counted_store)
    return counts


def test_of_a_new_id_one_lane_a_program_votes(lanes):
    """Of the two ids that come first; all others vote for themselves."""
    with backend.use("triton"):
        module = DynamicEmbedding(1, name="t")
        module.table.storage.reserve_ids(300)
        module.table.storage.reserve_rows(300)
        ids = torch.tensor(_HOT)
        module(ids)
        votes = sum(number for (_, kind), number in lanes.items() if "MIN" in kind)
        assert votes == 1 + 1 + 40 + 3
        rows = module.table.storage.find(ids)
        assert rows.tolist() == [0] * 100 + [1] * 60 + [2] * 40 + [3, 4, 3]


def test_where_nothing_is_new_the_kernels_that_insert_return_at_once(lanes):
    """They read a word each; one of them says that no position is new."""
    with backend.use("triton"):
        module = DynamicEmbedding(1, name="t")
        module.table.storage.reserve_ids(300)
        module.table.storage.reserve_rows(300)
        ids = torch.tensor(_HOT)
        first = module(ids)
        assert lanes["_assign_kernel", "load"] > 200
        lanes.clear()
        assert module(ids).equal(first)
        for name in ("_add_up_kernel", "_assign_kernel", "_fill_rows_kernel", "_init_kernel"):
            assert lanes[name, "load"] == 1, name
            assert lanes[name, "store"] == 0, name
        assert lanes["_count_first_kernel", "store"] == len(ids)
        module(torch.tensor([9, 10]))  # the flag is another lookup's
        assert len(module.table) == 6


@pytest.mark.parametrize("policy", [MinCount(70), MinCount(2, per="batch"), BloomCount(50, 64)])
def test_hot_unknown_ids_are_counted_as_the_cpu_counts_them(policy, lanes):
    """Counts end at the threshold, however often an id occurs before."""
    states = []
    batches = [torch.tensor(_HOT), torch.tensor(_HOT[::-1]), torch.tensor(_HOT[::3])]
    for name in ("triton", "cpu"):
        with backend.use(name):
            module = DynamicEmbedding(1, admission=policy, name="t")
            found = []
            for batch in batches:
                module(batch)
                found.append(module.table.ids().sort().values.tolist())
            states.append((module.table.storage.admission_counter.state(), found))
    (state, found), (wanted, on_cpu) = states
    assert found == on_cpu
    assert state.keys() == wanted.keys()
    for key, value in state.items():
        assert torch.equal(value, wanted[key]) if torch.is_tensor(value) else value == wanted[key]


def test_positions_that_stand_for_several_occurrences_are_added_up():
    """Ids of a feature that travels once, beside one that does not."""
    states = []
    for name in ("triton", "cpu"):
        with backend.use(name):
            options = {
                "once": EmbeddingOption(1, table="t", mode="unique", admission=MinCount(8)),
                "each": EmbeddingOption(1, table="t", admission=MinCount(8)),
            }
            engine = EmbeddingEngine(options)
            for _ in range(2):
                engine({"once": torch.tensor([1, 1, 1, 2]), "each": torch.tensor([1, 2, 2, 3])})
            (table,) = hash_tables(engine)
            ids = table.ids().sort().values.tolist()
            states.append((ids, table.storage.admission_counter.state()))
    assert states[0][0] == states[1][0] == [1]
    for key, value in states[0][1].items():
        other = states[1][1][key]
        assert torch.equal(value, other) if torch.is_tensor(value) else value == other
