"""``RecisCLI``: LightningCLI that knows this package, and says a mistake in two lines."""

from __future__ import annotations

import argparse
import contextlib
import glob
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch.callbacks
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

# jsonargparse finds a class by its short name once its module is imported.
import recis_lightning.admission
import recis_lightning.callbacks
import recis_lightning.eviction
import recis_lightning.initializers
import recis_lightning.optim
from recis_lightning.cli.mistakes import Mistake, leave, of_files, of_parser
from recis_lightning.cli.places import place_of_value
from recis_lightning.cli.refusals import mistakes_in_two_lines
from recis_lightning.cli.settings_files import config_files, settings_files, unreadable

with contextlib.suppress(ImportError):  # its files are read with pyarrow, an extra
    import recis_lightning.data.module

_ROOMS = (
    lightning.pytorch.callbacks,
    recis_lightning.callbacks,
    recis_lightning.admission,
    recis_lightning.eviction,
    recis_lightning.initializers,
    recis_lightning.optim,
)
_WORDS_FOR_CHECKPOINTS = ("best", "last", "hpc", "registry")  # ckpt_path that is no path
_PARTS_READ = {
    "fit": ("train", "val"),
    "validate": ("val",),
    "test": ("test",),
    "predict": ("predict",),
}


class RecisCLI(LightningCLI):
    """LightningCLI that knows this package, and says a mistake in two lines.

    Callbacks, admission and eviction policies, initializers, sparse optimizers and
    ``ColumnarDataModule`` need only their class name. A module configures its own optimizers, since
    it joins a dense and a sparse one. An unknown setting, a value of a wrong type or out of range,
    an unknown class or a file that is missing ends the process with status 2, after two lines on
    stderr: where it is and what is wrong, and what to do.

    Args:
        model_class: As for LightningCLI: None for any module, named in the settings.
        datamodule_class: The same for the data.
        options: Other arguments of LightningCLI, all by name. ``auto_configure_optimizers`` is
            False unless given, and a saved configuration is replaced by that of a new run.

    Raises:
        SystemExit: A setting is wrong (status 2), or help was asked for (status 0).

    Example:
        A command for a model of your own, with shorter files of settings::

            class CLI(RecisCLI):
                def add_arguments_to_parser(self, parser):
                    parser.set_defaults({"trainer.callbacks": [...]})

            CLI(MyModel, MyData)
    """

    def __init__(
        self,
        model_class: Any = None,
        datamodule_class: Any = None,
        **options: Any,
    ) -> None:
        options.setdefault("auto_configure_optimizers", False)
        options.setdefault("save_config_kwargs", {"overwrite": True})
        options["parser_kwargs"] = {"exit_on_error": False, **(options.get("parser_kwargs") or {})}
        super().__init__(model_class, datamodule_class, **options)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Read the settings."""
        words = [str(word) for word in (sys.argv[1:] if args is None else args)]
        self._files, self._words = settings_files(words), words
        if (mistake := unreadable(self._files)) is not None:
            leave(_program(self._parser_of(words)), mistake)
        try:
            super().parse_arguments(parser, args)
        except argparse.ArgumentError as error:
            chosen = self._parser_of(words)
            mistake = of_parser(error.message, _options(chosen), _class_names())
            leave(_program(chosen), of_files(config_files(words), mistake), error)
        # Before the run, and what Lightning says of it, begins.
        subcommand = self.config.get("subcommand")
        settings = self.config if subcommand is None else self.config[subcommand]
        where = f"paths are relative to the current folder, {Path.cwd()}"
        for missing in (_missing_checkpoint(settings), _missing_data(settings, subcommand)):
            if missing is not None:
                place = place_of_value(self._files, missing.key, missing.value, words)
                message = ": ".join([*filter(None, [place]), missing.message])
                leave(_program(self._parser_of([subcommand or ""])), Mistake(message, where))

    def instantiate_classes(self) -> None:
        """Make model, data and Trainer from the settings."""
        program = _program(self._parser_of([self.subcommand or ""]))
        with mistakes_in_two_lines(program, files=self._files, words=self._words):
            super().instantiate_classes()

    def _parse_ckpt_path(self) -> None:
        program = _program(self._parser_of([self.config.get("subcommand") or ""]))
        with mistakes_in_two_lines(program):
            super()._parse_ckpt_path()

    def _run_subcommand(self, subcommand: str) -> None:
        program = _program(self._parser_of([subcommand]))
        with mistakes_in_two_lines(program, True, self._files, self._words):
            super()._run_subcommand(subcommand)

    def _parser_of(self, words: Sequence[str]) -> LightningArgumentParser:
        """Return the parser of the subcommand that a command line names first."""
        parsers: dict[str, LightningArgumentParser] = getattr(self, "_subcommand_parsers", {})
        return next((parsers[word] for word in words if word in parsers), self.parser)


class _Missing(NamedTuple):
    """File that is not there: the setting that names it, its value, and what to say."""

    key: str
    value: str
    message: str


def _missing_checkpoint(settings: Any) -> _Missing | None:
    """Return a checkpoint that is not there, and that Lightning does not find."""
    text = str(settings.get("ckpt_path") or "")
    if not text or text.partition(":")[0] in _WORDS_FOR_CHECKPOINTS or "://" in text:
        return None
    if Path(text).exists():
        return None
    return _Missing("ckpt_path", text, f"ckpt_path: there is no file {text}")


def _missing_data(settings: Any, subcommand: str | None) -> _Missing | None:
    """Return columnar files that a run reads and that are not there, or None."""
    data = settings.get("data")
    class_path = str(data.get("class_path", "")) if hasattr(data, "get") else ""
    if class_path.rpartition(".")[2] != "ColumnarDataModule":
        return None
    arguments = data.get("init_args") or {}
    if arguments.get("follow"):  # files may come later
        return None
    for part in _PARTS_READ.get(subcommand or "", ()):
        given = arguments.get(part) or []
        for paths in given.values() if isinstance(given, dict) else [given]:
            for path in [paths] if isinstance(paths, str) else paths:
                if "://" not in path and not glob.glob(path, recursive=True):
                    return _Missing(part, path, f"data: {part}: no file matches {path!r}")
    return None


def _program(parser: argparse.ArgumentParser) -> str:
    return parser.prog.replace(" [options]", "")


def _options(parser: argparse.ArgumentParser) -> list[str]:
    """Return the names of a command's settings."""
    found = [option for action in parser._actions for option in action.option_strings]
    return [option[2:] for option in found if option.startswith("--")]


def _class_names() -> list[str]:
    """Return the names of classes that a file may write without their module."""
    found = [name for room in _ROOMS for name in room.__all__ if name[0].isupper()]
    return [*found, "ColumnarDataModule"]
