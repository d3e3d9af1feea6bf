"""Parsers of commands, whose errors are two lines."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, NoReturn

from typing_extensions import override

from recis_lightning.cli.mistakes import Mistake, leave

PROGRAM = "recis-lightning"
HELP = {
    "fit": "train the model that a file of settings describes",
    "validate": "evaluate it on the data of validation",
    "test": "evaluate it on the data of the test",
    "predict": "predict with it",
    "export": "write a trained model to a folder that is served",
    "report": "draw the tables of a run as one page, from its checkpoint",
    "inspect": "list the tables of a checkpoint or a served folder",
    "demo": "train a model on MovieLens-100k, and report it",
}


class CommandParser(argparse.ArgumentParser):
    """Parser whose errors are two lines."""

    @override
    def error(self, message: str) -> NoReturn:
        """Print what is wrong, and exit with status 2."""
        leave(self.prog, Mistake(message))


def command_parser(command: str) -> CommandParser:
    """Return the parser of a command, without arguments yet."""
    return CommandParser(f"{PROGRAM} {command}", description=HELP[command])


def guarded(command: str, work: Callable[[], Any]) -> Any:
    """Return what a function returns; what it refuses is a mistake.

    Args:
        command: The command that calls it.
        work: Raises OSError, ValueError, TypeError, RuntimeError or ImportError.
    """
    try:
        return work()
    except (OSError, ValueError, TypeError, RuntimeError, ImportError) as error:
        leave(f"{PROGRAM} {command}", Mistake(str(error)), error)
