"""Place in a model where what it does depends on values, which no served program can record."""

from __future__ import annotations

import linecache
import traceback
from pathlib import Path
from typing import Any

import torch
from torch import nn

__all__ = ["explain_dependence"]

_KINDS = {
    "GuardOnDataDependentSymNode",
    "DataDependentOutputException",
    "DynamicOutputShapeException",
}
_OF_NUMPY = ".numpy() is not supported"
_NOT_THE_USERS = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]), "<")


def explain_dependence(error: BaseException, model: Any) -> ValueError | None:
    """Return an error that names the line and the module which depend on values of tensors.

    Args:
        error: What recording the model raised.
        model: A module or another function that was recorded.

    Returns:
        None if the error is about something else.
    """
    of_numpy = _OF_NUMPY in str(error)
    if type(error).__name__ not in _KINDS and not of_numpy:
        return None
    frames = [
        (frame, line)
        for frame, line in traceback.walk_tb(error.__traceback__)
        if not frame.f_code.co_filename.startswith(_NOT_THE_USERS)
    ]
    place = "its forward"
    if frames:
        frame, line = frames[-1]
        path = frame.f_code.co_filename
        code = " ".join(linecache.getline(path, line).split())
        place = f"{path}, line {line}{_module_of(frames, model)}: {code or frame.f_code.co_name}"
    if of_numpy:
        return ValueError(
            f"model: a served program cannot leave torch for numpy: {place}; write it with torch's "
            "functions, or do it before or after the model"
        )
    return ValueError(
        "model: what forward does depends on values of tensors, and a served program is the same "
        f"for all: {place}; write both ways with torch.where or a mask in the place of if, while, "
        ".item() and .tolist(), put checks of values behind `if self.training:`, or leave that "
        "part out of the model that is exported"
    )


def _module_of(frames: list[tuple[Any, int]], model: Any) -> str:
    """Return the innermost module of frames, by its name in the model."""
    names = {}
    if isinstance(model, nn.Module):
        names = {id(module): name for name, module in model.named_modules()}
    for frame, _ in reversed(frames):
        first = frame.f_code.co_varnames[0] if frame.f_code.co_argcount else ""
        module = frame.f_locals.get(first)
        if isinstance(module, nn.Module):
            name = names.get(id(module))
            return f" (in {f'{name!r}, a ' if name else ''}{type(module).__name__})"
    return ""
