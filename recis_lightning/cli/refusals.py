"""Exceptions of a run that are mistakes in its settings or its data, and those that are not."""

from __future__ import annotations

import linecache
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import lightning
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningCLI

from recis_lightning.cli.mistakes import Mistake, leave

__all__ = ["mistakes_in_two_lines"]

_PACKAGE, _LIGHTNING = str(Path(__file__).parents[1]), str(Path(lightning.__file__).parent)
_DATA, _CHECKPOINT, _CALLBACKS = (
    str(Path(_PACKAGE) / room) for room in ("data", "checkpoint", "callbacks")
)
_REFUSALS = (TypeError, ValueError, ImportError, MisconfigurationException)
# Where callbacks check what only a run shows: before a batch, or what a batch lacks.
_CHECKING_HOOKS = ("setup", "on_fit_start", "on_train_start", "on_predict_batch_end")
_IN_A_WORKER = "Caught "  # begins what DataLoader raises for an exception in a process of its own


@contextmanager
def mistakes_in_two_lines(program: str, running: bool = False) -> Iterator[None]:
    """Exit with two lines for an argument that a class of ours or of Lightning refuses.

    Args:
        program: Name of the command.
        running: Whether a run is under way: then only for what makes optimizers, for what our
            callbacks refuse, and for files of data that are missing or do not fit their columns.
    """
    try:
        yield
    except Exception as error:
        mistake = (
            _refusal(error, running)
            or _missing_file(error)
            or (_unfit_data(error) or _refusal_of_callback(error) if running else None)
        )
        if mistake is None:
            raise
        leave(program, mistake, error)


def _refusal(error: BaseException, running: bool) -> Mistake | None:
    """Return the mistake of an argument that a constructor refused; None for other errors."""
    chain = _chain(error)
    for one in reversed(chain):
        frames = _frames([one])
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
    homes = (_DATA, _CHECKPOINT, _LIGHTNING)
    for one in _chain(error):
        ours = any(frame.f_code.co_filename.startswith(homes) for frame in _frames([one])[-3:])
        if isinstance(one, FileNotFoundError) and ours:
            return Mistake(str(one), f"paths are relative to the current folder, {Path.cwd()}")
    return None


def _unfit_data(error: BaseException) -> Mistake | None:
    """Return the mistake of files or settings of data that do not fit; None for other errors."""
    for one in _chain(error):
        is_of_file = type(one).__name__ == "DataFileError"  # its room needs pyarrow
        if is_of_file or (isinstance(one, TypeError | ValueError) and _is_raised_in(one, _DATA)):
            message = str(one)
            if message.startswith(_IN_A_WORKER):
                message = message.rpartition(f"{type(one).__name__}: ")[2]
            message, _, meant = message.partition("; did you mean ")
            hint = f"did you mean {meant.strip()}" if meant else None
            return Mistake(f"data: {message}", hint or "correct data in the settings, or its files")
    return None


def _refusal_of_callback(error: BaseException) -> Mistake | None:
    """Return the mistake of what a callback of ours refuses at a run's start, or of a batch."""
    for one in _chain(error):
        if not isinstance(one, (*_REFUSALS, FileExistsError)) or not _is_raised_in(one, _CALLBACKS):
            continue
        owners = [
            type(frame.f_locals["self"]).__name__
            for frame in _frames([one])
            if frame.f_code.co_name in _CHECKING_HOOKS
            and frame.f_code.co_filename.startswith(_CALLBACKS)
            and isinstance(frame.f_locals.get("self"), Callback)
        ]
        if owners:
            return Mistake(f"{owners[0]}: {one}")
    return None


def _is_raised_in(error: BaseException, home: str) -> bool:
    """Return whether a statement of a room raises it: what a call there runs into is a fault."""
    stack = list(traceback.walk_tb(error.__traceback__))
    if not stack:
        return False
    frame, line = stack[-1]
    path = frame.f_code.co_filename
    return path.startswith(home) and linecache.getline(path, line).lstrip().startswith("raise ")


def _chain(error: BaseException) -> list[BaseException]:
    """Return an exception and those that led to it, the last one first."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    return chain


def _frames(chain: Sequence[BaseException]) -> list[FrameType]:
    """Return all frames that the exceptions of a chain passed through."""
    return [frame for error in chain for frame, _ in traceback.walk_tb(error.__traceback__)]
