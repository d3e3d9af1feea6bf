"""The README promises only what works."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"


@pytest.mark.filterwarnings("ignore:.*:UserWarning")  # what Lightning thinks of a small run
def test_the_example_runs(tmp_path, monkeypatch, capfd):
    example = re.search(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert example is not None
    monkeypatch.chdir(tmp_path)
    exec(compile(example[1], str(README), "exec"), {"__name__": "readme"})


def test_the_examples_of_policies_run():
    page = README.parent / "docs" / "policies.md"
    examples = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    assert len(examples) == 3
    exec(compile("\n".join(examples), str(page), "exec"), {"__name__": "policies"})


def test_files_that_it_names_are_there():
    text = README.read_text(encoding="utf-8")
    for path in re.findall(r"\]\((?!http)([^)#]+)\)|(examples/[\w./]+\.\w+)", text):
        assert (README.parent / "".join(path)).exists(), path
