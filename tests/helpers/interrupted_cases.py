"""Calls that change tables, small enough to interrupt each at every line."""

from __future__ import annotations

import torch

from recis_lightning import (
    DynamicEmbedding,
    EmbeddingEngine,
    EmbeddingOption,
    HashTable,
    hash_tables,
)
from recis_lightning.admission import MinCount
from recis_lightning.eviction import AnyOf, GlobalStepFilter, MaxRows
from recis_lightning.optim import SparseAdam
from tests.helpers.interruptions import Case


def _policy():
    return AnyOf([GlobalStepFilter(1), MaxRows(10**9, by="count")])


def _module(dim=4, admission=None, num_ids=30, name="t"):
    """Return an embedding whose ids 0, ..., num_ids - 1 were trained, and its optimizer."""
    module = DynamicEmbedding(dim, admission=admission, eviction=_policy(), name=name)
    sparse = SparseAdam([module.table], lr=0.1)
    ids = torch.arange(num_ids)
    if admission is not None:
        module(ids)
    module(ids).pow(2).sum().backward()
    sparse.step()
    return module, sparse


def growth():
    module, _ = _module()
    ids = torch.arange(20, 220).repeat_interleave(2)
    return Case([module.table], lambda: module(ids), columns=())


def reuse():
    """Freed rows are handed out again, and some new ones."""
    module, _ = _module(num_ids=60)
    module.table.delete(torch.arange(10, 40))
    ids = torch.arange(50, 100)
    return Case([module.table], lambda: module(ids), columns=())


def counted():
    module, _ = _module(admission=MinCount(2))
    ids = torch.cat([torch.arange(20, 120), torch.arange(60, 120)])
    return Case([module.table], lambda: module(ids), columns=())


def engine():
    module = EmbeddingEngine(
        {
            "user": EmbeddingOption(4, table="user", eviction=_policy()),
            "item": EmbeddingOption(4, table="item", eviction=_policy()),
            "tags": EmbeddingOption(4, table="item", mode="sum", eviction=_policy()),
        }
    )
    ids = torch.arange(20)
    module({"user": ids, "item": ids, "tags": ids[:, None]})
    batch = {"user": ids + 10, "item": ids + 40, "tags": torch.arange(120).view(20, 6)}
    return Case(hash_tables(module), lambda: module(batch), columns=())


def insert():
    module, _ = _module()
    ids = torch.cat([torch.arange(20, 90), torch.arange(60, 70)])
    rows = torch.arange(80.0)[:, None].expand(80, 4)
    return Case([module.table], lambda: module.table.insert(ids, rows), columns=["last_seen"])


def delete():
    module, _ = _module(num_ids=60)
    module(torch.arange(60)).sum().backward()
    return Case([module.table], lambda: module.table.delete(torch.arange(5, 50)))


def evict():
    module, _ = _module(num_ids=60)
    module.table.update_step(2)
    module(torch.arange(40))
    module.table.track_readmissions()
    return Case([module.table], module.table.evict)


def evict_and_compact():
    module, _ = _module(dim=64, num_ids=3000)
    module.table.update_step(2)
    module(torch.arange(0, 3000, 9))
    return Case([module.table], module.table.evict)


def clear():
    module, _ = _module(admission=MinCount(2))
    module(torch.arange(100, 140))
    return Case([module.table], module.table.clear)


def compact():
    module, _ = _module(dim=64, num_ids=3000, admission=MinCount(2))
    module.table.delete(torch.arange(0, 2900))
    return Case([module.table], module.table.compact)


def relayout():
    module = DynamicEmbedding(4, eviction=_policy(), name="t")
    module(torch.arange(30))
    table = module.table
    return Case([table], lambda: SparseAdam([table], lr=0.1))


def load():
    module, _ = _module(admission=MinCount(2))
    other, _ = _module(admission=MinCount(2), num_ids=200, name=None)
    other.table.pin(torch.arange(5))
    state = other.table.get_extra_state()
    return Case([module.table], lambda: module.table.set_extra_state(state))


def change_dtype():
    module, _ = _module()
    return Case([module.table], lambda: module.to(torch.bfloat16))


def step():
    module, sparse = _module()
    module(torch.arange(20)).pow(2).sum().backward()

    def again():
        if module.table.pending:
            sparse.step()

    return Case([module.table], sparse.step, again)


def step_after_growth():
    """Addresses of rows are noted anew, and the tables are grouped anew."""
    module, sparse = _module(dim=64)
    module(torch.arange(6000)).pow(2).sum().backward()
    HashTable(2)  # another table: all layouts are looked at again

    def again():
        if module.table.pending:
            sparse.step()

    return Case([module.table], sparse.step, again)


def step_of_two():
    """Tables of different dims take a kernel call each."""
    modules = [DynamicEmbedding(dim, eviction=_policy(), name=f"d{dim}") for dim in (4, 8)]
    tables = [module.table for module in modules]
    sparse = SparseAdam(tables, lr=0.1, clip_grad_norm=1.0)
    for module in modules:
        module(torch.arange(20)).pow(2).sum().backward()
    return Case(tables, sparse.step)


def rounds():
    """More unknown ids than are inserted at once, many of them twice."""
    module, _ = _module()
    ids = torch.arange(20, 70_020).repeat(2)
    return Case([module.table], lambda: module(ids), columns=())


def bulk():
    module, _ = _module()
    module.table.delete(torch.arange(10))
    ids = torch.cat([torch.arange(20, 270_000), torch.arange(1000)])
    return Case([module.table], lambda: module(ids), columns=())


SMALL = [
    *(growth, reuse, counted, engine, insert, delete, evict, evict_and_compact, clear, compact),
    *(relayout, load, change_dtype, step, step_after_growth, step_of_two),
]
LARGE = [rounds, bulk]

__all__ = ["LARGE", "SMALL"]
