"""Hashing of short strings to ids, one thread, compared with pandas.

Measures: ``recis_lightning.ops.string_hash``, ``recis_lightning.data.hashing``.

Strings of 12 bytes, such as hexadecimal keys of logs, lie in an Arrow array. Values are first
compared with the reference. pandas hashes the same strings with SipHash.

    python benchmarks/bench_string_hash.py [--num-strings N] [--dry]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np
import torch

from benchmarks.harness import append_result, print_table, time_in_turn
from recis_lightning.data import hash_strings
from recis_lightning.ops import backend

HASHES = ("xxh64", "farmhash64", "murmur3", "murmur64a")


def measure(num_strings: int) -> dict[str, Any]:
    """Return millions of strings a second by hash, and of pandas if it is there.

    Args:
        num_strings: How many are hashed in one call.
    """
    import pyarrow

    keys = [f"{key:012x}" for key in np.random.default_rng(0).integers(0, 1 << 48, num_strings)]
    strings = pyarrow.array(keys)
    for name in HASHES:
        with backend.use("reference"):
            expected = hash_strings(strings[:500], hash=name)
        assert torch.equal(hash_strings(strings[:500], hash=name), expected), name
    contenders: dict[str, Any] = {
        name: lambda name=name: hash_strings(strings, hash=name) for name in HASHES
    }
    try:
        from pandas.util import hash_array
    except ImportError:
        print("pandas: skipped, it is not installed")
    else:
        objects = np.array(keys, dtype=object)
        contenders["pandas"] = lambda: hash_array(objects, categorize=False)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        times = time_in_turn(contenders, rounds=9)
    finally:
        torch.set_num_threads(before)
    rates = {name: num_strings / 1e3 / milliseconds for name, milliseconds in times.items()}
    print_table(
        f"{num_strings:,} strings of 12 bytes",
        ["hash", "million a second"],
        [[name, f"{rate:.1f}"] for name, rate in rates.items()],
    )
    return {"num_strings": num_strings, "million_per_s": rates}


def main() -> int:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-strings", type=int, default=1_000_000)
    parser.add_argument("--dry", action="store_true", help="append nothing to the results")
    given = parser.parse_args()
    line = measure(given.num_strings)
    if not given.dry:
        append_result("bench_string_hash", line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
