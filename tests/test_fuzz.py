"""The fuzz harness itself: each part runs, and planted faults are found and reported.

What the parts find in the package is not judged here: that is for ``make fuzz``.
"""

import os
import shutil
import signal
import time

import pytest
import torch

from recis_lightning import HashTable, checkpoint
from tests.fuzz import api, checkpoints, interrupts, kills
from tests.fuzz.__main__ import PARTS, main
from tests.fuzz.harness import Failed, Part, run_part


def kinds(report):
    return {finding.kind for finding in report.findings}


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.name)
def test_each_part_runs(part):
    report = run_part(part, seed=0, rounds=1, try_seconds=20)
    assert report.tried > 0
    assert len(report.findings) <= report.tried
    assert {finding.seed for finding in report.findings} <= {0}
    ours = ("api.py", "checkpoints.py", "interrupts.py", "kills.py", "forms.py", "shards.py")
    own_errors = [kind for kind in kinds(report) for name in ours if f" at {name}" in kind]
    assert not own_errors
    assert "did not start" not in kinds(report)


def wrong_rows(self, ids, right=HashTable.embeddings):
    rows = right(self, ids)
    rows.view(-1, self.embedding_dim)[-1:] += 1
    return rows


def test_a_wrong_row_is_found_and_its_seed_repeats_it(monkeypatch):
    monkeypatch.setattr(HashTable, "embeddings", wrong_rows)
    calls = dict.fromkeys([api.let_time_pass, api.insert, api.take_a_step], 1)
    monkeypatch.setattr(api, "CALLS_BY_WEIGHT", calls)
    part = Part("api", "", api.run_round)
    report = run_part(part, seed=0, rounds=3)
    assert [(finding.seed, finding.kind) for finding in report.findings] == [
        (seed, "wrong rows") for seed in range(3)
    ]
    again = run_part(part, seed=1, rounds=1)
    assert again.findings == report.findings[1:2]


def test_an_answer_that_changes_the_table_is_found(monkeypatch):
    """A bad call that inserts before it raises is told from one that is refused in time."""
    right = HashTable.insert

    def wrong(self, ids, embeddings):
        right(self, ids, embeddings)
        raise ValueError("too late")

    def bad_call(rng, kind, module, tables):
        ids, rows = torch.tensor([2**50]), torch.ones(1, tables[0].embedding_dim)
        return "an insert", lambda: tables[0].insert(ids, rows)

    monkeypatch.setattr(HashTable, "insert", wrong)
    monkeypatch.setattr(api.bad_calls, "choose", bad_call)
    monkeypatch.setattr(api, "CALLS_BY_WEIGHT", {api.call_badly: 1})
    report = run_part(Part("api", "", api.run_round), seed=0, rounds=1)
    assert kinds(report) == {"a bad call changed a table"}


def test_a_swallowed_flip_is_found(monkeypatch):
    right = checkpoint.load

    def wrong(path, tables, **options):
        try:
            right(path, tables, **options)
        except ValueError:
            tables[0].insert(tables[0].ids()[:1], tables[0].embeddings(tables[0].ids()[:1]) + 1)

    monkeypatch.setattr(checkpoint, "load", wrong)
    monkeypatch.setattr(checkpoints.mutations, "replace_file", lambda rng, file: "nothing")
    report = run_part(Part("checkpoints", "", checkpoints.run_round), seed=0, rounds=1)
    assert "a damaged checkpoint loads other rows" in kinds(report)


def test_a_torn_insert_is_found(monkeypatch):
    right = HashTable.insert

    def wrong(self, ids, embeddings):
        for _ in range(20):
            right(self, ids, embeddings * 0)
        right(self, ids, embeddings)

    monkeypatch.setattr(HashTable, "insert", wrong)
    monkeypatch.setattr(interrupts, "ACTIONS", {"insert": interrupts.ACTIONS["insert"]})
    report = run_part(Part("interrupts", "", interrupts.run_round), seed=0, rounds=2)
    assert "a row is neither as before nor as after" in kinds(report)


def test_a_save_that_first_removes_the_last_is_found(monkeypatch):
    right = checkpoint.save

    def wrong(folder, tables, **options):
        shutil.rmtree(folder, ignore_errors=True)
        right(folder, tables, **options)

    monkeypatch.setattr(checkpoint, "save", wrong)
    report = run_part(Part("kills", "", kills.run_round), seed=0, rounds=2)
    assert "nothing loads after a kill" in kinds(report)


# ---- reports


def planted(name, fault):
    """Return a part whose rounds try two things; the second of each even seed has a fault."""

    def run_round(rng, folder, tries):
        even = int(folder.name) % 2 == 0
        with tries.attempt("the first"):
            pass
        with tries.attempt("the second"):
            if even:
                fault()

    return Part(name, "planted", run_round)


def crash():
    os.kill(os.getpid(), signal.SIGSEGV)


def fail():
    raise Failed("wrong number", "7 for 8")


def leave():
    os._exit(3)


@pytest.mark.parametrize(
    ("fault", "kind", "patience"),
    [
        (crash, "crash: SIGSEGV", "30"),
        (leave, "crash: exit status 3", "30"),
        (lambda: time.sleep(60), "no answer in 0.5 s", "0.5"),
        (lambda: {}["key"], "KeyError at test_fuzz.py", "30"),
        (fail, "wrong number", "30"),
    ],
    ids=["crash", "exit", "hang", "exception", "wrong value"],
)
def test_a_fault_is_counted_and_the_rest_is_tried(fault, kind, patience, capsys):
    options = ["--rounds", "3", "--seed", "4", "--try-seconds", patience]
    assert main(options, [planted("part", fault)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "part: 6 tried, 4 held, 2 findings (planted)"
    assert lines[1].startswith(f"  2 x {kind}")
    assert [line.split(":")[0] for line in lines[2:4]] == ["      seed 4", "      seed 6"]
    assert "the second" in lines[2]
    assert (
        lines[4]
        == "  repeat a finding with: python -m tests.fuzz --part part --seed SEED --rounds 1"
    )


def test_what_holds_exits_with_0(capsys):
    parts = [planted("one", lambda: None), planted("two", lambda: None)]
    assert main(["--rounds", "2"], parts) == 0
    assert capsys.readouterr().out == (
        "one: 4 tried, 4 held, 0 findings (planted)\ntwo: 4 tried, 4 held, 0 findings (planted)\n"
    )


def test_time_ends_a_part(capsys):
    start = time.monotonic()
    assert main(["--minutes", "0.01"], [planted("part", lambda: None)]) == 0
    assert time.monotonic() - start < 30
    assert int(capsys.readouterr().out.split()[1]) > 2


def test_trying_nothing_is_no_success(capsys):
    part = Part("idle", "planted", lambda rng, folder, tries: None)
    assert main(["--rounds", "1"], [part]) == 1
    assert "0 tried" in capsys.readouterr().out


def test_a_part_that_cannot_start_is_a_finding():
    def warm_up():
        raise OSError("no kernels")

    report = run_part(Part("part", "", lambda rng, folder, tries: None, warm_up), 0, rounds=1)
    assert report.line() == "part: 1 tried, 0 held, 1 findings"
    assert kinds(report) == {"did not start"}
    assert "no kernels" in report.findings[0].detail
