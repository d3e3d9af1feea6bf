"""Finding and inserting ids, compared with ``ska::flat_hash_map``, which RecIS uses on a CPU.

Measures: ``recis_lightning.ops.hash_index``, ``recis_lightning.ops.row_init``.

The map comes with torch's headers and is built here with torch's extension loader. Ours calls the
op contract (``find`` and ``find_or_insert`` on a table's segment, which also assign rows) on all
threads. The map is filled by a plain loop on one thread, as RecIS does (RecIS first looks up all
ids; this is not timed here). It is read by one thread and, as in RecIS, by all of torch's threads.
The map starts empty and grows; another figure reserves its capacity first. In the figures "with
rows" ours also writes initial rows of dim 8 with Adam state, which the map does not. On a GPU the
map is skipped; ``bench_cuda_step`` times find and gather on 128M keys.

    python benchmarks/bench_hash_index.py [--num-ids N] [--rounds N] [--device D] [--dry]
"""

from __future__ import annotations

import argparse
import ctypes
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from benchmarks.harness import (
    add_device,
    append_result,
    is_on_gpu,
    print_table,
    time_in_turn,
    time_prepared,
    use_device,
)
from benchmarks.targets import meets_targets
from recis_lightning import HashTable, hash_tables
from recis_lightning.ops import hash_index, row_init
from recis_lightning.optim import SparseAdam

DIM = 8
SOURCE = """
#include <ATen/Parallel.h>
#include <c10/util/flat_hash_map.h>
using Map = ska::flat_hash_map<int64_t, int64_t>;
extern "C" {
Map* map_new(int64_t reserved) {
  Map* map = new Map();
  if (reserved) map->reserve(reserved);
  return map;
}
void map_delete(Map* map) { delete map; }
int64_t map_size(const Map* map) { return map->size(); }
void map_insert(Map* map, const int64_t* ids, int64_t* rows, int64_t n) {
  int64_t next = map->size();
  for (int64_t i = 0; i < n; ++i) {
    auto found = map->emplace(ids[i], next);
    next += found.second;
    rows[i] = found.first->second;
  }
}
void map_find(const Map* map, const int64_t* ids, int64_t* rows, int64_t n, int64_t parallel) {
  auto loop = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      auto found = map->find(ids[i]);
      rows[i] = found == map->end() ? -1 : found->second;
    }
  };
  if (parallel) at::parallel_for(0, n, 1, loop); else loop(0, n);
}
}
"""


def build() -> ctypes.CDLL | None:
    """Build the map; if that fails, print the reason and return None."""
    from torch.utils import cpp_extension

    scripts = Path(sys.executable).parent  # pip installs ninja here
    os.environ["PATH"] = f"{scripts}{os.pathsep}{os.environ['PATH']}"
    name = "recis_lightning_flat_hash_map"
    try:
        library = cpp_extension.load_inline(
            name,
            [SOURCE],
            extra_cflags=["-O3", "-march=native", "-fopenmp"],
            is_python_module=False,
            no_implicit_headers=True,
        )
    except (OSError, RuntimeError) as error:
        print(f"C++ map: skipped, it cannot be built ({str(error).splitlines()[0]})")
        return None
    del library
    folder = Path(cpp_extension._get_build_directory(name, False))
    loaded = ctypes.CDLL(str(max(folder.glob(f"{name}*.so"), key=os.path.getmtime)))
    loaded.map_new.restype = ctypes.c_void_p
    loaded.map_size.restype = ctypes.c_int64
    return loaded


class FlatHashMap:
    """C++ map with tensors as arguments."""

    def __init__(self, library: ctypes.CDLL, reserved: int = 0) -> None:
        self.library = library
        self.map = ctypes.c_void_p(library.map_new(ctypes.c_int64(reserved)))

    def __del__(self) -> None:
        self.library.map_delete(self.map)

    def __len__(self) -> int:
        return int(self.library.map_size(self.map))

    def _call(self, function: Any, ids: Tensor, *args: int) -> Tensor:
        rows = torch.empty_like(ids)
        addresses = (ctypes.c_void_p(ids.data_ptr()), ctypes.c_void_p(rows.data_ptr()))
        integers = (ctypes.c_int64(value) for value in (ids.numel(), *args))
        function(self.map, *addresses, *integers)
        return rows

    def insert(self, ids: Tensor) -> Tensor:
        return self._call(self.library.map_insert, ids)

    def find(self, ids: Tensor, parallel: bool) -> Tensor:
        return self._call(self.library.map_find, ids, int(parallel))


class Ours:
    """Index of a table; with ``rows``, also its rows."""

    def __init__(self, rows: bool = False) -> None:
        self.table, self.rows = HashTable(DIM, name="index"), rows
        self.optimizer = SparseAdam(hash_tables(self.table), lr=1e-3)

    def insert(self, ids: Tensor) -> Tensor:
        segments = self.table.storage.segments(ids, insert=True)
        rows, new = hash_index.find_or_insert(
            segments, len(ids), [self.table.storage], [0], ids.device
        )
        if self.rows and new is not None:
            row_init.init_rows_(rows, new, segments, DIM, False)
        return rows

    def find(self, ids: Tensor) -> Tensor:
        return hash_index.find(self.table.storage.segments(ids), len(ids), ids.device)


def make_ids(num_ids: int) -> Tensor:
    """Return distinct random ids, int64 [num_ids].

    They resemble hashed names. Multiples of a constant would favour the map, whose hash is a
    product.
    """
    torch.manual_seed(0)
    ids = torch.randint(-(2**63), 2**63 - 1, (num_ids,))
    assert ids.unique().numel() == num_ids
    return ids


