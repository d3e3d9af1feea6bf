"""Interruption at any line: a table is as before the call or as after it."""

import pytest
import torch

from recis_lightning import HashTable
from recis_lightning.ops import host_memory
from recis_lightning.optim import first_step
from recis_lightning.table.undo import Undo
from tests.helpers.interrupted_cases import LARGE, SMALL
from tests.helpers.interruptions import expected_of, faults_of


class _Part:
    size = 1


@pytest.fixture(autouse=True)
def _fast(monkeypatch):
    """Small launches on one thread, and no search for a Trainer before each optimizer's first."""
    monkeypatch.setattr(first_step, "_listeners", [])
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _check(make, num_points):
    """Interrupt a case at so many places, spread over it."""
    expected_of(make)  # compiles kernels, whose lines are no places of the call
    expected = expected_of(make)
    assert expected.num_points > 5
    assert faults_of(make, expected, -1) == []
    stride = max(expected.num_points // num_points, 1)
    broken = {
        at: faults
        for at in range(stride // 2, expected.num_points, stride)
        if (faults := faults_of(make, expected, at))
    }
    assert not broken, f"{len(broken)} of {expected.num_points // stride}: {broken}"


def _name(make):
    return make.__name__


@pytest.mark.parametrize("make", SMALL, ids=_name)
def test_an_interrupted_call_is_undone_or_done(make):
    """Every case at a few places; at many, if slow tests run."""
    _check(make, 16)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("make", SMALL, ids=_name)
def test_an_interrupted_call_is_undone_or_done_at_many_places(make):
    _check(make, 120)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("make", LARGE, ids=_name)
def test_a_large_insertion_is_undone_or_done(make):
    _check(make, 40)


def _change_and_fail(part, undo):
    with undo:
        part.size = 3
        raise ValueError


def test_callbacks_run_last_first_and_twice_if_interrupted():
    """Putting back begins again if it is interrupted itself."""
    part, calls = _Part(), []
    part.size = 2

    def note():
        calls.append("first")
        if len(calls) == 2:
            raise KeyboardInterrupt

    undo = Undo([part], [])
    undo.on_failure(note)
    undo.on_failure(lambda: calls.append("last"))
    with pytest.raises(KeyboardInterrupt):
        _change_and_fail(part, undo)
    assert calls == ["last", "first", "last", "first"]
    assert part.size == 2


def test_what_succeeds_stays():
    part, calls = _Part(), []
    with Undo([part], []) as undo:
        undo.on_failure(lambda: calls.append(1))
        part.size = 3
    assert part.size == 3
    assert calls == []


@pytest.mark.parametrize("failing", range(6))
def test_an_insertion_that_finds_no_memory_changes_nothing(failing, monkeypatch):
    """Whichever of the allocations for index, rows and columns fails."""
    table, original, calls = HashTable(4), host_memory.empty, []
    table.insert(torch.arange(20), torch.ones(20, 4))

    def empty(num_bytes):
        calls.append(num_bytes)
        if len(calls) == failing + 1:
            raise MemoryError(f"{num_bytes} bytes")
        return original(num_bytes)

    ids = torch.arange(10, 300_000)
    monkeypatch.setattr(host_memory, "empty", empty)
    try:
        table.insert(ids, torch.ones(1, 4).expand(ids.numel(), 4))
    except MemoryError:
        assert len(table) == 20
        assert table.ids().tolist() == list(range(20))
    else:
        assert len(calls) <= failing
        assert len(table) == 300_000
    monkeypatch.undo()
    table.insert(ids, torch.ones(1, 4).expand(ids.numel(), 4))
    assert len(table) == 300_000
    assert torch.equal(table.embeddings(ids), torch.ones(ids.numel(), 4))
