"""Rounds of a part, in child processes: a crash or a hang is a finding like any other."""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

_FORK = multiprocessing.get_context("fork")
_START_SECONDS = 300  # with an empty cache, kernels are compiled in the first child
_MEMORY_BYTES = 8 << 30  # more than a child has when it starts
_PR_SET_PDEATHSIG = 1  # of Linux: a child that hangs must not outlive its parent
_SHOWN = 3  # findings of one kind that are printed


@dataclass(frozen=True)
class Finding:
    """What did not hold, in the round of a seed."""

    seed: int
    kind: str
    detail: str


@dataclass
class Report:
    """Counts of a part."""

    part: str
    tried: int = 0
    findings: list[Finding] = field(default_factory=list)

    def line(self) -> str:
        held = self.tried - len(self.findings)
        return f"{self.part}: {self.tried} tried, {held} held, {len(self.findings)} findings"

    def details(self) -> list[str]:
        """List findings by kind, the commonest first, with the seeds that repeat them."""
        kinds = defaultdict(list)
        for finding in self.findings:
            kinds[finding.kind].append(finding)
        lines = []
        for kind, found in sorted(kinds.items(), key=lambda item: -len(item[1])):
            lines.append(f"  {len(found)} x {kind}")
            lines += [f"      seed {each.seed}: {each.detail}" for each in found[:_SHOWN]]
        return lines


class Failed(Exception):
    """Raised by a try that did not hold.

    Args:
        kind: Names the fault, the same words for each case of it.
        detail: The case.
    """

    def __init__(self, kind: str, detail: str = "") -> None:
        super().__init__(kind, detail)
        self.kind, self.detail = kind, detail


class Tries:
    """Tells the parent what a round is about to try, and what did not hold."""

    def __init__(self, pipe: Connection, seed: int) -> None:
        self._pipe, self._seed = pipe, seed
        self.what = ""

    @contextlib.contextmanager
    def attempt(self, what: str):
        """Count one try; an exception in it is a finding, and ends the round if it is unknown."""
        self.what = what
        self._pipe.send(("try", self._seed, what))
        try:
            yield
        except Failed as error:
            self._fail(error.kind, error.detail)
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(place.filename).name}:{place.lineno}"
            self._fail(f"{type(error).__name__} at {where}", str(error).partition("\n")[0])
            raise EndRound from None

    def _fail(self, kind: str, detail: str) -> None:
        text = f"{self.what}: {detail}" if detail else self.what
        self._pipe.send(("finding", self._seed, kind, text[:500]))


class EndRound(Exception):
    """Ends a round whose state is no longer known; what was wrong has been told."""


@dataclass(frozen=True)
class Part:
    """A kind of fault to look for.

    Attributes:
        name: In reports and for ``--part``.
        about: What is tried, in a line.
        round: Tries a few things, the same ones for the same seed.
        warm_up: Compiles the kernels that rounds need.
    """

    name: str
    about: str
    round: Callable[[random.Random, Path, Tries], None]
    warm_up: Callable[[], None] = lambda: None


def run_part(
    part: Part,
    seed: int,
    seconds: float = float("inf"),
    rounds: int | None = None,
    try_seconds: float = 30.0,
) -> Report:
    """Run rounds of the seeds from ``seed`` on, for a time or a number of rounds."""
    report, end_seed = Report(part.name), seed + (sys.maxsize if rounds is None else rounds)
    end: float | None = None
    while seed < end_seed and (end is None or time.monotonic() < end):
        with _Child(part, seed, end_seed) as child:
            if not child.is_ready():
                report.tried += 1
                report.findings.append(Finding(seed, "did not start", child.cause()))
                return report
            if end is None:
                end = time.monotonic() + seconds
            seed = _listen(child, report, seed, end, try_seconds)
    return report


def _listen(child: _Child, report: Report, seed: int, end: float, try_seconds: float) -> int:
    """Take a child's words until it ends; return the seed of the first round it did not see."""
    running = ""
    while True:
        left = min(try_seconds, end - time.monotonic())
        try:
            word: tuple[Any, ...] | None = child.pipe.recv() if child.wait(max(left, 0)) else None
        except (EOFError, OSError):  # it is dead, or done
            cause = child.cause()
            if cause != "exit status 0":
                report.tried += not running
                report.findings.append(Finding(seed, f"crash: {cause}", running + child.place()))
                return seed + 1
            return sys.maxsize
        if word is None:
            if left < try_seconds:  # the time is over, not the patience
                report.tried -= bool(running)
                return sys.maxsize
            report.tried += not running
            report.findings.append(Finding(seed, f"no answer in {try_seconds:g} s", running))
            return seed + 1
        if word[0] == "try":
            report.tried += 1
            seed, running = word[1], word[2]
        elif word[0] == "finding":
            report.findings.append(Finding(*word[1:]))
        else:
            seed, running = word[1], ""


class _Child:
    """Process that runs rounds until it is killed, in a group and a folder of its own."""

    def __init__(self, part: Part, seed: int, end_seed: int) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
        self.pipe, theirs = _FORK.Pipe(duplex=False)
        arguments = (part, seed, end_seed, self.folder, self.pipe, theirs)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # fork beside threads
            self.process = _FORK.Process(target=_run_rounds, args=arguments)
            self.process.start()
        theirs.close()

    def __enter__(self) -> _Child:
        return self

    def __exit__(self, *exception: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        self.process.join()
        self.pipe.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def wait(self, seconds: float) -> bool:
        return self.pipe.poll(seconds)

    def is_ready(self) -> bool:
        """Wait until it has warmed up; return whether it has."""
        try:
            return self.wait(_START_SECONDS) and self.pipe.recv() == ("ready",)
        except EOFError:
            return False

    def place(self) -> str:
        """Return the line of Python in which it crashed, if that is known."""
        for line in (self.folder / "stderr").read_text(errors="replace").splitlines():
            if line.startswith('  File "'):
                return f", {'/'.join(line[8:].split('/')[-2:])}"
        return ""

    def cause(self) -> str:
        """Say how it ended."""
        self.process.join(10)
        code = self.process.exitcode
        if code is None:
            return "it runs, but says nothing"
        if code < 0:
            return signal.Signals(-code).name
        errors = (self.folder / "stderr").read_text(errors="replace").strip().splitlines()
        return f"exit status {code}" + (f", {errors[-1][:200]}" if code and errors else "")


def _run_rounds(
    part: Part, seed: int, end_seed: int, folder: Path, theirs: Connection, pipe: Connection
) -> None:
    theirs.close()
    os.setpgid(0, 0)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    stderr = os.open(folder / "stderr", os.O_WRONLY | os.O_CREAT, 0o600)
    os.dup2(stderr, 2)
    sys.stderr = os.fdopen(stderr, "w", buffering=1)
    faulthandler.enable(sys.stderr)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    _limit_memory()
    part.warm_up()
    pipe.send(("ready",))
    while seed < end_seed:
        place = folder / str(seed)
        place.mkdir()
        with contextlib.suppress(EndRound):
            part.round(random.Random(seed), place, Tries(pipe, seed))
        shutil.rmtree(place, ignore_errors=True)
        seed += 1
        pipe.send(("round", seed))


def _limit_memory() -> None:
    """Let a wild allocation fail here, rather than end other processes of the machine."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + _MEMORY_BYTES
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    if hard == resource.RLIM_INFINITY or limit < hard:
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
