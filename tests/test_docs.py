"""Tests that the pages in docs/ name exist."""

import ast
import re
from pathlib import Path

TESTS = Path(__file__).parent
DOCS = TESTS.parent / "docs"


def names_in(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_every_row_of_recis_names_tests_that_exist():
    """A row promises something only beside a test of it."""
    rows = [
        line
        for line in (DOCS / "recis.md").read_text(encoding="utf-8").splitlines()
        if line.startswith("| ") and not line.startswith("| RecIS |")
    ]
    assert len(rows) > 15
    for row in rows:
        *_, named, _ = row.split("|")
        found = re.findall(r"`((?:\w+/)*test_\w+\.py)::(test_\w+)`", named)
        assert found, row
        for file, name in found:
            assert name in names_in(TESTS / ("." if "/" in file else "callbacks") / file), (
                file,
                name,
            )
