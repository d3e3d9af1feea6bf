"""Groups of several modules that are looked up together, kept as long as all of these are there."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

from recis_lightning.lookup.current_groups import CurrentGroups
from recis_lightning.lookup.features import Feature

_MOST = 16  # combinations of features that some modules have groups for, and of modules


class KeptGroups:
    """Groups by the modules that they are of, and by the features that these look up.

    Modules are known by weak references: what is kept of them goes with the first that goes.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[int, ...], _OfModules] = {}

    def of(self, modules: Sequence[Any], features: tuple[Feature, ...]) -> CurrentGroups:
        """Return the groups of features.

        Args:
            modules: That are looked up, in their order.
            features: Of all of them.
        """
        key = tuple(map(id, modules))
        found = self._kept.get(key)
        if found is None:
            if len(self._kept) >= _MOST:
                self._kept.clear()
            found = self._kept[key] = _OfModules(modules, lambda: self._kept.pop(key, None))
        return found.of(features)

    def __len__(self) -> int:
        return len(self._kept)


class _OfModules:
    """Groups of some modules, by their features."""

    def __init__(self, modules: Sequence[Any], forget: Any) -> None:
        self._references = [weakref.ref(module, lambda _: forget()) for module in modules]
        self._by_features: dict[tuple[Feature, ...], CurrentGroups] = {}

    def of(self, features: tuple[Feature, ...]) -> CurrentGroups:
        kept = self._by_features
        if features not in kept and len(kept) >= _MOST:
            kept.clear()
        return kept.setdefault(features, CurrentGroups())


__all__ = ["KeptGroups"]
