"""Cases for the model of interleaved programs, run in a process of their own.

    python -m tests.helpers.interleaved_cases --cases 20 --seed 0
    python -m tests.helpers.interleaved_cases --mutant cas

It prints a line of JSON with what ran, and exits with 1 if a case does not hold.
"""

import argparse
import json
import os
import sys

import torch

from recis_lightning import DynamicEmbedding, EmbeddingEngine, EmbeddingOption, hash_tables
from recis_lightning.admission import BloomCount, MinCount
from recis_lightning.eviction import AnyOf, GlobalStepFilter, MaxRows
from recis_lightning.ops import backend
from recis_lightning.optim import SparseAdam, SparseRowwiseAdagrad
from tests.helpers.interleaving import MUTANTS, Model
from tests.helpers.interpreting import quicken_interpreter
from tests.helpers.sample_tables import LOW

# So that a few ids are many programs, and some occur in one more often than it combines.
_LANES, _SEARCH_LANES = 8, 4


def _use_small_programs():
    """Have kernels interpreted, in programs of few lanes; before any kernel is loaded."""
    os.environ["TRITON_INTERPRET"] = "1"
    from recis_lightning.ops.gpu import runtime

    quicken_interpreter()
    runtime.lanes = lambda compiled, _: _SEARCH_LANES if compiled == 64 else _LANES
    runtime.num_programs_at_once = lambda device, on_each=0: 3


def _check(holds, what):
    if not holds:
        raise AssertionError(what)


def _ids(generator, count, distinct):
    ids = torch.randint(0, distinct, (count,), generator=generator)
    return torch.where(ids == 0, LOW, ids) if distinct > 3 else ids


def insertion(seed, generator):
    """Ids come many times in one launch; rows are given by first appearance, freed ones first."""
    results = []
    sizes = [(5, 1), (17, 3), (40, 40), (30, 12)][seed % 4]
    batches = [_ids(generator, *sizes) for _ in range(3)]
    for name in ("triton", "cpu"):
        with backend.use(name):
            module = DynamicEmbedding(1, eviction=GlobalStepFilter(100), name="t")
            storage = module.table.storage
            storage.reserve_ids(32)
            storage.reserve_rows(32)
            rows = []
            for batch in batches:
                module(batch)
                rows.append(storage.find(batch))
                module(batch)  # nothing is new
                rows.append(storage.find(batch))
                module.table.delete(batch[::5])
            rows += [storage.find(batch) for batch in batches]
            results.append(torch.cat([*rows, torch.tensor([len(module.table)])]))
    _check(torch.equal(*results), f"rows: {results}")


def admission(seed, generator):
    """Ids are counted by many programs at once, and admitted as on the CPU."""
    policy = [MinCount(3), MinCount(2, per="batch"), BloomCount(3, 64)][seed % 3]
    batches = [torch.randint(0, 12, (24,), generator=generator) for _ in range(3)]
    states = []
    for name in ("triton", "cpu"):
        with backend.use(name):
            module = DynamicEmbedding(1, admission=policy, name="t")
            for batch in batches:
                module(batch)
            counter = module.table.storage.admission_counter
            states.append({**counter.state(), "ids": module.table.ids().sort().values})
            states[-1]["rejected"] = module.table.statistics().refused
    for name, value in states[0].items():
        other = states[1][name]
        alike = torch.equal(value, other) if torch.is_tensor(value) else value == other
        _check(alike, f"{policy}: {name}: {value}, on the CPU {other}")


def eviction(seed, generator):
    """The index is rebuilt without the rows that go, while use counts are kept."""
    states = []
    batches = [torch.randint(-20, 20, (30,), generator=generator) for _ in range(3)]
    for name in ("triton", "cpu"):
        with backend.use(name):
            policy = AnyOf([GlobalStepFilter(1), MaxRows(14, by="count")])
            module = DynamicEmbedding(1, eviction=policy, name="t")
            evicted = []
            for batch in batches:
                module(batch)
                module.table.update_step()
                evicted.append(module.table.evict())
            storage = module.table.storage
            rows = storage.find(torch.arange(-20, 20))
            counts = storage.columns["counts"][rows[rows >= 0]]
            states.append(torch.cat([rows, counts, torch.tensor(evicted)]))
            module.table.compact()
            found = storage.find(torch.arange(-20, 20))
            _check(torch.equal(found >= 0, rows >= 0), "an id was lost or came back")
    _check(torch.equal(*states), f"rows: {states}")


def update(seed, generator):
    """Two runs agree to the bit, and with the CPU to rounding; outputs alone and side by side."""
    optimizer = (SparseAdam, SparseRowwiseAdagrad)[seed % 2]
    batches = [
        {
            "a": torch.zeros(12, dtype=torch.int64),  # with "b" more than a piece of one row
            "b": torch.randint(0, 2, (12, 4), generator=generator),
            "c": torch.randint(0, 9, (12, 1), generator=generator),
        }
        for _ in range(2)
    ]
    runs = []
    for name in ("triton", "triton", "cpu"):
        with backend.use(name):
            engine = EmbeddingEngine(
                {
                    "a": EmbeddingOption(2, table="x"),
                    "b": EmbeddingOption(2, table="x", mode="sum"),
                    "c": EmbeddingOption(2, mode="mean", padding_idx=0),
                }
            )
            sparse = optimizer(hash_tables(engine), lr=0.1)
            for joined, batch in enumerate(batches):
                out = [engine.concat(batch)] if joined else list(engine(batch).values())
                sum(part.sum() + part.square().sum() for part in out).backward()
                sparse.step()
            tables = hash_tables(engine)
            runs.append([(table.ids(), table.embeddings(table.ids())) for table in tables])
    for one, other, cpu in zip(*runs, strict=True):
        _check(torch.equal(one[0], other[0]), "ids differ")
        _check(torch.equal(one[1], other[1]), "two runs differ")
        order, cpus = one[0].argsort(), cpu[0].argsort()
        _check(torch.equal(one[0][order], cpu[0][cpus]), "ids are not the CPU's")
        near = torch.allclose(one[1][order], cpu[1][cpus], rtol=1e-4, atol=1e-6)
        _check(near, "weights are not the CPU's")


CASES = {"insertion": insertion, "admission": admission, "eviction": eviction, "update": update}


def main() -> int:
    """Run the cases that the command line asks for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", type=int, default=4, help="of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", choices=CASES, default=None)
    parser.add_argument("--mutant", choices=MUTANTS, default=None)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    _use_small_programs()
    model = Model(asked.seed, asked.mutant)
    model.install()
    held, wrong = 0, []
    for name, case in CASES.items():
        for seed in range(asked.seed, asked.seed + asked.cases):
            if asked.kind in (None, name) and not (asked.mutant and wrong):
                try:
                    case(seed, torch.Generator().manual_seed(seed))
                    held += 1
                except Exception as error:
                    wrong.append(f"{name} {seed}: {error!r}"[:400])
    numbers = {"launches": model.num_launches, "switches": model.num_switches}
    print(json.dumps({"held": held, "wrong": wrong, **numbers, "stale": model.num_stale}))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
