"""Griffe extension: ``Example:`` with a doctest is shown as code, as ``Examples:`` is."""

from __future__ import annotations

import re
from typing import Any

import griffe

_EXAMPLE = re.compile(r"^Example:(?=\n(?: {4}.*\n| *\n)*? {4}>>>)", re.MULTILINE)


class DocstringExamples(griffe.Extension):
    """Name the sections with doctests as Google's style does."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Change the docstring of any object."""
        if obj.docstring is not None:
            obj.docstring.value = _EXAMPLE.sub("Examples:", obj.docstring.value)