def check(library: ctypes.CDLL | None, num_ids: int = 5000) -> None:
    """Check that ours, the map and a dict give the same rows."""
    ids = make_ids(num_ids)
    asked = torch.cat([ids[torch.randint(num_ids, (num_ids,))], ids[:50] + 1])
    known = dict(zip(ids.tolist(), range(num_ids), strict=True))
    wanted = torch.tensor([known.get(key, -1) for key in asked.tolist()])
    for rows in (False, True):
        ours = Ours(rows)
        assert torch.equal(ours.insert(ids), torch.arange(num_ids))
        assert torch.equal(ours.insert(ids.flip(0)), torch.arange(num_ids).flip(0))
        assert torch.equal(ours.find(asked), wanted)
        assert len(ours.table) == num_ids
    if library is not None:
        peer = FlatHashMap(library)
        assert torch.equal(peer.insert(ids), torch.arange(num_ids))
        assert len(peer) == num_ids
        for parallel in (False, True):
            assert torch.equal(peer.find(asked, parallel), wanted)


def find(library: ctypes.CDLL | None, num_ids: int, rounds: int) -> dict[str, Any]:
    """Time a million random lookups of known ids."""
    ids = make_ids(num_ids)
    num_asked = min(num_ids, 1_000_000)
    asked = [ids[torch.randint(num_ids, (num_asked,))] for _ in range(8)]
    num_calls = 0

    def next_ids() -> Tensor:
        nonlocal num_calls
        num_calls += 1
        return asked[num_calls % len(asked)]

    ours = Ours()
    ours.insert(ids)
    contenders: dict[str, Callable[[], Any]] = {"ours": lambda: ours.find(next_ids())}
    if library is not None:
        peer = FlatHashMap(library)
        peer.insert(ids)
        contenders["C++ map, one thread"] = lambda: peer.find(next_ids(), False)
        contenders["C++ map, all threads"] = lambda: peer.find(next_ids(), True)
    times = time_in_turn(contenders, 5 * rounds)
    rows = [[n, ms, num_asked / ms / 1e3, ms / times["ours"]] for n, ms in times.items()]
    columns = ["find", "ms", "M ids/s", "speed-up of ours"]
    print_table(f"{num_asked:,} random lookups in {num_ids:,} ids", columns, rows)
    figures = {}
    if library is not None:
        figures["ratio"] = times["C++ map, all threads"] / times["ours"]
        figures["ratio_one"] = times["C++ map, one thread"] / times["ours"]
    shape = {"num_ids": num_ids, "num_asked": num_asked}
    return {"part": "find", "shape": shape, "columns": columns, "rows": rows, "figures": figures}


def insert(library: ctypes.CDLL | None, num_ids: int, rounds: int) -> dict[str, Any]:
    """Time filling an empty index: in one call, and in calls of 100,000 ids."""
    ids = make_ids(num_ids)
    batches = ids.split(100_000)

    def filled(make: Callable[[], Any], batches: tuple[Tensor, ...]) -> Callable[[], Any]:
        def prepare() -> Callable[[], Any]:
            index = make()

            def fill() -> Any:
                for batch in batches:
                    index.insert(batch)
                return index

            return fill

        return prepare

    makers: dict[str, Callable[[], Any]] = {"ours": Ours, "ours, with rows": lambda: Ours(True)}
    if library is not None:
        makers["C++ map"] = lambda: FlatHashMap(library)
        makers["C++ map, reserved"] = lambda: FlatHashMap(library, num_ids)
    one_call = time_prepared({name: filled(make, (ids,)) for name, make in makers.items()}, rounds)
    batched = time_prepared({name: filled(make, batches) for name, make in makers.items()}, rounds)
    rows = []
    for name, ms in one_call.items():
        row = [name, ms, num_ids / ms / 1e3, ms / one_call["ours"]]
        rows.append([*row, batched[name], batched[name] / batched["ours"]])
    columns = ["insert", "ms", "M ids/s", "speed-up of ours", "in batches ms", "speed-up"]
    print_table(f"{num_ids:,} new ids into an empty index", columns, rows)
    figures = {}
    if library is not None:
        peer = one_call["C++ map"]
        figures["ratio"] = peer / one_call["ours"]
        figures["ratio_reserved"] = one_call["C++ map, reserved"] / one_call["ours"]
        figures["ratio_rows"] = peer / one_call["ours, with rows"]
        figures["ratio_batches"] = batched["C++ map"] / batched["ours"]
    shape = {"num_ids": num_ids, "batch": 100_000}
    return {"part": "insert", "shape": shape, "columns": columns, "rows": rows, "figures": figures}


def main(arguments: list[str] | None = None) -> int:
    """Check, time and append the results; return 1 if a target is missed."""
    parser = argparse.ArgumentParser(description="The index against a C++ map")
    parser.add_argument("--num-ids", type=int, default=10_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dry", action="store_true", help="append nothing to the results")
    add_device(parser)
    given = parser.parse_args(arguments)
    use_device(given.device)
    library = None if is_on_gpu("C++ map") else build()
    check(library)
    all_met = True
    for part in (find, insert):
        line = part(library, given.num_ids, given.rounds)
        all_met &= meets_targets("bench_hash_index", line)
        if not given.dry:
            append_result("bench_hash_index", line)
    return 0 if all_met else 1


if __name__ == "__main__":
    sys.exit(main())
