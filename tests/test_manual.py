"""Tests of the manual: its code runs, its links lead somewhere, it has every public name."""

import re
from importlib import import_module
from importlib.util import find_spec
from inspect import ismodule, signature

import pytest
import torch
import yaml

import recis_lightning
from recis_lightning import callbacks
from tests.helpers import rank_manual
from tests.helpers.manual import (
    PAGES,
    ROOT,
    anchors,
    blocks,
    dead_links,
    has_code,
    run_page,
    without_code,
)

ON_RANKS = ROOT / "docs" / "many_ranks.md"
PUBLIC = [  # each is a page of the reference; recis_lightning itself is api/tables.md
    *("recis_lightning", "recis_lightning.admission", "recis_lightning.callbacks"),
    "recis_lightning.cli",
    *("recis_lightning.checkpoint", "recis_lightning.data", "recis_lightning.eviction"),
    *("recis_lightning.initializers", "recis_lightning.lookup", "recis_lightning.metrics"),
    *("recis_lightning.monitoring", "recis_lightning.optim", "recis_lightning.retrieval"),
    *("recis_lightning.serving", "recis_lightning.trace"),
]


def check_data(names, output):
    assert names["features"](names["request"])["capital"].tolist() == [1]
    lengths, *windows, stream = output.splitlines()
    assert sum(map(int, re.findall(r"\d+", lengths))) == 3  # lengths 2, 0, 1
    assert windows == [f"2026-11-{day} tensor([1, 2, 3])" for day in (29, 30)]
    assert stream == "2026-11-30.parquet 6"


def check_index(names, output):
    before, after = map(float, re.findall(r"tensor\((0\.\d+)\)", output))
    assert 0.8 < before < 0.95
    assert 0.8 < after < 0.95


def check_retrieval(names, output):
    if find_spec("faiss") is not None:
        assert set(names["ids"].flat) <= {10, 20}


def check_training(names, output):
    assert "[0.001, 0.05, 0.01]" in output


CHECKS = {  # of what a page's blocks give, beyond that they run
    "data": check_data,
    "index": check_index,
    "retrieval": check_retrieval,
    "training": check_training,
}


@pytest.fixture
def one_thread():
    """Tiny steps wait for threads longer than they compute, where other tests run beside."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.filterwarnings("ignore:.*:UserWarning")  # Lightning's advice for long runs
@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if has_code(page) and page != ON_RANKS],
    ids=lambda page: page.stem,
)
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = run_page(page)
    if page.stem in CHECKS:
        CHECKS[page.stem](names, capsys.readouterr().out)


def test_only_what_needs_a_gpu_is_not_run(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("<!-- not run -->\n```python\n1 / 0\n```\n\n```python\na = 1\n```\n")
    assert run_page(page)["a"] == 1
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for block in re.findall(r"<!-- not run -->\n```python\n(.*?)```", text, re.DOTALL):
            assert "torch.cuda" in block, page.name


@pytest.mark.slow
def test_the_code_of_the_page_about_ranks_runs_on_two(tmp_path, ranks):
    assert ranks.run(2, rank_manual.run, ON_RANKS, str(tmp_path), timeout_s=200) == [2, 2]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    assert dead_links(page) == []


def test_a_dead_link_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A `b`: c\n[a](#a-b-c) [b](#d) [c](other.md) [d](https://example.com/)\n")
    assert anchors(page) == {"a-b-c"}
    assert dead_links(page) == ["#d", "other.md"]


def test_commands_and_configurations_name_what_exists():
    """Programs that a page calls are files here; its YAML names classes and arguments they take."""
    for page in [*PAGES, ROOT / "README.md"]:
        text = page.read_text(encoding="utf-8")
        for module in re.findall(r"-m ((?:examples|benchmarks|tests)[\w.]+)", text):
            assert (ROOT / f"{module.replace('.', '/')}.py").exists(), (page.name, module)
        for path in re.findall(r"python ((?:benchmarks|docs|examples)/[\w./]+)", text):
            assert (ROOT / path).exists(), (page.name, path)
        for block in blocks(page, "yaml"):
            for class_path, arguments in named_classes(yaml.safe_load(block)):
                found = class_named(class_path)
                assert found is not None, (page.name, class_path)
                assert set(arguments) <= set(signature(found).parameters), (page.name, class_path)


def named_classes(node):
    if isinstance(node, dict):
        if "class_path" in node:
            yield node["class_path"], node.get("init_args", {})
        node = [*node.values()]
    for part in node if isinstance(node, list) else []:
        yield from named_classes(part)


def class_named(class_path):
    """Return a class by its path, or one of ours or a callback of Lightning by its name alone."""
    module, _, name = class_path.rpartition(".")
    modules = [module] if module else [*PUBLIC, "lightning.pytorch.callbacks"]
    found = [getattr(import_module(module), name, None) for module in modules]
    return next(filter(None, found), None)


def test_every_page_is_in_the_menu():
    menu = re.findall(r"[\w/]+\.md", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    pages = (ROOT / "docs").rglob("*.md")
    assert sorted(menu) == sorted(p.relative_to(ROOT / "docs").as_posix() for p in pages)


@pytest.mark.parametrize("module", PUBLIC)
def test_the_reference_has_every_public_name(module):
    """And no other; modules among the names have pages of their own."""
    found = import_module(module)
    names = {name for name in found.__all__ if not ismodule(getattr(found, name))}
    page = "tables" if module == "recis_lightning" else module.rpartition(".")[2]
    text = (ROOT / "docs" / "api" / f"{page}.md").read_text(encoding="utf-8")
    shown = re.findall(rf"^::: {re.escape(module)}\.(\w+)$", text, re.MULTILINE)
    assert sorted(shown) == sorted(names)
    overview = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    [row] = [line for line in overview.splitlines() if line.startswith(f"| [`{module}`]")]
    assert set(re.findall(r"`(\w+)`", row.split("|")[2])) == names


def test_every_public_module_is_in_the_reference():
    """Folders and modules that a user imports from: what __all__ names, and what pages import."""
    modules = {
        f"recis_lightning.{name}"
        for name in recis_lightning.__all__
        if ismodule(getattr(recis_lightning, name))
    }
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        modules |= set(re.findall(r"^from (recis_lightning\.\w+) import", text, re.MULTILINE))
    assert modules <= set(PUBLIC)


def test_every_hook_has_a_picture():
    """A name of its own on the page, and under every block what it gives."""
    text = (ROOT / "docs" / "hooks.md").read_text(encoding="utf-8")
    names = [name for name in callbacks.__all__ if name[0].isupper() and name != "Windows"]
    assert [name for name in names if f"`{name}" not in without_code(ROOT / "docs/hooks.md")] == [
        "WindowList"
    ]
    _, *sections = re.split(r"^## ", text, flags=re.MULTILINE)
    assert len(sections) > 12
    for section in sections:
        shown = re.findall(r"<!-- picture -->\n\n```text\n(.+?)\n```", section, re.DOTALL)
        assert len(shown) == section.count("```python"), section.splitlines()[0]


def test_pictures_are_small():
    for picture in (ROOT / "docs").rglob("*.png"):
        assert picture.stat().st_size < 150_000, picture.name
