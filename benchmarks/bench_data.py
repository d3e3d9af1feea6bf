"""Rows a second from Parquet files to batches of tensors, compared with other readers.

Measures: ``recis_lightning.data.dataset``, ``recis_lightning.data.columns``,
``recis_lightning.data.features``.

The rows are those of the Criteo sample, repeated (of its shape, drawn at random, where there is no
sample), in one file of row groups of 50,000: a label, 13 counts and 26 categories, as hexadecimal
strings that must become ids (``raw``) or as integers (``ids``). All readers keep the order and make
the same batches: int64 ids a category, float32 counts and flags, the label. The others hash strings
with pandas. Batches are first compared. Then the share of a training step of the example's DeepFM
that waits for ours, and the growth of memory over a pass.

    python benchmarks/bench_data.py [--num-rows N] [--rounds R] [--criteo FOLDER] [--dry]
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.dataset
import torch
from pyarrow import orc, parquet
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from benchmarks.harness import append_result, print_table, time_in_turn
from examples.deepfm.criteo import CATEGORIES, COUNTS, MISSING_ID, criteo_features, to_batch
from examples.deepfm.train import criteo_model
from recis_lightning.data import ColumnarDataset

GROUP_ROWS = 50_000
BATCH_SIZE = 4096
KINDS = ("raw", "ids")
Batches = Iterator[dict[str, Any]]


def sample(folder: Path) -> pa.Table:
    """Return 40,000 rows with integer categories: the Criteo sample's, or random ones."""
    files = sorted(folder.glob("part-[0-3].orc"))
    if not files:
        random, n = np.random.default_rng(0), 40_000
        ids = {c: random.zipf(1.3, n) % (1 << 32) for c in CATEGORIES}
        counts = {c: random.zipf(1.5, n).astype(float) % 1e6 for c in COUNTS}
        label = {"label": (random.random(n) < 0.03).astype(float)}
        return pa.table({**label, **counts, **ids})
    lists = pa.concat_tables([orc.read_table(file) for file in files])
    columns = {}
    for name in lists.column_names:
        column = lists[name].combine_chunks()
        rows = column.flatten().to_pandas()
        index = np.cumsum(column.value_lengths().to_numpy()) - 1
        full = column.value_lengths().to_numpy() > 0
        columns[name] = pa.array(rows.to_numpy()[np.maximum(index, 0)], mask=~full)
    return pa.table(columns)


def write(rows: pa.Table, num_rows: int, folder: Path) -> dict[str, Path]:
    """Write the rows, repeated, with categories as hexadecimal strings and as integers."""
    texts = {
        name: pa.array([None if x is None else f"{x & 0xFFFFFFFF:08x}" for x in column.to_pylist()])
        for name, column in zip(rows.column_names, rows.columns, strict=True)
        if name in CATEGORIES
    }
    raw = pa.table({name: texts.get(name, rows[name]) for name in rows.column_names})
    paths = {kind: folder / f"{kind}.parquet" for kind in KINDS}
    for kind, table in zip(KINDS, (raw, rows), strict=True):
        table = table.combine_chunks()
        with parquet.ParquetWriter(paths[kind], table.schema) as writer:
            left = num_rows
            while left:
                part = table.slice(0, min(left, table.num_rows))
                writer.write_table(part, row_group_size=GROUP_ROWS)
                left -= part.num_rows
    return paths


def ours(path: Path, kind: str) -> Batches:
    """Yield batches of ``ColumnarDataset``."""
    features = criteo_features("xxh64" if kind == "raw" else None)
    yield from ColumnarDataset(
        str(path), features=features, batch_size=BATCH_SIZE, convert=to_batch
    )


def of_frame(frame: pd.DataFrame, kind: str) -> dict[str, Any]:
    """Make the batch of rows of a pandas data frame."""
    counts = torch.tensor(frame[COUNTS].to_numpy(np.float32))
    counts = counts.abs().log1p().copysign(counts)
    features = {}
    for name in CATEGORIES:
        column = frame[name]
        if kind == "raw":
            ids = pd.util.hash_array(column.to_numpy(object), categorize=True).view(np.int64)
            ids = np.where(column.isna().to_numpy(), MISSING_ID, ids)
        else:
            ids = column.fillna(MISSING_ID).to_numpy(np.int64)
        features[name] = torch.tensor(ids)  # pandas 3 keeps its memory read-only
    return {
        "features": features,
        "dense": torch.cat([counts.nan_to_num(0.0), counts.isnan().float()], dim=1),
        "label": torch.tensor(frame["label"].to_numpy(np.float32)),
    }


def arrow_loop(path: Path, kind: str) -> Batches:
    """Yield batches of a plain loop over pyarrow's record batches."""
    data = pyarrow.dataset.dataset(path)
    for rows in data.to_batches(batch_size=BATCH_SIZE):
        yield of_frame(rows.to_pandas(integer_object_nulls=False), kind)


class Frames(IterableDataset[Any]):
    """Batches of the row groups of a file, as pandas reads them; workers share the groups."""

    def __init__(self, path: Path, kind: str) -> None:
        super().__init__()
        self.path, self.kind = path, kind

    def __iter__(self) -> Batches:
        info = torch.utils.data.get_worker_info()
        first, step = (info.id, info.num_workers) if info else (0, 1)
        file = parquet.ParquetFile(self.path)
        for group in range(first, file.num_row_groups, step):
            frame = file.read_row_group(group, use_threads=info is None).to_pandas()
            for start in range(0, len(frame), BATCH_SIZE):
                yield of_frame(frame.iloc[start : start + BATCH_SIZE], self.kind)


