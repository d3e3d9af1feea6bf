"""Memory that this process may still take, by the machine and by its control group."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")
# Files of a control group: its limit, what it uses, and what of that is only a copy of files.
_VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache", "total_shmem")
_VERSION_2 = ("memory.max", "memory.current", "file", "shmem")


def memory_left() -> int:
    """Return how many bytes may be taken so that half of the memory stays free; 0 if unknown.

    Whatever is free can serve as the kernel's cache of files.
    """
    return max(min((left - total // 2 for total, left in _limits()), default=0), 0)


def _limits() -> Iterator[tuple[int, int]]:
    """Yield total and available bytes of the machine, and of control groups with a limit."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        sizes = {line.split(":")[0]: 1024 * int(line.split()[1]) for line in lines}
        yield sizes["MemTotal"], sizes["MemAvailable"]
    except (OSError, ValueError, LookupError):
        return
    for folder, (limit, usage, cache, shared) in _groups():
        try:
            total, used = (int((folder / name).read_text()) for name in (limit, usage))
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            cached = int(stat.get(cache, 0)) - int(stat.get(shared, 0))
        except (OSError, ValueError):  # there is none, or it is "max"
            continue
        if total < sizes["MemTotal"]:
            yield total, total - used + max(cached, 0)


def _groups() -> Iterator[tuple[Path, tuple[str, str, str, str]]]:
    """Yield the folders of the process's control groups and those above, with their files."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, names = _CGROUPS, _VERSION_2
        elif "memory" in controllers.split(","):
            root, names = _CGROUPS / "memory", _VERSION_1
        else:
            continue
        folder = root / path.lstrip("/")
        while True:
            yield folder, names
            if folder in (root, Path(os.sep)):
                break
            folder = folder.parent


__all__ = ["memory_left"]
