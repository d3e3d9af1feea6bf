"""Steps of a table whose rows lie in a mapped file, with a tenth of its size in memory.

Measures: ``recis_lightning.table.row_file``, ``recis_lightning.ops.mapped_rows``,
``recis_lightning.ops.file_memory``.

Two child processes step in turn on the same Zipf traffic: one has all rows in memory, the other
has them in a file and is in a control group whose limit is what the process takes without a table
and ``--share`` of the table's bytes: index, rows in memory and the kernel's cache of the file. The
kernel enforces it, by version 1 or 2 of control groups: without the right to make one, nothing is
measured. A step is lookup, backward and Adam. Both tables are filled with all ids in the order in
which such traffic would first bring them, and must agree bit for bit in the end. Beside the times
stands what any table with so many rows in memory would miss of a batch.

    python benchmarks/bench_mapped_rows.py [--rows N] [--exponent S] [--folder PATH] [--dry]
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np
import torch

from benchmarks.harness import append_result, print_table
from benchmarks.targets import meets_targets
from recis_lightning import DynamicEmbedding, hash_tables
from recis_lightning.optim import SparseAdam

STATE, INSERTED, SPREAD = 2, 1 << 14, 7_919_317
# Of the memory given, for pages of the file, read or not yet written, and the allocator: at least
# those of three batches, and a quarter of all. With half as much, pages were read twice.
LEAST_PAGES = 160 << 20

# A busy machine flatters the mapped table: 0.57 was measured where a quiet one gave 0.25.
MOST_BUSY = 0.2


class _Group:
    """Control group of memory below that of this process, of version 1 or 2."""

    def __init__(self) -> None:
        lines = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
        found = {controllers: path for _, controllers, path in lines}
        self.is_first = "memory" in found
        root = Path("/sys/fs/cgroup") / ("memory" if self.is_first else "")
        above = root / found.get("memory", found.get("", "")).lstrip("/")
        self.folder = above / f"recis_lightning_bench_{os.getpid()}"

    def write(self, name: str, value: int) -> None:
        (self.folder / name).write_text(str(value))

    def limit(self, num_bytes: int) -> None:
        self.write("memory.limit_in_bytes" if self.is_first else "memory.max", num_bytes)

    def own_bytes(self) -> int:
        """Return what the group's processes have of their own: no copies of files."""
        lines = (self.folder / "memory.stat").read_text().splitlines()
        stat = {name: int(value) for name, value in map(str.split, lines)}
        return stat["rss" if self.is_first else "anon"]


@contextmanager
def limited_group() -> Iterator[_Group | None]:
    """Make a control group for a child; None where that is not allowed."""
    try:
        group = _Group()
        group.folder.mkdir()
    except OSError:
        yield None
        return
    try:
        yield group
    finally:
        for _ in range(50):
            try:
                group.folder.rmdir()
                break
            except OSError:  # its processes are not gone yet
                time.sleep(0.1)


class _Traffic:
    """Zipf traffic over ids that are all in the table."""

    def __init__(self, num_ids: int, exponent: float) -> None:
        self.generator = np.random.default_rng(0)
        weights = np.arange(1, num_ids + 1) ** -exponent
        self.cumulative = np.cumsum(weights / weights.sum())
        # Of a Poisson process of each id the first event is exponentially distributed.
        self.first_seen = np.argsort(self.generator.exponential(size=num_ids) / weights)

    def batch(self, num_ids: int) -> torch.Tensor:
        drawn = np.searchsorted(self.cumulative, self.generator.random(num_ids))
        ranks = np.minimum(drawn, len(self.cumulative) - 1)
        return torch.from_numpy(ranks.astype(np.int64) * SPREAD)

    def misses(self, num_ids: int, num_kept: int) -> dict[str, float]:
        """Return what a batch of ``num_ids`` ids expects of rows of which some are in memory.

        Args:
            num_ids: Ids of the batch.
            num_kept: Rows in memory.

        Returns:
            Distinct rows of the batch, how many of them are not in memory if the most frequent
            rows are, and if those that came first are; and the share of its ids that the most
            frequent rows serve, which no choice exceeds.
        """
        weights = np.diff(self.cumulative, prepend=0.0)
        occurs = -np.expm1(num_ids * np.log1p(-weights))
        return {
            "distinct": float(occurs.sum()),
            "missed_at_best": float(occurs[num_kept:].sum()),
            "missed_first_come": float(occurs[self.first_seen[num_kept:]].sum()),
            "hits_at_best": float(weights[:num_kept].sum()),
        }


