"""The notebooks run, cell by cell, without Jupyter; what they keep is of the code they have."""

import json
from pathlib import Path

import pytest
import torch

from examples.notebooks.execute import code_cells, main, run
from tests.helpers.manual import ROOT

pytest.importorskip("matplotlib")
NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def kinds(cell):
    return [output["output_type"] for output in cell["outputs"]]


def check_first_hour(names, printed):
    assert names["trainer"].global_step == 282
    assert 0.6 < names["found"]["auc"] < 0.8
    assert printed[-1] == "True\n"
    assert "Filtered 1 table" in "".join(printed)


def check_next_items(names, printed):
    assert names["rates"].found[-1] > 1.25 * names["popular"]


CHECKS = {"first_hour": check_first_hour, "next_items": check_next_items}


@pytest.mark.slow_except({"path": ROOT / "examples" / "notebooks" / "first_hour.ipynb"})
@pytest.mark.filterwarnings("ignore:.*:UserWarning")  # Lightning's advice for long runs
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_keeps_what_its_cells_gave(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    threads, kept, notebook = torch.get_num_threads(), read(path), read(path)
    torch.set_num_threads(1)
    try:
        names = run(notebook)
    finally:
        torch.set_num_threads(threads)
    cells = code_cells(notebook)
    for before, now in zip(code_cells(kept), cells, strict=True):
        assert kinds(before) == kinds(now), "".join(now["source"])
        assert before["execution_count"] == now["execution_count"]
    outputs = [output for cell in cells for output in cell["outputs"] if "text" in output]
    CHECKS[path.stem](names, ["".join(output["text"]) for output in outputs])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_small_and_linked_from_the_manual(path):
    assert path.stat().st_size < 300_000
    notebook = read(path)
    assert notebook["nbformat"] == 4
    pictures = [o for cell in code_cells(notebook) for o in cell["outputs"] if "data" in o]
    assert pictures
    text = "".join("".join(cell["source"]) for cell in notebook["cells"])
    assert "examples." not in text.replace("recis_lightning/tree/main/examples", "")  # a wheel
    pages = [page.read_text(encoding="utf-8") for page in (ROOT / "docs").glob("*.md")]
    assert any(f"examples/notebooks/{path.name}" in page for page in pages)


def made(*sources):
    cells = [{"cell_type": "code", "source": [source], "outputs": []} for source in sources]
    return {"cells": [{"cell_type": "markdown", "source": ["# A"]}, *cells]}


def test_cells_are_one_program_with_its_prints_logs_and_figures():
    notebook = made(
        "import logging\na = 1",
        "print(a + 1)\nlogging.getLogger('recis_lightning').warning('said')",
        "import matplotlib.pyplot as plt\nplt.plot([1, 2])\nplt.show()",
    )
    assert run(notebook)["a"] == 1
    first, second, third = code_cells(notebook)
    assert first["outputs"] == []
    assert second["outputs"][0]["text"] == ["2\n", "said\n"]
    assert third["outputs"][0]["data"]["image/png"].startswith("iVBOR")
    assert [first["execution_count"], third["execution_count"]] == [1, 3]


def test_a_cell_that_fails_is_named():
    with pytest.raises(RuntimeError, match="cell 2 raised ZeroDivisionError"):
        run(made("a = 0", "1 / a"))


def test_outputs_are_written_into_the_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch, "set_num_threads", lambda num: None)
    path = Path("one.ipynb")
    path.write_text(json.dumps(made("open('left', 'w').close()\nprint(3)")))
    main([str(path)])
    assert code_cells(read(path))[0]["outputs"][0]["text"] == ["3\n"]
    assert [one.name for one in tmp_path.iterdir()] == ["one.ipynb"]  # it ran elsewhere
