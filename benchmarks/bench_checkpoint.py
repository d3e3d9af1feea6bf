"""Saving and loading a table of dim 16 with Adam state, compared with safetensors.

Measures: ``recis_lightning.checkpoint``, ``recis_lightning.table.state``,
``recis_lightning.ops.row_io``.

The peer writes the same tensors, prepared in advance, to one file, and reads them into memory. It
verifies no checksums and rebuilds no table. The parts of ours:

- save, load: ``checkpoint.save``, with checksums, and ``checkpoint.load`` into a fresh module,
  which rebuilds index and rows. Ours and the peer sync the files they write, and read from the
  page cache.
- cold: the same load, after the files are dropped from the page cache.
- state_dict save, state_dict load: a table's part of a Lightning checkpoint on one process, that
  is ``torch.save`` of the module's ``state_dict``, and ``torch.load(weights_only=True)`` with
  ``load_state_dict``. Neither side syncs. The mapped load is that with ``mmap=True``, which spares
  torch's copy of the file: that copy alone takes as long as a load at 0.7 of the peer's speed may.

Before each load, timed or not, the benchmark uses and frees as much memory as the load needs. The
host of a virtual machine may reclaim free memory, and the next process that uses it waits for the
host: on one such machine the first touch of 2 GB in huge pages takes 0.3 s right after use, and 1.6
to 2.2 s after six seconds without use. Without this step the figures would depend on the duration
of the previous run.

    python benchmarks/bench_checkpoint.py [--full] [--num-ids N] [--rounds N] [--parts ...]
        [--device D] [--dry]
"""

from __future__ import annotations

import argparse
import mmap
import os
import sys
import tempfile
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import safetensors.torch
import torch
from torch import Tensor, nn

from benchmarks.harness import (
    add_device,
    append_result,
    device,
    print_table,
    time_in_turn,
    time_prepared,
    use_device,
)
from benchmarks.targets import meets_targets
from recis_lightning import HashTable, checkpoint, hash_tables
from recis_lightning.checkpoint.progress import no_progress
from recis_lightning.ops import hash_index, host_memory
from recis_lightning.optim import SparseAdam

DIM = 16
PARTS = ("save", "load", "cold", "state_dict save", "state_dict load", "state_dict mapped load")


class Model(nn.Module):
    """Module with one table, and its optimizer."""

    def __init__(self) -> None:
        super().__init__()
        self.table = HashTable(DIM, name="saved", device=device())
        self.optimizer = SparseAdam(hash_tables(self), lr=1e-3)


def fill(num_ids: int) -> Model:
    """Return a model with random ids, weights and state."""
    torch.manual_seed(0)
    model, ids = Model(), torch.randint(-(2**63), 2**63 - 1, (num_ids,))
    table = model.table
    for part in ids.split(1 << 18):
        segments = table.storage.segments(part, insert=True)
        rows, _ = hash_index.find_or_insert(segments, len(part), [table.storage], [0], table.device)
        slots = {name: torch.rand(part.numel(), DIM) for name in ("exp_avg", "exp_avg_sq")}
        table.storage.rows.write(rows, torch.randn(part.numel(), DIM), slots)
    return model


def tensors(model: Model) -> dict[str, Tensor]:
    """Return the tensors of a table's state, as the peer saves them."""
    state = model.table.get_extra_state()
    return {"ids": state["ids"], "weights": state["weights"], **state["slots"]}


def save(model: Model, path: Path) -> None:
    torch.save(model.state_dict(), path)


def load(path: Path, mmap: bool = False) -> Model:
    model = Model()
    model.load_state_dict(torch.load(path, weights_only=True, mmap=mmap))
    return model


def load_peer(path: Path) -> dict[str, Tensor]:
    """Read all bytes; safetensors itself maps the file and reads a page on its first access."""
    return {name: tensor.clone() for name, tensor in safetensors.torch.load_file(path).items()}


def check(num_ids: int = 5000) -> None:
    """Check that both formats restore all tensors."""
    model = fill(num_ids)
    expected = tensors(model)
    with tempfile.TemporaryDirectory() as name:
        ours, peer = Path(name) / "table.ckpt", Path(name) / "table.safetensors"
        save(model, ours)
        safetensors.torch.save_file(expected, peer)
        checkpoint.save(Path(name) / "shards", model)
        loaded = load(ours), load_shards(Path(name) / "shards")
        for restored in (*map(tensors, loaded), load_peer(peer)):
            assert restored.keys() == expected.keys()
            assert all(torch.equal(restored[key], expected[key]) for key in expected)


