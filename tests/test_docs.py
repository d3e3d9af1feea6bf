"""Tests that the pages in docs/ name exist."""

import ast
import re
from pathlib import Path

from recis_lightning import callbacks

TESTS = Path(__file__).parent
RECIS_HOOKS = [  # of v1.2.18, with the classes that hold their arguments
    *("Hook", "LoggerHook", "ProfilerHook", "HashTableFilterHook", "ClipGradNormHook"),
    *("MetricReportHook", "ReportArguments", "_InitialProfilerHook", "AutoProfilerHook"),
    *("AutoProfilerArguments", "ModuleFlopsHook", "MemoryAccessHook", "NvtxProfileHook"),
    *("MLTrackerHook", "TraceToOdpsHook", "CheckpointSaveHook", "CheckpointSaveArguments"),
    *("CheckpointLoadHook", "CheckpointLoadArguments", "ModelBank", "MosReporterEvalHook"),
]
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
            path = TESTS / file
            if not path.exists():
                path = TESTS / "callbacks" / file
            assert name in names_in(path), (file, name)


def test_every_hook_of_recis_is_on_its_page():
    """Either in a row, or among those that are not here."""
    text = (DOCS / "recis.md").read_text(encoding="utf-8")
    assert [name for name in RECIS_HOOKS if f"`{name}" not in text] == []


def test_every_hook_of_ours_is_on_that_page_or_comes_from_elsewhere():
    text = (DOCS / "recis.md").read_text(encoding="utf-8")
    hooks = [name for name in callbacks.__all__ if name.endswith(("Hook", "Profiler"))]
    missing = [name for name in hooks if f"`{name}" not in text]
    assert missing == ["DeltaHook", "ReinitializeRowsHook"]  # RecIS has neither
