"""Training step and lookup of tables on a GPU, in the shape that NVIDIA publishes for dynamicemb.

10 tables of 1,677,721 rows, dim 128, float32; 1,048,570 lookups a step in all, ids by a power law
of exponent 1.05 (about 350,000 distinct a step), no pooling. Steps and evaluation take four batches
in turn, so what the hottest ids need stays in the GPU's cache, as it does in training by a
power law; "forward" is a training lookup, with its bookkeeping. Then find and gather alone: 128M
keys, dim 8, index half full. Times are from CUDA events. Without a GPU it prints that and ends.

Measures: ``recis_lightning.ops.gpu``, ``recis_lightning.engine``, ``recis_lightning.optim``.

    python benchmarks/bench_cuda_step.py [--device cuda] [--rounds N] [--quick]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from torch import Tensor

from benchmarks.harness import append_result, print_table, zipf_ranks
from recis_lightning import (
    DynamicEmbedding,
    EmbeddingEngine,
    EmbeddingOption,
    HashTable,
    hash_tables,
)
from recis_lightning.ops import hash_index, row_init
from recis_lightning.optim import SparseAdam, SparseOptimizer, SparseSGD

NUM_TABLES, NUM_ROWS, DIM, LOOKUPS, EXPONENT = 10, 1_677_721, 128, 104_857, 1.05
NUM_BATCHES = 4
CALLS = 10  # between two events
NUM_KEYS, KEY_DIM, KEYS_ASKED = 1 << 27, 8, 1 << 24
# Milliseconds on an H100: our target, and NVIDIA's figure for dynamicemb.
WANTED = {"Adam": (1.20, 2.19), "SGD": (0.90, 1.92), "eval": (0.40, 0.64)}
OPTIMIZERS: dict[str, type[SparseOptimizer]] = {"Adam": SparseAdam, "SGD": SparseSGD}


def batches(num_tables: int, num_rows: int, lookups: int, device: torch.device) -> list[Any]:
    """Draw batches of ids, feature -> int64 [lookups]."""
    rng = np.random.default_rng(0)
    drawn = [zipf_ranks(rng, EXPONENT, num_rows, (num_tables, lookups)) for _ in range(NUM_BATCHES)]
    return [
        {f"f{number}": torch.from_numpy(ids).to(device) for number, ids in enumerate(batch)}
        for batch in drawn
    ]


def filled_engine(
    num_tables: int, num_rows: int, dim: int, device: torch.device
) -> EmbeddingEngine:
    """Return an engine whose tables hold all ids."""
    options = {f"f{number}": EmbeddingOption(dim, device=device) for number in range(num_tables)}
    engine = EmbeddingEngine(options)
    for table in hash_tables(engine):
        for ids in torch.arange(num_rows, device=device).split(1 << 17):
            insert_initial(table, ids)
    return engine


def insert_initial(table: HashTable, ids: Tensor) -> None:
    """Give ids, int64 [n], an initial row each."""
    storage = table.storage
    segments = storage.segments(ids, insert=True)
    rows, new = hash_index.find_or_insert(segments, ids.numel(), [storage], [0], table.device)
    if new is not None:
        row_init.init_rows_(rows, new, segments, table.embedding_dim, False)


def check(device: torch.device, num_rows: int = 500, lookups: int = 400) -> None:
    """Compare three steps with tables on the CPU.

    Raises:
        AssertionError: Weights differ by more than rounding.
    """
    for optimizer in OPTIMIZERS.values():
        states = []
        for where in (device, torch.device("cpu")):
            engine = filled_engine(2, num_rows, 8, where)
            sparse = optimizer(hash_tables(engine), lr=0.1)
            for batch in batches(2, num_rows, lookups, where)[:3]:
                found = engine(batch)
                torch.autograd.backward(list(found.values()), [out + 1 for out in found.values()])
                sparse.step()
            ids = torch.arange(num_rows, device=where)
            states.append([table.embeddings(ids).cpu() for table in hash_tables(engine)])
        for ours, wanted in zip(*states, strict=True):
            torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-5)


def event_ms(timed: Callable[[], object], rounds: int, warmup: int = 2) -> float:
    """Return the median milliseconds of ``timed``, between CUDA events around 10 calls of it.

    As in training, the host does not wait between the calls: the time is the device's or the
    host's, whichever is longer.
    """
    times = []
    for number in range(-warmup, -(-rounds // CALLS)):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(CALLS):
            timed()
        end.record()
        end.synchronize()
        if number >= 0:
            times.append(start.elapsed_time(end) / CALLS)
    return median(times)


def time_steps(device: torch.device, rounds: int, scale: int) -> dict[str, float]:
    """Return milliseconds of forward, backward and update, whole steps and evaluation."""
    num_rows, lookups = NUM_ROWS // scale, LOOKUPS // scale
    data = batches(NUM_TABLES, num_rows, lookups, device)
    gradients = [torch.randn(lookups, DIM, device=device) for _ in range(NUM_TABLES)]
    figures: dict[str, float] = {}
    for name, optimizer in OPTIMIZERS.items():
        engine = filled_engine(NUM_TABLES, num_rows, DIM, device)
        sparse = optimizer(hash_tables(engine), lr=1e-3)
        turn = iter(range(10**9))

        def forward(engine: EmbeddingEngine = engine, turn: Any = turn) -> list[Tensor]:
            return list(engine(data[next(turn) % NUM_BATCHES]).values())

        def step(forward: Any = forward, sparse: SparseOptimizer = sparse) -> None:
            torch.autograd.backward(forward(), gradients)
            sparse.step()

        figures[f"{name} step"] = event_ms(step, rounds)
        figures[f"{name} forward"] = event_ms(forward, rounds)
        figures[f"{name} backward and update"] = (
            figures[f"{name} step"] - figures[f"{name} forward"]
        )
        engine.eval()
        figures["eval"] = event_ms(forward, rounds)
        del engine, sparse, forward, step
        torch.cuda.empty_cache()
    return figures


def keys_per_second(device: torch.device, rounds: int, scale: int) -> float:
    """Return keys per second, found in a half full index and their rows gathered."""
    num_keys, asked = NUM_KEYS // scale, KEYS_ASKED // scale
    keys = DynamicEmbedding(KEY_DIM, device=device, name="keys").eval()
    keys.table.storage.reserve_ids(num_keys)
    for ids in torch.arange(num_keys, device=device).split(1 << 22):
        insert_initial(keys.table, ids)
    assert len(keys.table) == num_keys
    wanted = torch.randint(0, num_keys, (asked,), device=device)
    return asked / event_ms(lambda: keys(wanted), rounds) * 1e3


def main(arguments: list[str] | None = None) -> int:
    """Check, time, print and append; return 1 if a time is over its target."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--quick", action="store_true", help="a sixteenth of the rows and ids")
    asked = parser.parse_args(arguments)
    device = torch.device(asked.device)
    if device.type != "cuda" or not torch.cuda.is_available():
        print("no GPU: nothing to time")
        return 0
    import triton

    check(device)
    scale = 16 if asked.quick else 1
    figures = time_steps(device, asked.rounds, scale)
    figures["find and gather, 10**9 keys/s"] = keys_per_second(device, asked.rounds, scale) / 1e9
    rows = [[name, value] for name, value in figures.items()]
    print_table(torch.cuda.get_device_name(device), ["what", "ms (keys: 10**9/s)"], rows)
    append_result(
        "bench_cuda_step",
        {
            "part": "step" if scale == 1 else "quick",
            "gpu": torch.cuda.get_device_name(device),
            "cuda": torch.version.cuda,
            "triton": triton.__version__,
            "figures": figures,
            "wanted_and_dynamicemb_ms": WANTED,
        },
    )
    over = [
        name
        for name, (bound, _) in WANTED.items()
        if figures.get(f"{name} step", figures.get(name, 0.0)) > bound
    ]
    if scale == 1 and over:
        print(f"over target: {over}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
