"""Ctrl-C at any line of the package, or at any time, and what is then left of a table.

Each row must be as it was before the call or as it is after it, and the table must work on.
"""

from __future__ import annotations

import copy
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor

import recis_lightning
from recis_lightning import DynamicEmbedding, HashTable, checkpoint
from recis_lightning.checkpoint.progress import no_progress
from recis_lightning.eviction import GlobalStepFilter
from recis_lightning.initializers import Uniform
from recis_lightning.optim import SparseAdam
from tests.fuzz.harness import Failed, Part, Tries

PACKAGE = os.path.dirname(recis_lightning.__file__)
TRIES = 6  # of a round
DIM, NUM_KNOWN = 3, 8
SILENT = {"progress": no_progress}


class Trained(NamedTuple):
    """A module, its optimizer, and a folder with their checkpoint; copied before each try."""

    module: DynamicEmbedding
    optimizer: SparseAdam
    folder: Path

    @property
    def table(self) -> HashTable:
        return self.module.table


def trained(rng: random.Random, folder: Path) -> Trained:
    """Return a table with optimizer state, a free row and rows that are due to be evicted."""
    module = DynamicEmbedding(
        DIM, name="t", initializer=Uniform(-1.0, 1.0), eviction=GlobalStepFilter(2)
    )
    optimizer = SparseAdam([module.table], lr=0.1)
    for _ in range(5):
        ids = torch.tensor([rng.randrange(-100, 100) for _ in range(rng.randrange(1, 60))])
        module(ids).pow(2).sum().backward()
        optimizer.step()
        module.table.update_step()
    module.table.delete(module.table.ids()[:1])
    return Trained(module, optimizer, folder)


def copied(trained: Trained, folder: Path) -> Trained:
    return Trained(*copy.deepcopy((trained.module, trained.optimizer)), folder)


# ---- calls to interrupt; ``ids`` are known and new ones

Action = Callable[[Trained, Tensor], Any]


def _insert(on: Trained, ids: Tensor) -> None:
    on.table.insert(ids, torch.full((len(ids), DIM), 7.0))


def _grow(on: Trained, ids: Tensor) -> None:
    many = torch.arange(1000, 1500)
    on.table.insert(many, torch.full((len(many), DIM), 7.0))


def _look_up(on: Trained, ids: Tensor) -> None:
    on.module(ids)


def _train(on: Trained, ids: Tensor) -> None:
    on.module(ids[:NUM_KNOWN]).sum().backward()  # a new id would have a third state between
    on.optimizer.step()


def _evict(on: Trained, ids: Tensor) -> None:
    on.table.evict()


def _delete(on: Trained, ids: Tensor) -> None:
    on.table.delete(ids)


def _compact(on: Trained, ids: Tensor) -> None:
    on.table.compact()


def _clear(on: Trained, ids: Tensor) -> None:
    on.table.clear()


def _load(on: Trained, ids: Tensor) -> None:
    checkpoint.load(on.folder, [on.table], **SILENT)


def _load_state(on: Trained, ids: Tensor) -> None:
    state = on.table.get_extra_state()
    del state["checksum"]  # changed on purpose
    on.table.set_extra_state({**state, "weights": state["weights"] * 2, "step": 77})


ACTIONS: dict[str, Action] = {
    "insert": _insert,
    "grow": _grow,
    "look up": _look_up,
    "train": _train,
    "evict": _evict,
    "delete": _delete,
    "compact": _compact,
    "clear": _clear,
    "load": _load,
    "load a state": _load_state,
}


def rows_of(table: HashTable) -> dict[int, tuple[Any, ...]]:
    """Return by id what a row holds: weights and optimizer state, and when it was last seen."""
    state = table.get_extra_state()
    ids = state["ids"].tolist()
    if len(ids) != len(table) or len(set(ids)) != len(ids):
        raise Failed("len and ids disagree", f"{len(table)} and {len(ids)} ids")
    columns = [state["weights"].tolist(), *(slot.tolist() for slot in state["slots"].values())]
    return dict(zip(ids, zip(*columns, strict=True), strict=True))


# ---- interrupting


def lines_of(call: Callable[[], Any]) -> int:
    """Count the lines of the package that a call runs in this thread."""
    return _traced(call, lambda line: None)


def signal_at_line(number: int, which: int) -> Callable[[int], None]:
    """Return what sends this process a signal at a line, as ``kill`` would."""
    return lambda line: signal.raise_signal(which) if line == number else None


def _traced(call: Callable[[], Any], at_line: Callable[[int], None]) -> int:
    count = 0

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal count
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if event == "line":
            count += 1
            at_line(count)
        return trace

    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(None)
    return count


def interrupt_at_line(call: Callable[[], Any], number: int) -> bool:
    """Run a call and interrupt it at a line; return whether that stopped it."""
    try:
        _traced(call, signal_at_line(number, signal.SIGINT))
    except KeyboardInterrupt:
        return True
    return False


def interrupt_after(call: Callable[[], Any], seconds: float) -> bool:
    """Run a call and interrupt it after a time; return whether that stopped it."""

    def pass_on(number: int, frame: FrameType | None) -> None:
        signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGALRM, pass_on)
    try:
        signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-6))
        try:
            call()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except KeyboardInterrupt:
        return True
    finally:
        signal.signal(signal.SIGALRM, before)
    return False


# ---- what must hold afterwards


