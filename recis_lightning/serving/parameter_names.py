"""Names of a program's parameters among those of the module that is trained.

The module that is exported may be the trained one, hold it (to add a sigmoid, for one), or be a
part of it. Then a prefix tells the names of the one from those of the other.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection


def match_names(names: Collection[str], trained: Collection[str]) -> dict[str, str]:
    """Return the trained module's name of each parameter of the exported one that it has.

    Args:
        names: Names in the exported module.
        trained: Names in the trained one.

    Returns:
        By the prefix that fits the most names: name -> its name in the trained module.

    Raises:
        ValueError: Two prefixes fit equally many names.

    Example:
        >>> match_names(["model.tower.weight", "scale"], ["tower.weight", "tower.bias"])
        {'model.tower.weight': 'tower.weight'}
        >>> match_names(["weight"], ["tower.weight"])
        {'weight': 'tower.weight'}
    """
    by_last: defaultdict[str, list[str]] = defaultdict(list)
    for other in trained:
        by_last[_last(other)].append(other)
    fits: Counter[tuple[str, str]] = Counter()  # prefix of the exported name, of the trained one
    for name in names:
        for other in by_last.get(_last(name), ()):
            if f".{name}".endswith(f".{other}"):
                fits[name.removesuffix(other), ""] += 1
            elif other.endswith(f".{name}"):
                fits["", other.removesuffix(name)] += 1
    most = max(fits.values(), default=0)
    best = [prefixes for prefixes, count in fits.items() if count == most]
    if not best:
        return {}
    if ("", "") in best:
        best = [("", "")]
    if len(best) > 1:
        places = sorted(one or other for one, other in best)
        raise ValueError(
            f"the exported parameters may be those of {places[0]!r} or {places[1]!r}; export the "
            "module that is trained, or one that holds it once"
        )
    ((exported, added),) = best
    found = {
        name: added + name.removeprefix(exported) for name in names if name.startswith(exported)
    }
    return {name: other for name, other in found.items() if other in trained}


def _last(name: str) -> str:
    return name.rpartition(".")[2]


__all__ = ["match_names"]
