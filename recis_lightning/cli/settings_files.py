"""Files of settings: which a command line names, and those that nothing should parse."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from recis_lightning.cli.mistakes import Mistake

__all__ = ["config_files", "settings_files", "unreadable"]

_SUFFIXES = (".yaml", ".yml", ".json")
_MOST_VALUES = 1_000_000  # with each alias written out; settings have some hundreds
_MOST_LEVELS = 100


def config_files(words: Sequence[str]) -> list[str]:
    """Return the files of settings that a command line names by ``-c`` or ``--config``."""
    files = [after for word, after in pairwise(words) if word in ("-c", "--config")]
    return files + [word.partition("=")[2] for word in words if word.startswith("--config=")]


def settings_files(words: Sequence[str]) -> list[str]:
    """Return those, and the files that settings name as values, as ``--data data.yaml`` does."""
    values = [word.partition("=")[2] if word[:2] == "--" else word for word in words]
    named = [value for value in values if value.endswith(_SUFFIXES)]
    return [path for path in dict.fromkeys([*config_files(words), *named]) if _is_file(path)]


def _is_file(path: str) -> bool:
    try:
        return Path(path).is_file()
    except OSError:  # a value that is too long for a name
        return False


def unreadable(paths: Iterable[str]) -> Mistake | None:
    """Return the mistake of a file that must not be parsed into settings; None if all may be.

    One that is no UTF-8; that sets a key twice; whose alias stands within what it stands for; or
    that is too deep, or too large once each alias is written out. What is merely wrong in a file
    is found later.

    Args:
        paths: Files that are there.
    """
    for path in paths:
        try:
            text = Path(path).read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            number = error.object[: error.start].count(b"\n") + 1
            return Mistake(
                f"{path}, line {number}: this is no UTF-8: {error.reason}",
                "save the file as UTF-8",
            )
        except OSError as error:
            return Mistake(f"{path}: {error.strerror or error}", "name a file that can be read")
        try:
            root = yaml.compose(text, Loader=yaml.SafeLoader)
        except RecursionError:
            return _too_deep(path)
        except yaml.YAMLError:
            continue  # said when it is parsed
        if root is not None and (mistake := _of_size(path, root)) is not None:
            return mistake
        if root is not None and (mistake := _of_keys(path, root)) is not None:
            return mistake
    return None


def _of_keys(path: str, root: Any) -> Mistake | None:
    """Return the mistake of a mapping that has a key twice: the later value would win silently."""
    walk, seen = [root], {id(root)}
    while walk:
        node = walk.pop()
        lines: dict[str, int] = {}
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode) or key.value == "<<":
                continue
            if key.value in lines:
                return Mistake(
                    f"{path}, line {line}: {key.value} is set here, and in line {lines[key.value]}",
                    "leave one of them",
                )
            lines[key.value] = line
        new = [part for part in _parts(node) if id(part) not in seen]
        seen.update(map(id, new))
        walk += new
    return None


def _too_deep(path: str) -> Mistake:
    message = f"{path}: its values are more than {_MOST_LEVELS} levels deep"
    return Mistake(message, "make it flatter")


def _of_size(path: str, root: Any) -> Mistake | None:
    """Return the mistake of a document that is recursive, too deep or too large."""
    sizes: dict[int, int] = {}
    above: set[int] = set()  # nodes that the walk is within
    walk = [(root, False)]
    while walk:
        node, is_done = walk.pop()
        key = id(node)
        if is_done:
            above.discard(key)
            sizes[key] = 1 + sum(sizes[id(part)] for part in _parts(node))
            continue
        if key in above:
            line = node.start_mark.line + 1
            return Mistake(
                f"{path}, line {line}: this value has an alias (*) of itself in it",
                "write the value out in the place of the alias",
            )
        if key in sizes:
            continue
        if len(above) >= _MOST_LEVELS:
            return _too_deep(path)
        above.add(key)
        walk.append((node, True))
        walk += [(part, False) for part in _parts(node)]
    if sizes[id(root)] > _MOST_VALUES:
        return Mistake(
            f"{path}: its aliases (*) stand for {sizes[id(root)]:,} values", "write fewer of them"
        )
    return None


def _parts(node: Any) -> list[Any]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []
