"""Dict of tables by name: a module that takes any name."""

from __future__ import annotations

from collections.abc import ItemsView, Iterator, KeysView
from typing import Any
from urllib.parse import unquote

from torch import nn
from typing_extensions import override

_ATTRIBUTES = frozenset(vars(nn.ModuleDict()))  # a module must not take their place


class TableDict(nn.ModuleDict):
    """``nn.ModuleDict`` that takes any name, such as "type", "keys" or "user.id".

    In a state dict, a name with a dot, or of an attribute that modules assign to ("training"), is
    written as a URL has it; the others are written as they are.

    Example:
        >>> tables = TableDict({"type": nn.Identity(), "user.id": nn.Identity()})
        >>> list(tables), "type" in tables, [path for path, _ in tables.named_children()]
        (['type', 'user.id'], True, ['type', '%75ser%2Eid'])
    """

    @override
    def add_module(self, name: str, module: nn.Module | None) -> None:
        if not isinstance(name, str):
            raise TypeError(f"name: expected a str, got {name!r}")
        if not name:
            raise ValueError("name: expected a name, got ''")
        if not isinstance(module, nn.Module):
            raise TypeError(f"{name}: expected a module, got {module!r}")
        self._modules[_to_key(name)] = module  # no attribute: those of nn.ModuleDict stay

    @override
    def __getitem__(self, key: str) -> nn.Module:
        return super().__getitem__(_to_key(key))

    @override
    def __delitem__(self, key: str) -> None:
        super().__delitem__(_to_key(key))

    @override
    def __contains__(self, key: str) -> bool:
        return super().__contains__(_to_key(key))

    @override
    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    @override
    def keys(self) -> KeysView[str]:
        return self._by_name().keys()

    @override
    def items(self) -> ItemsView[str, nn.Module]:
        return self._by_name().items()

    def _by_name(self) -> dict[str, Any]:
        return {_to_name(key): module for key, module in self._modules.items()}


def _to_key(name: str) -> str:
    """Return the name of a module that stands for ``name``: itself, if it may."""
    is_key = _to_name(name) != name  # it would be read as another name
    return _escape(name) if "." in name or name in _ATTRIBUTES or is_key else name


def _to_name(key: str) -> str:
    """Return the name that ``key`` stands for."""
    name = unquote(key)
    return name if name and _escape(name) == key else key


def _escape(name: str) -> str:
    """Escape the first character, by which it is known, and those that a key must not have."""
    rest = name[1:].replace("%", "%25").replace(".", "%2E")
    return "".join(f"%{byte:02X}" for byte in name[0].encode()) + rest


__all__ = ["TableDict"]