def child(settings: dict[str, Any]) -> None:
    """Fill a table, then make a step for each line of the input."""
    num_rows, dim, batch = settings["rows"], settings["dim"], settings["batch"]
    gradient = torch.ones(batch, dim)
    group = None
    if settings["where"] is not None:
        group = _Group()
        group.folder = Path(settings["group"])

    def step(module: DynamicEmbedding, optimizer: SparseAdam, ids: torch.Tensor) -> int:
        out = module(ids)
        out.backward(gradient)
        needed = 0 if group is None else group.own_bytes()  # gradients and all
        optimizer.step()
        optimizer.zero_grad()
        return needed

    traffic = _Traffic(num_rows, settings["exponent"])
    small = DynamicEmbedding(dim, name="small", rows=f"file:{settings['folder']}?memory=0")
    optimizer = SparseAdam(hash_tables(small), lr=1e-3)
    for _ in range(3):  # compiles kernels, takes scratch memory
        needed = step(small, optimizer, torch.arange(batch))
    del small, optimizer
    rows = settings["where"]
    given = int(settings["share"] * 4 * dim * (1 + STATE) * num_rows)
    if group is not None:
        index = 16 << (2 * num_rows).bit_length()
        group.limit(needed + given)
        pages = max(LEAST_PAGES, given // 4)
        rows += f"?memory={max(given - index - pages, 0)}"
    module = DynamicEmbedding(dim, name="table", rows=rows)
    (table,) = hash_tables(module)
    optimizer = SparseAdam([table], lr=1e-3)
    started = time.perf_counter()
    for start in range(0, num_rows, INSERTED):
        ids = torch.from_numpy(traffic.first_seen[start : start + INSERTED] * SPREAD)
        table.insert(ids, torch.full((len(ids), dim), 0.01))
    filled = time.perf_counter() - started
    print(json.dumps({"bytes": table.nbytes, "given": given, "filled_s": filled}), flush=True)
    for _ in sys.stdin:
        ids = traffic.batch(batch)
        before, read = resource.getrusage(resource.RUSAGE_SELF), _bytes_read()
        started = time.perf_counter()
        step(module, optimizer, ids)
        elapsed = time.perf_counter() - started
        after = resource.getrusage(resource.RUSAGE_SELF)
        line = {
            "ms": 1e3 * elapsed,
            "cpu_ms": 1e3 * (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime),
            "faults": after.ru_majflt - before.ru_majflt,
            "read_mb": (_bytes_read() - read) / 1e6,
            "check": zlib.crc32(table.embeddings(ids[:256]).numpy().tobytes()),
        }
        print(json.dumps(line), flush=True)


def busy_share(seconds: float = 2.0) -> float:
    """Return the share of the processors' time that others use now."""

    def times() -> list[int]:
        return [
            int(ticks) for ticks in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
        ]

    before = times()
    time.sleep(seconds)
    spent = [after - start for start, after in zip(before, times(), strict=True)]
    return 1 - (spent[3] + spent[4]) / max(sum(spent[:8]), 1)  # idle, and waiting for a disk


def _bytes_read() -> int:
    lines = dict(line.split(":") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["read_bytes"])


def measure(settings: dict[str, Any], steps: int, warmup: int) -> dict[str, Any]:
    """Step both children in turn; return figures.

    Raises:
        PermissionError: Memory cannot be limited here.
        RuntimeError: The tables disagree.
    """
    with limited_group() as group:
        if group is None:
            raise PermissionError("no control group of memory can be made here")
        contenders = {
            "memory": _start({**settings, "where": None}, None),
            "mapped": _start({**settings, "where": f"file:{settings['folder']}"}, group),
        }
        try:
            filled = {name: _answer(one, "mapped") for name, one in contenders.items()}
            lines: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
            for number in range(warmup + steps):
                for name in sorted(contenders, reverse=number % 2 == 0):
                    stdin = contenders[name].stdin
                    assert stdin is not None
                    stdin.write("step\n")
                    stdin.flush()
                    lines[name].append(_answer(contenders[name], name))
                if lines["memory"][-1]["check"] != lines["mapped"][-1]["check"]:
                    raise RuntimeError(f"step {number}: the tables disagree")
        finally:
            for one in contenders.values():
                with one:  # closes its pipes
                    one.kill()
    return {"filled": filled} | {name: of[warmup:] for name, of in lines.items()}


def _start(settings: dict[str, Any], group: _Group | None) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, "--child", json.dumps(settings)]
    if group is not None:
        settings["group"] = str(group.folder)
        command[-1] = json.dumps(settings)
        enter = f'echo $$ > {group.folder}/cgroup.procs && exec "$@"'
        command = ["sh", "-c", enter, "sh", *command]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=ROOT)


