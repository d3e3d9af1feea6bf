"""Text of row filters: their trees, in which columns have their own names, and back."""

from __future__ import annotations

import ast
import copy
import keyword
import re
import unicodedata
from typing import Any

__all__ = ["constant_of", "parsed", "refusal", "written"]

# Strings, which keep their backticks; and names in backticks.
_QUOTED = re.compile(
    r"""'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*"|`(?P<name>[^`]+)`""",
    re.DOTALL,
)

# Of SQL, and of assignments; the first that fits.
_OTHER_SYNTAX = [
    (re.compile(r"\bis\s+not\s+null\b", re.IGNORECASE), "write 'price is not None'"),
    (re.compile(r"\bis\s+null\b", re.IGNORECASE), "write 'price is None'"),
    (re.compile(r"<>"), "unequal is written '!='"),
    (re.compile(r"(?<![<>=!])=(?!=)"), "equal is written '=='"),
    (re.compile(r"\b(AND|OR|NOT|IN)\b"), "'and', 'or', 'not' and 'in' are written small"),
    (re.compile(r"&&|\|\||!(?!=)"), "write 'and', 'or' and 'not'"),
]


def parsed(text: str) -> ast.expr:
    """Return the tree of a filter, in which columns have their own names."""
    names: dict[str, str] = {}

    def placeholder(found: re.Match[str]) -> str:
        if found["name"] is None:
            return found[0]
        key = f"quoted_{len(names)}_"
        while key in text:
            key += "_"
        names[key] = found["name"]
        return f" {key} "

    try:
        tree = ast.parse(_QUOTED.sub(placeholder, text.strip()).strip(), mode="eval").body
    except (SyntaxError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            f"filter: expected comparisons such as \"country == 'DE'\", got {text!r}{_place(error)}"
            f"; {_hint(text)}"
        ) from error
    except (MemoryError, RecursionError):
        raise ValueError(f"filter: {text!r:.100} is nested too deeply") from None
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            node.id = names.get(node.id, node.id)
    return tree


def _hint(text: Any) -> str:
    """Return how to write what was probably meant, where Python reads nothing."""
    plain = _QUOTED.sub("''", text) if isinstance(text, str) else ""
    for pattern, hint in _OTHER_SYNTAX:
        if pattern.search(plain):
            return hint
    return 'a column whose name is no identifier stands in backticks, as in "`user id` > 3"'


def _place(error: Exception) -> str:
    if not isinstance(error, SyntaxError) or not error.text or not error.offset:
        return ""
    rest = error.text.rstrip("\n")[error.offset - 1 :]
    return f", wrong at {rest!r:.40}" if rest else ""


def written(node: ast.AST) -> str:
    """Return the text of a part of a filter, with backticks where they are needed."""
    node = copy.deepcopy(node)
    for part in ast.walk(node):
        if isinstance(part, ast.Name) and not _is_bare(part.id):
            part.id = f"`{part.id}`"
    return ast.unparse(node)


def _is_bare(name: str) -> bool:
    """Return whether a name means itself where it stands without backticks."""
    # Python reads identifiers in this form: another column may have it as its name.
    is_normal = unicodedata.normalize("NFKC", name) == name
    return name.isidentifier() and not keyword.iskeyword(name) and is_normal


def constant_of(node: ast.expr, text: str) -> Any:
    """Return a constant of a filter, a tuple for any collection; ValueError for what is none."""
    try:
        value = ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        raise refusal(node, text) from None
    value = tuple(value) if isinstance(value, list | set) else value
    for one in value if isinstance(value, tuple) else [value]:
        if isinstance(one, int) and abs(one) >= 2**256:  # more than any column's type has
            raise refusal(node, text)
    return value


def refusal(node: ast.expr, text: str) -> ValueError:
    """Return the error of a part that is no comparison of columns with constants."""
    return ValueError(
        f"filter: expected comparisons of columns with constants, got {written(node)!r} "
        f"in {text!r}{_advice(node)}"
    )


def _advice(node: ast.AST) -> str:
    """Return how to write what was probably meant."""
    if isinstance(node, ast.BinOp | ast.Attribute | ast.Subscript | ast.Call):
        return "; if it is the name of a column, put it in backticks"
    if isinstance(node, ast.Name) and node.id.capitalize() in ("Null", "None", "True", "False"):
        return "; None, True and False are written so, and a null is None"
    return ""
