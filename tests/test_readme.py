"""Tests of README: its example learns, and it works as a page on an index of packages."""

import re
from pathlib import Path

import pytest
import torch

from tests.helpers.manual import REPOSITORY, dead_links, run_page

README = Path(__file__).parents[1] / "README.md"
DOCS = README.parent / "docs"


@pytest.mark.filterwarnings("ignore:.*:UserWarning")  # Lightning's advice for long runs
def test_the_example_learns(tmp_path, monkeypatch, caplog):
    """The loss falls, users who left are evicted, and the validation AUC is well above chance."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    with caplog.at_level("INFO", logger="recis_lightning"):
        names = run_page(README)
    losses = [float(loss) for loss in re.findall(r"<loss=([\d.]+)>", caplog.text)]
    assert len(losses) == 4
    assert losses[-1] < losses[0] - 0.05
    assert names["trainer"].callback_metrics["auc"] > 0.85
    assert names["trainer"].lightning_module.user.table.statistics().evicted > 50


def test_it_is_a_page_of_its_own():
    """An index of packages shows it without the repository: no link is relative."""
    text = README.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    assert [link for link in links if not link.startswith("https://")] == []
    assert sum(link.startswith(REPOSITORY) for link in links) > 10
    assert dead_links(README) == []


def test_it_begins_with_what_a_user_needs():
    """Purpose, installation and the example first; the commands for a clone open their section."""
    text = README.read_text(encoding="utf-8")
    assert text.index("pip install recis-lightning") < text.index("```python") < 1500
    _, source = text.split("## From source")
    assert re.findall(r"^make \w+", source, re.MULTILINE)[:2] == ["make demo", "make test"]


def test_paths_of_examples_exist():
    for page in (README, *DOCS.glob("*.md")):
        for path in re.findall(r"examples/[\w./]+\.\w+", page.read_text(encoding="utf-8")):
            assert (README.parent / path).exists(), (page.name, path)


def test_its_figures_are_those_of_the_manual():
    """The table of speeds is in both."""
    rows = re.findall(r"^\| \d.*ms.*$", README.read_text(encoding="utf-8"), re.MULTILINE)
    text = (DOCS / "performance.md").read_text(encoding="utf-8")
    assert len(rows) == 3
    assert [row for row in rows if row not in text] == []