def check_rows(
    found: dict[int, Any], before: dict[int, Any], after: dict[int, Any], stopped: bool
) -> None:
    """Raise unless each row is as before or as after; as after, if nothing stopped the call."""
    if not stopped and found != after:
        raise Failed("an interrupt that came too late changed the result")
    lost = (before.keys() & after.keys()) - found.keys()
    if lost:
        raise Failed("ids are lost", f"{len(lost)} of {len(before)}")
    strange = found.keys() - before.keys() - after.keys()
    if strange:
        raise Failed("ids that nobody gave", f"{len(strange)}")
    for i, row in found.items():
        if row not in (before.get(i), after.get(i)):
            shown = f"id {i} holds {row}, before {before.get(i)}, after {after.get(i)}"
            raise Failed("a row is neither as before nor as after", shown)


def check_works(on: Trained) -> None:
    """Raise unless a table can be used further."""
    on.optimizer.zero_grad()
    held = on.table.ids()
    found = on.table.embeddings(held)
    ids = torch.cat([held, torch.arange(5000, 5400)]).unique()
    values = ids[:, None].expand(-1, DIM).float() % 97
    on.table.insert(ids, values)
    if len(on.table) != len(ids) or not torch.equal(on.table.embeddings(ids), values):
        raise Failed("inserted rows are not there", f"{len(on.table)} for {len(ids)}")
    on.module(ids).sum().backward()
    on.optimizer.step()
    moved = on.table.embeddings(ids)
    if not (moved.isfinite().all() and (moved != values).all()):
        raise Failed("a step does not train the rows")
    on.table.update_step(10)
    if int(on.table.evict()) != len(ids) or len(on.table):
        raise Failed("an eviction leaves rows")
    on.table.insert(held, found)
    if not torch.equal(on.table.embeddings(held), found):
        raise Failed("inserted rows are not there", "after an eviction")


def _interrupted(rng: random.Random, call: Callable[[Any], Any], make: Callable[[], Any]) -> Any:
    """Interrupt a call; return what it was called on, where, and whether that stopped it."""
    subject, other = make(), make()
    if rng.random() < 0.7:
        number = rng.randrange(1, max(lines_of(lambda: call(other)), 1) + 1)
        return subject, f"at line {number}", interrupt_at_line(lambda: call(subject), number)
    start = time.perf_counter()
    call(other)
    seconds = rng.random() * 1.2 * (time.perf_counter() - start)
    return subject, "by a timer", interrupt_after(lambda: call(subject), seconds)


def run_round(rng: random.Random, folder: Path, tries: Tries) -> None:
    """Interrupt several calls on copies of one table."""
    torch.manual_seed(0)
    first = trained(rng, folder / "saved")
    checkpoint.save(first.folder, [first.table], **SILENT)
    _insert(first, torch.arange(60))  # so that loading changes something
    known = first.table.ids().tolist()
    for _ in range(TRIES):
        ids = torch.tensor(
            rng.sample(known, NUM_KNOWN) + [rng.randrange(2000, 3000) for _ in range(8)]
        )
        name = rng.choice([*ACTIONS, "save"])
        with tries.attempt(f"{name} interrupted"):
            if name == "save":
                _interrupt_save(rng, first, ids, folder)
            else:
                _interrupt_action(rng, first, ids, ACTIONS[name])


def _interrupt_action(rng: random.Random, first: Trained, ids: Tensor, action: Action) -> None:
    done = copied(first, first.folder)
    before = rows_of(done.table)
    action(done, ids)
    after = rows_of(done.table)
    on, how, stopped = _interrupted(
        rng, lambda on: action(on, ids), lambda: copied(first, first.folder)
    )
    try:
        check_rows(rows_of(on.table), before, after, stopped)
        check_works(on)
    except Failed as error:
        raise Failed(error.kind, f"{how}: {error.detail}") from None
    except Exception as error:
        raise Failed("a table does not work on", f"{how}: {error!r}") from None


def _interrupt_save(rng: random.Random, first: Trained, ids: Tensor, folder: Path) -> None:
    def make() -> Trained:
        on = copied(first, folder / f"save-{rng.randrange(2**40)}")
        checkpoint.save(on.folder, [on.table], **SILENT)
        _insert(on, ids)
        return on

    on, how, stopped = _interrupted(
        rng, lambda on: checkpoint.save(on.folder, [on.table], **SILENT), make
    )
    loaded = HashTable(DIM, name="t", eviction=GlobalStepFilter(2))
    optimizer = SparseAdam([loaded], lr=0.1)
    try:
        checkpoint.load(on.folder, [loaded], **SILENT)
        before, after, found = rows_of(first.table), rows_of(on.table), rows_of(loaded)
        if found != after and (found != before or not stopped):
            raise Failed("a checkpoint is neither the one before nor the one after")
        checkpoint.save(on.folder, [on.table], **SILENT)
        checkpoint.load(on.folder, [loaded], **SILENT)
        if rows_of(loaded) != after:
            raise Failed("the save after an interrupted one is another")
    except (Failed, ValueError, OSError, RuntimeError) as error:
        kind = error.kind if isinstance(error, Failed) else "a checkpoint does not load"
        raise Failed(f"{kind} (save)", f"{how}: {error}") from None
    finally:
        del optimizer


def warm_up() -> None:
    """Compile what the calls need."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        first = trained(random.Random(0), Path(folder) / "saved")
        checkpoint.save(first.folder, [first.table], **SILENT)
        for action in ACTIONS.values():
            action(copied(first, first.folder), torch.arange(20))
        check_works(first)


PART = Part("interrupts", "Ctrl-C at any line, or time", run_round, warm_up)