def _answer(one: subprocess.Popen[str], name: str) -> dict[str, float]:
    assert one.stdout is not None
    line = one.stdout.readline()
    if not line:
        raise RuntimeError(f"the process with rows in {name} ended with status {one.wait()}")
    answer: dict[str, float] = json.loads(line)
    return answer


def main() -> None:
    """Print and record the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--batch", type=int, default=1 << 16, help="ids a step")
    parser.add_argument("--exponent", type=float, default=1.2, help="of the Zipf distribution")
    parser.add_argument("--share", type=float, default=0.1, help="memory given, of all rows")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--warmup", type=int, default=30)
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="on the disk to measure")
    parser.add_argument("--dry", action="store_true", help="record nothing")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        child(json.loads(given.child))
        return
    names = ("rows", "dim", "batch", "exponent", "share", "folder")
    settings = {name: getattr(given, name) for name in names}
    try:
        busy = busy_share()
        found = measure(settings, given.steps, given.warmup)
    except PermissionError as error:
        print(f"skipped: {error}")
        return
    figures: dict[str, Any] = {name: value for name, value in settings.items() if name != "folder"}
    traffic = _Traffic(given.rows, given.exponent)
    figures |= traffic.misses(given.batch, int(given.share * given.rows))
    figures["table_gb"] = found["filled"]["memory"]["bytes"] / 1e9
    figures["given_gb"] = found["filled"]["mapped"]["given"] / 1e9
    table = []
    for name in ("memory", "mapped"):
        lines = found[name]
        figures[name] = {key: median(line[key] for line in lines) for key in lines[0]}
        figures[name]["filled_s"] = found["filled"][name]["filled_s"]
        times = sorted(line["ms"] for line in lines)
        figures[name]["range_ms"] = [times[len(times) // 10], times[-1 - len(times) // 10]]
        row = figures[name]
        shown = ("cpu_ms", "faults", "read_mb", "filled_s")
        table.append([name, row["ms"], *row["range_ms"], *(row[key] for key in shown)])
    pairs = zip(found["memory"], found["mapped"], strict=True)
    ratios = sorted(one["ms"] / other["ms"] for one, other in pairs)
    figures["ratio"] = figures["memory"]["ms"] / figures["mapped"]["ms"]
    figures["paired"] = [ratios[len(ratios) // 10], median(ratios), ratios[-1 - len(ratios) // 10]]
    figures["cpu_ratio"] = figures["memory"]["cpu_ms"] / figures["mapped"]["cpu_ms"]
    title = f"{figures['table_gb']:.2f} GB of table, {figures['given_gb']:.2f} GB of memory given"
    columns = ["rows in", "step, ms", "10%", "90%", "CPU, ms", "faults", "read, MB", "filled, s"]
    print_table(title, columns, table)
    low, middle, high = figures["paired"]
    print(
        f"speed of the mapped table: {figures['ratio']:.2f} of that in memory; of pairs of steps "
        f"{middle:.2f} ({low:.2f} to {high:.2f}); by CPU time {figures['cpu_ratio']:.2f}"
    )
    print(
        f"of {figures['distinct']:.0f} distinct rows of a batch, {figures['missed_at_best']:.0f} "
        f"are not among the most frequent {given.share:.0%} of all rows, which serve "
        f"{figures['hits_at_best']:.1%} of its ids; of those that came first, "
        f"{figures['missed_first_come']:.0f} are not"
    )
    figures["busy"] = busy
    line = {"part": f"zipf {given.exponent:g}", "figures": figures}
    if busy > MOST_BUSY:
        print(
            f"not recorded: others used {busy:.0%} of the processors, so that both waited for them"
        )
        return
    meets_targets("bench_mapped_rows", line)
    if not given.dry:
        append_result("bench_mapped_rows", line)


if __name__ == "__main__":
    main()