def hugging_face(path: Path, kind: str) -> Batches:
    """Yield batches of Hugging Face's streaming reader."""
    import datasets

    data = datasets.load_dataset(
        "parquet", data_files=str(path), split="train", streaming=True
    ).with_format("pandas")
    for frame in data.iter(batch_size=BATCH_SIZE):
        yield of_frame(frame, kind)


def readers() -> dict[str, Callable[[Path, str], Batches]]:
    """Return the readers that are installed."""
    found: dict[str, Callable[[Path, str], Any]] = {
        "ours": ours,
        "pyarrow loop": arrow_loop,
        "torch + pandas": lambda path, kind: DataLoader(Frames(path, kind), batch_size=None),
        "torch + pandas, 2 workers": lambda path, kind: DataLoader(
            Frames(path, kind), batch_size=None, num_workers=2
        ),
    }
    try:
        import datasets

        datasets.disable_progress_bars()
    except ImportError:
        print("Hugging Face datasets: skipped, it is not installed")
    else:
        found["Hugging Face streaming"] = hugging_face
    return found


def summary(batches: Batches) -> list[Any]:
    """Return what all readers must agree on, however strings are hashed."""
    rows, ids = 0, [set() for _ in CATEGORIES]  # type: ignore[var-annotated]
    dense, missing = torch.zeros(26, dtype=torch.float64), 0
    for batch in batches:
        rows += len(batch["label"])
        dense += batch["dense"].double().sum(0)
        for name, seen in zip(CATEGORIES, ids, strict=True):
            values: Tensor = batch["features"][name]
            seen.update(values.unique().tolist())
            missing += int((values == MISSING_ID).sum())
    return [rows, [len(seen) for seen in ids], missing, [round(float(x), 1) for x in dense]]


def drain_all(make: Callable[[Path, str], Batches], path: Path, kind: str) -> int:
    """Read all batches of a file."""
    return sum(len(batch["label"]) for batch in make(path, kind))


def wait_share(path: Path, steps: int) -> dict[str, float]:
    """Train the example's DeepFM; return how much of a step waits for the next batch."""
    model = criteo_model()
    optimizer = model.configure_optimizers()
    batches, waited, start = ours(path, "raw"), 0.0, 0.0
    for step in range(steps):
        if step == 5:  # compiled and full
            waited, start = 0.0, time.perf_counter()
        before = time.perf_counter()
        batch: Any = next(batches)
        waited += time.perf_counter() - before
        optimizer.zero_grad()
        model.training_step(batch, step).backward()
        optimizer.step()
    whole = time.perf_counter() - start
    return {"step_ms": 1e3 * whole / (steps - 5), "share": waited / whole}


def memory_growth(path: Path) -> dict[str, float]:
    """Return the peak memory in MB after a fifth of a pass, and after all of it."""

    def peak() -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    rows, fifth = parquet.ParquetFile(path).metadata.num_rows, 0.0
    seen = 0
    for batch in ours(path, "raw"):
        seen += len(batch["label"])
        if not fifth and seen >= rows / 5:
            fifth = peak()
    return {"after_a_fifth_mb": fifth, "at_the_end_mb": peak()}


def measure(num_rows: int, rounds: int, criteo: Path) -> dict[str, Any]:
    """Return thousands of rows a second by reader and kind, the wait, and the memory."""
    figures: dict[str, Any] = {"num_rows": num_rows, "batch_size": BATCH_SIZE}
    with tempfile.TemporaryDirectory() as name:
        paths = write(sample(criteo), num_rows, Path(name))
        figures["memory"] = memory_growth(paths["raw"])
        for kind, path in paths.items():
            contenders = readers()
            expected = summary(ours(path, kind))
            for reader, make in contenders.items():
                assert summary(make(path, kind)) == expected, reader
            passes = {key: partial(drain_all, make, path, kind) for key, make in contenders.items()}
            times = time_in_turn(passes, rounds=rounds, warmup=0)
            figures[kind] = {key: num_rows / ms for key, ms in times.items()}
            best = max(rate for key, rate in figures[kind].items() if key != "ours")
            figures[f"{kind}_ratio"] = figures[kind]["ours"] / best
            print_table(
                f"{num_rows:,} rows, {kind}: ours {figures[f'{kind}_ratio']:.1f} times the next",
                ["reader", "thousand rows a second"],
                [[key, f"{rate:.0f}"] for key, rate in figures[kind].items()],
            )
        steps = min(60, num_rows // BATCH_SIZE)
        figures["wait"] = wait_share(paths["raw"], steps)
    wait, memory = figures["wait"], figures["memory"]
    print(f"\n  DeepFM, batch {BATCH_SIZE}: {wait['share']:.1%} of {wait['step_ms']:.1f} ms waits")
    first, last = memory["after_a_fifth_mb"], memory["at_the_end_mb"]
    print(f"  peak memory {first:.0f} MB after a fifth of the pass, {last:.0f} MB at its end")
    return figures


def main() -> int:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-rows", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--criteo", type=Path, default=ROOT.parent / "shared" / "data" / "criteo")
    parser.add_argument("--dry", action="store_true", help="append nothing to the results")
    given = parser.parse_args()
    line = measure(given.num_rows, given.rounds, given.criteo)
    if not given.dry:
        append_result("bench_data", line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
