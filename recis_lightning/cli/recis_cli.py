"""``RecisCLI``: LightningCLI that knows this package, and says a mistake in two lines."""

from __future__ import annotations

import argparse
import contextlib
import glob
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any

import lightning
import lightning.pytorch.callbacks
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

# jsonargparse finds a class by its short name once its module is imported.
import recis_lightning.admission
import recis_lightning.callbacks
import recis_lightning.eviction
import recis_lightning.initializers
import recis_lightning.optim
from recis_lightning.cli.mistakes import Mistake, leave, of_files, of_parser

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
_PACKAGE, _LIGHTNING = str(Path(__file__).parents[1]), str(Path(lightning.__file__).parent)
_WORDS_FOR_CHECKPOINTS = ("best", "last", "hpc", "registry")  # ckpt_path that is no path
_PARTS_READ = {
    "fit": ("train", "val"),
    "validate": ("val",),
    "test": ("test",),
    "predict": ("predict",),
}
_REFUSALS = (TypeError, ValueError, ImportError, MisconfigurationException)


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
        try:
            super().parse_arguments(parser, args)
        except argparse.ArgumentError as error:
            words = [str(word) for word in (sys.argv[1:] if args is None else args)]
            chosen = self._parser_of(words)
            mistake = of_parser(error.message, _options(chosen), _class_names())
            leave(_program(chosen), of_files(_config_files(words), mistake), error)
        # Before the run, and what Lightning says of it, begins.
        subcommand = self.config.get("subcommand")
        settings = self.config if subcommand is None else self.config[subcommand]
        where = f"paths are relative to the current folder, {Path.cwd()}"
        for missing in (_missing_checkpoint(settings), _missing_data(settings, subcommand)):
            if missing is not None:
                leave(_program(self._parser_of([subcommand or ""])), Mistake(missing, where))

    def instantiate_classes(self) -> None:
        """Make model, data and Trainer from the settings."""
        program = _program(self._parser_of([self.subcommand or ""]))
        with _mistakes_in_two_lines(program):
            super().instantiate_classes()

    def _run_subcommand(self, subcommand: str) -> None:
        with _mistakes_in_two_lines(_program(self._parser_of([subcommand])), running=True):
            super()._run_subcommand(subcommand)

    def _parser_of(self, words: Sequence[str]) -> LightningArgumentParser:
        """Return the parser of the subcommand that a command line names first."""
        parsers: dict[str, LightningArgumentParser] = getattr(self, "_subcommand_parsers", {})
        return next((parsers[word] for word in words if word in parsers), self.parser)


@contextmanager
def _mistakes_in_two_lines(program: str, running: bool = False) -> Iterator[None]:
    """Exit with two lines for an argument that a class of ours or of Lightning refuses.

    Args:
        program: Name of the command.
        running: Whether a run is under way: then only for what makes optimizers, and for files
            of data that are missing.
    """
    try:
        yield
    except Exception as error:
        mistake = _refusal(error, running) or _missing_file(error)
        if mistake is None:
            raise
        leave(program, mistake, error)


def _refusal(error: BaseException, running: bool) -> Mistake | None:
    """Return the mistake of an argument that a constructor refused; None for other errors."""
    chain = _chain(error)
    for one in reversed(chain):
        frames = [frame for frame, _ in traceback.walk_tb(one.__traceback__)]
        if not isinstance(one, _REFUSALS) or not frames:
            continue
        if running and "configure_optimizers" not in {f.f_code.co_name for f in _frames(chain)}:
            continue
        homes = (_PACKAGE,) if running else (_PACKAGE, _LIGHTNING)
        if not frames[-1].f_code.co_filename.startswith(homes):
            continue
        owners = [
            type(frame.f_locals["self"]).__name__
            for frame in frames
            if frame.f_code.co_name in ("__init__", "__post_init__")
            and frame.f_code.co_filename.startswith((*homes, "<string>"))
            and "self" in frame.f_locals
            and not isinstance(frame.f_locals["self"], LightningCLI)
        ]
        if owners:
            # Trainer makes many parts of its own; ours is the innermost that is named.
            owner = "Trainer" if "Trainer" in owners else owners[-1]
            return Mistake(f"{owner}: {one}")
    return None


def _missing_file(error: BaseException) -> Mistake | None:
    """Return the mistake of a file that data or checkpoints should have; None for other errors."""
    homes = tuple(str(Path(_PACKAGE) / room) for room in ("data", "checkpoint"))
    for one in _chain(error):
        frames = [frame for frame, _ in traceback.walk_tb(one.__traceback__)]
        ours = any(
            frame.f_code.co_filename.startswith((*homes, _LIGHTNING)) for frame in frames[-3:]
        )
        if isinstance(one, FileNotFoundError) and ours:
            return Mistake(str(one), f"paths are relative to the current folder, {Path.cwd()}")
    return None


def _missing_checkpoint(settings: Any) -> str | None:
    """Return what to say of a checkpoint that is not there, and that Lightning does not find."""
    text = str(settings.get("ckpt_path") or "")
    if not text or text.partition(":")[0] in _WORDS_FOR_CHECKPOINTS or "://" in text:
        return None
    return None if Path(text).exists() else f"ckpt_path: there is no file {text}"


def _missing_data(settings: Any, subcommand: str | None) -> str | None:
    """Return what to say of columnar files that a run reads and that are not there, or None."""
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
                    return f"data: {part}: no file matches {path!r}"
    return None


def _chain(error: BaseException) -> list[BaseException]:
    """Return an exception and those that led to it, the last one first."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    return chain


def _frames(chain: Sequence[BaseException]) -> Iterator[FrameType]:
    """Yield all frames that the exceptions of a chain passed through."""
    for error in chain:
        yield from (frame for frame, _ in traceback.walk_tb(error.__traceback__))


def _program(parser: argparse.ArgumentParser) -> str:
    return parser.prog.replace(" [options]", "")


def _options(parser: argparse.ArgumentParser) -> list[str]:
    """Return the names of a command's settings."""
    found = [option for action in parser._actions for option in action.option_strings]
    return [option[2:] for option in found if option.startswith("--")]


def _config_files(words: Sequence[str]) -> list[str]:
    """Return the files of settings that a command line names."""
    files = [after for word, after in pairwise(words) if word in ("-c", "--config")]
    return files + [word.partition("=")[2] for word in words if word.startswith("--config=")]


def _class_names() -> list[str]:
    """Return the names of classes that a file may write without their module."""
    found = [name for room in _ROOMS for name in room.__all__ if name[0].isupper()]
    return [*found, "ColumnarDataModule"]
