"""Interruption of a call at any line of the package, and what must hold of its tables then."""

from __future__ import annotations

import dis
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, NamedTuple

import torch

import recis_lightning
from recis_lightning import HashTable
from recis_lightning.eviction import AnyOf, GlobalStepFilter, MaxRows
from tests.helpers.sample_tables import same

_codes: list[CodeType] = []  # kept, so that their ids stay theirs
_offsets: dict[int, frozenset[int]] = {}  # by a code's id
_PACKAGE = str(Path(recis_lightning.__file__).parent)


class Interrupted(BaseException):
    """Stands for Ctrl-C, or an exception that another thread has raised in this one."""


class Counted(NamedTuple):
    """Outcome of ``run_interrupted``.

    Attributes:
        num_points: Places that were passed, up to the one of the interruption.
        was_interrupted: Whether the call got so far, and the exception came out of it.
    """

    num_points: int
    was_interrupted: bool


def run_interrupted(call: Callable[[], Any], at: int) -> Counted:
    """Run a call and raise in it at the place number ``at``: before a line, or at a return.

    Where a signal cannot come, nothing is raised: between a block of ``with`` or ``try`` and what
    leaves it. It comes at the end of the block's last call, within the block.

    Args:
        call: Whatever it does in files of the package counts.
        at: From 0; a negative one interrupts nothing.
    """
    passed = 0

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal passed
        if event == "call":
            return trace if frame.f_code.co_filename.startswith(_PACKAGE) else None
        if event == "return" or (event == "line" and _can_be_interrupted(frame)):
            passed += 1
            if passed == at + 1:
                raise Interrupted
        return trace

    before, hook = sys.gettrace(), sys.unraisablehook
    sys.unraisablehook = lambda unraisable: None  # a finalizer may be what was interrupted
    sys.settrace(trace)
    try:
        call()
    except Interrupted:
        return Counted(passed, True)
    finally:
        sys.settrace(before)
        sys.unraisablehook = hook
    return Counted(passed, False)


def _can_be_interrupted(frame: FrameType) -> bool:
    code = frame.f_code
    offsets = _offsets.get(id(code))  # a hash of code takes long
    if offsets is None:
        _codes.append(code)
        offsets = _offsets[id(code)] = _uninterruptible(code)
    return frame.f_lasti not in offsets


def _uninterruptible(code: CodeType) -> frozenset[int]:
    """Return the offsets of instructions before which no signal comes.

    A NOP opens a block but is not part of it; the first behind a block comes after its last call,
    whose end the block sees; and three times None is how a block of ``with`` is left.
    """
    handlers = {
        at: entry.target
        for entry in dis._parse_exception_table(code)  # type: ignore[attr-defined]
        for at in range(entry.start, entry.end, 2)
    }
    instructions = [one for one in dis.get_instructions(code) if one.opname != "SWAP"]
    offsets = set()
    for number, one in enumerate(instructions):
        before = handlers.get(one.offset - 2)
        following = instructions[number : number + 3]
        if (
            one.opname == "NOP"
            or (before is not None and handlers.get(one.offset) != before)
            or [(i.opname, i.argval) for i in following] == 3 * [("LOAD_CONST", None)]
        ):
            # A SWAP keeps what a block returns, before it is left.
            offsets |= {one.offset, one.offset - 2}
    return frozenset(offsets)


def state_of(table: HashTable, columns: Sequence[str]) -> dict[str, Any]:
    """Return a table's rows by id, with some columns of policies."""
    state = table.get_extra_state()
    order = state["ids"].argsort()
    kept = ["ids", "weights", *(key for key in columns if key in state)]
    rows = {key: state[key][order] for key in kept}
    return {**rows, **{key: slot[order] for key, slot in state["slots"].items()}}


