"""Griffe extension: what docstrings have of reStructuredText, as the Markdown of the manual."""

from __future__ import annotations

import re
from typing import Any

import griffe

_EXAMPLE = re.compile(r"^Example:(?=\n(?: {4}.*\n| *\n)*? {4}>>>)", re.MULTILINE)
_TABLE = re.compile(r"^=+  =+\n(.*?)\n=+  =+$", re.DOTALL | re.MULTILINE)


class DocstringMarkdown(griffe.Extension):
    """Show sections with doctests as code, and literal blocks and tables as they are."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Change the docstring of any object."""
        if obj.docstring is not None:
            text = _EXAMPLE.sub("Examples:", obj.docstring.value)
            text = re.sub(r"::$", ":", text, flags=re.MULTILINE)
            obj.docstring.value = _TABLE.sub(_literal, text)


def _literal(table: re.Match[str]) -> str:
    return "\n".join(f"    {line.replace('``', '')}" for line in table[1].splitlines())
