"""Memory of a run that trains the example's DeepFM on Criteo files, pass after pass.

    python -m tests.helpers.flat_memory --num-rows 500000 --passes 8

The rows are those of the Criteo sample, repeated (random ones of its shape, where it is not there),
as hexadecimal strings that are hashed, shuffled and batched while the model trains. Prints a JSON
line: memory in MB (resident, of this process) after each pass.
"""

import argparse
import json
import logging
import os
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from lightning.pytorch.callbacks import Callback

from benchmarks.bench_data import ROOT, sample, write
from examples.deepfm.criteo import CriteoDataModule
from examples.deepfm.train import criteo_model
from recis_lightning import hash_tables
from tests.helpers.quiet_trainer import quiet_trainer


def resident_mb():
    """Return the memory of this process that is in RAM, in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


class MemoryAfterPasses(Callback):
    """Memory after each pass, and rows of the tables then."""

    def __init__(self):
        self.resident_mb, self.rows = [], []

    def on_train_epoch_end(self, trainer, pl_module):
        self.resident_mb.append(resident_mb())
        self.rows.append(sum(len(table) for table in hash_tables(pl_module)))
        print(f"{self.resident_mb[-1]:.0f} MB", file=sys.stderr, flush=True)


def main(args=None):
    """Train and print the memory after each pass."""
    parser = argparse.ArgumentParser("python -m tests.helpers.flat_memory")
    parser.add_argument("--num-rows", type=int, default=100_000)
    parser.add_argument("--passes", type=int, default=6)
    parser.add_argument("--batch-size", type=int, default=4096)
    parser.add_argument("--criteo", type=Path, default=ROOT.parent / "shared/data/criteo")
    given = parser.parse_args(args)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for logger in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as name:
        path = write(sample(given.criteo), given.num_rows, Path(name))["raw"]
        data = CriteoDataModule(
            name, [path.name], batch_size=given.batch_size, shuffle_rows=100_000
        )
        memory = MemoryAfterPasses()
        quiet_trainer(name, memory, max_epochs=given.passes).fit(criteo_model(), data)
    print(json.dumps({"resident_mb": memory.resident_mb, "rows": memory.rows}))


if __name__ == "__main__":
    main()