class Case(NamedTuple):
    """Call that is interrupted, and the tables that it changes.

    Attributes:
        tables: Tables of the call.
        call: The call.
        again: Called after it, whether it was interrupted or not; must lead to one state. None if
            a table is as before the call or as after it.
        columns: Columns of policies that are part of the state.
    """

    tables: list[HashTable]
    call: Callable[[], Any]
    again: Callable[[], Any] | None = None
    columns: Sequence[str] = ("last_seen", "counts")


class Expected(NamedTuple):
    """States of a case's tables before its call and after it, and the places that it passes."""

    before: list[dict[str, Any]]
    after: list[dict[str, Any]]
    num_points: int


def expected_of(make: Callable[[], Case]) -> Expected:
    """Run a case without interruption.

    Args:
        make: Makes the case anew, always the same.
    """
    case = make()
    before = [state_of(table, case.columns) for table in case.tables]
    num_points = run_interrupted(case.call, -1).num_points
    after = [state_of(table, case.columns) for table in case.tables]
    return Expected(before, after, num_points)


def faults_of(make: Callable[[], Case], expected: Expected, at: int) -> list[str]:
    """Interrupt a case and name what is wrong with its tables.

    Args:
        make: Makes the case anew, always the same.
        expected: From ``expected_of``.
        at: As for ``run_interrupted``.
    """
    case = make()
    run_interrupted(case.call, at)
    faults = []
    try:
        for table, *states in zip(case.tables, expected.before, expected.after, strict=True):
            faults += _faults_of_table(table, *states, case.columns)
        if case.again is not None and not faults:
            case.again()
            for table, after in zip(case.tables, expected.after, strict=True):
                if not same(state_of(table, case.columns), after):
                    faults.append("the call does not lead where it should when it is made again")
        for table in case.tables:
            faults += _faults_of_use(table)
    except Exception as error:
        faults.append(f"{type(error).__name__}: {error}")
    return faults


def _faults_of_table(
    table: HashTable, before: dict[str, Any], after: dict[str, Any], columns: Sequence[str]
) -> list[str]:
    ids, rows = table.ids_map()
    faults = []
    if not len(table) == ids.numel() == ids.unique().numel() == rows.unique().numel():
        faults.append(f"len {len(table)}, ids {ids.numel()}, of them {ids.unique().numel()} differ")
    if rows.numel() and int(rows.max()) >= table.storage.rows.num_rows:
        faults.append("a row that was never handed out")
    if table.storage.capacity != len(table.storage.entries) - 1:
        faults.append("the header has another index")
    if any(column.numel() < rows.numel() for column in table.storage.columns.values()):
        faults.append("columns are shorter than the rows")
    if int(table.storage.occupied_rows().sum()) != len(table):
        faults.append("freed rows do not fit the ids")
    state = state_of(table, columns)
    if not any(same(state, wanted) for wanted in (before, after)):
        faults.append("neither as before the call nor as after it")
    return faults


def _faults_of_use(table: HashTable) -> list[str]:
    """Insert, read, evict and clear, as whoever goes on after an interruption."""
    table.pending.clear()
    known, rows = table.ids()[:7], torch.arange(300.0)[:, None].expand(300, table.embedding_dim)
    kept = table.embeddings(known)
    fresh = torch.arange(10**9, 10**9 + 300)
    table.insert(fresh, rows)
    faults = []
    if not torch.equal(table.embeddings(fresh), rows.to(table.dtype)):
        faults.append("rows that were inserted later are not there")
    if not torch.equal(table.embeddings(known), kept):
        faults.append("a later insertion changed other rows")
    table.update_step(10)
    table.insert(known, kept)
    table.evict(AnyOf([GlobalStepFilter(1), MaxRows(10**6)]))
    if sorted(table.ids().tolist()) != sorted(known.tolist()) or len(table) != known.numel():
        faults.append("a later eviction left others than it should")
    if not torch.equal(table.embeddings(known), kept):
        faults.append("a later eviction changed rows that stay")
    return faults


__all__ = [
    "Case",
    "Counted",
    "Expected",
    "Interrupted",
    "expected_of",
    "faults_of",
    "run_interrupted",
    "state_of",
]
