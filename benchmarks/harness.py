"""What the benchmarks share: timing in turn, the machine's copy rate, and where results go."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


_device = torch.device("cpu")


def add_device(parser: argparse.ArgumentParser) -> None:
    """Let the command line choose where tables, ids and peers are."""
    where = "where tables, ids and peers are; times on 'cuda' are by CUDA events"
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help=where)


def use_device(name: str) -> torch.device:
    """Make and time everything on a device from now on.

    Args:
        name: "cpu" or "cuda".

    Raises:
        SystemExit: There is no such device here.
    """
    global _device
    if name == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch finds no GPU here")
    _device = torch.device(name)
    torch.set_default_device(None if name == "cpu" else _device)
    return _device


def device() -> torch.device:
    """Return where everything is."""
    return _device


def is_on_gpu(peer: str = "") -> bool:
    """Return whether everything is on a GPU; if so, say that a peer of the CPU is left out."""
    if _device.type == "cuda" and peer:
        print(f"{peer}: left out, it runs on the CPU alone")
    return _device.type == "cuda"


@contextmanager
def no_default_device() -> Iterator[None]:
    """Run torch as it is: a default device costs every call from Python a microsecond or two."""
    chosen = torch.get_default_device() if _device.type == "cuda" else None
    if chosen is not None:
        torch.set_default_device(None)
    try:
        yield
    finally:
        if chosen is not None:
            torch.set_default_device(chosen)


def stopwatch(timed: Callable[[], Any]) -> tuple[float, Any]:
    """Return the milliseconds that a call takes, on a GPU between CUDA events, and its result."""
    with no_default_device():
        if _device.type == "cpu":
            start = time.perf_counter()
            made = timed()
            return 1e3 * (time.perf_counter() - start), made
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        made = timed()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end), made


def _gpu() -> dict[str, Any]:
    """Return what figures of a GPU belong to."""
    import triton

    name = torch.cuda.get_device_name()
    return {"gpu": name, "cuda": torch.version.cuda, "triton": triton.__version__}


def provenance() -> dict[str, Any]:
    """Return the commit, the machine and the versions that figures belong to."""

    def git(*command: str) -> str:
        done = subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True)
        return done.stdout.strip()

    return {
        "commit": git("rev-parse", "--short", "HEAD"),
        "dirty": bool(
            git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
        ),
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "load": round(os.getloadavg()[0], 2),
        "device": _device.type,
        **(_gpu() if _device.type == "cuda" else {}),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line for line in lines if line.startswith("model name"))
        return name.split(":")[1].strip()
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def append_result(benchmark: str, figures: dict[str, Any]) -> None:
    """Append one JSON line to ``results/<benchmark>.jsonl``."""
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / f"{benchmark}.jsonl").open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(provenance() | figures) + "\n")


def time_in_turn(
    contenders: dict[str, Callable[[], Any]], rounds: int, warmup: int = 2
) -> dict[str, float]:
    """Return each contender's median milliseconds; every round runs all of them, in another order.

    Args:
        contenders: Name -> what to time.
        rounds: How often each runs.
        warmup: Untimed rounds first.
    """
    names = [*contenders]
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(-warmup, rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            elapsed_ms, made = stopwatch(contenders[name])
            del made
            if number >= 0:
                times[name].append(elapsed_ms)
    return {name: median(values) for name, values in times.items()}


def time_prepared(
    contenders: dict[str, Callable[[], Callable[[], Any]]], rounds: int, warmup: int = 1
) -> dict[str, float]:
    """Return median milliseconds as ``time_in_turn`` does, of what needs a fresh start each time.

    Args:
        contenders: Name -> prepares one run, untimed, and returns what to time. What the timed part
            returns is freed after its time is taken.
        rounds: How often each runs.
        warmup: Rounds first that do not count.
    """
    names = [*contenders]
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(-warmup, rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            timed = contenders[name]()
            elapsed_ms, made = stopwatch(timed)
            del timed, made
            if number >= 0:
                times[name].append(elapsed_ms)
    return {name: median(values) for name, values in times.items()}


def copy_gb_per_s(num_bytes: int = 1 << 28, rounds: int = 7) -> float:
    """Measure the device's copy rate: bytes read plus bytes written, by all of torch's threads."""
    source = torch.ones(num_bytes // 4)
    target = torch.empty_like(source)
    spent = time_in_turn({"copy": lambda: target.copy_(source)}, rounds)["copy"]
    return 2 * num_bytes / spent / 1e6


def zipf_ranks(
    rng: np.random.Generator, exponent: float, num_ids: int, shape: tuple[int, ...]
) -> npt.NDArray[np.int64]:
    """Draw ranks 0 ... num_ids - 1 with weight (rank + 1) ** -exponent."""
    weights = np.arange(1, num_ids + 1) ** -exponent
    cumulative = np.cumsum(weights / weights.sum())
    drawn = np.searchsorted(cumulative, rng.random(shape))
    return np.minimum(drawn, num_ids - 1).astype(np.int64)


def geometric_mean(values: list[float]) -> float:
    """Return the geometric mean."""
    return float(np.exp(np.mean(np.log(values))))


def print_table(title: str, columns: list[str], rows: list[list[Any]]) -> None:
    """Print rows under columns, numbers to three significant digits."""
    shown = [[f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in r] for r in rows]
    widths = [max(len(line[i]) for line in [columns, *shown]) for i in range(len(columns))]
    print(f"\n{title}")
    for line in [columns, *shown]:
        print("  " + "  ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=True)))
