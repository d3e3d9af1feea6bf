"""``python -m recis_lightning fit --config x.yaml``: LightningCLI that knows this package.

Any LightningModule and LightningDataModule is named by its import path (the current folder is
searched too). Our callbacks, policies, initializers and sparse optimizers need only their class
name. A module configures its own optimizers, since it joins a dense and a sparse one.
"""

from __future__ import annotations

import contextlib
import inspect
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch.callbacks
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

# jsonargparse finds a class by its short name once its module is imported.
import recis_lightning.admission
import recis_lightning.callbacks
import recis_lightning.eviction
import recis_lightning.initializers
import recis_lightning.optim

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
_PACKAGE = str(Path(__file__).parent)


class _CLI(LightningCLI):
    """LightningCLI that says in one line which setting of ours a file or an option has wrong."""

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Read the settings; after the error of a misspelt class, name the one that was meant."""
        try:
            super().parse_arguments(parser, args)
        except SystemExit as ended:
            for hint in _class_hints(_chain(ended)):
                print(hint, file=sys.stderr)
            raise

    def instantiate_classes(self) -> None:
        """Make model, data and Trainer from the settings."""
        with _settings_errors_in_a_line():
            super().instantiate_classes()

    def _run_subcommand(self, subcommand: str) -> None:
        with _settings_errors_in_a_line("configure_optimizers"):
            super()._run_subcommand(subcommand)


@contextmanager
def _settings_errors_in_a_line(within: str | None = None) -> Iterator[None]:
    """Exit with a line for an argument that a class of this package refuses.

    Args:
        within: Only errors that pass through a function of this name; None takes all.
    """
    try:
        yield
    except Exception as error:
        message = _refusal(error, within)
        if message is None:
            raise
        print(f"python -m recis_lightning: error: {message}", file=sys.stderr)
        raise SystemExit(2) from error


def _refusal(error: BaseException, within: str | None) -> str | None:
    """Return the message of an argument that a constructor of ours refused; None for others."""
    chain = _chain(error)
    for one in reversed(chain):
        frames = [frame for frame, _ in traceback.walk_tb(one.__traceback__)]
        if not isinstance(one, (TypeError, ValueError, ImportError)) or not frames:
            continue
        if within is not None and within not in {f.f_code.co_name for f in _frames(chain)}:
            continue
        if not frames[-1].f_code.co_filename.startswith(_PACKAGE):
            continue
        owners = [
            type(frame.f_locals["self"]).__name__
            for frame in frames
            if frame.f_code.co_name in ("__init__", "__post_init__")
            and frame.f_code.co_filename.startswith((_PACKAGE, "<string>"))
            and "self" in frame.f_locals
        ]
        if owners:
            return f"{owners[-1]}: {one}"
    return None


def _chain(error: BaseException) -> list[BaseException]:
    """Return an exception and those that led to it, the last one first."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    return chain


# A class that jsonargparse does not find, in its words: without a module, and of a module.
_UNKNOWN_CLASS = re.compile(
    r"(?:dot import path string: |has no attribute ')(\w+)'?$", flags=re.MULTILINE
)


def _class_hints(chain: Sequence[BaseException]) -> list[str]:
    """Return a line for each class that is misspelt in the errors of a parser."""
    named = [name for error in chain for name in _UNKNOWN_CLASS.findall(str(error))]
    known = {name.casefold(): name for name in _class_names()}
    hints = []
    for name in dict.fromkeys(named):
        close = get_close_matches(name.casefold(), known, 1, cutoff=0.8)
        if close and known[close[0]] == name:
            hints.append(
                f"hint: {name} exists, but the type that its argument is annotated with does not "
                "take it; a function that makes an optimizer of tables is a "
                "Callable[[Iterable[HashTable]], SparseOptimizer]"
            )
        elif close:
            hints.append(f"hint: there is no class {name}; did you mean {known[close[0]]}?")
    return hints + _argument_hints(chain)


# An argument that jsonargparse does not find, in its words.
_UNKNOWN_ARGUMENT = re.compile(r"Option '([\w.]+)' is not accepted")


def _argument_hints(chain: Sequence[BaseException]) -> list[str]:
    """Return a line for each argument that is misspelt in the errors of a parser."""
    named = [name for error in chain for name in _UNKNOWN_ARGUMENT.findall(str(error))]
    known = {
        argument
        for room in _ROOMS
        for name in room.__all__
        if isinstance(getattr(room, name), type)
        for argument in inspect.signature(getattr(room, name)).parameters
    }
    hints = []
    for name in dict.fromkeys(given.rpartition(".")[2] for given in named):
        close = get_close_matches(name, known, 1, cutoff=0.8)
        if close and close[0] != name:
            hints.append(f"hint: no argument is called {name}; did you mean {close[0]}?")
    return hints


def _class_names() -> list[str]:
    """Return the names of classes that a file may write without their module."""
    return [name for room in _ROOMS for name in room.__all__ if name[0].isupper()]


def _frames(chain: Sequence[BaseException]) -> Iterator[FrameType]:
    """Yield all frames that the exceptions of a chain passed through."""
    for error in chain:
        yield from (frame for frame, _ in traceback.walk_tb(error.__traceback__))


def main(args: Sequence[str] | None = None) -> LightningCLI:
    """Parse a command line and run it.

    Args:
        args: Subcommand and options, as on the command line; None takes the command line.

    Returns:
        The CLI after its run, with ``trainer``, ``model`` and ``datamodule``.

    Raises:
        SystemExit: An argument is invalid; with status 2 and a message.
    """
    return _CLI(
        save_config_kwargs={"overwrite": True},
        parser_kwargs={"prog": "python -m recis_lightning"},
        auto_configure_optimizers=False,
        args=None if args is None else list(args),
    )


if __name__ == "__main__":
    main()
