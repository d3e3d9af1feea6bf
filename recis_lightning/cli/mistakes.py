"""Two lines for a mistake in settings: its place and what is wrong there, and a hint."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import yaml

from recis_lightning.cli.places import classless, lines_of
from recis_lightning.close_names import closest

_SHOWN = 80  # characters of a value

# Messages of jsonargparse: the places that lead to a mistake, and then the mistake.
_STEP = re.compile(
    r"Parser key \"(?P<key>[\w.]+)\":"
    r"|given class_path '(?P<cls>[\w.]+)':"
    r"|(?:[Oo]ption|[Kk]ey) '(?P<option>[\w.\-]+)'"
    r"|dot import path string: (?P<bare>\S+)"
    r"|[Nn]o module named '(?P<module>[\w.]+)'"
    r"|has no attribute '(?P<attribute>\w+)'"
    r"|the following arguments are required: (?P<required>[\w., ]+)"
    r"|Not a valid subclass of (?P<base>\w+)\. Got value: (?P<given>.*)"
    r"|Expected an? (?P<type>.+?)\. Got value: (?P<value>.*)"
)
_UNION = re.compile(r"Subtypes: \[(?P<types>.+)\]\n(?:.*\n)*?\s*Given value: (?P<value>.*)")
_VALUE_CLASS = re.compile(r".*Got value: Namespace\(class_path='([\w.]+)'")
_ALONE = re.compile(r"\{'init_args': \{'(\w+)'")  # arguments, of no class
_UNRECOGNIZED = re.compile(r"[Uu]nrecognized arguments: (.*)")

# Those that are not abstract, but do nothing.
_BASES = ("lightning.pytorch.callbacks.Callback", "lightning.pytorch.callbacks.callback.Callback")


class Mistake(NamedTuple):
    """Mistake in settings.

    Attributes:
        message: Where it is, and what is wrong.
        hint: What to do; None for the command that lists the settings.
        words: Words that stand in the line of a file where it is; none, if that is not known.
        owner: Class of which the last word is a setting, "" for none; None if it is not known.
    """

    message: str
    hint: str | None = None
    words: tuple[str, ...] = ()
    owner: str | None = None


def leave(program: str, mistake: Mistake, cause: BaseException | None = None) -> NoReturn:
    """Print a mistake on stderr, in two lines, and exit with status 2.

    Args:
        program: The command, such as ``recis-lightning fit``.
        mistake: What to say.
        cause: Exception that it was found by.
    """
    message = " ".join(mistake.message.split())
    hint = mistake.hint or f"{program} --help lists the settings"
    print(f"{program}: error: {message}\nhint: {hint}", file=sys.stderr)
    raise SystemExit(2) from cause


def of_parser(text: str, options: Iterable[str], classes: Iterable[str]) -> Mistake:
    """Return the mistake that a message of jsonargparse is about.

    Args:
        text: The message, of any number of lines.
        options: Names of all settings, such as ``trainer.max_epochs``.
        classes: Names of classes that need no module.

    Example:
        >>> text = "Subcommand 'fit' does not accept option 'trainer.max_epoch'"
        >>> of_parser(text, ["trainer.max_epochs"], [])[:2]
        ('trainer.max_epoch: there is no such setting', 'did you mean trainer.max_epochs?')
    """
    place: list[str] = []
    owner: str | None = None
    for step in _STEP.finditer(text):
        found = step.groupdict()
        if found["key"]:
            place.append(found["key"])
        elif found["cls"]:
            owner = found["cls"]
            place.append(owner.rpartition(".")[2])
        elif found["option"]:
            if given := _VALUE_CLASS.match(text, step.end()):
                owner = given[1]
                place.append(owner.rpartition(".")[2])
            if owner is not None and _is_base(owner):
                return _missing_class(place[:-1], found["option"], classes)
            return _unknown_setting(place, found["option"], owner, options)
        elif found["required"]:
            if place:
                message = f"{found['required']}: a value is required"
                return Mistake(": ".join([*place, message]), f"add {found['required']} there")
        elif found["base"]:
            if alone := _ALONE.match(found["given"]):
                return _missing_class(place, alone[1], classes)
            return _wrong_type(place, found["base"], found["given"])
        elif found["type"]:
            return _wrong_type(place, found["type"], found["value"])
        else:
            name = found["bare"] or found["attribute"] or (owner or "").rpartition(".")[2]
            return _unknown_class(place, name, found["module"], owner, classes)
    if unrecognized := _UNRECOGNIZED.match(text):
        first = unrecognized[1].split()[0]
        if not first.startswith("-"):
            return Mistake(f"{first}: expected an option such as --trainer.max_epochs 3")
        return _unknown_setting([], first.lstrip("-").partition("=")[0], None, options)
    if unions := list(_UNION.finditer(text, text.rfind("Subtypes: ["))):
        return _wrong_type(place, unions[-1]["types"], unions[-1]["value"])
    if text.startswith("the following arguments are required: "):
        names = re.sub(r"\b\w+\.(?=model|data)", "", text.rpartition(": ")[2])
        return Mistake(
            f"{names}: a value is required",
            "name a file of settings, with -c FILE, or --model CLASS",
        )
    return Mistake(re.sub(r'^Parser key "([\w.]+)":', r"\1:", text.strip()))


def of_files(paths: Sequence[str], mistake: Mistake) -> Mistake:
    """Return a mistake with its place in files of settings, if that is certain.

    Args:
        paths: The files.
        mistake: From ``of_parser``.
    """
    lines: list[tuple[str, int, str]] = []
    for path in paths:
        try:
            text = Path(path).read_text(encoding="utf-8")
            content = yaml.safe_load(text)
        except (OSError, UnicodeDecodeError):
            return mistake
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark
            line = "" if mark is None else f", line {mark.line + 1}"
            return Mistake(
                f"{path}{line}: this is no YAML: {error.problem}",
                "check brackets and indents: spaces, no tabs",
            )
        except yaml.YAMLError as error:
            return Mistake(f"{path}: this is no YAML: {error}", "check it with an editor")
        if not isinstance(content, dict):
            got = "nothing" if content is None else type(content).__name__
            return Mistake(
                f"{path}: expected settings such as 'trainer: {{max_epochs: 1}}', got {got}",
                "recis-lightning fit --print_config prints a file with all settings",
            )
        if (alone := classless(text)) and "the class_path of" not in mistake.message:
            first, example = alone[0], f"{alone[0].keys[0]}: ..."
            return Mistake(
                f"{path}, line {first.line}: the class_path of {', '.join(first.keys)} is missing",
                "write the class beside its arguments, as in "
                f"{{class_path: {first.sibling}, init_args: {{{example}}}}}",
            )
        lines += [(path, n, line) for n, line in enumerate(text.splitlines(), 1)]
    words = [re.compile(rf"(?<![\w.]){re.escape(word)}(?![\w.])") for word in mistake.words]
    if not words:
        return mistake
    places = [(path, n) for path, n, line in lines if all(word.search(line) for word in words)]
    if mistake.owner is not None and len(places) > 1:  # of several such, each is wrong
        keys = (mistake.words[-1], mistake.owner)
        of_owner = [
            (path, n)
            for path in paths
            for n in lines_of(Path(path).read_text(encoding="utf-8"), *keys)
        ]
        places = of_owner[:1]
    if len(places) != 1:
        return mistake
    return mistake._replace(message=f"{places[0][0]}, line {places[0][1]}: {mistake.message}")


def _unknown_setting(
    place: Sequence[str], option: str, owner: str | None, options: Iterable[str]
) -> Mistake:
    known = list(options) if owner is None else _parameters(owner)
    close = closest(option, known)
    hint = f"did you mean {close}?" if close else None
    if owner is not None and not close:
        hint = f"{owner.rpartition('.')[2]} takes {', '.join(known) or 'no arguments'}"
    message = ": ".join([*place, option, "there is no such setting"])
    # In a file a setting is below another: the outermost that is unknown is its word.
    words = option.split(".")
    if owner is None and len(words) > 1:
        outer = {name.split(".")[0] for name in known}
        words = words[-1:] if words[0] in outer else words[:1]
    return Mistake(message, hint, (words[-1],), owner and owner.rpartition(".")[2])


def _missing_class(place: Sequence[str], option: str, classes: Iterable[str]) -> Mistake:
    """Return the mistake of arguments without the class that they are for."""
    head, _, rest = option.partition(".")
    if rest and head in classes:
        example = f"{{class_path: {head}, init_args: {{{rest}: ...}}}}"
    else:
        head, example = option, f"{{class_path: LoggerHook, init_args: {{{option}: ...}}}}"
    message = ": ".join([*place, f"the class_path of {head} is missing"])
    return Mistake(message, f"write the class beside its arguments, as in {example}", (head,), "")


def _is_base(class_path: str) -> bool:
    """Return whether nobody means a class: the parser takes it where none is named."""
    module, _, name = class_path.rpartition(".")
    found: Any = getattr(sys.modules.get(module), name, None)
    return inspect.isabstract(found) or class_path in _BASES


def _unknown_class(
    place: Sequence[str], name: str, module: str | None, owner: str | None, classes: Iterable[str]
) -> Mistake:
    last = name.rpartition(".")[2]
    given = owner if owner is not None and owner.endswith(last) else name
    place = place[:-1] if place and place[-1] == last else place
    beside = vars(sys.modules.get(given.rpartition(".")[0], object))
    close = closest(last, [*(one for one in beside if one[:1].isupper()), *classes])
    why = f"there is no class {given}"
    if module is not None:
        why = f"there is no module {module}, of the class {given}"
    if close == last:
        hint = f"{last} exists, but this setting takes another kind of class"
        why = f"{given} does not fit"
    elif close:
        hint = f"did you mean {close}?"
    elif given.rpartition(".")[0] in sys.modules:
        hint = f"{given.rpartition('.')[0]} has no class of that name, nor one like it"
    elif "." in given:
        hint = "modules are looked for in the current folder, and where Python finds them"
    else:
        hint = "a class of yours has its module before it, such as my_project.models.Model"
    return Mistake(": ".join([*place, why]), hint, (given if "." in given else last,))


def _wrong_type(place: Sequence[str], types: str, value: str) -> Mistake:
    types = re.sub(r"<class '([\w.]+)'>", r"\1", types)
    types = re.sub(r"\b(?:\w+\.)+(\w+)", r"\1", types).replace("NoneType", "None")
    head, _, last = types.rpartition(", ")
    if head and "[" not in last:
        types = f"{head} or {last}"
    shown = value if len(value) <= _SHOWN else f"{value[:_SHOWN]}..."
    words = (place[-1].rpartition(".")[2], value) if place else ()
    return Mistake(": ".join([*place, f"expected {types}, got {shown}"]), None, words)


def _parameters(class_path: str) -> list[str]:
    """Return the names of a class's arguments, those that it hands to its parents included."""
    module, _, name = class_path.rpartition(".")
    found: Any = getattr(sys.modules.get(module), name, None)
    names: dict[str, None] = {}
    for one in inspect.getmro(found) if isinstance(found, type) else [found]:
        try:
            parameters = inspect.signature(one).parameters.values()
        except (TypeError, ValueError):
            break
        names |= {
            p.name: None for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        }
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return list(names)
