"""Stages of ``gpu_acceptance``: what each records, how it times, and where its kernels run."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch

from recis_lightning.ops import backend

ROOT = Path(__file__).resolve().parents[1]
RESULTS = "acceptance.jsonl"


def command_of(stage: str, output: Path, is_dry: bool) -> list[str]:
    """Return the command of a stage's process."""
    command = [sys.executable, "-m", "benchmarks.gpu_acceptance", "--stage", stage]
    return [*command, "--output", str(output), *(["--dry"] if is_dry else [])]


def append_line(output: Path, line: dict[str, Any]) -> None:
    """Append a line of JSON to the results in a folder; it is there whatever happens next."""
    with (output / RESULTS).open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(line) + "\n")


class Stage:
    """One stage's checks and figures.

    Args:
        name: As it is recorded.
        output: Folder of the results.
        is_dry: Whether kernels are interpreted, over the CPU's memory, at tiny sizes.

    Attributes:
        device: Where tables are.
        failed: Names of the checks that did not pass.
    """

    def __init__(self, name: str, output: Path, is_dry: bool) -> None:
        self.name, self.output, self.is_dry = name, output, is_dry
        self.device = torch.device("cpu" if is_dry else "cuda:0")
        self.failed: list[str] = []

    def size(self, full: int, dry: int) -> int:
        """Return the number for a GPU, or the one for a dry run."""
        return dry if self.is_dry else full

    def check(self, name: str, passed: bool, detail: str = "") -> bool:
        """Record whether a check passed, and return it."""
        passed = bool(passed)
        line = {"stage": self.name, "check": name, "passed": passed}
        append_line(self.output, line if passed else {**line, "detail": detail})
        print(f"{'pass' if passed else 'FAIL'} {name} {'' if passed else detail}", flush=True)
        if not passed:
            self.failed.append(name)
        return passed

    def figure(self, name: str, value: float, unit: str, bound: float | None = None) -> None:
        """Record a figure; with a bound, also whether it is met: an upper one but for rates."""
        value = float(f"{value:.5g}")
        append_line(self.output, {"stage": self.name, "figure": name, "value": value, "unit": unit})
        print(f"{name}: {value} {unit}", flush=True)
        if bound is not None and not self.is_dry:
            met = value >= bound if unit.endswith("/s") else value <= bound
            self.check(f"{name} meets {bound} {unit}", met, f"{value} {unit}")

    @contextlib.contextmanager
    def kernels(self) -> Iterator[None]:
        """Have ops run in Triton's kernels, interpreted in a dry run."""
        with backend.use("triton") if self.is_dry else contextlib.nullcontext():
            yield

    def wait(self) -> None:
        """Wait for the GPU."""
        if not self.is_dry:
            torch.cuda.synchronize()

    def ms(self, timed: Callable[[], object], calls: int = 20, warmup: int = 3) -> float:
        """Return the median milliseconds of a call, of three runs of calls without a wait between.

        It is the time of the host or of the GPU, whichever is longer, as in training.
        """
        calls, warmup = self.size(calls, 1), self.size(warmup, 0)
        for _ in range(warmup):
            timed()
        times = []
        for _ in range(self.size(3, 1)):
            self.wait()
            started = time.perf_counter()
            for _ in range(calls):
                timed()
            self.wait()
            times.append((time.perf_counter() - started) / calls * 1e3)
        return median(times)

    @contextlib.contextmanager
    def noise(self, additions: int = 1500) -> Iterator[None]:
        """Keep the GPU busy on another stream, so that warps and programs are late at random."""
        if self.is_dry:
            yield
            return
        side, some = torch.cuda.Stream(), torch.empty(1 << 27, device=self.device)
        other = torch.empty_like(some)
        with torch.cuda.stream(side):
            side.wait_stream(torch.cuda.default_stream())
            for _ in range(additions):
                torch.add(some, 1, out=other)
        yield
        self.wait()


__all__ = ["RESULTS", "ROOT", "Stage", "append_line", "command_of"]