def save_peer(ready: dict[str, Tensor], path: Path, sync: bool = True) -> None:
    safetensors.torch.save_file(ready, path)
    if sync:
        file = os.open(path, os.O_RDWR)
        os.fsync(file)
        os.close(file)


def load_shards(path: Path) -> Model:
    model = Model()
    checkpoint.load(path, model, progress=no_progress)
    return model


def prepared(
    load: Callable[[], Any], num_bytes: int, dropped: Iterable[Path] = ()
) -> Callable[[], Callable[[], Any]]:
    """Return a function that prepares a load and returns it.

    Args:
        load: The load.
        num_bytes: Bytes that it reads; the preparation uses and frees somewhat more memory.
        dropped: Files to drop from the page cache.
    """

    def prepare() -> Callable[[], Any]:
        host_memory.empty(num_bytes + num_bytes // 4)[:: mmap.PAGESIZE] = 1
        for path in dropped:
            file = os.open(path, os.O_RDONLY)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(file)
        return load

    return prepare


def measure(num_ids: int, rounds: int, selected: Collection[str]) -> list[dict[str, Any]]:
    """Time the selected parts; a part that reads the files of another runs after it."""
    model = fill(num_ids)
    ready = tensors(model)
    num_bytes = sum(tensor.nbytes for tensor in ready.values())
    lines = []

    def add_line(part: str, times: dict[str, float]) -> None:
        ratio = times["safetensors"] / times["ours"]
        row = [f"{num_ids:,} rows, dim {DIM}", times["ours"], times["safetensors"], ratio]
        row.append(num_bytes / times["ours"] / 1e6)
        columns = [part, "ours ms", "safetensors ms", "ratio", "ours GB/s"]
        print_table(f"{part}, {num_bytes / 1e6:.0f} MB", columns, [row])
        shape = {"num_ids": num_ids, "dim": DIM}
        line = {"part": part, "shape": shape, "columns": columns, "rows": [row]}
        lines.append({**line, "figures": {"ratio": ratio}})

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ours, peer, shards = folder / "ours.ckpt", folder / "peer.safetensors", folder / "shards"
        parts: dict[str, dict[str, Callable[[], Any]]] = {
            "save": {
                "ours": lambda: checkpoint.save(shards, model, progress=no_progress),
                "safetensors": lambda: save_peer(ready, peer),
            },
            "load": {"ours": lambda: load_shards(shards), "safetensors": lambda: load_peer(peer)},
            "state_dict save": {
                "ours": lambda: save(model, ours),
                "safetensors": lambda: save_peer(ready, peer, sync=False),
            },
            "state_dict load": {
                "ours": lambda: load(ours),
                "safetensors": lambda: load_peer(peer),
            },
            "state_dict mapped load": {
                "ours": lambda: load(ours, mmap=True),
                "safetensors": lambda: load_peer(peer),
            },
        }
        for part, contenders in parts.items():
            if part not in selected:
                read = {"save": {"load", "cold"}, "state_dict save": set(PARTS[-2:])}.get(
                    part, set()
                )
                if read & set(selected):
                    for write in contenders.values():  # the files that the load reads
                        write()
                continue
            if part.endswith("save"):
                add_line(part, time_in_turn(contenders, rounds, warmup=1))
                continue
            loads = {key: prepared(load, num_bytes) for key, load in contenders.items()}
            add_line(part, time_prepared(loads, rounds, warmup=1))
            if part == "load" and "cold" in selected:
                files = {"ours": [*shards.iterdir()], "safetensors": [peer]}
                cold = {
                    key: prepared(load, num_bytes, files[key]) for key, load in contenders.items()
                }
                add_line("cold", time_prepared(cold, rounds, warmup=0))
    return lines


def main(arguments: list[str] | None = None) -> int:
    """Check, time and append the results; return 1 if a target is missed."""
    parser = argparse.ArgumentParser(description="Checkpoints compared with safetensors")
    parser.add_argument("--num-ids", type=int, default=2_000_000)
    parser.add_argument("--full", action="store_true", help="10M rows")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS, metavar="PART")
    parser.add_argument("--dry", action="store_true", help="append nothing to the results")
    add_device(parser)
    given = parser.parse_args(arguments)
    use_device(given.device)
    check()
    all_met = True
    for line in measure(10_000_000 if given.full else given.num_ids, given.rounds, given.parts):
        all_met &= meets_targets("bench_checkpoint", line)
        if not given.dry:
            append_result("bench_checkpoint", line)
    return 0 if all_met else 1


if __name__ == "__main__":
    sys.exit(main())
