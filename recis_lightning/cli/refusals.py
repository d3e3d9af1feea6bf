"""Exceptions of a run that are mistakes in its settings or its data, and those that are not."""

from __future__ import annotations

import linecache
import pickle
import re
import traceback
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import lightning
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningCLI
from torch import Tensor

from recis_lightning.cli.mistakes import Mistake, leave
from recis_lightning.cli.places import place_of
from recis_lightning.close_names import closest

__all__ = ["mistakes_in_two_lines"]

_PACKAGE, _LIGHTNING = str(Path(__file__).parents[1]), str(Path(lightning.__file__).parent)
_DATA, _CHECKPOINT, _CALLBACKS = (
    str(Path(_PACKAGE) / room) for room in ("data", "checkpoint", "callbacks")
)
_REFUSALS = (TypeError, ValueError, ImportError, MisconfigurationException)
# Where callbacks check what only a run shows: before a batch, or what a batch lacks.
_CHECKING_HOOKS = ("setup", "on_fit_start", "on_train_start", "on_predict_batch_end")
_UNREADABLE = (pickle.UnpicklingError, EOFError, RuntimeError, zipfile.BadZipFile)
_CHECKPOINT_READERS = {
    "load_checkpoint",
    "_load_checkpoint",
    "resume_start",
    "pl_load",
    "_parse_ckpt_path",
}
_IN_A_WORKER = "Caught "  # begins what DataLoader raises for an exception in a process of its own


@contextmanager
def mistakes_in_two_lines(
    program: str, running: bool = False, files: Sequence[str] = (), words: Sequence[str] = ()
) -> Iterator[None]:
    """Exit with two lines for an argument that a class of ours or of Lightning refuses.

    Args:
        program: Name of the command.
        running: Whether a run is under way: then only for what makes optimizers, for what our
            callbacks refuse, for checkpoints that cannot be read, for features that the data lacks,
            and for files of data that are missing or do not fit their columns.
        files: Files of settings, in which the place of the mistake is looked for.
        words: The command line.
    """

    def placed(owner: str, message: str) -> Mistake:
        """Return the mistake of a value that a class refuses, with its place in a file."""
        place = place_of(files, owner, message, words)
        return Mistake(": ".join([*filter(None, [place]), owner, message]))

    try:
        yield
    except Exception as error:
        mistake = (
            _refusal(error, running, placed)
            or _unreadable_checkpoint(error)
            or (_unfit_data(error) if running else None)
            or _missing_file(error)
            or (
                _missing_feature(error)
                or _refusal_of_callback(error, placed)
                or _refusal_of_lightning(error)
                if running
                else None
            )
        )
        if mistake is None:
            raise
        leave(program, mistake, error)


def _refusal(
    error: BaseException, running: bool, placed: Callable[[str, str], Mistake]
) -> Mistake | None:
    """Return the mistake of an argument that a constructor refused; None for other errors."""
    chain = _chain(error)
    for one in reversed(chain):
        frames, message = _frames([one]), _message_of(one)
        if message is None or not frames:
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
            return placed(owner, message)
    return None


def _message_of(error: BaseException) -> str | None:
    """Return what an error says of an argument; None for one that may be of something else."""
    if isinstance(error, _REFUSALS):
        return str(error)
    # The system's own name no argument.
    reason = error.strerror if isinstance(error, OSError) else None
    return reason if reason and re.match(r"\w+: ", reason) else None


def _unreadable_checkpoint(error: BaseException) -> Mistake | None:
    """Return the mistake of a checkpoint that torch cannot read; None for other errors."""
    for one in _chain(error):
        names = [frame.f_code.co_name for frame in _frames([one])]
        in_torch = any(
            frame.f_code.co_filename.endswith(
                ("torch/serialization.py", "_weights_only_unpickler.py")
            )
            for frame in _frames([one])[-4:]
        )
        if isinstance(one, _UNREADABLE) and in_torch and _CHECKPOINT_READERS & set(names):
            path = next(
                (
                    str(frame.f_locals[name])
                    for frame in _frames([one])
                    for name in ("ckpt_path", "checkpoint_path", "path_or_url", "path")
                    if isinstance(frame.f_locals.get(name), str | Path)
                ),
                "",
            )
            return Mistake(
                f"ckpt_path: {path} is no checkpoint that can be read, or is damaged",
                "name a file that a Trainer or recis_lightning.checkpoint saved",
            )
    return None


def _refusal_of_lightning(error: BaseException) -> Mistake | None:
    """Return the mistake of settings that Lightning refuses before it calls anybody's code."""
    frames = [frame.f_code.co_filename for frame in _frames([error])]
    began = next((at for at, path in enumerate(frames) if path.startswith(_LIGHTNING)), None)
    if began is None or not isinstance(error, (ValueError, TypeError, MisconfigurationException)):
        return None
    inside = all(path.startswith((_LIGHTNING, _PACKAGE)) for path in frames[began:])
    return Mistake(str(error)) if inside and _is_raised_in(error, _LIGHTNING) else None


def _missing_feature(error: BaseException) -> Mistake | None:
    """Return the mistake of a feature that batches of our data lack; None for other errors.

    Whether the settings of the model or of the data name it wrongly cannot be known.
    """
    for one in _chain(error):
        frames = _frames([one])
        if not isinstance(one, KeyError) or not one.args or not isinstance(one.args[0], str):
            continue
        if frames and frames[-1].f_code.co_filename.startswith(_PACKAGE) and " " in one.args[0]:
            continue  # says more than a name
        for frame in frames:
            given = frame.f_locals
            trainer = given.get("trainer") or getattr(given.get("self"), "trainer", None)
            features: Any = getattr(getattr(trainer, "datamodule", None), "features", None)
            if not isinstance(getattr(features, "entries", None), list):
                continue
            known, name = features.entries, one.args[0]
            if name in known or not _is_of_batch(one, known):
                break
            close = closest(name, known)
            return Mistake(
                f"data: the model asks for {name!r} of a batch, whose entries are {known}",
                f"did you mean {close!r}?"
                if close
                else "add a column of that name to data.columns",
            )
    return None


def _is_of_batch(error: KeyError, entries: Sequence[str]) -> bool:
    """Return whether a batch lacks a key, and no dict of the user's own.

    It cannot be told of code that is not there to be read, and of ours.
    """
    part = traceback.extract_tb(error.__traceback__)[-1]
    frame = _frames([error])[-1]
    line = linecache.getline(part.filename, part.lineno or 0)
    if not line or part.filename.startswith(_PACKAGE):
        return True
    # Since Python 3.11 the part of the line is known.
    start, end = getattr(part, "colno", None), getattr(part, "end_colno", None)
    if start is not None and getattr(part, "end_lineno", None) == part.lineno:
        line = line.encode()[start:end].decode()
    for name in re.findall(r"([A-Za-z_][\w.]*)\s*(?:\[|\.pop\()", line):
        first, *attributes = name.split(".")
        value: Any = frame.f_locals.get(first)
        for attribute in attributes:
            value = getattr(value, attribute, None)
        if not isinstance(value, Mapping) or error.args[0] in value:
            continue
        if all(isinstance(value.get(entry), Tensor | tuple) for entry in entries):
            return True
    return False


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


def _refusal_of_callback(
    error: BaseException, placed: Callable[[str, str], Mistake]
) -> Mistake | None:
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
            return placed(owners[0], str(one))
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
