"""Freshness of served scores, and what deltas cost the one who trains.

Measures: ``recis_lightning.serving.follower``, ``recis_lightning.serving.chain_sink``,
``recis_lightning.table.change_mark``.

A table of dim 16 with Adam state is trained on batches of which each touches about a share of its
rows; another process follows. Parts:

- fresh: seconds from the end of ``optimizer.step()`` to the moment at which the process that serves
  has a score of that step, by the clock that both share. Median and largest; target: below 1 s.
- delta, full: one delta with state and one ``checkpoint.save`` of the same step, in seconds and
  bytes; targets: the delta at least 10 times as fast and as small.
- mark: the optimizer's step on a table that is marked, against one that is not, in turn. Target: at
  most 1% of the CPU time of a training step (lookup, backward and optimizer).

    python benchmarks/bench_freshness.py [--num-ids N] [--rounds N] [--dry]
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.harness import append_result, print_table
from recis_lightning import DynamicEmbedding, checkpoint, serving
from recis_lightning.optim import SparseAdam

DIM, SHARE = 16, 0.01


def _serve(folder: str, steps: Any, seen: Any) -> None:
    """Follow a folder; say when the score of each step was there."""
    torch.set_num_threads(1)
    with serving.follow(folder, poll_seconds=0.01) as model:
        seen.put(("ready", 0.0))
        for wanted in iter(steps.get, None):
            while model.step is None or model.step < wanted:
                time.sleep(0.001)
            model(torch.arange(64))
            seen.put((wanted, time.monotonic()))


def _trained(num_ids: int) -> tuple[DynamicEmbedding, SparseAdam]:
    module = DynamicEmbedding(DIM, name="item")
    optimizer = SparseAdam([module.table], lr=1e-3)
    for ids in torch.arange(num_ids).split(1 << 16):
        _step(module, optimizer, ids)
    return module, optimizer


def _step(module: DynamicEmbedding, optimizer: SparseAdam, ids: torch.Tensor) -> None:
    module(ids).sum().backward()
    optimizer.step()


def _folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def measure_fresh(module: Any, optimizer: Any, num_ids: int, rounds: int) -> list[float]:
    """Return the seconds from each step to its score in another process."""
    context = multiprocessing.get_context("spawn")
    steps, seen = context.Queue(), context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        serving.export(module, folder, example=torch.arange(4))
        mark, sink = serving.ModelMark(module), serving.ChainSink(folder)
        sink.write(mark.take(0))
        server = context.Process(target=_serve, args=(folder, steps, seen))
        server.start()
        seen.get(timeout=300)
        found = []
        module.train()
        for step in range(1, rounds + 1):
            _step(module, optimizer, torch.randint(0, num_ids, (int(SHARE * num_ids),)))
            done = time.monotonic()
            steps.put(step)
            sink.write(mark.take(step))
            found.append(seen.get(timeout=300)[1] - done)
        steps.put(None)
        server.join()
        sink.close()
        mark.close()
    return found


def measure_delta(module: Any, optimizer: Any, num_ids: int, rounds: int) -> dict[str, float]:
    """Return medians of seconds and bytes of a delta and of a full checkpoint."""
    times: dict[str, list[float]] = {"delta_s": [], "full_s": []}
    sizes: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        mark = serving.ModelMark(module, state=True)
        sink = serving.ChainSink(folder, compact_every=None)
        sink.write(mark.take(0))
        for step in range(1, rounds + 1):
            _step(module, optimizer, torch.randint(0, num_ids, (int(SHARE * num_ids),)))
            before = _folder_bytes(Path(folder) / "deltas")
            start = time.perf_counter()
            sink.write(mark.take(step))
            times["delta_s"].append(time.perf_counter() - start)
            sizes["delta_bytes"] = _folder_bytes(Path(folder) / "deltas") - before
            start = time.perf_counter()
            checkpoint.save(Path(folder) / "full", module)
            times["full_s"].append(time.perf_counter() - start)
            sizes["full_bytes"] = _folder_bytes(Path(folder) / "full")
        other = DynamicEmbedding(DIM, name="item")
        keep = SparseAdam([other.table], lr=1e-3)
        serving.restore(folder, [other.table])
        wanted, got = module.table.get_extra_state(), other.table.get_extra_state()
        if not wanted["weights"].equal(got["weights"]) or not wanted["ids"].equal(got["ids"]):
            raise RuntimeError("the chain restores other rows than were trained")
        del keep
        sink.close()
        mark.close()
    return {**{name: median(of) for name, of in times.items()}, **sizes}


def measure_mark(num_ids: int, rounds: int) -> dict[str, float]:
    """Return medians of a training step's CPU time with a mark and without, in turn."""
    batches = [torch.randint(0, num_ids, (1 << 15,)) for _ in range(8)]
    modules = [_trained(num_ids), _trained(num_ids)]
    mark = serving.ModelMark(modules[1][0])
    mark.take(0)
    times: list[list[float]] = [[], []]
    for round_number in range(8 * rounds):
        order = (0, 1) if round_number % 2 else (1, 0)
        for which in order:
            start = time.process_time()
            _step(*modules[which], batches[round_number % 8])
            times[which].append(time.process_time() - start)
    mark.close()
    return {"unmarked_ms": 1e3 * median(times[0]), "marked_ms": 1e3 * median(times[1])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-ids", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--dry", action="store_true", help="append no result")
    args = parser.parse_args()
    module, optimizer = _trained(args.num_ids)
    fresh = measure_fresh(module, optimizer, args.num_ids, args.rounds)
    result: dict[str, Any] = {"fresh_s": median(fresh), "fresh_max_s": max(fresh)}
    result |= measure_delta(module, optimizer, args.num_ids, min(args.rounds, 5))
    result |= measure_mark(args.num_ids, args.rounds)
    result["faster"] = result["full_s"] / result["delta_s"]
    result["smaller"] = result["full_bytes"] / result["delta_bytes"]
    result["mark_share"] = result["marked_ms"] / result["unmarked_ms"] - 1
    rows = [[name, f"{value:.4g}"] for name, value in result.items()]
    print_table(f"{args.num_ids} rows, {SHARE:.0%} of them a step", ["figure", "value"], rows)
    if not args.dry:
        append_result("bench_freshness", {"num_ids": args.num_ids, "share": SHARE, **result})
    missed = [
        name
        for name, is_met in {
            "fresh_max_s < 1": result["fresh_max_s"] < 1,
            "faster >= 10": result["faster"] >= 10,
            "smaller >= 10": result["smaller"] >= 10,
            "mark_share <= 0.01": result["mark_share"] <= 0.01,
        }.items()
        if not is_met
    ]
    if missed:
        sys.exit(f"missed: {', '.join(missed)}")


if __name__ == "__main__":
    main()
