"""Tests of the code and the links in README and docs."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"


@pytest.mark.filterwarnings("ignore:.*:UserWarning")  # Lightning's advice for long runs
def test_the_example_runs(tmp_path, monkeypatch, capfd):
    example = re.search(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert example is not None
    monkeypatch.chdir(tmp_path)
    exec(compile(example[1], str(README), "exec"), {"__name__": "readme"})


def test_the_policy_examples_run():
    page = README.parent / "docs" / "policies.md"
    examples = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    assert len(examples) == 5
    exec(compile("\n".join(examples), str(page), "exec"), {"__name__": "policies"})


def test_the_data_example_runs(capsys):
    page = README.parent / "docs" / "data.md"
    examples = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    names = {"__name__": "data"}
    exec(compile("\n".join(examples), str(page), "exec"), names)
    assert names["features"](names["request"])["capital"].tolist() == [1]
    lengths, *windows, stream = capsys.readouterr().out.splitlines()
    assert sum(map(int, re.findall(r"\d+", lengths))) == 3  # lengths 2, 0, 1
    assert windows == [f"2026-11-{day} tensor([1, 2, 3])" for day in (29, 30)]
    assert stream == "2026-11-30.parquet 6"


def test_the_serving_examples_run():
    page = README.parent / "docs" / "serving.md"
    examples = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    assert len(examples) == 8
    exec(compile("\n".join(examples), str(page), "exec"), {"__name__": "serving_page"})


def test_the_retrieval_example_runs():
    page = README.parent / "docs" / "retrieval.md"
    training, index = re.findall(
        r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL
    )
    names = {"__name__": "retrieval_page"}
    exec(compile(training, str(page), "exec"), names)
    pytest.importorskip("faiss")
    exec(compile(index, str(page), "exec"), names)
    assert set(names["ids"].flat) <= {10, 20}


def test_linked_files_exist():
    text = README.read_text(encoding="utf-8")
    for path in re.findall(r"\]\((?!http)([^)#]+)\)|(examples/[\w./]+\.\w+)", text):
        assert (README.parent / "".join(path)).exists(), path
