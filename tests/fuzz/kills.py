"""Processes that are killed while they save: the checkpoint is whole and no older than the last."""

from __future__ import annotations

import contextlib
import os
import random
import select
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from recis_lightning import HashTable, checkpoint
from recis_lightning.optim import SparseAdam
from tests.fuzz.harness import Failed, Part, Tries
from tests.fuzz.interrupts import PACKAGE, SILENT

LIVES = 4  # of a round: processes that go on saving to one folder
IDS = torch.arange(-60, 60)
_FIRST_WORD_SECONDS = 20.0


def tables() -> tuple[list[HashTable], SparseAdam]:
    made = [HashTable(3, name=name) for name in ("a", "b")]
    return made, SparseAdam(made, lr=0.1)


def save_numbers(folder: Path, first: int, pipe: int, kill_at_line: int) -> None:
    """Save tables full of one number, then of the next, and tell each; die at a line."""
    made, _optimizer = tables()
    if kill_at_line:
        count = 0

        def trace(frame: FrameType, event: str, argument: Any) -> Any:
            nonlocal count
            if not frame.f_code.co_filename.startswith(PACKAGE):
                return None
            count += event == "line"
            if count == kill_at_line:
                os.kill(os.getpid(), signal.SIGKILL)
            return trace

    for number in range(first, first + 10_000):
        for table in made:
            table.insert(IDS, torch.full((len(IDS), 3), float(number)))
            table.update_step(number - table.step)
        if number == first + 1 and kill_at_line:
            sys.settrace(trace)
        checkpoint.save(folder, made, **SILENT)
        os.write(pipe, b"%d " % number)


def live(folder: Path, first: int, kill_at_line: int, seconds: float) -> int:
    """Let a process save until it is killed; return the last number that it told."""
    ours, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            save_numbers(folder, first, theirs, kill_at_line)
        except BaseException as error:
            with contextlib.suppress(OSError):
                os.write(theirs, b"!%s: %s" % (type(error).__name__.encode(), str(error).encode()))
        finally:
            os._exit(status)
    os.close(theirs)
    told, end = b"", time.monotonic() + _FIRST_WORD_SECONDS
    try:
        while select.select([ours], [], [], max(end - time.monotonic(), 0))[0]:
            word = os.read(ours, 4096)
            if not word:
                break
            if not told and not kill_at_line:
                end = time.monotonic() + seconds
            told += word
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    while word := os.read(ours, 4096):
        told += word
    os.close(ours)
    numbers, _, error = told.partition(b"!")
    if error:
        raise Failed("saving fails after a kill", error.decode(errors="replace"))
    # A number that was cut short cannot be: a write to a pipe of so few bytes is whole.
    return max(map(int, numbers.split()), default=first - 1)


def check_saved(folder: Path, told: int, how: str) -> int:
    """Raise unless the folder holds the last save that was told, or the next; return which."""
    made, _optimizer = tables()
    try:
        checkpoint.load(folder, made, **SILENT)
    except Exception as error:
        raise Failed("nothing loads after a kill", f"{how}: {error}") from None
    steps = {table.step for table in made}
    whole = all(
        table.ids().sort().values.equal(IDS) and bool((table.embeddings(IDS) == table.step).all())
        for table in made
    )
    if len(steps) != 1 or not whole:
        raise Failed("a checkpoint of several saves", f"{how}: steps {sorted(steps)}")
    (step,) = steps
    if not told <= step <= told + 1:
        raise Failed("a save is lost", f"{how}: found {step}, told {told}")
    return step


def run_round(rng: random.Random, folder: Path, tries: Tries) -> None:
    """Let a few processes one after the other save to a folder, and kill each."""
    saved, number = folder / "saved", 0
    made, _optimizer = tables()
    for table in made:
        table.insert(IDS, torch.zeros(len(IDS), 3))
    checkpoint.save(saved, made, **SILENT)
    for _ in range(LIVES):
        at_line = rng.randrange(1, 3000) if rng.random() < 0.6 else 0
        seconds = rng.uniform(0.0, 0.1)
        how = f"at line {at_line}" if at_line else f"after {seconds * 1000:.0f} ms"
        with tries.attempt(f"killed {how}"):
            told = live(saved, number + 1, at_line, seconds)
            number = check_saved(saved, told, how)


PART = Part("kills", "SIGKILL of a process that saves", run_round)
