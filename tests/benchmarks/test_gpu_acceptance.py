"""The command for the first minutes on a GPU, run dry: stages, limits, what a fault looks like."""

import json
import os
import re
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_acceptance, gpu_checks, gpu_stage
from benchmarks.gpu_dangers import DANGERS, ONLY_ON_GPU
from benchmarks.harness import ROOT

pytestmark = pytest.mark.interpreted
QUICK = ("machine", "races")


def lines_of(folder):
    return [json.loads(line) for line in (folder / gpu_stage.RESULTS).read_text().splitlines()]


def outcomes(folder):
    return {line["stage"]: line["outcome"] for line in lines_of(folder) if "outcome" in line}


@pytest.mark.parametrize(
    "names",
    [
        QUICK,
        *(
            pytest.param((name,), marks=pytest.mark.slow, id=name)
            for name in gpu_acceptance.PLANS
            if name not in QUICK
        ),
    ],
)
def test_stages_pass_interpreted(tmp_path, names):
    """A process each, whose checks all pass; every stage checks or measures something."""
    arguments = ["--dry", "--output", str(tmp_path), "--stages", *names]
    status = gpu_acceptance.main(arguments)
    lines = lines_of(tmp_path)
    assert [line for line in lines if not line.get("passed", True)] == []
    assert status == 0
    assert outcomes(tmp_path) == dict.fromkeys(names, "passed")
    for name in names:
        assert any(line["stage"] == name and {"check", "figure"} & {*line} for line in lines)
    checked = {line["check"] for line in lines if line["stage"] == "dangers" and "check" in line}
    assert checked == ({*DANGERS} - {*ONLY_ON_GPU} if "dangers" in names else set())
    assert sorted(os.listdir(tmp_path)) == ["acceptance.jsonl", "acceptance.log"]


def test_a_wrong_row_fails(tmp_path, monkeypatch):
    """What an insertion that loses ids would look like."""
    stage = gpu_stage.Stage("races", tmp_path, is_dry=True)
    insert = gpu_checks.insert_initial
    monkeypatch.setattr(gpu_checks, "insert_initial", lambda table, ids: insert(table, ids[::2]))
    gpu_checks.races(stage)
    assert len(stage.failed) >= 2
    assert sum(not line["passed"] for line in lines_of(tmp_path)) == len(stage.failed)


def test_a_wrong_update_fails(tmp_path, monkeypatch):
    """What gradients that are added twice would look like."""
    stage = gpu_stage.Stage("long rows", tmp_path, is_dry=True)
    step, count = gpu_checks.SparseRowwiseAdagrad.step, iter(range(10**9))

    def sometimes_twice(self):
        if next(count) % 4 == 3:
            for group in self.param_groups:
                group["lr"] *= 2
        step(self)

    monkeypatch.setattr(gpu_checks.SparseRowwiseAdagrad, "step", sometimes_twice)
    ids, gradient = torch.arange(40) % 4, torch.ones(40, 4)
    with stage.kernels():
        gpu_checks._check_twice(stage, gpu_checks.SparseRowwiseAdagrad, ids, gradient, 4)
        assert len(stage.failed) == 1
        next(count), next(count)
        gpu_checks._check_rowwise(stage, ids, gradient, 4)
    assert len(stage.failed) == 2


@pytest.fixture
def processes(monkeypatch):
    """Have stages run programs of the test's own: name -> text."""
    programs = {}

    def command(name, output, is_dry):
        return [sys.executable, "-c", programs.get(name, "")]

    monkeypatch.setattr(gpu_acceptance, "command_of", command)
    return programs


def test_no_figures_where_results_are_wrong(tmp_path, processes, capsys):
    processes["races"] = "raise SystemExit(1)"
    processes["tests"] = "import os; os.abort()"  # as a dead CUDA context may end
    assert gpu_acceptance.main(["--output", str(tmp_path)]) == 1
    found = outcomes(tmp_path)
    assert list(found) == list(gpu_acceptance.PLANS)
    wrong = {name for name, outcome in found.items() if outcome == "FAILED"}
    assert wrong == {"races", "tests"}
    skipped = {name for name, outcome in found.items() if outcome == "skipped: races failed"}
    assert skipped == {"profile", "published", "skew", "tune"}
    assert "4 of 10 stages passed" in capsys.readouterr().out


def test_other_failures_leave_figures(tmp_path, processes):
    processes["tests"] = "raise SystemExit(1)"
    assert gpu_acceptance.main(["--output", str(tmp_path)]) == 1
    assert [name for name, outcome in outcomes(tmp_path).items() if outcome != "passed"] == [
        "tests"
    ]


def test_a_stage_that_takes_too_long_ends_with_its_children(tmp_path, processes, monkeypatch):
    said = tmp_path / "child"
    processes["smoke"] = (
        "import subprocess, sys, time\n"
        f"child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"open({str(said)!r}, 'w').write(str(child.pid)); time.sleep(60)"
    )
    plan = gpu_acceptance.PLANS["smoke"]
    monkeypatch.setitem(gpu_acceptance.PLANS, "smoke", plan._replace(limit=3))
    arguments = ["--output", str(tmp_path), "--stages", "smoke", "profile"]
    assert gpu_acceptance.main(arguments) == 1
    assert outcomes(tmp_path) == {"smoke": "took too long", "profile": "skipped: smoke failed"}
    child = int(said.read_text())
    for _ in range(100):
        with suppress(FileNotFoundError, ProcessLookupError):
            if Path(f"/proc/{child}/stat").read_text().split()[2] != "Z":
                time.sleep(0.05)
                continue
        break
    else:
        pytest.fail("the child runs on")


def test_the_limit_holds_for_all(tmp_path, processes, monkeypatch):
    monkeypatch.setattr(gpu_acceptance, "LIMIT_SECONDS", 15)
    processes["machine"] = "import time; time.sleep(0.1)"
    assert gpu_acceptance.main(["--output", str(tmp_path), "--stages", "machine", "races"]) == 1
    assert outcomes(tmp_path)["races"] == "skipped: out of time"


def test_groups_of_tests_name_tests_that_there_are():
    """A group without a test would fail on the GPU only."""
    texts = [path.read_text() for path in (ROOT / "tests").rglob("test_*.py")]
    marked = [text for text in texts if "pytest.mark.gpu" in text]
    names = re.findall(r"^(?:async )?def (test_\w+)|^(test_\w+) =", "\n".join(marked), re.MULTILINE)
    names = [one or other for one, other in names]
    for group in gpu_checks._GROUPS:
        for word in group.split(" or "):
            assert any(word in name for name in names), word
