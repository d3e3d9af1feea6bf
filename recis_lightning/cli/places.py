"""Places of values in files of settings: file, line and keys."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import yaml

__all__ = ["Classless", "classless", "lines_of", "place_of", "place_of_value"]

_TRANSFORM = re.compile(r"transform (\w+) ('.*?'):")  # begins what is wrong with one


class _Setting(NamedTuple):
    """Setting in a file: its keys, from the outermost, its value, its line, and its class."""

    keys: tuple[str, ...]
    value: Any
    line: int
    owner: str


def lines_of(text: str, key: str, owner: str) -> list[int]:
    """Return the lines of settings of a class, such as of ``default`` of each ``Label``.

    Args:
        text: Content of a file.
        key: Name of the setting.
        owner: Name of the class.
    """
    found = _settings_of(yaml.compose(text, Loader=yaml.SafeLoader), (), "")
    return [one.line for one in found if one.keys[-1] == key and one.owner == owner]


class Classless(NamedTuple):
    """Member of a list without a class, beside one with a class.

    Attributes:
        line: Where it begins.
        keys: Its own.
        sibling: Class of the other.
    """

    line: int
    keys: list[str]
    sibling: str


def classless(text: str) -> list[Classless]:
    """Return the members of lists in settings that have no ``class_path`` where others have one.

    Args:
        text: Content of a file.
    """
    return list(_classless_below(yaml.compose(text, Loader=yaml.SafeLoader)))


def _classless_below(node: Any) -> Iterable[Classless]:
    parts = node.value if isinstance(node, yaml.CollectionNode) else ()
    if isinstance(node, yaml.SequenceNode):
        members = [
            (part, {key.value: value for key, value in part.value})
            for part in parts
            if isinstance(part, yaml.MappingNode)
        ]
        classes = [keys["class_path"].value for _, keys in members if "class_path" in keys]
        for part, keys in members:
            if classes and keys and "class_path" not in keys:
                yield Classless(part.start_mark.line + 1, list(keys), classes[0])
    for part in parts:
        yield from _classless_below(part[1] if isinstance(part, tuple) else part)


def place_of(
    paths: Iterable[str], owner: str, message: str, words: Sequence[str] = ()
) -> str | None:
    """Return where a value stands that a class refuses, such as ``"c.yaml, line 3: data"``.

    Args:
        paths: Files of settings.
        owner: Name of the class.
        message: What it says: the argument's name and a colon, and at the end what it got.
        words: The command line: what it sets is in no file.

    Returns:
        None if it is not certain.
    """
    if transform := _TRANSFORM.match(message):  # of one that is called as its entry
        owner, name = transform.groups()
        return place_of(paths, owner, f"name: got {name}", words)
    argument = re.match(r"(\w+): ", message)
    if argument is None or _is_given(argument[1], words):
        return None
    found = _read(paths)
    if message.endswith("got neither"):  # then it is in no line of its own
        of_class = [(path, one) for path, one in found if one.keys[-1] == "class_path"]
        return _named([(path, one) for path, one in of_class if one.owner == owner])
    found = [(path, one) for path, one in found if one.keys[-1] == argument[1]]
    got = message.rpartition("got ")[2].strip("'\"")
    # One of another value is not meant: a later file or the command line took its place.
    written = [one for one in found if _is_written(one[1].value, got, message)]
    lists = [one for one in found if not isinstance(one[1].value, yaml.ScalarNode)]
    for fits in (
        [one for one in written if one[1].owner == owner],
        written,
        [one for one in lists if one[1].owner == owner],
        lists,
    ):
        if fits:
            return _named(fits)
    return None


def place_of_value(
    paths: Iterable[str], key: str, value: str, words: Sequence[str] = ()
) -> str | None:
    """Return where a setting has a value, or has it in a list or dict.

    Args:
        paths: Files of settings.
        key: Name of the setting, or of the one whose list or dict has the value.
        value: The value.
        words: The command line: what it sets is in no file.

    Returns:
        Such as ``"c.yaml, line 3"``; None if it is not certain.
    """
    if _is_given(key, words):
        return None
    lines = [
        f"{path}, line {node.start_mark.line + 1}"
        for path, one in _read(paths)
        if one.keys[-1] == key
        for node in _scalars(one.value)
        if node.value == value
    ]
    return lines[0] if len(lines) == 1 else None


def _read(paths: Iterable[str]) -> list[tuple[str, _Setting]]:
    """Return all settings of files; none if one of them cannot be read."""
    found: list[tuple[str, _Setting]] = []
    for path in paths:
        try:
            root = yaml.compose(Path(path).read_text("utf-8-sig"), Loader=yaml.SafeLoader)
        except (OSError, UnicodeDecodeError, yaml.YAMLError):
            return []
        found += [(path, one) for one in _settings_of(root, (), "")]
    return found


def _named(found: Sequence[tuple[str, _Setting]]) -> str | None:
    """Return the place of a setting, with the keys above it; None unless there is one."""
    if len(found) != 1:
        return None
    path, setting = found[0]
    keys = [key for key in setting.keys[:-1] if key != "init_args"]
    return ": ".join([f"{path}, line {setting.line}", *filter(None, [".".join(keys)])])


def _is_given(argument: str, words: Sequence[str]) -> bool:
    """Return whether a command line, but for the files that it names, speaks of an argument."""
    name = re.compile(rf"(?<!\w){re.escape(argument)}(?!\w)")
    return any(
        name.search(word)
        for previous, word in pairwise(["", *words])
        if previous not in ("-c", "--config") and not word.startswith("--config=")
    )


def _is_written(node: Any, got: str, message: str) -> bool:
    if not isinstance(node, yaml.ScalarNode):
        return False
    if node.value in (got, f".{got}"):  # .nan and .inf
        return True
    if f"got {node.value!r}" in message or f"in {node.value!r}" in message:
        return True
    try:
        return float(node.value) == float(got)
    except ValueError:
        return False


def _scalars(node: Any) -> Iterable[Any]:
    """Yield a node if it is a scalar, else those of a list, or the values of a dict."""
    if isinstance(node, yaml.ScalarNode):
        yield node
    for part in node.value if isinstance(node, yaml.CollectionNode) else ():
        yield from _scalars(part[1] if isinstance(part, tuple) else part)


def _settings_of(node: Any, keys: tuple[str, ...], owner: str) -> Iterable[_Setting]:
    """Yield all settings below a node."""
    if isinstance(node, yaml.SequenceNode):
        for number, part in enumerate(node.value):
            yield from _settings_of(part, (*keys, str(number)), owner)
    if not isinstance(node, yaml.MappingNode):
        return
    if not keys or keys[-1] != "init_args":
        owner = ""
    for key, value in node.value:
        if key.value == "class_path" and isinstance(value, yaml.ScalarNode):
            owner = value.value.rpartition(".")[2]
    for key, value in node.value:
        if isinstance(key, yaml.ScalarNode):
            yield _Setting((*keys, key.value), value, key.start_mark.line + 1, owner)
            yield from _settings_of(value, (*keys, key.value), owner)
