"""Commands of ``recis-lightning``, each imported when it is asked for."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from recis_lightning.cli.command_parser import HELP, PROGRAM, command_parser, guarded
from recis_lightning.cli.mistakes import Mistake, leave

if TYPE_CHECKING:
    from recis_lightning.cli.recis_cli import RecisCLI

_TRAINER_COMMANDS = ("fit", "validate", "test", "predict")


def main(args: Sequence[str] | None = None) -> RecisCLI | None:
    """Parse a command line and run it.

    Args:
        args: Command and options; None takes those of the process.

    Returns:
        After ``fit``, ``validate``, ``test``, ``predict`` and ``export`` the CLI, with ``trainer``,
        ``model`` and ``datamodule``.

    Raises:
        SystemExit: A mistake, after two lines on stderr (status 2); or help (status 0).
    """
    words = list(sys.argv[1:] if args is None else args)
    command = words[0] if words else "--help"
    if command in ("-h", "--help"):
        print(_help())
        raise SystemExit(0)
    if command == "--version":
        print(f"{PROGRAM} {version('recis-lightning')}")
        raise SystemExit(0)
    if command in _TRAINER_COMMANDS:
        from recis_lightning.cli.recis_cli import RecisCLI

        return RecisCLI(parser_kwargs={"prog": PROGRAM}, args=None if args is None else words)
    if command == "export":
        from recis_lightning.cli.model_export import export_command

        return export_command(words[1:])
    others = {"report": _report, "inspect": _inspect, "demo": _demo}
    if command not in others:
        expected = ", ".join(HELP)
        leave(PROGRAM, Mistake(f"{command}: expected a command, one of {expected}"))
    others[command](words[1:])
    return None


def run_script() -> None:
    """Run the command of this process; modules of the current folder can be imported."""
    if (here := os.getcwd()) not in sys.path:
        sys.path.insert(0, here)
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # who reads has enough, as head; the interpreter flushes once more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None


def _help() -> str:
    width = max(map(len, HELP)) + 2
    lines = [f"  {name:<{width}}{text}" for name, text in HELP.items()]
    return "\n".join(
        [
            f"usage: {PROGRAM} COMMAND ...",
            "",
            "Dynamic embedding tables and RecIS training hooks for PyTorch Lightning.",
            "",
            *lines,
            "",
            f"{PROGRAM} COMMAND --help lists the settings of a command.",
        ]
    )


def _report(args: Sequence[str]) -> None:
    parser = command_parser("report")
    parser.add_argument("source", help="checkpoint, or a folder with checkpoints: then the newest")
    parser.add_argument("path", nargs="?", default="report.html", help="ends in .html or .png")
    given = parser.parse_args(args)

    def write() -> Path:
        from recis_lightning.monitoring.report import report

        return report(given.source, given.path)

    print(guarded("report", write))


def _inspect(args: Sequence[str]) -> None:
    parser = command_parser("inspect")
    parser.add_argument(
        "path",
        help="checkpoint, folder of recis_lightning.checkpoint.save, served folder, or a folder "
        "with checkpoints: then the newest that is whole",
    )
    given = parser.parse_args(args)

    def text() -> str:
        from recis_lightning.cli.inspection import inspection

        return inspection(Path(given.path))

    print(guarded("inspect", text))


def _demo(args: Sequence[str]) -> None:
    from recis_lightning.cli.demo import demo_command

    demo_command(args)
