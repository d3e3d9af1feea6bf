"""Saving and loading a table of dim 16 with Adam state against safetensors with the same bytes.

The peer writes the same tensors, ready made, in one file, and reads them into memory; it checks and
builds nothing. Ours, part by part:

- save, load: ``checkpoint.save``, with checksums, and ``checkpoint.load`` into a fresh module,
  whose index and rows are built again. Both sync what they write, and read from the page cache.
- cold: the same load, with the files dropped from the page cache before each run.
- state_dict save, state_dict load: what a Lightning checkpoint of one process does with a table,
  ``torch.save`` of the module's ``state_dict``, and ``torch.load(weights_only=True)`` with
  ``load_state_dict``. Neither syncs.

Before each load, timed or not, as much memory as it takes is used and freed. The host of a virtual
machine may take free memory back, and whoever is next to use it waits for the host: on one such
machine the first touch of 2 GB in huge pages takes 0.3 s right after use, and 1.6 to 2.2 s after
six seconds in which nobody used them. Without this, figures tell how long the run before was.

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
from benchmarks.targets import judge
from recis_lightning import HashTable, checkpoint, hash_tables
from recis_lightning.checkpoint.progress import no_progress
from recis_lightning.ops import hash_index, host_memory
from recis_lightning.optim import SparseAdam

DIM = 16
PARTS = ("save", "load", "cold", "state_dict save", "state_dict load")


class Model(nn.Module):
    """One table and its optimizer."""

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
        rows, _ = hash_index.find_or_insert(segments, len(part), [table], [0], table.device)
        slots = {name: torch.rand(part.numel(), DIM) for name in ("exp_avg", "exp_avg_sq")}
        table.storage.rows.write(rows, torch.randn(part.numel(), DIM), slots)
    return model


def tensors(model: Model) -> dict[str, Tensor]:
    """Return what a table's state holds, as the peer saves it."""
    state = model.table.get_extra_state()
    return {"ids": state["ids"], "weights": state["weights"], **state["slots"]}


def save(model: Model, path: Path) -> None:
    torch.save(model.state_dict(), path)


def load(path: Path) -> Model:
    model = Model()
    model.load_state_dict(torch.load(path, weights_only=True))
    return model


def load_peer(path: Path) -> dict[str, Tensor]:
    """Read all bytes: safetensors maps the file and reads a page when it is touched."""
    return {name: tensor.clone() for name, tensor in safetensors.torch.load_file(path).items()}


def check(num_ids: int = 5000) -> None:
    """Refuse to time a checkpoint that loses something."""
    model = fill(num_ids)
    wanted = tensors(model)
    with tempfile.TemporaryDirectory() as name:
        ours, peer = Path(name) / "table.ckpt", Path(name) / "table.safetensors"
        save(model, ours)
        safetensors.torch.save_file(wanted, peer)
        checkpoint.save(Path(name) / "shards", model)
        loaded = load(ours), load_shards(Path(name) / "shards")
        for found in (*map(tensors, loaded), load_peer(peer)):
            assert found.keys() == wanted.keys()
            assert all(torch.equal(found[key], wanted[key]) for key in wanted)


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
    work: Callable[[], Any], num_bytes: int, dropped: Iterable[Path] = ()
) -> Callable[[], Callable[[], Any]]:
    """Return what prepares a load.

    Args:
        work: The load.
        num_bytes: What it reads; somewhat more memory is used and freed.
        dropped: Files to drop from the page cache.
    """

    def prepare() -> Callable[[], Any]:
        host_memory.empty(num_bytes + num_bytes // 4)[:: mmap.PAGESIZE] = 1
        for path in dropped:
            file = os.open(path, os.O_RDONLY)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(file)
        return work

    return prepare


def measure(num_ids: int, rounds: int, wanted: Collection[str]) -> list[dict[str, Any]]:
    """Time saving and loading; a part that needs the files of another runs after it."""
    model = fill(num_ids)
    ready = tensors(model)
    num_bytes = sum(tensor.nbytes for tensor in ready.values())
    lines = []

    def note(part: str, times: dict[str, float]) -> None:
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
        }
        for part, contenders in parts.items():
            if part not in wanted:
                if part.endswith("save") and part.replace("save", "load") in wanted:
                    for write in contenders.values():  # what it is to read
                        write()
                continue
            if part.endswith("save"):
                note(part, time_in_turn(contenders, rounds, warmup=1))
                continue
            loads = {key: prepared(work, num_bytes) for key, work in contenders.items()}
            note(part, time_prepared(loads, rounds, warmup=1))
            if part == "load" and "cold" in wanted:
                files = {"ours": [*shards.iterdir()], "safetensors": [peer]}
                cold = {
                    key: prepared(work, num_bytes, files[key]) for key, work in contenders.items()
                }
                note("cold", time_prepared(cold, rounds, warmup=0))
    return lines


def main(arguments: list[str] | None = None) -> int:
    """Check, time and append; return 1 if a target is missed."""
    parser = argparse.ArgumentParser(description="Checkpoints against safetensors")
    parser.add_argument("--num-ids", type=int, default=2_000_000)
    parser.add_argument("--full", action="store_true", help="10M rows")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS, metavar="PART")
    parser.add_argument("--dry", action="store_true", help="append nothing to the results")
    add_device(parser)
    given = parser.parse_args(arguments)
    use_device(given.device)
    check()
    good = True
    for line in measure(10_000_000 if given.full else given.num_ids, given.rounds, given.parts):
        good &= judge("bench_checkpoint", line)
        if not given.dry:
            append_result("bench_checkpoint", line)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
