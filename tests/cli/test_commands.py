"""The commands of ``recis-lightning`` that need no Trainer."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from recis_lightning import HashTable, checkpoint
from recis_lightning.cli import commands, main

ROOT = Path(__file__).parents[2]


def refused(capsys, *args):
    """Run a command that fails; return its two lines."""
    with pytest.raises(SystemExit) as done:
        main(args)
    assert done.value.code == 2
    out, err = capsys.readouterr()
    assert not out
    error, hint = err.splitlines()
    assert hint.startswith("hint: ")
    return error


@pytest.mark.parametrize("args", [[], ["--help"], ["-h"]])
def test_help_lists_the_commands(args, capsys):
    with pytest.raises(SystemExit) as done:
        main(args)
    assert done.value.code == 0
    out = capsys.readouterr().out
    for command in ("fit", "validate", "test", "predict", "export", "report", "inspect", "demo"):
        assert f"\n  {command} " in out


def test_help_takes_neither_lightning_nor_kernels_along():
    code = (
        "import sys; from recis_lightning.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: print(sorted({'lightning', 'numba', 'pyarrow'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_reader_that_has_enough_ends_a_command_quietly():
    code = "from recis_lightning.cli.commands import run_script; run_script()"
    command = f"'{sys.executable}' -c '{code}' --help; echo $? >&2"
    done = subprocess.run(
        f"({command}) | true", shell=True, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.stderr.split() in (["0"], ["1"])


def test_the_package_can_be_run_as_a_module():
    text = (ROOT / "recis_lightning" / "__main__.py").read_text(encoding="utf-8")
    assert "from recis_lightning.cli import main" in text


def test_a_script_finds_modules_of_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    monkeypatch.setattr(sys, "argv", ["recis-lightning", "--version"])
    with pytest.raises(SystemExit) as done:
        commands.run_script()
    assert done.value.code == 0
    assert sys.path[0] == str(tmp_path)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["fot"], "fot: expected a command, one of fit, validate"),
        (["inspect"], "required: path"),
        (["inspect", "nothing"], "nothing: there is no such file or folder"),
        (["inspect", "empty"], "neither checkpoint.json nor manifest.json"),
        (["report", "nothing"], "nothing: no such checkpoint"),
        (["report", "tables", "report.txt"], "report.txt"),
        (["demo", "--epochs", "many"], "--epochs"),
        (["demo", "--epochs", "0"], "--epochs: expected a number >= 1, got 0"),
    ],
)
def test_a_mistake_is_two_lines(args, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    checkpoint.save("tables", [HashTable(2, name="user")])
    (tmp_path / "empty").mkdir()
    assert words in refused(capsys, *args)


def test_a_report_of_saved_tables_is_written(tmp_path, capsys):
    table = HashTable(2, name="user")
    table.insert(torch.arange(3), torch.ones(3, 2))
    checkpoint.save(tmp_path / "tables", [table])
    main(["report", str(tmp_path / "tables"), str(tmp_path / "page.html")])
    assert capsys.readouterr().out.strip() == str(tmp_path / "page.html")
    assert "user" in (tmp_path / "page.html").read_text(encoding="utf-8")
