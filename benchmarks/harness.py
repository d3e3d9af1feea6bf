"""Tools of all benchmarks: alternating timing, the machine's copy rate, the results files."""

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
    """Add the option ``--device``."""
    text = "device of tables, ids and peers; CUDA events take the times on 'cuda'"
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help=text)


def use_device(name: str) -> torch.device:
    """Create and time everything on a device from now on.

    Args:
        name: "cpu" or "cuda".

    Raises:
        SystemExit: torch finds no such device.
    """
    global _device
    if name == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch finds no GPU here")
    _device = torch.device(name)
    torch.set_default_device(None if name == "cpu" else _device)
    return _device


def device() -> torch.device:
    """Return the device of the benchmark."""
    return _device


def is_on_gpu(peer: str = "") -> bool:
    """Return whether the benchmark runs on a GPU; if so, print that a CPU-only peer is skipped."""
    if _device.type == "cuda" and peer:
        print(f"{peer}: skipped, it runs on the CPU only")
    return _device.type == "cuda"


@contextmanager
def no_default_device() -> Iterator[None]:
    """Unset torch's default device: it adds a microsecond or two to every call from Python."""
    chosen = torch.get_default_device() if _device.type == "cuda" else None
    if chosen is not None:
        torch.set_default_device(None)
    try:
        yield
    finally:
        if chosen is not None:
            torch.set_default_device(chosen)


def stopwatch(timed: Callable[[], Any]) -> tuple[float, Any]:
    """Return a call's duration in ms, on a GPU measured with CUDA events, and its result."""
    with no_default_device():
        if _device.type == "cpu":
            start = time.perf_counter()
            result = timed()
            return 1e3 * (time.perf_counter() - start), result
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        result = timed()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end), result


def _gpu() -> dict[str, Any]:
    """Return the GPU and the versions of CUDA and Triton."""
    import triton

    name = torch.cuda.get_device_name()
    return {"gpu": name, "cuda": torch.version.cuda, "triton": triton.__version__}


def provenance() -> dict[str, Any]:
    """Return the commit, the machine and the versions of a measurement."""

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
    """Return each contender's median milliseconds.

    Every round runs all contenders, and rotates their order.

    Args:
        contenders: Name -> function to time.
        rounds: Number of timed runs of each.
        warmup: Number of untimed rounds before them.
    """
    names = [*contenders]
    times: dict[str, list[float]] = {name: [] for name in names}
    for i in range(-warmup, rounds):
        shift = i % len(names)
        for name in names[shift:] + names[:shift]:
            elapsed_ms, result = stopwatch(contenders[name])
            del result
            if i >= 0:
                times[name].append(elapsed_ms)
    return {name: median(values) for name, values in times.items()}


def time_prepared(
    contenders: dict[str, Callable[[], Callable[[], Any]]], rounds: int, warmup: int = 1
) -> dict[str, float]:
    """Return medians as ``time_in_turn`` does; each run has an untimed preparation.

    Args:
        contenders: Name -> function that prepares one run, untimed, and returns the function to
            time. The result of the timed function is freed outside the timed part.
        rounds: Number of timed runs of each.
        warmup: Number of untimed rounds before them.
    """
    names = [*contenders]
    times: dict[str, list[float]] = {name: [] for name in names}
    for i in range(-warmup, rounds):
        shift = i % len(names)
        for name in names[shift:] + names[:shift]:
            timed = contenders[name]()
            elapsed_ms, result = stopwatch(timed)
            del timed, result
            if i >= 0:
                times[name].append(elapsed_ms)
    return {name: median(values) for name, values in times.items()}


def copy_gb_per_s(num_bytes: int = 1 << 28, rounds: int = 7) -> float:
    """Measure the device's copy rate, bytes read plus bytes written, with all torch threads."""
    source = torch.ones(num_bytes // 4)
    target = torch.empty_like(source)
    copy_ms = time_in_turn({"copy": lambda: target.copy_(source)}, rounds)["copy"]
    return 2 * num_bytes / copy_ms / 1e6


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
    """Print a table; floats have three significant digits."""
    shown = [[f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in r] for r in rows]
    widths = [max(len(line[i]) for line in [columns, *shown]) for i in range(len(columns))]
    print(f"\n{title}")
    for line in [columns, *shown]:
        print("  " + "  ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=True)))
